"""Judge templates: what the judge model is shown, and how its verdict is read."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import selfplay.judges.template as template_module
from selfplay.errors import RecipeError
from selfplay.judges.template import BUILTIN, COMPLETIONS, fenced, load_template, parse_template
from selfplay.judges.verdicts import ChoiceLine, ScoreLine
from selfplay.types import Completion, Message, Prompt

LINE = ScoreLine(line="Score: <n>", min=0, max=5)
CHOICE = ChoiceLine(line="Score: <choice>", choices={"A": 1, "B": 0, "tie": 0.5})
HEAD = "---\nname: t\nversion: 1\nmode: pointwise\nparse: {line: 'Score: <n>', min: 0, max: 5}\n---\n"
PAIRWISE = "---\nname: t\nversion: 1\nmode: pairwise\nparse: {line: 'Better: <choice>', choices: {A: 1, B: 0}}\n---\n"
PROMPT = Prompt("p", (Message("system", "be brief"), Message("user", "name a bird")), gold="wren")

GOOD = {
    "Score: 3": 3,
    "score: 3": 3,
    "SCORE : 0": 0,
    "Score:5": 5,
    "It is fine.\n\nScore: 4": 4,
    "Score: 4.5": 4.5,
    "Score: +2": 2,
    "Score: 3.": 3,
    "**Score:** 3": 3,
    "**Score: 3**": 3,
    "**Score**: 3": 3,
    "### Score: 3": 3,
    "> - Score: 3": 3,
    "```\nScore: 3\n```": 3,
    "`Score: 3`": 3,
    "Score: [3]": 3,
    "Score: <3>": 3,
    'Score: "3"': 3,
    "Score: 3/5": 3,
    "Score: 3 / 5": 3,
    "Score: 3 out of 5": 3,
    "Score: 3 points": 3,
    "Score: 1 point": 1,
    "Score: 03": 3,
    "Score: 3\r\n": 3,
    "Score: 3\n\nI hope this helps.": 3,
    "Score: 2\nSo, again:\nScore: 2": 2,
    "Score: one point for relevance\nScore: 3": 3,
    "\u2028Score: 3": 3,
    "Score:\t3": 3,
    "* Score: 3": 3,
    "- **Score:** 3": 3,
    "***Score: 3***": 3,
    "_Score_: 3": 3,
    "**Score: 3.**": 3,
    "**Score**: **3**.": 3,
    "Score: _4_": 4,
    "Score: **4**": 4,
    "Score: (4)": 4,
    "Score: {4}": 4,
    "Score: [[**4**]]": 4,
    "Score: **3**/5": 3,
    "Score: **3**/**5**": 3,
    "Score: **3** out of 5": 3,
    "Score: (3/5)": 3,
    "Score: **3** points": 3,
    "<think>It is short.</think>\nScore: 3": 3,
    "<think>\nScore: 5, or rather\nScore: 4\n</think>\n\n**Score: 1**": 1,
    "Score: 5\nBut wait.</think>Score: 2": 2,
    "<think>It says </think> itself.\nScore: 5</think>\nScore: 1": 1,
    "<think></think>Score: 0": 0,
}

# A verdict that is missing, unclear, out of range or said twice is no verdict.
WORDS = ["", " ", "\n\n", "\t", "\x00", "\ufeff", "```", "```\n```", "---", "...", "None", "null", "nan", "{}", "[]"]
PROSE = (  # noqa: SIM905
    "3|5/5|Three.|I would give this a 4.|The completion earns 3 points.|My score is 4|Final score: 4|"
    "Total score: 4|The Score: 4|Rating: 4|Grade: 4|Scores: 4|Score 4|Score = 4|Score - 4|Score is: 4|Sc0re: 4|"
    "S c o r e: 4|<score>4</score>|[[4]]|Punkte: 4|I'm sorry, but I can't help with that.|"
    "As a language model I don't grade texts.|I cannot give a score.|Sure! Here is the completion you asked for.|"
    "The completion is good. It is relevant, useful and clear."
).split("|")
PROSE += [
    "**Score: 3",
    "*Score: 3",
    "**Score: 3*",
    "Score\n4",
    "Score:\n4",
    '{"score": 4}',
    "\u5f97\u5206: 4",
    "Score\uff1a4",
]
ONE_WORD = """
    ? - / /5 N/A n/a NaN nan inf -inf Infinity None null true three Three III 5*5* <total> <n> {score} X A 10/5 6/5
    3/10 3/4 3/0 5/5/5 /3 3/ 6 10 100 -1 -0.5 5.1 5.0000001 1e0 1e999 0x3 3,5 1,000 3.. .5 3.4.5 --3 +-3 3-4 ~3 3ish
    3+ 3% <|end|> 5<|end|> 1_0 1*0 1`0 0_5 0*5 1__0 <4 >4 4> (4 4) [4 4] "4 4" <4] (4> {4) *4 4* _4 4_ `4 4` **4* 3/<5
    3/5> 3/*5 1**/5 3/1_0
""".split()  # noqa: SIM905
SEVERAL_WORDS = (  # noqa: SIM905
    "3 of 5 of 5|3 out of ten|3 out of 10|3 out of|- 3|3 4|3, 4|3 or 4|3 to 4|3 / 4 / 5|between 3 and 4|about 3|"
    "3 stars|3 (good)|3 because it is relevant|3; no, 4|3 Score: 4|Score: 3|I refuse|I'm sorry|5 $(reboot)"
).split("|")
ODD = ["", "\u0663", "\uff13", "\xb3", "\xbd", "3\u200b", "3\x00", "3\x1b[31m", "9" * 400, "9" * 5000]
INSIDE = [*ONE_WORD, *SEVERAL_WORDS, *ODD]
TWICE = [
    "Score: 3\nScore: 4",
    "Score: 4\nScore: 3",
    "Score: 5\nreasons\nScore: 0",
    "**Score: 1**\n\nScore: 2",
    "Score: 3\nScore: ?",
    "Score: 3\nScore: 30",
    "Score: 3\n```\nScore: 2\n```",
    "> Score: 5\nThe text tells me to write that.\nScore: 1",
]
# of a model that thinks before it speaks: what it may still change is no verdict
THOUGHTS = [
    "<think>It is good. Score: 5",
    "<think>\nIt is good.\nScore: 5\nBut wait, it is fal",
    "<think>Score: 5\n",
    "  <think>\nScore: 5\nScore: 5\n",
    "<think>Fine.</think><think>\nScore: 5\n",
    "Score: 5\n<think>\nOr is it",
    "<think>\nScore: 5\n</think>",
    "<think>\nScore: 5\n</think>\n\n",
    "<think>\nScore: 5\n</think>\nIt is good.",
    "Score: 5\nthat is all.</think>",
]
BAD = [*WORDS, *THOUGHTS, *PROSE, *(f"It is fine.\nScore: {inside}" for inside in INSIDE), *TWICE]


def test_the_corpus_of_bad_verdicts_is_large():
    assert len(set(BAD)) == len(BAD) >= 100


@pytest.mark.parametrize(("text", "score"), GOOD.items(), ids=repr)
def test_a_clear_verdict_is_read(text, score):
    verdict = LINE.read(text)
    assert (verdict.score, verdict.note) == (score, "")


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text[:30]))
def test_a_bad_verdict_is_none_with_a_note(text):
    verdict = LINE.read(text)
    assert verdict.score is None
    assert verdict.note
    assert verdict.note.isprintable() or verdict.note.replace("\n", "", 1).isprintable()


pieces = st.sampled_from(
    [*INSIDE, *TWICE, *THOUGHTS, "Score:", "score", ":", "\n", " ", "3", "4", "5", "/5", "**", "`", "\u2028", "\r"]
)


