"""Options that more than one command takes, and the small languages they are written in."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from isimed_cli.app import writable

Point = tuple[float, float, float]

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgh", ".mgz")


class Space(StrEnum):
    """The coordinates that a point is given and answered in."""

    RAS = "ras"
    LPS = "lps"
    VOXEL = "voxel"
    CANONICAL = "canonical"


class SameSubject(StrEnum):
    """What to do with other scans of the query's own subject."""

    INCLUDE = "include"
    EXCLUDE = "exclude"
    ONLY = "only"


def parse_point(text: str) -> Point:
    """`-12,-40,88` → three numbers."""
    try:
        x, y, z = (float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"expected three numbers X,Y,Z such as -12,-40,88, found {text!r}") from None
    if not all(abs(value) < 1e6 for value in (x, y, z)):  # also false for NaN
        raise typer.BadParameter(f"expected three finite numbers X,Y,Z, found {text!r}")
    return x, y, z


def parse_bytes(text: str) -> int:
    """`4G`, `512M`, `2GiB` or a plain number of bytes → bytes (powers of 1024)."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    power = "KMGT".find(number[-1:]) + 1 if number else 0
    try:
        size = float(number[:-1] if power else number) * 1024**power
    except ValueError:
        size = -1.0
    if not 0 < size < 1024**6:
        raise typer.BadParameter(f"expected a size such as 4G or 512M, found {text!r}")
    return int(size)


def scan_or_file(text: str) -> str | Path:
    """A scan id, or the path of a volume that is not in the store (it exists or is named like one)."""
    path = Path(text)
    return path if text.lower().endswith(VOLUME_SUFFIXES) or path.is_file() else text


PathsOption = Annotated[
    list[Path] | None,
    typer.Argument(metavar="PATH", exists=True, help="Image files and folders to add first.", show_default=False),
]
EncoderOption = Annotated[
    str | None, typer.Option("--encoder", metavar="NAME|ID", help="Encoder of the store; the newest by default.")
]
WhereOption = Annotated[
    str | None, typer.Option("--where", metavar="SQL", help="Only scans for which this condition holds.")
]
DeviceOption = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where to run the network.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
ReportOption = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", callback=writable, help="Write what was done and refused here, as JSON."),
]
AddReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        callback=writable,
        help="Write what became of each file here: .json, .csv, or .html with pictures.",
    ),
]
# typer reads the type of an option only where it has no parser, and refuses tuples and unions: hence Any.
PointOption = Annotated[
    Any,
    typer.Option("--point", metavar="X,Y,Z", parser=parse_point, help="The point, in the space given by --space."),
]
SpaceOption = Annotated[
    Space,
    typer.Option("--space", help="Coordinates of --point and of the answers' x, y, z; x_mm, y_mm, z_mm stay RAS."),
]
ScanOption = Annotated[
    Any,
    typer.Option("--scan", metavar="ID|FILE", parser=scan_or_file, help="A scan of the store, or a volume file."),
]
