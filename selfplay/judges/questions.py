"""What a judge model is asked about groups, and what its verdicts become. Shared by the judges that ask a model (llm.py on
an engine, api.py over HTTP): where the words come from is their business.

A question has a place: (group, completion), or for a pairwise template (group, shown first, shown second). Pairwise
templates are asked about every two completions in both orders; lift.py undoes the swap and makes contradictions ties.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal

from selfplay.errors import RecipeError
from selfplay.judges.choices import read_choice, verdict_choices
from selfplay.judges.lift import win_rates
from selfplay.judges.template import JudgeTemplate
from selfplay.judges.unparsed import first_line
from selfplay.judges.verdicts import PARSER_VERSION, UNFINISHED, Verdict
from selfplay.types import Group, Judgement, Message, Sampling, derive_seed

Place = tuple[int, ...]
NO_REPLY = "a call got no reply"  # where other calls with the same question got one
Said = tuple[str | None, bool]  # what a model wrote, None where its thinking has no end, and whether max_tokens cut it


@dataclass(frozen=True, slots=True)
class Questions:
    """A template and how often each question is put. `system_prompt` stands in for the template's own; `constrained`
    verdicts are one of `choices`.
    """

    template: JudgeTemplate
    num_verdicts: int = 1
    system_prompt: str | None = None
    constrained: bool = False

    @property
    def needs_gold(self) -> bool:
        """Whether what is shown holds the gold answer. A system turn that `system_prompt` replaces is not shown."""
        shown = self.template if self.system_prompt is None else replace(self.template, system=None)
        return shown.needs_gold

    @property
    def choices(self) -> dict[str, float]:
        """What a constrained verdict may be, and the score of each; empty where verdicts are free."""
        return verdict_choices(self.template.head) if self.constrained else {}

    def identity(self, how: str) -> str:
        """Template, parser, `how` verdicts are drawn, system prompt."""
        head = self.template.head
        system = ""
        if self.system_prompt is not None:
            system = f" system:{hashlib.sha256(self.system_prompt.encode()).hexdigest()[:16]}"
        return f"template:{head.name} v{head.version} {self.template.digest} parser:{PARSER_VERSION} {how}{system}"

    def drawn(self, sampling: Sampling) -> str:
        """How texts are drawn, for an identity."""
        way = "constrained " if self.constrained else ""
        return f"{way}{self.num_verdicts}x T{sampling.temperature:g} p{sampling.top_p:g} max{sampling.max_tokens}"

    def ask(self, groups: Sequence[Group]) -> dict[Place, tuple[Message, ...] | Verdict]:
        """Every question as messages, or why it can't be put."""
        return {
            (g, *shown): self._messages(group, shown) for g, group in enumerate(groups) for shown in self._shown(group)
        }

    def count(self, groups: Sequence[Group]) -> int:
        """How many verdicts these groups take."""
        return self.num_verdicts * sum(len(self._shown(group)) for group in groups)

    def _shown(self, group: Group) -> list[Place]:
        """Which completions each question of a group shows, in which order."""
        pairwise = self.template.head.mode == "pairwise"
        return list(permutations(range(len(group.completions)), 2 if pairwise else 1))

    def _messages(self, group: Group, shown: Place) -> tuple[Message, ...] | Verdict:
        if not self._can_ask(group):
            return Verdict(None, "the template asks for the gold answer, and the prompt has none")
        messages = self.template.fill(group.prompt, *(group.completions[k] for k in shown))
        return messages if self.system_prompt is None else (Message("system", self.system_prompt), messages[-1])

    def seed(self, groups: Sequence[Group], place: Place, n: int, seed: int) -> int:
        """The seed of verdict `n` of a question: of the texts that it shows and not of their places, so that drawn verdicts
        know no order, and equal completions have equal ones.
        """
        group, head = groups[place[0]], self.template.head
        texts = [group.completions[k].text for k in place[1:]]
        return derive_seed(seed, f"{head.name} v{head.version}", group.prompt.id, *texts, n)

    def read(self, said: Sequence[Said]) -> Verdict:
        """The mean of the verdicts that can be read, with a note that lists them all where there were several."""
        return mean_verdict([self._read(text, cut) for text, cut in said])

    def _read(self, text: str | None, cut: bool) -> Verdict:
        if text is None:
            return Verdict(None, UNFINISHED)
        if choices := self.choices:
            return read_choice(text, choices, cut=cut)
        parse = self.template.head.parse
        assert parse is not None  # `check_readable` has seen to it
        return parse.read(text, cut=cut)

    def judgements(self, groups: Sequence[Group], verdicts: Mapping[Place, Verdict]) -> list[Judgement]:
        """One judgement per group from the verdict of every place."""
        judge = self._pairwise if self.template.head.mode == "pairwise" else self._pointwise
        return [self._counted(g, group, verdicts, judge(g, group, verdicts)) for g, group in enumerate(groups)]

    def _counted(self, g: int, group: Group, verdicts: Mapping[Place, Verdict], judgement: Judgement) -> Judgement:
        """The judgement with how many verdicts were asked for and why some of them are missing. Questions that the prompt
        can't be asked, for want of a gold answer, ask for none.
        """
        asked = [verdicts[g, *shown] for shown in self._shown(group)] if self._can_ask(group) else []
        unparsed: Counter[str] = Counter()
        for verdict in asked:
            num_missing = self.num_verdicts - sum(score is not None for score in verdict.drawn or (verdict.score,))
            reasons = verdict.missing
            if not reasons and verdict.score is None:
                reasons = (first_line(verdict.note),) * num_missing
            unparsed.update(reasons)
            unparsed[NO_REPLY] += num_missing - len(reasons)
        return replace(judgement, num_asked=self.num_verdicts * len(asked), unparsed=dict(+unparsed))

    def _can_ask(self, group: Group) -> bool:
        return not self.needs_gold or group.prompt.gold is not None

    def _pointwise(self, g: int, group: Group, verdicts: Mapping[Place, Verdict]) -> Judgement:
        row = [verdicts[g, k] for k in range(len(group.completions))]
        drawn = tuple(v.drawn for v in row if v.drawn)
        return Judgement(group.prompt.id, tuple(v.score for v in row), tuple(v.note for v in row), verdicts=drawn)

    def _pairwise(self, g: int, group: Group, verdicts: Mapping[Place, Verdict]) -> Judgement:
        asked = {(i, j): verdicts[g, i, j] for i, j in permutations(range(len(group.completions)), 2)}
        why = {shown: verdict.note for shown, verdict in asked.items() if verdict.score is None}
        found = win_rates(group, {shown: verdict.score for shown, verdict in asked.items()}, why)
        return replace(found, verdicts=tuple(v.drawn for v in asked.values() if v.drawn))


