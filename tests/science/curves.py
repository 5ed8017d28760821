"""Experiment C as a picture: gain against KL, every arm, seed and point."""

from pathlib import Path

import numpy as np
import rounds
from figures import Panel, Scores, at_kl, mean
from lab import Item, Lab

from selfplay.errors import DataError

GRID = 50  # KLs between which a mean curve is drawn straight


def draw(lab: Lab, path: Path) -> None:
    """Writes `path` in the format that its ending names: .svg, .png or .pdf. The same results give the same bytes.

    x is the KL to the untrained model in nats per token, y the score over that of the untrained model with the same seed. Thin
    lines and dots are runs; thick lines are the mean of the seeds, as far as every seed's curve reaches.

    Raises:
        DataError: no arm has a seed with all of its points.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure  # without pyplot, which looks for a screen

    panels = rounds.read_panels(lab)
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    drawn = 0
    for number, arm in enumerate(arm for arm, about in lab.plan["arms"].items() if "points" in about):
        runs = [gains(lab, panels, arm, seed) for seed in lab.plan["seeds"]]
        whole = [run for run in runs if run is not None]
        if not whole:
            continue
        drawn += 1
        colour = f"C{number}"
        for run in whole:
            points = sorted((kl, mean(list(scores.values()))) for kl, scores in run)
            axes.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=0.6, markersize=3, alpha=0.5)
        kls, means = mean_curve(whole)
        axes.plot(kls, means, color=colour, linewidth=2.2, label=f"{arm}, {len(whole)} seed{'s' * (len(whole) > 1)}")
    if not drawn:
        raise DataError("no arm has a seed with all of its points, so there is no curve to draw")
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(
        xlabel="KL to the untrained model, nats per token", ylabel="score over the untrained model's, temperature 1"
    )
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "selfplay", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def gains(lab: Lab, panels: dict[Item, Panel], arm: str, seed: int) -> list[tuple[float, Scores]] | None:
    """The curve of an arm over the untrained model's own scores. None where a point is missing."""
    found = rounds.curve(lab, panels, arm, seed)
    if found is None:
        return None
    base = panels[Item("base", seed, "only")].scores
    return [(kl, {id: scores[id] - base[id] for id in scores.keys() & base.keys()}) for kl, scores in found]


def mean_curve(runs: list[list[tuple[float, Scores]]]) -> tuple[list[float], list[float]]:
    """KLs from 0 to the largest that every run reaches, and the mean gain of all runs there."""
    end = min(max(kl for kl, _ in run) for run in runs)
    kls = [float(kl) for kl in np.linspace(0.0, end, GRID)]
    return kls, [float(np.mean([mean(list(at_kl(run, kl).values())) for run in runs])) for kl in kls]
