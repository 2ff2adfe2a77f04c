"""`register` on heads whose motion is known; the truth never passes through the code under test, or through ITK."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from affines import affine_of, affines
from cohorts import Copy, head, rigid, write_copy, write_nifti
from hypothesis import given, settings
from hypothesis import strategies as st
from registered_heads import HEADS, register_heads, rows_of, write_heads
from scipy.spatial.transform import Rotation

import isimed_index as isi
from isimed_index.api import Store
from isimed_index.errors import NotFound, ScanRefused
from isimed_index.register import align as aligning
from isimed_index.register import images
from isimed_index.register.align import align
from isimed_index.register.images import pyramid, working_of
from isimed_index.register.reference import anchored, read_reference
from isimed_index.space import apply_affine, flip_lps, inverse, orientation
from isimed_index.testing.phantoms import CohortOptions, deformed_cohort, ellipsoid_head

LANDMARKS = ellipsoid_head(4.0).landmarks_mm(24)
CLOSE_MM = 0.5  # an eighth of a voxel: where copies of one head have to land on the head itself
MEET_MM = 2.0  # half a voxel: where they meet in the frame of a mean that began as a blur


@pytest.fixture(autouse=True, scope="module")
def coarse():
    """Working images of 4 mm for all tests here: half the time of 3 mm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_VOXELS", 60_000)
        yield


@contextmanager
def coarser() -> Iterator[None]:
    """Working images of 5 mm: half the time again, where no half millimetre is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_VOXELS", 30_000)
        patch.setattr(images, "COARSEST_MM", 5.0)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_heads(tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="module")
def registered(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the heads, registered to their mean in two rounds; treat it as read-only."""
    with coarser():
        return register_heads(files, tmp_path_factory.mktemp("registered") / "cohort.isimed")


@pytest.fixture
def mine(registered: Path, tmp_path: Path) -> Store:
    """The same, to be changed."""
    return isi.open(shutil.copytree(registered, tmp_path / "mine.isimed"))


def added(path: Path, *files: Path) -> Store:
    store = isi.create(path)
    assert not store.add(list(files)).refused
    return store


def farthest(places: list[np.ndarray]) -> float:
    """The largest distance in mm between two places (n, 3) of the same landmark."""
    return max(float(np.linalg.norm(a - b, axis=1).max()) for a, b in combinations(places, 2))


# -- orientation -----------------------------------------------------------------------------------------------------


@given(affines(), st.lists(st.floats(-200, 200), min_size=3, max_size=3))
@settings(max_examples=25)
def test_images_lie_where_itk_reads_them_from_a_file(tmp_path_factory, affine, place):
    voxels = np.arange(5 * 4 * 3, dtype=np.float32).reshape(5, 4, 3)
    path = write_nifti(tmp_path_factory.mktemp("itk") / "x.nii", voxels, affine)
    judge, ours = SimpleITK.ReadImage(str(path)), aligning._image(SimpleITK, voxels, nib.load(path).affine)
    assert ours.GetSize() == judge.GetSize()
    index = [4, 2, 1]
    np.testing.assert_allclose(
        ours.TransformIndexToPhysicalPoint(index), judge.TransformIndexToPhysicalPoint(index), atol=1e-3
    )
    assert ours[index] == judge[index]
    back = np.array(judge.TransformContinuousIndexToPhysicalPoint([0.0, 0.0, 0.0]))
    np.testing.assert_allclose(flip_lps(back), nib.load(path).affine[:3, 3], atol=1e-3)


