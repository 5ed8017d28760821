"""The pairs of judged groups, from their files: `selfplay pairs`."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.accounting import row_counts
from selfplay.errors import DataError, RecipeError, StorageError
from selfplay.filters import load_programs, make_filters
from selfplay.judges.win_rate_scale import check_win_rate_scale
from selfplay.pairing import Pairing, make_pairs
from selfplay.pairs import make_selector
from selfplay.protocols import FilterContext
from selfplay.recipe import Recipe, SourceView
from selfplay.recipe_filters import MixPreviousRecipe, PythonFilterRecipe
from selfplay.records import Records
from selfplay.scratch import scratch
from selfplay.single import IDENTITY, judgement_files, source_shards
from selfplay.stages import member_folder, read_shards
from selfplay.types import Group, Judgement, PreferencePair, derive_seed


@dataclass(frozen=True, slots=True)
class PairInputs:
    """What pairs are made of. `previous` are the pairs.jsonl of earlier rounds, for the filter mix_previous."""

    groups: Path
    judgements: Path | None = None
    previous: Sequence[Path] = ()
    round: int = 0


def pairs(recipe: Recipe, inputs: PairInputs, out: Path, *, allow_code: bool) -> dict[str, dict[str, Any]]:
    """The pairs of judged groups in the file `out`, which is left alone where it holds other pairs; what became of the rows of
    each source, by its name (see `row_counts`).
    """
    _require_read(recipe, inputs)
    recipe.for_each(lambda _, view: check_win_rate_scale(view))
    shards = source_shards(recipe, inputs.groups, inputs.round)
    pairings = {
        name: _pairing(name, view, shards[name], inputs, allow_code=allow_code)
        for name, view in recipe.by_source.items()
    }
    with scratch(out.with_name(f"{out.name}-making")) as folder:  # on the disk of `out`: there may be too many for /tmp
        selections = make_pairs(pairings, folder)
        counts = {name: row_counts(pairings[name].groups, one, inputs.round) for name, one in selections.items()}
        made = folder / "pairs.jsonl"
        if not out.exists():
            store.write_file(out, lambda temporary: shutil.copyfile(made, temporary))
        elif any(a != b for a, b in zip_longest(store.each_line(out), store.each_line(made))):
            raise StorageError(f"{out}: holds other pairs; remove it or take another --out")
    return counts


def _require_read(recipe: Recipe, inputs: PairInputs) -> None:
    views = recipe.by_source.values()
    if inputs.judgements is not None and not any(view.pairs.reads_scores for view in views):
        raise RecipeError("--judgements is given, but no pairs.kind of this recipe reads scores: leave it out")
    mixing = (MixPreviousRecipe, PythonFilterRecipe)
    if inputs.previous and not any(isinstance(one, mixing) for view in views for one in view.pairs.filters):
        raise RecipeError("--previous is given, but no filter of this recipe reads earlier rounds: leave it out")


def _pairing(
    source: str, recipe: SourceView, sampled: Sequence[Path], inputs: PairInputs, *, allow_code: bool
) -> Pairing:
    """What the pairs of a source are made of, from its folders."""
    if recipe.pairs.reads_scores and inputs.judgements is None:
        raise RecipeError(f"pairs.kind {recipe.pairs.kind} reads scores: name their folder with --judgements")
    groups, judged = Records(Group, sampled), inputs.judgements if recipe.pairs.reads_scores else None
    scores = None if judged is None else Records(Judgement, judgement_files(judged / source) if sampled else ())
    if scores is not None:
        both = zip_longest((one.prompt_id for one in scores), (one.prompt.id for one in groups))
        if any(judged_id != id for judged_id, id in both):
            raise DataError(
                f"{judged}: these are the judgements of other prompts than those in {inputs.groups / source}"
            )
    seed = derive_seed(recipe.seed, inputs.round, "pair")

    def previous(index: int) -> list[PreferencePair]:
        return [pair for pair in _previous(inputs.previous, index) if pair.source == source]

    return Pairing(
        make_selector(recipe.pairs, inputs.round, seed),
        groups,
        scores,
        filters=make_filters(recipe.pairs, inputs.round, load_programs(recipe.pairs, allow_code=allow_code)),
        context=FilterContext(inputs.round, seed, previous),
        judge="" if judged is None else _judge_of(judged, source),
        max_unparsed=recipe.pairs.unparsed_bound,
        members={} if scores is None or judged is None else _members(judged / source),
    )


def _members(judged: Path) -> dict[str, Sequence[Judgement]]:
    """The judgements of each of several judges, where they lie beside their combination."""
    found: dict[str, Sequence[Judgement]] = {}
    while (folder := member_folder(judged, len(found))).is_dir():
        found[folder.name] = read_shards(folder, Judgement)
    return found


def _previous(files: Sequence[Path], round: int) -> list[PreferencePair]:
    """The pairs that an earlier round made itself. RecipeError where no file is that round's."""
    for path in files:
        found = store.read_records(path, PreferencePair)
        # a file's newest pairs are its round's own; older ones were mixed in, with the weights of that mix
        if found and max(pair.origin_round for pair in found) == round:
            return [pair for pair in found if pair.origin_round == round]
    raise RecipeError(
        f"pairs.filters asks for the pairs of round {round}: name its pairs.jsonl with --previous, once for each earlier round"
    )


def _judge_of(judgements: Path, source: str) -> str:
    """The identity of the judge that wrote a folder of judgements: of a single stage, or of a run's round."""
    single, run = judgements / IDENTITY, judgements.resolve().parent.parent / "run.json"
    path = single if single.exists() else run
    found = store.read_json(path)["judge"] if path.exists() else None
    return str((found.get(source) if isinstance(found, dict) else found) or "")
