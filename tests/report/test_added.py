"""Reports of an add: JSON, CSV, and a page that loads nothing and runs nothing."""

from __future__ import annotations

import base64
import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from cohorts import tiny_scan, write_nifti
from dicoms import CT, PHI, noise, write_series

import isimed_index as isi
from isimed_cli.main import main
from isimed_index.ingest.report import AddReport, Facts, FileOutcome, Refusal
from isimed_index.report.added import write_added

EVIL = '<script>alert("x")</script>&\'.nii'.replace("/", "∕")  # a slash cannot be in a name
FACTS = Facts((4, 5, 6), (1.0, 2.0, 3.0), "LPS", "CT", "DICOM", -1000.0, 2000.0)


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and the cells of the rows of the body."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image, one with labels, a copy, a bad file under an evil name, and a DICOM series full of names."""
    tiny_scan(tmp_path / "in" / "a.nii.gz", 1)
    tiny_scan(tmp_path / "in" / "copy of a.nii", 1)
    (tmp_path / "in" / EVIL).write_bytes(b"no image")
    tiny_scan(tmp_path / "in" / '"><img src=x onerror=alert(1)>.nii', 2)
    write_series(tmp_path / "in" / "dicom", noise(), sop_class=CT, series="1.2.3", PatientName="<b>Erika</b>")
    return tmp_path


def add(folder: Path, report: str, *more: str) -> Path:
    path = folder / report
    assert main(["add", str(folder / "in"), "-s", str(folder / "store"), "--report", str(path), *more]) == 3
    return path


def key(folder: Path) -> tuple[str, str]:
    return "--surrogate-key", str(folder / "key")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_page_is_whole_and_harmless(folder: Path, workers: str, capsys: pytest.CaptureFixture[str]):
    text = add(folder, "r.html", "--workers", workers, *key(folder)).read_text(encoding="utf-8")
    page = Page(text)
    assert "added 3 · unchanged 1 · refused 1" in text
    assert not page.of("script")
    assert {name for name, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "p"),
        *("table", "thead", "tbody", "tr", "th", "td", "img"),
    }
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    pictures = [image["src"] or "" for image in page.of("img")]
    assert len(pictures) == 4  # of every file that was read
    assert all(source.startswith("data:image/png;base64,") and len(source) < 20_000 for source in pictures)
    assert base64.b64decode(pictures[0].split(",")[1]).startswith(b"\x89PNG")
    assert all(image["loading"] == "lazy" for image in page.of("img"))
    assert "http" not in text.replace("http-equiv", "")
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.of("meta"))
    names = [row[1] for row in page.rows[1:]]
    assert EVIL in names
    assert '"><img src=x onerror=alert(1)>.nii' in names
    assert not any(word in text for value in PHI.values() for word in value.split("^"))
    assert "Erika" not in text
    assert str(folder) not in text


def test_json_has_an_entry_for_each_file(folder: Path):
    found = json.loads(add(folder, "r.json", *key(folder)).read_text())
    assert list(found)[:3] == ["added", "unchanged", "refused"]
    files = {file["name"]: file for file in found["files"]}
    assert len(files) == len(found["files"]) == 5
    assert files["a.nii.gz"] | {"seconds": 0} == {
        "name": "a.nii.gz",
        "outcome": "added",
        "scan": "a",
        "kind": None,
        "reason": None,
        "next_step": None,
        "shape": [12, 10, 9],
        "spacing_mm": [2.0, 2.0, 3.0],
        "orientation": "RAS",
        "modality": None,
        "format": "NIfTI-1",
        "low": float(np.random.default_rng(1).integers(0, 900, (12, 10, 9)).min()),
        "high": float(np.random.default_rng(1).integers(0, 900, (12, 10, 9)).max()),
        "labels": None,
        "seconds": 0,
    }
    assert files["copy of a.nii"]["outcome"] == "unchanged"
    assert files["copy of a.nii"]["scan"] == "a"
    assert files[EVIL]["outcome"] == "refused"
    assert files[EVIL]["reason"] == found["refused"][0]["reason"]
    (series,) = (file for name, file in files.items() if name.startswith("series-"))
    assert series["modality"] == "CT"
    assert series["scan"] == series["name"]


def test_csv_is_a_line_a_file_and_no_formula(folder: Path):
    tiny_scan(folder / "in" / "=cmd|calc.nii", 5)
    with add(folder, "r.csv", *key(folder)).open(encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert len(rows) == 6
    assert (rows["a.nii.gz"]["nx"], rows["a.nii.gz"]["dz_mm"], rows["a.nii.gz"]["outcome"]) == ("12", "3.0", "added")
    assert rows["'=cmd|calc.nii"]["scan"] == "'=cmd|calc"


def test_labels_are_counted_and_late_ones_told(tmp_path: Path):
    store = isi.create(tmp_path / "store")
    image = tiny_scan(tmp_path / "s.nii", 0)
    store.add(image)
    labels = np.zeros((12, 10, 9), np.uint8)
    labels[2:4], labels[5:] = 3, 9
    write_nifti(tmp_path / "s_seg.nii", labels, np.diag([2.0, 2.0, 3.0, 1.0]))
    (file,) = store.add(image, labels="{stem}_seg.nii").files
    assert (file.outcome, file.scan, file.labels) == ("unchanged", "s", 2)
    assert file.refusal is not None
    assert "without labels" in file.refusal.reason


def test_a_file_name_that_is_no_text_does_not_stop_a_report(tmp_path: Path):
    refusal = Refusal("bad\udcff.nii", "scan_refused", "no\nimage", "convert it")
    report = AddReport(refused=[refusal], files=[FileOutcome.refused(refusal)])
    for name in ("r.html", "r.csv", "r.json"):
        write_added(report, tmp_path / name)
        assert "udcff" in (tmp_path / name).read_text(encoding="utf-8")
    assert json.loads((tmp_path / "r.json").read_text())["files"][0]["name"] == refusal.name


def test_ten_thousand_rows_come_in_pieces_that_a_browser_lays_out_when_seen(tmp_path: Path):
    (tmp_path / "0.png").write_bytes(b"\x89PNG" + bytes(14_000))
    file = FileOutcome("a.nii", "added", "a", facts=FACTS, labels=3, seconds=1.25, thumbnail="0.png")
    report = AddReport(added=["a"] * 10_000, files=[file] * 10_000)
    write_added(report, tmp_path / "r.html", tmp_path)
    with (tmp_path / "r.html").open(encoding="utf-8") as page:
        lines = list(page)
    assert sum(line.startswith("<tr ") for line in lines) == 10_000
    assert sum(line.startswith("<tbody") for line in lines) == 100
    assert any("content-visibility: auto" in line for line in lines)
    assert "<td>4 × 5 × 6</td><td>1 × 2 × 3</td><td>LPS</td><td>CT</td><td>DICOM</td><td>-1000 … 2000</td>" in lines[-3]


def test_a_report_of_another_kind_is_refused_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "in").mkdir()
    wrong = ["add", str(tmp_path / "in"), "-s", str(tmp_path / "store"), "--report", str(tmp_path / "out.txt")]
    assert main(wrong) == 2
    assert "ends in .json, .csv or .html, found out.txt" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]
