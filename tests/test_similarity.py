"""Similarity by sentence embeddings, on a tiny random encoder made here."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from selfplay.errors import DataError, RecipeError
from selfplay.judges import make_judge
from selfplay.judges.similarity import Similarity, open_similarity
from selfplay.protocols import Judge, JudgeContext
from selfplay.recipe_file import load_recipe
from selfplay.recipe_judges import SimilarityRecipe
from selfplay.types import Completion, Group, Message, Prompt, prompt_id
from tests.tiny import make_tiny_model

TEXTS = ("a red house", "the house is red and stands on a hill far from here", "", "12", "a red house")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    place = tmp_path_factory.mktemp("encoder")
    words = Transformer(str(make_tiny_model(place / "words")))
    made = place / "made"
    SentenceTransformer(modules=[words, Pooling(64, "mean")], device="cpu").save(str(made), create_model_card=False)
    return made


def group(*texts: str, gold: str | None) -> Group:
    messages = (Message("user", f"Say {gold}."),)
    completions = tuple(Completion(text) for text in texts)
    return Group(Prompt(prompt_id(messages), messages, gold=gold), (1,), completions)


def test_the_score_is_the_cosine_with_the_gold_answer(folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    judge = open_similarity(str(folder))
    (verdict,) = judge.judge([group(*TEXTS, gold="a red house")], JudgeContext())
    vectors = SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS))
    lengths = (vectors * vectors).sum(1) ** 0.5
    cosines = (vectors @ vectors[0]) / (lengths * lengths[0])
    assert verdict.scores == pytest.approx(cosines.tolist(), abs=2e-5)
    assert verdict.scores[0] == verdict.scores[4] == 1.0
    assert all(score is not None and -1.0 <= score < 1.0 for score in verdict.scores[1:4])


def test_the_order_of_groups_and_completions_changes_nothing(folder: Path) -> None:
    groups = [group(*TEXTS, gold="the red hill"), group("12", "13 red hills", gold="12")]
    forward = Similarity(folder).judge(groups, JudgeContext())
    turned = [group(*reversed(TEXTS), gold="the red hill"), group("13 red hills", "12", gold="12")]
    back = Similarity(folder).judge(turned[::-1], JudgeContext())
    assert [tuple(reversed(judgement.scores)) for judgement in back[::-1]] == [j.scores for j in forward]


def test_what_else_is_judged_in_the_same_call_changes_nothing(folder: Path) -> None:
    judge = Similarity(folder)
    texts = [f"{n} red houses stand on {'a hill and ' * (n % 7)}another hill" for n in range(60)]
    groups = [group(*texts[n : n + 4], gold=f"the red hill {'far ' * n}away") for n in range(0, 60, 4)]
    together = judge.judge(groups, JudgeContext())
    assert [judge.judge([one], JudgeContext())[0].scores for one in groups] == [j.scores for j in together]


def test_a_prompt_without_a_gold_answer_gets_no_verdict_and_loads_nothing(folder: Path) -> None:
    judge = Similarity(folder)
    (verdict,) = judge.judge([group("a", "b", gold=None)], JudgeContext())
    assert verdict.scores == (None, None)
    assert verdict.notes == ("no gold answer",) * 2
    assert judge.encoder is None
    judge.judge([group("a", gold="b")], JudgeContext())
    loaded = judge.encoder
    judge.judge([group("b", gold="b")], JudgeContext())
    assert judge.encoder is loaded is not None


def test_identity_is_the_encoder_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    judge: Any = Similarity(copy)
    assert isinstance(judge, Judge)
    assert judge.identity == Similarity(folder).identity
    pooling = next(copy.glob("*Pooling/config.json"))
    pooling.write_text(pooling.read_text() + " ")
    assert Similarity(copy).identity != judge.identity


def test_a_model_that_is_no_sentence_encoder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    plain = make_tiny_model(tmp_path / "plain")
    with pytest.raises(DataError, match=r"modules\.json"):
        make_judge(SimilarityRecipe(kind="similarity", model=str(plain)))


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r'pip install "selfplay-dpo\[embeddings\]"'):
        make_judge(SimilarityRecipe(kind="similarity", model="m"))


def test_a_recipe_names_the_encoder_beside_it(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "r.yaml").write_text(
        "model: m\nprompts: {source: p.jsonl, deal: same, heldout: 0.1}\npairs: {kind: gold_vs_completion}\n"
        "evaluate: {judge: {kind: similarity, model: encoder}}\n"
    )
    judge = load_recipe(tmp_path / "r.yaml").evaluate.judge
    assert isinstance(judge, SimilarityRecipe)
    assert judge.model == str(tmp_path / "encoder")
