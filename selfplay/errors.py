"""The exceptions of selfplay and the exit code of each.

    SelfplayError                 70  something inside selfplay is wrong
    ├── RecipeError               64  a recipe, a flag or an option
    ├── DataError                 65  a prompt file, a pair file, a model folder, a template
    ├── JudgeError                69  a judge raised, answered in the wrong shape, or its endpoint is down
    ├── GeneratorError            70  an engine died or answered in the wrong shape
    ├── TrainerError              70  a process that trains was killed or out of memory, more than once
    ├── StorageError              74  disk full, a folder that can't be written, a damaged file
    ├── Stopped                   75  the user asked to stop; the same command goes on
    ├── GateError                 76  going on would train on nonsense
    │   ├── UnparsedGateError     76  too many verdicts without a score
    │   ├── NoPairsError          76  a round made no pair
    │   ├── NonFiniteError        76  a loss or a gradient is NaN or infinite
    │   └── AuditError            76  trainer and engine, or policy and reference, disagree
    ├── SecurityError             77  code would run that nobody allowed
    └── LockedError               79  another process works on this run

A message says what is wrong, where, and what to change. Everything a user can cause is one of these;
`assert` is for what only we can cause.
"""


class SelfplayError(Exception):
    exit_code = 70


class RecipeError(SelfplayError):
    exit_code = 64


class DataError(SelfplayError):
    exit_code = 65


class JudgeError(SelfplayError):
    exit_code = 69


class GeneratorError(SelfplayError):
    exit_code = 70


class TrainerError(SelfplayError):
    exit_code = 70


class StorageError(SelfplayError):
    exit_code = 74


class Stopped(SelfplayError):  # noqa: N818 - no error: the user asked
    exit_code = 75


class GateError(SelfplayError):
    exit_code = 76


class UnparsedGateError(GateError):
    pass


class NoPairsError(GateError):
    pass


class NonFiniteError(GateError):
    pass


class AuditError(GateError):
    pass


class SecurityError(SelfplayError):
    exit_code = 77


class LockedError(SelfplayError):
    exit_code = 79
