"""The best-scored completion against others drawn at random."""

from dataclasses import dataclass

from selfplay.pairs.eligible import Draw, Truncated, reaches, scored
from selfplay.pairs.pair import first_pairs
from selfplay.types import Group, Judgement, PreferencePair


@dataclass(frozen=True, slots=True)
class BestVsRandom:
    """The pairing of Zephyr (arXiv:2310.16944): the best-scored completion is chosen, one drawn from those that score less by
    min_margin is rejected; with more pairs per prompt several are, each once. Of equally good ones the chosen is drawn too.
    With two completions it is best_vs_worst.
    """

    min_margin: float = 0.0
    max_pairs_per_prompt: int = 1
    truncated: Truncated = "drop"
    seed: int = 0

    def select(self, group: Group, judgement: Judgement | None) -> list[PreferencePair]:
        """At most max_pairs_per_prompt pairs of one group, all with the same chosen."""
        found, draw = scored(group, judgement, truncated=self.truncated), Draw(self.seed, group)
        if not found:
            return []
        best = max(found.values())
        chosen = min((c for c, score in found.items() if score == best), key=draw.place)
        lower = [r for r, score in found.items() if score < best and reaches(best - score, self.min_margin)]
        lower.sort(key=lambda r: (draw.place(r), found[r]))
        return first_pairs(group, judgement, [(chosen, r) for r in lower], self.max_pairs_per_prompt)
