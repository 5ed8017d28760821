"""Groups and their judgements become preference pairs.

A completion enters a pair only where it ended by itself, is not empty, and differs from the other one. A completion
without a verdict never enters a scored pair.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from selfplay.errors import DataError, SelfplayError
from selfplay.protocols import PairSelector
from selfplay.recipe_judges import PairsRecipe
from selfplay.recipe_values import at_round
from selfplay.types import Completion, Drop, Group, Judgement, Message, PreferencePair, derive_seed


@dataclass(frozen=True, slots=True)
class Selection:
    """The pairs of a round, why prompts gave none, and how many completions could not be used, by reason."""

    pairs: tuple[PreferencePair, ...]
    drops: tuple[Drop, ...]
    unusable: dict[str, int] = field(default_factory=dict)


def unusable_reason(group: Group, index: int, judgement: Judgement | None) -> str | None:
    """Why completion `index` may not enter a pair; None where it may. Of equal texts the lowest-scored one may."""
    completion = group.completions[index]
    scores = judgement.scores if judgement is not None else (0.0,) * len(group.completions)
    reason = _own_reason(completion, scores[index])
    if reason is not None:
        return reason
    if judgement is None and group.gold is not None:
        if not group.gold.text.strip():
            return "empty gold answer"
        if completion.text == group.gold.text.strip():
            return "equal to gold"
    twins = [i for i, c in enumerate(group.completions) if c.text == completion.text and not _own_reason(c, scores[i])]
    return None if min(twins, key=lambda i: (scores[i] or 0.0, i)) == index else "equal to another"


def _own_reason(completion: Completion, score: float | None) -> str | None:
    if completion.finish_reason == "length":
        return "truncated"
    if not completion.text:
        return "empty"
    return "no verdict" if score is None else None


def usable(group: Group, judgement: Judgement | None) -> list[int]:
    """Indices of the completions that may enter a pair."""
    return [i for i in range(len(group.completions)) if unusable_reason(group, i, judgement) is None]


@dataclass(frozen=True, slots=True)
class BestVsWorst:
    """Pairs a best-scored completion with a worst-scored one: ties dropped, chosen - rejected >= min_margin.

    Where several completions share the best or the worst score, each is used once, and those closest in length are paired
    first, so that a pair teaches as little as it can about length.

    With `truncated="rejected"` truncated completions may be rejected. Then the worst ones are taken in an order drawn by a
    hash, so that truncated ones are met as often as they occur, each with the best one that is closest in length.
    """

    min_margin: float = 0.0
    max_pairs_per_prompt: int = 1
    truncated: Literal["drop", "rejected"] = "drop"

    def select(self, group: Group, judgement: Judgement | None) -> list[PreferencePair]:
        """At most max_pairs_per_prompt pairs of one group."""
        assert judgement is not None, "the recipe guarantees a judge"
        chosen = {i: s for i in usable(group, judgement) if (s := judgement.scores[i]) is not None}
        rejected = dict(chosen)
        if self.truncated == "rejected":
            cut = [i for i, c in enumerate(group.completions) if c.finish_reason == "length" and c.text]
            rejected |= {i: s for i in cut if (s := judgement.scores[i]) is not None}
        if not chosen:
            return []
        best, worst = max(chosen.values()), min(rejected.values())
        if best <= worst or best - worst < self.min_margin:
            return []
        text = [c.text for c in group.completions]
        ends = [c for c in chosen if chosen[c] == best], [r for r in rejected if rejected[r] == worst]
        edges = [(c, r) for c in ends[0] for r in ends[1] if text[c] != text[r]]
        edges.sort(key=lambda edge: self._order(group, *edge))
        pairs: list[PreferencePair] = []
        used: set[int] = set()
        for c, r in edges:
            if len(pairs) < self.max_pairs_per_prompt and not used & {c, r}:
                used |= {c, r}
                pairs.append(make_pair(group, chosen=c, rejected=r, judgement=judgement))
        return pairs

    def _order(self, group: Group, chosen: int, rejected: int) -> tuple[int, ...]:
        gap = abs(len(group.completions[chosen].token_ids) - len(group.completions[rejected].token_ids))
        if self.truncated == "rejected":
            return (derive_seed(group.prompt.id, "rejected", rejected), gap, chosen, rejected)
        return (gap, chosen, rejected)


@dataclass(frozen=True, slots=True)
class GoldVsCompletion:
    """SPIN (arXiv:2401.01335): the data set's gold answer is chosen, a completion of the policy is rejected. No judge."""

    max_pairs_per_prompt: int = 1

    def select(self, group: Group, judgement: Judgement | None) -> list[PreferencePair]:
        """At most max_pairs_per_prompt pairs of one group. DataError where the prompt has no gold answer."""
        if group.gold is None:
            raise DataError(
                f"prompt {group.prompt.id} ({group.prompt.source}) has no gold answer, which gold_vs_completion needs: "
                "name its column in prompts.gold_column"
            )
        indices = usable(group, None)[: self.max_pairs_per_prompt]
        return [make_pair(group, chosen=None, rejected=i, judgement=None) for i in indices]


