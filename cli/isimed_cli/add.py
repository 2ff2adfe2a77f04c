"""`isimed add`: image files into the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isimed_cli.app import Session, command
from isimed_cli.options import ReportOption


@command("add", example="isimed add images --metadata images/participants.tsv --workers 2", rows=True)
def add(
    session: Session,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", exists=True, help="Image files and folders.")],
    labels: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Label map of an image, relative to it, such as {stem}_seg.nii.gz."),
    ] = None,
    label_names: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, help="CSV or TSV with columns label and name.")
    ] = None,
    metadata: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, help="CSV or TSV joined by scan, or by subject (participant_id)."),
    ] = None,
    subject_from: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Finds the subject in a file's stem, or else its folders; BIDS needs none."),
    ] = None,
    spacing: Annotated[
        float | None, typer.Option(metavar="MM", min=0.1, help="Resample to this spacing; kept as it is by default.")
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Files read at once.")] = 1,
    surrogate_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="ISIMED_SURROGATE_KEY",
            help="Key that DICOM identifiers are hashed with; made if there is none. In your config by default.",
        ),
    ] = None,
    report: ReportOption = None,
) -> None:
    """Read image files, DICOM series and folders of both into the store.

    Scans that are there already, by content, are left alone; a file that cannot become a scan is refused and the
    rest of the batch lands. Makes the store if there is none.
    """
    from isimed_cli.batch import added_groups, end_batch, list_refusals, show_batch, write_report

    store = session.open_or_create()
    with session.progress() as progress:
        done = store.add(
            paths,
            labels=labels,
            label_names=label_names,
            metadata=metadata,
            subject_from=subject_from,
            spacing_mm=spacing,
            workers=workers,
            progress=progress,
            surrogate_key=surrogate_key,
        )
    if done.unnamed:
        session.note(
            f"{len(done.unnamed)} labels have no name and go by their numbers. Next: give --label-names FILE; "
            "a stored scan keeps its labels as they are, so add it to a new store"
        )
    groups = added_groups(done)
    try:
        write_report(report, groups, done.refused)
        show_batch(session, groups, done.refused)
    finally:
        list_refusals(done.refused)
    end_batch(sum(map(len, groups.values())), done.refused)
