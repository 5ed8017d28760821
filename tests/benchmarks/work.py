"""What the benchmarks train on: pairs of random tokens whose lengths follow a published shape, the same for every peer.

Random tokens cost what real ones cost: no trainer here looks at their values. Symbols: P prompt tokens, R completion tokens,
K completions of a prompt, M pairs of a prompt.
"""

import math
import random
from dataclasses import dataclass

from selfplay.types import Message, PreferencePair

FIRST_ID, LAST_ID, END_ID = 100, 40_000, 2  # ordinary ids of a vocabulary of 49,152, and its end token
LEARNING_RATE, BETA = 1e-6, 0.1


@dataclass(frozen=True, slots=True)
class Work:
    """Pairs and how many of them make an optimizer step. One epoch."""

    pairs: tuple[PreferencePair, ...]
    pairs_per_step: int


def make_work(name: str, *, times: int = 1) -> Work:
    """The work of a training benchmark, with `times` as many pairs in as many steps. KeyError for another name."""
    draw = random.Random(0)
    if name in ("train-pair", "memory", "memory-double"):
        count = 16 if name == "memory-double" else 8
        step = 8 if name == "memory-double" else 4
        return Work(tuple(_pair(draw, n, _length(draw, 96, 0.6)) for n in range(count * times)), step * times)
    if name == "train-long-prompt":
        return Work(tuple(_pair(draw, n, _length(draw, 512, 0.4)) for n in range(6 * times)), 3 * times)
    num_pairs = {"train-group-m3": 3, "train-group-m6": 6}[name]
    pairs: list[PreferencePair] = []
    for n in range(3 * times):
        prompt, completions = _tokens(draw, 256), [(*_tokens(draw, 127), END_ID) for _ in range(4)]
        both = [(a, b) for i, a in enumerate(completions) for b in completions[i + 1 :]]
        # three pairs use all four completions: (0, 1), (0, 2), (0, 3)
        pairs += [_made(n, prompt, a, b) for a, b in both[:num_pairs]]
    return Work(tuple(pairs), num_pairs * times)


def one_step(work: Work) -> Work:
    """Its first step alone."""
    return Work(work.pairs[: work.pairs_per_step], work.pairs_per_step)


def _pair(draw: random.Random, number: int, prompt_length: int) -> PreferencePair:
    chosen, rejected = ((*_tokens(draw, _length(draw, 96, 0.6) - 1), END_ID) for _ in range(2))
    return _made(number, _tokens(draw, prompt_length), chosen, rejected)


def _made(number: int, prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> PreferencePair:
    nothing = (Message("user", ""),)
    return PreferencePair(f"p{number}", nothing, nothing, nothing, prompt, chosen, rejected)


def _length(draw: random.Random, median: float, sigma: float) -> int:
    return min(2048, max(8, round(draw.lognormvariate(math.log(median), sigma))))


def _tokens(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(FIRST_ID, LAST_ID) for _ in range(count))
