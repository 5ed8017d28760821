"""The records that flow through a round: prompts -> groups -> judgements -> pairs.

All are frozen; a stage makes new ones and never edits the old. On disk each is one JSON line whose keys are
the field names (store.py). Token ids are kept exactly as sampled and trained on as they are.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

FinishReason = Literal["stop", "length", "gold"]


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. `id` depends on messages and tools alone, so it is equal in every round and every run.

    `gold` is the data set's own completion. `checks` are what a verifier looks at: mappings with a `kind` and that
    kind's arguments. `source` names where the row came from; in a run of several sources it starts with the source's name and
    a colon.
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    gold: str | None = None
    checks: tuple[dict[str, Any], ...] = ()
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The last user turn: what a judge function usually wants to see."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of a prompt.

    `text` is what judges see: special tokens, a stop string and finished thinking (kept in `reasoning`) are cut
    off. `token_ids` are the sampled ids, the end token among them. `logps` are nats, one per token, of the raw
    distribution at temperature 1 whatever the sampling was; empty where nobody computed them.
    `finish_reason` is "length" where max_tokens cut the completion, "gold" where the data set wrote it.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logps: tuple[float, ...] = ()
    finish_reason: FinishReason = "stop"
    stop_reason: int | str | None = None
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """The completions of one prompt. `gold` is the prompt's gold answer as tokens, where it has one."""

    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    gold: Completion | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """A score per completion of a group, in its order; higher is better. None means no verdict, and never a number.

    `notes` says per completion why there is no verdict, or what the judge remarked. Of a pairwise judge `num_compared` is
    how many comparisons have a verdict in both orders, and `num_flipped` in how many of these the orders contradict.
    `verdicts` are those drawn on each question, where there were several: how far they agree says how sure the judge is.

    `num_asked` is how many verdicts the scores come from, and `unparsed` counts those of them that could not be had, by
    reason: both orders of every comparison, every draw of a question. Without it there was one verdict for each
    completion, its score (judges/unparsed.py). `completions_digest` says which completions these are the scores of; it is
    put in where judgements enter.
    """

    prompt_id: str
    scores: tuple[float | None, ...]
    notes: tuple[str, ...] = ()
    num_compared: int = 0
    num_flipped: int = 0
    verdicts: tuple[tuple[float | None, ...], ...] = ()
    num_asked: Annotated[int | None, Field(exclude_if=lambda count: count is None)] = None
    unparsed: Annotated[dict[str, int], Field(exclude_if=lambda counts: not counts)] = field(default_factory=dict)
    completions_digest: Annotated[str, Field(exclude_if=lambda digest: not digest)] = ""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A better and a worse completion of one prompt. `prompt`, `chosen` and `rejected` are message lists: the Hub's
    conversational preference format, which any other DPO trainer reads.

    An index is the place in the group of round `origin_round`, None for the gold answer. A score is None where no judge was
    asked. A win rate is P(the completion beats one of the policy), in [0, 1]; None where the selector gives none.
    `weight` multiplies the loss of the pair. `source` is the name of the prompt's source, where a run has several.
    """

    prompt_id: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    prompt_token_ids: tuple[int, ...]
    chosen_token_ids: tuple[int, ...]
    rejected_token_ids: tuple[int, ...]
    chosen_index: int | None = None
    rejected_index: int | None = None
    chosen_score: float | None = None
    rejected_score: float | None = None
    chosen_win_rate: float | None = None
    rejected_win_rate: float | None = None
    weight: float = 1.0
    origin_round: int = 0
    judge: str = ""
    source: Annotated[str, Field(exclude_if=lambda name: not name)] = ""

    @property
    def margin(self) -> float | None:
        """Chosen score minus rejected score; None where either is missing."""
        if self.chosen_score is None or self.rejected_score is None:
            return None
        return self.chosen_score - self.rejected_score

    @property
    def completions(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of what is trained on: chosen, rejected."""
        return self.chosen_token_ids, self.rejected_token_ids


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A completion to imitate, with none beside it: what the loss `sft` trains on. `prompt` and `completion` are message
    lists: the Hub's conversational prompt-completion format.
    """

    prompt_id: str
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    weight: float = 1.0

    @property
    def completions(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of what is trained on."""
        return (self.completion_token_ids,)


TrainRow = PreferencePair | Demonstration


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. Temperature 0 is greedy. `seed` belongs to a stage of a round; completion k of a
    prompt is drawn with `derive_seed(seed, prompt.id, k)`, so its text depends on no other prompt.
    """

    num_completions: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Drop:
    """A row that left a stage, why, and where it was read, where that is known. Rows in = rows out + drops, checked in
    code.
    """

    id: str
    reason: str
    source: str = ""


def prompt_id(messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...] | None = None) -> str:
    """16 hex digits of the SHA-256 of what the model is shown."""
    shown: Mapping[str, Any] = {"messages": [[m.role, m.content] for m in messages], "tools": tools}
    text = json.dumps(shown, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def completions_digest(completions: Iterable[Completion]) -> str:
    """16 hex digits of the SHA-256 of their texts, in order."""
    # ASCII, so that a lone surrogate in a text does no harm
    text = json.dumps([completion.text for completion in completions], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^31) from any parts. A hash, because engines give child k of seed s the seed s + k: consecutive
    seeds would make different prompts share their noise.
    """
    text = json.dumps(parts, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFFFFFF
