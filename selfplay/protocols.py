"""What a user may implement: a Generator, a Judge, a PairSelector, a PairFilter. A plain function is enough for a filter and
for most judges: see `selfplay.pointwise` and `selfplay.pairwise` in judges/lift.py.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from selfplay.types import Group, Judgement, PreferencePair, Prompt, Sampling


@runtime_checkable
class Generator(Protocol):
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, progress: Callable[[int, int], None] | None = None
    ) -> Iterable[Group]:
        """One group per prompt with `sampling.num_completions` completions each, in any order. `progress` is called with
        the completions and the tokens done so far.
        """
        ...


@dataclass(frozen=True, slots=True)
class JudgeContext:
    """What a judge may use: the round (0-based, -1 for the initial panel), a seed for its own randomness, the policy's
    generator while it is loaded, and `progress`, to be called with the verdicts that are done in this call so far.
    """

    round: int = 0
    seed: int = 0
    generator: Generator | None = None
    progress: Callable[[int], None] = lambda done: None


@runtime_checkable
class Judge(Protocol):
    @property
    def identity(self) -> str:
        """A text that changes when the judge's verdicts could: it names kind, model, template, source digest."""
        ...

    def judge(self, groups: Sequence[Group], context: JudgeContext) -> Sequence[Judgement]:
        """One judgement per group, in the groups' order."""
        ...


@runtime_checkable
class StagedJudge(Protocol):
    """A judge that does something once a stage, which is several calls of `judge`: keeps what it paid for, counts."""

    def stage(self, folder: Path, note: Callable[[str], None]) -> AbstractContextManager[object]:
        """A block around all calls of a stage. `folder` is that of its judgements; `note` says one line to the user."""
        ...


@runtime_checkable
class CountingJudge(Protocol):
    """A judge that says on the way how far it is, through `context.progress`."""

    def count_verdicts(self, groups: Sequence[Group]) -> int | None:
        """How many verdicts these groups take; None where it will not say on the way."""
        ...


@runtime_checkable
class ComparingJudge(Protocol):
    """A judge that may compare the completions of a group with each other, instead of scoring each by itself."""

    @property
    def compares(self) -> bool:
        """Whether its scores are win rates in [0, 1] among the completions of a group, which say nothing from one policy to
        another. On the panel such a judge compares with the initial policy: it is shown groups of two.
        """
        ...


@runtime_checkable
class PairSelector(Protocol):
    def select(self, group: Group, judgement: Judgement | None) -> Sequence[PreferencePair]:
        """The pairs of one group; none is fine. `judgement` is None only where the recipe has no judge."""
        ...


@dataclass(frozen=True, slots=True)
class FilterContext:
    """What a filter may use: the round (0-based), a seed for its own draws, and the pairs that an earlier round made itself
    and kept after its filters, by round.
    """

    round: int = 0
    seed: int = 0
    previous: Callable[[int], Sequence[PreferencePair]] = lambda round: ()


class PairFilter(Protocol):
    def __call__(self, pairs: Sequence[PreferencePair], context: FilterContext, /) -> Sequence[PreferencePair]:
        """The pairs of a round that go on to training, in that order. A filter may leave pairs out, weigh them anew, and add
        pairs of earlier rounds; it makes none.
        """
        ...
