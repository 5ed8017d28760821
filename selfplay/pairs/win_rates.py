"""Best against worst, with the win rate of each for a loss that reads them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from selfplay.errors import JudgeError
from selfplay.pairs.best_vs_worst import BestVsWorst
from selfplay.types import Group, Judgement, PreferencePair

WinRateFrom = Literal["scores", "order", "bradley_terry"]


@dataclass(frozen=True, slots=True)
class WinRates:
    """SPPO (arXiv:2405.00675): the best completion against the worst, each with P(it beats a completion of the policy), the
    mean over all K judged completions of its group. As in the paper's mean over a row of K x K comparisons, a completion
    meets itself with 1/2: with K = 2 the rates are 3/4 and 1/4 at most.

    `win_rate_from` says what the judge's scores are:
    - scores: mean win rates over the K - 1 others, in [0, 1], as a pairwise judge gives; JudgeError where they are not. Of
      comparisons without a verdict those that have one are taken to speak for all, so that rates and scores have one order.
    - order: only their order counts: P(i beats j) is 1, 1/2 for equal scores, or 0.
    - bradley_terry: rewards: P(i beats j) = sigmoid(s_i - s_j).
    """

    win_rate_from: WinRateFrom = "scores"
    selector: BestVsWorst = field(default_factory=BestVsWorst)

    @property
    def truncated(self) -> str:
        """What becomes of completions that max_tokens cut."""
        return self.selector.truncated

    def select(self, group: Group, judgement: Judgement | None) -> list[PreferencePair]:
        """At most as many pairs of one group as the selector of best and worst makes."""
        found = self.selector.select(group, judgement)
        if not found:
            return []
        assert judgement is not None
        rates = self._rates(group, judgement.scores)
        pairs = []
        for pair in found:
            assert pair.chosen_index is not None
            assert pair.rejected_index is not None
            rate, other = rates[pair.chosen_index], rates[pair.rejected_index]
            pairs.append(replace(pair, chosen_win_rate=rate, rejected_win_rate=other))
        return pairs

    def _rates(self, group: Group, scores: Sequence[float | None]) -> dict[int, float]:
        """Win rates by index, in [0, 1]; completions without a verdict take no part."""
        found = {i: score for i, score in enumerate(scores) if score is not None}
        if self.win_rate_from != "scores":
            return {i: math.fsum(self._beats(s, t) for t in found.values()) / len(found) for i, s in found.items()}
        wrong = next((s for s in found.values() if not 0 <= s <= 1), None)
        if wrong is not None:
            raise JudgeError(
                f"prompt {group.prompt.id}: the score {wrong} is no win rate in [0, 1]. pairs.win_rate_from: scores needs a "
                "pairwise judge; take order, or bradley_terry for the scores of a reward model"
            )
        return {i: ((len(found) - 1) * s + 0.5) / len(found) for i, s in found.items()}

    def _beats(self, one: float, other: float) -> float:
        if self.win_rate_from == "order":
            return (1 + (one > other) - (one < other)) / 2
        return (1 + math.tanh((one - other) / 2)) / 2  # sigmoid, without overflow
