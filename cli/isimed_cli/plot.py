"""`isimed plot`: pictures of embeddings, matches and training."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from isimed_cli.app import Session, command, writable
from isimed_cli.options import (
    EncoderOption,
    PointOption,
    ScanOption,
    SeedOption,
    Space,
    SpaceOption,
    WhereOption,
)
from isimed_index.errors import UsageError


class Figure(StrEnum):
    """What can be drawn."""

    UMAP = "umap"
    MATCH = "match"
    TRAINING = "training"


@command(
    "plot", example="isimed plot match --point 24.4,-22.3,-21.0 --scan sub-13_T1w -k 3 --out match.png", encodes=True
)
def plot(
    session: Session,
    figure: Annotated[Figure, typer.Argument(help="What to draw.")],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", callback=writable, help="Picture to write: .png, .svg or .pdf."),
    ],
    point: PointOption = None,
    scan: ScanOption = None,
    space: SpaceOption = Space.RAS,
    k: Annotated[int, typer.Option("-k", "--k", metavar="N", min=1, help="How many matches to show.")] = 3,
    where: WhereOption = None,
    encoder: EncoderOption = None,
    seed: SeedOption = 0,
) -> None:
    """Draw embeddings, a match or the training.

    umap: patches coloured by position; match: a point and its matches in three planes; training: curves by epoch.
    """
    options: dict[str, Any] = {"encoder": encoder}
    if figure is Figure.MATCH:
        if point is None or scan is None:
            raise UsageError("plot match needs --point and --scan", next_step="isimed plot --help")
        options |= {"point": point, "scan": scan, "space": space.value, "k": k, "where": where}
    elif figure is Figure.UMAP:
        options |= {"where": where, "seed": seed}
    session.open().plot(figure.value, out=out, **options)
    print(out)
