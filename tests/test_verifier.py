import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfplay.errors import DataError
from selfplay.judges.checks import COMBINED
from selfplay.judges.checks.rules import RULES
from selfplay.judges.counts import ALWAYS_GO_ON, MAY_GO_ON, count_sentences, count_words, last_number
from selfplay.judges.verifier import Verifier, kinds, on_topic, passes, validate_checks
from selfplay.protocols import Judge, JudgeContext
from selfplay.types import Completion, Group, Message, Prompt, prompt_id

# One valid check of each kind that no other package decides.
EXAMPLES = {
    "exact": {"kind": "exact", "ignore_case": True},
    "numeric": {"kind": "numeric", "tolerance": 0.01},
    "regex": {"kind": "regex", "pattern": r"is (\w+)", "match_gold": True},
    "words": {"kind": "words", "min": 2, "max": 9},
    "sentences": {"kind": "sentences", "min": 3},
    "paragraphs": {"kind": "paragraphs", "max": 2},
    "bullets": {"kind": "bullets", "min": 3},
    "case": {"kind": "case", "case": "lower"},
    "starts_with": {"kind": "starts_with", "any": ["Yes", "No"]},
    "ends_with": {"kind": "ends_with", "any": ["?"]},
    "contains": {"kind": "contains", "any": ["for example", "such as"]},
    "excludes": {"kind": "excludes", "any": ["very"]},
    "json": {"kind": "json", "keys": ["name"]},
    "on_topic": {"kind": "on_topic", "words": ["volcano", "lava"], "min": 2},
    "all_of": {"kind": "all_of", "checks": [{"kind": "words", "min": 8}]},
    "any_of": {"kind": "any_of", "checks": [{"kind": "words", "min": 8}, {"kind": "case", "case": "upper"}]},
}
WORD = st.from_regex(r"[a-z]{2,9}", fullmatch=True).filter(lambda w: w not in ALWAYS_GO_ON | MAY_GO_ON)


def group(*texts, checks=(), gold=None, finish_reason="stop"):
    messages = (Message("user", "Tell me about volcanoes."),)
    prompt = Prompt(prompt_id(messages), messages, gold=gold, checks=tuple(checks))
    return Group(prompt, (1, 2), tuple(Completion(t, finish_reason=finish_reason) for t in texts))


def judged(verifier, one_group):
    return verifier.judge([one_group], JudgeContext())[0]


def ok(text, gold=None, **check):
    validate_checks([check], "test")
    return passes(check, text, gold)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("Cats sleep.", 1),
        ("Cats sleep. Dogs bark! Do fish swim?", 3),
        ("It weighs 3.5 kg and costs 1,000.50 dollars.", 1),
        ("Eat fruit, e.g. apples or i.e. Pears. Then rest.", 2),
        ("Dr. Smith met Mrs. J. Brown in St. Ives at 5 p.m. They had tea.", 2),
        ("It grew in the U.S. and in the U.K. before 1990. Then it stopped.", 2),
        ("Bring nuts, seeds, etc. and water.", 1),
        ("Well... maybe it will rain.", 1),
        ('"Why?" she asked. "Because."', 2),
        ("it is red. it is round. it is sweet.", 3),
        ("Visit example.com today.", 1),
        ("Here are three:\n1. Red apples\n2. Green pears.\n3. Plums. They are sweet.", 5),
        ("A line that is\ncut by hand in two.", 1),
        ("No stop at the end", 1),
        ("What?! Really!!! Yes...", 3),
        ("**Bold.** Then more.", 2),
        ("1.\n\n---\n...", 1),
    ],
)
def test_sentences_are_counted_as_a_reader_would(text, expected):
    assert count_sentences(text) == expected


@given(st.lists(st.tuples(st.lists(WORD, min_size=1, max_size=6), st.sampled_from(".!?")), max_size=8))
def test_a_text_has_as_many_sentences_and_words_as_were_put_in(parts):
    text = " ".join(" ".join(words).capitalize() + stop for words, stop in parts)
    assert count_sentences(text) == len(parts)
    assert count_words(text) == sum(len(words) for words, _ in parts)


