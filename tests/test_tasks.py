"""`selfplay tasks`: prompts that reasoning-gym makes."""

from pathlib import Path

import pytest

from selfplay.cli import main
from selfplay.judges.checks import passes
from selfplay.judges.verifier import check_prompts
from selfplay.prompts import load_pool
from selfplay.recipe_prompts import PromptsRecipe

pytest.importorskip("reasoning_gym")
SUMS = ["--set", "min_terms=2", "--set", "max_terms=2", "--set", "min_digits=1", "--set", "max_digits=1"]


def test_tasks_are_prompts_that_a_verifier_can_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data" / "sums.jsonl"
    assert main(["tasks", "chain_sum", str(out), "--count", "40", "--read", "last_number", *SUMS]) == 0
    prompts = load_pool(PromptsRecipe(source=str(out), deal="same"), seed=0).train
    assert f"{out}: {len(prompts)} prompts" in capsys.readouterr().out
    assert 20 < len(prompts) <= 40
    check_prompts(prompts, ())
    for prompt in prompts:
        assert prompt.gold is not None
        assert passes(prompt.checks[0], f"That makes {prompt.gold}.", prompt.gold)
        assert not passes(prompt.checks[0], f"That makes {prompt.gold}1.", prompt.gold)


def test_a_seed_makes_the_same_tasks_again_and_another_others(tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["tasks", "chain_sum", str(tmp_path / name), "--count", "9", "--seed", seed]) == 0
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["sums"], "no task 'sums'", id="no such task"),
        pytest.param(["countdown"], "as Python", id="a scorer that runs text"),
        pytest.param(["chain_sum", "--set", "terms=2"], "terms", id="no such option"),
        pytest.param(["chain_sum", "--set", "min_terms=0"], "min_terms", id="a value that is refused"),
        pytest.param(["chain_sum", "--set", "min_terms"], "key=value", id="no value"),
        pytest.param(["chain_sum", "--read", "first"], "last_number", id="no such reading"),
    ],
)
def test_what_can_not_be_made_is_refused(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, *rest = arguments
    assert main(["tasks", task, str(tmp_path / "out.jsonl"), *rest]) == 64
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    out.write_text("mine")
    assert main(["tasks", "chain_sum", str(out)]) == 74
    assert out.read_text() == "mine"
