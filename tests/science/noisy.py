"""Judges of experiment B that are wrong on purpose, for recipes: judge: {kind: python, target: "noisy.py:flipped"}."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from selfplay import Completion, Group, JudgeContext, Judgement, Prompt, make_judge
from selfplay.recipe_judges import VerifierRecipe
from selfplay.types import derive_seed

SHARE = 0.2


@dataclass(frozen=True)
class Flipped:
    """The rules' verdicts, with `share` of those of a call turned round: the nearest whole number of them, by a hash of prompt,
    text and place, so that neither the order of groups nor the run's seed matters. A prompt may have several groups, as it has
    where judges are calibrated; a text that stands in several at the same place is one verdict.
    """

    share: float = SHARE

    @property
    def identity(self) -> str:
        return f"rules with {self.share:g} flipped"

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One judgement per group, of scores 0 and 1."""
        true = make_judge(VerifierRecipe(kind="verifier", score="all")).judge(groups, context)
        drawn = [
            [derive_seed("flip", group.prompt.id, completion.text, k) for k, completion in enumerate(group.completions)]
            for group in groups
        ]
        order = sorted({seed for own in drawn for seed in own})
        flipped = set(order[: round(self.share * len(order))])
        return [
            replace(one, scores=tuple(turned(s, seed in flipped) for s, seed in zip(one.scores, own, strict=True)))
            for one, own in zip(true, drawn, strict=True)
        ]


def turned(score: float | None, flip: bool) -> float | None:
    """1 - score where it is flipped; no verdict stays none."""
    return score if score is None or not flip else 1.0 - score


def shortest(prompt: Prompt, completion: Completion) -> float:
    """Shorter is better, in characters."""
    return -float(len(completion.text))


flipped = Flipped()
