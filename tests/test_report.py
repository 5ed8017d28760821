"""What is printed: tables hold the figures, and text from data reaches a terminal without its control characters."""

import io
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from selfplay.report import (
    audit_table,
    drops_table,
    filter_line,
    interval,
    number,
    panel_table,
    print_alarms,
    print_gain,
    print_table,
    reasons,
    safe_text,
    seconds_table,
    shown,
    training_table,
)
from selfplay.report_texts import print_group
from selfplay.types import Completion, Group, Judgement, Message, Prompt

PANEL: dict[str, Any] = {
    "heldout_score": 0.4321,
    "heldout_interval": [0.4, 0.5],
    "heldout_greedy": 0.45,
    "on_topic": 0.91,
    "mean_length": 41.25,
    "truncated": 0.125,
    "entropy": 1.5,
    "kl": 0.0123,
    "unjudged": None,
}
ROUND: dict[str, Any] = {
    **PANEL,
    "round": 0,
    "state": "done",
    "seconds": {"sample": 12.0, "train": 30.5},
    "counts": {
        "num_prompts": 50,
        "num_completions": 200,
        "num_pairs": 27,
        "num_prompts_without_pair": {"too few usable completions": 3, "tie, or margin below min_margin": 20},
        "num_unusable_completions": {"truncated": 9},
        "num_pairs_too_long": 2,
    },
    "train": {
        "num_steps": 8,
        "loss_first": 0.6931,
        "loss_last": 0.5,
        "rewards/accuracies": 0.75,
        "rewards/margins": 0.3,
    },
}


def printed(*tables: Any, terminal: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=110, force_terminal=terminal, highlight=False)
    for table in tables:
        print_table("title", table, console)
    return stream.getvalue()


@given(st.text())
def test_safe_text_holds_no_control_character_but_newline_and_tab(text: str) -> None:
    safe = safe_text(text)
    assert not [char for char in safe if (ord(char) < 32 and char not in "\n\t") or 127 <= ord(char) < 160]
    assert safe_text(safe) == safe
    safe.encode()


def test_terminal_escapes_go_whole_and_the_words_stay() -> None:
    text = "\x1b[31mred\x1b[0m \x1b]0;title\x07and \x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ \x1b(Bend\x9b2J"
    assert safe_text(text) == "red and link end2J"


def test_an_escape_hidden_in_another_is_not_put_together() -> None:
    assert "\x1b" not in safe_text("\x1b\x1b[31m[31m")
    assert "\x1b" not in safe_text("\x1b]0;never ended")


def test_lines_survive_and_carriage_returns_cannot_overwrite_them() -> None:
    assert safe_text("one\r\ntwo\rthree\n\tfour") == "one\ntwo\nthree\n\tfour"


def test_direction_overrides_and_lone_surrogates_go() -> None:
    assert safe_text("a\u202eb\u2066c\u2069") == "abc"
    assert safe_text("a\ud800b") == "a\N{REPLACEMENT CHARACTER}b"
    assert safe_text("\u05d0\u05d1 \u0633") == "\u05d0\u05d1 \u0633"


def test_text_of_a_model_is_never_markup_and_is_cut_where_it_is_long() -> None:
    assert shown("[bold]x[/bold]").plain == "[bold]x[/bold]"
    assert shown("x" * 50, 10).plain == "x" * 10 + " ..."


def test_the_panel_has_a_row_for_each_policy_with_every_figure() -> None:
    lines = printed(panel_table([("initial", PANEL), ("round 0", {**PANEL, "kl": None})])).splitlines()
    assert lines[2].split() == [
        "initial",
        "0.432",
        "[0.400,",
        "0.500]",
        "0.450",
        "0.910",
        "41.2",
        "0.125",
        "1.500",
        "0.0123",
    ]
    assert lines[3].split()[-1] == "-"


def test_the_training_table_accounts_for_every_prompt() -> None:
    row = printed(training_table([ROUND])).splitlines()[2].split()
    assert row == ["0", "50", "200", "27", "23", "8", "0.693", "->", "0.500", "0.750", "0.300"]


