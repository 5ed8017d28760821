"""What the log of an engine's child process says of its end.

On a GPU vLLM works in processes of its own below that child. What ends one of them is a traceback in the log, and all that the
child itself raises in the end is "see above", after forty lines of its own stack.
"""

import re
from collections.abc import Sequence

TAIL_LINES = 30
MAX_ERRORS = 5
MAX_LENGTH = 1000  # of one error

# vLLM's processes head their lines: "(EngineCore pid=31033) ERROR 11-23 19:28:18 [core.py:1510] text"
_HEAD = re.compile(r"\((?P<process>[^()]*\bpid=\d+)\) ?(?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
_BEGIN = "Traceback (most recent call last):"


def errors_in(lines: Sequence[str]) -> list[str]:
    """What the tracebacks in a log end with ("ValueError: text"), each once and in order: the first is where it began. Lines of
    several processes may lie between each other.
    """
    inside: set[str] = set()  # processes whose traceback has begun
    found: dict[str, None] = {}
    for line in lines:
        head = _HEAD.match(line)
        process, text = (head["process"], line[head.end() :]) if head else ("", line)
        if text.startswith(_BEGIN):
            inside.add(process)
        elif process in inside and text and not text[0].isspace():
            inside.discard(process)
            found[text[:MAX_LENGTH]] = None
    return list(found)


def quote(lines: Sequence[str], where: str) -> str:
    """The end of a log, for a message; before it the errors that lie further up. `where` names the log's file."""
    tail = lines[-TAIL_LINES:]
    above = [error for error in errors_in(lines) if not any(error in line for line in tail)][:MAX_ERRORS]
    parts = ["errors in its log, the first one first:", *map(_quoted, above)] if above else []
    return "\n".join([*parts, f"the end of its log{where}:", *map(_quoted, tail)])


def _quoted(line: str) -> str:
    return f"  | {line}"
