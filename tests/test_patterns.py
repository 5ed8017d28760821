"""Patterns of the user: what `re` reads in them is read, under a time limit."""

import re
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay.errors import DataError
from selfplay.judges.checks import value
from selfplay.judges.checks.patterns import find, pattern_fault
from selfplay.judges.checks.verdict import NoVerdictError
from selfplay.judges.verifier import Verifier, validate_checks
from selfplay.protocols import JudgeContext
from selfplay.types import Completion, Group, Message, Prompt, prompt_id

SLOW = {"kind": "regex", "pattern": "(a+)+$", "seconds": 0.02}
PIECES = (  # noqa: SIM905
    r"a b e 1 [ ] ^ { } , ( ) \d \w * ? + | . \{ {e} {1} {,2} {1,} {,} {e<=1} [[:alpha:]] - # (?#[) $ \b (?: (?= \1 [^]a] "
    r"[a-e] && \Z \s A (?P<n> \] \[ (?x) (?i) \N{DIGIT&ONE} (?x: (?-x: (?i-x: \( \) #{e} &LINE"
).split(" ")
TEXTS = ("", "ab", "abe", "a{e}b", "[:alpha:]", "a]", "aab\nbe1", "&&a", "a#b", "ABE", "[a", "1a1", "ee{1}")


def group_of(*texts: str, checks: tuple[dict[str, object], ...]) -> Group:
    messages = (Message("user", "Sing."),)
    return Group(Prompt(prompt_id(messages), messages, checks=checks), (1,), tuple(Completion(text) for text in texts))


def spans(pattern: str, text: str, *, last: bool) -> tuple[int, int] | None:
    found = find(pattern, text, ignore_case=False, last=last, seconds=5.0)
    return None if found is None else found.span()


def joined(pieces: list[str]) -> str:
    return "".join(pieces).replace("&ONE", " ONE").replace("&LINE", "\n")


@given(st.lists(st.sampled_from(PIECES), max_size=7).map(joined))
def test_a_pattern_finds_what_re_finds(pattern: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a class inside a class, which `re` may know one day
        try:
            wanted = re.compile(pattern)
        except re.error:
            assert pattern_fault(pattern)
            return
        assert pattern_fault(pattern) == ""
    for text in TEXTS:
        there = [match.span() for match in wanted.finditer(text)]
        assert spans(pattern, text, last=False) == (there[0] if there else None)
        assert spans(pattern, text, last=True) == (there[-1] if there else None)


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (r"\\boxed{e}", r"\boxed{e}", True),
        (r"\\boxed{e}", r"\boxed", False),
        (r"x{i<=1}y", "xzy", False),
        (r'{"n": \d+}', '{"n": 3}', True),
        (r"a{2}", "aa", True),
        (r"a{2}", "a", False),
        ("(?x) # a [ or {e}\n [ab] c", "bc", True),
        ("(?x) [#] {e}", "#{e}", True),
        (r"\(?x#{e}", "x", False),
        (r"\(?x#{e}", "x#{e}", True),
        ("[(?x]#{e}", "x", False),
        ("#{e}(?x: a # [ {e}\n )#{e}", "#{e}a#{e}", True),
        ("(?x:a)#{e}", "a", False),
        ("(?x) a (?-x:#{e}) # {e}", "a#{e}", True),
        ("(?x) a (?-x:#{e}) # {e}", "a", False),
    ],
)
def test_a_brace_that_counts_nothing_is_a_brace(pattern: str, text: str, found: bool) -> None:
    assert bool(re.search(pattern, text)) is found
    assert value({"kind": "regex", "pattern": pattern}, text, None) == found


def test_a_pattern_that_takes_too_long_is_no_verdict_that_names_it_and_others_go_on() -> None:
    group = group_of("a" * 5000 + "b", "aaa", "b", checks=(SLOW,))
    (judgement,) = Verifier().judge([group], JudgeContext())
    assert judgement.scores == (None, 1.0, 0.0)
    assert judgement.notes[0] == "regex: no verdict within 0.02 s from the pattern '(a+)+$'"
    nested = group_of("a" * 5000 + "b", checks=({"kind": "any_of", "checks": [{"kind": "words", "min": 1}, SLOW]},))
    assert Verifier().judge([nested], JudgeContext())[0].scores == (None,)
    gold = {**SLOW, "match_gold": True}
    with pytest.raises(NoVerdictError, match="no verdict within"):
        value(gold, "a" * 5000 + "b", "a")


def test_a_check_may_name_a_time_limit_of_its_own() -> None:
    default = {"kind": "regex", "pattern": "b+"}
    validate_checks([default, {**default, "seconds": 0.5}], "test")
    with pytest.raises(DataError, match="'seconds'"):
        validate_checks([{**default, "seconds": 0.0}], "test")


def test_case_is_ignored_only_when_told() -> None:
    for pattern, text, plain, folded in (("wren", "A WREN", None, (2, 6)), ("\u00c9", "\u00e9", None, (0, 1))):
        assert spans(pattern, text, last=False) == plain
        found = find(pattern, text, ignore_case=True, last=False, seconds=5.0)
        assert found is not None
        assert found.span() == folded
