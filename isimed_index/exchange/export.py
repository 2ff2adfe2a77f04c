"""Export: the content of one pinned generation as files that pandas, polars, NumPy and DuckDB read.

    parquet   the stored tables, patches-<encoder> (with vectors), lattices.json, encoders/<id>/, voxels/<n>.zarr
    npy       the stored tables, and for each encoder <id>/<output>.npy, patches.parquet, card.json
    duckdb    all views as tables, and vectors_<encoder> with FLOAT[d] arrays

Only the parquet folder can be read back (`restore`), less transforms and kept answers. Row i of `patches` lies beside
row i of the vectors everywhere. Segments are written one after the other, so memory holds the largest one. Files carry
no scan ids in their names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.contracts import ViewName, view_schema
from isimed_index.errors import UsageError
from isimed_index.exchange.columns import shaped, vector_column
from isimed_index.exchange.folder import Exported, becoming, write_seal
from isimed_index.lattice import ScanGeometry, read_geometry
from isimed_index.progress import Progress, Silent
from isimed_index.store.files import CARD, MODEL, WEIGHTS
from isimed_index.store.segment import LABEL_SHARES, PATCHES, Segment, groups
from isimed_index.store.snapshot import SCAN_COLUMNS, Snapshot, StoredTable
from isimed_index.store.sql.patches import label_rows, patch_rows, tells_labels

if TYPE_CHECKING:
    import pyarrow as pa

LATTICES = "lattices.json"
_OF_ENCODERS: tuple[ViewName, ...] = ("encoders", "segments", "regions", "indexes")
_ROWS_AT_ONCE = 1 << 16  # of patches in a DuckDB file


@dataclass(frozen=True, slots=True)
class Embedded:
    """What one encoder made of the chosen scans."""

    id: str  # of its card
    folder: Path
    segments: Sequence[Segment]  # those with living patches, by rising row id
    outputs: Mapping[str, tuple[int, np.dtype[Any]]]  # dimension and type; where segments differ, one that holds both

    @property
    def rows(self) -> int:
        """How many living patches there are."""
        return sum(segment.rows for segment in self.segments)

    def vectors(self, segment: Segment) -> dict[str, NDArray[Any]]:
        """Every output (n, d) of a segment in the type that the export has."""
        return {name: segment.vectors(name).astype(dtype, copy=False) for name, (_, dtype) in self.outputs.items()}


@dataclass(frozen=True)
class Selection:
    """The scans of a snapshot that a condition keeps, and the encoders whose embeddings of them are wanted."""

    snapshot: Snapshot
    where: str | None = None  # SQL over `scans`; None: all
    encoder: str | None = None  # id, beginning of one, or name; None: all

    @cached_property
    def tables(self) -> dict[StoredTable, pa.Table]:
        """Rows of `scans` (less `artefact`, a place inside the store), and of all tables what is about these scans.

        A kept answer is about two: the scan that it was asked in, and the one that it was found in.
        """
        import pyarrow.compute as pc

        scans = self.snapshot.matching("scans", self.where)
        found: dict[StoredTable, pa.Table] = {"scans": scans.drop_columns("artefact")}
        subjects = self.snapshot.table("subjects")
        found["subjects"] = subjects.filter(pc.is_in(subjects["subject"], scans["subject"].combine_chunks()))
        of: tuple[StoredTable, ...] = ("labels", "transforms", "matches")
        for name in of:
            rows = self.snapshot.table(name)
            for column in SCAN_COLUMNS[name]:
                rows = rows.filter(pc.is_in(rows[column], scans["scan"].combine_chunks()))
            found[name] = rows
        return found

    @cached_property
    def scans(self) -> list[str]:
        """Ids of the scans, in the order of their rows."""
        ids: list[str] = self.tables["scans"].column("scan").to_pylist()
        return ids

    @cached_property
    def encoders(self) -> list[Embedded]:
        """The encoders, each with its segments of the scans."""
        one = self.encoder is not None
        artefacts = [self.snapshot.encoder_artefact(self.encoder)] if one else self.snapshot.artefacts("encoder")
        return [self._embedded(artefact.fields["encoder"], self.snapshot.verified(artefact)) for artefact in artefacts]

    def _embedded(self, encoder_id: str, folder: Path) -> Embedded:
        wanted, of = set(self.scans), self.snapshot.scan_of
        stored = self.snapshot.segments(encoder_id)
        segments = [segment for segment in stored if segment.rows and of[segment.scan_artefact] in wanted]
        outputs: dict[str, tuple[int, np.dtype[Any]]] = {}
        for segment in segments:
            for name, form in segment.outputs.items():
                before = outputs[name][1] if name in outputs else np.dtype(form["dtype"])
                outputs[name] = form["dim"], np.promote_types(before, form["dtype"])
        return Embedded(encoder_id, folder, segments, outputs)

    def patch_schema(self, encoders: Sequence[Embedded]) -> pa.Schema:
        """The view's columns, and those that segments hold besides."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = dict.fromkeys(segment.verified() / PATCHES for made in encoders for segment in made.segments)
        stored = [pq.read_schema(file).remove_metadata() for file in files]
        return pa.unify_schemas([view_schema("patches"), *stored], promote_options="permissive")

    def scan_of(self, segment: Segment) -> str:
        """Id of the scan that a segment is of."""
        return self.snapshot.scan_of[segment.scan_artefact]

    def counts(self) -> dict[str, Any]:
        """How many rows of what are exported."""
        tables: dict[str, Any] = {name: rows.num_rows for name, rows in self.tables.items()}
        return {**tables, "patches": {made.id: made.rows for made in self.encoders}}


