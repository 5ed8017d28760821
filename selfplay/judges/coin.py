"""A coin flip for every completion: the control. Training on its pairs must bring no gain, else the metric is broken."""

import random
from collections.abc import Sequence

from selfplay.protocols import JudgeContext
from selfplay.types import Group, Judgement, derive_seed


class Coin:
    """Scores 0 or 1, a function of the context's seed, the prompt and the completion's place alone."""

    identity = "coin"

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> list[Judgement]:
        """One fair flip per completion."""
        return [Judgement(g.prompt.id, self._flips(g, context.seed)) for g in groups]

    def _flips(self, group: Group, seed: int) -> tuple[float, ...]:
        rng = random.Random(derive_seed(seed, "coin", group.prompt.id))
        return tuple(float(rng.random() < 0.5) for _ in group.completions)
