"""A model as a judge: asked in words about every completion, or every two of them, its verdict read from its text or from
label probabilities, or drawn from a few texts alone.

Self-Rewarding Language Models (arXiv:2401.10020): the policy itself judges, several verdicts are drawn, and the score
is the mean of those that can be read. With `model="policy"` the judge asks the policy's engine, which is loaded
already.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Literal, Protocol, Self, runtime_checkable

from selfplay.chat import Chat
from selfplay.errors import GeneratorError, RecipeError
from selfplay.generators.engine import Request, Result
from selfplay.judges.questions import Place, Questions, Said, check_asked
from selfplay.judges.template import JudgeTemplate
from selfplay.judges.thinking import THINKING, after_thinking
from selfplay.judges.verdicts import Verdict
from selfplay.protocols import JudgeContext
from selfplay.types import Group, Judgement, Message, Sampling


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

    def complete(
        self, requests: Sequence[Request], *, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, Result]:
        """The result of each request, by its id. `progress` is called with the results and the tokens so far."""
        ...

    def score_labels(
        self,
        prompts: Sequence[tuple[int, ...]],
        label_token_ids: Sequence[int],
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[float]]:
        """For each prompt the logps (nats) of each label as its next token. `progress` is called with the prompts so far."""
        ...


class LLMJudge:
    """Scores every completion by what a judge model says about it; with a pairwise template, by its mean probability of
    beating another one (see lift.py).

    `verdict="parse"`: `num_verdicts` texts are drawn at `temperature` and `top_p`, up to `max_tokens` each; the verdict
    is the mean of those that can be read, None where none can. `verdict="constrained"`: the same, but the engine draws
    nothing else than the verdict's choices (choices.py). `verdict="labels"`: nothing is drawn; the verdict is the
    expected value sum_i p_i v_i over the template's labels, p renormalised over them.

    `model` is "policy" (then `context.generator` is asked) or the digests of another model and of its chat, which
    `generator_factory` opens when the first group is judged and `close()`, or the end of a `with` block, frees.
    `system_prompt` stands in for the template's own.
    """

    def __init__(
        self,
        template: JudgeTemplate,
        *,
        verdict: Literal["parse", "labels", "constrained"] = "parse",
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
        self.questions = Questions(template, num_verdicts, system_prompt, verdict == "constrained")
        check_asked(self.questions, verdict=verdict, temperature=temperature)
        self.verdict = verdict
        self.sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
        self.model = model
        self._factory = generator_factory
        self._open = ExitStack()
        self._own: JudgeModel | None = None

    @property
    def identity(self) -> str:
        """Model, template, parser version and how verdicts are drawn: whatever a verdict depends on, seeds apart."""
        how = "labels" if self.verdict == "labels" else self.questions.drawn(self.sampling)
        return f"llm:{self.model} {self.questions.identity(how)}"

    @property
    def compares(self) -> bool:
        """Whether its template shows two completions."""
        return self.questions.template.head.mode == "pairwise"

    def close(self) -> None:
        """Frees the judge's own model, if it was opened. Calling it twice is fine."""
        self._own = None
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def count_verdicts(self, groups: Sequence[Group]) -> int:
        return self.questions.count(groups)

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One judgement per group. A judge prompt that doesn't fit the model's length, or lacks the gold that its
        template asks for, gets None with a note. RecipeError: a label that isn't one token. GeneratorError: the
        engine's.
        """
        model = self._model(context)
        chat = _chat(model)
        verdicts: dict[Place, Verdict] = {}
        asked: dict[Place, tuple[int, ...]] = {}
        for place, question in self.questions.ask(groups).items():
            found = question if isinstance(question, Verdict) else self._encode(chat, model, question)
            if isinstance(found, Verdict):
                verdicts[place] = found
            else:
                asked[place] = found
        settled = len(verdicts) * self.questions.num_verdicts

        def tell(done: int, _: int = 0) -> None:
            context.progress(settled + done)

        verdicts |= (
            self._labels(model, asked, tell)
            if self.verdict == "labels"
            else self._texts(model, asked, groups, context.seed, tell)
        )
        return self.questions.judgements(groups, verdicts)

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

    def _encode(self, chat: Chat, model: JudgeModel, messages: Sequence[Message]) -> tuple[int, ...] | Verdict:
        """The token ids of a judge prompt, or no verdict where they don't fit."""
        token_ids, max_model_len = chat.encode_messages(messages, untrusted=True), model.engine.max_model_len
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
        asked: dict[Place, tuple[int, ...]],
        groups: Sequence[Group],
        seed: int,
        tell: Callable[[int, int], None],
    ) -> dict[Place, Verdict]:
        count = self.questions.num_verdicts
        choices = tuple(self.questions.choices)
        requests = [
            Request(_id(place, n), ids, self.questions.seed(groups, place, n, seed), self.sampling, choices)
            for place, ids in asked.items()
            for n in range(count)
        ]
        chat, results = _chat(model), model.complete(requests, progress=tell) if requests else {}
        missing = [request.id for request in requests if request.id not in results]
        if missing:
            raise GeneratorError(
                f"the judge's engine gave no result for {len(missing)} requests, the first {missing[0]}"
            )
        return {
            place: self.questions.read([_said(chat, results[_id(place, n)], choices) for n in range(count)])
            for place in asked
        }

    def _labels(
        self, model: JudgeModel, asked: dict[Place, tuple[int, ...]], tell: Callable[[int], None]
    ) -> dict[Place, Verdict]:
        head = self.questions.template.head
        assert head.labels is not None  # checked in __init__
        label_ids = label_token_ids(_chat(model), list(head.labels))
        rows = model.score_labels(list(asked.values()), label_ids, progress=tell) if asked else []
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


def _id(place: Place, n: int) -> str:
    return "/".join(str(part) for part in (*place, n))


def _said(chat: Chat, result: Result, choices: Sequence[str]) -> Said:
    """The text of a verdict, thinking cut off, and whether max_tokens cut it. What can be nothing but one of `choices` has no
    thinking.
    """
    tags, cut = chat.reasoning_tags or THINKING, result.finish_reason == "length"
    text = chat.decode(result.token_ids, keep=tags)
    if choices:
        return text, cut
    return after_thinking(text, tags, may_be_inside=chat.opens_with(tags[0])), cut


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
                f"judge.template: the labels {labels[ids.index(encoded[0])]!r} and {label!r} are the same token. "
                "Take other labels, or use verdict: parse."
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
