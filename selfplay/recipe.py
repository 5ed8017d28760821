"""A recipe: every choice of a run in one YAML file. Importing and checking one loads no torch.

Prompts come from one source (`prompts`, `judge`, `pairs`), or from several, each with a judge and a pairing of its own
(`sources`). `Recipe.by_source` has them all; where there is one, it has no name.

Paths are relative to the recipe's folder. recipe_judges.py, recipe_pairs.py with recipe_filters.py, and recipe_train.py
hold its longer sections.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from selfplay.errors import RecipeError, SelfplayError
from selfplay.recipe_audit import DEFAULT_CANARIES, MODEL_KINDS, AuditRecipe, SourceAuditRecipe
from selfplay.recipe_chat import ChatRecipe
from selfplay.recipe_judges import CombineRecipe, JudgeRecipe, asks_policy, judges_in, within_prompts
from selfplay.recipe_pairs import (
    BestVsWorstRecipe,
    CorrectVsIncorrectRecipe,
    PairsRecipe,
    TopKVsBottomKRecipe,
    WinRatesRecipe,
)
from selfplay.recipe_prompts import PromptsRecipe
from selfplay.recipe_train import TrainRecipe, reads
from selfplay.recipe_values import (
    PerRound,
    Revision,
    Section,
    TopP,
    at_round,
    check_revision,
    rounds_that_differ,
    split_by_weight,
)

POINTWISE_KINDS = ("verifier", "rouge_l", "similarity", "reward_model", "coin")  # their scores are no win rates
Temperature = Annotated[float, Field(ge=0, le=2)]  # engines refuse more
SourceName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]  # a folder is named so, on every file system


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


def _measures_gain(judge: JudgeRecipe) -> JudgeRecipe:
    if within_prompts(judge):
        raise ValueError("normalize: none alone can measure a gain; other scores are relative to those beside them")
    return judge


PanelJudge = Annotated[JudgeRecipe, AfterValidator(_measures_gain)]


class EvaluateRecipe(Section):
    """The held-out panel. `judge` defaults to the run's own; `num_completions_between` is for the rounds between the
    initial and the last policy, where a narrower panel saves time. `num_prompts` is of each source.
    """

    num_prompts: PositiveInt | None = None
    num_completions: PositiveInt = 4
    num_completions_between: PositiveInt | None = None
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    max_tokens: PositiveInt | None = None
    greedy: bool = True
    kl: bool = True
    judge: PanelJudge | None = None


class SourcePromptsRecipe(PromptsRecipe):
    """The prompts of one source; how many a round gets follows from the source's weight."""

    @model_validator(mode="after")
    def _dealable(self) -> "SourcePromptsRecipe":
        if self.source is None:
            raise ValueError("source: missing; a source is of prompts")
        if self.num_prompts is not None:
            raise ValueError("num_prompts is given for all sources together, at the top; a source has a weight")
        return self


class SourceEvaluateRecipe(Section):
    """The judge of a source's held-out prompts; it defaults to the source's own."""

    judge: PanelJudge | None = None


class SourceRecipe(Section):
    """One of several sources. A round's `num_prompts` are split among them by `weight`."""

    weight: PerRound[PositiveFloat] = 1.0
    prompts: SourcePromptsRecipe
    judge: JudgeRecipe | None = None
    pairs: PairsRecipe = BestVsWorstRecipe()
    evaluate: SourceEvaluateRecipe = SourceEvaluateRecipe()
    audit: SourceAuditRecipe = SourceAuditRecipe()


