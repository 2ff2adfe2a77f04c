"""Landmark error: label centroids of one scan looked up in another, in mm, beside guesses that need no learning.

A landmark is the centroid of a label that both scans of a pair have. `hit_at_1` is the share of answers whose nearest
voxel carries the landmark's label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.encode import prepared
from isimed_index.errors import UsageError
from isimed_index.lookup import Lookup, between, follow
from isimed_index.progress import Progress, Silent
from isimed_index.space import Affine, apply_affine, inverse

if TYPE_CHECKING:
    import pyarrow as pa

MIN_VOXELS = 20  # a label with fewer has no trustworthy centroid
PREDICTORS = ("same world point", "foreground centroid", "chart", "lookup")
_COLUMNS = ("predictor", "pairs", "landmarks", "mean_mm", "median_mm", "p95_mm", "hit_at_1")
_LANDMARK_COLUMNS = ("source", "target", "label", "name")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Landmark errors: `columns` with one row per predictor, `landmarks` with one per landmark of a pair.

    The latter say the pair (`source`, `target`), the `label` and its `name`, and each predictor's error in mm.
    """

    columns: dict[str, list[Any]]
    landmarks: dict[str, list[Any]]

    def to_arrow(self) -> pa.Table:
        """The summary as an Arrow table."""
        import pyarrow as pa

        return pa.table(self.columns)

    def landmarks_to_arrow(self) -> pa.Table:
        """The error at every landmark as an Arrow table."""
        import pyarrow as pa

        return pa.table({**self.landmarks, "name": pa.array(self.landmarks["name"], pa.string())})


@dataclass(frozen=True, slots=True)
class _Head:
    """A labelled scan: its landmarks {label: (3,) RAS mm} and their names, foreground centroid and label map."""

    scan: str
    landmarks: dict[int, NDArray[np.float64]]
    names: dict[int, str | None]
    centroid_mm: NDArray[np.float64]
    labels: NDArray[Any]
    affine: Affine

    def label_at(self, xyz_mm: NDArray[np.float64]) -> int:
        voxel = np.rint(apply_affine(inverse(self.affine), xyz_mm)).astype(int)
        if (voxel < 0).any() or (voxel >= self.labels.shape).any():
            return 0
        return int(self.labels[tuple(voxel)])


def landmark_errors(
    lookup: Lookup,
    *,
    where: str | None = None,
    label_where: str | None = None,
    pairs: int = 60,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Errors over ordered pairs of labelled scans of different subjects, at most `pairs` of them, drawn by `seed`.

    `where` chooses scans and `label_where` labels, both SQL over the views. Predictors: the same world point; the same
    offset from the foreground's centroid; the charts alone; the whole lookup.
    """
    progress = progress or Silent()
    heads = _heads(lookup, where, label_where, progress)
    chosen = _pairs(lookup, list(heads), pairs, seed)
    errors: dict[str, list[float]] = {name: [] for name in PREDICTORS}
    hits: dict[str, list[bool]] = {name: [] for name in PREDICTORS}
    asked: list[tuple[str, str, int, str | None]] = []
    progress.start("evaluate", len(chosen), "pairs")
    for a, b in chosen:
        source, target = heads[a], heads[b]
        predict = _predictors(lookup, source, target)
        for label in sorted(source.landmarks.keys() & target.landmarks.keys()):
            asked.append((a, b, label, source.names[label]))
            for name, answer in predict.items():
                found = answer(source.landmarks[label])
                errors[name].append(float(np.linalg.norm(found - target.landmarks[label])))
                hits[name].append(target.label_at(found) == label)
        progress.advance(1, f"mean {np.mean(errors['lookup']):.1f} mm" if errors["lookup"] else "")
    progress.finish()
    if not errors["lookup"]:
        raise UsageError("the chosen scans have no label in common", next_step="isimed sql 'SELECT * FROM labels'")
    rows = [
        (name, len(chosen), len(e), *(float(f(e)) for f in (np.mean, np.median, _p95)), float(np.mean(hits[name])))
        for name, e in errors.items()
    ]
    landmarks = _named_columns(_LANDMARK_COLUMNS, asked)
    landmarks |= {f"{name.replace(' ', '_')}_mm": values for name, values in errors.items()}
    return Evaluation(_named_columns(_COLUMNS, rows), landmarks)


def _named_columns(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    return {name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def _p95(values: Sequence[float]) -> float:
    return float(np.percentile(values, 95))


def _heads(lookup: Lookup, where: str | None, label_where: str | None, progress: Progress) -> dict[str, _Head]:
    snapshot = lookup.snapshot
    chosen = set(snapshot.matching("scans", where).column("scan").to_pylist())
    rows = snapshot.matching("labels", label_where).to_pylist()
    landmarks: dict[str, dict[int, NDArray[np.float64]]] = {}
    names: dict[str, dict[int, str | None]] = {}
    for row in rows:
        if row["scan"] in chosen & lookup.segments.keys() and row["voxels"] >= MIN_VOXELS:
            xyz = np.array([row["x_mm"], row["y_mm"], row["z_mm"]])
            landmarks.setdefault(row["scan"], {})[row["label"]] = xyz
            names.setdefault(row["scan"], {})[row["label"]] = row["name"]
    if len(landmarks) < 2:
        raise UsageError(
            f"expected at least two indexed scans with label maps, found {len(landmarks)}",
            next_step="isimed add --labels PATTERN PATH, then isimed index",
        )
    progress.start("read", len(landmarks), "scans")
    heads = {}
    for scan, points in landmarks.items():
        stored = lookup.stored(scan)
        volume = prepared(stored.values(), stored.affine, lookup.card)
        centroid = apply_affine(volume.affine, np.argwhere(volume.foreground).mean(axis=0))
        labels = stored.labels()
        if labels is not None:
            heads[scan] = _Head(scan, points, names[scan], centroid, labels, stored.affine)
        progress.advance(1)
    progress.finish()
    return heads


def _pairs(lookup: Lookup, scans: Sequence[str], most: int, seed: int) -> list[tuple[str, str]]:
    subject = {scan: lookup.snapshot.scan_row(scan)["subject"] for scan in scans}
    every = [(a, b) for a in scans for b in scans if subject[a] != subject[b]]
    if len(every) <= most:
        return every
    order = np.random.default_rng(seed).permutation(len(every))[:most]
    return [every[number] for number in sorted(order)]


def _predictors(
    lookup: Lookup, source: _Head, target: _Head
) -> dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]]:
    a, b = lookup.lattice(source.scan), lookup.lattice(target.scan)
    chart_a, chart_b = lookup.frame.charts[source.scan], lookup.frame.charts[target.scan]
    start = between(chart_a, chart_b)
    shift = target.centroid_mm - source.centroid_mm
    return {
        "same world point": lambda q: q,
        "foreground centroid": lambda q: q + shift,
        "chart": lambda q: apply_affine(start, q),
        "lookup": lambda q: follow(q, a, chart_a, b, chart_b)[0],
    }
