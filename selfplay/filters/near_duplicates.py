"""Pairs that say almost the same as another one."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from selfplay.protocols import FilterContext
from selfplay.types import PreferencePair, derive_seed

Tokens = tuple[int, ...]
Grams = frozenset[Tokens]
Held = tuple[int, int, int]  # index of a pair, place of the n-gram in the order of its set, size of the set


def ngrams(tokens: Tokens, n: int) -> Grams:
    """All runs of n tokens; the whole where it is shorter."""
    return frozenset(tokens[i : i + n] for i in range(max(1, len(tokens) - n + 1)))


def jaccard(one: Grams, other: Grams) -> float:
    """Shared over all, in [0, 1]."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Of pairs with a similarity of at least `threshold` one goes on, the newest round's; within a round that of a prompt
    which is drawn, and of one prompt the first. The similarity of two pairs is the smallest of three Jaccard similarities of
    token n-gram sets: of their prompts, their chosen and their rejected completions. So pairs that share a prompt and a chosen
    completion are near duplicates only where their rejected ones are alike too. Threshold 1 drops pairs whose n-gram sets are
    all equal.
    """

    ngram: int = 3
    threshold: float = 0.8

    def __call__(self, pairs: Sequence[PreferencePair], context: FilterContext, /) -> list[PreferencePair]:
        """The pairs that are near no pair taken before them, in the order given."""
        # sets are made when they are compared and not kept: those of 100,000 pairs would fill gigabytes
        rarity = Counter(gram for pair in pairs for gram in ngrams(pair.chosen_token_ids, self.ngram))
        kept: list[int] = []
        holders: defaultdict[Tokens, list[Held]] = defaultdict(list)  # kept pairs by a rare n-gram of their chosen
        for index in _newest_first(pairs, context.seed):
            size, prefix = self._prefix(ngrams(pairs[index].chosen_token_ids, self.ngram), rarity)
            if not any(self._near(pairs[index], pairs[other]) for other in self._likely(size, prefix, holders)):
                kept.append(index)
                for place, gram in enumerate(prefix):
                    holders[gram].append((index, place, size))
        return [pairs[index] for index in sorted(kept)]

    def _prefix(self, grams: Grams, rarity: Counter[Tokens]) -> tuple[int, list[Tokens]]:
        """The size of a set and its rarest n-grams, so many that two sets that reach the threshold share one of them: prefix
        filtering, exact, and far from comparing every two pairs.
        """
        ordered = sorted(grams, key=lambda gram: (rarity[gram], gram))
        return len(grams), ordered[: len(grams) - math.ceil(self.threshold * len(grams) - 1e-9) + 1]

    def _likely(self, size: int, prefix: list[Tokens], holders: Mapping[Tokens, list[Held]]) -> list[int]:
        """Kept pairs that may reach the threshold: n-grams have one order, so all that two sets share stands, in both, from
        the first shared one on.
        """
        likely: dict[int, bool] = {}
        for place, gram in enumerate(prefix):
            for other, other_place, other_size in holders.get(gram, ()):
                most = min(size - place, other_size - other_place)
                likely.setdefault(other, most >= self.threshold * (size + other_size - most) - 1e-9)
        return [other for other, may in likely.items() if may]

    def _near(self, one: PreferencePair, other: PreferencePair) -> bool:
        parts = (
            (one.chosen_token_ids, other.chosen_token_ids),
            (one.prompt_token_ids, other.prompt_token_ids),
            (one.rejected_token_ids, other.rejected_token_ids),
        )
        return all(jaccard(ngrams(a, self.ngram), ngrams(b, self.ngram)) >= self.threshold for a, b in parts)


def _newest_first(pairs: Sequence[PreferencePair], seed: int) -> list[int]:
    """Indices of the pairs, the newest round's first, prompts within a round in an order of their own: which of two near pairs
    goes on must not depend on the order in which prompts were dealt.
    """

    def place(index: int) -> tuple[int, int, str, int]:
        pair = pairs[index]
        return -pair.origin_round, derive_seed(seed, "near duplicates", pair.prompt_id), pair.prompt_id, index

    return sorted(range(len(pairs)), key=place)
