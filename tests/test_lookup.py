"""A point of one scan in all others: the geometry is right in every axis order, pose and coordinate space."""

from __future__ import annotations

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cohorts import COPIES, CROPPED, Cohort, add_random_encoder, head, tiny_scan, write_nifti

import isimed_index as isi
from isimed_index.api import Store
from isimed_index.errors import NotFound, OutsideScan, SqlRefused, UsageError
from isimed_index.lookup import Lookup, between, follow
from isimed_index.space import apply_affine, inverse, orientation

POINTS = ([10.0, 20.0, 30.0], [-40.0, -30.0, 10.0], [0.0, 60.0, -8.0])
BY_SCAN = {copy.stem: copy for copy in (*COPIES, CROPPED)}
ASKED = COPIES[0].stem


@pytest.fixture(scope="module")
def store(cohort: Cohort) -> Store:
    return isi.open(cohort.store, mode="r")


def places(matches) -> dict[str, np.ndarray]:
    return {match.scan: np.array(match.xyz_mm) for match in matches}


@pytest.mark.parametrize("source", COPIES, ids=lambda copy: copy.codes)
def test_the_same_anatomy_is_found_in_every_axis_order_and_pose(store: Store, source):
    for point in POINTS:
        found = places(store.lookup(source.moved(point), source.stem, same_subject="include"))
        assert set(found) == set(BY_SCAN) - {source.stem}
        for scan, xyz_mm in found.items():
            np.testing.assert_allclose(xyz_mm, BY_SCAN[scan].moved(point), atol=1.0)


def unencodable(*_: object, **__: object) -> None:
    raise AssertionError("the file was encoded, though its content is stored")


