"""What the body of a chat endpoint's reply holds: the completion, the first token's log-probabilities, the tokens counted."""

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from selfplay.judges.journal import Failure, Reply

MAX_SAID = 300  # characters of a server's complaint that a note quotes


class _Message(BaseModel):
    content: str | None = None


class _Top(BaseModel):
    token: str
    logprob: float


class _Token(BaseModel):
    top_logprobs: list[_Top] = Field(min_length=1)


class _Logprobs(BaseModel):
    content: list[_Token] = Field(min_length=1)


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: Any = None  # read only where they were asked for


class _Body(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: Any = None  # servers differ in it, and no verdict shall be lost for that


class _Broken(BaseModel):
    """What can be read of a body that holds no completion."""

    usage: Any = None
    error: Any = None


def read_body(body: bytes, clean: Callable[[str], str], *, logprobs: bool) -> Reply | Failure:
    """The reply in a body, or why there is none, with the tokens that the server counted in either case. `clean` is done to
    all text that the server wrote; with `logprobs` a reply without any is none.
    """
    try:
        found = _Body.model_validate_json(body)
    except ValidationError:
        shown = clean(body.decode(errors="replace"))[:MAX_SAID]
        return Failure(f"the server's body holds no completion\n{shown!r}", True, *_counted(_broken(body).usage))
    choice, counted = found.choices[0], _counted(found.usage)
    top: tuple[tuple[str, float], ...] = ()
    if logprobs:
        try:
            first = _Logprobs.model_validate(choice.logprobs).content[0]
        except ValidationError:
            reason = "the server gives no log-probabilities; take another judge.verdict than labels"
            return Failure(reason, True, *counted)
        top = tuple((clean(one.token), one.logprob) for one in first.top_logprobs)
    return Reply(clean(choice.message.content or ""), choice.finish_reason == "length", *counted, top)


def error_code(body: bytes) -> int | None:
    """The HTTP status of an error that a gateway, which had begun its reply with 200, tells of in the body."""
    error = _broken(body).error
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else None


def _broken(body: bytes) -> _Broken:
    try:
        return _Broken.model_validate_json(body)
    except ValidationError:
        return _Broken()


def _counted(usage: Any) -> tuple[int, int]:
    """Tokens of prompt and completion; 0 where the server gives no such count."""
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if isinstance(count, int) and count >= 0 else 0 for count in counts)
    return prompt, completion
