"""The canonical frame of an encoder: one template, and one chart per scan (patient mm ↔ canonical mm).

Nothing is registered and no atlas is needed. One scan is the first template; all others are matched to it by their
descriptors and fitted robustly; the mean descriptor on a canonical lattice is the next template, and so on. In the end
the frame is moved so that the mean of all charts is the identity: canonical axes are the cohort's mean RAS axes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.calibration import Calibration
from isimed_index.consensus import agreement, fit_pair
from isimed_index.contracts import conform
from isimed_index.errors import NotFound, StoreDamaged
from isimed_index.in_order import in_order
from isimed_index.lattice import Lattice, Points, Standard, Vectors, thinned
from isimed_index.progress import Progress, Silent
from isimed_index.space import Affine, apply_affine, inverse
from isimed_index.store.place.faults import numbered

FRAME, CHARTS, TEMPLATE, MASK = "frame.json", "charts.parquet", "template.npy", "template_mask.npy"
CALIBRATION = "calibration.json"  # only where answers were calibrated
SMALLEST, LARGEST = 0.25, 4.0  # volume of one body against another's: a chart outside of these fits nothing
MATCHED_MM = 8.0  # about the spacing of the points that are matched: closer ones tell the same again
WINDOW_MM = 4.0  # about the spacing of a template: windows around where a chart points are as wide as five of it
ROUNDS = 2  # how often all scans are matched to the template
_ROUNDS_WINDOW, _ROUNDS_FINE = 2, 6  # in windows around where the chart points
LEAST_POINTS = 12  # three times as many as any affine goes through exactly, with a residual of 0.0 mm
HOLDS_ABOVE = 0.3  # agreement from which a chart is believed (measured: decision 0004)


@dataclass(frozen=True, slots=True)
class Chart:
    """Where one scan lies in the canonical frame: patient RAS+ mm → canonical mm, and how well that is supported.

    `residual_mm` is the median distance between the chart and single matches, `matches` how many patches agree with it
    when they are matched around where it points, and `agreement` the share of patches that agree with it when they are
    matched freely. `stride_mm` is the widest step of the stored lattice; None: it is not known.
    """

    affine: Affine
    residual_mm: float
    matches: int
    agreement: float
    stride_mm: float | None = None

    @property
    def holds(self) -> bool:
        """Whether enough patches agree for the chart to be believed."""
        return self.agreement >= HOLDS_ABOVE


@dataclass(frozen=True, slots=True)
class Frame:
    """One encoder's canonical frame.

    `awaited` is how many scans had no chart yet when it was committed, because charts are fitted group by group.
    `calibration` is what answers are off by; None where that was not measured.
    """

    encoder: str
    standard: Standard
    template: Lattice  # in canonical mm
    charts: Mapping[str, Chart]
    awaited: int = 0
    calibration: Calibration | None = None


def fit_frame(
    encoder: str,
    standard: Standard,
    lattices: Mapping[str, Lattice],
    *,
    first: Lattice | None = None,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> Frame:
    """Fit template and charts to the lattices of a cohort, from nothing.

    `rounds` is how often all scans are matched to the template; `first` is the first template, by default the scan with
    the median number of patches. A lattice is asked for whenever it is needed, in several threads at once; whether the
    mapping reads it again then, or keeps it, is the mapping's to say. `NotFound` where no lattice has a patch.
    """
    progress = progress or Silent()
    scans = sorted(lattices)  # in the order of names: a sum of floats depends on its order
    template = first
    if template is None:
        template = thinned(lattices[median_scan({scan: int(lattices[scan].mask.sum()) for scan in scans})], WINDOW_MM)
    charts: dict[str, Chart] = {}
    for turn in range(rounds):
        progress.start(f"frame, round {turn + 1} of {rounds}", len(scans), "charts")
        starts = {scan: charts[scan].affine if turn and charts[scan].holds else None for scan in scans}
        charts = _centred(_fit_charts(lattices, starts, template, progress))
        template = _mean_template(lattices, charts, template.step_mm)
        progress.finish()
    return Frame(encoder, standard, template, charts)


def median_scan(patches: Mapping[str, int]) -> str:
    """The scan with the median number of patches; of equal ones by name."""
    by_size = sorted(sorted(patches), key=patches.__getitem__)
    return by_size[len(by_size) // 2]


def extend_frame(frame: Frame, lattices: Mapping[str, Lattice], progress: Progress | None = None) -> Frame:
    """Add charts of new scans against the template as it is; what was there stays as it was."""
    new = _fit_charts(lattices, dict.fromkeys(lattices), frame.template, progress or Silent())
    return replace(frame, charts={**frame.charts, **new})


def _fit_charts(
    lattices: Mapping[str, Lattice], starts: Mapping[str, Affine | None], template: Lattice, progress: Progress
) -> dict[str, Chart]:
    """The charts of all scans in `starts`, each from its start if it has one; no chart depends on another."""
    charts = {}
    with closing(in_order(lambda scan: fit_chart(lattices[scan], template, starts[scan]), starts)) as found:
        for scan, chart in zip(starts, found, strict=True):
            charts[scan] = chart
            fitted = np.isfinite(chart.residual_mm)
            progress.advance(1, f"residual {chart.residual_mm:.1f} mm" if fitted else "no chart could be fitted")
    return charts


def fit_chart(lattice: Lattice, template: Lattice, start: Affine | None = None) -> Chart:
    """The chart of one scan: its lattice matched to the template, robustly; one that does not hold for few points."""
    unsupported = Chart(np.eye(4), float("inf"), 0, 0.0)
    if min(lattice.mask.sum(), template.mask.sum()) < LEAST_POINTS:
        return unsupported
    source, target, whole = thinned(lattice, MATCHED_MM), thinned(template, WINDOW_MM), thinned(template, MATCHED_MM)
    # In narrower windows an affine moves by smaller steps.
    rounds = _ROUNDS_FINE if target.step_mm < whole.step_mm else _ROUNDS_WINDOW
    fit = fit_pair(source, target, whole=whole, start=start, rounds=rounds)
    if not SMALLEST < np.linalg.det(fit.affine[:3, :3]) < LARGEST:  # a mirror image, or nearly flat
        return unsupported
    return Chart(fit.affine, fit.residual_mm, fit.matches, agreement(source, whole, fit.affine))


def _centred(charts: Mapping[str, Chart]) -> dict[str, Chart]:
    """The same charts in a frame in which their mean is the identity."""
    believed = [chart.affine for chart in charts.values() if chart.holds] or [c.affine for c in charts.values()]
    back = inverse(np.mean(believed, axis=0))
    return {scan: replace(chart, affine=back @ chart.affine) for scan, chart in charts.items()}


def _mean_template(lattices: Mapping[str, Lattice], charts: Mapping[str, Chart], step_mm: float) -> Lattice:
    """The mean unit vector of all scans at every point of a canonical lattice that covers them."""
    believed = {scan: chart.affine for scan, chart in charts.items() if chart.holds} or {
        scan: charts[scan].affine for scan in charts if lattices[scan].mask.any()
    }
    if not believed:
        raise without_patches(len(lattices))
    with closing(in_order(lambda scan: apply_affine(believed[scan], _corners(lattices[scan])), believed)) as corners:
        ends = np.concatenate(list(corners))
    low, high = ends.min(axis=0), ends.max(axis=0)
    shape = np.ceil((high - low) / step_mm).astype(int) + 1
    affine = np.diag([step_mm, step_mm, step_mm, 1.0])
    affine[:3, 3] = low
    places = apply_affine(affine, np.argwhere(np.ones(shape, bool)))
    dim = next(iter(lattices.values())).vectors.shape[-1]
    total, weight = np.zeros((len(places), dim), np.float32), np.zeros(len(places))

    def seen(scan: str) -> tuple[NDArray[np.intp], Vectors, NDArray[np.float64]]:
        vectors, share = lattices[scan].sample(apply_affine(inverse(believed[scan]), places))
        rows = np.flatnonzero(share)
        return rows, vectors[rows] * share[rows, None].astype(np.float32), share[rows]

    with closing(in_order(seen, believed)) as samples:
        for rows, vectors, share in samples:
            total[rows] += vectors
            weight[rows] += share
    unit = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), np.float32(1e-12))
    # A point that a single odd scan reaches is no part of the template, unless there are few scans.
    mask = weight >= min(1.0, 0.5 + 0.05 * len(believed))
    return Lattice(unit.reshape(*shape, dim), mask.reshape(shape), affine)


def without_patches(scans: int) -> NotFound:
    """The error for scans whose every patch was deleted."""
    return NotFound(
        f"none of {scans} scans has a patch, so there is nothing to make a frame of",
        next_step="isimed restore a generation that has them, or isimed index --stride MM to encode anew",
    )


def _corners(lattice: Lattice) -> Points:
    stored = np.argwhere(lattice.mask)
    low, high = stored.min(axis=0), stored.max(axis=0)
    ends = np.stack(np.meshgrid(*zip(low, high, strict=True), indexing="ij"), -1).reshape(-1, 3)
    return apply_affine(lattice.affine, ends)


def write_frame(directory: Path, frame: Frame, voxels: Mapping[str, str] | None = None) -> None:
    """Write a frame as `frame.json`, `charts.parquet`, `template.npy` (float16) and `template_mask.npy`.

    A calibration becomes `calibration.json` beside them.

    `voxels` says by scan id to which artefact each chart was fitted.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: dict[str, list[Any]] = {"scan": list(frame.charts)}
    for r in range(3):
        for c in range(4):
            rows[f"a{r}{c}"] = [float(chart.affine[r, c]) for chart in frame.charts.values()]
    rows["voxels"] = [(voxels or {}).get(scan) for scan in frame.charts]
    rows["residual_mm"] = [chart.residual_mm for chart in frame.charts.values()]
    rows["matches"] = [chart.matches for chart in frame.charts.values()]
    rows["stride_mm"] = [chart.stride_mm for chart in frame.charts.values()]
    rows["agreement"] = [chart.agreement for chart in frame.charts.values()]
    pq.write_table(conform("charts", pa.table(rows)), directory / CHARTS)
    with numbered(directory):
        np.save(directory / TEMPLATE, frame.template.vectors.astype(np.float16), allow_pickle=False)
        np.save(directory / MASK, frame.template.mask, allow_pickle=False)
    content = {
        "encoder": frame.encoder,
        "metric": frame.standard.metric,
        "centre": [float(v) for v in frame.standard.centre],
        "scale": frame.standard.scale,
        "template_affine": frame.template.affine.tolist(),
        "awaited": frame.awaited,
    }
    (directory / FRAME).write_text(json.dumps(content), encoding="utf-8")
    if frame.calibration is not None:
        (directory / CALIBRATION).write_text(json.dumps(frame.calibration.to_json()), encoding="utf-8")


