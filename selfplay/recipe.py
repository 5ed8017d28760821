"""A recipe: every choice of a run in one YAML file. Importing and checking one loads no torch.

Paths are relative to the recipe's folder. A field of type PerRound takes a number, or a list with one value per round
whose last value repeats. Training keys are Hugging Face's own.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from selfplay.errors import RecipeError

T = TypeVar("T")
PerRound = Annotated[
    Annotated[T, Tag("one value")] | Annotated[list[T], Tag("per round"), Field(min_length=1)],
    Discriminator(lambda value: "per round" if isinstance(value, list) else "one value"),
]
Share = Annotated[float, Field(gt=0, lt=1)]
TopP = Annotated[float, Field(gt=0, le=1)]


def at_round(value: T | list[T], round: int) -> T:
    """The value of a PerRound field in a round (0-based); the last entry of a list repeats."""
    return value[min(round, len(value) - 1)] if isinstance(value, list) else value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class PromptsRecipe(Section):
    """Where prompts come from and how rounds get them. `source` is a .jsonl, .json, .parquet or .csv file, or an id."""

    source: str
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
    heldout: str | Share | None = None

    @model_validator(mode="after")
    def _dealable(self) -> "PromptsRecipe":
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
    temperature: PerRound[NonNegativeFloat] = 1.0
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


class VerifierRecipe(Section):
    """Named checks. The recipe's `checks` apply to every prompt, beside the checks that a prompt carries."""

    kind: Literal["verifier"]
    checks: list[dict[str, Any]] = []
    score: Literal["share", "all"] = "share"
    truncated_fails: bool = True


class LLMJudgeRecipe(Section):
    """A model reads the completion. `model: policy` is the current policy, on the engine that is already loaded."""

    kind: Literal["llm"]
    model: str = "policy"
    template: str = "additive"
    system_prompt: str | None = None
    verdict: Literal["parse", "labels"] = "parse"
    num_verdicts: PositiveInt = 1
    temperature: NonNegativeFloat = 0.7
    top_p: TopP = 0.9
    max_tokens: PositiveInt = 256


