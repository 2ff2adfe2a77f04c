"""`isimed sql`: read-only SQL over what the store knows."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from isimed_cli.app import Session, command
from isimed_index.errors import UsageError


class TakesPairs(TyperCommand):
    """Lets `-p name value` be written as two words, which typer's lists cannot."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join the two words after each -p into `name=value`."""
        joined: list[str] = []
        words = iter(args)
        for word in words:
            joined.append(word)
            if word in ("-p", "--param"):
                name = next(words, None)
                value = None if name is None or "=" in name else next(words, None)
                joined += [part for part in [name if value is None else f"{name}={value}"] if part is not None]
        return super().parse_args(ctx, joined)


@command(
    "sql",
    example='isimed sql "SELECT scan, nx, ny, nz FROM scans WHERE split = $split" -p split test',
    rows=True,
    out=True,
    cls=TakesPairs,
)
def sql(
    session: Session,
    statement: Annotated[str, typer.Argument(metavar='"SELECT …"|-', help="The query, or - to read it from stdin.")],
    param: Annotated[
        list[str] | None,
        typer.Option("--param", "-p", metavar="NAME VALUE", help="Value of $NAME in the query; may be repeated."),
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="S", min=0.001, help="Stop the query after this long.")] = 30.0,
) -> None:
    """Run one read-only SQL query.

    Views: scans, subjects, patches, labels, encoders, segments, indexes, generations.
    """
    from isimed_cli.render import show_table

    text = sys.stdin.read() if statement == "-" else statement
    table = session.open().sql(text, params=dict(map(parse_parameter, param or [])), timeout_s=timeout)
    show_table(table, session.format, session.out)


def parse_parameter(text: str) -> tuple[str, str | int | float]:
    """`name=value` → name and value, as a number where a metadata table would read it as one (`007` is text)."""
    from isimed_index.scans.metadata import plain_number

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"expected -p NAME VALUE, found {text!r}", next_step="isimed sql --help")
    number = plain_number(value)
    return name, value if number is None else number