def make_selector(recipe: PairsRecipe, round: int) -> PairSelector:
    """The selector that a recipe names, with the round's values."""
    most = at_round(recipe.max_pairs_per_prompt, round)
    if recipe.kind == "gold_vs_completion":
        return GoldVsCompletion(most)
    return BestVsWorst(at_round(recipe.min_margin, round), most, recipe.truncated)


def make_pair(group: Group, *, chosen: int | None, rejected: int | None, judgement: Judgement | None) -> PreferencePair:
    """The pair of two completions of a group, by index; None is its gold answer."""
    better, worse = _completion(group, chosen), _completion(group, rejected)
    scores = judgement.scores if judgement is not None else ()
    return PreferencePair(
        prompt_id=group.prompt.id,
        prompt=group.prompt.messages,
        chosen=(Message("assistant", better.text),),
        rejected=(Message("assistant", worse.text),),
        prompt_token_ids=group.prompt_token_ids,
        chosen_token_ids=better.token_ids,
        rejected_token_ids=worse.token_ids,
        chosen_index=chosen,
        rejected_index=rejected,
        chosen_score=scores[chosen] if scores and chosen is not None else None,
        rejected_score=scores[rejected] if scores and rejected is not None else None,
    )


def _completion(group: Group, index: int | None) -> Completion:
    completion = group.gold if index is None else group.completions[index]
    assert completion is not None, "a selector asked for a gold answer that isn't there"
    return completion


def select_pairs(
    selector: PairSelector,
    groups: Sequence[Group],
    judgements: Sequence[Judgement] | None,
    *,
    round: int = 0,
    judge: str = "",
) -> Selection:
    """All pairs of a round; every group gives pairs or a drop with its reason.

    SelfplayError where a selector pairs what does not belong together.
    """
    pairs: list[PreferencePair] = []
    drops: list[Drop] = []
    unusable: Counter[str] = Counter()
    for n, group in enumerate(groups):
        judgement = judgements[n] if judgements is not None else None
        assert judgement is None or judgement.prompt_id == group.prompt.id
        reasons = [unusable_reason(group, i, judgement) for i in range(len(group.completions))]
        found = [_checked(pair, group) for pair in selector.select(group, judgement)]
        used = {i for pair in found for i in (pair.chosen_index, pair.rejected_index)}
        unusable.update(reason for i, reason in enumerate(reasons) if reason is not None and i not in used)
        pairs += [replace(pair, origin_round=round, judge=judge) for pair in found]
        if not found:
            drops.append(Drop(group.prompt.id, _why_none(reasons, judgement)))
    return Selection(tuple(pairs), tuple(drops), dict(unusable))


def _why_none(reasons: list[str | None], judgement: Judgement | None) -> str:
    if reasons.count(None) < (1 if judgement is None else 2):
        return "too few usable completions"
    return "tie, or margin below min_margin"


def _checked(pair: PreferencePair, group: Group) -> PreferencePair:
    if pair.prompt_id != group.prompt.id or pair.prompt_token_ids != group.prompt_token_ids:
        raise SelfplayError(
            f"the pair selector returned a pair of prompt {pair.prompt_id} for prompt {group.prompt.id}"
        )
    if pair.chosen == pair.rejected or pair.chosen_token_ids == pair.rejected_token_ids:
        raise SelfplayError(
            f"the pair selector returned equal chosen and rejected completions for prompt {pair.prompt_id}"
        )
    if pair.margin is not None and pair.margin < 0:
        raise SelfplayError(f"the pair selector chose the lower-scored completion of prompt {pair.prompt_id}")
    return pair
