"""A model as a judge: asked about every completion in words, its verdict read from its text or from label
probabilities.

Self-Rewarding Language Models (arXiv:2401.10020): the policy itself judges, several verdicts are drawn, and the score
is the mean of those that can be read. With `model="policy"` the judge asks the policy's engine, which is loaded
already.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Literal, Protocol, Self, runtime_checkable

from selfplay.chat import Chat
from selfplay.errors import GeneratorError, RecipeError
from selfplay.generators.engine import Request, Result
from selfplay.judges.template import PARSER_VERSION, JudgeTemplate, TemplateHead, Verdict
from selfplay.protocols import JudgeContext
from selfplay.types import Completion, Group, Judgement, Message, Prompt, Sampling, derive_seed


class _Sized(Protocol):
    @property
    def max_model_len(self) -> int: ...


@runtime_checkable
class JudgeModel(Protocol):
    """What a judge needs of a generator: to draw completions of token ids, and to score labels. EngineGenerator has it."""

    @property
    def chat(self) -> object:
        """A Chat; checked where it is used, for a generator by itself promises less."""
        ...

    @property
    def engine(self) -> _Sized: ...

    def complete(self, requests: Sequence[Request]) -> dict[str, Result]:
        """The result of each request, by its id."""
        ...

    def score_labels(self, prompts: Sequence[tuple[int, ...]], label_token_ids: Sequence[int]) -> list[list[float]]:
        """For each prompt the logps (nats) of each label as its next token."""
        ...


class LLMJudge:
    """Scores every completion by what a judge model says about it.

    `verdict="parse"`: `num_verdicts` texts are drawn at `temperature` and `top_p`, up to `max_tokens` each; the score
    is the mean of the verdicts that can be read, None where none can. `verdict="labels"`: nothing is drawn; the score
    is the expected score sum_i p_i v_i over the template's labels, p renormalised over them.

    `model` is "policy" (then `context.generator` is asked) or the digest of another model, which `generator_factory`
    opens when the first group is judged and `close()`, or the end of a `with` block, frees. `system_prompt` stands in
    for the template's own.
    """

    def __init__(
        self,
        template: JudgeTemplate,
        *,
        verdict: Literal["parse", "labels"] = "parse",
        num_verdicts: int = 1,
        temperature: float = 0.7,
        top_p: float = 0.9,
        max_tokens: int = 256,
        model: str = "policy",
        generator_factory: Callable[[], AbstractContextManager[JudgeModel]] | None = None,
        system_prompt: str | None = None,
    ) -> None:
        if (model == "policy") != (generator_factory is None):
            raise RecipeError(
                "judge.model: the policy judges on its own engine; any other model needs a generator_factory."
            )
        _check_fits(template.head, verdict, num_verdicts, temperature)
        self.template = template
        self.verdict = verdict
        self.num_verdicts = num_verdicts
        self.sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
        self.model = model
        self.system_prompt = system_prompt
        self._factory = generator_factory
        self._open = ExitStack()
        self._own: JudgeModel | None = None

    @property
    def identity(self) -> str:
        """Model, template, parser version and how verdicts are drawn: whatever a verdict depends on, seeds apart."""
        head = self.template.head
        how = "labels"
        if self.verdict == "parse":
            s = self.sampling
            how = f"{self.num_verdicts}x T{s.temperature:g} p{s.top_p:g} max{s.max_tokens}"
        system = (
            ""
            if self.system_prompt is None
            else f" system:{hashlib.sha256(self.system_prompt.encode()).hexdigest()[:16]}"
        )
        return (
            f"llm:{self.model} template:{head.name} v{head.version} {self.template.digest} "
            f"parser:{PARSER_VERSION} {how}{system}"
        )

    def close(self) -> None:
        """Frees the judge's own model, if it was opened. Calling it twice is fine."""
        self._own = None
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One judgement per group. A judge prompt that doesn't fit the model's length, or lacks the gold that its
        template asks for, gets None with a note. RecipeError: a label that isn't one token. GeneratorError: the
        engine's.
        """
        model = self._model(context)
        chat = _chat(model)
        verdicts: dict[tuple[int, int], Verdict] = {}
        asked: dict[tuple[int, int], tuple[int, ...]] = {}
        for g, group in enumerate(groups):
            for k, completion in enumerate(group.completions):
                found = self._judge_prompt(chat, model.engine.max_model_len, group.prompt, completion)
                if isinstance(found, Verdict):
                    verdicts[g, k] = found
                else:
                    asked[g, k] = found
        verdicts |= (
            self._labels(model, asked) if self.verdict == "labels" else self._texts(model, asked, groups, context)
        )
        judgements = []
        for g, group in enumerate(groups):
            row = [verdicts[g, k] for k in range(len(group.completions))]
            judgements.append(Judgement(group.prompt.id, tuple(v.score for v in row), tuple(v.note for v in row)))
        return judgements

    def _model(self, context: JudgeContext) -> JudgeModel:
        if self._factory is not None:
            if self._own is None:
                self._own = self._open.enter_context(self._factory())
            return self._own
        if not isinstance(context.generator, JudgeModel):
            found = "none is loaded" if context.generator is None else f"found {type(context.generator).__name__}"
            raise RecipeError(
                f"judge.model: policy needs the policy's engine in the judge context, and {found}. "
                "Use generator.kind vllm or transformers, or give the judge a model of its own."
            )
        return context.generator

    def _judge_prompt(
        self, chat: Chat, max_model_len: int, prompt: Prompt, completion: Completion
    ) -> tuple[int, ...] | Verdict:
        """The token ids of the judge prompt, or why there is none."""
        if self.template.needs_gold and prompt.gold is None:
            return Verdict(None, "the template asks for the gold answer, and the prompt has none")
        messages = self.template.fill(prompt, completion)
        if self.system_prompt is not None:
            messages = (Message("system", self.system_prompt), messages[-1])
        token_ids = chat.encode_messages(messages)
        num_new = 1 if self.verdict == "labels" else self.sampling.max_tokens
        if len(token_ids) + num_new > max_model_len:
            return Verdict(
                None,
                f"the judge prompt and its {num_new} new tokens don't fit max_model_len {max_model_len}\n"
                f"{len(token_ids)} prompt tokens",
            )
        return token_ids

    def _texts(
        self,
        model: JudgeModel,
        asked: dict[tuple[int, int], tuple[int, ...]],
        groups: Sequence[Group],
        context: JudgeContext,
    ) -> dict[tuple[int, int], Verdict]:
        requests = [
            Request(f"{g}/{k}/{n}", ids, derive_seed(context.seed, groups[g].prompt.id, k, n), self.sampling)
            for (g, k), ids in asked.items()
            for n in range(self.num_verdicts)
        ]
        chat, results = _chat(model), model.complete(requests) if requests else {}
        missing = [request.id for request in requests if request.id not in results]
        if missing:
            raise GeneratorError(
                f"the judge's engine gave no result for {len(missing)} requests, the first {missing[0]}"
            )
        return {
            (g, k): _mean([self._read(chat, results[f"{g}/{k}/{n}"]) for n in range(self.num_verdicts)])
            for g, k in asked
        }

    def _read(self, chat: Chat, result: Result) -> Verdict:
        assert self.template.head.parse is not None  # checked in __init__
        said = chat.completion(result.token_ids, result.logps, result.finish_reason, result.stop_reason)
        return self.template.head.parse.read(said.text, cut=result.finish_reason == "length")

    def _labels(
        self, model: JudgeModel, asked: dict[tuple[int, int], tuple[int, ...]]
    ) -> dict[tuple[int, int], Verdict]:
        head = self.template.head
        assert head.labels is not None  # checked in __init__
        label_ids = label_token_ids(_chat(model), list(head.labels))
        rows = model.score_labels(list(asked.values()), label_ids) if asked else []
        if len(rows) != len(asked):
            raise GeneratorError(
                f"the judge's engine scored the labels of {len(rows)} prompts, and {len(asked)} were asked"
            )
        values = list(head.labels.values())
        return {place: expected_score(row, values, head.min_label_mass) for place, row in zip(asked, rows, strict=True)}


def _chat(model: JudgeModel) -> Chat:
    if not isinstance(model.chat, Chat):
        raise RecipeError(
            f"judge.model: a judge model needs a chat template to be asked, and this generator has {type(model.chat).__name__}."
        )
    return model.chat


def _check_fits(head: TemplateHead, verdict: str, num_verdicts: int, temperature: float) -> None:
    if verdict == "parse" and head.parse is None:
        raise RecipeError(
            f"judge.template: {head.name} has no `parse`, so its verdict can't be read from text; use verdict: labels."
        )
    if verdict == "labels" and head.labels is None:
        raise RecipeError(
            f"judge.template: {head.name} has no `labels`; use verdict: parse, or add labels to the template."
        )
    if num_verdicts < 1:
        raise RecipeError(f"judge.num_verdicts is {num_verdicts}; it must be at least 1.")
    if num_verdicts > 1 and (verdict == "labels" or temperature == 0):
        why = "verdict: labels draws nothing" if verdict == "labels" else "at temperature 0 all verdicts are equal"
        raise RecipeError(f"judge.num_verdicts is {num_verdicts}, but {why}; set it to 1.")


def _mean(verdicts: Sequence[Verdict]) -> Verdict:
    """The mean of the verdicts that have a score; its note lists them all where there were several."""
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    if not scores:
        count = "" if len(verdicts) == 1 else f"none of {len(verdicts)} verdicts can be read: "
        return Verdict(None, count + verdicts[0].note)
    listed = " ".join("-" if verdict.score is None else f"{verdict.score:g}" for verdict in verdicts)
    return Verdict(math.fsum(scores) / len(scores), "" if len(verdicts) == 1 else f"verdicts {listed}")


def label_token_ids(chat: Chat, labels: Sequence[str]) -> list[int]:
    """The token id of each label. RecipeError naming a label that is no single token, or two that are the same one."""
    ids: list[int] = []
    for label in labels:
        encoded = chat.tokenizer.encode(label, add_special_tokens=False)
        if len(encoded) != 1:
            raise RecipeError(
                f"judge.template: the label {label!r} is {len(encoded)} tokens for this model's tokenizer; "
                "labels must be single tokens. Choose a shorter word, or use verdict: parse."
            )
        if encoded[0] in ids:
            raise RecipeError(
                f"judge.template: the labels {labels[ids.index(encoded[0])]!r} and {label!r} are the same token."
            )
        ids.append(encoded[0])
    return ids


def expected_score(logps: Sequence[float], values: Sequence[float], min_mass: float = 0.0) -> Verdict:
    """sum_i p_i v_i with p = softmax of the labels' logps (nats). None where the labels together have less probability
    than `min_mass`, none at all, or a logp is NaN.
    """
    if any(math.isnan(logp) for logp in logps):
        return Verdict(None, "a label's logp is NaN")
    highest = max(logps)
    if highest == -math.inf:
        return Verdict(None, "no label has any probability")
    weights = [math.exp(logp - highest) for logp in logps]
    mass = math.exp(highest) * math.fsum(weights)
    if mass < min_mass:
        return Verdict(None, f"the labels together have less than {min_mass:g} probability\n{mass:.3g}")
    score = math.fsum(weight * value for weight, value in zip(weights, values, strict=True)) / math.fsum(weights)
    return Verdict(score, f"labels have probability {mass:.2f}")
