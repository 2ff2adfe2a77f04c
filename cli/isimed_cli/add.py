"""`isimed add`: image files into the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from isimed_cli.app import Session, command
from isimed_cli.options import AddReportOption

_NAMED = 8  # labels without a name that are told


@command("add", example="isimed add images --metadata images/participants.tsv --workers 2", rows=True)
def add(
    session: Session,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", exists=True, help="Image files and folders.")],
    labels: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Label map of an image, relative to it, such as {stem}_seg.nii.gz."),
    ] = None,
    label_names: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            help="Names of labels: CSV, TSV, JSON, or a colour table of 3D Slicer, ITK-SNAP or FreeSurfer.",
        ),
    ] = None,
    metadata: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            help="CSV or TSV joined by scan, file, subject (participant_id), or its session; repeatable.",
        ),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How folders are laid out: files, bids, msd, brats, autopet, totalsegmentator; auto tells them.",
        ),
    ] = "auto",
    subject_from: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Finds the subject in a file's stem, or else its folders; BIDS needs none."),
    ] = None,
    spacing: Annotated[
        float | None, typer.Option(metavar="MM", min=0.1, help="Resample to this spacing; kept as it is by default.")
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Files taken at once, each by its own process.")] = 1,
    surrogate_key: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="ISIMED_SURROGATE_KEY",
            help="Key that DICOM identifiers are hashed with; made if there is none. In your config by default.",
        ),
    ] = None,
    volume: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Which volume of 4-D files and series, from 0; refused without it."),
    ] = None,
    analyze_axes: Annotated[
        str | None,
        typer.Option(
            metavar="CODE", help="Where the axes of Analyze 7.5 files grow, such as LAS; they are refused without it."
        ),
    ] = None,
    surrogate_ids: Annotated[
        bool,
        typer.Option("--surrogate-ids", help="Keyed surrogates in place of names of files, subjects and sessions."),
    ] = False,
    keep_source: Annotated[
        bool, typer.Option("--keep-source", help="Store the path of each file; left out by default.")
    ] = False,
    allow_burned_in: Annotated[
        bool,
        typer.Option("--allow-burned-in", help="Take DICOM series marked as having text burned into their images."),
    ] = False,
    report: AddReportOption = None,
) -> None:
    """Read image files, DICOM series and folders of both into the store.

    Scans that are there already, by content, are left alone; a file that cannot become a scan is refused and the
    rest of the batch lands. Makes the store if there is none.
    """
    from isimed_cli.batch import added_groups, end_batch, list_refusals, pictures_for, show_batch, write_added_report
    from isimed_index.ingest.options import AddOptions, check_usage

    given: dict[str, Any] = {
        "labels": labels,
        "label_names": label_names,
        "metadata": metadata,
        "layout": layout,
        "subject_from": subject_from,
        "spacing_mm": spacing,
        "workers": workers,
        "surrogate_key": surrogate_key,
        "volume": volume,
        "analyze_axes": analyze_axes,
        "surrogate_ids": surrogate_ids,
        "keep_source": keep_source,
        "allow_burned_in": allow_burned_in,
    }
    # Before there is a store: what was asked wrongly must not leave a new one behind.
    check_usage(paths, AddOptions(**given | {"metadata": tuple(metadata or ())}))
    with pictures_for(report) as thumbnails:
        store = session.open_or_create()
        with session.progress() as progress:
            done = store.add(paths, progress=progress, thumbnails=thumbnails, **given)
        try:
            write_added_report(report, done, thumbnails)
        except OSError:
            list_refusals(done.refused)
            raise
    for note in done.notes:
        session.note(note)
    if done.unnamed:
        step = f"add them to {label_names.name}" if label_names else "give --label-names FILE"
        some = ", ".join(map(str, done.unnamed[:_NAMED])) + (", …" if len(done.unnamed) > _NAMED else "")
        session.note(
            f"{len(done.unnamed)} labels have no name and go by their numbers ({some}). Next: {step}; "
            "a stored scan keeps its labels as they are, so add it to a new store"
        )
    if done.dropped:
        columns = ", ".join(f"{column} of {count}" for column, count in sorted(done.dropped.items()))
        session.note(f"headers said what is not kept: {columns} (not a known word, out of range, or not one value)")
    groups = added_groups(done)
    try:
        show_batch(session, groups, done.refused)
    finally:
        list_refusals(done.refused)
    end_batch(sum(map(len, groups.values())), done.refused)
