"""IFEval's instructions (Zhou et al. 2023, arXiv:2311.07911), decided by if-verifiable (extra `ifeval`)."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

Ids = Annotated[Sequence[str], Field(min_length=1)]
FAULTS = (ValueError, TypeError, LookupError, AttributeError, re.error)


def ifeval(
    text: str,
    gold: str | None,
    *,
    instruction_id_list: Ids,
    kwargs: Sequence[Mapping[str, Any]] = (),
    loose: bool = False,
) -> float:
    """The share of the instructions that the text follows, in [0, 1]. `loose` also takes a text that follows one without its
    first or last line or its asterisks, as the paper's loose accuracy does.
    """
    from if_verifiable.common import evaluate_instructions

    _, scores = evaluate_instructions(text, list(instruction_id_list), _given(kwargs), "", checkers())
    return float(scores.partial_loose if loose else scores.partial_strict)


def ifeval_fault(
    gold: str | None, *, instruction_id_list: Ids, kwargs: Sequence[Mapping[str, Any]] = (), loose: bool = False
) -> str:
    """What is wrong with the instructions; empty where nothing is. The library passes over an unknown instruction and draws
    an argument that isn't given at random, so both are faults here.
    """
    if kwargs and len(kwargs) != len(instruction_id_list):
        return f"{len(instruction_id_list)} instructions, but kwargs for {len(kwargs)}"
    given = _given(kwargs) or [{}] * len(instruction_id_list)
    return next((f for id, own in zip(instruction_id_list, given, strict=True) if (f := _fault(id, own))), "")


def _fault(id: str, given: dict[str, Any]) -> str:
    if id not in checkers():
        return f"no instruction {id!r}; there are {', '.join(sorted(checkers()))}"
    checker = checkers()[id](id)
    try:
        checker.build_description(**given)
        wanted, taken = checker.get_instruction_args_keys(), checker.get_instruction_args() or {}
        if missing := [key for key in wanted if key not in given]:
            return f"instruction {id!r}: argument {missing[0]!r} is missing"
        if other := [key for key in wanted if isinstance(given[key], int) and taken[key] != given[key]]:
            return f"instruction {id!r}: {other[0]!r} can't be {given[other[0]]}"
        checker.check_following("One line of text. And another.")
    except FAULTS as error:
        if type(error) is LookupError:  # that is how NLTK says it; its message fills a page
            return f"instruction {id!r} needs a data set of NLTK: python -m nltk.downloader punkt_tab"
        return f"instruction {id!r} with {given}: {error}"
    return ""


def _given(kwargs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The arguments of each instruction; tables have a column for every argument there is, most of them empty."""
    return [{key: value for key, value in own.items() if value is not None} for own in kwargs]


@functools.cache
def checkers() -> Mapping[str, Any]:
    """The class of each instruction."""
    import langdetect
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    langdetect.DetectorFactory.seed = 0  # else the same text has another language every now and then
    found: Mapping[str, Any] = INSTRUCTION_DICT
    return found
