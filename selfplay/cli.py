"""The command `selfplay`: the commands assembled, and what becomes of errors.

Exit codes: 0 done, 64 recipe or flag, 65 data, 69 judge, 70 internal, 74 disk, 75 stopped, 76 gate, 77 security,
79 locked. See errors.py.
"""

import errno
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType, TracebackType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from selfplay import __version__
from selfplay.commands.env import env_command
from selfplay.commands.gguf import import_gguf_command
from selfplay.commands.iterate import iterate_command
from selfplay.commands.judges import calibrate_command, compare_judges_command
from selfplay.commands.merge import merge_command
from selfplay.commands.recipes import recipes_app
from selfplay.commands.reward import train_reward_command
from selfplay.commands.show import compare_command, show_command, status_command
from selfplay.commands.stages import evaluate_command, generate_command, judge_command, pairs_command, train_command
from selfplay.commands.tasks import tasks_command
from selfplay.commands.validate import validate_command
from selfplay.errors import RecipeError, SelfplayError, Stopped, StorageError
from selfplay.report import safe_text

USAGE_ERROR = 2  # what typer exits with on an unknown flag
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Stopped("stopped; files that exist are finished. The same command goes on from there") from None


app = typer.Typer(
    cls=_Commands,
    help="Rounds of self-play for language models: sample, judge, pair, DPO, again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("iterate")(iterate_command)
app.command("validate")(validate_command)
app.command("generate")(generate_command)
app.command("judge")(judge_command)
app.command("pairs")(pairs_command)
app.command("train")(train_command)
app.command("train-reward")(train_reward_command)
app.command("evaluate")(evaluate_command)
app.command("compare-judges")(compare_judges_command)
app.command("calibrate")(calibrate_command)
app.command("status")(status_command)
app.command("compare")(compare_command)
app.command("show")(show_command)
app.command("merge")(merge_command)
app.command("import-gguf")(import_gguf_command)
app.command("tasks")(tasks_command)
app.add_typer(recipes_app, name="recipes")
app.command("env")(env_command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"selfplay {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. An error of ours is one message on stderr, any other a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that can't spell a completion shows "?" in its place
            stream.reconfigure(errors="replace")
    with _Crash(), _terminable():
        try:
            if not __debug__:
                raise RecipeError(
                    "Python runs with -O (or PYTHONOPTIMIZE), which removes selfplay's own checks: leave it out"
                )
            app(args=None if arguments is None else list(arguments), prog_name="selfplay")
        except SystemExit as end:
            return _exit_code(end.code)
        except SelfplayError as error:
            return _say(error)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            return _say(
                StorageError(f"{error.filename or 'disk'}: {error.strerror}. Free space or mend the permissions")
            )
    return 0


def _exit_code(code: str | int | None) -> int:
    if code == USAGE_ERROR:
        return RecipeError.exit_code
    return code if isinstance(code, int) else 0


def _say(error: SelfplayError) -> int:
    prefix = "" if isinstance(error, Stopped) else "error: "
    print(f"{prefix}{safe_text(str(error))}", file=sys.stderr)
    return error.exit_code


@contextmanager
def _terminable() -> Iterator[None]:
    """In the block SIGTERM stops as Ctrl-C does: a batch system sends it, and what is running must end cleanly."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


class _Crash:
    """A `with` block that nobody expects to end by an exception: then the traceback, and exit code 70 instead of 1."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, Exception):
            traceback.print_exception(error)
            raise SystemExit(SelfplayError.exit_code)