@pytest.mark.parametrize("same_subject", ["include", "exclude", "only"])
def test_a_file_gives_the_answer_of_its_stored_copy(
    store: Store, cohort: Cohort, same_subject: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("isimed_index.encoders.runtime.load_encoder", unencodable)
    for copy in (COPIES[0], COPIES[4]):
        stored = store.lookup(copy.moved(POINTS[0]), copy.stem, same_subject=same_subject)
        asked = store.lookup(copy.moved(POINTS[0]), cohort.file(copy), same_subject=same_subject)
        assert asked.columns == stored.columns
        assert copy.stem not in asked.columns["scan"]
        assert asked.source == stored.source == copy.stem


def test_a_copy_in_another_axis_order_is_recognised_and_its_voxels_are_its_own(
    store: Store, cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("isimed_index.encoders.runtime.load_encoder", unencodable)
    image = nib.load(cohort.file(COPIES[0]))
    turned = write_nifti(tmp_path / "turned.nii.gz", np.asanyarray(image.dataobj), image.affine, "PIR")
    voxel = apply_affine(inverse(nib.load(turned).affine), POINTS[0])
    asked = store.lookup(voxel, turned, space="voxel")
    assert asked.source == ASKED
    assert places(asked).keys() == places(store.lookup(POINTS[0], ASKED)).keys()
    for scan, xyz_mm in places(store.lookup(POINTS[0], ASKED)).items():
        np.testing.assert_allclose(places(asked)[scan], xyz_mm, atol=1e-3)


def test_a_stored_copy_that_is_not_encoded_lends_its_subject(cohort: Cohort, tmp_path: Path):
    store = isi.create(tmp_path / "store")
    store.add([cohort.file(copy) for copy in COPIES])
    add_random_encoder(store.path)
    store.index(where=f"scan <> '{ASKED}'")
    asked = store.lookup(POINTS[0], cohort.file(COPIES[0]), same_subject="only")
    assert (asked.source, asked.columns["scan"]) == (ASKED, [COPIES[1].stem])
    np.testing.assert_allclose(asked[0].xyz_mm, COPIES[1].moved(POINTS[0]), atol=1.0)


@pytest.mark.parametrize("ask", ["lookup", "search_patches"])
def test_an_unknown_file_has_no_subject(store: Store, cohort: Cohort, ask: str):
    assert store.lookup([11.0, 0.0, 0.0], cohort.outside).source is None
    with pytest.raises(UsageError, match="subject") as caught:
        getattr(store, ask)([11.0, 0.0, 0.0], cohort.outside, same_subject="only")
    assert caught.value.next_step


def test_a_file_that_was_never_stored(store: Store, cohort: Cohort):
    affine = nib.load(cohort.outside).affine
    assert orientation(affine) == "RPI"
    stored = nib.load(cohort.file(COPIES[0]))
    voxel = nib.affines.apply_affine(np.linalg.inv(stored.affine), POINTS[0])
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RPI"), nib.orientations.axcodes2ornt(COPIES[0].codes)
    )
    own_voxel = nib.affines.apply_affine(nib.orientations.inv_ornt_aff(turn, nib.load(cohort.outside).shape), voxel)
    found = places(store.lookup(own_voxel, cohort.outside, space="voxel"))
    for scan, xyz_mm in found.items():
        np.testing.assert_allclose(xyz_mm, BY_SCAN[scan].moved(POINTS[0]), atol=1.0)


def test_answers_agree_in_every_space_and_voxels_are_the_files_own(store: Store, cohort: Cohort):
    answers = {space: store.lookup(POINTS[0], ASKED) for space in ("ras",)}
    point = {
        "ras": POINTS[0],
        "lps": [-POINTS[0][0], -POINTS[0][1], POINTS[0][2]],
        "voxel": cohort.voxel_of(COPIES[0], POINTS[0]),
        "canonical": apply_affine(store._lookup(None).frame.charts[ASKED].affine, POINTS[0]),
    }
    answers |= {space: store.lookup(point[space], ASKED, space=space) for space in ("lps", "voxel", "canonical")}
    charts = store._lookup(None).frame.charts
    for number, match in enumerate(answers["ras"]):
        xyz_mm = np.array(match.xyz_mm)
        own = {space: answers[space][number] for space in ("lps", "voxel", "canonical")}
        for other in own.values():
            assert other.scan == match.scan
            np.testing.assert_allclose(other.xyz_mm, xyz_mm, atol=1e-6)
            np.testing.assert_allclose(other.voxel, match.voxel, atol=0.011)
        in_file = cohort.voxel_of(BY_SCAN[match.scan], xyz_mm)
        np.testing.assert_allclose(match.voxel, in_file, atol=0.006)  # rounded to two decimals
        np.testing.assert_allclose([own["voxel"].x, own["voxel"].y, own["voxel"].z], in_file, atol=1e-6)
        np.testing.assert_allclose([own["lps"].x, own["lps"].y, own["lps"].z], xyz_mm * [-1, -1, 1], atol=1e-6)
        np.testing.assert_allclose(
            [own["canonical"].x, own["canonical"].y, own["canonical"].z],
            apply_affine(charts[match.scan].affine, xyz_mm),
            atol=1e-6,
        )
    assert {"x", "y", "z", "space"}.isdisjoint(answers["ras"].columns)
    for space in ("lps", "voxel", "canonical"):
        assert list(answers[space].columns)[:7] == ["scan", "subject", "x", "y", "z", "space", "x_mm"]
        assert set(answers[space].columns["space"]) == {space}


def test_the_value_at_the_matched_voxel_of_each_file_is_the_same_anatomy(store: Store, cohort: Cohort):
    template = head()
    voxel = np.array([20, 30, 25])
    point = apply_affine(template.affine, voxel)
    expected = nib.load(cohort.file(COPIES[0])).get_fdata()[tuple(voxel)]
    for match in store.lookup(point, ASKED, same_subject="include"):
        values = nib.load(cohort.file(BY_SCAN[match.scan])).get_fdata()
        assert values[tuple(np.rint(match.voxel).astype(int))] == expected


def test_same_subject(store: Store):
    other = COPIES[1].stem
    asked = {
        choice: store.lookup(POINTS[0], ASKED, same_subject=choice).columns["scan"]
        for choice in ("include", "exclude", "only")
    }
    assert asked["only"] == [other]
    assert set(asked["include"]) - set(asked["exclude"]) == {other}
    assert other not in asked["exclude"]
    assert ASKED not in asked["include"]


def test_where_k_and_within(store: Store):
    assert set(store.lookup(POINTS[0], ASKED, where="site = 'site1' AND age > 50").columns["scan"]) == {CROPPED.stem}
    assert len(store.lookup(POINTS[0], ASKED, where="false")) == 0
    assert len(store.lookup(POINTS[0], ASKED, k=2)) == 2
    every = store.lookup(POINTS[0], ASKED)
    assert len(every) == 4
    assert every.columns["distance"] == sorted(every.columns["distance"])
    # Copies lie where their charts say up to a little; nothing lies within a micrometre of nowhere.
    assert len(store.lookup(POINTS[0], ASKED, within_mm=50.0)) == 4
    charts = store._lookup(None).frame.charts
    away = {
        match.scan: np.linalg.norm(
            apply_affine(charts[match.scan].affine, match.xyz_mm) - apply_affine(charts[ASKED].affine, POINTS[0])
        )
        for match in every
    }
    cut = (sorted(away.values())[1] + sorted(away.values())[2]) / 2
    kept = store.lookup(POINTS[0], ASKED, within_mm=cut).columns["scan"]
    assert set(kept) == {scan for scan, mm in away.items() if mm <= cut}
    with pytest.raises(SqlRefused):
        store.lookup(POINTS[0], ASKED, where="no_such_column = 1")


@pytest.mark.parametrize("wrong", [{"k": 0}, {"within_mm": 0.0}, {"within_mm": float("nan")}])
def test_a_wrong_question_is_refused(store: Store, wrong):
    with pytest.raises(UsageError):
        store.lookup(POINTS[0], ASKED, **wrong)


def test_cycle_error_is_small_for_copies_and_absent_unless_asked(store: Store):
    assert max(store.lookup(POINTS[0], ASKED, cycle=True).columns["cycle_mm"]) < 0.5
    assert set(store.lookup(POINTS[0], ASKED).columns["cycle_mm"]) == {None}


def test_what_was_cropped_away_is_not_in_view_and_comes_last(store: Store):
    low = [0.0, -26.0, -60.0]  # brain stem: below the cut of the cropped copy
    matches = store.lookup(low, ASKED, same_subject="include")
    seen = dict(zip(matches.columns["scan"], matches.columns["in_view"], strict=True))
    assert seen == {scan: scan != CROPPED.stem for scan in seen}
    assert matches[-1].scan == CROPPED.stem
    assert matches[-1].label is None
    assert all(store.lookup(POINTS[0], ASKED).columns["in_view"])


def test_the_label_at_the_match(store: Store):
    def labels(point) -> set[str | None]:
        return set(store.lookup(point, ASKED).columns["label"])

    assert labels([10.0, -10.0, 40.0]) == {"white matter"}
    assert labels([25.0, 6.0, 5.0]) == {"label 8"}  # a label without a name


def test_points_outside_of_the_scan(store: Store):
    with pytest.raises(OutsideScan, match=r"outside the scan.*-8"):
        store.lookup([500.0, 0.0, 0.0], ASKED)
    with pytest.raises(OutsideScan):
        store.lookup([-1.0, 5.0, 5.0], ASKED, space="voxel")
    size = np.array(head().values.shape)
    spans = "spans (-0.5, -0.5, -0.5) to (" + ", ".join(f"{n:.1f}" for n in size - 0.5) + ")"
    said = f"the point (-1.0, 5.0, 5.0) (voxel) lies outside the scan, which {spans}; in RAS mm it is"
    with pytest.raises(OutsideScan, match=re.escape(said)):
        store.lookup([-1.0, 5.0, 5.0], ASKED, space="voxel")
    with pytest.raises(OutsideScan, match=r"\(500.0, 0.0, 0.0\) \(LPS mm\).*in RAS mm it is \(-500.0, 0.0, 0.0\)"):
        store.lookup([500.0, 0.0, 0.0], ASKED, space="lps")
    with pytest.raises(OutsideScan, match=r"\(canonical mm\).*in RAS mm"):
        store.lookup([900.0, 0.0, 0.0], ASKED, space="canonical")
    last = np.array(head().values.shape) - 1
    assert len(store.lookup(last + 0.4, ASKED, space="voxel")) == 4  # the outer half of the last voxel
    with pytest.raises(OutsideScan):
        store.lookup(last + 0.6, ASKED, space="voxel")


def test_unknown_scans_and_files(store: Store, tmp_path: Path):
    with pytest.raises(NotFound, match="did you mean"):
        store.lookup(POINTS[0], ASKED[:-1])
    for missing in (tmp_path / "gone.nii.gz", str(tmp_path / "gone.nii.gz"), tmp_path / "gone"):
        with pytest.raises(UsageError, match=r"no file gone") as caught:
            store.lookup(POINTS[0], missing)
        assert str(tmp_path) not in caught.value.line()


class TestMatches:
    def test_rows_are_views(self, store: Store):
        matches = store.lookup(POINTS[0], ASKED)
        assert matches[-1].scan == list(matches)[-1].scan == matches.columns["scan"][-1]
        assert "scan=" in repr(matches[0])
        with pytest.raises(IndexError):
            matches[len(matches)]
        with pytest.raises(AttributeError):
            _ = matches[0].no_such_column

    @pytest.mark.parametrize("where", [None, "false"])
    def test_arrow_and_pandas(self, store: Store, where):
        matches = store.lookup(POINTS[0], ASKED, where=where, space="voxel")
        table = matches.to_arrow()
        assert table.num_rows == len(matches) == len(matches.to_pandas())
        types = {field.name: str(field.type) for field in table.schema}
        assert types["x_mm"] == types["error_mm"] == types["cycle_mm"] == types["x"] == "double"
        assert types["voxel"] == "fixed_size_list<item: double>[3]"
        assert (types["in_view"], types["label"], types["space"]) == ("bool", "string", "string")


class TestPatches:
    def test_the_nearest_patch_is_the_same_patch_of_a_copy(self, store: Store):
        lookup = Lookup(store.snapshot)
        patches = lookup.segments[ASKED].patches()
        number = patches.num_rows // 2
        point = [patches.column(f"{axis}_mm")[number].as_py() for axis in "xyz"]
        matches = store.search_patches(point, ASKED, k=3, where=f"scan IN ('{COPIES[2].stem}', '{COPIES[3].stem}')")
        assert {match.scan for match in list(matches)[:2]} == {COPIES[2].stem, COPIES[3].stem}
        for match in list(matches)[:2]:
            np.testing.assert_allclose(match.xyz_mm, BY_SCAN[match.scan].moved(point), atol=0.01)
            assert match.distance < 0.01
        assert matches.columns["distance"] == sorted(matches.columns["distance"])
        rows = store.sql("SELECT patch, scan, x_mm FROM patches").to_pylist()
        by_patch = {row["patch"]: row for row in rows}
        for match in matches:
            assert by_patch[match.patch]["scan"] == match.scan
            assert by_patch[match.patch]["x_mm"] == pytest.approx(match.x_mm)

    def test_exact_and_index_agree(self, store: Store):
        asked = {"point": POINTS[1], "scan": ASKED, "k": 20}
        assert store.search_patches(**asked, exact=True).columns == store.search_patches(**asked).columns

    def test_filters(self, store: Store):
        near = store.search_patches(POINTS[1], ASKED, k=500, within_mm=30.0)
        charts = store._lookup(None).frame.charts
        middle = apply_affine(charts[ASKED].affine, POINTS[1])
        away = [np.linalg.norm(apply_affine(charts[m.scan].affine, m.xyz_mm) - middle) for m in near]
        assert 0 < len(near) < 500
        assert max(away) <= 30.0
        only = store.search_patches(POINTS[1], ASKED, same_subject="only", k=5)
        assert set(only.columns["scan"]) == {COPIES[1].stem}
        assert len(store.search_patches(POINTS[1], ASKED, where="false")) == 0

    def test_of_scans_that_may_not_answer_no_centre_is_read(self, cohort: Cohort):
        store = isi.open(cohort.store, mode="r")
        asked = f"scan = '{COPIES[2].stem}'"
        assert len(store.search_patches(POINTS[1], ASKED, where=asked, within_mm=30.0)) > 0
        assert store._lookup(None).neighbours.places._read.sum() == 1

    def test_spaces(self, store: Store, cohort: Cohort):
        for match in store.search_patches(cohort.voxel_of(COPIES[0], POINTS[1]), ASKED, space="voxel", k=5):
            in_file = cohort.voxel_of(BY_SCAN[match.scan], match.xyz_mm)
            np.testing.assert_allclose([match.x, match.y, match.z], in_file, atol=1e-6)
            assert match.space == "voxel"

    def test_no_cycle(self, store: Store):
        with pytest.raises(UsageError):
            store.search_patches(POINTS[1], ASKED, cycle=True)


def test_a_consensus_far_from_the_charts_is_not_believed(store: Store, monkeypatch: pytest.MonkeyPatch):
    lookup = Lookup(store.snapshot)
    a, b = COPIES[0].stem, COPIES[3].stem
    far = np.eye(4)
    far[:3, 3] = 500.0
    monkeypatch.setattr("isimed_index.lookup.local_affine", lambda *_, **__: (far, 1.0))
    charts = lookup.frame.charts
    found, residual = follow(np.array(POINTS[0]), lookup.lattice(a), charts[a], lookup.lattice(b), charts[b])
    np.testing.assert_allclose(found, apply_affine(between(charts[a], charts[b]), POINTS[0]))
    assert residual == np.inf
    np.testing.assert_allclose(between(charts[a], charts[b]), inverse(between(charts[b], charts[a])), atol=1e-9)


def test_before_anything_is_indexed(tmp_path: Path):
    store = isi.create(tmp_path / "s")
    with pytest.raises(NotFound):
        store.lookup([0, 0, 0], "x")
    tiny_scan(tmp_path / "a.nii")
    store.add(tmp_path / "a.nii")
    add_random_encoder(store.path)
    store.refresh()
    with pytest.raises(NotFound, match="not encoded") as caught:
        store.lookup([0, 0, 0], "a")
    assert "isimed index" in caught.value.next_step
    with pytest.raises(NotFound, match="no canonical frame"):
        store.lookup([0, 0, 0], tmp_path / "a.nii")


def test_a_file_without_foreground_says_so(store: Store, tmp_path: Path):
    voxels = np.zeros((30, 30, 30), np.int16)
    voxels[14:16, 14:16, 14:16] = 500
    path = write_nifti(tmp_path / "empty.nii.gz", voxels, np.diag([4.0, 4.0, 4.0, 1.0]))
    with pytest.raises(NotFound, match="no foreground"):
        store.lookup([60.0, 60.0, 60.0], path)


def test_voxels_are_those_of_the_file_also_where_it_was_resampled(tmp_path: Path):
    template = head()
    affine = np.diag([-4.0, 4.0, 4.0, 1.0])  # LAS
    affine[:3, 3] = apply_affine(template.affine, (np.array(template.values.shape) - 1) * [1, 0, 0])
    for name in ("a", "b"):
        write_nifti(tmp_path / f"{name}.nii", template.values[::-1].astype(np.float32), affine)
    store = isi.create(tmp_path / "store")
    store.add([tmp_path / "a.nii", tmp_path / "b.nii"], spacing_mm=5.0)
    assert store.scans().num_rows == 1  # equal content is one scan: make the second differ
    values = template.values[::-1].astype(np.float32)
    values[0, 0, 0] += 1
    write_nifti(tmp_path / "b.nii", values, affine)
    store.add(tmp_path / "b.nii", spacing_mm=5.0)
    add_random_encoder(store.path)
    store.index()
    file = nib.load(tmp_path / "a.nii")
    voxel = np.array(file.shape) // 2 + [3, -2, 1]
    at = nib.affines.apply_affine(file.affine, voxel)
    asked = store.lookup(tuple(map(float, voxel)), "a", space="voxel", same_subject="include")
    as_ras = store.lookup(tuple(map(float, at)), "a", space="ras", same_subject="include")
    np.testing.assert_allclose(asked[0].xyz_mm, as_ras[0].xyz_mm, atol=1e-6)
    np.testing.assert_allclose(nib.affines.apply_affine(file.affine, asked[0].voxel), asked[0].xyz_mm, atol=0.05)
    # Its file is recognised although other voxels are stored; those of the file are meant.
    from_file = store.lookup(tuple(map(float, voxel)), tmp_path / "a.nii", space="voxel", same_subject="include")
    assert from_file.source == "a"
    assert from_file.columns == asked.columns
