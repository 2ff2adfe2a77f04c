"""Charts agree with the truth on synthetic lattices; the frame's axes are the cohort's mean; old charts never move."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from affines import affine_of

from isimed_index.consensus import agreement, fit_pair
from isimed_index.errors import NotFound, StoreDamaged
from isimed_index.frame import (
    Chart,
    Frame,
    _mean_template,
    extend_frame,
    fit_chart,
    fit_frame,
    read_frame,
    write_frame,
)
from isimed_index.lattice import Lattice, Standard, thinned
from isimed_index.progress import Silent
from isimed_index.space import apply_affine, inverse

BODY_MM = 45.0  # radius of the ball that is foreground
SHAPE = (15, 14, 16)


def field(points: np.ndarray, seed: int = 0) -> np.ndarray:
    """Unit vectors (…, 24) that vary smoothly with the place."""
    rng = np.random.default_rng(seed)
    waves, phases = rng.normal(0, 1 / 9.0, (3, 24)), rng.uniform(0, 2 * np.pi, 24)
    vectors = np.cos(points @ waves + phases).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def body(
    to_body: np.ndarray, seed: int = 0, radius_mm: float = BODY_MM, noise: float = 0.0, step_mm: float = 8.0
) -> Lattice:
    """A scan whose own mm map to the body's by `to_body`."""
    shape = tuple(round(n * 8.0 / step_mm * max(1.0, radius_mm / BODY_MM)) for n in SHAPE)
    affine = np.diag([step_mm, step_mm, step_mm, 1.0])
    affine[:3, 3] = apply_affine(inverse(to_body), np.zeros(3)) - step_mm * (np.array(shape) - 1) / 2 + seed
    in_body = apply_affine(to_body, apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)))
    mask = np.linalg.norm(in_body, axis=-1) < radius_mm
    vectors = field(in_body, seed) + noise * np.random.default_rng(1).normal(size=(*shape, 24)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return Lattice(vectors.astype(np.float32) * mask[..., None], mask, affine)


def pose(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return affine_of(rng.uniform(-8, 8, 3), rng.uniform(0.93, 1.07, 3), (1, 1, 1), (0, 1, 2), rng.uniform(-15, 15, 3))


TRUTH = {f"scan-{seed}": pose(seed) for seed in range(6)}  # own mm → body mm
STANDARD = Standard("cosine", np.zeros(24, np.float32), 1.0)


@pytest.fixture(scope="module")
def frame() -> Frame:
    return fit_frame("e", STANDARD, {scan: body(truth, noise=0.05) for scan, truth in TRUTH.items()})


def error_mm(frame: Frame, a: str, b: str, truth: dict[str, np.ndarray]) -> float:
    """The largest distance between chart and truth, from scan a to scan b, inside the body."""
    points = np.random.default_rng(0).normal(size=(100, 3))
    points *= 0.7 * BODY_MM / np.linalg.norm(points, axis=1, keepdims=True)
    in_a, in_b = (apply_affine(inverse(truth[scan]), points) for scan in (a, b))
    got = apply_affine(inverse(frame.charts[b].affine), apply_affine(frame.charts[a].affine, in_a))
    return float(np.linalg.norm(got - in_b, axis=1).max())


def test_charts_agree_with_the_truth(frame: Frame):
    errors = [error_mm(frame, a, b, TRUTH) for a in TRUTH for b in TRUTH if a != b]
    still = Frame("e", STANDARD, frame.template, dict.fromkeys(TRUTH, Chart(np.eye(4), 0.0, 1, 1.0)))
    without = [error_mm(still, a, b, TRUTH) for a in TRUTH for b in TRUTH if a != b]
    assert max(errors) < 8.0
    assert np.median(errors) < 0.25 * np.median(without)
    for chart in frame.charts.values():
        assert chart.holds
        assert 0.9 < chart.agreement <= 1.0
        assert chart.residual_mm < 4.0


LARGE_MM = 70.0  # radius of a body that has enough points at 8 mm for finer lattices to be thinned


def off_mm(chart: Chart, truth: np.ndarray) -> float:
    """The largest distance between a chart into the body's own mm and the truth."""
    points = np.random.default_rng(0).normal(size=(200, 3))
    points *= 0.8 * LARGE_MM / np.linalg.norm(points, axis=1, keepdims=True)
    return float(
        np.linalg.norm(apply_affine(chart.affine, apply_affine(inverse(truth), points)) - points, axis=1).max()
    )


@pytest.mark.parametrize(("scan_mm", "template_mm"), [(8.0, 8.0), (4.0, 8.0), (8.0, 4.0), (4.0, 4.0), (3.0, 4.0)])
def test_a_chart_at_any_stride_is_the_truth(scan_mm: float, template_mm: float):
    """Half a step of the lattice that is matched would be 4 mm along each axis."""
    truth = TRUTH["scan-1"]
    scan = body(truth, radius_mm=LARGE_MM, noise=0.05, step_mm=scan_mm)
    chart = fit_chart(scan, body(np.eye(4), radius_mm=LARGE_MM, noise=0.05, step_mm=template_mm))
    assert off_mm(chart, truth) < 1.0
    assert chart.agreement > 0.9
    assert 1000 < chart.matches <= 1.7 * len(thinned(scan, 8.0).stored()[0])


def test_a_frame_of_a_finer_lattice_is_no_worse():
    some = dict(list(TRUTH.items())[:3])
    largest = {}
    for step in (8.0, 4.0):
        frame = fit_frame(
            "e", STANDARD, {s: body(t, radius_mm=LARGE_MM, noise=0.05, step_mm=step) for s, t in some.items()}
        )
        assert frame.template.step_mm == step
        largest[step] = max(error_mm(frame, a, b, some) for a in some for b in some if a != b)
    assert largest[4.0] < 1.1 * largest[8.0] + 0.1


def test_at_a_coarse_stride_a_chart_is_that_of_all_points():
    """What no thinning touches: matched in the whole template, then twice in windows of five steps."""
    scan, template = body(TRUTH["scan-1"], noise=0.05), body(np.eye(4))
    chart, plain = fit_chart(scan, template), fit_pair(scan, template, rounds=2)
    assert chart.affine.tobytes() == plain.affine.tobytes()
    assert (chart.residual_mm, chart.matches) == (plain.residual_mm, plain.matches)
    assert chart.agreement == agreement(scan, template, plain.affine)


def test_neither_the_order_of_scans_nor_threads_change_a_bit(frame: Frame, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("isimed_index.in_order.cores", lambda: 3)
    turned = {scan: body(truth, noise=0.05) for scan, truth in reversed(TRUTH.items())}
    again = fit_frame("e", STANDARD, turned)
    assert list(again.charts) == list(frame.charts)
    for scan, chart in frame.charts.items():
        assert again.charts[scan].affine.tobytes() == chart.affine.tobytes()
    assert again.template.vectors.tobytes() == frame.template.vectors.tobytes()
    new = {"a": body(pose(50)), "b": body(pose(51)), "c": body(pose(52))}
    one, other = extend_frame(frame, new), extend_frame(frame, dict(reversed(new.items())))
    assert all(one.charts[scan].affine.tobytes() == other.charts[scan].affine.tobytes() for scan in new)


def test_the_mean_chart_is_the_identity(frame: Frame):
    mean = np.mean([chart.affine for chart in frame.charts.values()], axis=0)
    np.testing.assert_allclose(mean, np.eye(4), atol=1e-6)


def test_the_template_is_a_unit_field_in_canonical_mm(frame: Frame):
    places, vectors = frame.template.stored()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    own = apply_affine(inverse(frame.charts["scan-0"].affine), places)
    alike = (vectors * field(apply_affine(TRUTH["scan-0"], own))).sum(axis=1)
    assert np.median(alike) > 0.9
    assert len(places) == pytest.approx(4 / 3 * np.pi * (BODY_MM / 8) ** 3, rel=0.5)


def test_a_new_scan_leaves_old_charts_and_template_bit_identical(frame: Frame, tmp_path: Path):
    truth = TRUTH | {"new": pose(50)}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_frame(tmp_path / "a", frame)
    before = read_frame(tmp_path / "a")
    after = extend_frame(before, {"new": body(truth["new"])})
    write_frame(tmp_path / "b", after)
    again = read_frame(tmp_path / "b")
    assert list(again.charts) == [*TRUTH, "new"]
    for scan in TRUTH:
        assert again.charts[scan].affine.tobytes() == frame.charts[scan].affine.tobytes()
    for name in ("template.npy", "template_mask.npy"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert max(error_mm(again, "new", scan, truth) for scan in TRUTH) < 10.0


def test_round_trip(frame: Frame, tmp_path: Path):
    charts = {**frame.charts, "lost": Chart(np.eye(4), float("inf"), 0, 0.0)}
    standard = Standard("l2", np.linspace(-1, 1, 24, dtype=np.float32), 3.5)
    write_frame(tmp_path, Frame("3f2a", standard, frame.template, charts))
    read = read_frame(tmp_path)
    assert (read.encoder, read.standard.metric, read.standard.scale) == ("3f2a", "l2", 3.5)
    np.testing.assert_array_equal(read.standard.centre, standard.centre)
    np.testing.assert_array_equal(read.template.mask, frame.template.mask)
    np.testing.assert_array_equal(read.template.affine, frame.template.affine)
    np.testing.assert_allclose(read.template.vectors, frame.template.vectors, atol=1e-3)
    assert read.charts.keys() == charts.keys()
    for scan, chart in charts.items():
        own = read.charts[scan]
        np.testing.assert_array_equal(own.affine, chart.affine)
        assert (own.residual_mm, own.matches, own.agreement) == (chart.residual_mm, chart.matches, chart.agreement)


@pytest.mark.parametrize("damage", ["frame.json", "charts.parquet", "template.npy", "template_mask.npy", "field"])
def test_a_damaged_frame_is_store_damaged(frame: Frame, tmp_path: Path, damage: str):
    write_frame(tmp_path, frame)
    if damage == "field":
        table = pq.read_table(tmp_path / "charts.parquet")
        pq.write_table(table.drop_columns(["agreement"]), tmp_path / "charts.parquet")
    else:
        (tmp_path / damage).write_bytes(b"\x00broken")
    with pytest.raises(StoreDamaged):
        read_frame(tmp_path)


def test_an_incomplete_description_is_store_damaged(frame: Frame, tmp_path: Path):
    write_frame(tmp_path, frame)
    content = json.loads((tmp_path / "frame.json").read_text())
    del content["encoder"]
    (tmp_path / "frame.json").write_text(json.dumps(content))
    with pytest.raises(StoreDamaged):
        read_frame(tmp_path)


def test_a_stranger_gets_no_chart_that_holds(frame: Frame):
    for seed in (1, 2, 3):
        assert not fit_chart(body(np.eye(4), seed=seed), frame.template).holds


def test_an_empty_scan_does_not_disturb_the_others():
    lattices = {scan: body(truth) for scan, truth in list(TRUTH.items())[:3]}
    frame = fit_frame("e", STANDARD, lattices | {"empty": body(np.eye(4), radius_mm=0.0)})
    assert not frame.charts["empty"].holds
    assert error_mm(frame, "scan-0", "scan-1", TRUTH) < 8.0


class Stopping(Silent):
    def advance(self, n: int = 1, note: str = "") -> None:
        raise KeyboardInterrupt


class NotAdded(np.ndarray):
    """Vectors by which a sum is interrupted."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **_: Any) -> Any:
        if ufunc is np.add:
            raise KeyboardInterrupt
        return getattr(ufunc, method)(*(np.asarray(each) for each in inputs)).view(NotAdded)


class Interrupting(Lattice):
    def sample(self, points_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        vectors, share = super().sample(points_mm)
        return vectors.view(NotAdded), share


def threads_at_work() -> bool:
    return any(thread.name.startswith("in-order") for thread in threading.enumerate())


def test_ctrl_c_among_charts_leaves_no_thread_at_work():
    lattices = {scan: body(truth) for scan, truth in TRUTH.items()}
    with pytest.raises(KeyboardInterrupt) as caught:  # who holds the error holds its frames, and what is in these
        fit_frame("e", STANDARD, lattices, progress=Stopping())
    assert not threads_at_work()
    assert caught.tb


def test_ctrl_c_in_a_template_leaves_no_thread_at_work():
    bodies = {scan: body(truth) for scan, truth in TRUTH.items()}
    lattices = {scan: Interrupting(each.vectors, each.mask, each.affine) for scan, each in bodies.items()}
    charts = {scan: Chart(truth, 1.0, 9, 1.0) for scan, truth in TRUTH.items()}
    with pytest.raises(KeyboardInterrupt) as caught:
        _mean_template(lattices, charts, 8.0)
    assert not threads_at_work()
    assert caught.tb


def test_scans_without_any_patch_are_no_frame():
    with pytest.raises(NotFound, match="none of 2 scans has a patch"):
        fit_frame("e", STANDARD, {scan: body(np.eye(4), radius_mm=0.0) for scan in "ab"})


def test_a_cohort_of_one():
    frame = fit_frame("e", STANDARD, {"only": body(TRUTH["scan-3"])})
    np.testing.assert_allclose(frame.charts["only"].affine, np.eye(4), atol=1e-6)
    assert frame.template.mask.any()


def test_a_mirrored_head_is_not_believed(frame: Frame):
    mirrored = TRUTH["scan-0"] @ np.diag([-1.0, 1.0, 1.0, 1.0])
    assert not fit_chart(body(mirrored), frame.template).holds


def test_a_stranger_is_not_believed(frame: Frame):
    rng = np.random.default_rng(5)
    like = next(iter(frame.charts))
    vectors = rng.normal(size=frame.template.vectors.shape).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    stranger = fit_chart(Lattice(unit, frame.template.mask, frame.template.affine), frame.template)
    assert stranger.agreement < 0.1
    assert not stranger.holds
    assert frame.charts[like].holds
