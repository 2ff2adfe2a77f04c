"""The entry point of the console script `isimed`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import typer

from isimed_cli import add, demo, evaluate, index, plot, pretrain, query, sql, store
from isimed_cli.app import INTERRUPTED, app

__all__ = ["app", "main"]

COMMANDS = (add, pretrain, index, query, sql, store, evaluate, plot, demo)  # importing a module registers its commands

# Click's own usage error, wherever this version of typer keeps click.
_Usage: type[Exception] = typer.BadParameter.__mro__[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code (0, 1, 2, 3, 10–14 or 130; see docs/reference/cli.md)."""
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
    message = " ".join(getattr(error, "format_message", error.__str__)().split())
    ending = "" if message.endswith((".", "?", "!")) else "."
    return f"error[usage]: {message}{ending} Next: {path} --help"


if __name__ == "__main__":
    sys.exit(main())
