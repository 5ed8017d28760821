"""A judge that hangs is left behind with an error that names its prompts, and nothing that was judged is lost."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfplay import stages, store
from selfplay.errors import JudgeError
from selfplay.judges import make_judge
from selfplay.progress import SILENT
from selfplay.protocols import Judge, JudgeContext
from selfplay.recipe_judges import PythonJudgeRecipe
from selfplay.stages import judge_groups
from selfplay.types import Completion, Group, Judgement, Message, Prompt

SILENCE = 0.2  # seconds; what a call of these judges takes is far below
FILE = """
import asyncio
import contextlib
import threading

from selfplay.types import Judgement

free = threading.Event()
asked = []

def stuck(prompt, completion):
    asked.append(prompt.id)
    if prompt.id == "p3" and completion.text == "b":
        free.wait()
    return 1.0

async def stuck_later(prompt, completion):
    if prompt.id in ("p1", "p2"):
        await asyncio.to_thread(free.wait)
    return 1.0

class Whole:
    def judge(self, groups, context):
        if any(group.prompt.id == "p3" for group in groups):
            free.wait()
        return [Judgement(group.prompt.id, (1.0, 0.0)) for group in groups]

whole = Whole()

class Staged(Whole):
    stages = []

    @contextlib.contextmanager
    def stage(self, folder, note):
        self.stages.append(folder)
        yield

staged = Staged()

def broken(prompt, completion):
    raise LookupError("no such bird")
"""


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "slow_judges.py"
    path.write_text(FILE)
    yield path
    for module in [m for name, m in sys.modules.items() if name.startswith("selfplay_user_slow_judges")]:
        vars(module)["free"].set()


def judge_of(file: Path, name: str, timeout: float | None) -> Judge:
    recipe = PythonJudgeRecipe(kind="python", target=f"{file}:{name}", timeout=timeout)
    return make_judge(recipe, allow_code=True)


def groups_of(count: int) -> list[Group]:
    prompts = [Prompt(f"p{n}", (Message("user", f"ask {n}"),)) for n in range(count)]
    return [Group(prompt, (1,), (Completion("a"), Completion("b"))) for prompt in prompts]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("stuck", r"was judging prompt p3, completion 1\.\n"),
        ("stuck_later", r"prompt p1, completion 0; prompt p1, completion 1; prompt p2, completion 0; and 1 more\.\n"),
        ("whole", r"was judging 4 groups at once: prompts p0, p1, p2, \.\.\.\.\n"),
    ],
)
def test_silence_over_the_limit_is_an_error_that_names_the_prompts(file: Path, name: str, words: str) -> None:
    with pytest.raises(JudgeError, match=words) as caught:
        judge_of(file, name, SILENCE).judge(groups_of(4), JudgeContext())
    assert "no verdict for 0.2 s (judge.timeout)" in str(caught.value)


def test_finished_shards_are_kept_and_the_same_files_are_gone_on_from(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "SHARD_PROMPTS", 2)
    judge, groups, out = judge_of(file, "stuck", SILENCE), groups_of(5), tmp_path / "judgements"
    with pytest.raises(JudgeError, match="p3"):
        judge_groups(judge, groups, JudgeContext(), out, SILENT, "judging")
    assert [path.name for path in stages.shards(out)] == ["00000.jsonl"]
    (module,) = [m for name, m in sys.modules.items() if name.startswith("selfplay_user_slow_judges")]
    vars(module)["free"].set()
    vars(module)["asked"].clear()
    found = judge_groups(judge, groups, JudgeContext(), out, SILENT, "judging")
    assert [j.scores for j in found] == [(1.0, 1.0)] * 5
    assert set(vars(module)["asked"]) == {"p2", "p3", "p4"}
    assert len(store.read_records(out / "00000.jsonl", Judgement)) == 2


def test_in_time_it_judges_counts_and_fails_as_without_a_limit(file: Path) -> None:
    groups, told = groups_of(2), []
    timed, free = judge_of(file, "stuck", 60.0), judge_of(file, "stuck", None)
    assert timed.judge(groups, JudgeContext(progress=told.append)) == free.judge(groups, JudgeContext())
    assert told == [1, 2, 3, 4]
    assert timed.identity == free.identity
    with pytest.raises(JudgeError, match="LookupError: no such bird"):
        judge_of(file, "broken", 60.0).judge(groups, JudgeContext())


def test_a_judge_with_a_limit_still_has_its_own_block_around_a_stage(file: Path, tmp_path: Path) -> None:
    judge_groups(
        judge_of(file, "staged", 60.0), groups_of(2), JudgeContext(), tmp_path / "judgements", SILENT, "judging"
    )
    (module,) = [m for name, m in sys.modules.items() if name.startswith("selfplay_user_slow_judges")]
    assert vars(module)["staged"].stages == [tmp_path / "judgements"]


def test_the_judge_works_in_a_thread_that_keeps_no_process_alive(file: Path) -> None:
    before = threading.enumerate()
    with pytest.raises(JudgeError):
        judge_of(file, "stuck", SILENCE).judge(groups_of(4), JudgeContext())
    (left,) = [thread for thread in threading.enumerate() if thread not in before]
    assert left.daemon
