"""The best-scored completion against the worst-scored one."""

from dataclasses import dataclass

from selfplay.pairs.eligible import Draw, Truncated, reaches, scored
from selfplay.pairs.pair import make_pair
from selfplay.types import Group, Judgement, PreferencePair


@dataclass(frozen=True, slots=True)
class BestVsWorst:
    """Pairs a best-scored completion with a worst-scored one: ties dropped, chosen - rejected >= min_margin. The pairing of
    Self-Rewarding LMs (arXiv:2401.10020). With two completions it is the judge's plain verdict.

    Where several completions share the best or the worst score, each is used once, and those closest in length are paired
    first, so that a pair teaches as little as it can about length; what is left open is drawn.

    With `length_rho` = rho lengths are controlled by the rule of Meta-Rewarding (arXiv:2407.19594): chosen is the shortest
    completion with score >= (1 - rho) max + rho min, rejected the longest with score <= (1 - rho) min + rho max, in tokens,
    of those that reach min_margin together. rho = 0 takes the shortest of the best and the longest of the worst.
    """

    min_margin: float = 0.0
    max_pairs_per_prompt: int = 1
    truncated: Truncated = "drop"
    length_rho: float | None = None
    seed: int = 0

    def select(self, group: Group, judgement: Judgement | None) -> list[PreferencePair]:
        """At most max_pairs_per_prompt pairs of one group."""
        found = scored(group, judgement, truncated=self.truncated)
        if not found:
            return []
        best, worst = max(found.values()), min(found.values())
        if best <= worst or not reaches(best - worst, self.min_margin):
            return []
        text = [c.text for c in group.completions]
        pairs: list[PreferencePair] = []
        used: set[int] = set()
        for c, r in self._edges(group, found, best, worst):
            if len(pairs) < self.max_pairs_per_prompt and not used & {c, r} and text[c] != text[r]:
                used |= {c, r}
                pairs.append(make_pair(group, chosen=c, rejected=r, judgement=judgement))
        return pairs

    def _edges(self, group: Group, found: dict[int, float], best: float, worst: float) -> list[tuple[int, int]]:
        """(chosen, rejected) in the order in which they are taken."""
        length, draw = [len(c.token_ids) for c in group.completions], Draw(self.seed, group)
        if self.length_rho is None:
            tiers = [c for c, s in found.items() if s == best], [r for r, s in found.items() if s == worst]
            edges = [(c, r) for c in tiers[0] for r in tiers[1]]
            return sorted(edges, key=lambda edge: (abs(length[edge[0]] - length[edge[1]]), draw.place(*edge)))
        rho = self.length_rho
        high, low = (1 - rho) * best + rho * worst, (1 - rho) * worst + rho * best
        edges = [
            (c, r)
            for c, better in found.items()
            for r, worse in found.items()
            if reaches(better, high)
            and reaches(-worse, -low)
            and better > worse
            and reaches(better - worse, self.min_margin)
        ]
        return sorted(
            edges,
            key=lambda edge: (length[edge[0]], -length[edge[1]], draw.place(*edge), found[edge[1]]),
        )
