"""Where the rows of a round went, for each source of its prompts and for all together."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from selfplay.audit import NO_EVIDENCE, Evidence, audit
from selfplay.pairs import Selection
from selfplay.types import Group, Judgement

SUMMED = (
    "num_prompts",
    "num_completions",
    "num_tokens",
    "num_pairs_selected",
    "num_pairs",
    "num_pairs_of_earlier_rounds",
)


def source_figures(
    name: str,
    groups: Sequence[Group],
    judgements: Sequence[Judgement] | None,
    selection: Selection,
    evidence: Evidence = NO_EVIDENCE,
    *,
    round: int,
) -> dict[str, Any]:
    """The counts of one source in a round, the mean score of its completions, and the audit of its judge. A source of several
    that gives no pair at all is an alarm: the round trains without it.
    """
    counts = row_counts(groups, selection, round)
    audited = audit(groups, judgements, selection.pairs, evidence)
    if name and groups and not selection.num_own_prompts(round):
        why = "; ".join(sorted(counts["num_prompts_without_pair"]))
        audited["alarms"].append(f"none of its {len(groups)} prompts gave a pair ({why}): the round trains without it")
    return {"counts": counts, "mean_score": _mean_score(judgements or ()), "audit": audited}


def _mean_score(judgements: Sequence[Judgement]) -> float | None:
    num_scores = 0

    def known() -> Iterator[float]:
        nonlocal num_scores
        for judgement in judgements:
            for score in judgement.scores:
                if score is not None:
                    num_scores += 1
                    yield score

    total = sum(known())
    return total / num_scores if num_scores else None


def row_counts(groups: Sequence[Group], selection: Selection, round: int) -> dict[str, Any]:
    """Where the prompts and completions of one source went in a round, and how many pairs are left."""
    unused = dict(Counter(drop.reason for drop in selection.drops))
    num_completions = num_tokens = 0
    for group in groups:
        num_completions += len(group.completions)
        num_tokens += sum(len(completion.token_ids) for completion in group.completions)
    assert len(groups) == selection.num_own_prompts(round) + sum(unused.values())
    return {
        "num_prompts": len(groups),
        "num_completions": num_completions,
        "num_tokens": num_tokens,
        "num_unusable_completions": selection.unusable,
        "num_prompts_without_pair": unused,
        "num_pairs_selected": selection.num_selected,
        "filters": [asdict(count) for count in selection.filters],
        "num_pairs": len(selection.pairs),
        "num_pairs_of_earlier_rounds": selection.num_before(round),
    }


def all_counts(by_source: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of all sources together; a filter of one of several goes by the source's name and its own."""
    found: dict[str, Any] = {}
    for key in next(iter(by_source.values())):
        values = {name: counts[key] for name, counts in by_source.items()}
        if key in SUMMED:
            found[key] = sum(values.values())
        elif key == "filters":
            named = (
                (f"{name} {row['filter']}" if name else row["filter"], row) for name in values for row in values[name]
            )
            found[key] = [{**row, "filter": filter} for filter, row in named]
        else:
            found[key] = dict(sum((Counter(reasons) for reasons in values.values()), Counter()))
    return found
