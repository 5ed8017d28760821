"""ROUGE-L against the gold answer: a cheap figure for runs that have gold answers and no judge, such as SPIN."""

import re
from collections.abc import Sequence

from selfplay.protocols import JudgeContext
from selfplay.types import Group, Judgement


class RougeL:
    """Scores a completion in [0, 1] by ROUGE-L's F1 with the gold answer (Lin 2004): the longest common subsequence of
    lower-case words, its share of each side, their harmonic mean. Words are runs of letters and digits of any script, so in one
    without spaces, such as Chinese, a word is what stands between two marks; marks that combine with a letter end one.

    No verdict where there is nothing to compare with: the prompt has no gold answer, or that has no word. An empty completion
    has 0.
    """

    identity = "rouge_l v2"

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One judgement per group."""
        return [self._judge_group(group) for group in groups]

    def _judge_group(self, group: Group) -> Judgement:
        gold = group.prompt.gold
        scores = tuple(None if gold is None else rouge_l(c.text, gold) for c in group.completions)
        note = "no gold answer" if gold is None else "no word in the gold answer"
        return Judgement(group.prompt.id, scores, tuple(note if score is None else "" for score in scores))


def rouge_l(text: str, gold: str) -> float | None:
    """F1 of the longest common subsequence of words, in [0, 1]; 0 where `text` has none, None where `gold` has none."""
    a, b = words(text), words(gold)
    if not b:
        return None
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b))


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits, of any script."""
    return re.findall(r"[^\W_]+", text.lower())
