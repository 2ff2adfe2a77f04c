"""`isimed evaluate`: how far answers are from labelled anatomy, beside guesses that need no learning."""

from __future__ import annotations

from typing import Annotated

import typer

from isimed_cli.app import Format, Session, command
from isimed_cli.options import EncoderOption, SeedOption, WhereOption


@command("evaluate", example="isimed evaluate --where \"split = 'test'\" --out errors.csv", rows=True, out=True)
def evaluate(
    session: Session,
    encoder: EncoderOption = None,
    where: WhereOption = None,
    label_where: Annotated[
        str | None,
        typer.Option("--label-where", metavar="SQL", help="Only labels for which this condition on `labels` holds."),
    ] = None,
    pairs: Annotated[int, typer.Option(metavar="N", min=1, help="Most pairs of scans to compare.")] = 60,
    seed: SeedOption = 0,
) -> None:
    """Measure the error in mm on labelled anatomy.

    At label centroids, for the lookup and for guesses that need no learning. One row a predictor: pairs of scans
    compared, landmarks (centroids of labels that both scans of a pair have), their errors, and hit_at_1, the share
    of answers whose nearest voxel carries the landmark's label. --out gets one row a landmark: source, target,
    label, name, and each predictor's error.
    """
    from isimed_cli.render import show_table

    store = session.open()
    with session.progress() as progress:
        evaluation = store.evaluate(
            encoder=encoder, where=where, label_where=label_where, pairs=pairs, seed=seed, progress=progress
        )
    if session.out is None:
        show_table(evaluation.to_arrow(), session.format)
    else:
        show_table(evaluation.landmarks_to_arrow(), session.format, session.out)
        show_table(evaluation.to_arrow(), Format.TABLE)
