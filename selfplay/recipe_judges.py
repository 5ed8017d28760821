"""The section `judge` of a recipe."""

import ipaddress
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from selfplay.recipe_reward import RewardModelRecipe
from selfplay.recipe_values import Section, TopP


class VerifierRecipe(Section):
    """Named checks. The recipe's `checks` apply to every prompt, beside the checks that a prompt carries."""

    kind: Literal["verifier"]
    checks: list[dict[str, Any]] = []
    score: Literal["share", "all"] = "share"
    truncated_fails: bool = True


class LLMJudgeRecipe(Section):
    """A model reads the completion. `model: policy` is the current policy, on the engine that is already loaded. `template` is
    a file or a shipped name: additive, yes_no, pairwise_helpfulness, correctness, safety.
    """

    kind: Literal["llm"]
    model: str = "policy"
    template: str = "additive"
    system_prompt: str | None = None
    verdict: Literal["parse", "labels"] = "parse"
    num_verdicts: PositiveInt = 1
    temperature: NonNegativeFloat = 0.7
    top_p: TopP = 0.9
    max_tokens: PositiveInt = 256


def _base_url(url: str) -> str:
    """`url` where it is one that may be asked. Messages don't repeat it: a key may stand in it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("no valid URL; write it like https://host/v1") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError("write it with its scheme and host, like https://host/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(
            "a user, a query or a fragment may hold a key: leave them out, and name a variable in api_key_env"
        )
    if is_link_local(host):
        raise ValueError("a link-local address is never asked")
    return url


def is_link_local(address: str) -> bool:
    """Whether `address` is an IP address in 169.254.0.0/16 or fe80::/10, where clouds keep machine credentials."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_link_local


class ApiJudgeRecipe(Section):
    """A model behind an OpenAI-compatible chat endpoint reads the completion. The key is in the environment variable that
    `api_key_env` names; without one none is sent. Times are seconds; `timeout` is for one call, `deadline` for all that one
    round or panel asks. `send_seed: false` is for servers that refuse the field. Prices are per million tokens, in any
    currency.
    """

    kind: Literal["api"]
    base_url: Annotated[str, AfterValidator(_base_url)]
    model: Annotated[str, Field(min_length=1)]
    api_key_env: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")] | None = None
    template: str = "additive"
    system_prompt: str | None = None
    num_verdicts: PositiveInt = 1
    temperature: NonNegativeFloat = 0.7
    top_p: TopP = 0.9
    max_tokens: PositiveInt = 256
    send_seed: bool = True
    max_concurrency: PositiveInt = 16
    requests_per_minute: PositiveFloat | None = None
    max_retries: NonNegativeInt = 5
    timeout: PositiveFloat = 120.0
    deadline: PositiveFloat = 14400.0
    prompt_price: NonNegativeFloat | None = None
    completion_price: NonNegativeFloat | None = None

    @model_validator(mode="after")
    def _prices(self) -> "ApiJudgeRecipe":
        if (self.prompt_price is None) != (self.completion_price is None):
            raise ValueError("give both prompt_price and completion_price, or neither")
        return self


# What may change on a run that goes on: when and how often is asked, never what.
API_CONDUCT = (
    "api_key_env",
    "max_concurrency",
    "requests_per_minute",
    "max_retries",
    "timeout",
    "deadline",
    "prompt_price",
    "completion_price",
)


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
    VerifierRecipe
    | LLMJudgeRecipe
    | ApiJudgeRecipe
    | RewardModelRecipe
    | PythonJudgeRecipe
    | RougeLRecipe
    | CoinRecipe,
    Field(discriminator="kind"),
]
