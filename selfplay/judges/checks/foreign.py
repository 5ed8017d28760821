"""The checks that other packages decide, each an extra of its own. They run in elsewhere.py's process, never in this one."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from selfplay.errors import RecipeError
from selfplay.judges.checks.ifeval import checkers, ifeval, ifeval_fault
from selfplay.judges.checks.math_answer import SECONDS, gold_fault, library, math_answer
from selfplay.judges.checks.reasoning_gym import reasoning_gym, task_fault, tasks


@dataclass(frozen=True, slots=True)
class ForeignCheck:
    """`value` scores a text in [0, 1] as a rule does, `fault` says what is wrong with a check's arguments and a gold answer."""

    value: Callable[..., float]
    fault: Callable[..., str]
    load: Callable[[], object]  # what takes long the first time
    package: str
    extra: str
    seconds: float = SECONDS  # for one text, where the check itself doesn't say

    def require(self, kind: str, where: str) -> None:
        """RecipeError where the package isn't installed."""
        if importlib.util.find_spec(self.package) is None:
            raise RecipeError(
                f'{where}: check {kind!r} needs the package {self.package}: pip install "selfplay-dpo[{self.extra}]"'
            )


FOREIGN = {
    "math_answer": ForeignCheck(math_answer, gold_fault, library, "math_verify", "math"),
    "ifeval": ForeignCheck(ifeval, ifeval_fault, checkers, "if_verifiable", "ifeval"),
    "reasoning_gym": ForeignCheck(reasoning_gym, task_fault, tasks, "reasoning_gym", "reasoning-gym"),
}
