"""One vector of each encoded scan, and one of each labelled region of it, from stored vectors: nothing is encoded.

    segment ─ unit vectors by the frame's standard ─┬─ weights: foreground of each patch ───────▶ the scan
                                                    └─ weights: each label's share of a patch ─▶ its regions

They are kept up to date as the frame is: what is new is pooled, what is there stays, and a new standard, which `l2`
encoders get when their frame is fitted anew, has all pooled again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.contracts import conform
from isimed_index.encoders.card import EncoderCard
from isimed_index.errors import StoreDamaged, StoreWarning
from isimed_index.frame import read_frame
from isimed_index.index.card import row_ranges
from isimed_index.lattice import Standard
from isimed_index.pooling import Pooled, pool
from isimed_index.progress import Progress
from isimed_index.store.derived import commit_derived
from isimed_index.store.regions import StoredRegions, living_regions, write_regions
from isimed_index.store.segment import Segment
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.sql.patches import label_rows, tells_labels
from isimed_index.store.transaction import Transaction

if TYPE_CHECKING:
    import pyarrow as pa

LEAST_WEIGHT = 1.0  # of a region, in patches: where patches overlap, one cell of their lattice (decision 0022)


def commit_regions(transaction: Transaction, card: EncoderCard, progress: Progress) -> bool:
    """Pool what is not pooled yet and commit it with what is, unless the stored regions are up to date.

    False, and nothing is committed, when there is no frame, or another process has committed a frame or regions since.
    """
    with transaction.repository.pin() as snapshot:
        frame, before = snapshot.newest("frame", card.id), snapshot.newest("region", card.id)
        segments = [segment for segment in snapshot.segments(card.id) if segment.rows]
        if not segments:
            return True
        if frame is None:
            return False
        covers = [list(ends) for ends in row_ranges([segment.row_ids for segment in segments])]
        standard = read_frame(snapshot.verified(frame)).standard
        kept = _kept(snapshot, card, standard)
        if kept is not None and before is not None and before.fields["covers"] == covers:
            return True
        known = set() if kept is None else set(kept.rows["segment"].to_pylist())
        new = [segment for segment in segments if segment.first_row_id not in known]
        progress.start("regions", len(new), "scans")
        pieces = [] if kept is None else [kept]
        for segment in new:
            pieces.append(pool_segment(segment, card, standard))
            progress.advance(1)
        progress.finish()
        directory = transaction.stage("region")
        write_regions(directory, _joined(pieces))
        artefact = transaction.add("region", directory, encoder=card.id, covers=covers)
    return commit_derived(transaction, artefact, {"region": before, "frame": frame})


def _kept(snapshot: Snapshot, card: EncoderCard, standard: Standard) -> StoredRegions | None:
    """The stored regions that hold; None when there are none, or none that can stand beside new ones."""
    try:
        stored = living_regions(snapshot, card.id)
    except StoreDamaged as error:
        warnings.warn(f"{error}; they are pooled again", StoreWarning, stacklevel=4)
        return None
    return stored if stored is not None and stored.made == made_by(card, standard) else None


def made_by(card: EncoderCard, standard: Standard) -> dict[str, Any]:
    """How regions are made, as it is stored beside them: only what says the same can be compared."""
    return {
        "encoder": card.id,
        "output": card.match_output,
        "metric": standard.metric,
        "centre": [float(value) for value in standard.centre],
        "scale": standard.scale,
        "least_weight": LEAST_WEIGHT,
    }


def standard_of(made: Mapping[str, Any]) -> Standard:
    """The standard in what `made_by` stored; `StoreDamaged` when there is none."""
    try:
        return Standard(made["metric"], np.array(made["centre"], np.float32), float(made["scale"]))
    except (KeyError, TypeError, ValueError):
        raise StoreDamaged("regions do not say how they were made", next_step="isimed index") from None


def pool_segment(segment: Segment, card: EncoderCard, standard: Standard) -> StoredRegions:
    """The vector of a scan, then those of its labels, rising, that have at least `LEAST_WEIGHT`."""
    import pyarrow as pa

    told = segment.patches(["foreground"])["foreground"].to_numpy().astype(np.float64)
    foreground = np.where(np.isfinite(told) & (told > 0), told, 0)  # other programs' may be anything in older stores
    labels, weights = _weights(segment, foreground)  # (g,), (g, n)
    pooled: Pooled = pool(segment.vectors(card.match_output), weights, standard.unit)
    total = np.asarray(weights.sum(axis=1)).ravel()
    rows = pa.table(
        {
            "segment": np.full(len(total), segment.first_row_id),
            "rows": np.full(len(total), segment.rows),
            "label": pa.array(labels, pa.int32()),
            "patches": np.diff(weights.indptr).astype(np.int64),
            "weight": total,
            "foreground": (weights @ foreground / total).astype(np.float32),
        }
    )
    return StoredRegions(conform("regions", rows), pooled.mean, pooled.sd, made_by(card, standard))


def _weights(segment: Segment, foreground: NDArray[np.float64]) -> tuple[list[int | None], Any]:
    """Labels, None for the whole scan first, and the weight of each patch in each, a sparse array (g, n)."""
    from scipy.sparse import csr_array, vstack

    whole = csr_array((foreground if foreground.any() else np.ones_like(foreground))[None])
    if not tells_labels(segment):
        return [None], whole
    shares = label_rows([segment])
    patch = np.searchsorted(segment.row_ids, shares["patch"].to_numpy())
    labels, group = np.unique(shares["label"].to_numpy(), return_inverse=True)
    cells = (shares["fraction"].to_numpy().astype(np.float64), (group, patch))
    each = csr_array(cells, shape=(len(labels), segment.rows))
    enough = np.flatnonzero(np.asarray(each.sum(axis=1)).ravel() >= LEAST_WEIGHT)
    found: list[int | None] = [None, *labels[enough].tolist()]
    return found, csr_array(vstack([whole, each[enough]]))


def _joined(pieces: Sequence[StoredRegions]) -> StoredRegions:
    import pyarrow as pa

    rows: pa.Table = pa.concat_tables([piece.rows for piece in pieces])
    vectors = [np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("mean", "sd")]
    return StoredRegions(rows, vectors[0], vectors[1], pieces[0].made)
