"""Figures of a run, read from its finished files."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.errors import DataError
from selfplay.evaluate import paired_gain, pooled_gain, unjudged_share
from selfplay.recipe_file import parse_yaml
from selfplay.recipe_pairs import MAX_UNPARSED
from selfplay.stages import SHARD_PROMPTS, panel_judgements, shards, usage_of
from selfplay.types import Prompt

PANEL_KEYS = (
    "heldout_score",
    "heldout_interval",
    "heldout_greedy",
    "on_topic",
    "mean_length",
    "truncated",
    "entropy",
    "kl",
    "greedy_on_topic",
    "greedy_mean_length",
    "num_unjudged",
    "win_rate_against",  # whose completions a score is a win rate against; None where it is a score of its own
)
GAINS = ("gain", "greedy_gain")


def status(run: Path) -> dict[str, Any]:
    """`prompts`, the rows that were read, kept and dropped by reason; `initial` and a list `rounds` with figures, counts and
    seconds; `gain` of the last finished policy over the initial one with its paired 95 % interval, also greedy. Of a run of
    several sources each of these has `sources`, the figures of each by name, and scores and gains stand there alone. DataError
    where `run` is no run directory.
    """
    if not (run / "recipe.yaml").exists():
        raise DataError(f"{run}: no run here (no recipe.yaml). Runs are made by: selfplay iterate RECIPE --out {run}")
    initial, bounds = _panel(run / "initial"), _unparsed_bounds(run)
    rounds: list[dict[str, Any]] = []
    last: dict[str, Any] | None = None
    for folder in sorted(run.glob("round-*")):
        panel = _panel(folder)
        row: dict[str, Any] = {"round": int(folder.name.removeprefix("round-")), **_state(folder)}
        row |= panel_row(panel)
        if (folder / "round.json").exists():
            done = store.read_json(folder / "round.json")
            row |= {"counts": done["counts"], "train": done["train"], "seconds": _seconds(folder)}
            # rounds that were played before these figures existed have none
            row |= {"audit": done.get("audit"), "judge_usage": done.get("judge_usage")}
            for name, figures in done.get("sources", {}).items():
                own = row.setdefault("sources", {})
                own[name] = own.get(name, _panel_figures({})) | figures
        last = panel or last
        rounds.append(row)
    asked = usage_of(*panel_judgements(run / "initial"))
    read = run / "prompts.json"  # runs from before it was written have none
    found: dict[str, Any] = {
        "prompts": store.read_json(read) if read.exists() else None,
        "initial": panel_row(initial) | {"judge_usage": asked, "seconds": _seconds(run / "initial")},
    }
    found["rounds"] = rounds
    if "sources" in initial:
        after = (last or {}).get("sources", {})
        found["sources"] = {
            name: _gains(panel, after.get(name), bounds[name]) for name, panel in initial["sources"].items()
        }
    return found | _gains(initial, last, bounds.get("", 1.0))


def panel_row(panel: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a panel that tables show, those of its sources among them; None where there is no panel yet."""
    row = _panel_figures(panel)
    if "sources" in panel:
        row["sources"] = {name: _panel_figures(own) for name, own in panel["sources"].items()}
    return row


def _panel_figures(panel: Mapping[str, Any]) -> dict[str, Any]:
    return {key: panel.get(key) for key in PANEL_KEYS} | {"unjudged": unjudged_share(panel) if panel else None}


def _unparsed_bounds(run: Path) -> dict[str, float]:
    """`max_unparsed` of each source of a run, by name; the default where its pairing reads no scores."""
    recipe, _ = parse_yaml(store.read_bytes(run / "recipe.yaml").decode(), str(run / "recipe.yaml"))
    sources = recipe.get("sources") or {"": recipe}
    return {name: own.get("pairs", {}).get("max_unparsed", MAX_UNPARSED) for name, own in sources.items()}


