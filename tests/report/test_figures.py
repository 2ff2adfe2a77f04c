"""Figures show the right voxel at the right millimetre, on the right side."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from isimed_index.errors import MissingExtra, UsageError
from isimed_index.report.figures import Panel, embedding_figure, match_figure, plane_values, save
from isimed_index.space import apply_affine, inverse

POINT = (12.0, -7.0, 21.0)
PLANES = ((0, 1), (0, 2), (1, 2))


def oblique() -> np.ndarray:
    """A grid tilted by 20° about y, with voxels of 2 × 2.5 × 3 mm."""
    angle = np.radians(20)
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([2.0, 2.5, 3.0])
    affine[:3, 3] = [-60, -45, -30]
    return affine


def scan(spot_mm: tuple[float, float, float] = POINT, truth: tuple[float, float, float] | None = None) -> Panel:
    """A scan (48, 40, 30) that is dark but for a blob of 4 mm at `spot_mm`."""
    affine = oblique()
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (48, 40, 30)], indexing="ij"), axis=-1)
    far = np.linalg.norm(apply_affine(affine, grid) - spot_mm, axis=-1)
    return Panel("sub-01", np.exp(-((far / 4) ** 2)).astype(np.float32), affine, POINT, truth)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


@pytest.mark.parametrize("plane", PLANES)
def test_planes_are_cut_along_the_patient_axes(plane: tuple[int, int]) -> None:
    """A volume that holds its own coordinates gives them back at each place of an oblique cut."""
    affine = oblique()
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (48, 40, 30)], indexing="ij"), axis=-1)
    world = apply_affine(affine, grid)
    low, high = np.array(POINT) - 9, np.array(POINT) + 9
    for axis in range(3):
        panel = Panel("x", world[..., axis].astype(np.float32), affine, POINT)
        values = plane_values(panel, plane, low, high, 1.5)
        assert values.shape == (13, 13)
        along = low[axis] + 1.5 * np.arange(13)
        wanted = {plane[0]: along[None, :], plane[1]: along[:, None]}.get(axis, np.full((1, 1), POINT[axis]))
        np.testing.assert_allclose(values, np.broadcast_to(wanted, (13, 13)), atol=1e-3)


def test_outside_the_scan_is_nothing() -> None:
    panel = scan()
    far = np.array([500.0, 500.0, 500.0])
    assert np.isnan(plane_values(panel, (0, 1), far, far + 10, 1.0)).all()
    voxel = apply_affine(inverse(panel.affine), POINT)
    assert ((voxel > 0) & (voxel < np.array(panel.values.shape) - 1)).all()


@pytest.mark.parametrize("convention", ["radiological", "neurological"])
@pytest.mark.parametrize("field_mm", [None, 40.0])
def test_the_brightest_pixel_is_where_the_axes_say(convention: str, field_mm: float | None) -> None:
    spot = (POINT[0] + 5, POINT[1] + 6, POINT[2] - 4)
    for number, (across, up) in enumerate(PLANES):
        within = list(POINT)
        within[across], within[up] = spot[across], spot[up]
        panel = scan(tuple(within))
        figure = match_figure(panel, [], convention, field_mm)  # type: ignore[arg-type]
        axes = figure.axes[number]
        for mark in (*axes.collections, *axes.texts):
            mark.set_visible(False)
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., 0]  # type: ignore[attr-defined]
        box = axes.get_window_extent()
        left, top = round(box.x0) + 2, round(pixels.shape[0] - box.y1) + 2
        view = pixels[top : round(pixels.shape[0] - box.y0) - 2, left : round(box.x1) - 2].astype(float)
        peak_up, peak_across = np.average(np.argwhere(view > 240), axis=0)
        shown = axes.transData.inverted().transform((left + peak_across, pixels.shape[0] - 1 - top - peak_up))
        np.testing.assert_allclose(shown, (spot[across], spot[up]), atol=1.5)


def test_sides_are_marked() -> None:
    """Radiological planes run from the patient's right to the left; sagittal planes are the same in both."""
    for convention, ends in (("radiological", "RL"), ("neurological", "LR")):
        axes = match_figure(scan(), [], convention).axes  # type: ignore[arg-type]
        for plane, letters in zip(axes, (f"{ends}PA", f"{ends}IS", "PAIS"), strict=True):
            assert [text.get_text() for text in plane.texts][:4] == list(letters)
        assert [plane.xaxis_inverted() for plane in axes] == [ends == "RL", ends == "RL", False]