class Recipe(Section):
    """`model` is a folder or a hub id. `model_revision` is a branch, a tag or a commit of a hub id, in TRL's words."""

    model: str
    model_revision: Revision | None = None
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
    num_prompts: PerRound[PositiveInt] | None = None
    sources: Annotated[dict[SourceName, SourceRecipe], Field(min_length=1)] | None = None

    @field_validator("model")
    @classmethod
    def _named(cls, model: str) -> str:
        if not model.strip():
            raise ValueError("a model is a folder or a hub id, not an empty text")
        return model

    @model_validator(mode="after")
    def _revision_of_a_hub_id(self) -> "Recipe":
        check_revision(self.model, self.model_revision)
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the sections that a recipe of its kind doesn't have."""
        absent = ("num_prompts", "sources") if self.sources is None else ("prompts", "judge", "pairs")
        return {key: value for key, value in dump(self).items() if key not in absent}

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.sources is None and self.num_prompts is not None:
            raise ValueError("num_prompts at the top is split among sources; here it is prompts.num_prompts")
        if self.sources is not None:
            self._check_sources(self.sources)
        self.for_each(lambda _, view: view.check_source())
        kinds = {view.pairs.kind: view.pairs.reads_scores for view in self.by_source.values()}
        if self.audit.canaries and not any(kinds.values()):
            raise ValueError(
                f"audit.canaries: pairs.kind {', '.join(kinds)} has no judge that could be shown any; leave it out"
            )
        return self

    def _check_sources(self, sources: dict[str, SourceRecipe]) -> None:
        elsewhere: list[str] = [key for key in ("prompts", "pairs") if key in self.model_fields_set]
        elsewhere += ["judge"] if self.judge is not None else []
        elsewhere += ["evaluate.judge"] if self.evaluate.judge is not None else []
        elsewhere += ["audit.calibration"] if self.audit.calibration is not None else []
        if elsewhere:
            raise ValueError(f"{', '.join(elsewhere)}: with sources each has its own, in sources.NAME.{elsewhere[0]}")
        if self.num_prompts is None:
            raise ValueError(
                "num_prompts: missing; it is the number of prompts a round, split among the sources by weight"
            )
        unasked = [name for name, counts in self._counts(sources).items() if not any(counts)]
        if unasked:
            raise ValueError(
                f"sources.{unasked[0]}: its weight gives it none of num_prompts in any round. Raise either, or drop the source"
            )

    def _counts(self, sources: dict[str, SourceRecipe]) -> dict[str, list[int]]:
        """How many prompts each source has in the rounds that differ; the last repeats."""
        total, weights = self.num_prompts or 0, [source.weight for source in sources.values()]
        rounds = range(rounds_that_differ(total, *weights))
        split = [split_by_weight(at_round(total, r), [at_round(weight, r) for weight in weights]) for r in rounds]
        return {name: [parts[n] for parts in split] for n, name in enumerate(sources)}

    @property
    def has_prompts(self) -> bool:
        """Whether rounds can be played; a recipe without prompts is for stages over files."""
        return self.sources is not None or self.prompts.source is not None

    @property
    def by_source(self) -> dict[str, "SourceView"]:
        """The recipe as each source has it, by name; "" is the one source of a recipe without `sources`."""
        fields = dict(self)
        if self.sources is None:
            return {"": SourceView.model_construct(**fields)}
        views = {}
        counts = self._counts(self.sources)
        for name, source in self.sources.items():
            dealt = counts[name] if len(counts[name]) > 1 else counts[name][0]
            own = {
                "prompts": source.prompts.model_copy(update={"num_prompts": dealt}),
                "judge": source.judge,
                "pairs": source.pairs,
                "evaluate": self.evaluate.model_copy(update={"judge": source.evaluate.judge}),
                "audit": self.audit.model_copy(update={"calibration": source.audit.calibration}),
            }
            views[name] = SourceView.model_construct(**fields | own | {"num_prompts": None, "sources": None})
        return views

    def for_each(self, check: "Callable[[str, SourceView], object]") -> None:
        """Calls `check` with the name of each source and the recipe as it has it; errors then say which source they are of."""
        for name, view in self.by_source.items():
            try:
                check(name, view)
            except (ValueError, SelfplayError) as error:
                said = str(error)
                if not name or said.startswith(f"sources.{name}."):
                    raise
                kind = type(error) if isinstance(error, SelfplayError) else ValueError
                raise kind(f"sources.{name}: {said}") from error

    def check_win_rates(self) -> None:
        """RecipeError where a loss reads win rates that a source's selector would not give. A selector passed to `iterate` as
        an object may give them, so this is no part of reading a recipe.
        """
        self.for_each(lambda _, view: view.check_win_rates_given())

    def check_judged(self) -> None:
        """RecipeError where a source's pairs need scores that nobody would give. A judge passed to `iterate` as an object
        counts, so this is no part of reading a recipe.
        """
        self.for_each(lambda _, view: view.check_judge_given())

    @property
    def num_canaries(self) -> int:
        """On how many prompts of a round, of all sources together, canaries are judged by the recipe's own judges."""
        if self.sources is not None:
            return sum(view.num_canaries for view in self.by_source.values())
        if self.judge is None:
            return 0
        default = DEFAULT_CANARIES if any(one.kind in MODEL_KINDS for one in judges_in(self.judge)) else 0
        return default if self.audit.canaries is None else self.audit.canaries

    @property
    def heldout_judge(self) -> JudgeRecipe | None:
        """The panel's judge: evaluate.judge, else the run's own. None where that is the policy itself, a ruler that every
        round changes, or normalizes within a prompt: neither measures a gain.
        """
        own = None if asks_policy(self.judge) or within_prompts(self.judge) else self.judge
        return self.evaluate.judge or own


