"""A plan and where its results lie. The plan is a YAML file; every value in it is executed as it stands.

OUT/A/ARM/seed-N/POINT/            one item: done.json is written last, and an item that has one is not played again
    rate-R/                        one training; several where learning rates are tried, each with its dev panel
    test/ ...                      the panels, as `selfplay evaluate` writes them
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.errors import DataError
from selfplay.progress import Reporter
from selfplay.recipe import Recipe
from selfplay.recipe_file import load_recipe, parse_yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PLANS = {"A": HERE / "a_spin.yaml", "B": HERE / "b_judges.yaml", "C": HERE / "c_rounds.yaml"}
DONE = "done.json"
Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Item:
    """What is played at a time: an arm with a seed, at a point of its curve."""

    arm: str
    seed: int
    point: str

    @property
    def place(self) -> str:
        return f"{self.arm}/seed-{self.seed}/{self.point.replace(' ', '-')}"


@dataclass(frozen=True)
class Lab:
    """One experiment. `files` are what {names} in a plan stand for; `extra` overrides every recipe, after the plan."""

    id: str
    plan: dict[str, Any]
    out: Path
    model: str
    files: dict[str, str]
    extra: Values = field(default_factory=dict)
    report: Reporter = field(default_factory=Reporter)

    def items(self) -> list[Item]:
        """All items in the order in which they are played: a stop leaves whole comparisons, first points before second
        ones, seed by seed.
        """
        found = []
        for a, (arm, about) in enumerate(self.plan["arms"].items()):
            for p, point in enumerate(about.get("points", {"only": {}})):
                for seed in about.get("seeds", self.plan["seeds"]):
                    found.append((p, seed, a, Item(arm, seed, point)))
        return [item for *_, item in sorted(found, key=lambda row: row[:3])]

    def arm(self, item: Item) -> dict[str, Any]:
        found: dict[str, Any] = self.plan["arms"][item.arm]
        return found

    def first_point(self, arm: str) -> str:
        return next(iter(self.plan["arms"][arm].get("points", {"only": {}})))

    def point(self, item: Item) -> dict[str, Any]:
        """What the recipe is told at the item's point."""
        found: dict[str, Any] = self.arm(item).get("points", {"only": {}})[item.point]
        return found

    def trains(self, item: Item) -> bool:
        """Whether the arm has a policy of its own."""
        return self.arm(item).get("kind", "iterate") not in ("panel", "temperature")

    def panels(self, item: Item) -> list[str]:
        """Which panels the item's policy is shown in the end."""
        trial = self.plan.get("trial", {}).get("panel")
        narrow = [] if item.point == self.first_point(item.arm) else self.plan.get("first_point_only", [])
        return [name for name in self.plan["panels"] if name != trial and name not in narrow]

    def minutes(self, item: Item) -> float:
        """What the item takes on one core, by the plan's estimates."""
        cost, trial = self.plan["minutes"], self.plan.get("trial")
        own: float = self.arm(item)["minutes"] + sum(cost[name] for name in self.panels(item))
        if trial is None or (item.seed, item.point) != (trial["seed"], self.first_point(item.arm)):
            return own
        again = len(trial["rates"]) - 1
        return own + (self.trains(item) and self.arm(item)["minutes"] * again + cost[trial["panel"]] * (again + 1))

    def folder(self, item: Item) -> Path:
        return self.out / item.place

    def done(self, item: Item) -> dict[str, Any] | None:
        """What done.json of an item says; None where it was not played to the end."""
        path = self.folder(item) / DONE
        return store.read_json(path) if path.exists() else None

    def recipe(self, *sets: Values, seed: int = 0, model: str | None = None) -> Recipe:
        """The plan's recipe under its own values, then `sets`, then `extra`. RecipeError as for any recipe."""
        values: dict[str, Any] = {"model": model or self.model, "seed": seed}
        for one in (self.plan["set"], *sets, self.extra):
            values |= self.filled(one)
        return load_recipe(ROOT / self.plan["recipe"], [f"{key}={json.dumps(value)}" for key, value in values.items()])

    def filled(self, value: Any) -> Any:
        """`value` with its {names} replaced."""
        if isinstance(value, str):
            for name, path in self.files.items():
                value = value.replace("{" + name + "}", path)
            return value
        if isinstance(value, Mapping):
            return {key: self.filled(part) for key, part in value.items()}
        return [self.filled(part) for part in value] if isinstance(value, list) else value

    def file(self, name: str, why: str) -> Path:
        """A file that the user names. DataError where it was not named, or isn't there."""
        path = Path(self.files.get(name, ""))
        if not self.files.get(name) or not path.exists():
            raise DataError(f"experiment {self.id} needs {why}: name it with --{name} (found {str(path)!r})")
        return path


def read_plan(id: str) -> dict[str, Any]:
    """The plan of an experiment."""
    plan, _ = parse_yaml(PLANS[id].read_text(), str(PLANS[id]))
    return plan
