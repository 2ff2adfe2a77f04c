"""Small data sets in the folders and under the names of the real ones, with what must not be stored in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cohorts import tiny_scan, write_nifti

SHAPE = (12, 10, 9)
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])  # that of `tiny_scan`
SECRETS = ("DOE^JANE", "St. Elsewhere", "SN-4711-SECRET", "1961-04-01", "13:37:00", "Teilkoerper", "06-21-2003")


def blocks(*values: int) -> np.ndarray:
    """A label map of the shape of `tiny_scan`: one plane of each value, side by side along x."""
    labels = np.zeros(SHAPE, np.uint8)
    for place, value in enumerate(values, start=1):
        labels[place] = value
    return labels


def write_labels(path: Path, labels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    return write_nifti(path, labels, affine)


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_text(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def bids(root: Path) -> Path:
    """Two subjects, one of them with two sessions; side-cars at three levels; a pipeline with a segmentation."""
    write_json(root / "dataset_description.json", {"Name": "Test", "BIDSVersion": "1.9.0"})
    write_text(
        root / "participants.tsv",
        "participant_id\tage\tsex\tgroup\tdate_of_birth\tvisit",
        "sub-01\t34\tF\tcontrol\t1961-04-01\t2001-02-03",
        "sub-02\t89+\tM\tpatient\t1930-01-01\tn/a",
    )
    write_json(root / "T1w.json", {"MagneticFieldStrength": 3, "EchoTime": 0.004, "InstitutionName": "St. Elsewhere"})
    write_text(root / "sub-01" / "sub-01_sessions.tsv", "session_id\tacq_time\tweight", "ses-1\t1961-04-01\t70.5")
    first = root / "sub-01" / "ses-1"
    tiny_scan(first / "anat" / "sub-01_ses-1_T1w.nii.gz", 0)
    write_json(
        first / "anat" / "sub-01_ses-1_T1w.json",
        {
            "EchoTime": 0.00298,
            "RepetitionTime": 2.3,
            "PatientName": "DOE^JANE",
            "AcquisitionTime": "13:37:00",
            "DeviceSerialNumber": "SN-4711-SECRET",
            "Manufacturer": "Siemens",
        },
    )
    write_text(
        first / "sub-01_ses-1_scans.tsv",
        "filename\tacq_time\tquality",
        "anat/sub-01_ses-1_T1w.nii.gz\t1961-04-01T13:37:00\tgood",
    )
    tiny_scan(root / "sub-01" / "ses-2" / "anat" / "sub-01_ses-2_T1w.nii.gz", 1)
    tiny_scan(root / "sub-02" / "anat" / "sub-02_T1w.nii.gz", 2)
    tiny_scan(root / "sub-02" / "anat" / "sub-02_T2w.nii.gz", 3, (8, 8, 8))
    tiny_scan(root / "sub-02" / "func" / "sub-02_task-rest_bold.nii.gz", 4)
    tiny_scan(root / "sourcedata" / "sub-02" / "raw.nii.gz", 5)
    pipeline = root / "derivatives" / "seg"
    write_json(pipeline / "dataset_description.json", {"BIDSVersion": "1.9.0", "DatasetType": "derivative"})
    write_text(
        pipeline / "dseg.tsv",
        "index\tname\tabbreviation\tcolor\tmapping",
        "1\tGray Matter\tGM\t#ff53bb\t1",
        "2\tWhite Matter\tWM\t#2f8bbe\t2",
    )
    write_labels(pipeline / "sub-02" / "anat" / "sub-02_space-orig_dseg.nii.gz", blocks(1, 2))
    write_labels(pipeline / "sub-01" / "ses-1" / "anat" / "sub-01_ses-1_label-lesion_mask.nii.gz", blocks(1))
    return root


def msd(root: Path, labels: Mapping[str, str] | None = None) -> Path:
    """Two training pairs and a test image, with the leftovers of macOS that the archives hold."""
    for seed, name in enumerate(("spleen_2", "spleen_10")):
        tiny_scan(root / "imagesTr" / f"{name}.nii.gz", seed)
        write_labels(root / "labelsTr" / f"{name}.nii.gz", blocks(1))
        (root / "imagesTr" / f"._{name}.nii.gz").write_bytes(b"\0\5\x16\7")
    tiny_scan(root / "imagesTs" / "spleen_1.nii.gz", 9)
    write_json(
        root / "dataset.json",
        {
            "name": "Spleen",
            "tensorImageSize": "3D",
            "modality": {"0": "CT"},
            "labels": labels or {"0": "background", "1": "spleen"},
            "numTraining": 2,
            "numTest": 1,
            "training": [
                {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
                for name in ("spleen_10", "spleen_2")
            ],
            "test": ["./imagesTs/spleen_1.nii.gz"],
        },
    )
    return root


def brats(root: Path, case: str, sequences: tuple[str, ...], separator: str, labels: tuple[int, ...] | None) -> Path:
    """One case: an image a sequence, and the segmentation where there are labels."""
    for place, sequence in enumerate(sequences):
        tiny_scan(root / case / f"{case}{separator}{sequence}.nii.gz", sum(map(ord, case)) * 10 + place)
    if labels is not None:
        write_labels(root / case / f"{case}{separator}seg.nii.gz", blocks(*labels))
    return root / case


BRATS_2021 = ("flair", "t1", "t1ce", "t2")
BRATS_2023 = ("t1c", "t1n", "t2f", "t2w")
PATIENT, STUDIES = (
    "PETCT_0011f3deaf",
    ("12-30-2004-NA-PET-CT Teilkoerper-18049", "06-21-2003-NA-PET-CT Ganzkoerper-10445"),
)


def autopet(root: Path) -> Path:
    """One patient with two studies, the later one before the earlier one by name; CT on a grid of its own."""
    for place, study in enumerate(STUDIES):
        folder = root / PATIENT / study
        tiny_scan(folder / "CT.nii.gz", 100 * place, (6, 6, 6))
        for offset, name in enumerate(("CTres", "PET", "SUV"), start=1):
            tiny_scan(folder / f"{name}.nii.gz", 100 * place + offset)
        write_labels(folder / "SEG.nii.gz", blocks(*([1] if place else [])))
    rows = [
        f"1.3.6.1.4.1.14519.5.2.1.{place},FDG-PET-CT-Lesions,{PATIENT},1.2.3,DOE^JANE,{study[:10]},"
        f"./FDG-PET-CT-Lesions/{PATIENT}/{study}/103.000000-PET-1,{diagnosis},060Y,F"
        for place, (study, diagnosis) in enumerate(zip(STUDIES, ("NEGATIVE", "MELANOMA"), strict=True))
    ]
    header = "Series UID,Collection,Subject ID,Study UID,Study Description,Study Date,File Location,diagnosis,age,sex"
    write_text(root / "fdg_metadata.csv", header, *rows)
    return root


def totalsegmentator(root: Path, masks: Mapping[str, np.ndarray], cases: tuple[str, ...] = ("s0000", "s0004")) -> Path:
    """Cases with the same masks; `meta.csv` as in the release: semicolons, and a byte order mark."""
    for seed, case in enumerate(cases):
        tiny_scan(root / case / "ct.nii.gz", seed)
        for name, mask in masks.items():
            write_labels(root / case / "segmentations" / f"{name}.nii.gz", mask)
    header = (
        "image_id;age;gender;institute;study_type;split;manufacturer;scanner_model;kvp;pathology;pathology_location"
    )
    rows = []
    for place, case in enumerate(cases):
        facts = (60 + place, "mf"[place % 2], "A", "ct abdomen", ("train", "val", "test")[place % 3], "siemens")
        rows.append(";".join(map(str, (case, *facts, "Somatom Force", "120.0", "no_pathology", ""))))
    (root / "meta.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    return root