class SourceView(Recipe):
    """A recipe as one of its sources has it: with that source's prompts, judge, pairs and panel judge."""

    @property
    def idle_panel_judge(self) -> str | None:
        """What to say of an evaluate.judge that no held-out prompts are there for. It is no error: who leaves the panels of a
        recipe out says `prompts.heldout: null` and no more.
        """
        idle = self.evaluate.judge is not None and self.prompts.heldout is None
        return "evaluate.judge scores nothing: prompts.heldout names no prompts" if idle else None

    def check_source(self) -> None:
        """ValueError where judge, pairs, completions and training don't fit each other."""
        pairs = self.pairs
        if not pairs.reads_scores and self.judge is not None:
            raise ValueError(f"pairs.kind {pairs.kind} reads no scores: remove the judge (evaluate.judge is fine)")
        if not pairs.reads_scores and self.audit.calibration is not None:
            raise ValueError(
                f"audit.calibration: pairs.kind {pairs.kind} has no judge that could be tested; leave it out"
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
        self._check_scale()
        if self.train.reference_logps == "engine" and self.generator.kind == "scripted":
            raise ValueError("train.reference_logps is engine, but the scripted generator gives no logps")

    def _check_scale(self) -> None:
        judge, pairs = self.judge, self.pairs
        if isinstance(pairs, CorrectVsIncorrectRecipe) and within_prompts(judge):
            raise ValueError("pairs.correct_score is a score, but normalize leaves none as it was: say normalize: none")
        if not isinstance(pairs, WinRatesRecipe) or pairs.win_rate_from != "scores":
            return
        combined = isinstance(judge, CombineRecipe)
        if isinstance(judge, CombineRecipe) and judge.normalize == "z_score":
            raise ValueError(
                "pairs.win_rate_from is scores, but z_scores are no win rates: say normalize: rank, or order"
            )
        kinds = [] if within_prompts(judge) else [one.kind for one in judges_in(judge)]
        for kind in kinds:
            if kind in POINTWISE_KINDS:
                also = ", or normalize: rank" if combined else ""
                raise ValueError(
                    f"pairs.win_rate_from is scores, but those of a {kind} judge are no win rates: say order{also}"
                )

    def check_win_rates_given(self) -> None:
        """`check_win_rates` of this source."""
        if "win_rates" in reads(self.train.losses) and not isinstance(self.pairs, WinRatesRecipe):
            raise RecipeError(
                f"train.loss_type: sppo reads win rates, which pairs.kind {self.pairs.kind} doesn't give. Say pairs.kind: "
                "win_rates, or loss_type: sppo_hard"
            )

    def check_judge_given(self) -> None:
        """`check_judged` of this source."""
        if self.pairs.reads_scores and self.judge is None:
            raise RecipeError(
                f"judge: missing; pairs.kind {self.pairs.kind} reads scores. Add a judge, or use gold_vs_completion"
            )


def resolve_path(text: str, folder: Path) -> str:
    """`text` as an absolute path where it is one, read from the recipe's folder; else (a hub id) unchanged."""
    path = Path(text).expanduser()
    if path.is_absolute():
        return str(path)
    if text.startswith(("./", "../")) or (folder / path).exists():
        return str((folder / path).resolve())
    return text
