import json
import re
from collections import Counter
from pathlib import Path

import pytest

from selfplay.judges.counts import count_words
from selfplay.judges.verifier import passes, validate_checks

DATA = Path(__file__).parent.parent / "recipes" / "data"
NON_ANSWERS = (
    "I'm sorry for any confusion.",
    "I'm sorry for any confusion, but as an AI I can't do that. How can I help you today?",
    "I'm here to help with any text you would like me to edit or to write for you.",
    "Sure! Here it is.",
    "",
)


def read(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


TRAIN, HELDOUT = read("quickstart_train.jsonl"), read("quickstart_heldout.jsonl")
both = pytest.mark.parametrize("rows", [TRAIN, HELDOUT], ids=["train", "heldout"])


def tokens(text):
    return re.findall(r"[a-z0-9']+", text.lower())


def key_words(rows):
    """The subjects' names and everything else that counts as being on topic."""
    return {word for row in rows for c in row["checks"] if c["kind"] == "on_topic" for word in c["words"]}


def wordings(rows, length):
    """Runs of `length` words of the prompts, those with a key word left out: what remains is instruction."""
    stems = [{"kind": "on_topic", "words": sorted(key_words(rows))}]
    subject = {t for row in rows for t in tokens(row["prompt"]) if passes(stems[0], t, None)}
    runs = set()
    for row in rows:
        words = tokens(row["prompt"])
        runs |= {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    return {run for run in runs if not subject & set(run)}


def own_checks(row):
    """The row's checks without those that every row has, as one comparable text."""
    own = [c for c in row["checks"] if c["kind"] != "on_topic" and not all(c in r["checks"] for r in TRAIN)]
    return json.dumps(own, sort_keys=True)


@both
def test_every_row_has_a_prompt_a_kind_and_checks_that_validate(rows):
    for row in rows:
        assert set(row) == {"prompt", "checks", "kind"}
        validate_checks(row["checks"], row["prompt"])


def test_there_are_enough_prompts_and_none_twice():
    assert len(TRAIN) >= 240
    assert len(HELDOUT) == 96
    assert len({row["prompt"] for row in TRAIN + HELDOUT}) == len(TRAIN) + len(HELDOUT)


@both
def test_no_kind_is_over_fifteen_percent(rows):
    assert max(Counter(row["kind"] for row in rows).values()) <= 0.15 * len(rows)


@both
def test_every_row_asks_for_its_subject_by_name_for_more_about_it_and_for_eight_words(rows):
    for row in rows:
        name, related = [c for c in row["checks"] if c["kind"] == "on_topic"]
        assert passes(name, row["prompt"], None), "the subject's name stands in the prompt"
        forms = [w + ending for w in name["words"] for ending in ("", "s", "es")]
        assert not [f for f in forms if passes(related, f, None)], "or the name alone would be enough"
        assert any(c["kind"] == "words" and c.get("min", 0) >= 8 for c in row["checks"])


@both
def test_non_answers_and_the_prompt_itself_fail_every_row(rows):
    for row in rows:
        for text in (*NON_ANSWERS, row["prompt"]):
            assert not all(passes(c, text, None) for c in row["checks"]), (row["prompt"], text)


@both
def test_about_half_of_the_kinds_reward_longer_completions(rows):
    """A long and a short stand-in that pass what all rows share: which of them passes the row's own checks?"""
    short = "One plain line of only nine words about it."
    long = "Some of them, for example these, are well known.\n" + "\n".join(
        f"{i}. Here is yet another fact that is worth knowing, such as this one." for i in (1, 2, 3, 4)
    )
    paragraph = " ".join(["Some of them are well known, such as the ones that live here."] * 4)
    verdicts = {}
    for row in rows:
        own = [c for c in row["checks"] if c["kind"] != "on_topic"]
        verdicts[row["kind"]] = [all(passes(c, t, None) for c in own) for t in (short, long, paragraph)]
    longer = [k for k, (s, *more) in verdicts.items() if any(more) and not s]
    shorter = [k for k, (s, *more) in verdicts.items() if s and not all(more)]
    assert len(longer) >= 0.4 * len(verdicts)
    assert len(shorter) >= 0.25 * len(verdicts)


def test_no_key_word_is_shared_between_training_and_held_out_rows():
    train, heldout = key_words(TRAIN), key_words(HELDOUT)
    for one, other in ((train, heldout), (heldout, train)):
        shared = {w for w in one if passes({"kind": "on_topic", "words": sorted(other)}, w, None)}
        assert not shared


def test_no_held_out_subject_is_named_in_a_training_prompt_and_the_other_way_round():
    for rows, others in ((TRAIN, HELDOUT), (HELDOUT, TRAIN)):
        names = sorted({w for row in others for w in row["checks"][0]["words"]})
        assert not [row["prompt"] for row in rows if passes({"kind": "on_topic", "words": names}, row["prompt"], None)]


def test_held_out_wordings_are_new():
    assert not wordings(TRAIN, 4) & wordings(HELDOUT, 4)
    runs = [
        {tuple(t[i : i + 5]) for r in rows for t in [tokens(r["prompt"])] for i in range(len(t) - 4)}
        for rows in (TRAIN, HELDOUT)
    ]
    assert not runs[0] & runs[1]
    firsts = [{tokens(r["prompt"])[0] for r in rows} for rows in (TRAIN, HELDOUT)]
    assert not firsts[0] & firsts[1]


def test_some_kinds_of_check_occur_in_the_held_out_rows_only():
    new = {row["kind"] for row in HELDOUT} - {row["kind"] for row in TRAIN}
    assert len(new) >= 2
    trained = {own_checks(row) for row in TRAIN}
    assert not [row for row in HELDOUT if row["kind"] in new and own_checks(row) in trained]


@both
def test_prompts_are_short_plain_sentences(rows):
    assert all(4 <= count_words(row["prompt"]) <= 20 and row["prompt"].isascii() for row in rows)