@given(st.lists(WORD, min_size=1, max_size=8), st.sampled_from(["- ", "* ", "• ", "1. ", "12) ", "  - "]))
def test_list_markers_are_bullets_and_no_words(items, marker):
    text = "\n".join(marker + item for item in items)
    assert count_words(text) == len(items)
    assert ok(text, kind="bullets", min=len(items), max=len(items))
    assert not ok(text, kind="bullets", min=len(items) + 1)


def test_words_are_what_stands_between_white_space():
    assert count_words("A well-known don't — it costs 3.5, or 1,000 - say") == 9
    assert not ok("**bold** - *is* two*", kind="bullets", min=1)


@given(st.integers(-(10**12), 10**12), WORD)
def test_a_number_is_read_with_and_without_thousands_commas(n, word):
    assert last_number(f"{word} 7 {word} {n:,}.") == n
    assert ok(f"It is ${n}!", f"work\n#### {n:,}", kind="numeric")


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("#### 72\nThat is 5 more.", "72", True),
        ("so 3 + 4 = 7", "#### 7", True),
        ("between 5-3 ", "3", True),
        ("it is -3.50 degrees", "-3.5", True),
        ("**1,234.5**", "1234.5", True),
        ("no idea", "0", False),
        ("CO2", "2", False),
        ("9e999", "9", False),
    ],
)
def test_numeric_compares_the_last_number(text, gold, expected):
    assert ok(text, gold, kind="numeric") is expected


def test_numeric_takes_a_tolerance():
    assert ok("3.14", "3.1416", kind="numeric", tolerance=0.01)
    assert not ok("3.14", "3.1416", kind="numeric", tolerance=0.001)


def test_exact_strips_and_ignores_case_only_when_told():
    assert ok(" Paris\n", "Paris", kind="exact")
    assert not ok(" Paris", "Paris", kind="exact", strip=False)
    assert not ok("paris", "Paris", kind="exact")
    assert ok("paris", "Paris", kind="exact", ignore_case=True)


def test_regex_is_found_or_its_group_is_the_gold_answer():
    assert ok("It is 9 o'clock", kind="regex", pattern=r"\d")
    assert not ok("It is nine", kind="regex", pattern=r"\d")
    assert ok("First (A), no: (B)", "B", kind="regex", pattern=r"\((\w)\)", match_gold=True)
    assert not ok("First (A), no: (B)", "A", kind="regex", pattern=r"\((\w)\)", match_gold=True)
    assert not ok("no letter", "A", kind="regex", pattern=r"\((\w)\)", match_gold=True)


def test_phrases_match_whole_words_in_their_places():
    assert ok("  Yes, it is.", kind="starts_with", any=["No", "Yes"])
    assert not ok("Yesterday it was.", kind="starts_with", any=["Yes"])
    assert ok("Would you? \n", kind="ends_with", any=["?", "!"])
    assert not ok("Would you? I would.", kind="ends_with", any=["?"])
    assert ok("It is the end", kind="ends_with", any=["the end"])
    assert not ok("This is the weekend", kind="ends_with", any=["end"])
    assert ok("Fruit, For Example apples", kind="contains", any=["for example", "such as"])
    assert not ok("Fruit, For Example apples", kind="contains", any=["for example"], ignore_case=False)
    assert ok("first this, then that", kind="contains", all=["first", "then"])
    assert not ok("first this", kind="contains", all=["first", "then"])
    assert not ok("It is every day", kind="contains", any=["very"])
    assert ok("It is every day", kind="excludes", any=["very"])
    assert not ok("a, b", kind="excludes", any=[","])
    assert not ok("every", kind="excludes", any=["very"], whole_words=False)


def test_paragraphs_are_parted_by_empty_lines():
    assert ok("One.\nStill one.\n\n \nTwo.\n", kind="paragraphs", min=2, max=2)
    assert ok("", kind="paragraphs", max=0)