def mean_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """The mean of the verdicts that have a score; its note and `drawn` list them all where there were several."""
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    if len(verdicts) == 1:
        return verdicts[0]
    drawn = tuple(verdict.score for verdict in verdicts)
    missing = tuple(first_line(verdict.note) for verdict in verdicts if verdict.score is None)
    if not scores:
        return Verdict(None, f"none of {len(verdicts)} verdicts can be read: {verdicts[0].note}", drawn, missing)
    listed = " ".join("-" if score is None else f"{score:g}" for score in drawn)
    return Verdict(math.fsum(scores) / len(scores), f"verdicts {listed}", drawn, missing)


def check_labels(questions: Questions) -> None:
    """RecipeError where a template has no labels to look at, or where several verdicts would be the same."""
    head = questions.template.head
    if head.labels is None:
        raise RecipeError(
            f"judge.template: {head.name} has no `labels`; use verdict: parse, or add labels to the template."
        )
    if questions.num_verdicts != 1:
        raise RecipeError(
            f"judge.num_verdicts is {questions.num_verdicts}, but verdict: labels draws nothing; set it to 1."
        )


def check_asked(
    questions: Questions, *, verdict: Literal["parse", "labels", "constrained"], temperature: float
) -> None:
    """RecipeError where a template and the way in which verdicts are had don't fit."""
    if verdict == "labels":
        check_labels(questions)
    else:
        check_readable(questions, temperature)


def check_readable(questions: Questions, temperature: float) -> None:
    """RecipeError where verdicts can't be read from text, can't be constrained, or where several could not differ."""
    head = questions.template.head
    choices = questions.choices  # refuses a template without a list of them
    if head.parse is None and not choices:
        raise RecipeError(
            f"judge.template: {head.name} has no `parse`, so its verdict can't be read from free text; add one to the "
            "template, or use verdict: labels or constrained."
        )
    if questions.num_verdicts < 1:
        raise RecipeError(f"judge.num_verdicts is {questions.num_verdicts}; it must be at least 1.")
    if questions.num_verdicts > 1 and temperature == 0:
        raise RecipeError(
            f"judge.num_verdicts is {questions.num_verdicts}, but at temperature 0 all verdicts are equal; set it to 1."
        )