def export_parquet(chosen: Selection, out: Path, *, voxels: bool = False, progress: Progress | None = None) -> Exported:
    """Write the folder that `restore` reads back; with `voxels`, the scans' OME-Zarr trees too.

    `UsageError` when `out` is there already and is not an empty folder.
    """
    progress = progress or Silent()
    with becoming(out) as folder:
        _write_tables(chosen, folder)
        geometry = _geometry(chosen)
        for number, scan in enumerate(chosen.scans if voxels else ()):
            geometry[scan]["voxels"] = f"voxels/{number:06d}.zarr"
            shutil.copytree(chosen.snapshot.chunks_path(scan), folder / geometry[scan]["voxels"])
        lattices = {}
        for made in chosen.encoders:
            _copy_files(made, folder / "encoders" / made.id, (CARD, WEIGHTS, MODEL))
            lattices[made.id] = _write_patches(chosen, made, folder, progress)
        content = {"scans": geometry, "segments": lattices}
        (folder / LATTICES).write_text(json.dumps(content), encoding="utf-8")
        return _sealed(chosen, folder, "parquet", voxels=voxels)


def export_npy(chosen: Selection, out: Path, *, progress: Progress | None = None) -> Exported:
    """Write a folder of NumPy arrays (n, d), one for each output of each encoder, with their patches and the tables."""
    progress = progress or Silent()
    with becoming(out) as folder:
        _write_tables(chosen, folder)
        for made in chosen.encoders:
            _copy_files(made, folder / made.id, (CARD,))
            _write_arrays(chosen, made, folder / made.id, progress)
        return _sealed(chosen, folder, "npy")


def export_duckdb(chosen: Selection, out: Path, *, vectors: bool = False, progress: Progress | None = None) -> Exported:
    """Write a DuckDB database with the views as tables; with `vectors`, a table of arrays for each encoder too."""
    from isimed_index.store.sql.database import write_database

    with becoming(out, a_file=True) as file:
        write_database(file, _database_tables(chosen, vectors, progress or Silent()))
        return _exported(chosen, "duckdb", 1, file.stat().st_size)


def _write_tables(chosen: Selection, folder: Path) -> None:
    import pyarrow.parquet as pq

    folder.mkdir()
    for name, rows in chosen.tables.items():
        pq.write_table(rows, folder / f"{name}.parquet", compression="zstd")


def _copy_files(made: Embedded, place: Path, names: Sequence[str]) -> None:
    place.mkdir(parents=True)
    for name in names:
        if (made.folder / name).is_file():
            shutil.copyfile(made.folder / name, place / name)


def _geometry(chosen: Selection) -> dict[str, dict[str, Any]]:
    """By scan id, its shape, affine and the affine of its file: from a segment, so that voxels need not be read."""
    segments = {chosen.scan_of(segment): segment for segment in chosen.snapshot.segments()}
    found = {
        scan: read_geometry(segments[scan]) if scan in segments else _opened(chosen, scan) for scan in chosen.scans
    }
    return {
        scan: {"shape": list(at.shape), "affine": at.affine.tolist(), "source_affine": at.source_affine.tolist()}
        for scan, at in found.items()
    }


def _opened(chosen: Selection, scan: str) -> ScanGeometry:
    from isimed_index.scans.chunks import open_chunks

    stored = open_chunks(chosen.snapshot.chunks_path(scan), scan)
    return ScanGeometry.of(stored.shape, stored.affine, stored.attributes)