def test_case_asks_for_letters():
    assert ok("all low 3", kind="case", case="lower")
    assert not ok("Not low", kind="case", case="lower")
    assert not ok("123", kind="case", case="upper")


def test_json_may_stand_in_one_fence_and_must_have_the_keys():
    text = json.dumps({"name": "Ida", "age": 3})
    assert ok(text, kind="json", keys=["name"])
    assert ok(f"```json\n{text}\n```", kind="json")
    assert not ok(text, kind="json", keys=["name", "town"])
    assert not ok("[1]", kind="json", keys=["name"])
    assert not ok(f"Here it is: {text}", kind="json")
    assert not ok("[NaN]", kind="json")
    assert not ok("[" * 100_000, kind="json")


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("volcano", "Volcanoes are hot", True),
        ("bake", "She was baking", True),
        ("berry", "BERRIES are sweet", True),
        ("swim", "They like swimming", True),
        ("teach", "Teachers help", True),
        ("car", "She cared a lot", False),
        ("car", "The car's wheel", True),
        ("rain", "The brain is big", False),
        ("solar system", "in our Solar System", True),
    ],
)
def test_on_topic_knows_the_usual_endings(key, text, expected):
    assert ok(text, kind="on_topic", words=[key]) is expected


def test_on_topic_counts_different_words():
    check = {"kind": "on_topic", "words": ["lava", "ash"], "min": 2}
    assert not passes(check, "lava, lava and lava", None)
    assert passes(check, "lava and ash", None)


@given(st.text(), st.text(), st.sampled_from(sorted(EXAMPLES)))
def test_any_text_gets_a_verdict_from_every_kind(text, gold, kind):
    gold = f"{gold} 5"  # numeric wants a number in the gold answer
    assert passes(EXAMPLES[kind], text, gold) in (True, False)
    both = {"kind": "all_of", "checks": [EXAMPLES[kind], EXAMPLES["words"]]}
    either = {"kind": "any_of", "checks": [EXAMPLES[kind], EXAMPLES["words"]]}
    verdicts = [passes(c, text, gold) for c in (EXAMPLES[kind], EXAMPLES["words"])]
    assert passes(both, text, gold) == all(verdicts)
    assert passes(either, text, gold) == any(verdicts)


def test_every_rule_has_an_example_here_that_validates():
    assert set(EXAMPLES) == {*RULES, *COMBINED}
    validate_checks(list(EXAMPLES.values()), "test")


@pytest.mark.parametrize(
    ("check", "words"),
    [
        ({"kind": "sentance", "min": 3}, ["'sentance'", "'sentences'"]),
        ({"min": 3}, ["kind"]),
        ({"kind": "words", "minimum": 3}, ["'minimum'", "min, max"]),
        ({"kind": "words", "min": "3"}, ["'min'", "'3'", "integer"]),
        ({"kind": "words", "min": True}, ["'min'"]),
        ({"kind": "words", "min": -1}, ["'min'"]),
        ({"kind": "words", "min": 9, "max": 3}, ["min 9 is above max 3"]),
        ({"kind": "words"}, ["'min' or 'max'"]),
        ({"kind": "contains"}, ["'any' or 'all'"]),
        ({"kind": "contains", "any": "for example"}, ["'any'"]),
        ({"kind": "contains", "any": []}, ["'any'"]),
        ({"kind": "case", "case": "title"}, ["'upper' or 'lower'"]),
        ({"kind": "regex", "pattern": "("}, ["regular expression"]),
        ({"kind": "numeric", "tolerance": float("nan")}, ["'tolerance'"]),
        ({"kind": "on_topic", "min": 1}, ["'words' is missing"]),
        ({"kind": "on_topic", "words": ["a"], "min": 2}, ["above the number of words"]),
        ({"kind": "all_of", "checks": [{"kind": "word", "min": 1}]}, ["in 'all_of'", "'words'"]),
    ],
)
def test_a_wrong_check_is_refused_with_what_is_allowed(check, words):
    with pytest.raises(DataError) as error:
        validate_checks([check], "prompt 00ff")
    for word in ["prompt 00ff", *words]:
        assert word in str(error.value)


