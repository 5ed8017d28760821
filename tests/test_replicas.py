"""Shards of a generator with several replicas: as many are drawn together as there are replicas."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from selfplay import stages, store
from selfplay.chat import Chat
from selfplay.errors import StorageError
from selfplay.generators.engine import EngineSettings
from selfplay.generators.generator import EngineGenerator
from selfplay.progress import SILENT
from selfplay.stages import sample_groups, shards
from selfplay.types import Completion, Group, Message, Prompt, Sampling

PROMPTS = [Prompt(str(n), (Message("user", f"ask {n}"),)) for n in range(8)]


class Counting(EngineGenerator):
    """Says which prompts it was asked about together; completions are empty."""

    def __init__(self, chat: Chat, replicas: int) -> None:
        super().__init__(EngineSettings("transformers", "nowhere", data_parallel_size=replicas), chat)
        self.asked: list[list[str]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, **_: Any) -> list[Group]:
        self.asked.append([prompt.id for prompt in prompts])
        return [Group(prompt, (1,), (Completion(f"call {len(self.asked)}"),)) for prompt in prompts]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "SHARD_PROMPTS", 2)


def draw(generator: EngineGenerator, folder: Path, prompts: Sequence[Prompt] = PROMPTS) -> list[Group]:
    return list(sample_groups(generator, prompts, Sampling(num_completions=1), folder, SILENT, "sampling"))


@pytest.mark.parametrize(
    ("replicas", "sizes"), [(1, [2, 2, 2, 2]), (3, [6, 2]), (8, [8])], ids=["one", "three", "eight"]
)
def test_each_replica_has_a_shard_of_its_own_at_a_time(
    replicas: int, sizes: list[int], chat: Chat, tmp_path: Path
) -> None:
    generator = Counting(chat, replicas)
    groups = draw(generator, tmp_path)
    assert [group.prompt.id for group in groups] == [prompt.id for prompt in PROMPTS]
    assert [len(ids) for ids in generator.asked] == sizes
    assert [path.name for path in shards(tmp_path)] == [f"{n:05d}.jsonl" for n in range(4)]
    assert draw(generator, tmp_path) == groups
    assert len(generator.asked) == len(sizes)


def test_a_shard_that_is_missing_is_drawn_in_the_company_it_had(chat: Chat, tmp_path: Path) -> None:
    generator = Counting(chat, 3)
    before = draw(generator, tmp_path)
    kept = {path.name: store.file_digest(path) for path in shards(tmp_path) if path.name != "00001.jsonl"}
    (tmp_path / "00001.jsonl").unlink()
    after = draw(generator, tmp_path)
    assert generator.asked[-1] == [prompt.id for prompt in PROMPTS[:6]]
    assert {name: store.file_digest(tmp_path / name) for name in kept} == kept
    assert [group.completions[0].text for group in after[2:4]] == ["call 3", "call 3"]
    assert (after[:2], after[4:]) == (before[:2], before[4:])


def test_shards_of_other_prompts_are_refused_by_name(chat: Chat, tmp_path: Path) -> None:
    draw(Counting(chat, 3), tmp_path)
    with pytest.raises(StorageError, match=r"00001\.jsonl: holds the groups of other prompts"):
        draw(Counting(chat, 3), tmp_path, [*PROMPTS[:2], *PROMPTS[4:]])