def _write_patches(chosen: Selection, made: Embedded, folder: Path, progress: Progress) -> dict[str, dict[str, Any]]:
    """Write the patches of one encoder, a row group for each segment; returns by scan id what its segment says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = chosen.patch_schema([made])
    if clash := made.outputs.keys() & set(plain.names):
        raise UsageError(f"the output {min(clash)!r} is named like a column of patches", next_step="use --npy")
    schema = plain
    for name, (dim, dtype) in made.outputs.items():
        schema = schema.append(pa.field(name, pa.list_(pa.from_numpy_dtype(dtype), dim)))
    lattices = {}
    progress.start("export", len(made.segments), "scans")
    with pq.ParquetWriter(folder / f"patches-{made.id}.parquet", schema, compression="zstd") as writer:
        for group, segment in enumerate(made.segments):
            rows = shaped(patch_rows(chosen.snapshot, [segment]), plain)
            for name, vectors in made.vectors(segment).items():
                rows = rows.append_column(schema.field(name), vector_column(vectors))
            writer.write_table(rows, row_group_size=rows.num_rows)
            lattices[chosen.scan_of(segment)] = {
                "row_group": group,
                "grid": segment.grid,
                "task": segment.task,
                "outputs": {name: form["dtype"] for name, form in segment.outputs.items()},
                "lattice": segment.lattice(),
            }
            progress.advance(1)
    progress.finish()
    return lattices


def _write_arrays(chosen: Selection, made: Embedded, place: Path, progress: Progress) -> None:
    """Write the vectors of one encoder as arrays, filled segment by segment, and their patches in the same order."""
    import pyarrow.parquet as pq

    arrays = {
        name: np.lib.format.open_memmap(place / f"{name}.npy", mode="w+", dtype=dtype, shape=(made.rows, dim))
        for name, (dim, dtype) in made.outputs.items()
    }
    start = 0
    progress.start("export", len(made.segments), "scans")
    with pq.ParquetWriter(place / PATCHES, chosen.patch_schema([made]), compression="zstd") as writer:
        for segment in made.segments:
            for name, vectors in made.vectors(segment).items():
                arrays[name][start : start + segment.rows] = vectors
            writer.write_table(shaped(patch_rows(chosen.snapshot, [segment]), writer.schema))
            start += segment.rows
            progress.advance(1)
    for array in arrays.values():
        array.flush()
    progress.finish()


def _database_tables(chosen: Selection, vectors: bool, progress: Progress) -> Iterator[tuple[str, pa.Table]]:
    """Name and rows, in pieces: those of one name have the same columns."""
    import pyarrow as pa
    import pyarrow.compute as pc

    yield from chosen.tables.items()
    ids = pa.array([made.id for made in chosen.encoders], pa.string())
    for view in _OF_ENCODERS:
        rows = chosen.snapshot.matching(view, None)
        rows = rows.filter(pc.is_in(rows["encoder"], ids))
        if "scan" in rows.column_names:
            rows = rows.filter(pc.is_in(rows["scan"], pa.array(chosen.scans, pa.string())))
        yield view, rows
    yield "generations", chosen.snapshot.matching("generations", None)
    stored = chosen.patch_schema(chosen.encoders)
    schema = pa.schema([field for field in stored if field.name != LABEL_SHARES])  # which `patch_labels` tells
    yield "patches", schema.empty_table()
    yield "patch_labels", view_schema("patch_labels").empty_table()
    for made in chosen.encoders:
        for some in groups(made.segments, _ROWS_AT_ONCE):
            yield "patches", shaped(patch_rows(chosen.snapshot, some), schema)
            yield "patch_labels", label_rows([segment for segment in some if tells_labels(segment)])
    for made in chosen.encoders if vectors else ():
        progress.start("export", len(made.segments), "scans")
        for segment in made.segments:
            arrays = {name: vector_column(found.astype(np.float32)) for name, found in made.vectors(segment).items()}
            yield f"vectors_{made.id}", pa.table({"patch": segment.row_ids, **arrays})
            progress.advance(1)
        progress.finish()


def _sealed(chosen: Selection, folder: Path, layout: str, **more: Any) -> Exported:
    facts: Mapping[str, Any] = {
        "isimed_index": version("isimed-index"),
        "generation": chosen.snapshot.generation,
        "layout": layout,
        **more,
        "counts": chosen.counts(),
    }
    return _exported(chosen, layout, *write_seal(folder, facts))


def _exported(chosen: Selection, layout: str, files: int, size: int) -> Exported:
    patches = sum(chosen.counts()["patches"].values())
    return Exported(layout, chosen.snapshot.generation, len(chosen.scans), len(chosen.encoders), patches, files, size)
