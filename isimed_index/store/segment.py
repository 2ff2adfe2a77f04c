"""Segments: the embeddings of one scan's patches by one encoder, and where each patch lies.

A segment is a folder with `patches.parquet` and one `<output>.npy` per named output of the encoder, all with the same
number of rows in the same order. Row `i` has row id `first_row_id + i`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.contracts import conform
from isimed_index.errors import NotFound, StoreDamaged, UsageError
from isimed_index.store.files import RESTORE
from isimed_index.store.integrity import verify
from isimed_index.store.manifest import Artefact

if TYPE_CHECKING:
    import pyarrow as pa

PATCHES = "patches.parquet"
_OUTPUT_NAME = re.compile(r"[a-z][a-z0-9_]*")
_DTYPES = ("float16", "float32")


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment of a pinned generation; files are opened, and checked the first time, when they are asked for."""

    root: Path  # the store
    artefact: Artefact

    @property
    def path(self) -> str:
        """Where it is inside the store, such as `segments/<ulid>`."""
        return self.artefact.path

    @property
    def rows(self) -> int:
        """How many patches it holds."""
        return int(self.artefact.fields["rows"])

    @property
    def first_row_id(self) -> int:
        """Row id of its first patch."""
        return int(self.artefact.fields["first_row_id"])

    @property
    def row_ids(self) -> NDArray[np.int64]:
        """Row ids (n,) of its patches, consecutive."""
        return np.arange(self.first_row_id, self.first_row_id + self.rows, dtype=np.int64)

    @property
    def encoder(self) -> str:
        """Card id of the encoder that made it."""
        return str(self.artefact.fields["encoder"])

    @property
    def grid(self) -> str:
        """Key of the patch lattice."""
        return str(self.artefact.fields["grid"])

    @property
    def task(self) -> str:
        """Hash of scan digest, encoder id and grid: a rerun skips what is there."""
        return str(self.artefact.fields["task"])

    @property
    def scan_artefact(self) -> str:
        """Path of the scan that was encoded, such as `scans/<ulid>.zarr`."""
        return str(self.artefact.fields["scan_artefact"])

    @property
    def outputs(self) -> Mapping[str, Mapping[str, Any]]:
        """Dimension and dtype of each output, by name."""
        outputs: Mapping[str, Mapping[str, Any]] = self.artefact.fields["outputs"]
        return outputs

    def verified(self) -> Path:
        """Where it is on disk; `StoreDamaged` when it is missing or not as committed."""
        return verify(self.root, self.artefact)

    def vectors(self, output: str) -> NDArray[np.floating[Any]]:
        """One output as a read-only memory map (n, d); `NotFound`, or `StoreDamaged` when it is not as committed."""
        if output not in self.outputs:
            raise NotFound(f"no output {output!r} in the segment; there are {', '.join(sorted(self.outputs))}")
        return _open_vectors(self.verified(), output, self.rows, self.outputs[output])

    def patches(self) -> pa.Table:
        """Patch rows (n): scan, i, j, k, x_mm, y_mm, z_mm (patient RAS+) and foreground."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self.verified() / PATCHES
        try:
            table = pq.read_table(path, partitioning=None)
        except (OSError, pa.ArrowException):
            raise StoreDamaged(f"{PATCHES} of a segment cannot be read", next_step=RESTORE) from None
        if table.num_rows != self.rows:
            raise StoreDamaged(f"{PATCHES} of a segment has {table.num_rows} rows, expected {self.rows}")
        return table


def write_segment(directory: Path, patches: pa.Table, outputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Write a segment into a staged folder and return its manifest fields `rows` and `outputs`.

    `outputs` holds float16 or float32 arrays (n, d) of finite values, one row per row of `patches`.
    """
    import pyarrow.parquet as pq

    if not outputs:
        raise UsageError("a segment needs at least one output")
    described: dict[str, Any] = {}
    for name, vectors in outputs.items():
        if not _OUTPUT_NAME.fullmatch(name):
            raise UsageError(f"an output's name is lower-case letters, digits and _, found {name!r}")
        if vectors.ndim != 2 or len(vectors) != patches.num_rows or vectors.dtype.name not in _DTYPES:
            raise UsageError(
                f"output {name}: expected float16 or float32 of shape ({patches.num_rows}, d), "
                f"found {vectors.dtype} of shape {vectors.shape}"
            )
        if not np.isfinite(vectors).all():
            raise UsageError(f"output {name} holds NaN or infinite values", next_step="train the encoder again")
        np.save(directory / f"{name}.npy", np.ascontiguousarray(vectors), allow_pickle=False)
        described[name] = {"dim": vectors.shape[1], "dtype": vectors.dtype.name}
    pq.write_table(conform("patches", patches), directory / PATCHES, compression="zstd")
    return {"rows": patches.num_rows, "outputs": described}


def check_segment(directory: Path, fields: Mapping[str, Any]) -> None:
    """Raise `StoreDamaged` unless the files in `directory` have the rows, dimensions and dtypes of `fields`."""
    import pyarrow.parquet as pq

    rows = pq.read_metadata(directory / PATCHES).num_rows
    if rows != fields["rows"]:
        raise StoreDamaged(f"{PATCHES} of a staged segment has {rows} rows, expected {fields['rows']}")
    for name, form in fields["outputs"].items():
        _open_vectors(directory, name, rows, form)


def _open_vectors(directory: Path, output: str, rows: int, form: Mapping[str, Any]) -> NDArray[np.floating[Any]]:
    file = directory / f"{output}.npy"
    try:
        # A memory map of nothing is refused by the operating system, so an empty array is read.
        vectors = np.load(file, mmap_mode="r" if rows else None, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise StoreDamaged(f"{file.name} of a segment cannot be read", next_step=RESTORE) from None
    expected = ((rows, form["dim"]), form["dtype"])
    if (vectors.shape, vectors.dtype.name) != expected:
        raise StoreDamaged(
            f"{file.name} of a segment is {vectors.dtype} of shape {vectors.shape}, "
            f"expected {expected[1]} of shape {expected[0]}",
            next_step=RESTORE,
        )
    opened: NDArray[np.floating[Any]] = vectors
    return opened
