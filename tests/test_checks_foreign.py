"""Checks that other packages decide. What needs a package is skipped where it isn't installed."""

import importlib.util
import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from selfplay.errors import DataError, RecipeError
from selfplay.judges import make_judge
from selfplay.judges.checks import value
from selfplay.judges.checks.elsewhere import Elsewhere
from selfplay.judges.checks.ifeval import ifeval_fault
from selfplay.judges.checks.reasoning_gym import task_fault
from selfplay.judges.checks.verdict import NoVerdictError
from selfplay.judges.verifier import Verifier, check_prompts, check_verifiable, validate_checks
from selfplay.prompt_rows import read_prompts
from selfplay.prompts import load_pool
from selfplay.protocols import JudgeContext
from selfplay.recipe import Recipe
from selfplay.recipe_judges import VerifierRecipe
from selfplay.recipe_prompts import PromptsRecipe
from selfplay.types import Completion, Group, Judgement, Message, Prompt, prompt_id

NO_COMMA = {"kind": "ifeval", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
# The longest any of these computations would run is minutes.
ENDLESS = r"\boxed{10^{10^{10}}!}"


def prompt(*checks: dict[str, Any], gold: str | None = None) -> Prompt:
    messages = (Message("user", "What is a half?"),)
    return Prompt(prompt_id(messages), messages, gold=gold, checks=checks, source="rows.jsonl:7")


def judged(verifier: Verifier, asked: Prompt, *texts: str) -> Judgement:
    return verifier.judge([Group(asked, (1,), tuple(Completion(text) for text in texts))], JudgeContext())[0]


def entry(task: str = "chain_sum", **options: Any) -> dict[str, Any]:
    # Not in the extra `test`: pycosat, zss and cellpylib, which it pins, have no wheels, so installing it takes a C compiler
    # and Python's headers; with matplotlib they are over 100 MB. `make mini-data` installs it.
    made = pytest.importorskip("reasoning_gym").create_dataset(task, size=1, seed=3, **options)
    read_back: dict[str, Any] = json.loads(json.dumps(made[0]))
    return read_back


@pytest.mark.parametrize(
    ("gold", "text", "expected"),
    [
        pytest.param("1/2", r"So it is \boxed{0.5}.", 1.0, id="a fraction is a decimal"),
        pytest.param(
            "1/2", r"First I took \boxed{3}. No! It is \boxed{\frac{2}{4}}, 7 days later.", 1.0, id="boxed goes first"
        ),
        pytest.param("1/2", "The final answer is 1/2. There were 7 of them.", 1.0, id="said to be final"),
        pytest.param("72", "3 + 4 makes 7, so 72", 1.0, id="the last expression"),
        pytest.param("72", "no idea", 0.0, id="none at all"),
        pytest.param("72", "", 0.0, id="empty"),
        pytest.param("Nat sold 3.\n#### 1,072", "She has 1072 left", 1.0, id="a worked solution"),
        pytest.param("2x + 1", "$1 + 2x$", 1.0, id="a bare expression"),
        pytest.param("2x + 1", "2", 0.0, id="is more than its first number"),
        pytest.param(r"\frac{\sqrt{3}}{2}", r"$\sin(\pi/3)$", 1.0, id="a bare command"),
        pytest.param("18 dollars", "$18", 1.0, id="with a unit"),
        pytest.param(r"the roots $\{1, 2\}$", r"\boxed{\{2, 1\}}", 1.0, id="a set"),
    ],
)
def test_math_answer_compares_as_mathematics(gold: str, text: str, expected: float) -> None:
    pytest.importorskip("math_verify")
    assert value({"kind": "math_answer"}, text, gold) == expected


def test_a_completion_that_takes_too_long_gets_no_verdict_and_the_next_one_does() -> None:
    pytest.importorskip("math_verify")
    asked = prompt({"kind": "math_answer", "seconds": 0.5}, gold="7")
    verdict = judged(Verifier(), asked, "It is 7", ENDLESS, "It is 7")
    assert verdict.scores == (1.0, None, 1.0)
    assert verdict.notes[1] == "math_answer: no verdict within 0.5 s"


def test_the_time_limit_holds_outside_the_main_thread() -> None:
    pytest.importorskip("math_verify")
    found: list[Judgement] = []
    asked = prompt({"kind": "any_of", "checks": [{"kind": "math_answer", "seconds": 0.5}]}, gold="7")
    thread = threading.Thread(target=lambda: found.append(judged(Verifier(), asked, ENDLESS, "7")))
    thread.start()
    thread.join()
    assert found[0].scores == (None, 1.0)


def test_a_package_that_dies_costs_one_verdict_and_says_why() -> None:
    pytest.importorskip("math_verify")
    with Elsewhere(["math_answer"]) as elsewhere:
        assert elsewhere.value("math_answer", {}, "7", "7") == 1.0
        with pytest.raises(NoVerdictError, match="TypeError"):
            elsewhere.value("math_answer", {"seconds": 5.0, "no": 1}, "7", "7")
        process = elsewhere.process
        assert elsewhere.value("math_answer", {}, "7", "7") == 1.0
        assert process is None
        process = elsewhere.process
    assert process is not None
    assert process.poll() is not None


@pytest.mark.parametrize("gold", [None, "Paris", ""], ids=["none", "a word", "empty"])
def test_there_is_no_verdict_without_mathematics_in_the_gold_answer(gold: str | None) -> None:
    pytest.importorskip("math_verify")
    with pytest.raises(NoVerdictError, match="gold answer"):
        value({"kind": "math_answer"}, "7", gold)


def test_a_gold_answer_without_mathematics_is_a_fault_of_its_row_and_no_verdict() -> None:
    pytest.importorskip("math_verify")
    gold = "Paris"
    for asked, shared in (
        (prompt({"kind": "math_answer"}, gold=gold), ()),
        (prompt(gold=gold), ({"kind": "math_answer"},)),
    ):
        with pytest.raises(DataError, match=r"rows\.jsonl:7: check 'math_answer'.*gold answer"):
            check_prompts([asked], shared)
        verdict = judged(Verifier(shared), asked, "7")
        assert verdict.scores == (None,)
        assert "gold answer" in verdict.notes[0]


def test_every_faulty_row_is_counted() -> None:
    pytest.importorskip("math_verify")
    rows = [prompt({"kind": "math_answer"}, gold=gold) for gold in ("7", "Paris", "Rome", "8")]
    with pytest.raises(DataError, match="and 1 more like it"):
        check_prompts(rows, ())
    check_prompts(rows[:1], ())


def test_rows_of_ifeval_are_taken_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("if_verifiable")
    row = {
        "key": 1,
        "prompt": "Name two colours.",
        "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
        # a table has a column for every argument of every instruction
        "kwargs": [{"keywords": None, "num_words": None}, {"keywords": ["red"], "num_words": None}],
    }
    as_text = row | {"key": 2, "prompt": "Name colours.", "kwargs": json.dumps(row["kwargs"])}
    file = tmp_path / "ifeval.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in (row, as_text)))
    source = PromptsRecipe(source=str(file), deal="same")
    prompts = load_pool(source, seed=0).train
    assert len(prompts) == 2
    check_prompts(prompts, ())
    texts = ("red and blue", "red, blue", "green, blue", "")
    assert prompts[0].checks == prompts[1].checks
    assert judged(Verifier(), prompts[0], *texts).scores == (1.0, 0.5, 0.0, 0.0)
    assert judged(Verifier(score="all"), prompts[1], *texts).scores == (1.0, 0.0, 0.0, 0.0)


def test_instructions_of_a_row_without_their_arguments_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "ifeval.jsonl"
    file.write_text(json.dumps({"prompt": "Name two.", "instruction_id_list": ["punctuation:no_comma"]}))
    with pytest.raises(DataError, match=r"ifeval\.jsonl:1: instruction_id_list and kwargs"):
        read_prompts(PromptsRecipe(source=str(file), deal="same"), str(file))


def test_loose_takes_a_text_without_its_first_line_or_its_asterisks() -> None:
    pytest.importorskip("if_verifiable")
    texts = ("Sure, here:\nred", "red, blue", "red")
    asked = prompt(NO_COMMA, {"kind": "all_of", "checks": [NO_COMMA]})
    for ifeval, first in (("strict", 0.0), ("loose", 1.0)):
        judge = make_judge(VerifierRecipe.model_validate({"kind": "verifier", "ifeval": ifeval}))
        group = Group(asked, (1,), tuple(Completion(text) for text in texts))
        assert judge.judge([group], JudgeContext())[0].scores == (first, 0.0, 1.0)


def test_loose_without_an_instruction_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "Name two.", "checks": [{"kind": "words", "min": 1}]}))
    recipe = Recipe.model_validate(
        {
            "model": "m",
            "prompts": {"source": str(file), "deal": "same"},
            "judge": {"kind": "verifier", "ifeval": "loose"},
        }
    )
    with pytest.raises(RecipeError, match=r"judge\.ifeval"):
        check_verifiable(recipe, load_pool(recipe.prompts, seed=0), judge_given=False)


