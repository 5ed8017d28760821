"""The gold answer against completions of the policy."""

from dataclasses import dataclass
from typing import Literal

from selfplay.errors import DataError
from selfplay.pairs.eligible import Draw, usable
from selfplay.pairs.pair import Edge, first_pairs
from selfplay.types import Completion, Group, Judgement, PreferencePair


@dataclass(frozen=True, slots=True)
class GoldVsCompletion:
    """SPIN (arXiv:2401.01335): the data set's gold answer is chosen, a completion of the policy is rejected. No judge. Where a
    prompt has more completions than max_pairs_per_prompt, those are drawn; the paper samples one. Completions equal to the
    gold answer make no pair: a policy that writes gold answers only has nothing left to learn here.
    """

    max_pairs_per_prompt: int = 1
    truncated: Literal["drop", "rejected"] = "drop"
    seed: int = 0

    def select(self, group: Group, judgement: Judgement | None) -> list[PreferencePair]:
        """At most max_pairs_per_prompt pairs of one group. DataError where the prompt has no gold answer."""
        require_gold(group)
        indices = usable(group, None, keep_truncated=self.truncated == "rejected")
        draw = Draw(self.seed, group)
        edges: list[Edge] = [(None, i) for i in sorted(indices, key=draw.place)]
        return first_pairs(group, None, edges, self.max_pairs_per_prompt)


def require_gold(group: Group) -> Completion:
    """The gold answer of a group. DataError where its prompt has none, or was sampled for a pairing that needs none."""
    if group.gold is None and group.prompt.gold is not None:
        raise DataError(
            f"prompt {group.prompt.id} ({group.prompt.source}) has a gold answer, but its group was sampled without: generate "
            "it anew, with this pairing in the recipe"
        )
    if group.gold is None:
        raise DataError(
            f"prompt {group.prompt.id} ({group.prompt.source}) has no gold answer, which this pairing needs: "
            "name its column in prompts.gold_column"
        )
    return group.gold
