"""A generator without a model: the fake that tests and users write against. It ships with the package."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from selfplay.chat import Chat
from selfplay.types import Completion, Group, Prompt, Sampling, derive_seed

Script = Callable[[Prompt, int], str]  # (prompt, k) -> the text of completion k

WORDS = (
    "a",
    "and",
    "bee",
    "blue",
    "calm",
    "day",
    "for",
    "green",
    "hill",
    "is",
    "it",
    "leaf",
    "moon",
    "new",
    "sky",
    "sun",
)


class ScriptedGenerator:
    """Completions from `script`, or words picked by a hash of the seeds and the prompt: equal calls give equal groups.

    With a chat the token ids are the chat's, ended by its first stop token; without one they are the text's UTF-8 bytes.
    max_tokens cuts as a real engine does. There are no logps. `num_calls` and `num_completions` count the work done.
    """

    def __init__(
        self, chat: Chat | None = None, *, script: Script | None = None, seed: int = 0, encode_gold: bool = True
    ) -> None:
        self.chat = chat
        self.encode_gold = encode_gold
        self.num_calls = 0
        self.num_completions = 0
        self._script = script
        self._seed = seed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Does nothing: there is no engine."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, progress: Callable[[int, int], None] | None = None
    ) -> list[Group]:
        """One group per prompt, in the order of the prompts."""
        self.num_calls += 1
        groups = []
        tokens = 0
        for prompt in prompts:
            completions = tuple(self._completion(prompt, k, sampling) for k in range(sampling.num_completions))
            self.num_completions += len(completions)
            tokens += sum(len(c.token_ids) for c in completions)
            groups.append(self._group(prompt, completions))
            if progress is not None:
                progress(len(groups) * sampling.num_completions, tokens)
        return groups

    def _completion(self, prompt: Prompt, k: int, sampling: Sampling) -> Completion:
        text = self._script(prompt, k) if self._script else " ".join(self._words(prompt, k, sampling))
        if self.chat is None:
            ids: tuple[int, ...] = tuple(text.encode())
            if len(ids) <= sampling.max_tokens:
                return Completion(text, ids)
            cut = ids[: sampling.max_tokens]
            return Completion(bytes(cut).decode(errors="ignore"), cut, finish_reason="length")
        end = self.chat.stop_token_ids[0]
        ids = (*self.chat.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True), end)
        if len(ids) <= sampling.max_tokens:
            return self.chat.completion(ids, (), "stop", end, sampling.stop)
        return self.chat.completion(ids[: sampling.max_tokens], (), "length", None, sampling.stop)

    def _words(self, prompt: Prompt, k: int, sampling: Sampling) -> Iterator[str]:
        """3 to 18 words. Greedy completions of one prompt are equal, as an engine's are."""
        place = 0 if sampling.temperature == 0 else k
        digest = hashlib.sha512(str(derive_seed(self._seed, sampling.seed, prompt.id, place)).encode()).digest()
        yield from (WORDS[byte % len(WORDS)] for byte in digest[1 : 4 + digest[0] % 16])

    def _group(self, prompt: Prompt, completions: tuple[Completion, ...]) -> Group:
        if self.chat is not None:
            gold = self.chat.encode_gold(prompt) if self.encode_gold else None
            return Group(prompt, self.chat.encode_prompt(prompt), completions, gold)
        shown = "".join(f"{m.role}: {m.content}\n" for m in prompt.messages)
        gold = (
            None if prompt.gold is None else Completion(prompt.gold, tuple(prompt.gold.encode()), finish_reason="gold")
        )
        return Group(prompt, tuple(shown.encode()), completions, gold)
