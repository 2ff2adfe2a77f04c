"""What each reader makes of a tree, good and broken; voxels are not read here."""

import json
from pathlib import Path

import pytest
from cohorts import tiny_scan
from data_sets import (
    BRATS_2021,
    BRATS_2023,
    PATIENT,
    autopet,
    bids,
    blocks,
    brats,
    msd,
    totalsegmentator,
    write_json,
    write_labels,
    write_text,
)

from isimed_index.errors import UsageError
from isimed_index.scans.layouts.found import Found, Image, with_one_type
from isimed_index.scans.layouts.recognise import LAYOUTS, roots
from isimed_index.scans.layouts.totalsegmentator_classes import CLASS_LISTS


def read(root: Path, volume: int | None = None) -> Found:
    ((found_root, layout),) = roots(root, "auto")
    return layout.read(found_root, volume)


def by_name(found: Found) -> dict[str, Image]:
    assert len({image.name for image in found.images}) == len(found.images)
    return {image.name: image for image in found.images}


def refusals(found: Found) -> dict[str, str]:
    return {name: error.message for name, error in found.refused}


ALL = {
    "bids": bids,
    "msd": msd,
    "brats": lambda root: brats(root, "BraTS2021_00000", BRATS_2021, "_", (1, 2, 4)).parent,
    "autopet": autopet,
    "totalsegmentator": lambda root: totalsegmentator(root, {"liver": blocks(1)}),
}


