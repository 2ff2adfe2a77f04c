"""The sampler: a batch is decided by seed and step, every scan has its turn, memory is bounded."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining import STILL, config, sources, volume
from scipy.spatial import cKDTree
from scipy.spatial.distance import pdist
from threadpoolctl import threadpool_info, threadpool_limits

from isimed_index.config import Augmentation, PretrainConfig, pretrain_config
from isimed_index.errors import NotFound, ScanRefused, UsageError
from isimed_index.grid import Box
from isimed_index.pretrain import sampler
from isimed_index.pretrain.sampler import Cohort, batches, draw, scans_of
from isimed_index.pretrain.sharing import rest_soon
from isimed_index.scans.prepare import Intensity, Volume, prepare
from isimed_index.space import apply_affine, inverse
from isimed_index.testing.templates import ellipsoid_head


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def cohort(count: int, budget: int = 10**9) -> Cohort:
    return Cohort(sources(count), budget)


def blas_threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if "numpy" in pool["filepath"]]


def flat(value: float) -> Volume:
    """A volume that can be told by its value."""
    values = np.full((40, 40, 40), value, np.float32)
    return Volume(values, np.diag([2.0, 2.0, 2.0, 1.0]), value, np.ones_like(values, bool))


def shown(setup: PretrainConfig, count: int, steps: int) -> list[int]:
    """Numbers of the scans in the order in which `steps` steps show them."""
    told = Cohort([lambda n=n: flat(float(n)) for n in range(count)], 10**9)
    per_scan = setup.crops_per_scan * setup.views_per_crop
    drawn = [draw(told, setup, step).images[::per_scan, 0, 0, 0, 0] for step in range(steps)]
    return torch.cat(drawn).int().tolist()


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    first, again = draw(cohort(3), config(), 7), draw(cohort(3), config(), 7)
    assert torch.equal(first.images, again.images)
    assert np.array_equal(first.affines, again.affines)
    for other in (draw(cohort(3), config(), 8), draw(cohort(3), config(seed=6), 7)):
        assert not np.array_equal(first.affines, other.affines)


def test_shapes_and_order() -> None:
    batch = draw(cohort(3), config(crops_per_scan=3), 0)
    assert batch.images.shape == (12, 1, 36, 36, 36)
    assert batch.images.dtype == torch.float32
    assert batch.affines.shape == (12, 4, 4)
    assert batch.scan_of.tolist() == [0] * 6 + [1] * 6
    assert batch.crop_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize(("count", "batch_scans"), [(5, 2), (4, 4), (2, 5), (1, 1), (3, 7)])
def test_every_scan_is_shown_once_before_any_is_shown_again(count: int, batch_scans: int) -> None:
    setup = config(batch_scans=batch_scans, augmentation=STILL)
    order = shown(setup, count, steps=6)
    assert len(order) == 6 * batch_scans
    for start in range(0, len(order) - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))


def test_epochs_differ_in_order() -> None:
    order = shown(config(batch_scans=6, augmentation=STILL), 6, steps=4)
    assert len({tuple(order[start : start + 6]) for start in range(0, 24, 6)}) > 1


def test_views_of_a_crop_show_nearly_the_same_place_and_none_is_mirrored() -> None:
    setup = config(crops_per_scan=4)
    batch = draw(cohort(2), setup, 1)
    middle = np.array([apply_affine(affine, [17.5, 17.5, 17.5]) for affine in batch.affines])
    apart = np.linalg.norm(middle[::2] - middle[1::2], axis=1)
    assert (apart > 0.5).all()
    assert (apart < 8 * np.sqrt(3) * 2.5).all()
    assert (np.linalg.det(batch.affines[:, :3, :3]) > 0).all()


def test_views_are_centred_on_foreground() -> None:
    made = volume(0)
    setup = config(crops_per_scan=20, batch_scans=1, views_per_crop=1, descriptor_weight=0.0, augmentation=STILL)
    batch = draw(Cohort([lambda: made], 10**9), setup, 0)
    at = apply_affine(inverse(made.affine), [apply_affine(affine, [17.5, 17.5, 17.5]) for affine in batch.affines])
    nearest = np.floor(at + 1e-6).astype(int)  # the middle of an even number of voxels lies half a voxel further
    assert made.foreground[tuple(nearest.T)].all()


def test_the_papers_batch_is_64_scans_of_16_patches_and_shows_voxels_as_encoding_does() -> None:
    """Patches of the paper are not augmented, so they are blocks of the volume: encoding sees nothing else either."""
    setup = pretrain_config("paper")
    made = volume(1)
    batch = draw(Cohort([lambda: made] * 64, 10**9), setup, 0)
    assert batch.images.shape == (64 * 16, 1, 32, 32, 32)
    assert np.bincount(batch.scan_of).tolist() == [16] * 64
    values = np.pad(torch.from_numpy(made.values).half().float().numpy(), 40, constant_values=made.background)
    centre = apply_affine(made.affine, np.argwhere(made.foreground).mean(axis=0))
    for view in range(0, 1024, 50):
        patient = batch.affines[view].copy()
        patient[:3, 3] += centre
        start = apply_affine(inverse(made.affine), patient[:3, 3])
        np.testing.assert_allclose(start, np.rint(start), atol=1e-6)
        x, y, z = np.rint(start).astype(int) + 40
        np.testing.assert_allclose(batch.images[view, 0], values[x : x + 32, y : y + 32, z : z + 32], rtol=0, atol=1e-3)


def test_pairs_across_scans_are_measured_from_the_foregrounds_centroid() -> None:
    made = volume(1)
    moved = Volume(
        made.values, made.affine + np.pad([[100.0], [-50.0], [7.0]], ((0, 1), (3, 0))), -1.0, made.foreground
    )
    setup = config(batch_scans=1, pairs="all")
    here, there = (draw(Cohort([lambda v=v: v], 10**9), setup, 0).affines for v in (made, moved))
    np.testing.assert_allclose(here, there, atol=1e-9)
    within = draw(Cohort([lambda: made], 10**9), replace(setup, pairs="within"), 0).affines
    offset = within[:, :3, 3] - here[:, :3, 3]
    expected = apply_affine(made.affine, np.argwhere(made.foreground).mean(axis=0))
    np.testing.assert_allclose(offset, np.broadcast_to(expected, offset.shape), atol=1e-6)


def test_a_scan_without_foreground_is_shown_anywhere() -> None:
    blank = Volume(np.zeros((40, 40, 40), np.float32), np.eye(4), 0.0, np.zeros((40, 40, 40), bool))
    batch = draw(Cohort([lambda: blank], 10**9), config(), 0)
    assert torch.isfinite(batch.images).all()


def test_volumes_are_kept_within_the_budget() -> None:
    read: Counter[int] = Counter()

    def source(number: int) -> Volume:
        read[number] += 1
        return volume(number)

    one = volume(0).values.size * 2
    small = Cohort([lambda n=n: source(n) for n in range(3)], int(2.5 * one))
    whole = Box((0, 0, 0), (1, 1, 1))
    for number in (0, 1, 2, 0, 2, 1, 2):
        small.scan(number).windows([whole])
    assert read == {0: 1, 1: 1, 2: 3}


def test_a_scan_that_two_threads_want_is_read_once() -> None:
    read: Counter[int] = Counter()

    def slow() -> Volume:
        read[0] += 1
        return volume(0)

    wanted, found = Cohort([slow], 10**9), []
    threads = [threading.Thread(target=lambda: found.append(wanted.scan(0))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == {0: 1}
    assert all(scan is found[0] for scan in found)


def test_read_only_volumes_are_taken() -> None:
    made = volume(0)
    made.values.setflags(write=False)
    window = Cohort([lambda: made], 10**9).scan(0).whole
    assert window is not None
    assert window.values.dtype == torch.float16


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_a_view_shows_the_place_that_its_affine_says(seed: int) -> None:
    """Every voxel of the volume tells its own place along one axis, so every voxel of a view must tell it too."""
    posed = replace(STILL, rotation_deg=15.0, scale=0.1)
    setup = config(seed=seed, batch_scans=1, crops_per_scan=2, view_vox=32, descriptor_weight=0.0, augmentation=posed)
    shape = (56, 52, 54)
    mm = apply_affine(volume(0).affine, np.moveaxis(np.indices(shape), 0, -1))
    body = np.zeros(shape, bool)
    body[26:30, 24:28, 25:29] = True  # views lie inside of the volume
    for axis in range(3):
        low, span = mm[..., axis].min(), np.ptp(mm[..., axis])
        told = Volume(((mm[..., axis] - low) / span).astype(np.float32), volume(0).affine, 0.0, body)
        batch = draw(Cohort([lambda told=told: told], 10**9), setup, 0)
        for image, affine in zip(batch.images[:, 0, 8:-8, 8:-8, 8:-8], batch.affines, strict=True):
            at = apply_affine(affine, np.moveaxis(np.indices((32,) * 3), 0, -1))[8:-8, 8:-8, 8:-8, axis]
            np.testing.assert_allclose(image, (at - low) / span, atol=2e-3)
        assert (np.linalg.det(batch.affines[:, :3, :3]) > 0).all()  # not mirrored


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_processes_draw_together_what_one_draws_alone(world: int) -> None:
    setup = config(batch_scans=5, crops_per_scan=2)
    whole = draw(cohort(4), setup, 3)
    parts = [draw(cohort(4), setup, 3, (rank, world)) for rank in range(world)]
    crops = np.concatenate([part.crop_of for part in parts])
    order = np.argsort(crops, kind="stable")
    assert np.array_equal(crops[order], whole.crop_of)
    assert np.array_equal(np.concatenate([part.scan_of for part in parts])[order], whole.scan_of)
    assert np.array_equal(np.concatenate([part.affines for part in parts])[order], whole.affines)
    assert torch.equal(torch.cat([part.images for part in parts])[order], whole.images)
    assert [set(part.scan_of.tolist()) for part in parts] == [set(range(rank, 5, world)) for rank in range(world)]


def test_more_processes_than_scans_of_a_batch_are_refused() -> None:
    with pytest.raises(UsageError, match="each of 3 processes"):
        draw(cohort(4), config(batch_scans=2), 0, (0, 3))


# -- where crops are centred -----------------------------------------------------------------------------------------


def centres_vox(made: Volume, setup: PretrainConfig, steps: int = 1) -> np.ndarray:
    """Voxels (n, 3) on which still crops of one scan are centred."""
    told = Cohort([lambda: made], 10**9)
    affines = np.concatenate([draw(told, setup, step).affines for step in range(steps)])
    middle = np.full(3, setup.view_vox / 2 - 1)  # half a voxel before the middle of an even number of voxels
    return np.array([apply_affine(inverse(made.affine) @ affine, middle) for affine in affines])


def one_scan(**changes: Any) -> PretrainConfig:
    fields = {"batch_scans": 1, "views_per_crop": 1, "descriptor_weight": 0.0, "view_vox": 32, "augmentation": STILL}
    return config(**{**fields, **changes})


def distance_vox(made: Volume, places: np.ndarray) -> np.ndarray:
    """Distance of each place (n, 3) from the nearest foreground voxel."""
    return cKDTree(np.argwhere(made.foreground)).query(places)[0]


def ball(radius: float, shape: tuple[int, int, int] = (90, 80, 84)) -> Volume:
    """A ball of foreground in air, in voxels of 2 mm."""
    apart = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - (np.array(shape) - 1) / 2, axis=-1)
    inside = apart < radius
    return Volume(np.where(inside, 1, -1).astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0]), -1.0, inside)


def test_some_crops_are_centred_outside_of_the_body_but_not_beyond_half_a_patch() -> None:
    made = ball(14.0)
    inside = distance_vox(made, centres_vox(made, one_scan(crops_per_scan=60)))
    np.testing.assert_allclose(inside, 0, atol=1e-6)
    beyond = distance_vox(made, centres_vox(made, one_scan(crops_per_scan=300, border_probability=0.5)))
    assert 0.1 < np.mean(beyond > 0.5) < 0.5
    assert 10 < beyond.max() <= 16 + np.sqrt(3) / 2


def test_centres_stay_inside_of_the_volume() -> None:
    made = volume(1)
    at = centres_vox(made, one_scan(crops_per_scan=200, border_probability=1.0))
    assert (at >= -1e-6).all()
    assert (at <= np.array(made.values.shape) - 1 + 1e-6).all()


def near_share(made: Volume, setup: PretrainConfig, steps: int) -> float:
    """Share of the pairs of crops of one scan that lie within 40 mm."""
    at = centres_vox(made, setup, steps).reshape(steps, -1, 3)
    return float(np.mean([pdist(apply_affine(made.affine, one)) <= 40 for one in at]))


def test_near_crops_lie_within_40_mm_of_another() -> None:
    made = ball(38.0)
    pairs = one_scan(crops_per_scan=2)
    few, half, all_near = (near_share(made, replace(pairs, near_crops=share), 60) for share in (0.0, 0.5, 1.0))
    assert few < 0.3
    assert few < half < 1
    assert all_near == 1


@pytest.mark.parametrize("preset", ["default", "tiny"])
def test_30_to_50_percent_of_the_pairs_that_distances_see_are_near(preset: str) -> None:
    """On an ellipsoid the size of a head; patches of the lattice that a pass over a view encodes."""
    setup = pretrain_config(preset)
    template = ellipsoid_head(4.0)
    made = prepare(template.values, template.affine, 2.0, Intensity())
    told, shares = Cohort([lambda: made], 10**9), []
    lattice = np.stack(np.meshgrid(*[np.arange(0, setup.view_vox - 31, 4) + 15.5] * 3, indexing="ij"), -1).reshape(
        -1, 3
    )
    small = replace(setup, batch_scans=1)
    for step in range(30):
        places = np.stack([apply_affine(affine, lattice) for affine in draw(told, small, step).affines])
        shares.append(np.mean(pdist(places.reshape(-1, 3)[::3]) <= 40))
    assert 0.3 <= np.mean(shares) <= 0.5


def test_patches_of_the_paper_lie_inside_of_the_foregrounds_box() -> None:
    made = ball(24.0)
    at = centres_vox(made, one_scan(crops_per_scan=400, places="box"))
    first, last = np.argwhere(made.foreground).min(axis=0), np.argwhere(made.foreground).max(axis=0)
    starts = at - 15
    assert (starts.min(axis=0) == first).all()
    assert (starts.max(axis=0) + 31 == last).all()
    small = ball(9.0)
    middle = centres_vox(small, one_scan(crops_per_scan=3, places="box")) + 0.5
    np.testing.assert_allclose(middle, np.broadcast_to((np.array(small.values.shape) - 1) / 2, (3, 3)), atol=0.51)


# -- threads ---------------------------------------------------------------------------------------------------------


def test_no_scan_is_an_error_with_a_next_step() -> None:
    with pytest.raises(NotFound) as refused:
        Cohort([], 10**9)
    assert refused.value.next_step


def test_batches_come_in_order_from_any_step() -> None:
    found = list(batches(cohort(3), config(), range(4, 7)))
    for step, batch in zip(range(4, 7), found, strict=True):
        assert torch.equal(batch.images, draw(cohort(3), config(), step).images)
    assert list(batches(cohort(3), config(), range(3, 3))) == []


def test_an_error_while_reading_reaches_the_caller() -> None:
    def broken() -> Volume:
        raise ScanRefused("it is gone")

    with pytest.raises(ScanRefused, match="gone"):
        next(batches(Cohort([broken], 10**9), config(), range(2)))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing_and_none_is_left(threads: int) -> None:
    setup = config(sampler_threads=threads)
    found = list(batches(cohort(3), setup, range(9), (1, 2)))
    for step, batch in enumerate(found):
        assert torch.equal(batch.images, draw(cohort(3), setup, step, (1, 2)).images)
    assert not sampler_threads()


def test_threads_give_way_to_the_training_and_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    priorities, computing, multiplying = [], [], set[int]()

    def noting(*arguments: Any) -> Any:
        multiplying.update(blas_threads())
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        computing.append(torch.get_num_threads())
        return draw(*arguments)

    monkeypatch.setattr(sampler, "draw", noting)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with threadpool_limits(2, user_api="blas"):
        list(batches(Cohort(sources(2), 2**30), config(), range(2)))
        assert blas_threads() == [2]
    assert min(priorities) > before
    assert set(computing) == multiplying == {1}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2


def test_threads_that_wait_rest_soon_in_a_new_process(tmp_path: Path) -> None:
    program = (
        "import os, sys, isimed_index; from isimed_index.errors import NotFound\n"
        "store = isimed_index.create(sys.argv[1])\n"
        "try: store.pretrain(preset='tiny')\n"
        "except NotFound: print(os.environ.get('GOMP_SPINCOUNT'))\n"
    )
    plain = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", program, tmp_path / "s.isimed"]
    done = subprocess.run(command, env=plain, capture_output=True, text=True)
    assert done.stdout.split() == ["1000"], done.stderr


@pytest.mark.parametrize("chosen", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}, {}])
def test_what_the_user_chose_or_a_loaded_torch_read_stays(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(chosen))
    if chosen:
        monkeypatch.delitem(sys.modules, "torch")
    rest_soon()
    assert os.environ == chosen


def test_a_closed_iterator_draws_no_more_and_leaves_no_thread() -> None:
    read: Counter[int] = Counter()

    def counted(number: int) -> Volume:
        read[number] += 1
        return volume(number)

    setup = config(sampler_threads=2, batch_scans=1)
    coming = batches(Cohort([lambda n=n: counted(n) for n in range(60)], 10**9), setup, range(60))
    next(coming)
    next(coming)
    coming.close()
    assert not sampler_threads()
    assert 2 <= len(read) <= 5  # two given out, and at most three ahead


def test_an_error_is_raised_where_its_batch_is_asked_for() -> None:
    def broken() -> Volume:
        raise ScanRefused("it is gone")

    setup = config(batch_scans=1, sampler_threads=2)
    order = scans_of(4, replace(setup), 0)[0], scans_of(4, setup, 1)[0]
    mixed = Cohort([broken if n == order[1] else sources(4)[n] for n in range(4)], 10**9)
    coming = batches(mixed, setup, range(4))
    assert len(next(coming).images) == 2
    with pytest.raises(ScanRefused, match="gone"):
        next(coming)
    assert not sampler_threads()


def sampler_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sampler")]


def test_views_with_holes_are_drawn_as_well() -> None:
    torn = Augmentation(holes=True, shuffle_probability=0.8)
    first, again = (draw(cohort(2), config(augmentation=torn), 0) for _ in range(2))
    assert torch.equal(first.images, again.images)
