"""Every two completions whose scores are far enough apart."""

from dataclasses import dataclass

from selfplay.pairs.eligible import Draw, Truncated, reaches, scored
from selfplay.pairs.pair import first_pairs
from selfplay.types import Group, Judgement, PreferencePair


@dataclass(frozen=True, slots=True)
class AllAboveMargin:
    """Every two completions with chosen - rejected >= min_margin, as RS-DPO (arXiv:2402.10038) takes every two whose reward
    gap is above a threshold (its gap is sigmoid((s_i - s_j) / tau), which grows with the margin). min_margin 0 takes every two
    of different score; with two completions it is best_vs_worst. max_pairs_per_prompt draws among them.
    """

    min_margin: float
    max_pairs_per_prompt: int | None = None
    truncated: Truncated = "drop"
    seed: int = 0

    def select(self, group: Group, judgement: Judgement | None) -> list[PreferencePair]:
        """The pairs of one group, in the order of the draw."""
        found, draw = scored(group, judgement, truncated=self.truncated), Draw(self.seed, group)
        edges = [
            (c, r)
            for c, better in found.items()
            for r, worse in found.items()
            if better > worse and reaches(better - worse, self.min_margin)
        ]
        edges.sort(key=lambda edge: (draw.place(*edge), found[edge[0]], found[edge[1]]))
        return first_pairs(group, judgement, edges, self.max_pairs_per_prompt)