class TestRecognise:
    @pytest.mark.parametrize("name", ALL)
    @pytest.mark.parametrize("around", [".", "archive", "downloads/archive"])
    def test_a_root_is_known_with_folders_around_it(self, tmp_path, name, around):
        root = ALL[name](tmp_path / around)
        ((found, layout),) = roots(tmp_path, "auto")
        assert (found.resolve(), layout.name) == (root.resolve(), name)
        assert [found for found, _ in roots(tmp_path, name)] == [found]
        assert roots(tmp_path, "files") == []

    def test_a_folder_may_hold_several(self, tmp_path):
        for name, write in ALL.items():
            write(tmp_path / name)
        assert {(root.name, layout.name) for root, layout in roots(tmp_path, "auto")} == {(name, name) for name in ALL}

    @pytest.mark.parametrize("name", ALL)
    def test_a_layout_that_is_not_there_is_a_usage_error(self, tmp_path, name):
        tiny_scan(tmp_path / "plain" / "a.nii")
        with pytest.raises(UsageError, match="plain is not laid out as") as caught:
            roots(tmp_path / "plain", name)
        assert str(tmp_path) not in caught.value.line()

    def test_plain_folders_are_none(self, tmp_path):
        tiny_scan(tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
        write_json(tmp_path / "dataset.json", {"labels": {"a": 1}, "channel_names": {"0": "CT"}})  # nnU-Net's
        (tmp_path / "imagesTr").mkdir()
        (tmp_path / "s0000").mkdir()
        (tmp_path / "PETCT_0011f3deaf").mkdir()
        write_text(tmp_path / "dataset_description.json", "{broken")
        assert roots(tmp_path, "auto") == []

    def test_a_case_or_patient_alone_is_a_root(self, tmp_path):
        autopet(tmp_path / "pet")
        totalsegmentator(tmp_path / "ts", {})
        case = brats(tmp_path, "BraTS-GLI-00005-001", BRATS_2023, "-", None)
        for folder in (tmp_path / "pet" / PATIENT, tmp_path / "ts" / "s0004", case):
            ((root, layout),) = roots(folder, "auto")
            assert root == folder
            assert {image.subject for image in layout.read(root, None).images} in (
                {PATIENT},
                {"s0004"},
                {"BraTS-GLI-00005"},
            )

    def test_names_of_layouts_are_told_apart(self):
        assert sorted(layout.name for layout in LAYOUTS) == sorted(ALL)


class TestBids:
    def test_subjects_sessions_tables_and_side_cars(self, tmp_path):
        found = read(bids(tmp_path))
        images = by_name(found)
        assert list(images) == ["sub-01_ses-1_T1w", "sub-01_ses-2_T1w", "sub-02_T1w", "sub-02_T2w"]
        first = images["sub-01_ses-1_T1w"]
        assert (first.subject, first.session, first.modality) == ("sub-01", "ses-1", "MR")
        assert first.facts == {
            "sequence": "T1w",
            "field_strength_t": 3.0,
            "echo_time_ms": pytest.approx(2.98),  # the nearer side-car says, in seconds
            "repetition_time_ms": 2300.0,
            "manufacturer": "Siemens",
            "age": 34.0,
            "sex": "F",
            "group": "control",
            "weight": 70.5,
            "quality": "good",
        }
        assert images["sub-01_ses-2_T1w"].facts["echo_time_ms"] == 4.0  # inherited from the root
        assert "echo_time_ms" not in images["sub-02_T2w"].facts  # of another suffix
        assert images["sub-02_T1w"].person == {"age": 89.0, "sex": "M", "group": "patient"}
        assert found.refused == []

    def test_private_columns_and_series_are_left_out_and_said_to_be(self, tmp_path):
        notes = "\n".join(read(bids(tmp_path)).notes)
        assert "participants.tsv that may tell who or when were left out: date_of_birth, visit" in notes
        assert "sessions.tsv that may tell who or when were left out: acq_time" in notes
        assert "(1 in func)" in notes
        assert len(read(tmp_path, volume=0).images) == 5

    def test_label_maps_are_found_by_entities_and_grid(self, tmp_path):
        images = by_name(read(bids(tmp_path)))
        segmented = images["sub-02_T1w"].labels
        assert segmented is not None
        assert [path.name for path in segmented.files] == ["sub-02_space-orig_dseg.nii.gz"]
        assert segmented.names == {1: "Gray Matter", 2: "White Matter"}
        assert segmented.values == ()
        masked = images["sub-01_ses-1_T1w"].labels
        assert masked is not None
        assert (masked.names, masked.values) == ({1: "lesion"}, (1,))
        assert images["sub-02_T2w"].labels is None  # the same entities on another grid
        assert images["sub-01_ses-2_T1w"].labels is None  # of another session

    def test_the_nearest_table_names_the_labels(self, tmp_path):
        anat = bids(tmp_path) / "derivatives" / "seg" / "sub-02" / "anat"
        write_text(anat / "sub-02_space-orig_dseg.tsv", "index\tname", "1\tleft", "2\tright")
        labels = by_name(read(tmp_path))["sub-02_T1w"].labels
        assert labels is not None
        assert labels.names == {1: "left", 2: "right"}

    def test_label_maps_of_other_spaces_and_grids_are_left_out_and_counted(self, tmp_path):
        anat = bids(tmp_path) / "derivatives" / "seg" / "sub-02" / "anat"
        (anat / "sub-02_space-orig_dseg.nii.gz").unlink()
        write_labels(anat / "sub-02_space-MNI152NLin6Asym_dseg.nii.gz", blocks(1))
        write_labels(anat / "sub-02_dseg.nii.gz", blocks(1)[:-1])
        found = read(tmp_path)
        assert by_name(found)["sub-02_T1w"].labels is None
        assert "1 label maps are in a space that is not their image's and were left out: " in "\n".join(found.notes)
        assert (
            "1 label maps lie on another grid than the images of their name and were left out: sub-02_dseg.nii.gz"
            in found.notes
        )

    def test_of_several_segmentations_one_is_taken_and_said(self, tmp_path):
        write_labels(bids(tmp_path) / "sub-02" / "anat" / "sub-02_dseg.nii.gz", blocks(3))
        found = read(tmp_path)
        labels = by_name(found)["sub-02_T1w"].labels
        assert labels is not None
        assert labels.files[0].parent.name == "anat"
        assert labels.files[0].name == "sub-02_dseg.nii.gz"
        assert any("1 images have more than one label map" in note for note in found.notes)

    @pytest.mark.parametrize(
        ("masks", "names"),
        [
            (("label-kidney_desc-left_mask", "label-kidney_desc-right_mask"), {1: "kidney left", 2: "kidney right"}),
            (("hemi-L_label-amygdala_mask", "hemi-R_label-amygdala_mask"), {1: "amygdala L", 2: "amygdala R"}),
            (("hemi-R_mask", "mask", "space-orig_desc-brain_mask"), {1: "R", 2: "brain", 3: "mask"}),
            (("label-lesion_mask", "label-lesion_desc-old_roi"), {1: "lesion", 2: "lesion old"}),
        ],
    )
    def test_a_mask_is_named_by_all_that_tells_it_from_others(self, tmp_path, masks, names):
        found = read(self.masked(tmp_path, *masks))
        labels = by_name(found)["sub-06_T1w"].labels
        assert labels is not None
        assert labels.names == names
        stems = [path.name.removeprefix("sub-06_").removesuffix(".nii.gz") for path in labels.files]
        assert sorted(stems) == sorted(masks)
        for value, stem in zip(labels.values, stems, strict=True):
            assert all(f"-{word}" in stem for word in names[value].split() if word != "mask")
        assert not any("sub-06" in note for note in found.notes)

    @pytest.mark.parametrize(
        "masks",
        [
            ("label-kidney_space-orig_mask", "label-kidney_mask"),
            ("label-left_mask", "desc-left_mask", "label-liver_mask"),  # two structures, of which one name is made
            ("label-kidney_mask", "label-kidney_roi"),
        ],
    )
    def test_two_masks_of_one_structure_are_no_labels_and_named(self, tmp_path, masks):
        found = read(self.masked(tmp_path, *masks))
        assert by_name(found)["sub-06_T1w"].labels is None
        (note,) = (note for note in found.notes if "sub-06" in note)
        assert note.startswith("1 images have several masks of one structure and got no labels: sub-06_T1w.nii.gz (")
        assert all(f"sub-06_{mask}.nii.gz" in note for mask in masks if "liver" not in mask)
        assert "liver" not in note

    def test_what_is_shared_with_the_image_is_not_in_the_name_of_a_mask(self, tmp_path):
        root = self.masked(tmp_path, "desc-pre_label-kidney_mask", image="sub-06_desc-pre_T1w")
        assert by_name(read(root))["sub-06_desc-pre_T1w"].labels.names == {1: "kidney"}
        root = self.masked(tmp_path / "other", "desc-brain_mask", image="sub-06_desc-brain_T1w")
        assert by_name(read(root))["sub-06_desc-brain_T1w"].labels.names == {1: "brain"}

    def test_label_maps_of_one_half_of_the_brain_are_not_those_of_the_image(self, tmp_path):
        found = read(self.masked(tmp_path, "hemi-L_dseg", "hemi-R_dseg"))
        assert by_name(found)["sub-06_T1w"].labels is None
        assert (
            "2 label maps are of one hemisphere, and no image of their name is of that one, and were left out: "
            "sub-06_hemi-L_dseg.nii.gz, sub-06_hemi-R_dseg.nii.gz" in found.notes
        )
        masks = ("hemi-L_dseg", "hemi-R_mask", "label-pons_mask")
        found = read(self.masked(tmp_path / "half", *masks, image="sub-06_hemi-L_T1w"))
        labels = by_name(found)["sub-06_hemi-L_T1w"].labels
        assert [path.name for path in labels.files] == ["sub-06_hemi-L_dseg.nii.gz"]
        assert sorted(note.split(" and ", 1)[0] for note in found.notes) == [
            "1 label maps are named after no image",
            "1 label maps are of one hemisphere,",
        ]

    def test_masks_of_other_pipelines_and_images_are_left_out_for_the_reason_that_is_said(self, tmp_path):
        root = self.masked(tmp_path, "label-kidney_mask", "run-2_label-liver_mask")
        other = root / "derivatives" / "other" / "sub-06" / "anat"
        write_labels(other / "sub-06_label-kidney_mask.nii.gz", blocks(0, 1))
        found = read(root)
        labels = by_name(found)["sub-06_T1w"].labels
        assert [path.parent.parts[-3] for path in labels.files] == ["masks"]
        assert (
            "1 images have masks of several pipelines, and got those of one: sub-06_T1w.nii.gz (masks)" in found.notes
        )
        assert (
            "1 label maps are named after no image and were left out: sub-06_run-2_label-liver_mask.nii.gz"
            in found.notes
        )

    @staticmethod
    def masked(root: Path, *masks: str, image: str = "sub-06_T1w") -> Path:
        """A data set of one image and masks of it on its grid, one plane each."""
        write_json(root / "dataset_description.json", {"Name": "Test", "BIDSVersion": "1.9.0"})
        tiny_scan(root / "sub-06" / "anat" / f"{image}.nii.gz", 6)
        for place, mask in enumerate(masks):
            path = root / "derivatives" / "masks" / "sub-06" / "anat" / f"sub-06_{mask}.nii.gz"
            write_labels(path, blocks(*[0] * place, 1))
        return root

    def test_a_segmentation_that_fits_two_images_is_given_to_both_and_said(self, tmp_path):
        anat = bids(tmp_path) / "sub-02" / "anat"
        tiny_scan(anat / "sub-02_FLAIR.nii.gz", 40)
        found = read(tmp_path)
        assert by_name(found)["sub-02_FLAIR"].labels is not None
        assert any(note.startswith("1 label maps fit several images with one grid") for note in found.notes)
        pipeline = tmp_path / "derivatives" / "seg" / "sub-02" / "anat"
        (pipeline / "sub-02_space-orig_dseg.nii.gz").rename(pipeline / "sub-02_space-T1w_dseg.nii.gz")
        found = read(tmp_path)
        assert (by_name(found)["sub-02_FLAIR"].labels, by_name(found)["sub-02_T1w"].labels is None) == (None, False)
        assert not any("several images" in note for note in found.notes)

    def test_ages_in_months_are_not_years(self, tmp_path):
        write_json(bids(tmp_path) / "participants.json", {"age": {"Units": "months"}})
        found = read(tmp_path)
        assert not any("age" in image.facts for image in found.images)
        assert "participants.tsv: ages are in 'months', not in years, and were left out" in found.notes

    def test_one_date_among_the_cells_of_a_column_is_enough(self, tmp_path):
        write_text(
            bids(tmp_path) / "participants.tsv", "participant_id\tseen", "sub-01\t2001-02-03", "sub-02\tnot known"
        )
        assert not any("seen" in image.facts for image in read(tmp_path).images)

    def test_files_that_break_the_names_are_refused_and_the_rest_is_read(self, tmp_path):
        root = bids(tmp_path)
        tiny_scan(root / "sub-02" / "anat" / "sub-03_T1w.nii.gz", 20)
        tiny_scan(root / "sub-02" / "anat" / "T1.extra_x.nii.gz", 21)
        tiny_scan(root / "sub-02" / "sub-02_T1w.nii.gz", 22)
        (root / "sub-02" / "anat" / "sub-02_FLAIR.nii.gz").symlink_to("../../.git/annex/objects/gone")
        found = read(root)
        assert len(found.images) == 4
        assert {name: text[:22] for name, text in refusals(found).items()} == {
            "sub-03_T1w.nii.gz": "its name breaks BIDS: ",
            "T1.extra_x.nii.gz": "its name breaks BIDS: ",
            "sub-02_T1w.nii.gz": "it lies in no folder o",
            "sub-02_FLAIR.nii.gz": "it is a link to a file",
        }
        assert "found it in sub-02" in refusals(found)["sub-03_T1w.nii.gz"]

    def test_contradicting_rows_are_refused_by_name_and_the_rest_stands(self, tmp_path):
        root = bids(tmp_path)
        with (root / "participants.tsv").open("a") as file:
            file.write("sub-01\t35\tF\tcontrol\t1961-04-01\t2001-02-03\n")
        found = read(root)
        assert refusals(found) == {"participants.tsv": "it has rows of sub-01 that differ in age"}
        images = by_name(found)
        assert "age" not in images["sub-01_ses-2_T1w"].facts
        assert images["sub-02_T1w"].facts["age"] == 89.0

    def test_a_pipeline_is_a_data_set_of_its_own(self, tmp_path):
        pipeline = bids(tmp_path) / "derivatives" / "seg"
        tiny_scan(pipeline / "sub-02" / "anat" / "sub-02_desc-preproc_T1w.nii.gz", 7)
        images = by_name(read(pipeline))
        labels = images["sub-02_desc-preproc_T1w"].labels
        assert labels is not None
        assert labels.names == {1: "Gray Matter", 2: "White Matter"}

    def test_broken_side_cars_and_tables_cost_no_image(self, tmp_path):
        root = bids(tmp_path)
        (root / "T1w.json").write_text("{")
        (root / "participants.tsv").write_bytes(b"\xff\xfe\0")
        found = read(root)
        assert len(found.images) == 4
        assert list(refusals(found)) == ["participants.tsv"]


class TestMsd:
    def test_pairs_splits_and_names(self, tmp_path):
        found = read(msd(tmp_path))
        images = by_name(found)
        assert {name: (image.split, image.modality) for name, image in images.items()} == {
            "spleen_10": ("train", "CT"),
            "spleen_2": ("train", "CT"),
            "spleen_1": ("test", "CT"),
        }
        labels = images["spleen_2"].labels
        assert labels is not None
        assert (labels.files[0].parent.name, labels.files[0].name, labels.names) == (
            "labelsTr",
            "spleen_2.nii.gz",
            {1: "spleen"},
        )
        assert images["spleen_1"].labels is None
        assert images["spleen_1"].subject == "spleen_1"
        assert found.refused == []

    def test_a_broken_list_is_refused_by_name_and_the_rest_is_read(self, tmp_path):
        root = msd(tmp_path)
        index = json.loads((root / "dataset.json").read_text())
        index["training"] += [{"image": "./imagesTr/gone.nii.gz", "label": "x"}, {"image": "../secret.nii.gz"}, 7]
        index["test"] += ["./imagesTr/spleen_2.nii.gz"]
        write_json(root / "dataset.json", index)
        tiny_scan(root / "imagesTs" / "unlisted.nii.gz", 30)
        found = read(root)
        assert list(by_name(found)) == ["spleen_10", "spleen_1"]
        reasons = [(name, error.message.split(" ")[-1]) for name, error in found.refused]
        assert reasons == [
            ("gone.nii.gz", "there"),
            ("dataset.json", "folder"),
            ("dataset.json", "file"),
            ("spleen_2", "once"),
            ("unlisted.nii.gz", "dataset.json"),
        ]

    def test_a_pair_of_two_cases_is_refused_by_name(self, tmp_path):
        root = msd(tmp_path)
        index = json.loads((root / "dataset.json").read_text())
        index["training"][0]["label"] = index["training"][1]["label"]
        write_json(root / "dataset.json", index)
        found = read(root)
        assert list(by_name(found)) == ["spleen_2", "spleen_1"]
        assert refusals(found) == {
            "spleen_10.nii.gz": "dataset.json gives it the label map of another case: "
            "expected spleen_10, found spleen_2"
        }

    def test_a_pair_of_two_suffixes_is_a_pair(self, tmp_path):
        root = msd(tmp_path)
        index = json.loads((root / "dataset.json").read_text())
        write_labels(root / "labelsTr" / "spleen_10.nii", blocks(1))
        index["training"][0]["label"] = "./labelsTr/spleen_10.nii"
        write_json(root / "dataset.json", index)
        assert by_name(read(root))["spleen_10"].labels.files[0].name == "spleen_10.nii"

    def test_channels_of_4d_tasks(self, tmp_path):
        root = msd(tmp_path)
        index = json.loads((root / "dataset.json").read_text())
        index["modality"] = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
        write_json(root / "dataset.json", index)
        assert {(i.modality, i.facts["sequence"]) for i in read(root).images} == {("MR", None)}
        assert {(i.modality, i.facts["sequence"]) for i in read(root, 2).images} == {("MR", "t1gd")}


class TestBrats:
    def test_2021(self, tmp_path):
        train = tmp_path / "RSNA_ASNR_MICCAI_BraTS2021_TrainingData_16July2021"
        brats(train, "BraTS2021_00000", BRATS_2021, "_", (1, 2, 4))
        brats(tmp_path / "RSNA_ASNR_MICCAI_BraTS2021_ValidationData", "BraTS2021_00001", BRATS_2021, "_", None)
        found = {
            layout.read(root, None).images[0].split: layout.read(root, None) for root, layout in roots(tmp_path, "auto")
        }
        images = by_name(found["train"])
        assert {name: image.facts["sequence"] for name, image in images.items()} == {
            "BraTS2021_00000_flair": "FLAIR",
            "BraTS2021_00000_t1": "T1",
            "BraTS2021_00000_t1ce": "T1 contrast",
            "BraTS2021_00000_t2": "T2",
        }
        for image in images.values():
            assert (image.subject, image.session, image.modality) == ("BraTS2021_00000", None, "MR")
            assert image.labels is not None
            assert image.labels.names == {1: "necrotic tumor core", 2: "peritumoral edema", 4: "enhancing tumor"}
        assert all(image.labels is None for image in found["validation"].images)

    @pytest.mark.parametrize(
        ("folder", "split"),
        [
            ("BraTS2021_Training_Data", "train"),
            ("BraTS2021-Validation-Data", "validation"),
            ("MICCAI_BraTS_TrainingData_2021", "train"),
            ("training_of_data", None),
        ],
    )
    def test_splits_by_the_folder(self, tmp_path, folder, split):
        brats(tmp_path / folder, "BraTS2021_00000", BRATS_2021, "_", None)
        assert {image.split for image in read(tmp_path / folder).images} == {split}

    @pytest.mark.parametrize("cohort", ["GLI", "SSA", "MEN", "MET", "PED"])
    def test_2023(self, tmp_path, cohort):
        root = tmp_path / f"ASNR-MICCAI-BraTS2023-{cohort}-Challenge-TrainingData"
        for session in ("000", "001"):
            brats(root, f"BraTS-{cohort}-00007-{session}", BRATS_2023, "-", (1, 2, 3))
        images = by_name(read(root))
        assert {(image.subject, image.session, image.split) for image in images.values()} == {
            (f"BraTS-{cohort}-00007", session, "train") for session in ("000", "001")
        }
        assert images[f"BraTS-{cohort}-00007-001-t2f"].facts["sequence"] == "FLAIR"
        names = {image.labels.names.get(3) for image in images.values() if image.labels}
        assert names == ({None} if cohort == "PED" else {"enhancing tumor"})

    def test_strange_files_and_empty_cases_are_refused_by_name(self, tmp_path):
        case = brats(tmp_path, "BraTS2021_00000", BRATS_2021, "_", (1,))
        tiny_scan(case / "BraTS2021_00000_dwi.nii.gz", 5)
        tiny_scan(case / "BraTS2021_00009_t1.nii.gz", 6)
        (tmp_path / "BraTS2021_00002").mkdir()
        found = read(tmp_path)
        assert len(found.images) == 4
        assert list(refusals(found)) == ["BraTS2021_00000_dwi.nii.gz", "BraTS2021_00009_t1.nii.gz", "BraTS2021_00002"]


class TestAutopet:
    def test_studies_are_numbered_by_date_and_named_without_it(self, tmp_path):
        found = read(autopet(tmp_path))
        images = by_name(found)
        assert list(images) == [f"{PATIENT}_{n}_{kind}" for n in (1, 2) for kind in ("CT", "CTres", "PET", "SUV")]
        first = images[f"{PATIENT}_1_SUV"]
        assert first.path.parent.name.startswith("06-21-2003")
        assert (first.subject, first.session, first.modality, first.split) == (PATIENT, "1", "PT", None)
        assert first.facts == {"sequence": "SUV", "diagnosis": "MELANOMA", "age": 60.0, "sex": "F"}
        assert images[f"{PATIENT}_2_CT"].facts["diagnosis"] == "NEGATIVE"
        assert {name.split("_")[-1]: bool(image.labels) for name, image in images.items()} == {
            "CT": False,  # on a grid of its own
            "CTres": True,
            "PET": True,
            "SUV": True,
        }

    def test_without_its_table_and_with_strange_files(self, tmp_path):
        root = autopet(tmp_path)
        (root / "fdg_metadata.csv").unlink()
        study = next((root / PATIENT).iterdir())
        tiny_scan(study / "extra.nii.gz", 3)
        found = read(root)
        assert len(found.images) == 8
        assert list(refusals(found)) == ["extra.nii.gz"]
        assert {tuple(image.facts) for image in found.images} == {("sequence",)}


class TestTotalSegmentator:
    def test_the_official_lists(self):
        places = {name: list(classes) for name, classes in CLASS_LISTS.items()}
        assert {name: (len(classes), len(set(classes))) for name, classes in places.items()} == {
            "v2": (117, 117),
            "v1": (104, 104),
            "MRI": (50, 50),
        }
        numbers = {
            "v2": {
                "spleen": 1,
                "pancreas": 7,
                "sacrum": 25,
                "vertebrae_S1": 26,
                "vertebrae_L5": 27,
                "vertebrae_C1": 50,
            },
            "v1": {"aorta": 7, "vertebrae_L5": 18, "vertebrae_C1": 41, "rib_left_1": 58, "face": 93, "sacrum": 92},
            "MRI": {"lung_left": 10, "vertebrae": 19, "intervertebral_discs": 20, "brain": 50},
        }
        numbers["v2"] |= {"heart": 51, "aorta": 52, "inferior_vena_cava": 63, "humerus_left": 69, "spinal_cord": 79}
        numbers["v2"] |= {"brain": 90, "rib_left_1": 92, "rib_right_12": 115, "costal_cartilages": 117}
        for name, expected in numbers.items():
            assert {structure: places[name].index(structure) + 1 for structure in expected} == expected

    def test_cases_masks_and_the_table(self, tmp_path):
        found = read(
            totalsegmentator(tmp_path, {"liver": blocks(1), "aorta": blocks(0, 1), "rib_left_1": blocks(0, 0, 1)})
        )
        images = by_name(found)
        first = images["s0000_ct"]
        assert (first.subject, first.session, first.modality, first.split) == ("s0000", None, "CT", "train")
        assert images["s0004_ct"].split == "validation"
        assert first.facts == {
            "age": 60.0,
            "sex": "M",
            "kvp": 120.0,
            "study_type": "ct abdomen",
            "pathology": "no_pathology",
            "manufacturer": "Siemens",
            "scanner_model": "Somatom Force",
        }
        assert first.labels is not None
        assert first.labels.values == (5, 52, 92)
        assert first.labels.names == {5: "liver", 52: "aorta", 92: "rib_left_1"}
        assert [path.name for path in first.labels.files] == ["liver.nii.gz", "aorta.nii.gz", "rib_left_1.nii.gz"]

    def test_the_first_release_has_numbers_of_its_own(self, tmp_path):
        found = read(totalsegmentator(tmp_path, {"aorta": blocks(1), "heart_myocardium": blocks(0, 1)}))
        assert by_name(found)["s0000_ct"].labels.names == {7: "aorta", 44: "heart_myocardium"}

    def test_images_of_the_other_data_set_are_of_other_people(self, tmp_path):
        totalsegmentator(tmp_path, {"vertebrae": blocks(1), "lung_left": blocks(0, 1)}, ("s0000",))
        (tmp_path / "s0000" / "ct.nii.gz").rename(tmp_path / "s0000" / "mri.nii.gz")
        ((name, image),) = by_name(read(tmp_path)).items()
        assert (name, image.subject, image.modality) == ("s0000_mri", "mri_s0000", "MR")
        assert image.labels.names == {10: "lung_left", 19: "vertebrae"}

    def test_unknown_masks_are_refused_by_name_and_missing_ones_are_said(self, tmp_path):
        totalsegmentator(tmp_path, {"liver": blocks(1), "my_tumour": blocks(0, 1)}, ("s0000",))
        totalsegmentator(tmp_path, {}, ("s0001",))
        found = read(tmp_path)
        assert list(refusals(found)) == ["my_tumour.nii.gz"]
        assert by_name(found)["s0000_ct"].labels.names == {5: "liver"}
        assert found.notes == ["1 cases have no masks and get no labels: s0001"]


def test_a_column_has_one_type_in_all_images(tmp_path):
    def image(value, number):
        return Image(tmp_path, "a", "s", facts={"score": value, "n": number, "same": 1}, person={"n": number})

    texts = with_one_type([image(1, 1), image("high", 2.5), image(None, None)])
    assert [one.facts for one in texts] == [
        {"score": "1", "n": 1.0, "same": 1},
        {"score": "high", "n": 2.5, "same": 1},
        {"score": None, "n": None, "same": 1},
    ]
    assert [type(one.person["n"]) for one in texts] == [float, float, type(None)]
