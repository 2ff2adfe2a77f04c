"""`isimed sql`: read-only SQL over what the store knows."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from isimed_cli.app import Session, command
from isimed_index.errors import UsageError

Value = str | int | float | bool | None
_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}
_ENVIRONMENT = "ISIMED_SQL_PARAM"


class TakesPairs(TyperCommand):
    """Lets `-p name value` be written as two words, which typer's lists cannot, on the line and in the environment."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join the two words after each -p into `name=value`; without a -p, the environment's pairs are taken."""
        joined: list[str] = []
        words = iter(args)
        for word in words:
            joined.append(word)
            if word in ("-p", "--param"):
                joined += _pair(next(words, None), words)
        if not any(word.startswith(("-p", "--param")) for word in args):
            joined = [*_from_environment(ctx), *joined]
        return super().parse_args(ctx, joined)


def _pair(name: str | None, words: Iterator[str]) -> list[str]:
    """The words that make up one `name=value`, joined; fewer where they are missing."""
    value = None if name is None or "=" in name else next(words, None)
    return [] if name is None else [name if value is None else f"{name}={value}"]


def _from_environment(ctx: Any) -> list[str]:
    """-p options for `split test age 40` or `site='North wing'`, quoted as in a shell."""
    try:
        words = iter(shlex.split(os.environ.get(_ENVIRONMENT, "")))
    except ValueError:
        raise typer.BadParameter(
            f"expected pairs NAME VALUE in {_ENVIRONMENT}, found a quote that does not end", ctx=ctx
        ) from None
    return [part for name in words for part in ("-p", *_pair(name, words))]


@command(
    "sql",
    example="isimed sql 'SELECT scan, nx, ny, nz FROM scans WHERE split = $split' -p split test",
    rows=True,
    out=True,
    cls=TakesPairs,
)
def sql(
    session: Session,
    statement: Annotated[str, typer.Argument(metavar='"SELECT …"|-', help="The query, or - to read it from stdin.")],
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            "-p",
            metavar="NAME VALUE",
            help="Value of $NAME: a number, true, false, null or text ('40' in quotes is text); may be repeated.",
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="S", min=0.001, help="Stop the query after this long.")] = 30.0,
) -> None:
    """Run one read-only SQL query.

    Views: scans, subjects, labels, patches, patch_labels, regions, matches, transforms, encoders, segments, indexes,
    generations; "DESCRIBE scans" shows columns.
    With several values: -p split test -p age 40, or ISIMED_SQL_PARAM="split test age 40".
    """
    from isimed_cli.render import show_table

    text = sys.stdin.read() if statement == "-" else statement
    table = session.open().sql(text, params=dict(map(parse_parameter, param or [])), timeout_s=timeout)
    show_table(table, session.format, session.out)


def parse_parameter(text: str) -> tuple[str, Value]:
    """`name=value` → name and value: a plain number (`007` is none), true, false, null, or text.

    Single quotes around a value make it text whatever it says, as in SQL: `'40'`, `'null'`.
    """
    from isimed_index.scans.tables import plain_number

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"expected -p NAME VALUE, found {text!r}", next_step="isimed sql --help")
    if len(value) > 1 and value[0] == value[-1] == "'":
        return name, value[1:-1].replace("''", "'")
    if value.lower() in _WORDS:
        return name, _WORDS[value.lower()]
    number = plain_number(value)
    return name, value if number is None else number
