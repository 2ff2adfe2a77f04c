"""`isimed info`, `ls` and `log`: what is in a store and how it came there."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from isimed_cli.app import Session, command


class Listing(StrEnum):
    """What `ls` can list."""

    SCANS = "scans"
    ENCODERS = "encoders"


@command("info", example="isimed info --store cohort.isimed", rows=True)
def info(session: Session) -> None:
    """Say what the store holds."""
    from isimed_cli.render import show_fields

    show_fields(session.open().info(), session.format)


@command("ls", example="isimed ls encoders", rows=True, out=True)
def ls(
    session: Session,
    what: Annotated[Listing, typer.Argument(help="What to list.")] = Listing.SCANS,
) -> None:
    """List the scans or the encoders of the store."""
    from isimed_cli.render import show_table

    store = session.open()
    show_table(store.scans() if what is Listing.SCANS else store.encoders(), session.format, session.out)


@command("log", example="isimed log --format ndjson", rows=True, out=True)
def log(session: Session) -> None:
    """List generations: when, by which command."""
    from isimed_cli.render import show_table

    show_table(session.open().log(), session.format, session.out)
