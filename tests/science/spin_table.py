"""The tables of experiment A."""

from typing import Any

from figures import Gain, gain, markdown, mean, read_panel
from lab import Item, Lab
from spin import spin_run

from selfplay import make_judge, store
from selfplay.recipe_judges import RougeLRecipe
from selfplay.types import PreferencePair

# of a panel judged by similarity and by ROUGE-L: name, which of the two, completions
FIGURES = (("similarity", 0, "scores"), ("similarity, greedy", 0, "greedy"), ("ROUGE-L", 1, "scores"))


def told_apart(policy: dict[str, Any], start: dict[str, Any]) -> float | None:
    """The share of rows whose gold answer has the higher log-ratio of policy and start; ties count half."""
    right = []
    for gold, fresh, gold0, fresh0 in zip(policy["gold"], policy["fresh"], start["gold"], start["fresh"], strict=True):
        right.append((gold - gold0 > fresh - fresh0) + 0.5 * (gold - gold0 == fresh - fresh0))
    return mean(right)


def length_alone(lab: Lab, seed: int, shorter: list[bool]) -> float | None:
    """The same by length: the shorter is gold where it mostly was in SPIN's first pairs, else the longer."""
    pairs = store.read_records(spin_run(lab, seed) / "round-000" / "pairs.jsonl", PreferencePair)
    mostly = sum(len(p.chosen_token_ids) < len(p.rejected_token_ids) for p in pairs) * 2 >= len(pairs)
    return mean([float(one == mostly) for one in shorter])


def table(lab: Lab) -> str:
    """Every item, then the comparisons over seeds."""
    rouge, rows = make_judge(RougeLRecipe(kind="rouge_l")), []
    panels: dict[tuple[str, int], tuple[Any, Any]] = {}
    for item in lab.items():
        place, done = lab.folder(item), lab.done(item)
        if done is None:
            rows.append([item.arm, item.seed, "not run", *[None] * 8])
            continue
        panel, words = read_panel(place / "test"), read_panel(place / "test", rouge)
        assert panel is not None
        assert words is not None
        panels[item.arm, item.seed] = panel, words
        logps = store.read_json(place / "logps.json")
        start = lab.folder(Item("sft", item.seed, "only")) / "logps.json"
        trained = item.arm not in ("base", "sft")
        apart = told_apart(logps, store.read_json(start)) if trained else None
        alone = length_alone(lab, item.seed, logps["shorter"]) if trained else None
        scores = [mean(list(part.values())) for part in (panel.scores, panel.greedy, words.scores, words.greedy)]
        length, rate = panel.figures["mean_length"], done["rate"]
        figures = [*scores, logps["gold_per_token"], apart, alone, length]
        rows.append([item.arm, item.seed, f"{rate:g}" if rate else None, *figures])
    head = "arm|seed|rate|similarity|greedy|ROUGE-L|greedy|gold logp|told apart|by length|length"
    return markdown(head.split("|"), rows) + "\n\n" + compared(lab, panels)


def compared(lab: Lab, panels: dict[tuple[str, int], tuple[Any, Any]]) -> str:
    rows = []
    for one, other in lab.plan["compare"]:
        seeds = [s for s in lab.plan["seeds"] if (one, s) in panels and (other, s) in panels]
        for name, n, part in FIGURES:
            scores = [[getattr(panels[arm, s][n], part) for s in seeds] for arm in (one, other)]
            found: Gain | None = gain(scores[0], scores[1])
            rows.append([f"{other} - {one}", name, len(seeds), found, found.verdict if found else "not run"])
    return markdown(["comparison", "figure", "seeds", "difference", "verdict"], rows)
