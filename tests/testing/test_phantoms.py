"""Phantom cohorts: what they call the truth is where the anatomy is in the files."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from isimed_index.errors import NotFound, UsageError
from isimed_index.space import apply_affine, inverse, orientation, spacing_mm
from isimed_index.testing.appearance import bias_field, contrast_curve, magnitude_noise
from isimed_index.testing.deformation import MAX_SLOPE, random_deformation
from isimed_index.testing.phantoms import (
    CohortOptions,
    DeformedCohort,
    Template,
    deformed_cohort,
    ellipsoid_head,
    mni152_template,
    warp,
)

LOW_MM, HIGH_MM = np.array([-70.0, -100.0, -60.0]), np.array([75.0, 80.0, 90.0])
SMALL = CohortOptions(spacing_mm=(4.0, 6.0), max_voxels=120_000)


def draw(seed: int):
    """A deformation of a box of head size."""
    rng = np.random.default_rng(seed)
    return random_deformation(rng, LOW_MM, HIGH_MM, amplitude_mm=9.0, degrees=8.0, scale=0.08)


def coded(axis: int) -> Template:
    """A template whose value is the coordinate along one world axis, in mm above its lowest."""
    head = ellipsoid_head(6.0)
    index = np.stack(np.meshgrid(*map(np.arange, head.values.shape), indexing="ij"), axis=-1)
    mm = apply_affine(head.affine, index)[..., axis]
    return Template((mm - mm.min() + 1).astype(np.float32), head.affine)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DeformedCohort:
    root = tmp_path_factory.mktemp("phantoms")
    return deformed_cohort(ellipsoid_head(4.0), 8, 3, root / "images", options=SMALL, labels_dir=root / "labels")


class TestDeformation:
    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 10_000))
    def test_the_way_back_is_exact(self, seed: int):
        deformation = draw(seed)
        points = np.random.default_rng(seed).uniform(LOW_MM - 30, HIGH_MM + 30, (50, 3))
        np.testing.assert_allclose(deformation.to_template(deformation.to_subject(points)), points, atol=1e-5)
        np.testing.assert_allclose(deformation.to_subject(deformation.to_template(points)), points, atol=1e-5)

    def test_displacement_reaches_its_amplitude_and_keeps_its_slope(self):
        deformation = draw(1)
        axes = [np.arange(low, high, 5.0) for low, high in zip(LOW_MM, HIGH_MM, strict=True)]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
        moved = deformation.displacement_mm(points)
        assert 8.0 < np.linalg.norm(moved, axis=1).max() < 9.3
        for step in np.eye(3) * 0.5:
            slope = np.linalg.norm(deformation.displacement_mm(points + step) - moved, axis=1) / 0.5
            assert slope.max() < MAX_SLOPE

    def test_far_away_nothing_is_displaced(self):
        assert np.abs(draw(2).displacement_mm(np.array([[900.0, 0, 0], [0, -900.0, 0]]))).max() == 0

    def test_it_is_more_than_an_affine_map(self):
        points = np.random.default_rng(0).uniform(LOW_MM, HIGH_MM, (200, 3))
        moved = np.c_[draw(4).to_subject(points), np.ones(200)]
        left = points - moved @ np.linalg.lstsq(moved, points, rcond=None)[0]
        assert np.linalg.norm(left, axis=1).mean() > 1.5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_warped_coordinate_image_shows_the_template_coordinate(axis: int):
    template, deformation = coded(axis), draw(5)
    affine = np.array([[0, 2.5, 0.2, -90], [-3.0, 0, 0, 90], [0, 0.2, -4.0, 95], [0, 0, 0, 1]])
    warped = warp(template, deformation, (62, 64, 44), affine)
    landmarks = np.random.default_rng(6).uniform([-35, -45, -35], [35, 45, 35], (60, 3))
    at = apply_affine(inverse(affine), deformation.to_subject(landmarks))
    seen = map_coordinates(warped, at.T, order=1)
    lowest = apply_affine(template.affine, [0, 0, 0])[axis] - 1
    np.testing.assert_allclose(seen + lowest, landmarks[:, axis], atol=0.1)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_files_show_every_point_where_the_truth_says(tmp_path: Path, axis: int):
    plain = replace(SMALL, contrast=False, bias=0.0, noise=0.0, crop=0.0)
    made = deformed_cohort(coded(axis), 3, 11 + axis, tmp_path, options=plain)
    landmarks = np.random.default_rng(axis).uniform([-35, -45, -35], [35, 45, 35], (60, 3))
    for subject in made.subjects:
        image = nib.load(tmp_path / subject.file)
        at = apply_affine(inverse(image.affine), made.map_point(subject.id, landmarks))
        seen = map_coordinates(np.asarray(image.dataobj, dtype=float), at.T, order=1)
        per_mm, offset = np.polyfit(landmarks[:, axis], seen, 1)
        # The scanner scale is unknown, so it is fitted; what is left is rounding to whole numbers.
        assert np.abs(seen - (per_mm * landmarks[:, axis] + offset)).max() < 0.6 + 0.1 * per_mm
        assert per_mm > 0.5


def test_labels_lie_where_the_truth_says(cohort: DeformedCohort):
    head = ellipsoid_head(4.0)
    assert head.labels is not None
    labels_dir = cohort.directory.parent / "labels"
    # Centres of structures that nothing is painted over.
    centres = {5: (-11, 4, 16), 6: (12, 6, 15), 7: (-24, 8, 6), 8: (25, 6, 5), 9: (0, -52, -38)}
    found = 0
    for subject in cohort.subjects:
        image = nib.load(labels_dir / f"{subject.scan}_dseg.nii.gz")
        assert np.allclose(image.affine, nib.load(cohort.directory / subject.file).affine)
        numbers = np.asarray(image.dataobj)
        for label, centre in centres.items():
            if cohort.in_view(subject.id, centre):
                voxel = np.rint(apply_affine(inverse(image.affine), cohort.map_point(subject.id, centre))).astype(int)
                assert numbers[tuple(voxel)] == label
                found += 1
    assert found > 30


def test_subjects_differ_in_grid_and_look(cohort: DeformedCohort):
    images = [nib.load(cohort.directory / subject.file) for subject in cohort.subjects]
    assert len({orientation(image.affine) for image in images}) >= 6
    assert len({image.shape for image in images}) >= 6
    for image, subject in zip(images, cohort.subjects, strict=True):
        assert image.shape == subject.shape
        assert np.allclose(image.affine, subject.affine, atol=1e-4)
        assert np.prod(image.shape) <= SMALL.max_voxels
        spacing = spacing_mm(image.affine)
        assert ((spacing > 3.99) & (spacing < 6.01)).all()
        assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
        assert np.allclose(image.get_qform(), image.get_sform(), atol=1e-3)
        assert image.get_data_dtype() == np.int16
    off_axis = [np.abs(image.affine[:3, :3] / spacing_mm(image.affine)).max(axis=0).min() for image in images]
    assert min(off_axis) < 0.9999  # oblique
    brightest = [float(np.percentile(np.asarray(image.dataobj), 99)) for image in images]
    assert max(brightest) > 1.3 * min(brightest)


def test_some_heads_are_cut_and_in_view_knows(cohort: DeformedCohort):
    landmarks = ellipsoid_head(4.0).landmarks_mm(60)
    seen = np.array([cohort.in_view(subject.id, landmarks) for subject in cohort.subjects])
    assert seen.any(axis=1).all()
    assert not seen.all(axis=1).all()
    assert seen.all(axis=1).any()


def test_participants_and_splits(cohort: DeformedCohort):
    with (cohort.directory / "participants.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["participant_id"] for row in rows] == [f"sub-{i:02d}" for i in range(1, 9)]
    assert [row["split"] for row in rows] == ["train"] * 6 + ["test"] * 2
    assert [subject.id for subject in cohort.split("test")] == ["sub-07", "sub-08"]


def test_truth_survives_saving(cohort: DeformedCohort):
    again = DeformedCohort.load(cohort.directory)
    points = np.random.default_rng(0).uniform(LOW_MM, HIGH_MM, (20, 3))
    assert [s.scan for s in again.subjects] == [s.scan for s in cohort.subjects]
    for subject in again.subjects:
        np.testing.assert_array_equal(again.map_point(subject.scan, points), cohort.map_point(subject.id, points))
        np.testing.assert_array_equal(again.in_view(subject.id, points), cohort.in_view(subject.id, points))


def test_one_point_keeps_its_shape(cohort: DeformedCohort):
    there = cohort.map_point("sub-01", (10.0, 20.0, -5.0))
    assert there.shape == (3,)
    np.testing.assert_allclose(cohort.map_back("sub-01", there), (10.0, 20.0, -5.0), atol=1e-5)
    with pytest.raises(NotFound):
        cohort.map_point("sub-99", there)


def test_the_seed_decides_every_byte(tmp_path: Path):
    head = ellipsoid_head(8.0)
    files = {}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        made = deformed_cohort(head, 2, seed, tmp_path / name, options=SMALL)
        files[name] = [(tmp_path / name / subject.file).read_bytes() for subject in made.subjects]
    assert files["a"] == files["b"]
    assert files["a"] != files["c"]


def test_a_template_can_be_a_file(tmp_path: Path):
    head = ellipsoid_head(8.0)
    nib.save(nib.Nifti1Image(head.values, head.affine), tmp_path / "head.nii.gz")
    from_file = deformed_cohort(tmp_path / "head.nii.gz", 1, 0, tmp_path / "a", options=SMALL)
    from_array = deformed_cohort(head, 1, 0, tmp_path / "b", options=SMALL)
    np.testing.assert_allclose(from_file.map_point("sub-01", LOW_MM), from_array.map_point("sub-01", LOW_MM))


@pytest.mark.parametrize("wrong", [{"n": 0}, {"options": CohortOptions(max_voxels=1000)}])
def test_what_cannot_be_made_is_a_usage_error(tmp_path: Path, wrong: dict[str, object]):
    with pytest.raises(UsageError):
        deformed_cohort(ellipsoid_head(8.0), **{"n": 1, "seed": 0, "out_dir": tmp_path, **wrong})


class TestAppearance:
    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 1000))
    def test_contrast_is_monotone_and_keeps_air_dark(self, seed: int):
        values = np.linspace(0, 1, 200, dtype=np.float32)
        curved = contrast_curve(values, np.random.default_rng(seed))
        assert curved[0] == 0
        assert curved[-1] == pytest.approx(1)
        assert (np.diff(curved) >= 0).all()

    def test_inverted_contrast_turns_tissue_over_only(self):
        curved = contrast_curve(np.array([0.0, 0.4, 0.9], np.float32), np.random.default_rng(0), inverted=True)
        assert curved[0] == 0
        assert curved[1] > curved[2] > 0

    def test_bias_is_smooth_and_bounded(self):
        field = bias_field((20, 30, 25), np.random.default_rng(0), 0.3)
        assert field.shape == (20, 30, 25)
        assert np.abs(field - 1).max() == pytest.approx(0.3, abs=1e-3)
        assert max(np.abs(np.diff(field, axis=axis)).max() for axis in range(3)) < 0.15

    def test_noise_is_positive_and_has_its_sd(self):
        noisy = magnitude_noise(np.full((30, 30, 30), 1.0, np.float32), np.random.default_rng(0), 0.02)
        assert noisy.std() == pytest.approx(0.02, rel=0.05)
        assert (magnitude_noise(np.zeros((9, 9, 9), np.float32), np.random.default_rng(0), 0.02) >= 0).all()


def test_landmarks_are_deep_apart_and_always_the_same():
    head = ellipsoid_head(4.0)
    points = head.landmarks_mm(40)
    np.testing.assert_array_equal(points, head.landmarks_mm(40))
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(40)
    assert apart.min() > 15
    ellipsoid = ((points / np.array([78.0, 98.0, 88.0])) ** 2).sum(axis=1)
    assert (ellipsoid < 1).all()
    with pytest.raises(UsageError):
        head.landmarks_mm(10, margin_mm=500)


def test_the_template_of_the_demo_is_a_brain_in_mni_space():
    pytest.importorskip("nilearn")
    template = mni152_template()
    assert template.values.shape == (197, 233, 189)
    assert orientation(template.affine) == "RAS"
    centre = apply_affine(template.affine, np.argwhere(template.foreground())).mean(axis=0)
    assert np.abs(centre - [0, -20, 8]).max() < 10