def test_a_transform_goes_to_itk_and_back_as_it_was():
    level = aligning._Level(SimpleITK, None, None, None, (11.0, -7.0, 30.0), 1.0)
    moved = rigid((10, -20, 30), (4, 50, -6))
    stretched = moved @ np.diag([1.1, 0.9, 1.05, 1.0])
    for matrix, kind in ((moved, "rigid"), (stretched, "affine")):
        transform = level._transform(matrix, kind)
        np.testing.assert_allclose(aligning._matrix(transform), matrix, atol=1e-9)
        # ITK's way: a common point in LPS goes to the patient's point in LPS.
        patient = np.array([3.0, 40.0, -8.0])
        seen = transform.TransformPoint(flip_lps(apply_affine(matrix, patient)).tolist())
        np.testing.assert_allclose(flip_lps(seen), patient, atol=1e-9)


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_a_known_motion_is_found_in_every_axis_order(files: Path, tmp_path: Path, kind):
    store = added(tmp_path / "s", *[files / f"{copy.stem}.nii.gz" for copy in HEADS])
    codes = set(store.sql("SELECT orientation FROM scans").column(0).to_pylist())
    assert codes == {"RAS", "LPS", "PSR", "AIL"}
    done = store.register(to=files / "sub-01_T1w.nii.gz", kind=kind, workers=2)
    assert done.refused == []
    for copy in HEADS:
        landed = apply_affine(store.transform(copy.stem), copy.moved(LANDMARKS))
        assert np.linalg.norm(landed - LANDMARKS, axis=1).max() < CLOSE_MM, copy.stem
    # The test would see a wrong sign: the transform of another direction is far off.
    wrong = apply_affine(inverse(store.transform("sub-04_T1w")), HEADS[3].moved(LANDMARKS))
    assert np.linalg.norm(wrong - LANDMARKS, axis=1).min() > 20


@pytest.mark.parametrize(
    ("kind", "scale", "within_mm", "images_of"),
    [("rigid", 0.0, 2.0, nullcontext), ("affine", 0.05, 4.0, coarser)],
    ids=["rigid", "affine"],
)
def test_oblique_anisotropic_cropped_scans_land_on_an_atlas(tmp_path: Path, kind, scale, within_mm, images_of):
    template = head()
    atlas = write_nifti(tmp_path / "atlas.nii.gz", template.values, template.affine, "LPS")
    options = CohortOptions(
        amplitude_mm=0, degrees=15, scale=scale, oblique_degrees=12, spacing_mm=(3.0, 5.0), crop=0.15, noise=0.02
    )
    truth = deformed_cohort(template, 3, 3, tmp_path / "images", options=options)
    store = added(tmp_path / "s", *sorted((tmp_path / "images").glob("*.nii.gz")))
    with images_of():
        assert store.register(to=atlas, kind=kind, workers=2).refused == []
    spacings = [nib.affines.voxel_sizes(subject.affine) for subject in truth.subjects]
    assert max(spacing.max() / spacing.min() for spacing in spacings) > 1.2
    for subject in truth.subjects:
        landed = apply_affine(store.transform(subject.scan, kind=kind), truth.map_point(subject.id, LANDMARKS))
        assert np.linalg.norm(landed - LANDMARKS, axis=1).max() < within_mm, subject.id


def test_a_sheared_grid_is_registered_where_it_is(tmp_path: Path):
    template = head()
    sheared = affine_of((0, 0, 0), (4.0, 4.0, 4.0), (1, 1, 1), (0, 1, 2), (0, 0, 0), shear=0.15)
    sheared[:3, 3] = -apply_affine(sheared, (np.array(template.values.shape) - 1) / 2)
    from scipy.ndimage import affine_transform

    step = inverse(template.affine) @ sheared
    values = affine_transform(template.values, step[:3, :3], step[:3, 3], order=1)
    upright = working_of(values, sheared, 4.0)
    linear = upright.finest.affine[:3, :3] / 4
    np.testing.assert_allclose(linear.T @ linear, np.eye(3), atol=1e-6)
    fixed = pyramid(working_of(template.values, template.affine, 4.0).finest, template.foreground())
    found = align(fixed, upright)
    assert np.linalg.norm(apply_affine(found.affine, LANDMARKS) - LANDMARKS, axis=1).max() < CLOSE_MM


def test_a_mirror_image_is_not_turned_into_its_original(files: Path, tmp_path: Path):
    template = head()
    mirrored = template.affine.copy()
    mirrored[0] *= -1
    mirror = write_nifti(tmp_path / "mirror.nii.gz", np.rint(template.values * 1000).astype(np.int16), mirrored)
    store = added(tmp_path / "s", mirror)
    with coarser():
        store.register(to=files / "sub-01_T1w.nii.gz", kind="affine")
    assert np.linalg.det(store.transform("mirror")[:3, :3]) > 0


