"""ROUGE-L against the gold answer: a cheap figure for runs that have gold answers and no judge, such as SPIN."""

import re
from collections.abc import Sequence

from selfplay.protocols import JudgeContext
from selfplay.types import Group, Judgement


class RougeL:
    """Scores a completion in [0, 1] by ROUGE-L's F1 with the gold answer (Lin 2004): the longest common subsequence of
    lower-case words, its share of each side, their harmonic mean. No verdict where the prompt has no gold answer.
    """

    identity = "rouge_l v1"

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One judgement per group."""
        return [self._judge_group(group) for group in groups]

    def _judge_group(self, group: Group) -> Judgement:
        gold = group.prompt.gold
        if gold is None:
            return Judgement(
                group.prompt.id, (None,) * len(group.completions), ("no gold answer",) * len(group.completions)
            )
        return Judgement(group.prompt.id, tuple(rouge_l(c.text, gold) for c in group.completions))


def rouge_l(text: str, gold: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1]; 0 where either side has no words."""
    a, b = words(text), words(gold)
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b)) if a and b else 0.0


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits, of any script."""
    return re.findall(r"[^\W_]+", text.lower())
