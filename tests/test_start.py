"""What a run refuses or says before anything is sampled."""

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_run import ok, write_recipe

import selfplay
from selfplay.chat import Chat
from selfplay.cli import main
from selfplay.errors import DataError, RecipeError
from selfplay.models import prompt_room
from selfplay.pairs import BestVsRandom
from selfplay.prompts import load_pool
from selfplay.recipe_file import load_recipe


def rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def asking(count: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Tell me about thing {n}.", **columns} for n in range(count)]


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_a_check_that_nobody_knows_is_refused_before_anything_is_sampled(
    tiny: Path, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny)
    rows(tmp_path, [*asking(31), {"prompt": "Odd one.", "checks": [{"kind": "numerik"}]}])
    out = tmp_path / "run"
    assert main(["iterate", str(recipe), "--out", str(out), *arguments]) == 65
    error = capsys.readouterr().err
    assert "prompts.jsonl:32" in error
    assert "numerik" in error
    assert not list(out.rglob("groups"))
    assert not (out / "initial").exists()


def test_a_verifier_without_any_check_is_refused_before_anything_is_sampled(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny, judge={"kind": "verifier"})
    assert main(["iterate", str(recipe), "--out", str(tmp_path / "run")]) == 65
    assert "none of 24 prompts has checks" in capsys.readouterr().err
    assert not (tmp_path / "run" / "initial").exists()


def test_a_changed_chat_template_file_is_refused_on_an_existing_run(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = Chat.load(str(tiny)).tokenizer.chat_template
    (tmp_path / "template.jinja").write_text(template)
    recipe = write_recipe(tmp_path, tiny, chat={"chat_template": "template.jinja"}, rounds=1)
    ok("iterate", recipe, "--out", tmp_path / "run")
    (tmp_path / "template.jinja").write_text(template + "{# other #}")
    assert main(["iterate", str(recipe), "--out", str(tmp_path / "run"), "--set", "rounds=2"]) == 64
    assert "another chat" in capsys.readouterr().err


def test_a_policy_with_a_flipped_bit_is_found_before_the_next_round_samples_from_it(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny, rounds=1)
    ok("iterate", recipe, "--out", tmp_path / "run")
    weights = tmp_path / "run" / "round-000" / "policy" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1
    weights.write_bytes(data)
    assert main(["iterate", str(recipe), "--out", str(tmp_path / "run"), "--set", "rounds=2"]) == 74
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "run" / "round-001" / "groups").exists()


def test_a_policy_that_judges_itself_gives_its_own_panel_no_score(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tiny, judge={"kind": "llm", "model": "policy"}))
    assert recipe.heldout_judge is None
    other = load_recipe(tmp_path / "recipe.yaml", ["evaluate.judge={kind: coin}"])
    assert other.heldout_judge is not None


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]], ids=["run", "dry-run"])
@pytest.mark.parametrize("held_out", [True, False], ids=["held out", "none held out"])
def test_a_panel_judge_that_has_nothing_to_score_is_told(
    tiny: Path, tmp_path: Path, arguments: list[str], held_out: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny, rounds=1, evaluate={"judge": {"kind": "coin"}})
    more = [] if held_out else ["--set", "prompts.heldout=null"]
    assert main(["iterate", str(recipe), "--out", str(tmp_path / "run"), *more, *arguments]) == 0
    said = "".join(capsys.readouterr())
    assert ("evaluate.judge scores nothing" in said) is not held_out


def test_a_prompt_that_leaves_no_room_for_max_tokens_is_dropped_with_its_reason(tiny: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, tiny, prompts={"source": "prompts.jsonl", "deal": "same"})
    rows(tmp_path, [*asking(3), {"prompt": "word " * 90}])
    recipe, chat = load_recipe(path, ["generator.max_tokens=400"]), Chat.load(str(tiny))
    room = prompt_room(recipe, tiny)
    assert room == 512 - 400
    pool = load_pool(recipe.prompts, seed=0, chat=chat, room=room)
    assert len(pool.train) == 3
    assert [drop.reason for drop in pool.drops] == ["leaves no room for max_tokens in the model's length"]
    assert all(len(chat.encode_prompt(p)) <= room for p in pool.train)
    assert len(load_pool(recipe.prompts, seed=0, chat=chat).train) == 4
    with pytest.raises(RecipeError, match="lower max_tokens"):
        prompt_room(load_recipe(path, ["generator.max_tokens=512"]), tiny)


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_missing_gold_answers_are_found_before_anything_is_sampled(
    tiny: Path, tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny, judge=None, pairs={"kind": "gold_vs_completion"})
    assert main(["iterate", str(recipe), "--out", str(tmp_path / "run"), *arguments]) == 65
    assert "needs a gold answer for every prompt" in capsys.readouterr().err