@pytest.mark.parametrize(
    ("ids", "kwargs", "words"),
    [
        pytest.param(["punctuation:no_commas"], [{}], "no instruction", id="unknown"),
        pytest.param(["punctuation:no_comma"], [{}, {}], "kwargs for 2", id="too many kwargs"),
        pytest.param(
            ["length_constraints:number_words"], [{"relation": "at least"}], "'num_words' is missing", id="missing"
        ),
        pytest.param(
            ["length_constraints:number_words"], [{"relation": "over", "num_words": 3}], "relation", id="wrong"
        ),
        pytest.param(["detectable_format:title"], [{"size": 3}], "size", id="unknown argument"),
        pytest.param(["detectable_format:number_bullet_lists"], [{"num_bullets": -2}], "can't be -2", id="negative"),
        pytest.param(["keywords:existence"], [{"keywords": ["a("]}], "keywords:existence", id="no regular expression"),
    ],
)
def test_a_wrong_instruction_is_a_fault(ids: list[str], kwargs: list[dict[str, Any]], words: str) -> None:
    pytest.importorskip("if_verifiable")
    assert words in ifeval_fault(None, instruction_id_list=ids, kwargs=kwargs)


def test_the_language_of_a_text_is_the_same_every_time() -> None:
    pytest.importorskip("if_verifiable")
    check = {"kind": "ifeval", "instruction_id_list": ["language:response_language"], "kwargs": [{"language": "en"}]}
    # langdetect draws: without a seed this text is English in one call of ten
    assert len({value(check, "in an hotel", None) for _ in range(60)}) == 1