# -- the cohort's own mean -------------------------------------------------------------------------------------------


def test_landmarks_meet_in_the_common_frame(registered: Path):
    store = isi.open(registered, mode="r")
    before = farthest([copy.moved(LANDMARKS) for copy in HEADS])
    after = farthest([apply_affine(store.transform(copy.stem), copy.moved(LANDMARKS)) for copy in HEADS])
    assert before > 100
    assert after < MEET_MM


def test_the_frame_is_anchored_to_the_mean_of_the_scans(registered: Path):
    store = isi.open(registered, mode="r")
    found = [store.transform(copy.stem) for copy in HEADS]
    mean = Rotation.from_matrix([one[:3, :3] for one in found]).mean()
    assert np.degrees(mean.magnitude()) < 0.01
    rows = store.snapshot.table("transforms").to_pylist()
    centres = [np.array([row[name] for name in ("x_mm", "y_mm", "z_mm")]) for row in rows]
    seen = [apply_affine(store.transform(row["scan"]), centre) for row, centre in zip(rows, centres, strict=True)]
    np.testing.assert_allclose(np.mean(seen, axis=0), np.mean(centres, axis=0), atol=1e-6)


def test_an_anchor_takes_a_common_motion_and_a_common_size_away():
    away = rigid((10, 20, -15), (30, 0, -9)) @ np.diag([1.2, 0.9, 1.1, 1.0])
    centres = [np.array([5.0, 6.0, 7.0]), np.array([-20.0, 0.0, 11.0])]
    np.testing.assert_allclose(anchored([away, away], centres, "affine") @ away, np.eye(4), atol=1e-9)
    turned = rigid((10, 20, -15), (30, 0, -9))
    np.testing.assert_allclose(anchored([turned, turned], centres, "rigid") @ turned, np.eye(4), atol=1e-9)


def test_the_mean_image_looks_like_the_head_and_says_who_is_in_it(registered: Path):
    store = isi.open(registered, mode="r")
    (artefact,) = store.snapshot.artefacts("reference")
    mean = read_reference(store.snapshot.verified(artefact))
    assert (mean.id, mean.origin, mean.kind, mean.round) == (artefact.fields["reference"], "mean", "rigid", 2)
    assert set(mean.made_from) == set(store.snapshot.voxels_of.values())
    assert orientation(mean.image.affine) == "RAS"
    template = working_of(head().values, head().affine, mean.spacing_mm).finest
    back = inverse(store.transform("sub-01_T1w"))  # common → the head as it is in the first copy
    from isimed_index.register.images import sampled

    places = apply_affine(mean.image.affine, np.argwhere(mean.compared))
    shown, inside = sampled(template, back, places)
    assert np.corrcoef(shown[inside], mean.image.values()[mean.compared][inside])[0, 1] > 0.97


def test_again_does_nothing_and_a_new_scan_meets_the_same_mean(mine: Store, tmp_path: Path):
    before, generation = rows_of(mine), mine.generation
    again = mine.register()
    assert (again.registered, len(again.skipped), mine.generation) == ([], 4, generation)
    new = Copy("sub-05_T1w", "SRA", rigid((5, 9, -14), (8, -70, 3)))
    mine.add(write_copy(tmp_path / "new", new, head()))
    done = mine.register()
    assert (done.registered, len(done.skipped)) == (["sub-05_T1w"], 4)
    assert done.reference == before[0]["reference"]
    assert rows_of(mine)[:4] == before
    places = [apply_affine(mine.transform(c.stem), c.moved(LANDMARKS)) for c in (*HEADS, new)]
    assert farthest(places) < MEET_MM


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_fits_nothing_is_refused_by_name_and_the_rest_goes_on(files: Path, tmp_path: Path):
    rng = np.random.default_rng(0)
    noise = write_nifti(
        tmp_path / "noise.nii.gz", rng.integers(0, 900, (40, 42, 44)).astype(np.int16), np.diag([4.0] * 3 + [1])
    )
    small = np.zeros((30, 30, 30), np.int16)
    small[10:14, 10:20, 12:18] = rng.integers(400, 900, (4, 10, 6))
    speck = write_nifti(tmp_path / "speck.nii.gz", small, np.diag([1.0] * 3 + [1]))
    store = added(tmp_path / "s", files / "sub-02_T1w.nii.gz", noise, speck)
    done = store.register(to=files / "sub-01_T1w.nii.gz")
    assert done.registered == ["sub-02_T1w"]
    reasons = {item.name: (item.kind, item.reason) for item in done.refused}
    assert reasons["noise"][0] == "scan_refused"
    assert "does not look like the reference" in reasons["noise"][1]
    assert "does not overlap with the reference" in reasons["speck"][1]
    with pytest.raises(NotFound):
        store.transform("noise")


