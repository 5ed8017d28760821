"""What arms are made of: selfplay's own rounds, training and panels, on the recipe of a plan. Imports torch when it works."""

from pathlib import Path
from typing import Any

from lab import Item, Lab, Values


def play_rounds(lab: Lab, item: Item, start: Path, values: Values, out: Path) -> Path:
    """`selfplay iterate`; the policy of the last round."""
    from selfplay import iterate

    recipe = lab.recipe(values, seed=item.seed, model=str(start))
    iterate(recipe, out / "run", allow_code=True, report=lab.report)
    return out / "run" / f"round-{recipe.rounds - 1:03d}" / "policy"


def fit(
    lab: Lab,
    values: Values,
    start: Path,
    rows: Path,
    out: Path,
    *,
    seed: int,
    groups: Path | None = None,
    after: Path | None = None,
    round: int = 0,
) -> Path:
    """`selfplay train` on a file; its policy. `groups` are what the start sampled, for the audit; `after` is the folder of the
    training that this one goes on from.
    """
    from selfplay.single_train import TrainInputs, train

    state = after / "train" / "optimizer.safetensors" if after is not None else None
    inputs = TrainInputs(str(start), str(rows), groups=groups, optimizer_state=state, round=round)
    train(lab.recipe(values, seed=seed, model=str(start)), inputs, out, lab.report)
    return out / "policy"


def evaluate(lab: Lab, item: Item, panel: str, values: Values, start: Path, policy: Path, out: Path) -> dict[str, Any]:
    """`selfplay evaluate` on one of the plan's panels; its KL is to the policy that the arm starts from."""
    from selfplay import single_evaluate

    recipe = lab.recipe(lab.plan["panels"][panel], values, seed=item.seed, model=str(start))
    return single_evaluate.evaluate(recipe, str(policy), out / panel, allow_code=True, report=lab.report)
