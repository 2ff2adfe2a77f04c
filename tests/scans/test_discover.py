"""Which files are found, what they are called, where their labels lie."""

from pathlib import Path

import pytest

from isimed_index.errors import ScanRefused, UsageError
from isimed_index.scans.discover import (
    find_files,
    label_path,
    stem,
    subject_and_session,
    unique_ids,
    without_labels,
)


@pytest.fixture
def folder(tmp_path):
    names = ["b.nii", "a.nii.gz", "sub/c.NII.GZ", "notes.txt", "a.json", "._a.nii.gz", ".git/d.nii", "s.zarr/e.nii"]
    for name in names:
        path = tmp_path / "cohort" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "cohort"


def test_folders_are_searched_for_images_in_sorted_order(folder):
    assert find_files([folder]) == [folder / "a.nii.gz", folder / "b.nii", folder / "sub" / "c.NII.GZ"]


def test_files_are_taken_as_given_and_only_once(folder):
    given = [folder / "notes.txt", folder / "sub" / ".." / "b.nii", folder]
    assert [path.name for path in find_files(given)] == ["notes.txt", "b.nii", "a.nii.gz", "c.NII.GZ"]


def test_a_folder_without_images_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScanRefused, match="no image file in folder empty") as caught:
        find_files([tmp_path / "empty"])
    assert str(tmp_path) not in caught.value.line()


def test_a_path_that_does_not_exist_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.nii") as caught:
        find_files([tmp_path / "gone.nii"])
    assert str(tmp_path) not in caught.value.line()


@pytest.mark.parametrize(
    ("name", "expected"), [("X.nii.gz", "X"), ("X.NII", "X"), ("a.b.nii.gz", "a.b"), ("notes.txt", "notes"), ("y", "y")]
)
def test_stem(tmp_path, name, expected):
    assert stem(tmp_path / name) == expected


def test_ids_are_stems_while_they_are_unique(tmp_path):
    assert unique_ids([tmp_path / "a.nii", tmp_path / "b.nii.gz"], []) == ["a", "b"]


def test_clashing_ids_take_their_folder_and_then_a_number(tmp_path):
    paths = [tmp_path / place / "t1.nii" for place in ("x/one", "x/two", "y/two")]
    assert unique_ids(paths, []) == ["one_t1", "two_t1", "two_t1-2"]
    assert unique_ids(paths[:1], ["t1"]) == ["one_t1"]
    assert unique_ids(paths[:1], ["t1", "one_t1", "one_t1-2"]) == ["one_t1-3"]


def test_label_paths_follow_the_pattern(tmp_path):
    image = tmp_path / "t1" / "X_T1.nii.gz"
    assert label_path(image, "{stem}_seg.nii.gz") == tmp_path / "t1" / "X_T1_seg.nii.gz"
    assert label_path(image, "../seg/{stem}_DLMUSE.nii.gz") == tmp_path / "seg" / "X_T1_DLMUSE.nii.gz"
    with pytest.raises(UsageError, match="stem"):
        label_path(image, "seg.nii.gz")


def test_label_maps_beside_their_images_are_no_images(tmp_path):
    images = [tmp_path / name for name in ("a.nii.gz", "a_seg.nii.gz", "b_seg.nii.gz")]
    assert without_labels(images, "{stem}_seg.nii.gz") == [images[0], images[2]]


@pytest.mark.parametrize(
    ("name", "regex", "expected"),
    [
        ("sub-01_ses-2_T1w", None, ("sub-01", "ses-2")),
        ("sub-01_T1w", None, ("sub-01", None)),
        ("IXI012-HH-1211_T1", None, (None, None)),
        ("mysub-1_T1w", None, (None, None)),
        ("IXI012-HH-1211_T1", r"(IXI\d+)", ("IXI012", None)),
        ("p7_v2", r"(?P<subject>p\d)_(?P<session>v\d)", ("p7", "v2")),
        ("v2_p7", r"(?P<session>v\d)_(?P<subject>p\d)", ("p7", "v2")),
        ("other", r"(IXI\d+)", (None, None)),
    ],
)
def test_subject_and_session_of_a_stem(tmp_path, name, regex, expected):
    assert subject_and_session(tmp_path / f"{name}.nii.gz", tmp_path, regex) == expected
    assert subject_and_session(tmp_path / f"{name}.nii.gz", None, regex) == expected


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("sub-00/T1.nii.gz", ("sub-00", None)),
        ("sub-00/ses-b/anat/T1.nii.gz", ("sub-00", "ses-b")),
        ("ses-b/sub-00/T1.nii.gz", ("sub-00", "ses-b")),
        ("sub-00_ses-a/sub-01_T1.nii.gz", ("sub-01", "ses-a")),  # the stem comes before any folder
        ("sub-00/sub-01/T1.nii.gz", ("sub-01", None)),  # and the nearest folder before the others
        ("mysub-1/T1.nii.gz", (None, None)),
    ],
)
@pytest.mark.parametrize("given", [".", "file", "parent"])
def test_bids_entities_of_folders(tmp_path, file, expected, given):
    """However the file was asked for: by its cohort's folder, by name, or by its own folder."""
    path = tmp_path / file
    folder = {".": tmp_path, "file": None, "parent": path.parent}[given]
    assert subject_and_session(path, folder) == expected


def test_folders_are_those_of_a_link_and_not_of_its_target(tmp_path, monkeypatch):
    (tmp_path / "sub-99").mkdir()
    (tmp_path / "sub-99" / "blob").touch()
    (tmp_path / "sub-00").mkdir()
    (tmp_path / "sub-00" / "T1.nii.gz").symlink_to(tmp_path / "sub-99" / "blob")
    monkeypatch.chdir(tmp_path / "sub-00")
    assert subject_and_session(Path("T1.nii.gz")) == ("sub-00", None)
    assert subject_and_session(Path("../sub-00/T1.nii.gz"), Path("../sub-00")) == ("sub-00", None)
    assert unique_ids([Path("T1.nii.gz")], ["T1"]) == ["sub-00_T1"]


@pytest.mark.parametrize(
    ("file", "regex", "expected"),
    [
        ("P012/T1.nii.gz", r"(P\d+)", ("P012", None)),
        ("P012/anat/P7_T1.nii.gz", r"(P\d+)", ("P7", None)),  # the stem comes before the folders
        ("P012/v2/T1.nii.gz", r"^(?P<subject>\w+)/(?P<session>v\d)/", ("P012", "v2")),
        ("P012/T1.nii.gz", r"^(\w+)/(T1)$", ("P012", None)),
        ("sub-00/T1.nii.gz", r"(P\d+)", (None, None)),  # where the expression finds nothing, nothing is guessed
        ("P012/T1.nii.gz", r"(?:T1)?(P\d+)?$", ("P012", None)),  # an empty group is no subject
    ],
)
def test_an_expression_that_does_not_match_the_stem_is_tried_on_folders(tmp_path, file, regex, expected):
    assert subject_and_session(tmp_path / file, tmp_path, regex) == expected


def test_an_expression_sees_the_folder_that_was_given_and_those_above(tmp_path):
    path = tmp_path / "P012" / "anat" / "T1.nii.gz"
    for folder in (path.parent, path.parent.parent, None):
        assert subject_and_session(path, folder, r"(P\d+)") == ("P012", None)


@pytest.mark.parametrize(("regex", "says"), [("(", "malformed"), (r"IXI\d+", "no group")])
def test_malformed_expressions_are_usage_errors(tmp_path, regex, says):
    with pytest.raises(UsageError, match=says):
        subject_and_session(tmp_path / "IXI012.nii", None, regex)
