"""What the sources of a run are made of: the judges and pairing that the recipe names, or objects of the user instead."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay.chat import Chat
from selfplay.errors import RecipeError, SelfplayError
from selfplay.filters import NamedFilter, Programs, load_programs
from selfplay.judges import make_judge
from selfplay.judges.against import measuring
from selfplay.judges.lift import function_identity
from selfplay.judges.python import own_judge
from selfplay.judges.win_rate_scale import check_win_rate_scale
from selfplay.models import for_judge, open_generator
from selfplay.panel import HeldOut
from selfplay.progress import Reporter
from selfplay.prompts import PromptPool
from selfplay.protocols import Judge, PairFilter, PairSelector
from selfplay.recipe import Recipe, SourceView
from selfplay.recipe_judges import JudgeRecipe
from selfplay.trust import require_trust


@dataclass(frozen=True, slots=True)
class Source:
    """Prompts with a judge and a pairing. A recipe without `sources` has one, of no name."""

    name: str
    recipe: SourceView
    pool: PromptPool
    judge: Judge | None
    selector: PairSelector | None  # the user's own; else the recipe's
    filters: tuple[NamedFilter, ...] | None  # the user's own; else the recipe's
    programs: Programs  # what the recipe's filters name as programs of the user
    num_canaries: int = 0  # prompts of a round that the judge sees canaries of
    calibration: Sequence[dict[str, Any]] = ()  # its reward models on the calibration files that the recipe names


@dataclass(frozen=True, slots=True)
class OwnParts:
    """What the user passed as objects for one source; each stands in for what the recipe says."""

    judge: Judge | None = None
    selector: PairSelector | None = None
    filters: Sequence[PairFilter] | None = None

    def named_filters(self) -> tuple[NamedFilter, ...] | None:
        """The filters under names that change when their source does."""
        if self.filters is None:
            return None
        return tuple(NamedFilter(function_identity("function", one), one) for one in self.filters)


def own_parts(
    recipe: Recipe,
    judge: Judge | Mapping[str, Judge] | None,
    selector: PairSelector | Mapping[str, PairSelector] | None,
    filters: Sequence[PairFilter] | Mapping[str, Sequence[PairFilter]] | None,
) -> dict[str, OwnParts]:
    """The user's objects by source. RecipeError where it isn't clear whose they are."""
    names = list(recipe.by_source)
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, given in (("judge", judge), ("selector", selector), ("filters", filters)):
        if given is None:
            continue
        if isinstance(given, Mapping) != (recipe.sources is not None):
            raise RecipeError(
                f"{key} names sources, but this recipe has none: pass it alone"
                if recipe.sources is None
                else f"this recipe has the sources {', '.join(names)}: say whose {key} it is, as in {key}={{{names[0]!r}: ...}}"
            )
        for name, one in given.items() if isinstance(given, Mapping) else [("", given)]:
            if name not in found:
                raise RecipeError(f"{key}: the recipe has no source {name!r}; there are {', '.join(names)}")
            found[name][key] = own_judge(one) if key == "judge" else one
    return {name: OwnParts(**parts) for name, parts in found.items()}


def open_sources(
    recipe: Recipe,
    pools: Mapping[str, PromptPool],
    own: Mapping[str, OwnParts],
    folder: Path,
    *,
    allow_code: bool,
    report: Reporter,
) -> tuple[tuple[Source, ...], tuple[HeldOut, ...]]:
    """The sources of a run and their held-out prompts. A judge that the recipe names several times is one. RecipeError for a
    reward model that isn't shown to beat a coin.
    """
    made: dict[str, Judge] = {}

    def opened(asked: JudgeRecipe | None) -> Judge | None:
        if asked is None:
            return None
        return make_judge(
            asked,
            allow_code=allow_code,
            open_model=lambda folder, chat: open_judge_model(recipe, folder, chat),
            made=made,
        )

    def opened_for_panel(view: SourceView) -> Judge | None:
        with panel_keys(view):
            return opened(view.heldout_judge)

    sources: list[Source] = []
    heldout: list[HeldOut] = []

    def open_source(name: str, view: SourceView) -> None:
        pool, mine = pools[name], own[name]
        programs = load_programs(view.pairs, allow_code=allow_code) if mine.filters is None else {}
        report.note(
            f"{_prompts_of(name)}: {len(pool.train)} for training, {len(pool.heldout)} held out (form: {pool.form})"
        )
        if view.idle_panel_judge is not None:
            report.note(f"{_panel_of(name)}: {view.idle_panel_judge}")
        judge = panel_judge = mine.judge if mine.judge is not None else opened(view.judge)
        if mine.judge is None or view.evaluate.judge is not None:
            panel_judge = opened_for_panel(view)
        panel_judge = measuring(panel_judge, named=view.evaluate.judge is not None)
        if panel_judge is None and judge is not None and pool.heldout:
            report.note(f"{_panel_of(name)}: no scores; {_WHY_NO_SCORE}")
        calibration = [] if mine.judge is not None else require_trust("judge", view, judge, folder, report)
        require_trust("evaluate.judge", view, panel_judge, folder, report)
        # what a judge of the user's own would make of canaries nobody knows, so it sees those alone that are asked for
        count = view.num_canaries if mine.judge is None else view.audit.canaries or 0
        filters = mine.named_filters()
        sources.append(Source(name, view, pool, judge, mine.selector, filters, programs, count, calibration))
        heldout.append(HeldOut(name, pool.heldout[: recipe.evaluate.num_prompts], panel_judge))

    recipe.for_each(open_source)
    return tuple(sources), tuple(heldout)


@contextmanager
def panel_keys(view: SourceView) -> Iterator[None]:
    """For the block that makes the panel's judge: errors about its keys name those of `evaluate.judge`, where it has one."""
    try:
        yield
    except SelfplayError as error:  # which calls any judge's keys judge.x
        if view.evaluate.judge is None or not str(error).startswith("judge."):
            raise
        raise type(error)(f"evaluate.{error}") from error


_WHY_NO_SCORE = (
    "each policy would mark its own work, or scores are relative within a prompt, or win rates would be added to scores; name "
    "another judge in evaluate.judge"
)


def _prompts_of(source: str) -> str:
    return f"prompts of {source}" if source else "prompts"


def _panel_of(source: str) -> str:
    return f"panel of {source}" if source else "panel"


def require_parts(view: SourceView, own: OwnParts) -> None:
    """RecipeError where there are no prompts, or scores or win rates would be read that nobody gives."""
    _ = view.prompts.needed_source
    if own.judge is None and own.selector is None:
        view.check_judge_given()
        check_win_rate_scale(view)
    if own.selector is None:
        view.check_win_rates_given()


def note_drops(pools: Mapping[str, PromptPool], report: Reporter) -> None:
    """Says what was dropped when the prompts were read; the rows themselves are in drops.jsonl."""
    for name, pool in pools.items():
        for line in pool.drop_lines:
            report.note(f"{_prompts_of(name)}: {line}")


def open_judge_model(recipe: Recipe, folder: Path, chat: Chat) -> Any:
    """A generator of a judge's own model, on the same kind of engine."""
    return open_generator(for_judge(recipe.generator, folder), folder, chat, seed=recipe.seed)