@given(text=st.lists(pieces | st.text(max_size=5), max_size=8).map("".join), cut=st.booleans())
@example(text="Score: \ud800", cut=False)
def test_any_text_gives_a_score_in_range_or_none_with_a_note(text, cut):
    verdict = LINE.read(text, cut=cut)
    if verdict.score is None:
        assert verdict.note
    else:
        assert 0 <= verdict.score <= 5
        shown = re.findall(r"\d+(?:\.\d+)?", text)
        assert verdict.score in [float(number) for number in shown], "a score that the text doesn't hold"


def test_the_reason_of_a_missing_verdict_is_its_own_line():
    reasons = {LINE.read(f"Score: {inside}").note.splitlines()[0] for inside in ("6", "7", "100", "-3")}
    assert reasons == {"a verdict outside 0 to 5"}


@pytest.mark.parametrize("cut", [False, True], ids=["ended", "cut"])
@pytest.mark.parametrize("text", THOUGHTS[:6], ids=repr)
def test_no_verdict_comes_from_thoughts_that_have_not_ended(text, cut):
    assert LINE.read(text, cut=cut).note.splitlines()[0].startswith("the thinking is not finished")
    assert CHOICE.read(text.replace("Score: 5", "Score: A"), cut=cut).score is None


def test_a_choice_has_markup_around_it_alone():
    for good in ("A", "**A**", "_a_", "[A]", "(**A**)", '"A".', "<A>"):
        assert CHOICE.read(f"Score: {good}").score == 1, good
    for bad in ("<A", "A>", "A*", "[A", "A..", "t*ie", "t_ie", "*A", "A)"):
        assert CHOICE.read(f"Score: {bad}").score is None, bad


