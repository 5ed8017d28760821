"""One OpenAI-compatible chat endpoint, asked with patience and trusted with nothing.

What may go wrong with a call, and what becomes of it:

    408, 409, 425, 429, 5xx, no connection, a connection lost, no reply in time
                                                     asked again, at most max_retries times, after what Retry-After says or a
                                                     growing, random pause; then a Failure
    a redirect                                       a Failure
    another refusal, a body too large, compressed, garbled or without the log-probabilities asked for
                                                     a Failure that is final: of this question the server says nothing else
    401, 402, 403, 404                               JudgeError: no call could ever succeed. A 403 from a server that has
                                                     replied before is a Failure: some forbid a question for what is in it
    an address that is link-local                    SecurityError

The key is sent to the base URL's host alone (no redirect is followed) and is cut out of whatever the server says.
Environment proxies are not used.
"""

import asyncio
import email.utils
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import httpx2
import openai

from selfplay.errors import JudgeError
from selfplay.judges.body import MAX_SAID, error_code, read_body
from selfplay.judges.guard import BodyError, Guard
from selfplay.judges.journal import Failure, Reply
from selfplay.types import Message

MAX_PAUSE = 60.0  # seconds; a Retry-After may be longer
HOPELESS = {401: "it refuses the key", 402: "it wants to be paid", 403: "it forbids this", 404: "no such model or path"}
FORBIDDEN = 403
PASSING = (408, 409, 425, 429)  # and 5xx


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Where and how a model is asked. `pause` is the first of the growing pauses between tries; times are seconds. `extra`
    are further fields of a request; with `logprobs` among them a reply without any is none.
    """

    base_url: str
    model: str
    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    send_seed: bool = True
    max_concurrency: int = 16
    requests_per_minute: float | None = None
    max_retries: int = 5
    timeout: float = 120.0
    pause: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)


class _AgainError(Exception):
    """Why a try failed, where another may succeed; `after` is the pause in seconds that the server asks for."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Pacer:
    """When calls may start: at most `per_minute`, evenly spaced, and not while the server asks for a pause."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._free = 0.0

    def take(self, now: float) -> float:
        """Seconds to wait before the next call starts."""
        start = max(now, self._free)
        self._free = start + self._interval
        return start - now

    def hold(self, until: float) -> None:
        """No call starts before `until`."""
        self._free = max(self._free, until)


class Endpoint:
    """Asks one model; at most max_concurrency calls run at a time. Lives in one event loop, in an `async with` block.

    `until` is when the stage must be done, in seconds of time.monotonic(): no pause that would end later is begun. `replied`
    says that the server has replied to this stage before.
    """

    def __init__(self, settings: EndpointSettings, key: str | None, *, until: float, replied: bool = False) -> None:
        self.settings = settings
        self._key = key
        self._until = until
        self._replied = replied
        self._free = asyncio.Semaphore(settings.max_concurrency)
        self._pacer = Pacer(settings.requests_per_minute)
        guard = Guard(key)
        http = httpx2.AsyncClient(transport=guard, timeout=settings.timeout, follow_redirects=False)
        # the client wants some key, else it takes that of another account from the environment
        self._client = openai.AsyncOpenAI(base_url=settings.base_url, api_key="none", max_retries=0, http_client=http)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._client.close()

    async def ask(self, messages: Sequence[Message], seed: int) -> Reply | Failure:
        """The model's reply, or why there is none. JudgeError: no call will have one."""
        async with self._free:
            for tries in range(1, self.settings.max_retries + 2):
                await asyncio.sleep(self._pacer.take(time.monotonic()))
                try:
                    found = await self._call(messages, seed)
                except _AgainError as again:
                    failure = f"{again}, {tries} tries" if tries > 1 else str(again)
                    if tries <= self.settings.max_retries:
                        await self._rest(tries, again)
                else:
                    self._replied |= isinstance(found, Reply)
                    return replace(found, tries=tries)
        return Failure(failure, tries=tries)

    async def _rest(self, tries: int, again: _AgainError) -> None:
        pause = min(MAX_PAUSE, self.settings.pause * 2 ** (tries - 1)) * random.uniform(0.5, 1)
        now = time.monotonic()
        if again.after is not None:
            pause += again.after
            self._pacer.hold(now + again.after)
        if now + pause > self._until:
            raise JudgeError(
                f"judge {self.settings.base_url}: {again}; a pause of {pause:.0f} s would end after judge.deadline. "
                "The verdicts so far are kept, and the same command goes on from them (judge.deadline may be changed)"
            )
        await asyncio.sleep(pause)

    async def _call(self, messages: Sequence[Message], seed: int) -> Reply | Failure:
        settings = self.settings
        # a lone surrogate has no UTF-8
        turns: Any = [{"role": m.role, "content": m.content.encode(errors="replace").decode()} for m in messages]
        try:
            async with asyncio.timeout(settings.timeout):
                raw = await self._client.chat.completions.with_raw_response.create(
                    model=settings.model,
                    messages=turns,
                    max_tokens=settings.max_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    seed=seed if settings.send_seed else openai.omit,
                    extra_body=dict(settings.extra) or None,
                )
                body = raw.http_response.content
        except (TimeoutError, openai.APITimeoutError):
            raise _AgainError(f"no reply within judge.timeout, {settings.timeout:g} s") from None
        except openai.APIStatusError as error:
            return self._refused(error.response.status_code, error.response.headers, error.response.text)
        except openai.APIConnectionError as error:
            raise _AgainError(f"the connection failed ({type(error.__cause__ or error).__name__})") from None
        except BodyError as error:
            if error.status < 300:
                return Failure(str(error), final=True)
            return self._refused(error.status, error.headers, str(error))
        found = read_body(body, self._clean, logprobs="logprobs" in settings.extra)
        if isinstance(found, Failure) and not found.counted and (code := error_code(body)) is not None:
            return self._refused(code, raw.headers, body.decode(errors="replace"))
        return found

    def _refused(self, status: int, headers: Mapping[str, str], text: str) -> Failure:
        said = repr(self._clean(text)[:MAX_SAID])
        if status in HOPELESS and not (status == FORBIDDEN and self._replied):
            raise JudgeError(
                f"judge {self.settings.base_url}, model {self.settings.model}: HTTP {status}, {HOPELESS[status]}. "
                f"Look at judge.base_url, judge.model and judge.api_key_env. The server says {said}"
            )
        if status in PASSING or status >= 500:
            raise _AgainError(f"HTTP {status}", retry_after(headers.get("retry-after"), time.time()))
        if 300 <= status < 400:
            return Failure(
                f"the server redirects (HTTP {status}), which is not followed; give the right judge.base_url"
            )
        # money or a key may have run out too, with 403
        return Failure(f"the server refuses the request (HTTP {status})\n{said}", final=status != FORBIDDEN)

    def _clean(self, text: str) -> str:
        """What a server says, without the key that it was given."""
        return text.replace(self._key, "[key]") if self._key else text


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for, given in seconds or as a date; None where it can't be read."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if seconds < float("inf") else None
