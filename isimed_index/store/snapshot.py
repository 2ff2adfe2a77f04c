"""Reading one pinned generation: no lock is taken, and later commits do not show.

A snapshot that `Repository.pin` made holds a lease, which keeps a collector from removing what it reads.

Every file is checked against the manifest the first time it is read in a process (see `integrity`).
"""

from __future__ import annotations

import difflib
import json
import warnings
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from isimed_index.contracts import ViewName, arrow_schema
from isimed_index.errors import NotFound, StoreDamaged, StoreWarning
from isimed_index.store.files import CARD, REPAIR
from isimed_index.store.integrity import verify
from isimed_index.store.manifest import Artefact, Manifest
from isimed_index.store.place.claims import Claim
from isimed_index.store.place.faults import spare
from isimed_index.store.place.storage import Storage

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from isimed_index.store.segment import Segment

StoredTable = Literal["scans", "subjects", "labels", "transforms", "matches"]
STORED_TABLES: tuple[StoredTable, ...] = get_args(StoredTable)
SCAN_COLUMNS: Mapping[StoredTable, tuple[str, ...]] = {  # rows that name a scan in one of these go when it goes
    "scans": ("scan",),
    "labels": ("scan",),
    "transforms": ("scan",),
    "matches": ("from_scan", "scan"),
}


