"""How a judge's own model is asked: `judge.chat`, what it changes, and whose judgements are whose."""

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_run import JUDGED, ok, write_recipe
from tiny import TEMPLATE, make_tiny_model

from selfplay import store
from selfplay.chat import Chat
from selfplay.cli import main
from selfplay.commands.recipes import files_of
from selfplay.errors import DataError, RecipeError
from selfplay.judges import make_judge
from selfplay.judges.llm import LLMJudge
from selfplay.recipe_file import check_recipe, load_recipe
from selfplay.recipe_judges import LLMJudgeRecipe

# opens with a thought unless told otherwise, as templates of thinking models do
THINKS = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>{% if not quiet %}<think>{% endif %}{% endif %}")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "judge", max_position_embeddings=4096)


def opened(folder: Path, chat: Chat) -> Any:
    raise AssertionError("a model that nobody asks is not opened")


def judge_of(model: Path, **fields: Any) -> LLMJudge:
    judge = make_judge(LLMJudgeRecipe(kind="llm", model=str(model), **fields), open_model=opened)
    assert isinstance(judge, LLMJudge)
    return judge


@pytest.mark.parametrize("model", ["policy", None], ids=["named", "by default"])
def test_the_policys_chat_is_the_recipes_own_section(model: str | None) -> None:
    judge: dict[str, Any] = {"kind": "llm", "chat": {"reasoning_tags": ["<t>", "</t>"]}}
    judge |= {"model": model} if model is not None else {}
    data = {"model": "m", "prompts": {"source": "p", "deal": "same"}}
    with pytest.raises(RecipeError, match=r"judge: chat is of a judge model of its own.*the recipe's section chat"):
        check_recipe({**data, "judge": judge}, "r")
    with pytest.raises(RecipeError, match=r"evaluate\.judge: chat is of"):
        check_recipe({**data, "judge": JUDGED, "evaluate": {"judge": judge}}, "r")
    assert check_recipe({**data, "judge": {**judge, "model": "other"}}, "r").judge is not None


def test_a_misspelt_key_of_it_gets_a_hint() -> None:
    judge = {"kind": "llm", "model": "other", "chat": {"reasoning_tag": ["<t>", "</t>"]}}
    with pytest.raises(RecipeError, match=r'judge\.chat\.reasoning_tag: unknown key; did you mean "reasoning_tags"'):
        check_recipe({"model": "m", "prompts": {"source": "p", "deal": "same"}, "judge": judge}, "r")


def test_the_judges_model_is_opened_with_its_own_chat(model: Path) -> None:
    seen: list[tuple[Path, Chat]] = []

    def keep(folder: Path, chat: Chat) -> Any:
        seen.append((folder, chat))
        raise KeyboardInterrupt

    fields = {"chat_template": THINKS, "chat_template_kwargs": {"quiet": True}, "reasoning_tags": ["<t>", "</t>"]}
    judge = make_judge(
        LLMJudgeRecipe.model_validate({"kind": "llm", "model": str(model), "chat": fields}), open_model=keep
    )
    assert isinstance(judge, LLMJudge)
    assert judge._factory is not None
    with pytest.raises(KeyboardInterrupt):
        judge._factory()
    ((folder, chat),) = seen
    assert (folder, chat.reasoning_tags) == (model, ("<t>", "</t>"))
    assert not chat.opens_with("<think>")
    assert Chat.load(str(model), chat_template=THINKS).opens_with("<think>")


