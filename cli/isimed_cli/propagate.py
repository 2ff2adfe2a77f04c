"""`isimed propagate`: the landmarks of one scan, found in all the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isimed_cli.app import Session, command
from isimed_cli.options import EncoderOption, SameSubject, ScanOption, Space


@command(
    "propagate",
    example="isimed propagate --landmarks lesions.mrk.json --scan sub-13_T1w --out found",
    rows=True,
    encodes=True,
)
def propagate(
    session: Session,
    landmarks: Annotated[
        Path,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="3D Slicer's .mrk.json or .fcsv, or .csv: name,x,y,z."
        ),
    ],
    scan: ScanOption,
    to: Annotated[
        str | None, typer.Option("--to", metavar="SQL", help="Only to scans for which this condition holds.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="New folder: a .mrk.json a scan, and landmarks.csv.")
    ] = None,
    space: Annotated[
        Space | None,
        typer.Option("--space", help="Coordinates of a table, RAS mm by default; 3D Slicer's files say theirs."),
    ] = None,
    same_subject: Annotated[SameSubject, typer.Option(help="Other scans of the same subject.")] = SameSubject.INCLUDE,
    cycle: Annotated[bool, typer.Option("--cycle", help="Also match back and report cycle_mm.")] = False,
    encoder: EncoderOption = None,
) -> None:
    """Find the landmarks of one scan in all the others.

    One row for each scan and landmark: x_mm, y_mm, z_mm are RAS+ mm of that scan, in_view says whether it shows the
    place at all. With --out they become a folder: landmarks.csv, and one file for 3D Slicer a scan, in LPS mm, in
    which a landmark that is not in view is missing. Landmarks outside the scan are refused by name, and the rest goes
    on.
    """
    from isimed_cli.batch import end_batch, list_refusals
    from isimed_cli.render import show_fields, show_table

    store = session.open(mode="r")
    with session.progress() as progress:
        done = store.propagate(
            landmarks,
            scan,
            space=None if space is None else space.value,
            where=to,
            same_subject=same_subject.value,
            cycle=cycle,
            encoder=encoder,
            progress=progress,
        )
    list_refusals(done.refused)
    rows = len(done.columns["scan"])
    if out is None:
        show_table(done.to_arrow(), session.format)
    else:
        done.write(out)
        scans = len(done.scans)
        said = {"scans": scans, "landmarks": rows // scans, "in_view": sum(done.columns["in_view"]), "of": rows}
        show_fields({**said, "out": str(out)}, session.format)
    end_batch(rows, done.refused)
