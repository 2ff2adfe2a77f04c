"""Segments: the embeddings of one scan's patches by one encoder, and where each patch lies.

    as encoded    one artefact, one part     <output>.npy (rows, d) · patches.parquet · lattice.json
    packed        one artefact, many parts   the same, part after part · row_ids.npy · lattice.json: a list

Compaction packs many small artefacts into a large one; each part of it stays the `Segment` that it was, row ids
included. Rows that a tombstone names are left out of everything that is read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.contracts import conform
from isimed_index.errors import NotFound, StoreDamaged, StoreUnreadable, UsageError
from isimed_index.store.files import REPAIR
from isimed_index.store.integrity import verify
from isimed_index.store.manifest import Artefact
from isimed_index.store.place.faults import numbered, spare
from isimed_index.store.place.storage import Storage
from isimed_index.store.ranges import read_rows

if TYPE_CHECKING:
    import pyarrow as pa

PATCHES = "patches.parquet"
ROW_IDS = "row_ids.npy"
LABEL_SHARES = "label_shares"  # a column of patches.parquet where the scan has a label map: label → its share
LATTICE = "lattice.json"
PART = ("scan_artefact", "grid", "task", "first_row_id")  # what a part says of itself, packed or not
_OUTPUT_NAME = re.compile(r"[a-z][a-z0-9_]*")
_DTYPES = ("float16", "float32")
_WHOLE_BYTES = 8 << 20  # a smaller segment is fetched whole, and its hash checked, when a few rows of it are asked for
_NONE_DEAD: NDArray[np.int64] = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The segment of one scan in a pinned generation; files are opened, and checked the first time, when asked for."""

    storage: Storage
    artefact: Artefact
    part: Mapping[str, Any]  # `PART`, and for a packed one `part`, `start`, `rows`, `end_row_id`
    dead: NDArray[np.int64] = field(default_factory=lambda: _NONE_DEAD)  # sorted row ids of it that tombstones name

    @property
    def path(self) -> str:
        """Where it is inside the store, such as `segments/<ulid>`; the parts of a packed one share it."""
        return self.artefact.path

    @property
    def stored_rows(self) -> int:
        """How many patches its files hold, dead ones included."""
        return int(self.part.get("rows", self.artefact.fields["rows"]))

    @property
    def rows(self) -> int:
        """How many patches of it live."""
        return self.stored_rows - self.dead.size

    @property
    def first_row_id(self) -> int:
        """Row id of its first patch when it was written; no other segment has a row id from there to its last."""
        return int(self.part["first_row_id"])

    @property
    def end_row_id(self) -> int:
        """One more than the last row id that it was given when it was written."""
        return int(self.part.get("end_row_id", self.first_row_id + self.stored_rows))

    @property
    def row_ids(self) -> NDArray[np.int64]:
        """Row ids (n,) of its living patches, rising."""
        stored = self._stored_row_ids()
        return stored if self._all else stored[self._keep(stored)]

    @property
    def key(self) -> str:
        """By what tombstones name it."""
        return str(self.first_row_id)

    @property
    def _all(self) -> bool:
        return self.dead.size == 0

    def _stored_row_ids(self) -> NDArray[np.int64]:
        if self.end_row_id - self.first_row_id == self.stored_rows:
            return np.arange(self.first_row_id, self.end_row_id, dtype=np.int64)
        stored = self.row_ids_in(self.verified())
        if len(stored) != self.stored_rows:
            raise StoreDamaged(f"{ROW_IDS} of a segment has lost rows", next_step=REPAIR)
        return stored

    def row_ids_in(self, directory: Path) -> NDArray[np.int64]:
        """Row ids of its rows, dead ones too, as its files in `directory` say; those are not checked."""
        if "part" not in self.part:
            return np.arange(self.first_row_id, self.end_row_id, dtype=np.int64)
        stored: NDArray[np.int64] = _open_array(directory / ROW_IDS)[self._slice]
        return stored

    def _keep(self, stored: NDArray[np.int64]) -> NDArray[np.bool_]:
        return ~np.isin(stored, self.dead, assume_unique=True)

    @property
    def _slice(self) -> slice:
        start = int(self.part.get("start", 0))
        return slice(start, start + self.stored_rows)

    @property
    def encoder(self) -> str:
        """Card id of the encoder that made it."""
        return str(self.artefact.fields["encoder"])

    @property
    def grid(self) -> str:
        """Key of the patch lattice."""
        return str(self.part["grid"])

    @property
    def task(self) -> str:
        """Hash of scan digest, encoder id, grid and precision: a rerun skips what is there."""
        return str(self.part["task"])

    @property
    def scan_artefact(self) -> str:
        """Path of the scan that was encoded, such as `scans/<ulid>.zarr`."""
        return str(self.part["scan_artefact"])

    @property
    def outputs(self) -> Mapping[str, Mapping[str, Any]]:
        """Dimension and dtype of each output, by name."""
        outputs: Mapping[str, Mapping[str, Any]] = self.artefact.fields["outputs"]
        return outputs

    def verified(self) -> Path:
        """Where it is on disk; `StoreDamaged` when it is missing or not as committed."""
        return verify(self.storage, self.artefact)

    def vectors(self, output: str) -> NDArray[np.floating[Any]]:
        """One output (n, d), a read-only memory map unless rows died; `NotFound`, or `StoreDamaged` when it changed."""
        form = self._form(output)
        stored = _open_vectors(self.verified(), output, self.artefact.fields["rows"], form)[self._slice]
        return stored if self._all else stored[self._keep(self._stored_row_ids())]

    def goes_on_in(self, other: Segment) -> bool:
        """Whether the rows of another segment follow its own in one file, later row ids and none of both dead."""
        return (
            self.path == other.path
            and self._all
            and other._all
            and self._slice.stop == other._slice.start
            and self.end_row_id <= other.first_row_id
        )

    def vectors_to(self, last: Segment, output: str) -> NDArray[np.floating[Any]]:
        """Vectors (n, d) of its rows and of all that go on, one after the other, up to those of `last`."""
        if last is self:
            return self.vectors(output)
        form = self._form(output)
        rows = slice(self._slice.start, last._slice.stop)
        return _open_vectors(self.verified(), output, self.artefact.fields["rows"], form)[rows]

    def _form(self, output: str) -> Mapping[str, Any]:
        """Dimension and dtype of an output; `NotFound` when there is none of that name."""
        if output not in self.outputs:
            raise NotFound(
                f"no output {output!r} in the segment; there are {', '.join(sorted(self.outputs))}",
                next_step="isimed sql 'SELECT * FROM encoders'",
            )
        return self.outputs[output]

    def vectors_at(self, output: str, rows: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        """Vectors (m, d) at positions `rows` (m,) among the living rows, read alone where the store is elsewhere.

        Of a large segment that is not on this machine, only these rows are transferred. Its hash cannot be checked
        then: that the file has the right shape and dtype, and the values are finite, is all that is (`StoreDamaged`).
        `UsageError` for a position that there is not.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.ndim != 1 or (rows.size and not 0 <= rows.min() <= rows.max() < self.rows):
            raise UsageError(f"expected positions (m,) among {self.rows} rows, found shape {rows.shape} or others")
        if self.storage.at_hand(self.path) or self.artefact.bytes < _WHOLE_BYTES:
            return np.asarray(self.vectors(output)[rows])
        form = self._form(output)
        shape = (int(self.artefact.fields["rows"]), int(form["dim"]))
        stored = rows if self._all else np.flatnonzero(self._keep(self._row_ids_elsewhere()))[rows]
        return read_rows(self.storage, f"{self.path}/{output}.npy", stored + self._slice.start, shape, form["dtype"])

    def _row_ids_elsewhere(self) -> NDArray[np.int64]:
        """`_stored_row_ids` without the rest of the segment."""
        if self.end_row_id - self.first_row_id == self.stored_rows:
            return self._stored_row_ids()
        place = np.arange(self._slice.start, self._slice.stop)
        return read_rows(self.storage, f"{self.path}/{ROW_IDS}", place, (int(self.artefact.fields["rows"]),), "int64")

    def patches(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Patch rows (n): scan, i, j, k, x_mm, y_mm, z_mm (patient RAS+) and foreground; or only some `columns`."""
        (table,) = patches_of([self], columns)
        return table

    def living(self, table: pa.Table) -> pa.Table:
        """The rows that live, of a table of all its stored rows."""
        import pyarrow as pa

        return table if self._all else table.filter(pa.array(self._keep(self._stored_row_ids())))

    def patch_columns(self) -> pa.Schema:
        """Which columns its patch rows have."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_schema(self.verified() / PATCHES)
        except (OSError, pa.ArrowException) as error:
            spare(error, PATCHES)
            raise StoreDamaged(f"{PATCHES} of a segment cannot be read", next_step=REPAIR) from None

    def lattice(self) -> dict[str, Any]:
        """What `lattice.json` says of this segment; `StoreDamaged` when it cannot be read."""
        path = self.verified()
        try:
            content = json.loads((path / LATTICE).read_text(encoding="utf-8"))
            return dict(content[int(self.part["part"])] if "part" in self.part else content)
        except StoreUnreadable:
            raise
        except (OSError, ValueError, LookupError, TypeError) as error:
            spare(error, LATTICE)
            raise StoreDamaged(f"{LATTICE} of a segment cannot be read", next_step=REPAIR) from None


def parts_of(artefact: Artefact) -> Sequence[Mapping[str, Any]]:
    """The parts of a segment artefact: those of a packed one, or its own fields."""
    parts: Sequence[Mapping[str, Any]] | None = artefact.fields.get("parts")
    return [{key: artefact.fields[key] for key in PART}] if parts is None else parts


def part_keys(artefact: Artefact) -> list[str]:
    """By what tombstones name the parts of a segment artefact: their first row ids, which outlive packing."""
    return [str(part["first_row_id"]) for part in parts_of(artefact)]


def groups(segments: Sequence[Segment], patches: int) -> Iterator[list[Segment]]:
    """Segments in their order, so many together that they have at least so many patches."""
    some: list[Segment] = []
    for segment in segments:
        some.append(segment)
        if sum(piece.rows for piece in some) >= patches:
            yield some
            some = []
    if some:
        yield some


def patches_of(segments: Sequence[Segment], columns: Sequence[str] | None = None) -> list[pa.Table]:
    """What `Segment.patches` gives of each of some segments that lie in one artefact, whose file is opened once.

    `StoreDamaged` when it cannot be read, or has lost rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = segments[0].verified() / PATCHES
    packed = "part" in segments[0].part
    full = [segment for segment in segments if segment.stored_rows]
    expected = [segment.stored_rows for segment in full]
    try:
        with pq.ParquetFile(path) as file:
            every = range(file.num_row_groups if full else 0)
            groups = [int(segment.part["part"]) for segment in full] if packed else list(every)
            found = [file.metadata.row_group(group).num_rows for group in groups]
            together = file.read_row_groups(groups, columns=columns and list(columns))
    except (OSError, IndexError, pa.ArrowException) as error:
        spare(error, PATCHES)
        raise StoreDamaged(f"{PATCHES} of a segment cannot be read", next_step=REPAIR) from None
    if (packed and found != expected) or together.num_rows != sum(expected):
        raise StoreDamaged(
            f"{PATCHES} of a segment has {together.num_rows} rows, expected {sum(expected)}", next_step=REPAIR
        )
    starts = np.cumsum([0, *(segment.stored_rows for segment in segments)])
    return [
        segment.living(together.slice(int(start), segment.stored_rows))
        for segment, start in zip(segments, starts, strict=False)
    ]


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
        with numbered(directory):
            np.save(directory / f"{name}.npy", np.ascontiguousarray(vectors), allow_pickle=False)
        described[name] = {"dim": vectors.shape[1], "dtype": vectors.dtype.name}
    pq.write_table(conform("patches", patches), directory / PATCHES, compression="zstd")
    return {"rows": patches.num_rows, "outputs": described}


def check_segment(directory: Path, fields: Mapping[str, Any]) -> None:
    """Raise `StoreDamaged` unless the files in `directory` have the rows, dimensions and dtypes of `fields`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_metadata(directory / PATCHES).num_rows
    except (OSError, pa.ArrowException) as error:
        spare(error, PATCHES)
        raise StoreDamaged(f"{PATCHES} of a segment cannot be read", next_step=REPAIR) from None
    if rows != fields["rows"]:
        raise StoreDamaged(f"{PATCHES} of a segment has {rows} rows, expected {fields['rows']}", next_step=REPAIR)
    for name, form in fields["outputs"].items():
        _open_vectors(directory, name, rows, form)
    if "parts" in fields and len(_open_array(directory / ROW_IDS)) != rows:
        raise StoreDamaged(f"{ROW_IDS} of a segment has not one id a row", next_step=REPAIR)


def _open_array(file: Path) -> NDArray[Any]:
    """A memory map of a .npy file; of an empty one, which the operating system refuses to map, an array."""
    try:
        try:
            opened: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError:
            opened = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        spare(error, file.name)
        raise StoreDamaged(f"{file.name} of a segment cannot be read", next_step=REPAIR) from None
    return opened


def _open_vectors(directory: Path, output: str, rows: int, form: Mapping[str, Any]) -> NDArray[np.floating[Any]]:
    file = directory / f"{output}.npy"
    vectors = _open_array(file)
    expected = ((rows, form["dim"]), form["dtype"])
    if (vectors.shape, vectors.dtype.name) != expected:
        raise StoreDamaged(
            f"{file.name} of a segment is {vectors.dtype} of shape {vectors.shape}, "
            f"expected {expected[1]} of shape {expected[0]}",
            next_step=REPAIR,
        )
    return vectors