@pytest.mark.parametrize(
    ("affine", "after", "overlap", "reason"),
    [
        (np.eye(4), 0.9, 0.1, "covers 10% of the reference"),
        (np.eye(4), 0.05, 0.9, "does not look like"),
        (np.diag([2.0, 1.0, 1.0, 1.0]), 0.9, 0.9, "stretched by 2.00"),
        (np.diag([-1.0, 1.0, 1.0, 1.0]), 0.9, 0.9, "stretched"),
        (rigid((0, 0, 100)), 0.9, 0.9, "turned by 100°"),
    ],
)
def test_every_reason_has_its_words(affine, after, overlap, reason):
    with pytest.raises(ScanRefused, match=reason):
        aligning._check(affine, after, overlap)
    aligning._check(rigid((0, 0, 40)) @ np.diag([1.2, 0.9, 1.0, 1.0]), 0.9, 0.9)


# -- the store -------------------------------------------------------------------------------------------------------


def test_sql_joins_transforms_and_labels(registered: Path):
    found = isi.open(registered, mode="r").sql(
        "SELECT stddev_pop(t.a00 * l.x_mm + t.a01 * l.y_mm + t.a02 * l.z_mm + t.a03) AS spread "
        "FROM labels l JOIN transforms t USING (scan) GROUP BY l.label"
    )
    assert max(found.column("spread").to_pylist()) < MEET_MM


# -- real heads ------------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.timeout(900)
def test_real_heads_come_closer(real_data: Path, tmp_path: Path):
    images_at = sorted((real_data / "ixi" / "t1").glob("*.nii.gz"))[::30]
    for image in images_at:
        shutil.copy(image, tmp_path)
        seg = next((real_data / "ixi" / "seg").glob(image.name.split("_T1")[0] + "*"))
        shutil.copy(seg, tmp_path / image.name.replace(".nii.gz", "_seg.nii.gz"))
    store = isi.create(tmp_path / "cohort.isimed")
    store.add(sorted(tmp_path.glob("*_T1.nii.gz")), labels="{stem}_seg.nii.gz")
    with coarser():
        assert store.register(workers=2).refused == []
    by_scan: dict[str, dict[int, np.ndarray]] = {}
    for row in store.snapshot.table("labels").to_pylist():
        by_scan.setdefault(row["scan"], {})[row["label"]] = np.array([row[name] for name in ("x_mm", "y_mm", "z_mm")])
    shared = sorted(set.intersection(*(set(labels) for labels in by_scan.values())))
    before = {scan: np.array([labels[label] for label in shared]) for scan, labels in by_scan.items()}
    after = {scan: apply_affine(store.transform(scan), places) for scan, places in before.items()}
    apart = [
        np.mean([np.linalg.norm(places[a] - places[b], axis=1).mean() for a, b in combinations(places, 2)])
        for places in (before, after)
    ]
    print(f"{len(by_scan)} heads, {len(shared)} regions: {apart[0]:.1f} mm before, {apart[1]:.1f} mm after")
    assert apart[0] > 10
    assert apart[1] < 8.0  # measured: 5.5
