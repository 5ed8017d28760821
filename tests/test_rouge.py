import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay.judges.rouge import RougeL, rouge_l
from selfplay.protocols import JudgeContext
from selfplay.types import Completion, Group, Message, Prompt


def test_the_longest_common_subsequence_counts_on_both_sides() -> None:
    # worked by hand: "the cat ... mat" = 3 of 4 and 3 of 5 words, F1 = 2 * 3 / 9
    assert rouge_l("The cat likes mat.", "the small cat's mat") == pytest.approx(2 * 3 / 9)
    assert rouge_l("one two", "three four") == 0.0
    assert rouge_l("", "gold") == 0.0


@given(st.text(), st.text())
def test_it_is_symmetric_and_in_the_unit_interval(a: str, b: str) -> None:
    assert 0.0 <= rouge_l(a, b) == rouge_l(b, a) <= 1.0


def test_a_prompt_without_gold_gets_no_verdict() -> None:
    completion = Completion("a cat")
    without = Group(Prompt("1", (Message("user", "q"),)), (), (completion,))
    with_gold = Group(Prompt("2", (Message("user", "q"),), gold="a cat"), (), (completion,))
    first, second = RougeL().judge([without, with_gold], JudgeContext())
    assert first.scores == (None,)
    assert first.notes == ("no gold answer",)
    assert second.scores == (1.0,)
