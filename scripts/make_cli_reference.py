"""Write docs/reference/cli.md from the command line's own help; `--check` only says whether it is up to date.

Run from the repository: python scripts/make_cli_reference.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from isimed_cli.main import app

REFERENCE = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"
WIDTH = 100

PREFACE = """\
# The command line

<!-- Written by scripts/make_cli_reference.py from the program's own help: change the help, then run the script. -->

Results go to stdout; progress, notes and errors go to stderr. Every option can also be given by the environment
variable that stands beside it. The examples can be run as they stand inside the folder that `isimed demo` leaves.

`--json` is short for `--format json`; `arrow` and `parquet` need `--out FILE`. With `--out` and without `--format`, the
suffix of the file names the format; any other suffix is a usage error. What was written is noted on stderr. JSON uses
the field names of the Python API; a missing or infinite number is `null`.

An error is one line, `error[kind]: what, where. Next: what to do.`, and an exit code; `--debug` shows the traceback.

| exit code | meaning |
|---|---|
| 0 | ok |
| 1 | error; of a batch: every input was refused |
| 2 | usage: an option or argument is wrong |
| 3 | partial: some inputs were refused; they are listed on stderr and in `--report FILE`, all others landed |
| 10 | no store there |
| 11 | locked or conflicting |
| 12 | damaged |
| 13 | incompatible encoder or format |
| 14 | recall below the target |
| 15 | `check --phi`: something may identify a patient |
| 130 | interrupted, and resumable: run the same command again (`pretrain`: with `--resume`) |
"""


def reference() -> str:
    """The whole page."""
    group = typer.main.get_command(app)
    root = _context(group, "isimed", None)
    sections = [_section(name, command, context) for name, command, context in commands(group, root)]
    return "\n".join([PREFACE, *sections])


def commands(group: Any, context: Any, above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name (`encoders list`), command and its context of every command, those of groups in their group's place."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        below = _context(command, name, context)
        if hasattr(command, "list_commands"):
            yield from commands(command, below, f"{above}{name} ")
        else:
            yield f"{above}{name}", command, below


def _section(name: str, command: Any, context: Any) -> str:
    """One command: its example, then its help without it."""
    text = command.get_help(context).rstrip()
    helped = text.removesuffix(text[text.rindex("  Example: ") :]).rstrip()
    example = command.epilog.removeprefix("Example: ")
    return f"## isimed {name}\n\n```sh\n{example}\n```\n\n```text\n{helped}\n```\n"


def _context(command: object, name: str, parent: object) -> typer.Context:
    """A context that prints help as wide as the page and knows the environment variables' prefix."""
    settings = app.info.context_settings if parent is None else {}
    return typer.Context(
        command,  # type: ignore[arg-type]
        info_name=name,
        parent=parent,  # type: ignore[arg-type]
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        **(settings or {}),
    )


def main() -> int:
    """Write the page, or compare it with --check; 1 when it is out of date."""
    page = reference()
    if "--check" in sys.argv[1:]:
        current = REFERENCE.read_text(encoding="utf-8") if REFERENCE.is_file() else ""
        if current != page:
            print("docs/reference/cli.md is out of date: run python scripts/make_cli_reference.py", file=sys.stderr)
        return int(current != page)
    REFERENCE.parent.mkdir(parents=True, exist_ok=True)
    REFERENCE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
