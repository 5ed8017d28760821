"""A verdict from the log-probabilities that an endpoint lists for its first token: the most probable ones alone, as text.

What is not listed is not guessed. A label that is missing can be as probable as the last token on the list, and a listed token
that a label begins with may be the first piece of that label. Where what the labels may so hold unseen could matter, there is
no verdict.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from selfplay.judges.verdicts import Verdict

# The share of the labels' probability that may be unseen: it bounds the error of a score, as a share of the labels' range.
MAX_UNSEEN = 0.05
ROUNDING = 1e-2  # by which listed probabilities may be above 1 together


def score_from_top(top: Sequence[tuple[str, float]], labels: Mapping[str, float], min_mass: float = 0.0) -> Verdict:
    """sum_i p_i v_i over the labels' values, p renormalised over the labels that `top` lists; white space around a token
    is no part of its text. `top` holds tokens and their logps (nats).

    None where the list is empty or no list of probabilities, the listed labels have less than `min_mass` together, or more
    than MAX_UNSEEN of the labels' probability may be unseen.
    """
    if not top:
        return Verdict(None, "the server lists no log-probabilities")
    masses: defaultdict[str, float] = defaultdict(float)
    for token, logp in top:
        masses[token.strip()] += math.exp(min(logp, 1.0))
    listed = math.fsum(masses.values())
    if not listed <= 1 + ROUNDING:  # also where one is NaN
        return Verdict(None, f"the listed probabilities are none\n{listed:.3g} together")
    values = {label.strip(): value for label, value in labels.items()}
    seen = {label: masses[label] for label in values if label in masses}
    mass = math.fsum(seen.values())
    unseen = _unseen(masses, values, min(math.exp(logp) for _, logp in top), 1 - listed)
    if mass == 0:
        return Verdict(None, "no label is among the tokens that the server lists\n" + _shown(top))
    if mass < min_mass:
        return Verdict(None, f"the labels together have less than {min_mass:g} probability\n{mass:.3g}")
    if unseen > MAX_UNSEEN * (mass + unseen):
        return Verdict(
            None,
            f"more than {MAX_UNSEEN:g} of the labels' probability may be in what the server does not list; ask for more "
            f"top_logprobs, or take labels that are single tokens\n{mass:.3g} listed, up to {unseen:.3g} not",
        )
    score = math.fsum(share * values[label] for label, share in seen.items()) / mass
    return Verdict(score, f"labels have probability {mass:.2f}")


def _unseen(masses: Mapping[str, float], labels: Mapping[str, float], last: float, rest: float) -> float:
    """The most probability that the labels can have beyond what is listed as theirs: `last` is the lowest one listed,
    `rest` all that is not listed.
    """
    pieces = [
        m for text, m in masses.items() if text and text not in labels and any(x.startswith(text) for x in labels)
    ]
    missing = sum(label not in masses for label in labels)
    return math.fsum(pieces) + min(missing * last, max(0.0, rest))


def _shown(top: Sequence[tuple[str, float]]) -> str:
    return " ".join(repr(token) for token, _ in top[:5])
