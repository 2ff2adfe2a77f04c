"""A cohort out of DICOM that is full of a patient: in every tag that there is, in names of files, in overlays.

Judged twice: by a plain search of our own through all that the store decodes to, and by `check --phi`.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
import zarr
from dicoms import CT, ROOT, noise, write_series
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.tag import Tag
from typer.testing import CliRunner

import isimed_index as isi
from isimed_cli.main import app
from isimed_index.scans.dicom import frames

NAME, NUMBER, BORN, SEEN, CLOCK = "Mustermann", "47110815", "19640812", "20240229", "112233.445566"
UID = f"{ROOT}4711.815"
# What a value of each kind becomes; numbers of two bytes cannot hold anything of a person.
PHI_BY_VR = {
    **dict.fromkeys(("PN",), "Mustermann^Erika"),
    **dict.fromkeys(("LO", "SH", "ST", "LT", "UT", "UC", "AE", "UR"), NAME),
    "CS": NAME.upper(),
    "DA": BORN,
    "TM": CLOCK,
    "DT": f"{BORN}{CLOCK}",
    "AS": "047Y",
    "IS": NUMBER,
    "DS": NUMBER,
    "UI": UID,
    "UL": int(NUMBER),
    "SL": int(NUMBER),
    "FL": float(NUMBER),
    "FD": float(NUMBER),
    "OB": b"Mustermann^Erika",
    "OW": b"Mustermann^Erika",
    "UN": b"Mustermann^Erika",
}
# What decides whether and where a volume is made; the rest of the dictionary is filled.
_NEEDED = {
    *(tag for tag in frames.TAGS if tag != "ImageType"),
    *("PixelData", "PixelPaddingValue", "SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID", "StudyDate"),
    *("FrameOfReferenceUID", "PatientID", "IssuerOfPatientID", "BurnedInAnnotation", "SpecificCharacterSet"),
    *("FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
}


@lru_cache
def every_tag() -> Dataset:
    """Every text, date, number and UID of the dictionary, and every sequence."""
    dataset = Dataset()
    for number, (vr, _, _, _, keyword) in DicomDictionary.items():
        tag = Tag(number)
        if tag.group < 0x0008 or tag.group >= 0x7FE0 or not keyword or keyword in _NEEDED:
            continue
        if vr.split(" ")[0] in PHI_BY_VR:
            dataset.add_new(tag, vr.split(" ")[0], PHI_BY_VR[vr.split(" ")[0]])
        elif vr == "SQ":
            item = Dataset()
            item.PatientName, item.PatientID, item.CodeMeaning = "Mustermann^Erika", NUMBER, NAME
            item.ReferencedSOPInstanceUID = UID
            dataset.add_new(tag, "SQ", Items([item]))
    assert len(dataset) > 3000
    return dataset


def full_of_a_patient(path: Path, **tags: Any) -> None:
    """Write a patient into every tag, private ones and overlays."""
    dataset = pydicom.dcmread(path)
    dataset.update(every_tag())
    dataset.ImageType = ["ORIGINAL", "PRIMARY", NAME.upper()]
    dataset.PatientID, dataset.IssuerOfPatientID, dataset.StudyDate = f"MRN-{NUMBER}", NAME, SEEN
    for group in (0x0009, 0x0019, 0x7001):
        block = dataset.private_block(group, "MUSTERMANN SOFT", create=True)
        block.add_new(0x01, "LO", NAME)
        block.add_new(0x02, "UN", b"Mustermann^Erika")
    for overlay in (0x6000, 0x6002):
        dataset.add_new((overlay, 0x0010), "US", dataset.Rows)
        dataset.add_new((overlay, 0x0011), "US", dataset.Columns)
        dataset.add_new((overlay, 0x0100), "US", 1)
        dataset.add_new((overlay, 0x0102), "US", 0)
        dataset.add_new((overlay, 0x1500), "LO", NAME)
        dataset.add_new((overlay, 0x3000), "OW", b"Mustermann" * 4)
    for tag, value in tags.items():
        setattr(dataset, tag, value)
    dataset.save_as(path)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders called after the patient: two good series, a gap, a localizer, one with writing in it, and rubbish."""
    root = tmp_path_factory.mktemp("pacs") / "Mustermann_Erika"
    folder = root / f"MRN-{NUMBER}"
    localizer = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    series = {
        "a": ({"series": f"{ROOT}11", "study": f"{ROOT}1"}, {}),
        "b": ({"series": f"{ROOT}12", "study": f"{ROOT}2", "sop_class": CT}, {"StudyDate": "20240310"}),
        "gap": ({"series": f"{ROOT}13", "study": f"{ROOT}1"}, {}),
        "localizer": ({"series": f"{ROOT}14", "study": f"{ROOT}1"}, {"ImageType": localizer}),
        "burned": ({"series": f"{ROOT}15", "study": f"{ROOT}1"}, {"BurnedInAnnotation": "YES"}),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, (name, (options, tags)) in enumerate(series.items()):
            paths = write_series(folder / f"{NAME}_{name}", noise((7, 9, 4), seed=seed), **options)
            for number, path in enumerate(paths):
                full_of_a_patient(path, **tags)
                path.rename(path.with_name(f"{NAME}_{number}_{BORN}"))
    (folder / f"{NAME}_gap" / f"{NAME}_1_{BORN}").unlink()
    (folder / f"{NAME}.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"Mustermann^Erika" * 9)
    return root


def decoded(store: Path) -> Iterator[tuple[str, bytes]]:
    """Every file as it is, every cell of every table, and every array and attribute as zarr itself reads them."""
    for path in store.rglob("*"):
        if path.is_file():
            yield str(path.relative_to(store)), path.read_bytes() + path.name.encode()
        if path.suffix == ".parquet":
            table = pq.read_table(path, partitioning=None)
            yield path.name, repr((table.schema, table.to_pylist())).encode()
        if path.suffix == ".zarr":
            root = zarr.open_group(path, mode="r")
            for name, node in [("", root), *root.members(max_depth=None)]:
                yield f"{path.name} {name}", json.dumps(dict(node.attrs), default=str).encode()
                if isinstance(node, zarr.Array):
                    yield f"{path.name} {name}", np.asarray(node[...]).tobytes()


WORDS = [NAME, "Erika", NUMBER, BORN, SEEN, "1964-08-12", "2024-02-29", "20240310", CLOCK, "112233", UID, ROOT, "SOFT"]


def traces(content: bytes) -> list[str]:
    low = content.lower()
    return [word for word in WORDS for code in ("utf-8", "utf-16-le") if word.lower().encode(code) in low]


def test_nothing_of_the_patient_stays(export: Path, tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setenv("ISIMED_SURROGATE_KEY", str(tmp_path / "surrogate.key"))
    caplog.set_level(logging.DEBUG)
    store = tmp_path / "store"
    arguments = ["add", str(export), "--store", str(store), "--verbose", "--json", "--report", str(tmp_path / "r.json")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 3, done.output
    report = json.loads((tmp_path / "r.json").read_text())
    assert (len(report["added"]), len(report["refused"])) == (2, 4)

    said = done.output + (tmp_path / "r.json").read_text() + caplog.text
    assert traces(said.encode()) == []
    found = {where: traces(content) for where, content in decoded(store)}
    assert len(found) > 20
    assert {where: words for where, words in found.items() if words} == {}

    (tmp_path / "phi.txt").write_text("\n".join(word for word in WORDS if word != "SOFT"))
    checked = CliRunner().invoke(app, ["check", "--store", str(store), "--phi-list", str(tmp_path / "phi.txt")])
    assert checked.exit_code == 0, checked.output

    rows = {row["modality"]: row for row in isi.open(store, mode="r").scans().to_pylist()}
    assert rows["CT"]["study_day"] - rows["MR"]["study_day"] == (date(2024, 3, 10) - date(2024, 2, 29)).days
    assert rows["CT"]["subject"] == rows["MR"]["subject"]
    assert rows["MR"]["age"] == 47
    assert rows["MR"]["contrast_agent"] is True
    assert "source" not in rows["MR"]


def test_the_search_would_see_it(export: Path, tmp_path: Path, monkeypatch):
    """The judge is no blind one: the source files, and a store with paths, do hold what it looks for."""
    monkeypatch.setenv("ISIMED_SURROGATE_KEY", str(tmp_path / "surrogate.key"))
    some = max((path for path in export.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    assert set(WORDS) - set(traces(some.read_bytes())) <= {"1964-08-12", "2024-02-29", "20240310"}
    store = isi.create(tmp_path / "store")
    store.add(export, keep_source=True)
    store.close()
    assert any("Erika" in traces(content) for _, content in decoded(store.path))
    (tmp_path / "phi.txt").write_text("Mustermann^Erika")
    kinds = {finding.kind for finding in isi.check(store.path, phi_list=tmp_path / "phi.txt")}
    assert {"phi_identifier", "phi_path"} <= kinds


def test_no_error_text_holds_it(export: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("ISIMED_SURROGATE_KEY", str(tmp_path / "surrogate.key"))
    store = isi.create(tmp_path / "store")
    report = store.add(export)
    for refusal in report.refused:
        assert traces(repr(refusal).encode()) == []
    assert traces(repr(report).encode()) == []
    assert {"body_part", "manufacturer", "scanner_model", "sex", "weight_kg"} <= set(report.dropped)


def test_burned_in_writing_is_taken_only_when_told(export: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("ISIMED_SURROGATE_KEY", str(tmp_path / "surrogate.key"))
    store = isi.create(tmp_path / "store")
    refused = next(item for item in store.add(export).refused if "BurnedInAnnotation" in item.reason)
    assert "--allow-burned-in" in refused.next_step
    (added,) = store.add(export, allow_burned_in=True).added
    row = next(row for row in store.scans().to_pylist() if row["scan"] == added)
    assert row["burned_in_annotation"] is True