class Snapshot:
    """A store as it was at one generation.

    `behind` says that the newest generation is damaged and this older one stands in for it: it can be read, but
    nothing can be committed until the store is repaired. `newest_generation` counts the damaged one.
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, *, newest: int | None = None, lease: Claim | None = None
    ) -> None:
        self.storage = storage
        self.manifest = manifest
        self.newest_generation = manifest.generation if newest is None else newest
        self._lease = lease
        self._tables: dict[str, pa.Table] = {}
        self._tombstones: dict[str, NDArray[np.int64]] = {}  # row ids by path
        if lease is not None:
            weakref.finalize(self, lease.release)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lease up, when there is one: a collector may then remove what only this generation holds."""
        if self._lease is not None:
            self._lease.release()

    @property
    def path(self) -> Path:
        """The directory that artefacts are read from: the store, or the local cache of one elsewhere."""
        return self.storage.root

    @property
    def behind(self) -> bool:
        """Whether it stands in for a newer generation that is damaged."""
        return self.newest_generation > self.generation

    @property
    def generation(self) -> int:
        """The generation that is pinned."""
        return self.manifest.generation

    def artefacts(self, kind: str) -> list[Artefact]:
        """Artefacts of one kind (scan, encoder, segment, table, frame, …) in the order they were committed."""
        return self.manifest.find(kind)

    def verified(self, artefact: Artefact) -> Path:
        """Where an artefact is on disk; `StoreDamaged` when it is missing or not as committed."""
        return verify(self.storage, artefact)

    def table(self, name: StoredTable) -> pa.Table:
        """All rows of a stored table in commit order; the contract's columns come first."""
        if name not in self._tables:
            self._tables[name] = self._read_table(name)
        return self._tables[name]

    def _read_table(self, name: StoredTable) -> pa.Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pieces = [arrow_schema(name).empty_table()]
        for artefact in self.artefacts("table"):
            if artefact.fields["table"] != name:
                continue
            path = self.verified(artefact)
            try:
                piece = pq.read_table(path, partitioning=None)
            except (OSError, pa.ArrowException) as error:
                spare(error, f"the table {artefact.name}")
                raise StoreDamaged(f"a piece of the table {name} cannot be read", next_step=REPAIR) from None
            if piece.num_rows != artefact.fields["rows"]:
                raise StoreDamaged(f"a piece of the table {name} has lost rows", next_step=REPAIR)
            pieces.append(piece)
        return pa.concat_tables(pieces, promote_options="permissive")

    @cached_property
    def _scan_rows(self) -> dict[str, int]:
        return {scan: row for row, scan in enumerate(self.table("scans").column("scan").to_pylist())}

    def scan_ids(self) -> list[str]:
        """Ids of all scans, in the order they were added."""
        return list(self._scan_rows)

    def scan_row(self, scan_id: str) -> dict[str, Any]:
        """The row of `scans` with that id; `NotFound` names the ids that look like it."""
        if scan_id not in self._scan_rows:
            raise _not_found("scan", scan_id, list(self._scan_rows), "isimed ls")
        row: dict[str, Any] = self.table("scans").slice(self._scan_rows[scan_id], 1).to_pylist()[0]
        return row

    def chunks_path(self, scan_id: str) -> Path:
        """The folder with a scan's voxels, checked the first time."""
        relative = self.scan_row(scan_id)["artefact"]
        for artefact in self.artefacts("scan"):
            if artefact.path == relative:
                return self.verified(artefact)
        raise StoreDamaged(f"the voxels of scan {scan_id!r} are not in the manifest", next_step=REPAIR)

    @cached_property
    def scan_of(self) -> Mapping[str, str]:
        """Scan id by the path of its voxels (a segment's `scan_artefact`)."""
        scans = self.table("scans")
        return dict(zip(scans.column("artefact").to_pylist(), scans.column("scan").to_pylist(), strict=True))

    @cached_property
    def voxels_of(self) -> Mapping[str, str]:
        """Path of its voxels by scan id."""
        return {scan: path for path, scan in self.scan_of.items()}

    def card(self, artefact: Artefact) -> dict[str, Any]:
        """The card of an encoder artefact, as it is on disk."""
        path = self.verified(artefact) / CARD
        try:
            card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            spare(error, CARD)
            raise StoreDamaged("an encoder's card cannot be read", next_step=REPAIR) from None
        return card

    def encoder_artefact(self, encoder: str | None = None) -> Artefact:
        """The encoder with that card id, unique beginning of one, or name (the newest of it); None: the newest."""
        encoders = self.artefacts("encoder")
        if encoder is None:
            if not encoders:
                raise NotFound("the store has no encoder yet", next_step="isimed pretrain")
            return encoders[-1]
        exact = [artefact for artefact in encoders if artefact.fields["encoder"] == encoder]
        named = exact or [artefact for artefact in encoders if self._name_of(artefact) == encoder]
        if named:
            return named[-1]
        begun = [artefact for artefact in encoders if encoder and artefact.fields["encoder"].startswith(encoder)]
        if len({artefact.fields["encoder"] for artefact in begun}) == 1:
            return begun[-1]
        damaged = [artefact.fields["encoder"] for artefact in encoders if self._name_of(artefact) is None]
        if damaged and not begun:
            raise StoreDamaged(
                f"no whole encoder is called {encoder!r}; the card of {' and '.join(damaged)} is damaged",
                next_step=REPAIR,
            )
        names = filter(None, map(self._name_of, encoders))
        known = [*names, *(str(artefact.fields["encoder"]) for artefact in encoders)]
        if begun:
            raise NotFound(f"{encoder!r} is the beginning of {len(begun)} encoder ids", next_step="give more of the id")
        raise _not_found("encoder", encoder, known, "isimed ls encoders")

    def _name_of(self, artefact: Artefact) -> str | None:
        """An encoder's name; None when its card is damaged: by its id it can still be found, and deleted."""
        try:
            return str(self.card(artefact)["name"])
        except StoreDamaged:
            return None

    def encoder_path(self, encoder: str | None = None) -> Path:
        """The folder of an encoder (`card.json`, `weights.safetensors`), found as `encoder_artefact` does, checked."""
        return self.verified(self.encoder_artefact(encoder))

    def segments(self, encoder_id: str | None = None) -> list[Segment]:
        """Segments of one encoder (its full card id; None: of all), by rising row id; packed ones part by part."""
        from isimed_index.store.segment import parts_of

        tombstones = self.artefacts("tombstone")
        found = [
            self._segment(artefact, part, tombstones)
            for artefact in self.artefacts("segment")
            if encoder_id is None or artefact.fields["encoder"] == encoder_id
            for part in parts_of(artefact)
        ]
        return sorted(found, key=lambda segment: segment.first_row_id)

    def _segment(self, artefact: Artefact, part: Mapping[str, Any], tombstones: Sequence[Artefact]) -> Segment:
        from isimed_index.store.segment import Segment

        whole = Segment(self.storage, artefact, part)
        pieces = [piece for piece in tombstones if whole.key in piece.fields["dead"]]
        if not pieces:
            return whole
        import numpy as np

        dead = np.unique(np.concatenate([self._dead_rows(piece) for piece in pieces]))
        first, last = np.searchsorted(dead, [whole.first_row_id, whole.end_row_id])
        return Segment(self.storage, artefact, part, dead[first:last])

    def _dead_rows(self, piece: Artefact) -> NDArray[np.int64]:
        """Row ids in a tombstone; `StoreDamaged` when it cannot be read, because the dead must not come back."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if piece.path not in self._tombstones:
            path = self.verified(piece)
            try:
                rows = pq.read_table(path, partitioning=None).column("patch").to_numpy()
            except (OSError, KeyError, pa.ArrowException) as error:
                spare(error, f"the tombstone {piece.name}")
                raise StoreDamaged("a tombstone cannot be read", next_step=REPAIR) from None
            self._tombstones[piece.path] = rows
        return self._tombstones[piece.path]

    def segments_by_scan(self, encoder_id: str) -> dict[str, Segment]:
        """By scan id, the segment of one encoder (there is one: a scan that is encoded again replaces it)."""
        return {self.scan_of[segment.scan_artefact]: segment for segment in self.segments(encoder_id)}

    def newest(self, kind: Literal["frame", "index", "region"], encoder_id: str) -> Artefact | None:
        """The frame, index or regions of an encoder that were committed last."""
        found = [artefact for artefact in self.artefacts(kind) if artefact.fields["encoder"] == encoder_id]
        return found[-1] if found else None

    def frame_path(self, encoder_id: str) -> Path | None:
        """The folder of an encoder's newest canonical frame, checked; None when it has none."""
        artefact = self.newest("frame", encoder_id)
        return None if artefact is None else self.verified(artefact)

    def index_path(self, encoder_id: str) -> Path | None:
        """The folder of an encoder's newest index; None when it has none.

        A missing or damaged index is None too, with a `StoreWarning`: an exact search then gives the right answer.
        """
        artefact = self.newest("index", encoder_id)
        if artefact is None:
            return None
        try:
            return self.verified(artefact)
        except StoreDamaged as error:
            warnings.warn(f"{error}; the search is exact and slower. Next: isimed index", StoreWarning, stacklevel=2)
            return None

    def sql(self, query: str, params: Mapping[str, Any] | None = None, timeout_s: float = 30.0) -> pa.Table:
        """Run one read-only statement over the views of this generation; `SqlRefused` for anything else.

        `params` fills `$name` in the query. The views are listed in `catalog`.
        """
        from isimed_index.store.sql.catalog import run

        return run(self, query, params, timeout_s)

    def matching(
        self,
        view: StoredTable | ViewName,
        where: str | None,
        columns: Sequence[str] | None = None,
        timeout_s: float = 30.0,
    ) -> pa.Table:
        """Rows of a view (all columns, or some) that an SQL condition keeps (None: all); `SqlRefused` if it is none."""
        from isimed_index.store.sql.catalog import matching

        if where is None and columns is None and view in STORED_TABLES:
            return self.table(view)
        return matching(self, view, "true" if where is None else where, columns, timeout_s)


def _not_found(what: str, asked: str, known: list[str], listing: str) -> NotFound:
    begun = [name for name in known if asked and name.lower().startswith(asked.lower())]
    close = begun[:3] or difflib.get_close_matches(asked, known, n=3)
    if asked and not close:  # of longer names the beginnings
        heads = {name[: len(asked)].lower(): name for name in reversed(known)}
        close = [heads[head] for head in difflib.get_close_matches(asked.lower(), heads, n=3)]
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return NotFound(f"no {what} {asked!r} in the store{hint}", next_step=listing)
