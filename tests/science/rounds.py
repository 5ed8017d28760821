"""Experiment C: the temperature of its control, and its tables."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from figures import Panel, Scores, at_kl, gain, markdown, read_groups, read_panel, trained_on
from lab import Item, Lab, Values
from steps import fit

from selfplay import store
from selfplay.errors import DataError

TEMPERATURES = [round(0.2 + 0.1 * n, 1) for n in range(11)]  # 0.2 to 1.2
Panels = dict[Item, Panel]


def matched_temperature(lab: Lab, seed: int) -> dict[str, float]:
    """The temperature at which the untrained model has, where its own completions stand, the entropy of the trained policy.
    DataError where none of TEMPERATURES' range has it.
    """
    base, prior = (Item(arm, seed, lab.first_point(arm)) for arm in ("base", "prior"))
    path = lab.folder(base) / "entropies.json"
    if lab.done(base) is None or lab.done(prior) is None:
        raise DataError(f"{lab.id}: temperature needs {base.place} and {prior.place}, so play them first")
    if not path.exists():
        from scoring import entropies

        groups = read_groups(lab.folder(base) / "test" / "heldout" / "temperature")
        store.write_json(path, entropies(Path(lab.model), groups, TEMPERATURES))
    target, known = store.read_json(lab.folder(prior) / "test" / "eval.json")["entropy"], store.read_json(path)
    if not known[0] <= target <= known[-1]:
        raise DataError(
            f"{lab.id}: no temperature from 0.2 to 1.2 has an entropy of {target:.3f} nats, as {prior.place} has"
        )
    return {"evaluate.temperature": round(float(np.interp(target, known, TEMPERATURES)), 3)}


def own_entropy(lab: Lab, item: Item, temperature: float) -> float:
    """The entropy (nats per token) of a panel of the untrained model at another temperature, where that panel's completions
    stand; kept in the item's folder.
    """
    path = lab.folder(item) / "entropy.json"
    if not path.exists():
        from scoring import entropies

        groups = read_groups(lab.folder(item) / "test" / "heldout" / "temperature")
        store.write_json(path, entropies(Path(lab.model), groups, [temperature])[0])
    found: float = store.read_json(path)
    return found


def offline_pairs(lab: Lab, seed: int, values: Values) -> Path:
    """The pairs of one big round of the untrained model, drawn once a seed: pairs.jsonl, with groups/ beside it."""
    from selfplay import single, single_pairs

    # only what the pairs depend on: betas, rates and losses share them
    drawn = {key: value for key, value in values.items() if not key.startswith("train.")}
    recipe, out = lab.recipe(drawn, seed=seed), lab.out / "offline-pairs" / f"seed-{seed}"
    groups, judgements = out / "groups", out / "judgements"
    single.generate(recipe, lab.model, groups, round=0, report=lab.report)
    single.judge(recipe, groups, judgements, model=None, round=0, allow_code=False, report=lab.report)
    single_pairs.pairs(recipe, single_pairs.PairInputs(groups, judgements), out / "pairs.jsonl", allow_code=False)
    return out / "pairs.jsonl"


def train_offline(lab: Lab, item: Item, start: Path, values: Values, out: Path) -> Path:
    """One training on the offline pairs; with an sft loss, on their chosen completions."""
    pairs = offline_pairs(lab, item.seed, values)
    return fit(lab, values, start, pairs, out, seed=item.seed, groups=pairs.parent / "groups")


def table(lab: Lab) -> str:
    """Every item, then the comparisons."""
    panels = read_panels(lab)
    rows: list[list[Any]] = []
    for item in lab.items():
        done, panel, base = lab.done(item), panels.get(item), panels.get(Item("base", item.seed, "only"))
        if done is None or panel is None:
            rows.append([item.arm, item.point, item.seed, "not run", *[None] * 10])
            continue
        f, transfer = panel.figures, read_panel(lab.folder(item) / "ifeval")
        own = gain([base.scores], [panel.scores]) if base and item.arm != "base" else None
        ifeval = (transfer.figures["heldout_score"], transfer.figures["heldout_greedy"]) if transfer else (None, None)
        how = f"{done['rate']:g}" if done["rate"] else next(iter(done["panel"].values()), None)
        entropy, temperature = f["entropy"], done["panel"].get("evaluate.temperature")
        if entropy is None and temperature is not None:
            entropy = own_entropy(lab, item, temperature)
        shown = [f["heldout_score"], own, f["heldout_greedy"], f["mean_length"], entropy, f["kl"], *ifeval]
        rows.append([item.arm, item.point, item.seed, how, *trained_on(lab.folder(item), done["rate"]), *shown])
    head = "arm|point|seed|rate or setting|pairs|steps|score|gain|greedy|length|entropy|KL|IFEval|greedy"
    return "\n\n".join([markdown(head.split("|"), rows), matched(lab, panels), first_points(lab)])


def read_panels(lab: Lab) -> Panels:
    """The test panels of what is done."""
    return {item: p for item in lab.items() if lab.done(item) and (p := read_panel(lab.folder(item) / "test"))}


def curve(lab: Lab, panels: Panels, arm: str, seed: int) -> list[tuple[float, Scores]] | None:
    """(KL, scores) of every point of an arm, the untrained model at KL 0 among them. None where a point is missing."""
    items = [item for item in lab.items() if (item.arm, item.seed) == (arm, seed)]
    base = panels.get(Item("base", seed, "only"))
    if base is None or any(item not in panels or panels[item].figures["kl"] is None for item in items):
        return None
    return [(0.0, base.scores), *((panels[item].figures["kl"], panels[item].scores) for item in items)]


def matched(lab: Lab, panels: Panels) -> str:
    """Differences at the largest KL that both arms reach with every seed that has all points."""
    rows: list[list[Any]] = []
    for one, other in lab.plan["compare_at_kl"]:
        both = [(curve(lab, panels, one, s), curve(lab, panels, other, s)) for s in lab.plan["seeds"]]
        whole = [(a, b) for a, b in both if a is not None and b is not None]
        kl = min((max(x for x, _ in points) for pair in whole for points in pair), default=None)
        found = gain([at_kl(a, kl) for a, _ in whole], [at_kl(b, kl) for _, b in whole]) if kl is not None else None
        rows.append([f"{other} - {one}", len(whole), kl, found, found.verdict if found else "not run"])
    return markdown(["comparison", "seeds", "at KL", "difference", "verdict"], rows)


def first_points(lab: Lab) -> str:
    """Differences of the first points, greedy completions and IFEval beside the score."""
    rows: list[list[Any]] = []
    trained = [arm for arm, about in lab.plan["arms"].items() if "points" in about]
    for one, other in [*(["base", arm] for arm in trained), *lab.plan["compare"], *lab.plan["compare_at_kl"]]:
        found = []
        for panel in ("test", "ifeval"):
            both = [(shown(lab, one, seed, panel), shown(lab, other, seed, panel)) for seed in lab.plan["seeds"]]
            whole = [(a, b) for a, b in both if a is not None and b is not None]
            found.append((len(whole), gain([a.scores for a, _ in whole], [b.scores for _, b in whole])))
            if panel == "test":
                greedy = gain([a.greedy for a, _ in whole], [b.greedy for _, b in whole])
        (seeds, score), (_, far) = found
        rows.append([f"{other} - {one}", seeds, score, greedy, far, score.verdict if score else "not run"])
    return markdown(["at the first points", "seeds", "difference", "greedy", "IFEval", "verdict"], rows)


def shown(lab: Lab, arm: str, seed: int, panel: str) -> Panel | None:
    """A panel of an arm at its first point. The control `greedy` is the greedy completions of base."""
    item = Item("base" if arm == "greedy" else arm, seed, lab.first_point("base" if arm == "greedy" else arm))
    found = read_panel(lab.folder(item) / panel) if lab.done(item) else None
    return replace(found, scores=found.greedy) if found is not None and arm == "greedy" else found
