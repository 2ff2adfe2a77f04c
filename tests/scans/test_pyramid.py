"""Coarser levels: their rule, their place in the patient, and what is in their voxels, against slow oracles."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import SimpleITK
from affines import affines
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isimed_index.scans.pyramid import LONGEST, coarser_image, coarser_labels, levels
from isimed_index.space import apply_affine, spacing_mm

STEPS = list(product((1, 2), repeat=3))[1:]  # a level halves one axis at least
SHAPES = st.tuples(*[st.integers(1, 7)] * 3)
KINDS = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]


def cells(voxels, step):
    """Every cell of a level with the voxels that it stands for, one by one."""
    shape = tuple(-(-n // by) for n, by in zip(voxels.shape, step, strict=True))
    for index in np.ndindex(shape):
        window = tuple(slice(i * by, (i + 1) * by) for i, by in zip(index, step, strict=True))
        yield index, voxels[window].ravel().tolist()


@pytest.mark.parametrize(
    ("shape", "spacing", "factors"),
    [
        ((64, 64, 64), (1, 1, 1), [(1, 1, 1)]),
        ((65, 10, 10), (1, 1, 1), [(1, 1, 1), (2, 2, 2)]),
        ((512, 512, 60), (0.7, 0.7, 5), [(1, 1, 1), (2, 2, 1), (4, 4, 1), (8, 8, 2)]),
        ((256, 256, 200), (1, 1, 1.9), [(1, 1, 1), (2, 2, 2), (4, 4, 4)]),
        ((256, 256, 200), (1, 1, 2), [(1, 1, 1), (2, 2, 1), (4, 4, 2), (8, 8, 4)]),
        ((300, 3, 300), (4, 0.5, 4), [(1, 1, 1), (1, 2, 1), (1, 4, 1), (2, 4, 2), (4, 4, 4), (8, 4, 8)]),
    ],
)
def test_coarse_axes_wait_for_fine_ones(shape, spacing, factors):
    found = levels(shape, spacing)
    assert [level.factor for level in found] == factors
    for level in found:
        assert level.shape == tuple(-(-n // by) for n, by in zip(shape, level.factor, strict=True))
    assert max(found[-1].shape) <= LONGEST
    assert all(max(level.shape) > LONGEST for level in found[:-1])


@settings(max_examples=30, deadline=None)
@given(affine=affines(), shape=st.tuples(*[st.integers(2, 300)] * 3), seed=st.integers(0, 2**32))
def test_a_point_of_the_patient_is_in_the_same_place_at_every_level(affine, shape, seed):
    """SimpleITK judges: BinShrink knows where the centre of each bin lies."""
    turned = affine[:3, :3] / spacing_mm(affine)
    for level in levels(shape, spacing_mm(affine)):
        full = [n // by * by for n, by in zip(shape, level.factor, strict=True)]  # BinShrink drops unfilled bins
        if 0 in full or np.prod(full) > 2**21:
            full = [by * min(2, n // by) or by for n, by in zip(shape, level.factor, strict=True)]
        image = SimpleITK.Image([int(n) for n in full], SimpleITK.sitkUInt8)
        flip = np.diag([-1, -1, 1])
        image.SetSpacing(spacing_mm(affine).tolist())
        image.SetDirection((flip @ turned).ravel().tolist())
        image.SetOrigin((flip @ affine[:3, 3]).tolist())
        judge = SimpleITK.BinShrink(image, [int(by) for by in level.factor])
        index = np.random.default_rng(seed).uniform(0, 50, 3)
        theirs = flip @ np.array(judge.TransformContinuousIndexToPhysicalPoint(index.tolist()))
        np.testing.assert_allclose(apply_affine(level.affine(affine), index), theirs, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS), shape=SHAPES, step=st.sampled_from(STEPS))
def test_whole_numbers_are_averaged_exactly_in_their_own_type(data, kind, shape, step):
    voxels = data.draw(hnp.arrays(np.dtype(kind), shape))
    coarse = coarser_image(voxels, step)
    assert coarse.dtype == voxels.dtype
    for index, members in cells(voxels, step):
        total, count = sum(members), len(members)
        # halves go to the even number, in Python's whole numbers of any size
        whole, left = divmod(total, count)
        expected = whole + (2 * left > count or (2 * left == count and whole % 2 == 1))
        assert coarse[index] == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["f4", "f8"]), shape=SHAPES, step=st.sampled_from(STEPS))
def test_real_numbers_are_averaged_in_double_precision(data, kind, shape, step):
    width = np.dtype(kind).itemsize * 8
    numbers = st.floats(-(2.0**99), 2.0**99, width=width, allow_subnormal=False)
    voxels = data.draw(hnp.arrays(np.dtype(kind), shape, elements=numbers))
    coarse = coarser_image(voxels, step)
    assert coarse.dtype == voxels.dtype
    for index, members in cells(voxels, step):
        scale = max(map(abs, members)) or 1
        apart = abs(float(coarse[index]) - sum(members) / len(members))
        assert apart <= 8 * np.finfo(kind).eps * scale + np.finfo(kind).tiny


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS), shape=SHAPES, step=st.sampled_from(STEPS))
def test_a_label_is_that_of_most_voxels_and_never_a_new_one(data, kind, shape, step):
    low = 0 if kind.startswith("u") else -2
    labels = data.draw(hnp.arrays(np.dtype(kind), shape, elements=st.integers(low, 4)))
    coarse = coarser_labels(labels, step)
    assert coarse.dtype == labels.dtype
    for index, members in cells(labels, step):
        votes = Counter(members)
        assert coarse[index] == min(votes, key=lambda label: (-votes[label], label == 0, label))


def test_what_is_made_slab_by_slab_is_what_is_made_at_once(monkeypatch):
    from isimed_index.scans import pyramid

    voxels = np.random.default_rng(3).integers(-900, 3000, (37, 20, 11)).astype(np.int16)
    whole = coarser_image(voxels, (2, 1, 2)), coarser_labels(voxels, (2, 2, 2))
    monkeypatch.setattr(pyramid, "_SLAB_BYTES", 1000)
    np.testing.assert_array_equal(coarser_image(voxels, (2, 1, 2)), whole[0])
    np.testing.assert_array_equal(coarser_labels(voxels, (2, 2, 2)), whole[1])
