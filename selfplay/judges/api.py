"""A model behind an OpenAI-compatible chat endpoint as a judge: the same questions, parsers and averages as llm.py.

Replies and refusals are kept as they arrive (journal.py), under a digest of all that they depend on, so a run that was
killed, or whose server was down, asks for neither again. A question without a reply is None with a note in its judgement where
the stage goes on; where the stage stops (patience.py), it is asked again by the next command, unless it was refused.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.errors import JudgeError
from selfplay.judges.borders import without_borders
from selfplay.judges.choices import response_format
from selfplay.judges.endpoint import Endpoint, EndpointSettings
from selfplay.judges.journal import USAGE, Failure, Journal, Reply
from selfplay.judges.lift import run_async
from selfplay.judges.patience import MAX_TRIED, Patience
from selfplay.judges.questions import Place, Questions, check_asked, mean_verdict
from selfplay.judges.template import JudgeTemplate
from selfplay.judges.thinking import after_thinking
from selfplay.judges.top_logps import score_from_top
from selfplay.judges.verdicts import Verdict
from selfplay.protocols import JudgeContext
from selfplay.recipe_judges import ApiJudgeRecipe
from selfplay.types import Group, Judgement, Message, Sampling

TOKENS_PER_PRICE = 1e6


@dataclass(frozen=True, slots=True)
class Usage:
    """What a stage has asked so far, earlier processes included. `num_calls` are requests, `num_retries` those of them that put
    a question again; `num_failed` are questions without a reply. The tokens are those of the `num_counted` calls whose
    server told of any, and `cost`, None without prices, is theirs: what the others cost is not known. Calls that were under way
    when a process stopped are in no figure.
    """

    num_calls: int
    num_retries: int
    num_failed: int
    num_counted: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", cost {self.cost:.4g}"
        uncounted = self.num_calls - self.num_counted
        return (
            f"judge: {self.num_calls} calls ({self.num_retries} retries, {self.num_failed} failed), "
            f"{self.prompt_tokens} prompt tokens, {self.completion_tokens} completion tokens{cost}"
            + (f"; no tokens are known of {uncounted} calls" if uncounted else "")
        )


@dataclass(frozen=True, slots=True)
class _Call:
    """A question, put with a seed; `key` is a digest of all that its reply depends on."""

    place: Place
    prompt_id: str
    messages: tuple[Message, ...]
    seed: int
    key: str


class ApiJudge:
    """Scores completions by what a model behind an endpoint says about them; see LLMJudge for the scores.

    Without a `stage` block each call of `judge` is a stage of its own and keeps no replies.
    """

    def __init__(
        self, template: JudgeTemplate, recipe: ApiJudgeRecipe, key: str | None = None, *, pause: float = 1.0
    ) -> None:
        """`pause` is the first pause between tries, in seconds. RecipeError where template and verdict don't fit."""
        constrained = recipe.verdict == "constrained"
        self.questions = Questions(template, recipe.num_verdicts, recipe.system_prompt, constrained)
        check_asked(self.questions, verdict=recipe.verdict, temperature=recipe.temperature)
        self.recipe = recipe
        shared = {name: value for name, value in recipe if name in EndpointSettings.__dataclass_fields__}
        self._settings = EndpointSettings(**(shared | self._asked_by_verdict()), pause=pause)
        self._key = key
        self._stage: Patience | None = None
        self._start_clock()

    def _asked_by_verdict(self) -> dict[str, Any]:
        """The settings of a call that depend on how a verdict is read."""
        if self.recipe.verdict == "labels":
            extra = {"logprobs": True, "top_logprobs": self.recipe.top_logprobs}
            return {"extra": extra, "max_tokens": 1, "temperature": 0.0, "top_p": 1.0}
        choices = self.questions.choices
        if self.recipe.verdict == "parse":
            return {}
        if self.recipe.constraint == "response_format":
            return {"extra": {"response_format": response_format(choices)}}
        return {"extra": {"structured_outputs": {"choice": list(choices)}}}

    @property
    def identity(self) -> str:
        """Endpoint, model, template, parser version and how verdicts are drawn."""
        r = self.recipe
        sampling = Sampling(temperature=r.temperature, top_p=r.top_p, max_tokens=r.max_tokens)
        how = f"labels top{r.top_logprobs}" if r.verdict == "labels" else self.questions.drawn(sampling)
        if r.verdict == "constrained":
            how += f" {r.constraint}"
        how += "" if r.send_seed else " unseeded"
        seen = "seen " if r.verdict == "constrained" else ""  # between tags that are there, and never cut without them
        how += "" if r.reasoning_tags is None else f" {seen}thinking:{json.dumps(r.reasoning_tags)}"
        return f"api:{r.base_url} {r.model} {self.questions.identity(how)}"

    @property
    def compares(self) -> bool:
        """Whether its template shows two completions."""
        return self.questions.template.head.mode == "pairwise"

    @contextmanager
    def stage(self, folder: Path, note: Callable[[str], None]) -> Iterator[None]:
        """Keeps replies in `folder`, counts them in its usage.json, and starts the clock of `deadline`."""
        self._start_clock()
        with Journal(folder) as journal:
            self._stage = Patience(journal)
            if journal.replies:
                note(f"judge: {len(journal.replies)} replies are there already")
            try:
                yield
            finally:
                usage = self.usage(journal)
                self._stage = None
                store.rewrite(folder / USAGE, (json.dumps(asdict(usage), indent=2) + "\n").encode())
                note(str(usage))

    def _start_clock(self) -> None:
        self._until = time.monotonic() + self.recipe.deadline

    def usage(self, journal: Journal) -> Usage:
        """Calls and tokens of a stage, from its journal."""
        num_failed = sum(key not in journal.replies for key in journal.tried)
        prompt, completion = journal.prompt_tokens, journal.completion_tokens
        cost = None
        if self.recipe.prompt_price is not None and self.recipe.completion_price is not None:
            cost = (prompt * self.recipe.prompt_price + completion * self.recipe.completion_price) / TOKENS_PER_PRICE
        calls = journal.num_calls, journal.num_retries, num_failed, journal.num_counted
        return Usage(*calls, prompt, completion, cost)

    def count_verdicts(self, groups: Sequence[Group]) -> int:
        return self.questions.count(groups)

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One judgement per group; a question without a reply is None with a note. JudgeError: the server is down, refuses
        everything (patience.py), or `deadline` has passed.
        """
        if self._stage is not None:
            return self._judge(self._stage, groups, context)
        self._start_clock()
        with Journal(None) as journal:
            return self._judge(Patience(journal), groups, context)

    def _judge(self, stage: Patience, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        found = self.questions.ask(groups)
        verdicts = {place: question for place, question in found.items() if isinstance(question, Verdict)}
        asked = {place: question for place, question in found.items() if not isinstance(question, Verdict)}
        calls = [
            self._call(groups, place, messages, self.questions.seed(groups, place, n, context.seed))
            for place, messages in asked.items()
            for n in range(self.questions.num_verdicts)
        ]
        done = count(len(verdicts) * self.questions.num_verdicts + 1)
        replies = run_async(self._ask_all(stage, calls, lambda: context.progress(next(done))))
        said: dict[Place, list[Reply | Failure]] = {place: [] for place in asked}
        for call, reply in zip(calls, replies, strict=True):
            said[call.place].append(reply)
        verdicts |= {place: self._verdict(several) for place, several in said.items()}
        return self.questions.judgements(groups, verdicts)

    def _call(self, groups: Sequence[Group], place: Place, messages: Sequence[Message], seed: int) -> _Call:
        shown = without_borders(messages)
        question = [self.identity, seed, [[m.role, m.content] for m in shown]]
        key = hashlib.sha256(json.dumps(question).encode()).hexdigest()
        return _Call(place, groups[place[0]].prompt.id, shown, seed, key)

    def _verdict(self, said: Sequence[Reply | Failure]) -> Verdict:
        replies = [reply for reply in said if isinstance(reply, Reply)]
        failed = [reply for reply in said if isinstance(reply, Failure)]
        if not replies:
            return Verdict(None, failed[0].reason)
        if self.recipe.verdict == "labels":
            head = self.questions.template.head
            assert head.labels is not None  # checked in __init__
            return score_from_top(replies[0].top, head.labels, head.min_label_mass)
        return mean_verdict([self._read(reply) for reply in replies])

    def _read(self, reply: Reply) -> Verdict:
        tags = self.recipe.reasoning_tags
        # a server that thinks before a constrained verdict shows the tags: the rest can be nothing but a choice, cut or whole
        unseen = reply.cut and self.recipe.verdict != "constrained"
        text = reply.text if tags is None else after_thinking(reply.text, tags, may_be_inside=unseen)
        return self.questions.read([(text, reply.cut)])

    async def _ask_all(
        self, stage: Patience, calls: Sequence[_Call], tick: Callable[[], None]
    ) -> list[Reply | Failure]:
        """What every call got, in order; calls that are the same are asked once. `tick` is called when one is there."""
        new = {call.key: call for call in calls if stage.known(call.key) is None}
        for call in calls:
            if call.key not in new:
                tick()
        if new:
            await self._ask_new(stage, new, [call.key for call in calls if call.key in new], tick)
        found = [stage.known(call.key) for call in calls]
        return [one for one in found if one is not None]

    async def _ask_new(
        self, stage: Patience, new: dict[str, _Call], keys: Sequence[str], tick: Callable[[], None]
    ) -> None:
        """Asks `new`, and ticks for each of `keys`."""
        replied = bool(stage.journal.replies)
        try:
            async with (
                asyncio.timeout(max(0.0, self._until - time.monotonic())),
                Endpoint(self._settings, self._key, until=self._until, replied=replied) as endpoint,
            ):
                asked = {key: asyncio.ensure_future(self._ask(stage, endpoint, call)) for key, call in new.items()}
                work = [asyncio.ensure_future(_ticked(asked[key], tick)) for key in keys]
                try:
                    await asyncio.gather(*work)
                finally:
                    for task in (*asked.values(), *work):  # one may have failed for all
                        task.cancel()
                    await asyncio.gather(*asked.values(), *work, return_exceptions=True)
        except TimeoutError:
            raise self._down(f"judge.deadline, {self.recipe.deadline:g} s for a stage, has passed") from None
        if why := stage.at_end({key: call.prompt_id for key, call in new.items()}):
            raise self._down(why)

    async def _ask(self, stage: Patience, endpoint: Endpoint, call: _Call) -> None:
        if why := stage.add(call.key, await endpoint.ask(call.messages, call.seed)):
            raise self._down(why)

    def _down(self, what: str) -> JudgeError:
        return JudgeError(
            f"judge {self.recipe.base_url}, model {self.recipe.model}: {what}.\nThe replies so far are kept; when the server "
            "works again, the same command goes on from them (judge.deadline, timeout and max_retries may be changed). Where "
            f"others have a reply, a question without one in {MAX_TRIED} runs of the command has no verdict and stops no more"
        )


async def _ticked(call: Awaitable[None], tick: Callable[[], None]) -> None:
    await call
    tick()