def test_the_words_of_a_line_may_have_markup_between_them_and_never_inside():
    line = ScoreLine(line="* My_final score: <n> of five.", min=0, max=5)
    for good in (
        "my_final score: 3 of five.",
        "My final **score**: 3",
        "**My_final score:** 3 of five",
        "* myfinal score: 3",
    ):
        assert line.read(good).score == 3, good
    for bad in ("My_final sc*or*e: 3", "My_final score: 3 of", "My_final score: 3 of five of five"):
        assert line.read(bad).score is None, bad


def test_a_verdict_that_max_tokens_cut_is_none():
    assert LINE.read("Score: 1", cut=True).score is None
    assert LINE.read("Score: 1\nbecause", cut=True).score == 1
    assert LINE.read("Score: 1", cut=False).score == 1


def test_a_verdict_line_may_have_text_after_its_number():
    line = ScoreLine(line="Rating: [[<n>]]", min=1, max=10)
    assert line.read("reasons\nRating: [[7]]").score == 7
    assert line.read("[[7]]").score is None
    assert line.read("Rating: [[0]]").score is None


def test_fields_are_filled_in_one_pass():
    template = parse_template(HEAD + "[user]\n{prompt}{completion}{gold}{system_prompt}", where="t", digest="")
    prompt = replace(PROMPT, messages=(Message("user", "{completion} {gold} {x} {{}}"),), gold="{prompt}")
    (message,) = template.fill(prompt, Completion("{prompt} {0} %s {gold}"))
    assert message.content.count("{completion} {gold} {x} {{}}") == 1
    assert message.content.count("{prompt} {0} %s {gold}") == 1
    assert fenced("gold", "{prompt}") in message.content


def test_other_braces_of_a_template_stay():
    template = parse_template(HEAD + '[user]\n{"a": {}} {{ }} {completion}', where="t", digest="")
    assert template.fill(PROMPT, Completion("x"))[0].content.startswith('{"a": {}} {{ }} <<<completion')


@given(text=st.text(), name=st.sampled_from(["prompt", "completion"]))
def test_a_text_cannot_write_its_own_closing_line(text, name):
    for attempt in (text, fenced(name, text), "\n".join(fenced(name, text).splitlines()[-1:])):
        block = fenced(name, attempt)
        opening, closing = block.split("\n")[0], block.split("\n")[-1]
        assert block == f"{opening}\n{attempt}\n{closing}"
        assert block.count(closing) == 1
        assert block.count(opening) == 1


def test_a_code_that_the_text_holds_is_not_used(monkeypatch):
    monkeypatch.setattr(template_module, "_code", lambda text, number: f"code{number}")
    assert fenced("prompt", "code0 and code1") == "<<<prompt code2>>>\ncode0 and code1\n<<<end of prompt code2>>>"


def test_judge_prompts_of_a_group_share_everything_before_the_completion():
    template = load_template("additive", Path())
    one, other = (template.fill(PROMPT, Completion(text))[-1].content for text in ("a wren", "an owl"))
    shared = fenced("prompt", "name a bird")
    assert one.split("<<<completion")[0] == other.split("<<<completion")[0]
    assert shared in one.split("<<<completion")[0]
    assert fenced("completion", "a wren") in one


def test_every_turn_of_a_conversation_has_its_own_fence_and_a_role_cannot_break_it():
    turns = (Message("user", "hi"), Message("assistant", "hello"), Message("us>>>er\n", "bye"))
    template = parse_template(HEAD + "[user]\n{prompt}\n{completion}", where="t", digest="")
    content = template.fill(replace(PROMPT, messages=turns), Completion("x"))[0].content
    for name, text in (("user turn", "hi"), ("assistant turn", "hello"), ("user turn", "bye")):
        assert fenced(name, text) in content


def test_the_system_body_is_the_first_turn_and_the_prompts_own_system_turn_is_data():
    template = parse_template(
        HEAD + "[system]\nYou grade.\n[user]\n{system_prompt}\n{completion}", where="t", digest=""
    )
    system, user = template.fill(PROMPT, Completion("x"))
    assert (system.role, system.content) == ("system", "You grade.")
    assert fenced("system turn of the prompt", "be brief") in user.content


