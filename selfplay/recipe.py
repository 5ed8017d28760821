"""A recipe: every choice of a run in one YAML file. Importing and checking one loads no torch.

Paths are relative to the recipe's folder. recipe_judges.py, recipe_pairs.py with recipe_filters.py, and recipe_train.py
hold its longer sections.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from selfplay.errors import RecipeError
from selfplay.recipe_judges import JudgeRecipe, LLMJudgeRecipe
from selfplay.recipe_pairs import BestVsWorstRecipe, PairsRecipe, TopKVsBottomKRecipe, WinRatesRecipe
from selfplay.recipe_train import TrainRecipe, reads
from selfplay.recipe_values import PerRound, Section, Share, TopP, at_round, rounds_that_differ

DEFAULT_CANARIES = 4  # prompts; each is shown with four canaries
READING_KINDS = ("llm", "api")  # judges that can be talked into a verdict
POINTWISE_KINDS = ("verifier", "rouge_l", "similarity", "reward_model", "coin")  # their scores are no win rates
Temperature = Annotated[float, Field(ge=0, le=2)]  # engines refuse more


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
        if isinstance(self.heldout, HeldoutRecipe) and self.heldout.source in (None, self.source):
            name = self.heldout.name or self.name
            if (name, self.heldout.split) == (self.name, self.split):
                raise ValueError(f"heldout names the split {self.split!r} that is trained on: name another one")
        if self.deal == "disjoint" and self.num_prompts is None:
            raise ValueError(
                "deal: disjoint needs num_prompts (per round); or say deal: same to use all in every round"
            )
        return self


class ChatRecipe(Section):
    """How messages become tokens, where the model's own chat template is missing or needs arguments."""

    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_tags: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None


class GeneratorRecipe(Section):
    kind: Literal["auto", "vllm", "transformers", "scripted"] = "auto"
    num_completions: PerRound[PositiveInt] = 4
    temperature: PerRound[Temperature] = 1.0
    top_p: PerRound[TopP] = 1.0
    top_k: PerRound[NonNegativeInt] = 0
    min_p: PerRound[NonNegativeFloat] = 0.0
    max_tokens: PerRound[PositiveInt] = 256
    stop: list[str] = []
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: PositiveInt | None = None
    max_batch_size: PositiveInt | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    tensor_parallel_size: PositiveInt = 1
    data_parallel_size: PositiveInt = 1
    engine_args: dict[str, Any] = {}


class EvaluateRecipe(Section):
    """The held-out panel. `judge` defaults to the run's own; `num_completions_between` is for the rounds between the
    initial and the last policy, where a narrower panel saves time.
    """

    num_prompts: PositiveInt | None = None
    num_completions: PositiveInt = 4
    num_completions_between: PositiveInt | None = None
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    max_tokens: PositiveInt | None = None
    greedy: bool = True
    kl: bool = True
    judge: JudgeRecipe | None = None


class AuditRecipe(Section):
    """The judge's audit of a round. `canaries` is on how many prompts the judge is also shown completions that must lose
    (canaries.py); by default DEFAULT_CANARIES where a model judges what it reads (kinds llm and api), else 0: a rule can't be
    talked into anything, some rules pass such texts by design, and what a program of the user costs is not known.
    """

    canaries: NonNegativeInt | None = None


class Recipe(Section):
    model: str
    rounds: PositiveInt = 3
    seed: NonNegativeInt = 0
    description: str = ""
    prompts: PromptsRecipe = PromptsRecipe()
    chat: ChatRecipe = ChatRecipe()
    generator: GeneratorRecipe = GeneratorRecipe()
    judge: JudgeRecipe | None = None
    pairs: PairsRecipe = BestVsWorstRecipe()
    train: TrainRecipe = TrainRecipe()
    evaluate: EvaluateRecipe = EvaluateRecipe()
    audit: AuditRecipe = AuditRecipe()

    @field_validator("model")
    @classmethod
    def _named(cls, model: str) -> str:
        if not model.strip():
            raise ValueError("a model is a folder or a hub id, not an empty text")
        return model

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        pairs = self.pairs
        if not pairs.reads_scores and self.judge is not None:
            raise ValueError(f"pairs.kind {pairs.kind} reads no scores: remove the judge (evaluate.judge is fine)")
        if not pairs.reads_scores and self.audit.canaries:
            raise ValueError(
                f"audit.canaries: pairs.kind {pairs.kind} has no judge that could be shown any; leave it out"
            )
        counts, k = self.generator.num_completions, pairs.k if isinstance(pairs, TopKVsBottomKRecipe) else 0
        for round in range(rounds_that_differ(counts, k)):
            count, least = at_round(counts, round), pairs.min_completions
            if count < least:
                raise ValueError(
                    f"generator.num_completions is {count}: {pairs.kind} needs at least {least} completions to compare"
                )
            if 2 * at_round(k, round) > count:
                raise ValueError(
                    f"pairs.k is {at_round(k, round)}, but {count} completions have no top and bottom of that size: lower k, "
                    "raise generator.num_completions, or take all_above_margin"
                )
        kind = self.judge.kind if self.judge is not None else None
        if isinstance(pairs, WinRatesRecipe) and pairs.win_rate_from == "scores" and kind in POINTWISE_KINDS:
            raise ValueError(f"pairs.win_rate_from is scores, but those of a {kind} judge are no win rates: say order")
        if self.train.reference_logps == "engine" and self.generator.kind == "scripted":
            raise ValueError("train.reference_logps is engine, but the scripted generator gives no logps")
        return self

    def check_win_rates(self) -> None:
        """RecipeError where a loss reads win rates that no selector would give. A selector passed to `iterate` as an object
        may give them, so this is no part of reading a recipe.
        """
        if "win_rates" in reads(self.train.losses) and not isinstance(self.pairs, WinRatesRecipe):
            raise RecipeError(
                f"train.loss_type: sppo reads win rates, which pairs.kind {self.pairs.kind} doesn't give. Say pairs.kind: "
                "win_rates, or loss_type: sppo_hard"
            )

    def check_judged(self) -> None:
        """RecipeError where pairs need scores that nobody would give. A judge passed to `iterate` as an object counts,
        so this is no part of reading a recipe.
        """
        if self.pairs.reads_scores and self.judge is None:
            raise RecipeError(
                f"judge: missing; pairs.kind {self.pairs.kind} reads scores. Add a judge, or use gold_vs_completion"
            )

    @property
    def num_canaries(self) -> int:
        """On how many prompts of a round canaries are judged by the recipe's own judge."""
        if self.judge is None:
            return 0
        default = DEFAULT_CANARIES if self.judge.kind in READING_KINDS else 0
        return default if self.audit.canaries is None else self.audit.canaries

    @property
    def heldout_judge(self) -> JudgeRecipe | None:
        """The panel's judge: evaluate.judge, else the run's own. None where that is the policy itself: a ruler that every
        round changes measures no gain.
        """
        own = None if isinstance(self.judge, LLMJudgeRecipe) and self.judge.model == "policy" else self.judge
        return self.evaluate.judge or own


def resolve_path(text: str, folder: Path) -> str:
    """`text` as an absolute path where it is one, read from the recipe's folder; else (a hub id) unchanged."""
    path = Path(text).expanduser()
    if path.is_absolute():
        return str(path)
    if text.startswith(("./", "../")) or (folder / path).exists():
        return str((folder / path).resolve())
    return text
