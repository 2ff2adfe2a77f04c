"""Balls, cuboids and labels: the patches whose centres lie in them, counted anew from the files and the SQL views."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from cohorts import COPIES, CROPPED, Cohort, tiny_scan
from hypothesis import given, settings
from hypothesis import strategies as st

import isimed_index as isi
from isimed_index.api import Store
from isimed_index.errors import NotFound, OutsideScan, StoreWarning, UsageError
from isimed_index.filters import _in_ball, _in_cuboid
from isimed_index.space import Space
from isimed_index.within import Ball, Cuboid, Label, Within

ALL = 10_000  # more than there are patches
OBLIQUE = COPIES[4]  # turned about every axis, and stored in another axis order
PLACE, CANONICAL = ["x_mm", "y_mm", "z_mm"], ["cx_mm", "cy_mm", "cz_mm"]


@pytest.fixture(scope="module")
def store(cohort: Cohort) -> Store:
    return isi.open(cohort.store, mode="r")


@pytest.fixture(scope="module")
def patches(store: Store) -> pd.DataFrame:
    return store.sql("SELECT * FROM patches").to_pandas()


def found(store: Store, within: Within, where: str | None = None) -> set[int]:
    """All patches that may answer: an exact search that asks for more than there are."""
    vector = next(iter(store.embeddings()))[1][0]
    return set(store.search(vector, ALL, where, within, exact=True).column("patch").to_pylist())


def in_space(cohort: Cohort, stem: str, xyz_mm: np.ndarray, space: str) -> np.ndarray:
    """RAS+ mm → `space`, by nibabel's affine of the file and by hand."""
    if space == "voxel":
        return nib.affines.apply_affine(np.linalg.inv(nib.load(cohort.images / f"{stem}.nii.gz").affine), xyz_mm)
    return xyz_mm * {"ras": (1, 1, 1), "lps": (-1, -1, 1)}[space]


def numbers(shape: int = 3, low: float = -60, high: float = 60) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(low, high), min_size=shape, max_size=shape)


@settings(max_examples=20, deadline=None)
@given(number=st.integers(0, 1000), radius=st.floats(3, 150), space=st.sampled_from(["ras", "lps", "voxel"]))
@pytest.mark.parametrize("copy", [COPIES[2], OBLIQUE], ids=lambda copy: copy.codes)
def test_a_ball_in_patient_millimetres(
    store: Store, cohort: Cohort, patches: pd.DataFrame, copy, number: int, radius: float, space: Space
) -> None:
    mine = patches[patches.scan == copy.stem]
    xyz_mm = mine[PLACE].to_numpy(np.float64)
    middle = xyz_mm[number] + (1.0, -0.5, 0.25)
    away = np.linalg.norm(xyz_mm - middle, axis=1)
    if (abs(away - radius) < 2e-3).any():
        return  # rounding decides
    ball = Ball(tuple(in_space(cohort, copy.stem, middle, space)), radius, space, copy.stem)
    assert found(store, ball) == set(mine.patch[away <= radius])


@settings(max_examples=20, deadline=None)
@given(one=numbers(), other=numbers(), space=st.sampled_from(["ras", "lps", "voxel"]))
def test_a_cuboid_along_the_axes_of_its_space(
    store: Store, cohort: Cohort, patches: pd.DataFrame, one: list[float], other: list[float], space: Space
) -> None:
    mine = patches[patches.scan == OBLIQUE.stem]
    own = in_space(cohort, OBLIQUE.stem, mine[PLACE].to_numpy(np.float64), space)
    middle = np.median(own, axis=0)
    low, high = np.minimum(one, other) + middle, np.maximum(one, other) + middle
    inside = ((own >= low) & (own <= high)).all(axis=1)
    if (np.minimum(abs(own - low), abs(own - high)) < 2e-3).any():
        return
    cuboid = Cuboid(tuple(low), tuple(high), space, OBLIQUE.stem)
    image = nib.load(cohort.images / f"{OBLIQUE.stem}.nii.gz")
    faces = np.array(list(product(*[(-0.5, n - 0.5) for n in image.shape])))
    corners = in_space(cohort, OBLIQUE.stem, nib.affines.apply_affine(image.affine, faces), space)
    beyond = np.maximum(corners.min(axis=0) - high, low - corners.max(axis=0))  # how far each side lies outside
    if (abs(beyond) < 2e-3).any():
        return
    if (beyond > 0).any():
        with pytest.raises(OutsideScan, match="which spans"):
            found(store, cuboid)
    else:
        assert found(store, cuboid) == set(mine.patch[inside])