def read_frame(directory: Path, voxels: Mapping[str, str] | None = None) -> Frame:
    """Read what `write_frame` wrote; `StoreDamaged` when something is missing or malformed.

    With `voxels`, the artefact of every scan by id, a chart that was fitted to other voxels is left out: the scan of
    that id was deleted, and another one has its name now.
    """
    import pyarrow.parquet as pq

    try:
        content = json.loads((directory / FRAME).read_text(encoding="utf-8"))
        vectors: NDArray[np.float32] = np.load(directory / TEMPLATE, allow_pickle=False).astype(np.float32)
        mask = np.load(directory / MASK, allow_pickle=False)
        rows = pq.read_table(directory / CHARTS, partitioning=None).to_pylist()
        standard = Standard(content["metric"], np.array(content["centre"], np.float32), float(content["scale"]))
        template = Lattice(vectors, mask, np.array(content["template_affine"], dtype=np.float64))
        charts = {}
        for row in rows:
            affine = np.eye(4)
            affine[:3] = [[row[f"a{r}{c}"] for c in range(4)] for r in range(3)]
            if voxels is not None and row.get("voxels") not in (None, voxels.get(row["scan"])):
                continue
            known = row["residual_mm"], row["matches"], row["agreement"], row.get("stride_mm")
            charts[row["scan"]] = Chart(affine, *known)
        awaited = int(content.get("awaited", 0))
        return Frame(content["encoder"], standard, template, charts, awaited, read_calibration(directory))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreDamaged("the canonical frame cannot be read", next_step="isimed index") from error


def read_calibration(directory: Path) -> Calibration | None:
    """What answers by the frame in `directory` are off by; None where that was not measured."""
    file = directory / CALIBRATION
    return Calibration.from_json(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None
