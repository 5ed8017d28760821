"""Correct completions against incorrect ones."""

from dataclasses import dataclass

from selfplay.pairs.eligible import Draw, Truncated, reaches, scored
from selfplay.pairs.gold_vs_completion import require_gold
from selfplay.pairs.pair import Edge, first_pairs
from selfplay.types import Group, Judgement, PreferencePair


@dataclass(frozen=True, slots=True)
class CorrectVsIncorrect:
    """Iterative RPO (arXiv:2404.19733): K = max_pairs_per_prompt pairs drawn, without repeats, from all correct x incorrect
    ones of a prompt. Correct is a score of at least `correct_score`. With `add_gold` the data set's gold answer is one of the
    correct ones, so that a prompt on which the policy always fails gives pairs as well. A prompt on which it never fails gives
    none. With one correct and one incorrect completion it is best_vs_worst.
    """

    correct_score: float = 1.0
    max_pairs_per_prompt: int = 10
    add_gold: bool = False
    truncated: Truncated = "drop"
    seed: int = 0

    def select(self, group: Group, judgement: Judgement | None) -> list[PreferencePair]:
        """At most max_pairs_per_prompt pairs of one group. DataError where add_gold finds no gold answer."""
        correct, incorrect, found = self._sides(group, judgement)
        draw = Draw(self.seed, group)
        edges: list[Edge] = [(c, r) for c in correct for r in incorrect]
        edges.sort(key=lambda edge: (draw.place(*edge), found[edge[1]]))
        return first_pairs(group, judgement, edges, self.max_pairs_per_prompt)

    def why_none(self, group: Group, judgement: Judgement | None) -> str:
        """Which side of the pairs is missing."""
        correct, incorrect, _ = self._sides(group, judgement)
        if not correct:
            return "no correct completion"
        return "no incorrect completion" if not incorrect else "correct and incorrect completions have equal texts"

    def _sides(self, group: Group, judgement: Judgement | None) -> tuple[list[int | None], list[int], dict[int, float]]:
        found = scored(group, judgement, truncated=self.truncated)
        gold = require_gold(group).text.strip() if self.add_gold else ""
        correct: list[int | None] = [None] if gold else []
        # a completion with the gold answer's text is that answer once more, whatever its score
        same = {i for i, c in enumerate(group.completions) if gold and c.text == gold}
        correct += [c for c, score in found.items() if reaches(score, self.correct_score) and c not in same]
        incorrect = [r for r, score in found.items() if not reaches(score, self.correct_score) and r not in same]
        return correct, incorrect, found