def test_titles_say_scan_point_and_error() -> None:
    match = Panel("sub-02", scan().values, oblique(), POINT, (12.0, -4.0, 25.0), "score 0.93")
    figure = match_figure(scan(), [match])
    titles = [text for text in texts(figure) if "sub-" in text]
    assert titles[0] == "query: sub-01   (12.0, -7.0, 21.0) mm"
    assert titles[1] == "match 1: sub-02   (12.0, -7.0, 21.0) mm   error 5.0 mm   score 0.93"
    assert any("Radiological convention" in text and "Ring" in text for text in texts(figure))
    assert not any("Ring" in text for text in texts(match_figure(scan(), [])))


def test_the_cross_hair_meets_at_the_point_and_hides_it_not() -> None:
    for axes, (across, up) in zip(match_figure(scan(), []).axes, PLANES, strict=True):
        level, upright = axes.collections[:2]
        assert {float(line[0, 1]) for line in level.get_segments()} == {POINT[up]}
        assert {float(line[0, 0]) for line in upright.get_segments()} == {POINT[across]}
        reach = np.concatenate([line[:, 0] - POINT[across] for line in level.get_segments()])
        assert np.abs(reach).min() > 1


def test_all_rows_have_one_scale() -> None:
    small = Panel("sub-02", np.random.default_rng(0).random((10, 12, 14), np.float32), np.eye(4), (5.0, 5.0, 5.0))
    figure = match_figure(scan(), [small])
    scales = [axes.get_window_extent().width / abs(np.diff(axes.get_xlim())[0]) for axes in figure.axes]
    scales += [axes.get_window_extent().height / np.diff(axes.get_ylim())[0] for axes in figure.axes]
    np.testing.assert_allclose(scales, scales[0], rtol=1e-6)


def test_embedding_colours_are_the_patches_own() -> None:
    rng = np.random.default_rng(4)
    xy, centres = rng.normal(size=(500, 2)), rng.uniform(-90, 90, (500, 3))
    figure = embedding_figure(xy, centres, name="PC", frame="canonical")
    panels = [axes for axes in figure.axes if axes.get_xlabel() == "PC 1"]
    labels = [axes.get_xlabel() for axes in figure.axes if "mm" in axes.get_xlabel()]
    assert [label[0] for label in labels] == ["x", "y", "z"]
    for axis, axes in enumerate(panels):
        dots = axes.collections[0]
        order = np.argmin(np.linalg.norm(xy[:, None] - np.asarray(dots.get_offsets())[None], axis=-1), axis=0)
        assert not np.array_equal(order, np.arange(500))
        np.testing.assert_allclose(dots.get_array(), centres[order, axis])


def test_saves_the_same_bytes(tmp_path: Path) -> None:
    for suffix in ("png", "svg", "pdf"):
        for name in ("a", "b"):
            save(match_figure(scan(), [scan()]), tmp_path / f"{name}.{suffix}", dpi=60)
        first, second = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("a", "b"))
        assert first == second
        assert len(first) > 5_000


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Panel("x", np.zeros((4, 4), dtype=np.float32), np.eye(4), (0.0, 0.0, 0.0))
    with pytest.raises(UsageError, match="volume"):
        match_figure(flat, [])
    with pytest.raises(UsageError, match="convention"):
        match_figure(scan(), [], "upside down")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="field"):
        match_figure(scan(), [], field_mm=0)
    with pytest.raises(UsageError, match="centres"):
        embedding_figure(np.zeros((3, 2)), np.zeros((4, 3)))
    with pytest.raises(UsageError, match="suffix") as caught:
        save(match_figure(scan(), []), tmp_path / "figure")
    assert ".png" in caught.value.next_step
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra):
        match_figure(scan(), [])


def test_a_constant_scan_can_be_drawn() -> None:
    match_figure(Panel("x", np.ones((9, 9, 9), np.float32), np.eye(4), (4.0, 4.0, 4.0)), [])


def test_drawing_leaves_pyplot_alone() -> None:
    code = """
import sys, numpy as np
from isimed_index.report import figures
assert not any(name.startswith("matplotlib") for name in sys.modules)
figures.match_figure(figures.Panel("x", np.ones((9, 9, 9), np.float32), np.eye(4), (4.0, 4.0, 4.0)), [])
assert "matplotlib.pyplot" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
