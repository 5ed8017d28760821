"""The round of the benchmark `round`, the same for every peer: its sizes, and what it judges by. The shorter completion is
the better one, and the two pairs of completions that differ most are trained on.
"""

from collections.abc import Sequence
from itertools import permutations

import selfplay
from selfplay.types import Completion, Prompt

NUM_PROMPTS, NUM_COMPLETIONS, MAX_TOKENS = 16, 4, 96
BATCH_SIZE, MAX_PAIRS = 8, 2  # pairs of a step; of a prompt


def score(text: str) -> float:
    """Higher is better."""
    return -float(len(text))


@selfplay.pointwise
def shorter(prompt: Prompt, completion: Completion) -> float:
    """The same as selfplay calls it."""
    return score(completion.text)


def choose(scores: Sequence[float], *, max_pairs: int) -> list[tuple[int, int]]:
    """(chosen, rejected) of the pairs of one prompt, as top_k_vs_bottom_k with k = half of the completions picks them."""
    order = sorted(range(len(scores)), key=lambda n: -scores[n])
    half = len(order) // 2
    edges = [(c, r) for c, r in permutations(order, 2) if c in order[:half] and r in order[-half:]]
    edges = [(c, r) for c, r in edges if scores[c] > scores[r]]
    return sorted(edges, key=lambda edge: scores[edge[1]] - scores[edge[0]])[:max_pairs]
