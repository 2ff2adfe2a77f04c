"""`isimed register`: every scan into a common frame."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from isimed_cli.app import Format, Session, command
from isimed_cli.options import ReportOption, WhereOption


class Type(StrEnum):
    """What a transform may do."""

    RIGID = "rigid"
    AFFINE = "affine"


@command("register", example="isimed register --workers 2", rows=True)
def register(
    session: Session,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="An atlas; the scans' own mean by default."),
    ] = None,
    kind: Annotated[
        Type, typer.Option("--type", help="Rotation and shift, or scaling and shearing as well.")
    ] = Type.RIGID,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="How often a mean is made and all scans are registered to it.")
    ] = 2,
    where: WhereOption = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Scans registered at once.")] = 1,
    redo: Annotated[
        bool, typer.Option("--redo", help="Register all again, to a new mean or to the same atlas.")
    ] = False,
    report: ReportOption = None,
) -> None:
    """Register scans into a common frame; transforms are stored, images are not resampled.

    Scans that are registered already are skipped, so the same command goes on where it stopped; new scans are
    registered to the same mean. The view `transforms` holds the result. Needs SimpleITK: pip install
    'isimed-index[register]'.
    """
    from isimed_cli.batch import end_batch, list_refusals, write_report
    from isimed_cli.render import show_fields

    store = session.open(mode="a")
    with session.progress() as progress:
        done = store.register(
            to=to, kind=kind.value, rounds=rounds, where=where, workers=workers, redo=redo, progress=progress
        )
    fields: dict[str, Any] = {
        "reference": done.reference,
        "kind": done.kind,
        "rounds": done.round,
        "mean_of": done.mean_of,
        "registered": list(done.registered),
        "skipped": list(done.skipped),
        "refused": [item.name for item in done.refused],
    }
    try:
        write_report(report, fields, done.refused)
        if session.format is Format.TABLE:
            fields |= {name: len(fields[name]) for name in ("registered", "skipped", "refused")}
        show_fields(fields, session.format)
    finally:
        list_refusals(done.refused)
    end_batch(len(done.registered) + len(done.skipped), done.refused)