def test_a_run_goes_on_after_its_recipe_and_programs_were_moved_but_not_changed(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, out = tmp_path / "old", tmp_path / "new", str(tmp_path / "run")
    old.mkdir()
    template = Chat.load(str(tiny)).tokenizer.chat_template
    (old / "chat.jinja").write_text(template)
    (old / "own.py").write_text(
        "def longer(prompt, completion):\n    return float(len(completion.text))\n\n\n"
        "def keep(pairs, context):\n    return pairs\n"
    )
    judge = {"kind": "python", "target": "own.py:longer"}
    write_recipe(
        old,
        tiny,
        rounds=1,
        judge=judge,
        chat={"chat_template": "chat.jinja"},
        pairs={"filters": [{"kind": "python", "target": "own.py:keep"}]},
        evaluate={"judge": dict(judge), "num_completions": 2},  # one object would be written as a YAML alias
    )
    ok("iterate", old / "recipe.yaml", "--out", out, "--allow-code")
    old.rename(new)
    ok("iterate", new / "recipe.yaml", "--out", out, "--allow-code")
    (new / "own.py").write_text((new / "own.py").read_text() + "# changed\n")
    assert main(["iterate", str(new / "recipe.yaml"), "--out", out, "--allow-code"]) == 64
    assert "another judge" in capsys.readouterr().err


def test_a_run_is_not_continued_with_another_selector(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tiny, rounds=1))
    selfplay.iterate(recipe, tmp_path / "run", selector=BestVsRandom(min_margin=0.1))
    selfplay.iterate(recipe, tmp_path / "run", selector=BestVsRandom(min_margin=0.1))
    with pytest.raises(RecipeError, match="another selector"):
        selfplay.iterate(recipe, tmp_path / "run", selector=BestVsRandom(min_margin=0.5))


def test_a_plain_function_may_be_the_judge_of_a_run(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tiny, rounds=1))

    def longer(prompt: selfplay.Prompt, completion: selfplay.Completion) -> float:
        return len(completion.text)

    found = selfplay.iterate(recipe, tmp_path / "run", judge=longer)  # type: ignore[arg-type]
    assert found["rounds"][0]["state"] == "done"
    with pytest.raises(RecipeError, match="neither a function nor an object"):
        selfplay.iterate(recipe, tmp_path / "other", judge=3)  # type: ignore[arg-type]


def test_gold_answers_that_are_never_trained_on_need_no_template_that_can_encode_them(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = Chat.load(str(tiny)).tokenizer.chat_template
    opening = "<|assistant|>{% endif %}"
    assert template.endswith(opening)
    # the generation prompt opens a thought, which past turns don't have: no prefix of the conversation
    thinking = template.removesuffix(opening) + "<|assistant|><think>{% endif %}"
    judged = {"kind": "verifier", "checks": [{"kind": "words", "min": 9}]}
    recipe = write_recipe(tmp_path, tiny, chat={"chat_template": thinking}, judge=judged, rounds=1)
    rows(tmp_path, asking(32, gold="42"))
    ok("iterate", recipe, "--out", tmp_path / "run")
    other = ["--set", "pairs={kind: gold_vs_completion}", "--set", "judge=null"]
    assert main(["iterate", str(recipe), "--out", str(tmp_path / "other"), *other]) == 65
    assert "no token prefix" in capsys.readouterr().err
    assert not list((tmp_path / "other").rglob("groups/*.jsonl"))


def test_a_split_of_a_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tiny), ["prompts.split=train[:10]"])
    with pytest.raises(RecipeError, match=r"prompts\.split"):
        load_pool(recipe.prompts, seed=0)


def test_a_stage_whose_gold_answers_changed_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny)
    rows(tmp_path, asking(32, gold="41"))
    arguments = ["generate", str(recipe), "--model", str(tiny), "--out", str(tmp_path / "groups")]
    assert main(arguments) == 0
    rows(tmp_path, asking(32, gold="42"))
    assert main(arguments) == 64
    assert "prompts" in capsys.readouterr().err


def test_a_bad_check_names_its_row(tiny: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, tiny))
    rows(tmp_path, asking(32, checks=[{"kind": "words", "minimum": 3}]))
    with pytest.raises(DataError, match=r"prompts\.jsonl:\d+: checks"):
        selfplay.iterate(recipe, tmp_path / "run")
