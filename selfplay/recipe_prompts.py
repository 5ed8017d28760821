"""The section `prompts` of a recipe."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from selfplay.errors import RecipeError
from selfplay.recipe_values import PerRound, Section, Share


class HeldoutRecipe(Section):
    """A split of a data set that is held out: of the training prompts' own where `source` is missing."""

    source: str | None = None
    name: str | None = None
    split: Annotated[str, Field(min_length=1)] = "test"


def _heldout_tag(value: object) -> str:
    return HELDOUT_TAGS[0 if isinstance(value, str) else 1 if isinstance(value, dict | HeldoutRecipe) else 2]


HELDOUT_TAGS = ("a file", "a data set", "a share")
Heldout = Annotated[
    Annotated[str, Tag(HELDOUT_TAGS[0])]
    | Annotated[HeldoutRecipe, Tag(HELDOUT_TAGS[1])]
    | Annotated[Share, Tag(HELDOUT_TAGS[2])],
    Discriminator(_heldout_tag),
]
# what `selfplay train` and the judges read of the section, whose rows come from elsewhere
COLUMNS = ("prompt_column", "gold_column", "checks_column", "system_prompt", "turns", "max_prompt_length")


class PromptsRecipe(Section):
    """Where prompts come from and how rounds get them. `source` is a .jsonl, .json, .parquet or .csv file, or an id; it is
    missing only in recipes of a single stage over files, such as `selfplay train`.
    """

    source: str | None = None
    name: str | None = None
    split: str = "train"
    prompt_column: str | None = None
    gold_column: str | None = None
    checks_column: str = "checks"
    system_prompt: str | None = None
    turns: Literal["first", "last"] = "first"
    num_prompts: PerRound[PositiveInt] | None = None
    deal: Literal["disjoint", "same"] = "disjoint"
    max_prompt_length: PositiveInt = 1024
    heldout: Heldout | None = None

    @property
    def needed_source(self) -> str:
        """RecipeError where the recipe names none."""
        if self.source is None:
            raise RecipeError(
                "prompts.source: missing; this command needs prompts. Only `selfplay train`, `judge`, `pairs` and `calibrate`, "
                "which read files that you name, do without"
            )
        return self.source

    @model_validator(mode="after")
    def _dealable(self) -> "PromptsRecipe":
        if self.source is None:
            idle = [key for key in self.model_dump(exclude_defaults=True) if key not in COLUMNS]
            if idle:
                raise ValueError(f"source is missing, and without prompts {', '.join(idle)} would do nothing")
            return self
        if self.deal == "disjoint" and self.num_prompts is None:
            raise ValueError(
                "deal: disjoint needs num_prompts (per round); or say deal: same to use all in every round"
            )
        return self

    @model_validator(mode="after")
    def _held_apart(self) -> "PromptsRecipe":
        if isinstance(self.heldout, HeldoutRecipe) and self.heldout.source in (None, self.source):
            name = self.heldout.name or self.name
            if (name, self.heldout.split) == (self.name, self.split):
                raise ValueError(f"heldout names the split {self.split!r} that is trained on: name another one")
        return self
