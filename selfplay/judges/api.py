"""A model behind an OpenAI-compatible chat endpoint as a judge: the same questions, parsers and averages as llm.py.

Replies are kept as they arrive (journal.py), under a digest of all that they depend on, so a run that was killed, or whose
server was down, asks nothing twice. A call that failed is None with a note in its judgement where the stage went on, and is
asked again where the stage is. A question that got no reply in MAX_TRIED of the processes that worked on the stage, the one
at hand among them, is no sign of a server that is down: some questions always take longer than `timeout`.
"""

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from selfplay import store
from selfplay.errors import JudgeError
from selfplay.judges.choices import response_format
from selfplay.judges.endpoint import CallError, Endpoint, EndpointSettings, NoReplyError
from selfplay.judges.journal import USAGE, Journal, Reply
from selfplay.judges.lift import run_async
from selfplay.judges.questions import Place, Questions, check_asked
from selfplay.judges.template import JudgeTemplate
from selfplay.judges.top_logps import score_from_top
from selfplay.judges.verdicts import Verdict
from selfplay.protocols import JudgeContext
from selfplay.recipe_judges import ApiJudgeRecipe
from selfplay.types import Group, Judgement, Message, Sampling

MAX_FAILURES = 8  # calls in a row without a reply, each after all its retries: then the server is down
MAX_TRIED = 3
TOKENS_PER_PRICE = 1e6

