"""Plays one item of a plan: trains it, at each rate that is tried, and shows its policy the panels."""

import time
from collections.abc import Callable
from pathlib import Path

import judges
import rounds
import spin
from lab import DONE, Item, Lab, Values
from steps import evaluate, play_rounds

from selfplay import store
from selfplay.errors import DataError

STARTS: dict[str, Callable[[Lab], Path]] = {
    "base": lambda lab: Path(lab.model),
    "sft": spin.sft_policy,
    "yes_no": judges.yes_no_policy,
}
FITS: dict[str, Callable[[Lab, Item, Path, Values, Path], Path]] = {
    "iterate": play_rounds,
    "panel": lambda lab, item, start, values, out: start,
    "temperature": lambda lab, item, start, values, out: start,
    "offline": rounds.train_offline,
    "long": spin.train_longer,
    "sft": spin.train_sft,
}


def play(lab: Lab, item: Item) -> None:
    """What is left of an item; of one that is done, weights that a kill left behind."""
    started, place, arm = time.monotonic(), lab.folder(item), lab.arm(item)
    if lab.done(item) is not None:
        return remove_weights(place)
    start = STARTS[arm.get("start", lab.plan.get("start", "base"))](lab)
    rates = rates_of(lab, item)
    policies, tried = {}, {}
    for rate in rates:
        out = place if rate is None else place / f"rate-{rate:g}"
        values = arm.get("set", {}) | lab.point(item) | ({} if rate is None else {"train.learning_rate": rate})
        policies[rate] = FITS[arm.get("kind", "iterate")](lab, item, start, values, out)
        if len(rates) > 1:
            dev = evaluate(lab, item, lab.plan["trial"]["panel"], {}, start, policies[rate], out)
            tried[f"{rate:g}"] = dev["heldout_score"]
    best = max(rates, key=lambda rate: tried[f"{rate:g}"]) if tried else rates[0]
    shown = arm.get("panel", {})
    if arm.get("kind") == "temperature":
        shown = shown | rounds.matched_temperature(lab, item.seed)
    for panel in lab.panels(item):
        evaluate(lab, item, panel, shown, start, policies[best], place)
    if lab.id == "A":
        spin.score_gold(lab, item, policies[best])
    seconds = round(time.monotonic() - started)
    store.write_json(place / DONE, {"rate": best, "tried": tried, "panel": dict(shown), "last_seconds": seconds})
    remove_weights(place)


def rates_of(lab: Lab, item: Item) -> list[float | None]:
    """The learning rates that an item trains with: all that are tried with the trial's seed at the first point, elsewhere the
    chosen one. [None] where nothing is tried: the recipe's own. DataError before the trial is done.
    """
    trial = lab.plan.get("trial")
    if trial is None or not lab.trains(item):
        return [None]
    first = Item(item.arm, trial["seed"], lab.first_point(item.arm))
    if item == first:
        return list(trial["rates"])
    chosen = lab.done(first)
    if chosen is None:
        raise DataError(f"{lab.id} {item.place}: its learning rate is chosen by {first.place}, so play that first")
    return [chosen["rate"]]


def remove_weights(place: Path) -> None:
    """Removes policies and optimizers, gigabytes an item, once their panels are there; completions, pairs and steps stay."""
    for folder in [*place.glob("**/policy"), *place.glob("**/reference")]:
        store.remove_folder(folder)
    for file in place.glob("**/optimizer.safetensors*"):
        file.unlink()
