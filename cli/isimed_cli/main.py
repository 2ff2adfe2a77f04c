"""The entry point of the console script `isimed`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import typer

from isimed_cli import (
    add,
    change,
    check,
    demo,
    doctor,
    encoders,
    evaluate,
    exchange,
    index,
    plot,
    pretrain,
    propagate,
    query,
    register,
    similar,
    sql,
    store,
)
from isimed_cli.app import INTERRUPTED, app

__all__ = ["app", "main"]

# Importing a module registers its commands.
COMMANDS = (
    *(add, register, pretrain, encoders, index, query, propagate, similar, sql, store, evaluate, plot),
    *(change, check, exchange, doctor, demo),
)

# By kind of a validator's error: what was expected, and what was found.
_EXPECTED = {
    "int_parsing": "a whole number, found {found!r}",
    "int_from_float": "a whole number, found {found!r}",
    "float_parsing": "a number, found {found!r}",
    "bool_parsing": "true or false, found {found!r}",
    "greater_than_equal": "{ge:g} or more, found {found}",
    "less_than_equal": "at most {le:g}, found {found}",
}

# Click's own usage error, wherever this version of typer keeps click.
_Usage: type[Exception] = typer.BadParameter.__mro__[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (0, 1, 2, 3, 10–15 or 130; see docs/reference/cli.md)."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="isimed", standalone_mode=False)
    except _Usage as error:
        print(_usage_line(error), file=sys.stderr)
        return 2
    except typer.Abort:
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
        if argv is None:  # this process ends here: another Ctrl-C ends it at once, not in the midst of its clearing up
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        _flush()
    return int(code or 0)


def _flush() -> None:
    """Send out what is still buffered; when the reader has left (`| head`), drop it without a word."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(_signal: int, _frame: object) -> None:
    """SIGTERM ends a command the way Ctrl-C does: cleanly, resumable, exit 130."""
    raise KeyboardInterrupt


def _usage_line(error: BaseException) -> str:
    """A usage error as one line that names the command whose help to read."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "isimed"
    message = " ".join(_in_our_words(error, getattr(error, "format_message", error.__str__)()).split())
    ending = "" if message.endswith((".", "?", "!")) else "."
    return f"error[usage]: {message}{ending} Next: {path} --help"


def _in_our_words(error: BaseException, message: str) -> str:
    """The message with what was expected and what was found in place of the validator's own words."""
    details: list[dict[str, Any]] = getattr(
        error.__cause__, "errors", list
    )()  # of pydantic, which typer checks values with
    if not details:
        return message
    fault = details[0]
    expected = _EXPECTED.get(fault["type"])
    if expected is None:
        return message.replace("Value error, ", "")
    return message.replace(fault["msg"], "expected " + expected.format(found=fault["input"], **fault.get("ctx", {})))


if __name__ == "__main__":
    sys.exit(main())
