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
) -> None:
    """Write the store's content as files for other programs.

    Exactly one of --parquet, --npy and --duckdb names a new path, which appears whole or not at all. What is
    written holds scan ids and metadata: treat it like the store.
    """
    from dataclasses import asdict

    from isimed_cli.render import show_fields

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