def test_whatever_a_judge_model_reads_of_a_question_is_in_its_identity(model: Path) -> None:
    chats: tuple[dict[str, Any], ...] = (
        {"chat_template": THINKS},
        {"chat_template": THINKS, "chat_template_kwargs": {"quiet": True}},
        {"reasoning_tags": ["<t>", "</t>"]},
    )
    found = [judge_of(model).identity, *(judge_of(model, chat=chat).identity for chat in chats)]
    assert judge_of(model, chat={}).identity == judge_of(model).identity == found[0]
    assert f"llm:{store.weights_digest(model)} chat " in found[0]
    before = {file: file.read_text() for file in model.glob("*.json")}
    (model / "chat_template.jinja").write_text(THINKS)
    found.append(judge_of(model).identity)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    for name, change in (
        ("tokenizer.json", lambda text: text.replace('"id": 2,', '"id": 2, ')),
        ("generation_config.json", lambda text: json.dumps(json.loads(text) | {"eos_token_id": [2, 1]})),
    ):
        (model / name).write_text(change(before[model / name]))
        found.append(judge_of(model).identity)
        (model / name).write_text(before[model / name])
    assert len({*found}) == len(found) == 7


def test_another_place_of_the_same_model_is_the_same_judge(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(THINKS)
    one = judge_of(model, chat={"chat_template": str(tmp_path / "t.jinja")}).identity
    (tmp_path / "t.jinja").rename(tmp_path / "moved.jinja")
    moved = model.rename(tmp_path / "moved")
    assert judge_of(moved, chat={"chat_template": str(tmp_path / "moved.jinja")}).identity == one


def test_a_judge_model_without_a_template_names_the_key_that_gives_it_one(tmp_path: Path) -> None:
    bare = make_tiny_model(tmp_path / "bare", chat_template=None)
    with pytest.raises(DataError, match=r"^judge\.chat\.chat_template: the tokenizer of .* has no chat template"):
        judge_of(bare)
    with pytest.raises(DataError, match=r"^judge\.chat\.chat_template: none\.jinja is no template"):
        judge_of(bare, chat={"chat_template": "none.jinja"})
    assert judge_of(bare, chat={"chat_template": TEMPLATE}).identity


def test_a_panel_judge_without_one_is_refused_under_its_own_key_before_anything_is_sampled(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = make_tiny_model(tmp_path / "bare", chat_template=None)
    path = write_recipe(tmp_path, tiny, evaluate={"judge": {"kind": "llm", "model": str(bare)}})
    for command in (["iterate", str(path)], ["evaluate", str(path), "--model", str(tiny)]):
        assert main([*command, "--out", str(tmp_path / "run")]) == 65
        assert "evaluate.judge.chat.chat_template: the tokenizer" in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "run").rglob("*.jsonl"))


def test_its_template_is_read_beside_the_recipe_and_copied_with_it(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "thinks.jinja").write_text(THINKS)
    own = {"kind": "llm", "model": str(tiny), "chat": {"chat_template": "thinks.jinja"}}
    both = {"kind": "combine", "how": "min", "normalize": "none", "judges": [JUDGED, own]}
    for judge in (own, both):
        recipe = load_recipe(write_recipe(tmp_path, tiny, judge=judge))
        assert tmp_path / "thinks.jinja" in files_of(recipe, tmp_path)


def test_a_judge_model_that_opens_with_a_thought_gives_labels_where_it_is_told_not_to_think(
    model: Path, tiny: Path, tmp_path: Path
) -> None:
    (model / "chat_template.jinja").write_text(THINKS)
    (tmp_path / "says.md").write_text(
        "---\nname: says\nversion: 1\nmode: pointwise\nlabels: {the: 1, and: 0}\n---\n[user]\n{prompt}\n{completion}"
    )
    judge = {"kind": "llm", "model": str(model), "template": "says.md", "verdict": "labels"}
    path = write_recipe(tmp_path, tiny, judge=judge, rounds=1)
    groups, scores = tmp_path / "groups", []
    ok("generate", path, "--model", tiny, "--out", groups)
    for quiet in ("false", "true"):
        out = tmp_path / quiet
        told = ["--set", f"judge.chat.chat_template_kwargs={{quiet: {quiet}}}", "--set", "generator.kind=transformers"]
        ok("judge", path, "--groups", groups, "--out", out, *told)
        scores.append((out / "00000.jsonl").read_text())
    assert scores[0] != scores[1]
