"""What a run holds does not grow with its prompts by more than some bytes of each."""

import contextlib
import gc
import json
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from jobs import job_of, pair_of
from scripted_run import write_recipe

from selfplay import store
from selfplay.accounting import source_figures
from selfplay.canaries import make_canaries
from selfplay.chat import Chat
from selfplay.judges.coin import Coin
from selfplay.judges.combine import Combine, Combined, Member
from selfplay.judges.contract import check_unparsed
from selfplay.pairing import Pairing, make_pairs
from selfplay.pairs import BestVsWorst
from selfplay.progress import Advance, Reporter
from selfplay.prompts import load_pool
from selfplay.protocols import FilterContext, JudgeContext
from selfplay.recipe_file import load_recipe
from selfplay.recipe_prompts import PromptsRecipe
from selfplay.records import Lazy, Records
from selfplay.single import generate, judge
from selfplay.single_pairs import PairInputs, pairs
from selfplay.stages import write_prompts
from selfplay.train.rows import read_rows
from selfplay.train.steps import Plan
from selfplay.types import Completion, Group, Judgement, Message, Prompt

pytestmark = pytest.mark.slow

SMALL, LARGE = 200, 1000
SHARD = 50
BYTES = 200  # numbers about a prompt, several of them at a time; a prompt alone takes 700, a pair thousands


def bytes_per_prompt(prepare: Callable[[int], Callable[[], object]]) -> float:
    """How much the peak of the work that is prepared for a number of prompts grows with them."""
    peaks = []
    for count in (LARGE, SMALL, LARGE):  # first what is imported and cached once, short texts by pydantic among it
        work = prepare(count)
        gc.collect()
        gc.freeze()  # what lives already need not be looked at by `Tidy`
        tracemalloc.start()
        held = work()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        gc.unfreeze()
        del held
    return (peaks[2] - peaks[1]) / (LARGE - SMALL)


class Tidy(Reporter):
    """Empties Python's free lists while a stage works: tuples in them, of which there are thousands, count as held."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str, *, done: int = 0) -> Iterator[Advance]:
        yield lambda done: gc.collect()


def test_prompts_are_read_drawn_and_written_without_holding_them(tmp_path: Path) -> None:
    def prepare(count: int) -> Callable[[], object]:
        rows = ({"prompt": f"Tell me of {n}.", "gold": str(n), "checks": [{"kind": "json"}]} for n in range(count))
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = PromptsRecipe(source=str(path), deal="same", heldout=0.1)

        def work() -> object:
            pool = load_pool(recipe, seed=0)
            dealt = pool.deal(recipe, 0)
            for _ in range(2):  # the second compares
                write_prompts(tmp_path / f"{count}-dealt.jsonl", dealt)
            return pool, pool.digest, dealt

        return work

    assert bytes_per_prompt(prepare) < BYTES


def judged(folder: Path, count: int) -> tuple[Sequence[Group], Sequence[Judgement]]:
    """So many groups of two completions, and their judgements, on disk."""
    found: list[Records[Any]] = []
    for kind in (Group, Judgement):
        paths = [folder / kind.__name__ / f"{first}.jsonl" for first in range(0, count, SHARD)]
        for number, path in enumerate(paths):
            groups = [group_of(n) for n in range(SHARD * number, SHARD * (number + 1))]
            rows = groups if kind is Group else [Judgement(g.prompt.id, (0.0, 1.0)) for g in groups]
            store.write_records(path, rows, kind)
        found.append(Records(kind, paths))
    groups, judgements = found
    return groups, judgements


def group_of(n: int) -> Group:
    completions = tuple(Completion(f"{text} {n}", (5, n, *range(k, 40)), ()) for k, text in enumerate(("yes", "no")))
    return Group(Prompt(f"{n:016x}", (Message("user", f"Tell me of {n}."),)), (1, n, *range(20)), completions)


def test_pairs_are_made_and_counted_without_holding_them(tmp_path: Path) -> None:
    def prepare(count: int) -> Callable[[], object]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        groups, judgements = judged(folder, count)
        one = Pairing(BestVsWorst(), groups, judgements, (), FilterContext(), "j", 0.0)

        def work() -> object:
            found = make_pairs({"": one}, folder)
            assert found == make_pairs({"": one}, folder)  # read back
            assert len(found[""].pairs) == found[""].num_prompts == count
            return found, source_figures("", groups, judgements, found[""], round=0)

        return work

    assert bytes_per_prompt(prepare) < BYTES


class ManyScores(Lazy[Judgement]):
    """Judgements of 32 completions each, made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def _item(self, place: int) -> Judgement:
        return Judgement(f"{place}", tuple(place + k / 32 for k in range(32)))


def test_completions_without_a_verdict_are_counted_without_holding_the_scores() -> None:
    def prepare(count: int) -> Callable[[], object]:
        return lambda: check_unparsed(ManyScores(count), 0.0, judge_identity="j")

    assert bytes_per_prompt(prepare) < BYTES


@pytest.mark.parametrize("stage", ["generate", "judge", "pairs"])
def test_a_stage_alone_holds_no_more_than_in_a_run(
    stage: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfplay.stages.SHARD_PROMPTS", SHARD)

    def prepare(count: int) -> Callable[[], object]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        groups, judgements, out = folder / "Group", folder / "Judgement", folder / "out"
        judged(folder, count)
        (folder / "many.jsonl").write_text(
            "".join(json.dumps({"prompt": f"Tell me of {n}."}) + "\n" for n in range(count))
        )
        recipe = load_recipe(write_recipe(folder, tiny, prompts={"source": "many.jsonl", "num_prompts": count}))

        def work() -> object:
            if stage == "generate":
                return generate(recipe, str(tiny), out, round=0, report=Tidy())
            if stage == "judge":
                return judge(recipe, groups, out, model=None, round=0, allow_code=False, report=Tidy())
            counts = pairs(recipe, PairInputs(groups, judgements), out, allow_code=False)
            assert counts[""]["num_pairs"] == count
            return counts

        return work

    assert bytes_per_prompt(prepare) < BYTES


def test_judgements_of_several_judges_are_combined_and_canaries_drawn_without_holding_them(
    tmp_path: Path, chat: Chat
) -> None:
    def prepare(count: int) -> Callable[[], object]:
        groups, judgements = judged(tmp_path / str(len(list(tmp_path.iterdir()))), count)
        combine = Combine([Member(name, Coin()) for name in "ab"], how="min", normalize="none")

        def work() -> object:
            judge = Combined(combine, [judgements, judgements])
            for first in range(0, count, SHARD):
                judge.judge(groups[first : first + SHARD], JudgeContext())
            return judge, make_canaries(groups, judgements, chat, num_prompts=3, seed=0)

        return work

    assert bytes_per_prompt(prepare) < BYTES


def test_training_plans_its_steps_without_holding_its_rows(tmp_path: Path) -> None:
    def prepare(count: int) -> Callable[[], object]:
        pairs = [pair_of((1, n, *range(40)), (5, 6, 1), (7, 8, 1)) for n in range(count)]
        job = job_of(tmp_path / str(len(list(tmp_path.iterdir()))), tmp_path, pairs, num_train_epochs=2)
        del pairs

        def work() -> object:
            rows, _ = read_rows(job)
            plan = Plan(rows, job.settings, seed=0)
            seen = sum(len(rows[i].prompt_token_ids) for _, indices in plan for i in indices)
            assert seen == 2 * 42 * count
            return rows, plan

        return work

    assert bytes_per_prompt(prepare) < BYTES
