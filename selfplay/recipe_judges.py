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
    model_serializer,
    model_validator,
)

from selfplay.recipe_chat import ChatRecipe, ReasoningTags
from selfplay.recipe_reward import RewardModelRecipe
from selfplay.recipe_values import Revision, Section, TopP, check_revision


class VerifierRecipe(Section):
    """Named checks. The recipe's `checks` apply to every prompt, beside the checks that a prompt carries. `ifeval` is how
    instructions of IFEval are read: as they stand, or loosely.
    """

    kind: Literal["verifier"]
    checks: list[dict[str, Any]] = []
    score: Literal["share", "all"] = "share"
    truncated_fails: bool = True
    ifeval: Literal["strict", "loose"] = "strict"


DRAWN = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 256}  # how a judge's texts are drawn


# What may be asked: a name of these always means the shipped template, whatever lies beside the recipe.
SHIPPED_TEMPLATES = ("additive", "yes_no", "pairwise_helpfulness", "correctness", "safety")

# How a model's verdict is had: read from free text, from the probabilities of the template's labels, or from text that can
# be nothing but a verdict.
VerdictWay = Literal["parse", "labels", "constrained"]


class LLMJudgeRecipe(Section):
    """A model reads the completion. `model: policy` is the current policy, on the engine that is already loaded; of any other
    model `chat` says how messages become tokens, as the recipe's own section `chat` does of the policy, and of a hub id
    `model_revision` which version. `template` is one of SHIPPED_TEMPLATES, or else a file, such as ./safety. `verdict: labels`
    draws no text, and temperature, top_p and max_tokens are None.
    """

    kind: Literal["llm"]
    model: str = "policy"
    model_revision: Revision | None = None
    chat: ChatRecipe | None = None
    template: str = "additive"
    system_prompt: str | None = None
    verdict: VerdictWay = "parse"
    num_verdicts: PositiveInt = 1
    temperature: NonNegativeFloat | None = None
    top_p: TopP | None = None
    max_tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def _own_chat(self) -> "LLMJudgeRecipe":
        if self.chat is not None and self.model == "policy":
            raise ValueError(
                "chat is of a judge model of its own; how the policy is asked stands in the recipe's section chat"
            )
        if self.chat is not None and self.chat.reasoning_tags is not None and self.verdict != "parse":
            raise ValueError(
                f"verdict: {self.verdict} leaves no room for thinking, so chat.reasoning_tags changes nothing: leave it out"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _drawn(cls, data: Any) -> Any:
        """Fills how texts are drawn, and refuses it where none are."""
        if not isinstance(data, dict):
            return data
        if data.get("verdict", "parse") != "labels":
            return data | {key: value for key, value in DRAWN.items() if data.get(key) is None}
        if given := [key for key in DRAWN if data.get(key) is not None]:
            raise ValueError(f"{', '.join(given)}: verdict: labels draws no text. Remove it, or say verdict: parse")
        return data

    @model_validator(mode="after")
    def _revision_of_a_hub_id(self) -> "LLMJudgeRecipe":
        if self.model == "policy" and self.model_revision is not None:
            raise ValueError(f"model_revision is {self.model_revision}, but model: policy is the run's own: drop it")
        check_revision(self.model, self.model_revision)
        return self


def _check_drawn(judge: Section, verdict: VerdictWay) -> None:
    """ValueError for a key that says how verdicts are drawn where none are."""
    if verdict != "labels":
        return
    for name in ("temperature", "top_p", "max_tokens"):
        if dict(judge)[name] != type(judge).model_fields[name].default:
            raise ValueError(f"verdict: labels draws nothing, so {name} changes nothing: leave it out")


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
    stage asks: the judging of a round, of a panel, or of a panel's greedy completions. `send_seed: false` is for servers that
    refuse the field. Prices are per million tokens, in any currency. `verdict: labels` reads the `top_logprobs` most probable
    first tokens; `constraint` says in which field of a request `verdict: constrained` stands: OpenAI's response_format, or
    vLLM's structured_outputs. `reasoning_tags` enclose the thinking that a server leaves in a reply's text: the verdict is read
    from what follows it, and there is none where it has no end. Where the server's chat template itself opens the thinking,
    they must be named, [<think>, </think>] too: a reply that max_tokens cut within it has neither tag.
    """

    kind: Literal["api"]
    base_url: Annotated[str, AfterValidator(_base_url)]
    model: Annotated[str, Field(min_length=1)]
    api_key_env: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")] | None = None
    template: str = "additive"
    system_prompt: str | None = None
    verdict: VerdictWay = "parse"
    constraint: Literal["response_format", "structured_outputs"] = "response_format"
    top_logprobs: Annotated[int, Field(ge=2, le=20)] = 20
    num_verdicts: PositiveInt = 1
    temperature: NonNegativeFloat = 0.7
    top_p: TopP = 0.9
    max_tokens: PositiveInt = 256
    reasoning_tags: ReasoningTags | None = None
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

    @model_validator(mode="after")
    def _read_by_verdict(self) -> "ApiJudgeRecipe":
        _check_drawn(self, self.verdict)
        for name, way in (("constraint", "constrained"), ("top_logprobs", "labels")):
            if self.verdict != way and dict(self)[name] != type(self).model_fields[name].default:
                raise ValueError(f"{name} is read with verdict: {way} alone: leave it out")
        if self.reasoning_tags is not None and self.verdict == "labels":
            raise ValueError("verdict: labels reads the first token, so reasoning_tags changes nothing: leave it out")
        return self


# Where things lie that have their content in the judge's identity.
JUDGE_PLACES = ("target", "template", "model", "model_revision", "chat_template", "chat.chat_template")

# What may change on a run that goes on: when and how often is asked, never what. `timeout` is also a python judge's.
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
    """A function or object of the user: "file.py:name" or "package.module:name". Runs only with --allow-code.

    `timeout` is how many seconds may pass without a verdict, by default any: of a function that is one call (of several
    side by side, the one that ends first), of an object a shard of prompts, which it judges in one call.
    """

    kind: Literal["python"]
    target: Annotated[str, Field(pattern=r"^[^:]+:[A-Za-z_]\w*$")]
    timeout: PositiveFloat | None = None


class RougeLRecipe(Section):
    """ROUGE-L with the gold answer, in [0, 1]."""

    kind: Literal["rouge_l"]


class SimilarityRecipe(Section):
    """Cosine of the sentence embeddings of completion and gold answer, in [-1, 1]. `model` is a folder or hub id of
    sentence-transformers.
    """

    kind: Literal["similarity"]
    model: Annotated[str, Field(min_length=1)]


class CoinRecipe(Section):
    """A coin flip for every completion: the control that must bring no gain."""

    kind: Literal["coin"]


OneJudge = (
    VerifierRecipe
    | LLMJudgeRecipe
    | ApiJudgeRecipe
    | RewardModelRecipe
    | PythonJudgeRecipe
    | RougeLRecipe
    | SimilarityRecipe
    | CoinRecipe
)


class MemberRecipe(Section):
    """One of several judges. In a recipe the judge's own keys stand beside `weight`."""

    judge: Annotated[OneJudge, Field(discriminator="kind")]
    weight: PositiveFloat = 1.0

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        judge = {key: value for key, value in data.items() if key != "weight"}
        return {"judge": judge} | ({"weight": data["weight"]} if "weight" in data else {})

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return self.judge.model_dump(mode="json") | {"weight": self.weight}


class CombineRecipe(Section):
    """Several judges of the same completions. `how` makes one score of theirs: their mean by `weight`, or the smallest.
    `normalize` is done to each judge's scores before, within the completions of a prompt: none; z_score (mean 0, standard
    deviation 1); rank (the share of the other completions that it beats, a tie half). Scores of different scales need one of
    the two, so a recipe always says.
    """

    kind: Literal["combine"]
    how: Literal["weighted_mean", "min"]
    normalize: Literal["none", "z_score", "rank"]
    judges: Annotated[list[MemberRecipe], Field(min_length=2)]

    @model_validator(mode="after")
    def _consistent(self) -> "CombineRecipe":
        if self.how == "min" and any(member.weight != 1 for member in self.judges):
            raise ValueError("how: min reads no weight: remove it, or say how: weighted_mean")
        members = [member.judge for member in self.judges]
        if any(member in members[:n] for n, member in enumerate(members)):
            raise ValueError("judges: the same judge is there twice; give it a larger weight")
        return self


JudgeRecipe = Annotated[OneJudge | CombineRecipe, Field(discriminator="kind")]


def judges_in(judge: JudgeRecipe | None) -> list[OneJudge]:
    """The judge, or the members of a combination; none where there is no judge."""
    if judge is None:
        return []
    return [member.judge for member in judge.judges] if isinstance(judge, CombineRecipe) else [judge]


def asks_policy(judge: JudgeRecipe | None) -> bool:
    """Whether the policy itself judges, alone or among others."""
    return any(isinstance(one, LLMJudgeRecipe) and one.model == "policy" for one in judges_in(judge))


def within_prompts(judge: JudgeRecipe | None) -> bool:
    """Whether scores say only which completion of a prompt is better, and nothing from one prompt or policy to another."""
    return isinstance(judge, CombineRecipe) and judge.normalize != "none"
