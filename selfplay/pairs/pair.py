"""From two completions of a group to a pair."""

from collections.abc import Iterable

from selfplay.types import Completion, Group, Judgement, Message, PreferencePair

Edge = tuple[int | None, int]  # chosen, rejected; None is the gold answer


def make_pair(group: Group, *, chosen: int | None, rejected: int | None, judgement: Judgement | None) -> PreferencePair:
    """The pair of two completions of a group, by index; None is its gold answer."""
    better, worse = completion_at(group, chosen), completion_at(group, rejected)
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


def completion_at(group: Group, index: int | None) -> Completion:
    """A completion of a group; None is its gold answer."""
    completion = group.gold if index is None else group.completions[index]
    assert completion is not None, "a selector asked for a gold answer that isn't there"
    return completion


def first_pairs(
    group: Group, judgement: Judgement | None, edges: Iterable[Edge], most: int | None
) -> list[PreferencePair]:
    """The first `most` pairs (None: all) of these edges; equal texts are no pair, and the same two texts make one pair only."""
    pairs: list[PreferencePair] = []
    seen: set[tuple[str, str]] = set()
    for chosen, rejected in edges:
        if most is not None and len(pairs) >= most:
            break
        texts = completion_at(group, chosen).text, completion_at(group, rejected).text
        if texts[0] != texts[1] and texts not in seen:
            seen.add(texts)
            pairs.append(make_pair(group, chosen=chosen, rejected=rejected, judgement=judgement))
    return pairs
