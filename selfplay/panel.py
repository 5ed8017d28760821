"""Plays the held-out panel of a policy: completions, greedy completions, their judgements, and then eval.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.evaluate import panel_figures
from selfplay.judges.against import EVEN, OPPONENT, compares, identity_against
from selfplay.progress import Reporter
from selfplay.protocols import Generator, Judge, JudgeContext
from selfplay.recipe import Recipe
from selfplay.records import Records
from selfplay.stages import Judging, greedy, judge_each, sample_groups, sampling_at, shards, timed
from selfplay.train.kl import KLJob
from selfplay.types import Group, Judgement, Prompt, Sampling, derive_seed


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The held-out prompts of a source and their judge. `name` is "" where the recipe has one source."""

    name: str
    prompts: Sequence[Prompt]
    judge: Judge | None

    @property
    def compares(self) -> bool:
        """Whether scores are win rates against the initial policy, whose own is 1/2 and asks nobody."""
        return compares(self.judge)

    @property
    def judge_identity(self) -> str | None:
        """What the scores of its panel depend on."""
        if self.judge is None:
            return None
        return identity_against(self.judge) if self.compares else self.judge.identity


@dataclass(frozen=True, slots=True)
class Panel:
    """The same prompts and seeds for every policy. `round` is -1 for the initial policy, whose panel lies in `initial`."""

    recipe: Recipe
    sources: tuple[HeldOut, ...]  # those that hold any prompts out
    report: Reporter
    initial: Path

    def sampling(self, *, between: bool) -> Sampling:
        """Untruncated sampling at the panel's temperature; the rounds between may get fewer completions."""
        recipe = self.recipe.evaluate
        count = recipe.num_completions_between if between and recipe.num_completions_between else recipe.num_completions
        base = sampling_at(self.recipe.generator, 0, seed=derive_seed(self.recipe.seed, "panel"))
        return Sampling(
            num_completions=count,
            temperature=recipe.temperature,
            max_tokens=recipe.max_tokens or base.max_tokens,
            stop=base.stop,
            seed=base.seed,
        )

    def draws(self, *, between: bool) -> dict[str, Sampling]:
        """How the panel is sampled, by the name of its folder."""
        sampling = self.sampling(between=between)
        return {"temperature": sampling} | ({"greedy": greedy(sampling)} if self.recipe.evaluate.greedy else {})

    def sample(self, generator: Generator, folder: Path, *, round: int, between: bool) -> None:
        """The panel's completions. Nothing where they are all there."""
        if (folder / "eval.json").exists() or not self.sources:
            return
        with timed(folder, "panel"):
            for source in self.sources:
                for name, sampling in self.draws(between=between).items():
                    self._groups(source, generator, folder, name, sampling, round)

    def judge_all(self, generator: Generator, folder: Path, *, round: int, between: bool) -> None:
        """The scores of the panel's completions. Nothing where there is no judge, or they are all there; a judge that compares
        is asked about no completion of the initial policy, with which it compares all others.
        """
        judged = [one for one in self.sources if one.judge is not None and not (round < 0 and one.compares)]
        if (folder / "eval.json").exists() or not judged:
            return
        context = JudgeContext(round, derive_seed(self.recipe.seed, "panel judge"), generator)
        asked = []
        with timed(folder, "panel judge"):
            for source in judged:
                assert source.judge is not None
                for name, sampling in self.draws(between=between).items():
                    groups = self._groups(source, generator, folder, name, sampling, round)
                    judgements = folder / "heldout" / source.name / f"{name}-judgements"
                    label = f"judging the panel, {_named(name, source)}"
                    against = self.opponents(source, name) if source.compares else None
                    asked.append(Judging(source.judge, groups, judgements, label, against=against))
            judge_each(asked, context, self.report)

    def opponents(self, source: HeldOut, name: str) -> Sequence[Group]:
        """What the initial policy wrote, in the draw of that name."""
        return Records(Group, shards(self.initial / "heldout" / source.name / name))

    def _groups(
        self, source: HeldOut, generator: Generator, folder: Path, name: str, sampling: Sampling, round: int
    ) -> Sequence[Group]:
        label = f"panel of the {'initial policy' if round < 0 else f'policy of round {round}'}, {_named(name, source)}"
        shards = folder / "heldout" / source.name / name
        return sample_groups(generator, source.prompts, sampling, shards, self.report, label)

    def finish(self, folder: Path, *, initial: Path, is_initial: bool) -> dict[str, Any] | None:
        """The figures, in eval.json; None without held-out prompts. Here the engine is gone: KL loads a model."""
        if not self.sources:
            return None
        path = folder / "eval.json"
        if not path.exists():
            with timed(folder, "kl"):
                kl = 0.0 if is_initial else self._kl(folder / "heldout", initial)
            store.write_json(path, self._all_figures(folder / "heldout", kl, is_initial=is_initial))
        found: dict[str, Any] = store.read_json(path)
        return found

    def _all_figures(self, heldout: Path, kl: float | None, *, is_initial: bool) -> dict[str, Any]:
        """Of all held-out prompts; several sources have figures of their own beside them, and their scores there alone, since
        judges may score on different scales. KL is of all.
        """
        if [source.name for source in self.sources] == [""]:
            return self._figures(heldout, self.sources[0], kl, is_initial=is_initial)
        own = {one.name: self._figures(heldout, one, None, is_initial=is_initial) for one in self.sources}
        groups = [_read_groups(heldout, self.sources, name) for name in ("temperature", "greedy")]
        figures = panel_figures(groups[0], None, groups[1], None, kl=kl, temperature=self.recipe.evaluate.temperature)
        return figures | {"sources": own}

    def _figures(self, heldout: Path, source: HeldOut, kl: float | None, *, is_initial: bool) -> dict[str, Any]:
        groups, judgements = _read(heldout, "temperature", source, is_initial=is_initial)
        greedy_groups, greedy_judgements = _read(heldout, "greedy", source, is_initial=is_initial)
        figures = panel_figures(
            groups,
            judgements,
            greedy_groups,
            greedy_judgements,
            kl=kl,
            temperature=self.recipe.evaluate.temperature,
        )
        return figures | ({"win_rate_against": OPPONENT} if source.compares else {})

    def _kl(self, heldout: Path, initial: Path) -> float | None:
        # at another temperature the engine's raw logps are no expectation under the policy
        if not self.recipe.evaluate.kl or self.recipe.evaluate.temperature != 1.0:
            return None
        from selfplay.train.launch import launch

        train = self.recipe.train
        paths = tuple(str(p) for source in self.sources for p in shards(heldout / source.name / "temperature"))
        cap = None if train.max_pack_tokens == "auto" else train.max_pack_tokens
        result = launch(KLJob(str(initial), paths, bool(train.bf16), cap), self.report)
        kl: float | None = result["kl"]
        return kl


def _read_groups(heldout: Path, sources: Sequence[HeldOut], name: str) -> Sequence[Group]:
    return Records(Group, [path for source in sources for path in shards(heldout / source.name / name)])


def _read(
    heldout: Path, name: str, source: HeldOut, *, is_initial: bool
) -> tuple[Sequence[Group], Sequence[Judgement] | None]:
    groups = _read_groups(heldout, [source], name)
    if not groups or source.judge is None:
        return groups, None
    if is_initial and source.compares:
        return groups, [Judgement(group.prompt.id, (EVEN,) * len(group.completions)) for group in groups]
    return groups, Records(Judgement, shards(heldout / source.name / f"{name}-judgements"))


def _named(draw: str, source: HeldOut) -> str:
    return f"{draw}, {source.name}" if source.name else draw