def test_drops_are_told_by_reason_the_largest_first() -> None:
    assert reasons({"few": 3, "tie": 20}) == "20 tie; 3 few"
    assert reasons({}) == "none"
    row = printed(drops_table([ROUND])).splitlines()[2]
    assert row.startswith("0      20 tie, or margin below min_margin; 3 too few usable")
    assert row.split()[-3:] == ["9", "truncated", "2"]


def test_seconds_have_a_column_for_each_stage_and_their_sum() -> None:
    lines = printed(seconds_table({"initial": {"seconds": {"panel": 5.0}}, "rounds": [ROUND]})).splitlines()
    assert lines[1].split() == ["policy", "of", "panel", "sample", "train", "all"]
    assert lines[2].split() == ["initial", "5.0", "-", "-", "5.0"]
    assert lines[3].split() == ["round", "0", "-", "12.0", "30.5", "42.5"]


def test_tables_are_plain_and_at_most_110_wide_where_there_is_no_terminal() -> None:
    tables = [panel_table([("round 100", PANEL)]), training_table([ROUND]), drops_table([ROUND])]
    plain = printed(*tables)
    assert plain.isascii()
    assert max(map(len, plain.splitlines())) <= 110
    assert "\x1b" in printed(*tables, terminal=True)


def test_the_gain_is_signed_and_missing_where_nothing_was_scored() -> None:
    stream = io.StringIO()
    figures = {
        "gain": 0.1234,
        "gain_interval": [-0.01, 0.2],
        "gain_alarm": None,
        "greedy_gain": None,
        "greedy_gain_interval": None,
    }
    print_gain(figures, Console(file=stream, width=110))
    assert "+0.123 [-0.010, +0.200]" in stream.getvalue()
    assert "greedy" not in stream.getvalue()
    stream = io.StringIO()
    print_gain({"gain": None, "greedy_gain": None}, Console(file=stream))
    assert stream.getvalue() == ""


def test_a_figure_that_could_not_be_had_is_a_dash() -> None:
    assert (number(None), number(0.0), interval(None)) == ("-", "0.000", "-")


def test_a_group_is_shown_with_scores_and_notes_and_without_escapes() -> None:
    prompt = Prompt("id", (Message("user", "Say \x1b[2Jhi [red]"),), source="rows.jsonl:1")
    group = Group(prompt, (1,), (Completion("one\x07", (2,)), Completion("", (3,), finish_reason="length")))
    stream = io.StringIO()
    print_group(group, Judgement("id", (0.5, None), ("", "no \x1b[31mverdict")), Console(file=stream, width=110))
    assert stream.getvalue().splitlines() == [
        "prompt id (rows.jsonl:1)",
        "user: Say hi [red]",
        "completion 0, score 0.500: one",
        "completion 1, score -: (empty) [cut at max_tokens]",
        "  note: no verdict",
    ]
    assert isinstance(shown("x"), Text)


def test_a_filter_says_what_came_in_what_went_and_what_is_left() -> None:
    count = {"filter": "mix_previous", "num_in": 10, "num_added": 4, "num_dropped": 0, "num_out": 14}
    assert filter_line(count) == "mix_previous: 10 pairs + 4 of earlier rounds - 0 dropped = 14"
    count = {"filter": "own\x1b[31m", "num_in": 10, "num_added": 0, "num_dropped": 3, "num_out": 7}
    assert filter_line(count) == "own: 10 pairs - 3 dropped = 7"


def test_the_audit_shows_each_figure_a_dash_for_what_is_missing_and_the_alarms() -> None:
    keys = ("parse_rate", "tie_rate", "swap_consistency", "ceiling_share", "length_correlation", "chosen_longer")
    found = dict.fromkeys(keys, 0.25) | {"swap_consistency": None, "alarms": ["the chosen completion is \x1b[1m long"]}
    row = {"round": 3, "audit": found, "judge_usage": {"num_calls": 7, "cost": 0.5}}
    said = printed(audit_table([row, row | {"judge_usage": None}]))
    assert said.count("0.250") == 2 * 5
    assert "0.5000" in said
    console = Console(file=io.StringIO(), width=110)
    print_alarms(row, console)
    assert console.file.getvalue().startswith("round 3: ALARM: the chosen completion")  # type: ignore[attr-defined]
