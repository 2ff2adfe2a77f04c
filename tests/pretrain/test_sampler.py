"""The sampler: a batch is decided by seed and step, every scan has its turn, memory is bounded."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from pretraining import STILL, config, sources, volume

from isimed_index.config import PretrainConfig, pretrain_config
from isimed_index.errors import ScanRefused, UsageError
from isimed_index.pretrain.sampler import Cohort, batches, draw
from isimed_index.scans.prepare import Volume
from isimed_index.space import apply_affine, inverse


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def cohort(count: int, budget: int = 10**9) -> Cohort:
    return Cohort(sources(count), budget)


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

    made = volume(0)
    one = made.values.size * 2 + int(made.foreground.sum()) * 6
    small = Cohort([lambda n=n: source(n) for n in range(3)], int(2.5 * one))
    for number in (0, 1, 0, 2, 0, 1):
        small.volume(number)
    assert read == {0: 1, 1: 2, 2: 1}
    tiny = Cohort([lambda: source(7)], 0)
    assert tiny.volume(0) is tiny.volume(0)


def test_read_only_volumes_are_taken() -> None:
    made = volume(0)
    made.values.setflags(write=False)
    assert Cohort([lambda: made], 10**9).volume(0).values.dtype == torch.float16


def test_no_scan_is_an_error_with_a_next_step() -> None:
    with pytest.raises(UsageError) as refused:
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