def _gains(before: Mapping[str, Any], after: Mapping[str, Any] | None, bound: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, key in zip(GAINS, ("per_prompt", "per_prompt_greedy"), strict=True):
        gain = paired_gain(before[key], after[key]) if before and after else None
        found |= {name: gain[0] if gain else None, f"{name}_interval": list(gain[1]) if gain else None}
        found[f"{name}_alarm"] = (
            _gain_alarm(before, after, bound, greedy=key != "per_prompt") if gain and after else None
        )
    return found


def _gain_alarm(before: Mapping[str, Any], after: Mapping[str, Any], bound: float, *, greedy: bool) -> str | None:
    """What is wrong with a gain where the judge said nothing of a large part of a panel; None where that is small."""
    shares = [unjudged_share(panel, greedy=greedy) or 0.0 for panel in (before, after)]
    if max(shares) <= bound:
        return None
    return (
        f"the panel's judge gave no verdict on {shares[0]:.1%} of what the initial policy and {shares[1]:.1%} of what the last "
        f"one said (alarm above {bound:.1%}): this gain is over the judged prompts alone, and not to be trusted"
    )


def panel_alarms(panel: Mapping[str, Any], bounds: Mapping[str, float]) -> list[str]:
    """What is wrong with the scores of one panel where the judge said nothing of more than each source's bound."""
    found = []
    for name, own in panel.get("sources", {"": panel}).items():
        share = max(unjudged_share(own) or 0.0, unjudged_share(own, greedy=True) or 0.0)
        if share > bounds[name]:
            whose = f" of {name}" if name else ""
            found.append(
                f"the judge of the panel{whose} gave no verdict on {share:.1%} of what was said (alarm above "
                f"{bounds[name]:.1%}): the score is over the judged prompts alone, and not to be trusted"
            )
    return found


def compare(runs: Sequence[Path]) -> dict[str, Any]:
    """Runs of one experiment, such as its seeds, side by side: `runs` holds seed, rounds, the figures of the initial and the
    last policy and the gains of each; `gain` and `greedy_gain` are their means, with intervals over runs and prompts.
    Runs of several sources have one such mapping for each, in `sources`; sources without a gain in any run, whose panel nobody
    scores, are named in `unscored` instead. DataError where a run has no finished panel after training.
    """
    found = [status(run) for run in runs]
    names = [list(one.get("sources", ())) for one in found]
    if any(names):
        if any(one != names[0] for one in names):
            raise DataError(
                f"runs of other sources can't be compared: {' / '.join(', '.join(one) or 'one' for one in names)}"
            )
        scored = [name for name in names[0] if any(one["sources"][name]["gain"] is not None for one in found)]
        unscored = [name for name in names[0] if name not in scored]
        return {"sources": {name: _compare(runs, name) for name in scored or names[0]}, "unscored": unscored}
    return _compare(runs, None)


def _compare(runs: Sequence[Path], source: str | None) -> dict[str, Any]:
    """The comparison of whole runs, or of one source of each."""

    def of(found: dict[str, Any]) -> dict[str, Any]:
        return found if source is None else found["sources"][source]

    rows: list[dict[str, Any]] = []
    panels: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {"gain": [], "greedy_gain": []}
    for run in runs:
        figures = of(status(run))
        played = [f for f in sorted(run.glob("round-*")) if (f / "eval.json").exists()]
        if not played or figures["gain"] is None:
            where = run if source is None else f"{run}, source {source}"
            raise DataError(f"{where}: no judged panel after a round of training, so there is no gain to compare")
        before, after = of(_panel(run / "initial")), of(_panel(played[-1]))
        panels["gain"].append((before["per_prompt"], after["per_prompt"]))
        panels["greedy_gain"].append((before["per_prompt_greedy"], after["per_prompt_greedy"]))
        recipe, _ = parse_yaml(store.read_bytes(run / "recipe.yaml").decode(), str(run / "recipe.yaml"))
        row = {"run": str(run), "seed": recipe["seed"], "num_rounds": len(played)}
        row |= {"initial": _panel_figures(before), "last": _panel_figures(after)}
        rows.append(row | {k: v for k, v in figures.items() if "gain" in k})
    if len({row["last"]["win_rate_against"] for row in rows}) > 1:
        raise DataError(
            "some of these panels are scored and some are win rates, which can't be compared: take runs of one judge"
        )
    found: dict[str, Any] = {"runs": rows}
    for name, both in panels.items():
        gain = pooled_gain([b for b, _ in both], [a for _, a in both])
        found |= {name: gain[0] if gain else None, f"{name}_interval": list(gain[1]) if gain else None}
    return found


def _panel(folder: Path) -> dict[str, Any]:
    path = folder / "eval.json"
    found: dict[str, Any] = store.read_json(path) if path.exists() else {}
    return found


def _seconds(folder: Path) -> dict[str, float]:
    path = folder / "seconds.json"
    found: dict[str, float] = store.read_json(path) if path.exists() else {}
    return found


def _state(folder: Path) -> dict[str, Any]:
    """`state`, the last stage that is finished; of the stages that write shards also "sampling" and "judging", with
    `num_done` of `num_prompts` prompts.
    """
    marks = (("done", "round.json"), ("trained", "policy"), ("paired", "pairs.jsonl"))
    for state, name in marks:
        if (folder / name).exists():
            return {"state": state}
    dealt = _dealt(folder)
    judges = store.read_json(folder.parent / "run.json")["judge"] if dealt else None
    judged = {name: n for name, n in dealt.items() if not isinstance(judges, dict) or judges[name] is not None}
    for state, doing, stage, counts in (
        ("judged", "judging", "judgements", judged),
        ("sampled", "sampling", "groups", dealt),
    ):
        num_prompts = sum(counts.values())
        num_done = sum(min(n, len(shards(folder / stage / name)) * SHARD_PROMPTS) for name, n in counts.items())
        if num_done:
            return {
                "state": state if num_done == num_prompts else doing,
                "num_done": num_done,
                "num_prompts": num_prompts,
            }
    return {"state": "started"}


def _dealt(folder: Path) -> dict[str, int]:
    """How many prompts a round was dealt, by source; "" where the run has one."""
    path = folder / "prompts.jsonl"
    prompts: Iterable[Prompt] = store.each_record(path, Prompt) if path.exists() else ()
    recipe, _ = parse_yaml(store.read_bytes(folder.parent / "recipe.yaml").decode(), "recipe.yaml")
    return dict(Counter(prompt.source.partition(":")[0] if "sources" in recipe else "" for prompt in prompts))


def write_metrics(run: Path) -> None:
    """metrics.jsonl: one line per finished round, derived from the rounds."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in status(run)["rounds"] if row["state"] == "done"]
    store.rewrite(run / "metrics.jsonl", "".join(lines).encode())


def one_line(run: Path, round: int) -> str:
    """What to say when a panel is done."""
    panel = _panel(run / ("initial" if round < 0 else f"round-{round:03d}"))
    name = "initial policy" if round < 0 else f"policy of round {round}"
    if not panel:
        return f"{name}: no held-out prompts, so no panel"
    parts = [f"{name}:", *_scores(panel)]
    for source, own in panel.get("sources", {}).items():
        parts.append(f"{source} {' '.join(_scores(own)) or 'no score'};")
    if panel["on_topic"] is not None:
        parts.append(f"on topic {panel['on_topic']:.3f}")
    parts.append(f"length {panel['mean_length']:.0f}, truncated {panel['truncated']:.3f}")
    if panel["kl"] is not None:
        parts.append(f"KL {panel['kl']:.4f}")
    return " ".join(parts)


def _scores(panel: Mapping[str, Any]) -> list[str]:
    parts = []
    if panel["heldout_score"] is not None:
        low, high = panel["heldout_interval"]
        against = panel.get("win_rate_against")
        what = f"win rate against the {against}" if against else "held-out"
        parts.append(f"{what} {panel['heldout_score']:.3f} [{low:.3f}, {high:.3f}]")
    if panel["heldout_greedy"] is not None:
        parts.append(f"greedy {panel['heldout_greedy']:.3f}")
    if missing := unjudged_share(panel):
        parts.append(f"without a verdict {missing:.3f}")
    return parts