def test_a_task_of_reasoning_gym_is_scored_by_its_own_scorer() -> None:
    task = entry(min_terms=2, max_terms=2)
    right = task["answer"]
    asked = prompt({"kind": "reasoning_gym", "entry": task}, gold=right)
    check_prompts([asked], ())
    texts = (f"I add. <answer>{right}</answer>", f"<answer>about {right}</answer>", f"It is {right}")
    full, part, none = judged(Verifier(), asked, *texts).scores
    assert full == 1.0
    assert none == 0.0
    assert part is not None
    assert 0.0 < part < 1.0
    check = asked.checks[0]
    assert [value({**check, "min": 0.1}, text, None) for text in texts] == [1.0, 1.0, 0.0]
    assert [value({**check, "read": "last_number"}, text, None) for text in (*texts, "x")] == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("task", ["countdown", "number_sorting", "bitwise_arithmetic", "simple_integration"])
def test_a_task_whose_scorer_would_run_a_text_is_refused(task: str) -> None:
    assert "as Python" in task_fault(None, entry=entry(task))


@pytest.mark.parametrize("task", ["basic_arithmetic", "propositional_logic", "leg_counting"])
def test_a_task_whose_scorer_only_reads_is_taken(task: str) -> None:
    assert task_fault(None, entry=entry(task)) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"metadata": {"source_dataset": "sums"}}, "no task 'sums'", id="unknown task"),
        pytest.param({"metadata": {}}, "source_dataset", id="no task"),
        pytest.param({"answer": 7}, "answer", id="a number"),
    ],
)
def test_a_wrong_entry_is_a_fault(change: dict[str, Any], words: str) -> None:
    assert words in task_fault(None, entry=entry() | change)


@pytest.mark.parametrize(
    ("check", "extra"),
    [
        ({"kind": "math_answer"}, "math"),
        (NO_COMMA, "ifeval"),
        ({"kind": "reasoning_gym", "entry": {}}, "reasoning-gym"),
    ],
    ids=["math_answer", "ifeval", "reasoning_gym"],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(
    check: dict[str, Any], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for nested in (check, {"kind": "any_of", "checks": [check]}):
        with pytest.raises(RecipeError) as error:
            validate_checks([nested], "rows.jsonl:7")
        assert f'pip install "selfplay-dpo[{extra}]"' in str(error.value)
        assert "rows.jsonl:7" in str(error.value)


@pytest.mark.parametrize(
    "check",
    [
        {"kind": "math_answer", "seconds": 0},
        {"kind": "math_answer", "tolerance": 1},
        {"kind": "ifeval"},
        {"kind": "ifeval", "instruction_id_list": "punctuation:no_comma"},
        {"kind": "reasoning_gym", "entry": {}, "read": "first"},
        {"kind": "reasoning_gym", "entry": {}, "min": 2.0},
    ],
    ids=["no time", "unknown", "missing", "a text", "no reading", "out of range"],
)
def test_a_wrong_argument_is_refused_with_what_is_allowed(check: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="its arguments are"):
        validate_checks([check], "test")


def test_no_process_starts_where_every_check_is_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    asked = prompt({"kind": "words", "min": 1})
    check_prompts([asked], ())
    assert judged(Verifier(), asked, "two words").scores == (1.0,)
