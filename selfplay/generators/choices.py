"""A completion that must be one of a few texts: which tokens may come next."""

from collections.abc import Callable, Iterable, Sequence

from selfplay.errors import GeneratorError


class Choices:
    """The texts as a trie of token ids. Each is spelled in the one way in which the tokenizer spells it, and ended by a
    stop token, so that a text which another one begins with can be drawn too.
    """

    def __init__(
        self, texts: Iterable[str], encode: Callable[[str], Sequence[int]], stop_token_ids: Iterable[int]
    ) -> None:
        """GeneratorError where nothing could end a choice, or a text has no tokens."""
        stops = frozenset(stop_token_ids)
        if not stops:
            raise GeneratorError("a request with choices needs a stop token to end them, and this engine has none")
        self._next: dict[tuple[int, ...], set[int]] = {}
        for text in texts:
            ids = tuple(encode(text))
            if not ids:
                raise GeneratorError(f"the choice {text!r} has no tokens")
            for n, token in enumerate(ids):
                self._next.setdefault(ids[:n], set()).add(token)
            self._next.setdefault(ids, set()).update(stops)

    def after(self, token_ids: Sequence[int]) -> list[int]:
        """The ids that may follow these, in order."""
        return sorted(self._next[tuple(token_ids)])