def test_a_centre_on_the_border_is_inside_though_it_was_rounded() -> None:
    affine = np.array([[-0.7, 0, 0, 91.3], [0, 0.7, 0, -126.1], [0, 0, 0.7, -72.9], [0, 0, 0, 1]])
    voxels = np.stack(np.meshgrid(*[np.arange(8, 128, 8)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    centres = nib.affines.apply_affine(affine, voxels).astype(np.float32)
    box = _in_cuboid(Cuboid((40, 40, 40), (80, 80, 80), "voxel", "a"), centres, affine)
    assert set(np.flatnonzero(box)) == set(np.flatnonzero(((voxels >= 40) & (voxels <= 80)).all(axis=1)))
    corners = nib.affines.apply_affine(affine, [[40, 40, 40], [80, 80, 80]])
    ras = Cuboid(tuple(corners.min(axis=0)), tuple(corners.max(axis=0)), "ras", "a")
    assert (_in_cuboid(ras, centres, affine) == box).all()
    ball = _in_ball(Ball((64, 64, 64), 16 * 0.7, "voxel", "a"), centres, affine)
    assert ball.sum() == (((voxels - 64) ** 2).sum(axis=1) <= 16**2).sum() == 33


def test_sides_may_be_open_and_left_is_not_right(store: Store, patches: pd.DataFrame) -> None:
    mine = patches[patches.scan == COPIES[2].stem]
    right = found(store, Cuboid((37.0, -np.inf, -np.inf), (np.inf,) * 3, "ras", COPIES[2].stem))
    assert right == set(mine.patch[mine.x_mm >= 37])
    assert 0 < len(right) < len(mine)
    assert found(store, Cuboid((-np.inf,) * 3, (-37.0, np.inf, np.inf), "lps", COPIES[2].stem)) == right


@settings(max_examples=10, deadline=None)
@given(middle=numbers(low=-40, high=40), radius=st.floats(5, 120), alone=st.booleans())
def test_a_canonical_ball_and_cuboid_are_those_of_the_view(
    store: Store, patches: pd.DataFrame, middle: list[float], radius: float, alone: bool
) -> None:
    scan = OBLIQUE.stem if alone else None
    asked = patches[patches.scan == scan] if alone else patches
    away = asked[CANONICAL].to_numpy(np.float64) - middle
    if (abs(np.linalg.norm(away, axis=1) - radius) < 1e-3).any() or (abs(abs(away) - radius) < 1e-3).any():
        return
    ball = Ball(tuple(middle), radius, "canonical", scan)
    assert found(store, ball) == set(asked.patch[np.linalg.norm(away, axis=1) <= radius])
    cuboid = Cuboid(tuple(np.subtract(middle, radius)), tuple(np.add(middle, radius)), "canonical", scan)
    assert found(store, cuboid) == set(asked.patch[(abs(away) <= radius).all(axis=1)])


def test_a_canonical_ball_is_at_the_same_anatomy_in_every_scan(store: Store, patches: pd.DataFrame) -> None:
    point = np.array([10.0, 20.0, 30.0])
    asked = [store.canonical(copy.moved(point), copy.stem) for copy in COPIES]
    np.testing.assert_allclose(asked, np.tile(asked[0], (len(COPIES), 1)), atol=1.0)
    near = patches[patches.patch.isin(found(store, Ball(asked[0], 25.0, "canonical")))]
    assert set(near.scan) == {copy.stem for copy in (*COPIES, CROPPED)}
    for copy in COPIES:
        centres = near.loc[near.scan == copy.stem, PLACE].to_numpy(np.float64)
        assert np.linalg.norm(centres - copy.moved(point), axis=1).max() < 27.0


def test_canonical_takes_every_space(store: Store, cohort: Cohort) -> None:
    point = OBLIQUE.moved([10.0, 20.0, 30.0])
    expected = store.canonical(point, OBLIQUE.stem)
    for space in ("lps", "voxel"):
        asked = in_space(cohort, OBLIQUE.stem, point, space)
        np.testing.assert_allclose(store.canonical(asked, OBLIQUE.stem, space), expected, atol=1e-3)
    with pytest.raises(OutsideScan):
        store.canonical((900, 0, 0), OBLIQUE.stem)


@pytest.mark.parametrize("label", ["brain", 3, np.int64(4)])
def test_a_label_holds_the_patches_whose_centres_lie_in_it(
    store: Store, cohort: Cohort, patches: pd.DataFrame, label: str | int
) -> None:
    number = 3 if label == "brain" else int(label)
    surely: set[int] = set()
    perhaps: set[int] = set()
    for scan, mine in patches.groupby("scan"):
        seg = nib.load(cohort.images / f"{scan}_seg.nii.gz")
        values = np.pad(np.asarray(seg.dataobj), 20)
        at = nib.affines.apply_affine(np.linalg.inv(seg.affine), mine[PLACE].to_numpy(np.float64)) + 20
        # The edge of a patch is even, so its centre lies in the corner of eight voxels, all of which are as near.
        ends = [np.floor(at + 0.5 - 1e-3), np.ceil(at - 0.5 + 1e-3)]
        corners = [np.where(pick, *ends).astype(int) for pick in np.ndindex(2, 2, 2)]
        seen = np.stack([values[tuple(corner.T)] == number for corner in corners])
        surely |= set(mine.patch[seen.all(axis=0)])
        perhaps |= set(mine.patch[seen.any(axis=0)])
    assert len(surely) > 20
    assert len(perhaps) < len(patches) / 2
    assert surely <= found(store, Label(label)) <= perhaps
    mine = set(patches.patch[patches.scan == OBLIQUE.stem])
    assert found(store, Label(label, OBLIQUE.stem)) == found(store, Label(label)) & mine


def test_a_label_is_the_one_that_query_shows(store: Store) -> None:
    shown = store.search_patches((10, 20, 30), COPIES[0].stem, k=500)
    inside = found(store, Label("white matter"))
    assert {row.patch for row in shown if row.label == "white matter"} == inside & {row.patch for row in shown}
    assert inside & {row.patch for row in shown}


def test_conditions_are_joined(store: Store, patches: pd.DataFrame) -> None:
    ball = Ball(tuple(OBLIQUE.moved((0, 0, 0))), 60.0, "ras", OBLIQUE.stem)
    joined = found(store, [ball, Label("brain")], where="z_mm > 90")
    above = set(patches.patch[patches.z_mm > 90])
    assert joined == found(store, ball) & found(store, Label("brain")) & above
    assert joined
    assert found(store, [], where="z_mm > 90") == above


def test_the_nearest_within_are_found_not_the_nearest_that_happen_to_be_within(store: Store) -> None:
    vectors = next(iter(store.embeddings()))[1][:4]
    ball = Ball(tuple(OBLIQUE.moved((0, 0, 0))), 50.0, "ras", OBLIQUE.stem)
    few, every = store.search(vectors, 5, within=ball), store.search(vectors, ALL, within=ball, exact=True)
    assert few.num_rows == 20
    distances = every.column("distance").to_numpy().reshape(4, -1)[:, :5]
    np.testing.assert_allclose(few.column("distance").to_numpy().reshape(4, 5), distances, atol=2e-6)


def test_a_scan_whose_chart_does_not_hold_is_in_no_canonical_ball(cohort: Cohort, tmp_path: Path) -> None:
    shutil.copytree(cohort.store, tmp_path / "copy.isimed")
    store = isi.open(tmp_path / "copy.isimed")
    store.add(tiny_scan(tmp_path / "noise.nii", shape=(40, 40, 40)))
    store.index()
    assert not store._lookup(None).frame.charts["noise"].holds
    at = store.sql("SELECT cx_mm, cy_mm, cz_mm FROM patches WHERE scan = 'noise' LIMIT 1").to_pylist()[0]
    ball = Ball(tuple(at.values()), 500.0, "canonical")
    with pytest.warns(StoreWarning, match="1 of 7 encoded scans have no chart that holds"):
        near = found(store, ball)
    with pytest.warns(StoreWarning, match="1 of 7 encoded scans have no chart that holds"):
        assert found(store, ball) == near  # what is kept of the first answer lacks them as well
    noise = set(store.sql("SELECT patch FROM patches WHERE scan = 'noise'").column("patch").to_pylist())
    assert noise
    assert not near & noise
    assert found(store, Ball((40.0, 40.0, 60.0), 500.0, "ras", "noise")) == noise
    with pytest.raises(NotFound, match="no chart that holds"):
        found(store, Ball(tuple(at.values()), 500.0, "canonical", "noise"))
    with pytest.raises(NotFound, match="chart does not hold"):
        store.canonical((40, 40, 60), "noise")
    with pytest.raises(NotFound, match="chart does not hold"):
        store.search_patches((40, 40, 60), "noise", within_mm=20.0)
    with pytest.warns(StoreWarning, match="1 of 2 encoded scans have no chart that holds"):
        store.search_patches((0, 0, 0), COPIES[0].stem, within_mm=20.0, where="scan IN ('noise', 'sub-02_T1w')")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Ball((1, 2, 3), 5.0, "ras"), "needs the scan"),
        (lambda: Cuboid((0, 0, 0), (1, 1, 1), "lps"), "needs the scan"),
        (lambda: Ball((1, 2), 5.0, "canonical"), "three numbers"),
        (lambda: Ball((1, 2, np.nan), 5.0, "canonical"), "three numbers"),
        (lambda: Ball((1, 2, np.inf), 5.0, "canonical"), "finite"),
        (lambda: Ball((1, 2, 3), 0.0, "canonical"), "above 0 mm"),
        (lambda: Ball((1, 2, 3), float("nan"), "canonical"), "above 0 mm"),
        (lambda: Ball((1, 2, 3), 5.0, "RAS", "a"), "space of a ball"),
        (lambda: Ball((1, 2, 3), 5.0, "ras", Path("a.nii")), "id of a stored scan"),
        (lambda: Cuboid((0, 5, 0), (1, 1, 1), "canonical"), "on every axis"),
        (lambda: Cuboid((0, np.nan, 0), (1, 1, 1), "canonical"), "three numbers"),
        (lambda: Label(1.5), "name or its number"),
        (lambda: Label(True), "name or its number"),
        (lambda: Label(0), "background"),
    ],
)
def test_what_is_no_place_is_refused(make, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make()


@pytest.mark.parametrize(
    ("within", "error", "said"),
    [
        (Ball((900.0, 0.0, 0.0), 5.0, "ras", COPIES[2].stem), OutsideScan, "spans"),
        (Cuboid((900.0, 0.0, 0.0), (950.0, 1.0, 1.0), "voxel", COPIES[2].stem), OutsideScan, r"\(voxel\) lies outside"),
        (Ball((0.0, 0.0, 0.0), 5.0, "ras", "sub-02_T2w"), NotFound, "did you mean"),
        (Label("brian"), NotFound, "did you mean 'brain'"),
        (Label(77), NotFound, "label 77"),
        (Label("brain", "nobody"), NotFound, "nobody"),
        ("brain", UsageError, "Ball, Cuboid or Label"),
        (20.0, UsageError, "Ball, Cuboid or Label"),
        ([Label("brain"), "x"], UsageError, "Ball, Cuboid or Label"),
    ],
)
def test_what_is_not_there_is_told(store: Store, within: Within, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        found(store, within)
