"""Scans that are read box by box: the same views as of whole volumes, and no more read than they need."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining import config
from scipy.ndimage import zoom

from isimed_index.grid import Box
from isimed_index.pretrain.cohort import Cohort, PartialSource
from isimed_index.pretrain.reading import StoredSource, joined_boxes, read_cost, working_voxels
from isimed_index.pretrain.sampler import batches, draw
from isimed_index.scans.chunks import StoredScan, open_chunks, write_chunks
from isimed_index.scans.prepare import Intensity, Volume, WorkingGrid
from isimed_index.scans.scan import Scan

SHAPE = (150, 140, 330)  # 3 × 3 × 6 chunks
AFFINE = np.array([[-1.0, 0.1, 0, 60], [0.1, 1.0, 0, -80], [0, 0, 1.5, -300], [0, 0, 0, 1.0]])
PLACES = st.tuples(*[st.floats(0, 1)] * 3)


@dataclass
class Recorder:
    """A stored scan that notes which boxes are asked of it; None stands for all of it."""

    stored: StoredScan
    asked: list[Box | None] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stored, name)

    def values(self, box: Box | None = None) -> np.ndarray:
        self.asked.append(box)
        return self.stored.values(box)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[StoredScan]:
    """Two long scans of smooth noise, one of them with a slope."""
    scans = []
    for number in range(2):
        rng = np.random.default_rng(number)
        noise = zoom(rng.normal(size=(15, 14, 33)), 10, order=1) + rng.normal(scale=0.05, size=SHAPE)
        voxels = np.clip(noise * 300 + 300, -1000, 3000).astype(np.int16)
        folder: Path = tmp_path_factory.mktemp("scan")
        write_chunks(Scan(f"scan-{number}", voxels, AFFINE, 1.0 + 0.5 * number, -20.0), None, folder)
        scans.append(open_chunks(folder))
    return scans


@pytest.fixture(scope="module")
def prepared() -> dict[tuple[float, bool], Volume]:
    """Whole volumes that an example has prepared already."""
    return {}


def source_of(scan: StoredScan, spacing_mm: float = 2.0, intensity: Intensity | None = None) -> StoredSource:
    voxels = working_voxels(scan.shape, [1.005, 1.005, 1.5], spacing_mm)
    return StoredSource(lambda: scan, spacing_mm, intensity or Intensity(), voxels)


def some_box(shape: tuple[int, int, int], place: tuple[float, float, float], side: int) -> Box:
    start = [int(at * max(n - side, 0)) for at, n in zip(place, shape, strict=True)]
    stop = [min(at + side, n) for at, n in zip(start, shape, strict=True)]
    return Box(tuple(start), tuple(stop))


@settings(max_examples=12)
@given(
    places=st.lists(PLACES, min_size=1, max_size=4),
    side=st.integers(3, 40),
    spacing=st.sampled_from([1.0, 1.5, 2.0, 4.3]),
    window=st.booleans(),
)
def test_windows_hold_what_the_whole_volume_holds(
    stored: list[StoredScan],
    prepared: dict[tuple[float, bool], Volume],
    places: list[tuple[float, float, float]],
    side: int,
    spacing: float,
    window: bool,
) -> None:
    intensity = Intensity(window_low=0.0, window_high=700.0) if window else Intensity()
    source = source_of(stored[1], spacing, intensity)
    whole = prepared.get((spacing, window)) or prepared.setdefault((spacing, window), source())
    assert whole.ends is not None
    boxes = [some_box(whole.values.shape, place, side) for place in places]
    for box, found in zip(boxes, source.windows(boxes, whole.ends, None), strict=True):
        inside = tuple(slice(a - c, b - c) for a, b, c in zip(box.start, box.stop, found.start, strict=True))
        expected = whole.values[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]
        np.testing.assert_allclose(found.values[inside].float(), expected, atol=2e-3)  # float16
        assert (found.shape, found.background) == (whole.values.shape, whole.background)


def test_a_small_box_reads_few_voxels_and_the_whole_is_read_where_that_costs_less(stored: list[StoredScan]) -> None:
    seen = Recorder(stored[0])
    source = source_of(seen)  # type: ignore[arg-type]
    whole = source()
    assert whole.ends is not None
    shape = whole.values.shape
    seen.asked.clear()
    (window,) = source.windows([Box((2, 3, 4), (30, 30, 30))], whole.ends, None)
    assert window.values.shape == (28, 27, 26)
    (box,) = seen.asked
    assert box is not None
    assert np.prod(box.shape) < 0.05 * np.prod(SHAPE)
    seen.asked.clear()
    all_over = [Box((0, 0, z), (shape[0], shape[1], min(z + 40, shape[2]))) for z in range(0, shape[2], 30)]
    windows = source.windows(all_over, whole.ends, None)
    assert seen.asked == [None]
    assert all(found is windows[0] for found in windows)
    assert windows[0].values.shape == shape


def test_boxes_near_each_other_are_read_together_and_others_apart() -> None:
    grid = WorkingGrid.of((600, 600, 600), np.eye(4), 2.0)
    near = [Box((40, 40, 40), (70, 70, 70)), Box((44, 38, 42), (74, 68, 72))]
    far = Box((240, 240, 240), (270, 270, 270))
    first, second, third = joined_boxes([near[0], far, near[1]], grid)
    assert first == third == Box((40, 38, 40), (74, 70, 72))
    assert second == far
    assert sum(read_cost(grid.source_box(box)) for box in {first, second}) < read_cost(Box((0, 0, 0), (600, 600, 600)))


@settings(max_examples=30)
@given(places=st.lists(PLACES, min_size=1, max_size=12), side=st.integers(2, 60))
def test_joining_never_costs_more_and_every_box_is_held(places: list[tuple[float, float, float]], side: int) -> None:
    grid = WorkingGrid.of((400, 300, 500), np.diag([1.0, 1.0, 0.8, 1.0]), 1.5)
    boxes = [some_box(grid.shape, place, side) for place in places]
    joined = joined_boxes(boxes, grid)
    for box, around in zip(boxes, joined, strict=True):
        assert (np.array(around.start) <= box.start).all()
        assert (np.array(around.stop) >= box.stop).all()
    cost = sum(read_cost(grid.source_box(box)) for box in set(joined))
    assert cost <= sum(read_cost(grid.source_box(box)) for box in boxes) * (1 + 1e-9)


def test_batches_are_the_same_kept_or_read(stored: list[StoredScan]) -> None:
    """But for float16: values next to the middle of two numbers may be rounded the other way."""
    setup = config(batch_scans=2, crops_per_scan=2, view_vox=36)
    sources = [source_of(scan) for scan in stored]
    assert all(isinstance(source, PartialSource) for source in sources)
    kept, read = (draw(Cohort(sources, budget), setup, 3) for budget in (10**9, 0))
    assert np.array_equal(kept.affines, read.affines)
    torch.testing.assert_close(kept.images, read.images, atol=1e-2, rtol=0)


def test_what_is_shown_does_not_depend_on_what_was_read_before(stored: list[StoredScan]) -> None:
    """Such as after a training is resumed; one scan fits into memory here, the other does not."""
    setup = config(batch_scans=1, view_vox=36, sampler_threads=2)
    sources = [source_of(scan) for scan in stored]
    budget = sources[0].voxels * 2 + 10
    through = list(batches(Cohort(sources, budget), setup, range(6)))
    for step in (5, 3, 4):
        assert torch.equal(draw(Cohort(sources, budget), setup, step).images, through[step].images)
    cohort = Cohort(sources, budget)
    assert [cohort.scan(number).kept for number in range(2)] == [True, False]
    assert cohort.scan(1).whole is None


def test_a_scan_that_fits_stays_where_larger_ones_do_not(stored: list[StoredScan]) -> None:
    large, small = source_of(stored[0]), replace(source_of(stored[1], 6.0))
    cohort = Cohort([large, small, large], small.voxels * 2)
    assert [cohort.scan(number).kept for number in range(3)] == [False, True, False]


def test_a_step_asks_for_boxes_of_scans_that_are_not_kept(stored: list[StoredScan]) -> None:
    seen = Recorder(stored[0])
    setup = config(batch_scans=1, crops_per_scan=1, view_vox=32, descriptor_weight=0.0, views_per_crop=1)
    cohort = Cohort([source_of(seen, 1.0)], 0)  # type: ignore[arg-type]
    draw(cohort, setup, 0)
    seen.asked.clear()
    draw(cohort, setup, 1)
    assert len(seen.asked) == 1
    assert seen.asked[0] is not None
