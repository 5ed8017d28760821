"""The tables of experiment A."""

from collections.abc import Mapping, Sequence
from typing import Any

from figures import Scores, gain, markdown, mean, read_panel, trained_on
from lab import Item, Lab
from spin import HeldoutRow, heldout_rows, spin_run

from selfplay import make_judge, store
from selfplay.recipe_judges import RougeLRecipe
from selfplay.types import PreferencePair

Logps = Mapping[str, Sequence[float]]  # logps.json
Figures = dict[str, Scores]  # by name, each by prompt


def higher(one: float, other: float) -> float:
    """1, 0, or 1/2 where they are equal."""
    return (one > other) + 0.5 * (one == other)


def told_apart(rows: Sequence[HeldoutRow], policy: Logps, start: Logps) -> Scores:
    """1 where the gold answer has the higher log-ratio of policy and start, 0 where the fresh completion has, 1/2 where both
    are equal, as they are where both are the same tokens (their sums may differ in last bits, being of different packs).
    """
    sums = zip(rows, policy["gold"], policy["fresh"], start["gold"], start["fresh"], strict=True)
    return {
        row.prompt: 0.5 if row.same else higher(gold - gold0, fresh - fresh0)
        for row, gold, fresh, gold0, fresh0 in sums
    }


def by_length(rows: Sequence[HeldoutRow], *, shorter: bool) -> Scores:
    """The same by length alone: the shorter is taken for gold, or the longer; 1/2 where both are as long."""
    sign = -1 if shorter else 1
    return {
        row.prompt: higher(sign * len(row.gold.completion_token_ids), sign * len(row.fresh_token_ids)) for row in rows
    }


def mostly_shorter(pairs: Sequence[PreferencePair]) -> bool:
    """Whether gold answers are more often shorter than longer in pairs of SPIN; True where as often."""
    gaps = [len(pair.rejected_token_ids) - len(pair.chosen_token_ids) for pair in pairs]
    return sum(gap > 0 for gap in gaps) >= sum(gap < 0 for gap in gaps)


def table(lab: Lab) -> str:
    """Every item, then the comparisons over seeds."""
    rows: list[list[Any]] = []
    found: dict[tuple[str, int], Figures] = {}
    for item in lab.items():
        place, done = lab.folder(item), lab.done(item)
        if done is None:
            rows.append([item.arm, item.seed, "not run", *[None] * 10])
            continue
        panel, own = read_panel(place / "test"), figures_of(lab, item)
        assert panel is not None
        found[item.arm, item.seed] = own
        trained = trained_on(place, done["rate"])
        length, gold_logp = panel.figures["mean_length"], store.read_json(place / "logps.json")["gold_per_token"]
        shown = [mean(list(own[name].values())) if name in own else None for name in NAMES]
        rate = f"{done['rate']:g}" if done["rate"] else None
        rows.append([item.arm, item.seed, rate, *trained, *shown[:4], gold_logp, *shown[4:], length])
    head = "arm|seed|rate|rows|steps|similarity|greedy|ROUGE-L|greedy|gold logp|told apart|by length|length"
    return "\n\n".join([markdown(head.split("|"), rows), compared(lab, found), apart(lab, found)])


NAMES = ("similarity", "similarity, greedy", "ROUGE-L", "ROUGE-L, greedy", "told apart", "by length")


def figures_of(lab: Lab, item: Item) -> Figures:
    """By name what each prompt of the test panel scores; the last two only where the policy was trained beyond the start."""
    place, seed = lab.folder(item), item.seed
    panel, words = read_panel(place / "test"), read_panel(place / "test", make_judge(RougeLRecipe(kind="rouge_l")))
    assert panel is not None
    assert words is not None
    found = dict(zip(NAMES, (panel.scores, panel.greedy, words.scores, words.greedy), strict=False))
    if lab.trains(item):
        rows, start = heldout_rows(lab, seed), lab.folder(Item("sft", seed, "only")) / "logps.json"
        pairs = store.read_records(spin_run(lab, seed) / "round-000" / "pairs.jsonl", PreferencePair)
        found["told apart"] = told_apart(rows, store.read_json(place / "logps.json"), store.read_json(start))
        found["by length"] = by_length(rows, shorter=mostly_shorter(list(pairs)))
    return found


def compared(lab: Lab, found: Mapping[tuple[str, int], Figures]) -> str:
    """The plan's comparisons, later minus earlier."""
    rows = []
    for one, other in lab.plan["compare"]:
        seeds = [s for s in lab.plan["seeds"] if (one, s) in found and (other, s) in found]
        for name in NAMES[:3] + NAMES[4:5]:
            if all(name in found[arm, s] for s in seeds for arm in (one, other)):
                had = gain([found[one, s][name] for s in seeds], [found[other, s][name] for s in seeds])
                rows.append([f"{other} - {one}", name, len(seeds), had, had.verdict if had else "not run"])
    return markdown(["comparison", "figure", "seeds", "difference", "verdict"], rows)


def apart(lab: Lab, found: Mapping[tuple[str, int], Figures]) -> str:
    """Gold answers told from fresh completions: against length alone, and against chance."""
    rows: list[list[Any]] = []
    for arm in lab.plan["arms"]:
        both = [figures for (name, _), figures in found.items() if name == arm and "told apart" in figures]
        if both:
            chance = [dict.fromkeys(figures["told apart"], 0.5) for figures in both]
            told, length = ([figures[name] for figures in both] for name in NAMES[4:])
            ways = (("told apart - 1/2", chance, told), ("by length - 1/2", chance, length))
            for name, before, after in (*ways, ("told apart - by length", length, told)):
                had = gain(before, after)
                rows.append([arm, name, len(both), had, had.verdict if had else None])
    return markdown(["arm", "figure", "seeds", "difference", "verdict"], rows)