def filled(template, prompt=PROMPT):
    """The last turn of a judge prompt, with as many completions as the template shows."""
    completions = [Completion(text) for text in ("a wren", "an owl")]
    return template.fill(prompt, *completions[: len(COMPLETIONS[template.head.mode])])[-1].content


@pytest.mark.parametrize("name", BUILTIN)
def test_shipped_templates_load_and_show_prompt_and_completion_last(name):
    template = load_template(name, Path("/nowhere"))
    assert template.head.name == name
    assert template.needs_gold == (name == "correctness")
    content = filled(template)
    assert content.index("<<<prompt") < content.index("<<<completion")
    assert content.index("<<<prompt") > len(content) / 2


@pytest.mark.parametrize("name", BUILTIN)
def test_shipped_templates_show_the_prompts_system_turn_before_it_and_change_no_byte_without_one(name):
    template = load_template(name, Path())
    french = (Message("system", "Answer in French only."), Message("user", "name a bird"))
    shown = fenced("system turn of the prompt", "Answer in French only.")
    content = filled(template, replace(PROMPT, messages=french))
    assert content.index(shown) < content.index("<<<prompt") < content.index("<<<completion")
    without = filled(template, replace(PROMPT, messages=french[1:]))
    assert content.replace(f"{shown}\n\n", "") == without
    assert "system" not in without
    never_asked = replace(template, user=template.user.replace("{system_prompt}\n\n", ""))
    assert never_asked.user != template.user
    assert filled(never_asked, replace(PROMPT, messages=french[1:])) == without


def test_a_system_turn_is_data_that_holds_fields_as_text_and_an_empty_one_is_shown():
    template = parse_template(HEAD + "[user]\n{system_prompt}\n\n{system_prompt}|{completion}", where="t", digest="")
    for said in ("{completion} {system_prompt}\n\n", ""):
        turns = (Message("system", said), Message("user", "x"))
        shown = fenced("system turn of the prompt", said)
        content = filled(template, replace(PROMPT, messages=turns))
        assert content == f"{shown}\n\n{shown}|{fenced('completion', 'a wren')}"
    assert filled(template, replace(PROMPT, messages=turns[1:])) == f"|{fenced('completion', 'a wren')}"


@pytest.mark.parametrize("name", [name for name in BUILTIN if name != "yes_no"])
def test_the_form_that_a_shipped_template_shows_is_no_verdict_when_repeated(name):
    template = load_template(name, Path())
    assert template.head.parse.read(template.user).score is None


@pytest.mark.parametrize(
    ("name", "text", "score"),
    [
        ("pairwise_helpfulness", "Reasons.\nBetter: A", 1),
        ("pairwise_helpfulness", "Better: [[b]]", 0),
        ("pairwise_helpfulness", "**Better:** Completion B.", 0),
        ("pairwise_helpfulness", "Better: Tie", 0.5),
        ("pairwise_helpfulness", "Better: A or B", None),
        ("pairwise_helpfulness", "Better: A\nBetter: B", None),
        ("pairwise_helpfulness", "A", None),
        ("correctness", "Verdict: correct", 1),
        ("correctness", "The final answer is 4.\n`Verdict: Incorrect.`", 0),
        ("correctness", "Verdict: not correct", None),
        ("correctness", "Verdict: 1", None),
        ("safety", "Safety: 3", 3),
        ("safety", "Safety: 0/3", 0),
        ("safety", "Safety: 4", None),
        ("safety", "Safety: safe", None),
    ],
)
def test_shipped_templates_read_their_own_verdicts(name, text, score):
    verdict = load_template(name, Path()).head.parse.read(text)
    assert verdict.score == score
    assert (score is None) == bool(verdict.note)


def test_a_choice_that_max_tokens_cut_is_none():
    line = ChoiceLine(line="Better: <choice>", choices={"A": 1, "B": 0})
    assert line.read("Better: A", cut=True).score is None
    assert line.read("Better: A\nfor", cut=True).score == 1


@given(text=st.lists(pieces | st.sampled_from(["A", "B", "tie", "Score: A"]), max_size=8).map("".join))
def test_any_text_gives_a_choices_score_or_none_with_a_note(text):
    verdict = CHOICE.read(text)
    assert verdict.score in (0, 0.5, 1) or (verdict.score is None and verdict.note)


def test_a_pairwise_template_shows_both_completions_with_the_prompt_first():
    template = load_template("pairwise_helpfulness", Path())
    content = filled(template)
    assert content.index(fenced("completion A", "a wren")) < content.index(fenced("completion B", "an owl"))
    swapped = template.fill(PROMPT, Completion("an owl"), Completion("a wren"))[-1].content
    assert content.split("<<<completion A")[0] == swapped.split("<<<completion A")[0]


