"""`isimed export` and `import`: a store's content for other programs, and theirs for it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from isimed_cli.app import Format, Session, command
from isimed_cli.options import WhereOption
from isimed_index.errors import UsageError


class Millimetres(StrEnum):
    """The directions in which the patient millimetres of foreign embeddings grow."""

    RAS = "ras"
    LPS = "lps"


@command("export", example="isimed export --parquet cohort-export", rows=True)
def export(
    session: Session,
    parquet: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder of Parquet files, which isimed import reads back.")
    ] = None,
    npy: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder of NumPy arrays, one an output of an encoder.")
    ] = None,
    duckdb: Annotated[Path | None, typer.Option(metavar="FILE", help="New DuckDB database, for BI tools.")] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="NAME|ID", help="Embeddings of this encoder; those of all by default.")
    ] = None,
    where: WhereOption = None,
    voxels: Annotated[bool, typer.Option("--voxels", help="With --parquet: the scans' OME-Zarr trees too.")] = False,
    vectors: Annotated[bool, typer.Option("--vectors", help="With --duckdb: the vectors too.")] = False,
    scan: Annotated[
        str | None, typer.Option("--scan", metavar="ID", help="One scan as NIfTI, with --out, --labels or both.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="With --scan: new .nii or .nii.gz for its voxels.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="FILE", help="With --scan: new .nii or .nii.gz for its label map."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="With --scan: replace files that are there.")] = False,
) -> None:
    """Write the store's content, or one scan, as files for other programs.

    Exactly one of --parquet, --npy and --duckdb names a new path, which appears whole or not at all. What is
    written holds scan ids and metadata: treat it like the store. With --scan, one scan becomes NIfTI again, bit for
    bit where it was read from NIfTI and not resampled: isimed export --scan sub-01_T1w --out head.nii.gz
    """
    from dataclasses import asdict

    from isimed_cli.render import show_fields

    if scan is not None:
        if any(path is not None for path in (parquet, npy, duckdb, encoder, where)) or voxels or vectors:
            raise UsageError(
                "--scan goes with --out, --labels and --force only", next_step="isimed export --scan ID --out FILE"
            )
        _export_scan(session, scan, out, labels, force)
        return
    if out is not None or labels is not None or force:
        raise UsageError("--out, --labels and --force go with --scan", next_step="isimed export --scan ID --out FILE")
    targets: dict[Literal["parquet", "npy", "duckdb"], Path | None] = {
        "parquet": parquet,
        "npy": npy,
        "duckdb": duckdb,
    }
    asked = [(layout, path) for layout, path in targets.items() if path is not None]
    if len(asked) != 1:
        raise UsageError(
            f"expected one of --parquet, --npy and --duckdb, found {len(asked)}", next_step="isimed export --help"
        )
    [(layout, out)] = asked
    with session.progress() as progress:
        done = session.open().export(
            out, layout, where=where, encoder=encoder, voxels=voxels, vectors=vectors, progress=progress
        )
    if session.format is not Format.TABLE:
        show_fields(asdict(done), session.format)
        return
    print(f"exported scans {done.scans} · encoders {done.encoders} · patches {done.patches:,} to {out.name}")


def _export_scan(session: Session, scan: str, out: Path | None, labels: Path | None, force: bool) -> None:
    from dataclasses import asdict

    from isimed_cli.render import show_fields

    done = session.open().export_scan(scan, out, labels, force)
    if session.format is not Format.TABLE:
        show_fields(asdict(done), session.format)
        return
    files = " and ".join(name for name in (done.out, done.labels) if name is not None)
    size = "×".join(map(str, done.shape))
    print(f"exported scan {done.scan} · {size} · {done.dtype} · {done.orientation} to {files}")
    for change in done.changed:
        print(f"not as in its file: {change}")


@command("import", example="isimed import cohort-export --store copy.isimed", rows=True)
def import_(
    session: Session,
    path: Annotated[
        Path, typer.Argument(metavar="PATH", exists=True, help="Exported folder; with --card, foreign embeddings.")
    ],
    card: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, help="JSON card of the foreign encoder that PATH comes from."),
    ] = None,
    space: Annotated[Millimetres, typer.Option(help="With --card: the directions of x_mm, y_mm and z_mm.")] = (
        Millimetres.RAS
    ),
    scans: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, help="With --card: shape and affine of scans that the store lacks."),
    ] = None,
) -> None:
    """Read an exported folder back, or embeddings of another program.

    With --card, PATH is a Parquet file with scan, x_mm, y_mm, z_mm and one column of vectors for each output of the
    card, or a folder of OUTPUT.npy beside patches.parquet. What the store holds already is left alone. Makes the store
    if there is none. Then run isimed index: it encodes nothing that was imported.
    """
    from dataclasses import asdict

    from isimed_cli.render import show_fields

    with session.progress() as progress:
        done = session.open_or_create().import_(path, card=card, space=space.value, scans=scans, progress=progress)
    if session.format is not Format.TABLE:
        show_fields(asdict(done), session.format)
        return
    print(
        f"imported scans {len(done.added)} · unchanged {len(done.unchanged)} · encoders {len(done.encoders)} · "
        f"patches {done.patches:,}"
    )
