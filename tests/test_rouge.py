import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay.judges.rouge import RougeL, rouge_l, words
from selfplay.protocols import JudgeContext
from selfplay.types import Completion, Group, Message, Prompt


def test_the_longest_common_subsequence_counts_on_both_sides() -> None:
    # worked by hand: "the cat ... mat" = 3 of 4 and 3 of 5 words, F1 = 2 * 3 / 9
    assert rouge_l("The cat likes mat.", "the small cat's mat") == pytest.approx(2 * 3 / 9)
    assert rouge_l("one two", "three four") == 0.0
    assert rouge_l("", "gold") == 0.0


@given(st.text(), st.text())
def test_it_is_symmetric_and_in_the_unit_interval(a: str, b: str) -> None:
    one, other = rouge_l(a, b), rouge_l(b, a)
    assert one is None or 0.0 <= one <= 1.0
    assert (one is None, other is None) == (not words(b), not words(a))
    assert one == other or None in (one, other)


@pytest.mark.parametrize("gold", ["→ ∞", "", " \n", "...", "_", "\u0301"], ids=ascii)
def test_a_gold_answer_without_a_word_gives_no_verdict_and_never_a_number(gold: str) -> None:
    group = Group(Prompt("1", (Message("user", "q"),), gold=gold), (), (Completion("a cat"), Completion("")))
    (found,) = RougeL().judge([group], JudgeContext())
    assert found.scores == (None, None)
    assert found.notes == ("no word in the gold answer",) * 2


def test_an_empty_completion_beside_a_real_gold_answer_is_zero() -> None:
    group = Group(Prompt("1", (Message("user", "q"),), gold="a cat"), (), (Completion(""), Completion("→ ∞")))
    (found,) = RougeL().judge([group], JudgeContext())
    assert found.scores == (0.0, 0.0)


def test_words_are_of_any_script_and_without_spaces_one_word_is_long() -> None:
    assert rouge_l("un café noir", "Café NOIR") == pytest.approx(0.8)
    assert rouge_l("我 喜欢 猫", "我 喜欢 狗") == pytest.approx(2 / 3)
    assert rouge_l("我喜欢猫", "我喜欢狗") == 0.0
    assert rouge_l("我喜欢猫。", "我喜欢猫") == 1.0


def test_a_prompt_without_gold_gets_no_verdict() -> None:
    completion = Completion("a cat")
    without = Group(Prompt("1", (Message("user", "q"),)), (), (completion,))
    with_gold = Group(Prompt("2", (Message("user", "q"),), gold="a cat"), (), (completion,))
    first, second = RougeL().judge([without, with_gold], JudgeContext())
    assert first.scores == (None,)
    assert first.notes == ("no gold answer",)
    assert second.scores == (1.0,)
