"""Each of the k best completions against each of the k worst."""

from dataclasses import dataclass

from selfplay.pairs.eligible import Draw, Truncated, reaches, scored
from selfplay.pairs.pair import first_pairs
from selfplay.types import Group, Judgement, PreferencePair


@dataclass(frozen=True, slots=True)
class TopKVsBottomK:
    """Each of the k best-scored completions against each of the k worst-scored, where the margin is reached, by falling
    margin: more pairs of a prompt than best_vs_worst makes, and the middle stays out. No paper's rule; k = 1 is one best
    against one worst completion. Equal scores are ordered by a draw. Where fewer than 2k are usable the top is filled first.
    """

    k: int
    min_margin: float = 0.0
    max_pairs_per_prompt: int | None = None
    truncated: Truncated = "drop"
    seed: int = 0

    def select(self, group: Group, judgement: Judgement | None) -> list[PreferencePair]:
        """At most min(k * k, max_pairs_per_prompt) pairs of one group."""
        found, draw = scored(group, judgement, truncated=self.truncated), Draw(self.seed, group)
        top = sorted(found, key=lambda c: (-found[c], draw.place(c)))[: self.k]
        rest = [r for r in found if r not in top]
        bottom = sorted(rest, key=lambda r: (found[r], draw.place(r)))[: self.k]
        margins = {(c, r): found[c] - found[r] for c in top for r in bottom}
        edges = [edge for edge, margin in margins.items() if margin > 0 and reaches(margin, self.min_margin)]
        edges.sort(key=lambda edge: (-margins[edge], draw.place(*edge)))
        return first_pairs(group, judgement, edges, self.max_pairs_per_prompt)