def test_a_wrong_check_of_a_prompt_is_refused_before_anything_is_scored():
    wrong = group("text", checks=[{"kind": "lines", "min": 1}])
    with pytest.raises(DataError, match=wrong.prompt.id):
        judged(Verifier(), wrong)
    with pytest.raises(DataError, match=r"judge\.checks"):
        Verifier(({"kind": "lines", "min": 1},))


def test_the_score_is_the_share_of_checks_passed_and_the_note_names_the_others():
    recipe = ({"kind": "words", "min": 2},)
    own = [{"kind": "ends_with", "any": ["."]}]
    verdict = judged(Verifier(recipe), group("Two words.", "Two words", "none", checks=own))
    assert verdict.scores == (1.0, 0.5, 0.0)
    assert verdict.notes == ("", "ends_with", "words, ends_with")


def test_all_or_nothing_gives_one_or_zero():
    checks = [{"kind": "words", "min": 2}, {"kind": "ends_with", "any": ["."]}]
    verdict = judged(Verifier(score="all"), group("Two words.", "Two words", checks=checks))
    assert verdict.scores == (1.0, 0.0)


def test_a_truncated_completion_fails_unless_told_otherwise():
    cut = group("Two words", checks=[{"kind": "words", "min": 2}], finish_reason="length")
    assert judged(Verifier(score="all"), cut).scores == (0.0,)
    assert judged(Verifier(score="all"), cut).notes == ("truncated",)
    assert judged(Verifier(score="all", truncated_fails=False), cut).scores == (1.0,)
    assert judged(Verifier(), cut).scores == (0.0,)
    assert judged(Verifier(truncated_fails=False), cut).scores == (1.0,)


def test_no_check_or_no_gold_is_no_verdict():
    nothing = judged(Verifier(), group("text"))
    assert nothing.scores == (None,)
    assert "no check" in nothing.notes[0]
    for check in (EXAMPLES["exact"], EXAMPLES["numeric"], EXAMPLES["regex"]):
        verdict = judged(Verifier(), group("this is 5", checks=[check, {"kind": "words", "min": 1}]))
        assert verdict.scores == (None,)
        assert "gold" in verdict.notes[0]


@given(st.lists(st.text(max_size=60), min_size=1, max_size=5), st.sampled_from(["share", "all"]))
def test_there_is_one_score_between_zero_and_one_per_completion(texts, score):
    verdict = judged(Verifier(score=score), group(*texts, checks=list(EXAMPLES.values()), gold="5"))
    assert len(verdict.scores) == len(verdict.notes) == len(texts)
    for value, note in zip(verdict.scores, verdict.notes, strict=True):
        assert 0.0 <= value <= 1.0
        assert (value == 1.0) == (note == "")


def test_identity_changes_with_the_configuration_and_with_nothing_else():
    words = ({"kind": "words", "min": 2},)
    different = [Verifier(), Verifier(words), Verifier(words, "all"), Verifier(words, "all", truncated_fails=False)]
    different += [Verifier(words, ifeval="loose")]
    assert len({v.identity for v in different}) == len(different)
    assert Verifier(words).identity == Verifier(({"min": 2, "kind": "words"},)).identity
    assert isinstance(different[0], Judge)


def test_on_topic_of_a_completion_is_none_where_nobody_asked():
    asked = group("Lava flows.", "Sorry.", checks=[{"kind": "on_topic", "words": ["lava"]}])
    assert [on_topic(asked.prompt, c) for c in asked.completions] == [True, False]
    plain = group("Lava flows.", checks=[{"kind": "words", "min": 1}])
    assert on_topic(plain.prompt, plain.completions[0]) is None


def test_kinds_are_listed_once_and_nested_ones_too():
    checks = [EXAMPLES["any_of"], EXAMPLES["words"], EXAMPLES["json"]]
    assert kinds(checks) == ["any_of", "words", "case", "json"]
