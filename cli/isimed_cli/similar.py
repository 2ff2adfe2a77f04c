"""`isimed similar`: a scan, or a region of it, compared with all the others."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from isimed_cli.app import Session, command
from isimed_cli.options import EncoderOption, SameSubject, WhereOption
from isimed_cli.query import nothing_found


class Pooling(StrEnum):
    """How patches became one vector."""

    MEAN = "mean"
    MEAN_SD = "mean_sd"


@command("similar", example="isimed similar --scan sub-13_T1w --label 'Left Hippocampus' -k 5", rows=True, out=True)
def similar(
    session: Session,
    scan: Annotated[str, typer.Option("--scan", metavar="ID", help="A scan of the store.")],
    label: Annotated[
        str | None, typer.Option(metavar="NAME|N", help="Compare this region instead of whole scans.")
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", metavar="N", min=1, help="How many answers.")] = 10,
    where: WhereOption = None,
    same_subject: Annotated[SameSubject, typer.Option(help="Other scans of the same subject.")] = SameSubject.EXCLUDE,
    pooling: Annotated[Pooling, typer.Option(help="mean_sd also compares how far patches are apart.")] = Pooling.MEAN,
    encoder: EncoderOption = None,
) -> None:
    """Find the scans that look like a scan, or whose region of that name looks like its own.

    A scan or region is the mean of its patches' vectors; the search is exact. Regions are compared when they have the
    same name, or without names the same number, so left is never compared with what is called right.
    """
    from isimed_cli.render import show_table

    table = session.open(mode="r").similar(
        scan,
        label=label,
        k=k,
        where=where,
        same_subject=same_subject.value,
        pooling=pooling.value,
        encoder=encoder,
    )
    if not table.num_rows:
        session.note(nothing_found(same_subject, [] if where is None else ["--where"], region=label is not None))
    show_table(table, session.format, session.out)