# How chat models spell the borders of turns. A server may read them as such wherever they stand, so they are broken.
_BORDERS = re.compile(r"<(?=\|[^|<>\n]{1,40}\|>|/?(?:s|bos|eos|start_of_turn|end_of_turn|think)>)|\[(?=/?INST\])")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a stage has asked so far, earlier processes included; retries and failures are this process's. `cost` is None
    without prices.
    """

    num_calls: int
    num_retries: int
    num_failed: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", cost {self.cost:.4g}"
        return (
            f"judge: {self.num_calls} calls ({self.num_retries} retries, {self.num_failed} failed), "
            f"{self.prompt_tokens} prompt tokens, {self.completion_tokens} completion tokens{cost}"
        )


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
        self._journal: Journal | None = None
        self._start_stage()

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
        return f"api:{r.base_url} {r.model} {self.questions.identity(how)}"

    @contextmanager
    def stage(self, folder: Path, note: Callable[[str], None]) -> Iterator[None]:
        """Keeps replies in `folder`, counts them in its usage.json, and starts the clock of `deadline`."""
        self._start_stage()
        with Journal(folder) as self._journal:
            if self._journal.replies:
                note(f"judge: {len(self._journal.replies)} replies are there already")
            try:
                yield
            finally:
                usage = self.usage(self._journal)
                self._journal = None
                store.rewrite(folder / USAGE, (json.dumps(asdict(usage), indent=2) + "\n").encode())
                note(str(usage))

    def _start_stage(self) -> None:
        self._until = time.monotonic() + self.recipe.deadline
        self._num_retries = 0
        self._num_failed = 0
        self._failed_in_row = 0

    def usage(self, journal: Journal) -> Usage:
        """Calls and tokens of a stage, counted from its journal."""
        replies = journal.replies.values()
        prompt, completion = sum(r.prompt_tokens for r in replies), sum(r.completion_tokens for r in replies)
        cost = None
        if self.recipe.prompt_price is not None and self.recipe.completion_price is not None:
            cost = (prompt * self.recipe.prompt_price + completion * self.recipe.completion_price) / TOKENS_PER_PRICE
        return Usage(len(replies), self._num_retries, self._num_failed, prompt, completion, cost)

    def count_verdicts(self, groups: Sequence[Group]) -> int:
        return self.questions.count(groups)

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One judgement per group; a question without a reply is None with a note. JudgeError: no call got a reply, many in
        a row got none, or `deadline` has passed.
        """
        if self._journal is not None:
            return self._judge(self._journal, groups, context)
        self._start_stage()
        with Journal(None) as journal:
            return self._judge(journal, groups, context)

    def _judge(self, journal: Journal, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        found = self.questions.ask(groups)
        verdicts = {place: question for place, question in found.items() if isinstance(question, Verdict)}
        asked = {place: question for place, question in found.items() if not isinstance(question, Verdict)}
        calls = [
            (place, _unspelled(messages), self.questions.seed(groups, place, n, context.seed))
            for place, messages in asked.items()
            for n in range(self.questions.num_verdicts)
        ]
        done = count(len(verdicts) * self.questions.num_verdicts + 1)
        replies = run_async(self._ask_all(journal, calls, lambda: context.progress(next(done))))
        said: dict[Place, list[Reply | CallError]] = {place: [] for place in asked}
        for (place, _, _), reply in zip(calls, replies, strict=True):
            said[place].append(reply)
        verdicts |= {place: self._verdict(several) for place, several in said.items()}
        return self.questions.judgements(groups, verdicts)

    def _verdict(self, said: Sequence[Reply | CallError]) -> Verdict:
        replies = [reply for reply in said if isinstance(reply, Reply)]
        failed = [str(reply) for reply in said if isinstance(reply, CallError)]
        if not replies:
            return Verdict(None, failed[0])
        if self.recipe.verdict == "labels":
            head = self.questions.template.head
            assert head.labels is not None  # checked in __init__
            return score_from_top(replies[0].top, head.labels, head.min_label_mass)
        return self.questions.read([(reply.text, reply.cut) for reply in replies])

    async def _ask_all(
        self, journal: Journal, calls: Sequence[tuple[Place, tuple[Message, ...], int]], tick: Callable[[], None]
    ) -> list[Reply | CallError]:
        """The reply of every call, or why there is none, in order; calls that are the same are asked once. `tick` is called
        when one is there.
        """
        try:
            async with (
                asyncio.timeout(max(0.0, self._until - time.monotonic())),
                Endpoint(self._settings, self._key, until=self._until) as endpoint,
            ):
                asked = {
                    question: asyncio.ensure_future(self._ask(journal, endpoint, *question))
                    for question in dict.fromkeys((messages, seed) for _, messages, seed in calls)
                }
                work = [asyncio.ensure_future(_ticked(asked[messages, seed], tick)) for _, messages, seed in calls]
                try:
                    found = await asyncio.gather(*work)
                finally:
                    for task in (*asked.values(), *work):  # one may have failed for all
                        task.cancel()
                    await asyncio.gather(*asked.values(), *work, return_exceptions=True)
                    self._num_retries += endpoint.num_retries
        except TimeoutError:
            raise self._down(f"judge.deadline, {self.recipe.deadline:g} s for a stage, has passed") from None
        failed = [reply for reply in found if isinstance(reply, CallError)]
        if failed and len(failed) == len(found):
            raise self._down(f"none of {len(found)} calls got a reply; the first: {failed[0]}")
        return found

    async def _ask(
        self, journal: Journal, endpoint: Endpoint, messages: tuple[Message, ...], seed: int
    ) -> Reply | CallError:
        question = [self.identity, seed, [[m.role, m.content] for m in messages]]
        key = hashlib.sha256(json.dumps(question).encode()).hexdigest()
        if key in journal.replies:
            return journal.replies[key]
        try:
            reply = await endpoint.ask(messages, seed)
        except CallError as error:
            self._num_failed += 1
            if not isinstance(error, NoReplyError):  # a server that refuses a question is up
                self._failed_in_row = 0
                return error
            journal.add(key, None)
            self._failed_in_row += journal.without_reply[key] < MAX_TRIED
            if self._failed_in_row >= MAX_FAILURES:
                raise self._down(f"{self._failed_in_row} calls in a row got no reply; the last: {error}") from None
            return error
        self._failed_in_row = 0
        journal.add(key, reply)
        return reply

    def _down(self, what: str) -> JudgeError:
        return JudgeError(
            f"judge {self.recipe.base_url}, model {self.recipe.model}: {what}.\nThe replies so far are kept; when the server "
            "works again, the same command goes on from them (judge.deadline, timeout and max_retries may be changed). A "
            f"question that gets none in {MAX_TRIED} runs of the command has no verdict, and stops no more"
        )


async def _ticked(call: Awaitable[Reply | CallError], tick: Callable[[], None]) -> Reply | CallError:
    reply = await call
    tick()
    return reply


def _unspelled(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with a space in every spelling of a turn's border."""
    return tuple(replace(m, content=_BORDERS.sub(lambda found: found[0] + " ", m.content)) for m in messages)