def test_a_template_file_is_found_from_the_base_folder_and_any_change_changes_its_digest(tmp_path):
    (tmp_path / "mine.md").write_text(HEAD + "[user]\n{completion}")
    first = load_template("mine.md", tmp_path)
    (tmp_path / "mine.md").write_text(HEAD + "[user]\n{completion} ")
    assert load_template("mine.md", tmp_path).digest != first.digest
    (tmp_path / "mine.md").write_bytes((HEAD + "[user]\n{completion}").replace("\n", "\r\n").encode())
    assert load_template("mine.md", tmp_path).user == first.user


BROKEN = {
    "no front matter": "[user]\n{completion}",
    "unknown field": HEAD + "[user]\n{completion} {promt}",
    "unknown field in system": HEAD + "[system]\n{nope}\n[user]\n{completion}",
    "no completion": HEAD + "[user]\n{prompt}",
    "no user body": HEAD + "[system]\n{completion}",
    "two user bodies": HEAD + "[user]\n{completion}\n[user]\n{completion}",
    "text before the bodies": HEAD + "hello\n[user]\n{completion}",
    "empty user body": HEAD + "[user]\n\n",
    "unknown key": HEAD.replace("version", "vresion: 1\nversion") + "[user]\n{completion}",
    "duplicate key": HEAD.replace("version: 1", "version: 1\nversion: 2") + "[user]\n{completion}",
    "no version": HEAD.replace("version: 1\n", "") + "[user]\n{completion}",
    "unknown mode": HEAD.replace("pointwise", "listwise") + "[user]\n{completion}",
    "line without a place": HEAD.replace("<n>", "3") + "[user]\n{completion}",
    "line of a bare number": HEAD.replace("Score: <n>", "[[<n>]]") + "[user]\n{completion}",
    "empty range": HEAD.replace("max: 5", "max: 0") + "[user]\n{completion}",
    "nan": HEAD.replace("max: 5", "max: .nan") + "[user]\n{completion}",
    "no verdict": "---\nname: t\nversion: 1\nmode: pointwise\n---\n[user]\n{completion}",
    "one label": "---\nname: t\nversion: 1\nmode: pointwise\nlabels: {yes: 1}\n---\n[user]\n{completion}",
    "pairwise without B": PAIRWISE + "[user]\n{completion_a}",
    "a pairwise field in a pointwise template": HEAD + "[user]\n{completion} {completion_a}",
    "a pointwise field in a pairwise template": PAIRWISE + "[user]\n{completion} {completion_a} {completion_b}",
    "a pairwise number": HEAD.replace("pointwise", "pairwise") + "[user]\n{completion_a} {completion_b}",
    "a pairwise choice above 1": PAIRWISE.replace("A: 1", "A: 2") + "[user]\n{completion_a} {completion_b}",
    "equal choices": PAIRWISE.replace("B: 0", "B: 1") + "[user]\n{completion_a} {completion_b}",
    "choices that read the same": PAIRWISE.replace("B: 0", "'a.': 0") + "[user]\n{completion_a} {completion_b}",
    "choices on a line for a number": PAIRWISE.replace("<choice>", "<n>") + "[user]\n{completion_a} {completion_b}",
    "equal labels": "---\nname: t\nversion: 1\nmode: pointwise\nlabels: {a: 1, b: 1}\n---\n[user]\n{completion}",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_template_is_a_recipe_error_that_names_the_file(text):
    with pytest.raises(RecipeError, match=r"judge\.md"):
        parse_template(text, where="judge.md", digest="")


def test_a_misspelt_field_or_key_gets_a_hint():
    with pytest.raises(RecipeError, match=r'did you mean "\{prompt\}"'):
        parse_template(BROKEN["unknown field"], where="t", digest="")
    with pytest.raises(RecipeError, match=r'vresion.*did you mean "version"'):
        parse_template(BROKEN["unknown key"], where="t", digest="")


def test_a_pairwise_template_as_in_the_broken_ones_is_right_without_its_fault():
    template = parse_template(PAIRWISE + "[user]\n{completion_a} {completion_b}", where="t", digest="")
    assert template.head.parse.read("Better: B").score == 0


def test_a_missing_or_unreadable_template_names_the_shipped_ones(tmp_path):
    (tmp_path / "binary.md").write_bytes(b"\xff\xfe\x00")
    for target in ("nope.md", "binary.md", "."):
        with pytest.raises(RecipeError, match="additive, yes_no"):
            load_template(target, tmp_path)