class PythonJudgeRecipe(Section):
    """A function or object of the user: "file.py:name" or "package.module:name". Runs only with --allow-code."""

    kind: Literal["python"]
    target: Annotated[str, Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")]


class RougeLRecipe(Section):
    """ROUGE-L with the gold answer, in [0, 1]."""

    kind: Literal["rouge_l"]


class CoinRecipe(Section):
    """A coin flip for every completion: the control that must bring no gain."""

    kind: Literal["coin"]


JudgeRecipe = Annotated[
    VerifierRecipe | LLMJudgeRecipe | PythonJudgeRecipe | RougeLRecipe | CoinRecipe, Field(discriminator="kind")
]


class PairsRecipe(Section):
    """Which completions become pairs. `truncated: rejected` lets a completion that max_tokens cut be rejected (never chosen):
    without it nothing teaches the policy to end in time, and its completions grow from round to round.
    """

    kind: Literal["best_vs_worst", "gold_vs_completion"] = "best_vs_worst"
    min_margin: PerRound[NonNegativeFloat] = 0.0
    max_pairs_per_prompt: PerRound[PositiveInt] = 1
    truncated: Literal["drop", "rejected"] = "drop"
    max_unparsed: Annotated[float, Field(ge=0, le=1)] = 0.05


LossName = Literal["sigmoid", "sft"]


class TrainRecipe(Section):
    """The DPO step. `batch_size` counts pairs per optimizer step over all devices."""

    learning_rate: PerRound[PositiveFloat] = 5e-7
    beta: PerRound[PositiveFloat] = 0.1
    loss_type: LossName | Annotated[list[LossName], Field(min_length=1)] = "sigmoid"
    loss_weights: list[PositiveFloat] | None = None
    batch_size: PerRound[PositiveInt] = 32
    num_train_epochs: PerRound[PositiveInt] = 1
    max_steps: PerRound[int] = -1
    optim: Literal["adamw_torch", "rmsprop"] = "adamw_torch"
    weight_decay: NonNegativeFloat = 0.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: PositiveFloat = 1e-8
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: PerRound[NonNegativeFloat] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    max_length: PositiveInt | None = None
    max_pack_tokens: PositiveInt = 2048
    bf16: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool = False
    reference: Literal["prior", "initial"] = "prior"
    optimizer_state: Literal["fresh", "carried"] = "fresh"
    schedule_scope: Literal["round", "run"] = "round"
    shuffle: bool = True
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    max_audit_difference: PositiveFloat = 0.1

    @model_validator(mode="before")
    @classmethod
    def _old_warmup_name(cls, data: Any) -> Any:
        # transformers 5 dropped warmup_ratio for a warmup_steps below 1, but every published recipe still has it
        if isinstance(data, dict) and "warmup_ratio" in data:
            if "warmup_steps" in data:
                raise ValueError("warmup_steps and warmup_ratio are the same setting: keep one")
            ratios = data["warmup_ratio"] if isinstance(data["warmup_ratio"], list) else [data["warmup_ratio"]]
            if any(isinstance(ratio, int | float) and ratio >= 1 for ratio in ratios):
                raise ValueError(
                    f"warmup_ratio is {data['warmup_ratio']}; a ratio is below 1 (warmup_steps takes steps)"
                )
            data = {k: v for k, v in data.items() if k != "warmup_ratio"} | {"warmup_steps": data["warmup_ratio"]}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "TrainRecipe":
        for steps in self.max_steps if isinstance(self.max_steps, list) else [self.max_steps]:
            if steps != -1 and steps < 1:
                raise ValueError(f"max_steps is {steps}; it must be positive, or -1 for num_train_epochs")
            if self.schedule_scope == "run" and steps == -1:
                raise ValueError("schedule_scope: run needs max_steps, so that the length of the run is known")
        num_losses = len(self.loss_type) if isinstance(self.loss_type, list) else 1
        if self.loss_weights is not None and len(self.loss_weights) != num_losses:
            raise ValueError(f"loss_weights has {len(self.loss_weights)} values for {num_losses} losses")
        return self


class EvaluateRecipe(Section):
    """The held-out panel. `judge` defaults to the run's own; `num_completions_between` is for the rounds between the
    initial and the last policy, where a narrower panel saves time.
    """

    num_prompts: PositiveInt | None = None
    num_completions: PositiveInt = 4
    num_completions_between: PositiveInt | None = None
    temperature: PositiveFloat = 1.0
    max_tokens: PositiveInt | None = None
    greedy: bool = True
    kl: bool = True
    judge: JudgeRecipe | None = None


class Recipe(Section):
    model: str
    rounds: PositiveInt = 3
    seed: NonNegativeInt = 0
    description: str = ""
    prompts: PromptsRecipe
    chat: ChatRecipe = ChatRecipe()
    generator: GeneratorRecipe = GeneratorRecipe()
    judge: JudgeRecipe | None = None
    pairs: PairsRecipe = PairsRecipe()
    train: TrainRecipe = TrainRecipe()
    evaluate: EvaluateRecipe = EvaluateRecipe()

    @field_validator("model")
    @classmethod
    def _named(cls, model: str) -> str:
        if not model.strip():
            raise ValueError("a model is a folder or a hub id, not an empty text")
        return model

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.pairs.kind == "gold_vs_completion" and self.judge is not None:
            raise ValueError("pairs.kind gold_vs_completion reads no scores: remove the judge (evaluate.judge is fine)")
        counts = self.generator.num_completions
        if self.pairs.kind == "best_vs_worst" and min(counts if isinstance(counts, list) else [counts]) < 2:
            raise ValueError("generator.num_completions is 1: best_vs_worst needs at least 2 completions to compare")
        return self

    def check_judged(self) -> None:
        """RecipeError where pairs need scores that nobody would give. A judge passed to `iterate` as an object counts,
        so this is no part of reading a recipe.
        """
        if self.pairs.kind == "best_vs_worst" and self.judge is None:
            raise RecipeError(
                "judge: missing; pairs.kind best_vs_worst reads scores. Add a judge, or use gold_vs_completion"
            )

    @property
    def heldout_judge(self) -> JudgeRecipe | None:
        """The panel's judge: evaluate.judge, else the run's own."""
        return self.evaluate.judge or self.judge


def resolve_path(text: str, folder: Path) -> str:
    """`text` as an absolute path where it is one, read from the recipe's folder; else (a hub id) unchanged."""
    path = Path(text).expanduser()
    if path.is_absolute():
        return str(path)
    if text.startswith(("./", "../")) or (folder / path).exists():
        return str((folder / path).resolve())
    return text
