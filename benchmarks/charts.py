"""What a chart costs and how far it is from the truth: as it is fitted, and to all stored points.

    python benchmarks/charts.py STORE [STORE …] [--encoder ID] [--scans N] [--all-points M] [--out FILE.json]

Each store holds labelled scans, encoded at one stride. `chart_s` are processor seconds of one thread for a scan's chart
against the template of all, after reading; `frame_s` those of the whole frame by all cores, divided by the scans.
`mean_mm` is the mean distance between label centroids that both scans of a pair have, sent through the two charts, over
all ordered pairs. `all_points_s` is what the charts of M scans take when every stored point is matched in a template of
the same step, as before points were left out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

import isimed_index as isi
from isimed_index.charting import sampled_standard
from isimed_index.consensus import fit_pair
from isimed_index.encoders.card import read_card
from isimed_index.frame import MATCHED_MM, WINDOW_MM, fit_chart, fit_frame, median_scan
from isimed_index.lattice import Lattice, read_lattice, thinned
from isimed_index.space import Affine, apply_affine, inverse

Landmarks = Mapping[str, Mapping[int, NDArray[np.float64]]]
MIN_VOXELS = 20  # a label with fewer has no trustworthy centroid


def landmarks_of(store: isi.api.Store) -> Landmarks:
    """By scan and label, the centroid (3,) in RAS mm."""
    found: dict[str, dict[int, NDArray[np.float64]]] = {}
    for row in store.sql(f"SELECT * FROM labels WHERE voxels >= {MIN_VOXELS}").to_pylist():
        found.setdefault(row["scan"], {})[row["label"]] = np.array([row["x_mm"], row["y_mm"], row["z_mm"]])
    return found


def mean_error(charts: Mapping[str, Affine], landmarks: Landmarks) -> float:
    """Mean over the landmarks of all ordered pairs, mm."""
    away = []
    for a in charts:
        for b in charts:
            if a != b:
                labels = sorted(landmarks[a].keys() & landmarks[b].keys())
                ends = [np.array([landmarks[scan][label] for label in labels]) for scan in (a, b)]
                away += list(np.linalg.norm(apply_affine(inverse(charts[b]) @ charts[a], ends[0]) - ends[1], axis=1))
    return round(float(np.mean(away)), 2)


def timed(fit: Callable[[Lattice], Affine], lattices: Mapping[str, Lattice]) -> tuple[float, dict[str, Affine]]:
    """Processor seconds of one thread for each chart, and the charts."""
    with threadpool_limits(1):
        began = time.thread_time()
        charts = {scan: fit(lattice) for scan, lattice in lattices.items()}
        return round((time.thread_time() - began) / len(lattices), 2), charts


def measure(path: Path, encoder: str | None, scans: int, all_points: int) -> dict[str, object]:
    """One store."""
    store = isi.open(path)
    card = read_card(store.snapshot.encoder_path(encoder))
    landmarks = landmarks_of(store)
    segments = {s: g for s, g in sorted(store.snapshot.segments_by_scan(card.id).items()) if s in landmarks}
    segments = dict(list(segments.items())[:scans])
    standard = sampled_standard(card, list(segments.values()))
    whole = {scan: read_lattice(segment, card.match_output, standard) for scan, segment in segments.items()}
    lattices = {scan: thinned(lattice, MATCHED_MM) for scan, lattice in whole.items()}  # as `isimed index` reads them
    first = whole[median_scan({scan: segment.rows for scan, segment in segments.items()})]
    began = time.perf_counter()
    frame = fit_frame(card.id, standard, lattices, first=thinned(first, WINDOW_MM))
    row: dict[str, object] = {
        "step_mm": first.step_mm,
        "scans": len(lattices),
        "points": int(np.mean([lattice.mask.sum() for lattice in whole.values()])),
        "matched": int(np.mean([lattice.mask.sum() for lattice in lattices.values()])),
        "frame_s": round((time.perf_counter() - began) / len(lattices), 2),
        "mean_mm": mean_error({scan: chart.affine for scan, chart in frame.charts.items()}, landmarks),
    }
    row["chart_s"], _ = timed(lambda lattice: fit_chart(lattice, frame.template).affine, lattices)
    some = list(lattices)[:all_points]
    if some:
        row["all_points_s"], _ = timed(
            lambda lattice: fit_pair(lattice, frame.template).affine, {scan: whole[scan] for scan in some}
        )
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", type=Path, nargs="+")
    parser.add_argument("--encoder")
    parser.add_argument("--scans", type=int, default=12, help="of each store, at most")
    parser.add_argument("--all-points", type=int, default=1, metavar="M", help="scans whose charts are fitted that way")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    found: dict[str, object] = {"date": date.today().isoformat(), "cores": len(os.sched_getaffinity(0)), "stores": []}
    for path in asked.stores:
        row = measure(path, asked.encoder, asked.scans, asked.all_points)
        print(json.dumps(row), flush=True)
        found["stores"].append(row)  # type: ignore[attr-defined]
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
