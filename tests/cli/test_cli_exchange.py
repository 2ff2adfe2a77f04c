"""`isimed export` and `import` on real files."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cohorts import Cohort, tiny_scan
from store_builders import ENCODER, whole_store

import isimed_index as isi
from isimed_cli.main import main

CARD = {
    "name": "theirs",
    "patch_vox": 4,
    "stride_vox": 1,
    "spacing_mm": 4.0,
    "outputs": {"embedding": {"dim": 2}},
    "match_output": "embedding",
    "metric": "l2",
}


def test_there_and_back(cohort: Cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, copy = tmp_path / "out", tmp_path / "copy.isimed"
    assert main(["export", "--parquet", str(out), "--voxels", "-s", str(cohort.store)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("exported scans 6 · encoders 1 · patches ")
    assert shown.endswith(" to out\n")
    assert main(["import", str(out), "-s", str(copy), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (len(done["added"]), done["unchanged"], len(done["encoders"])) == (6, [], 1)
    assert main(["import", str(out), "-s", str(copy)]) == 0
    assert capsys.readouterr().out == "imported scans 0 · unchanged 6 · encoders 0 · patches 0\n"
    assert isi.open(copy).info()["patches"] == isi.open(cohort.store).info()["patches"] == done["patches"]


def test_arrays_and_a_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store = str(whole_store(tmp_path / "store").path)
    assert main(["export", "--npy", str(tmp_path / "npy"), "--where", "modality = 'MR'", "-s", store]) == 0
    assert len(np.load(tmp_path / "npy" / ENCODER / "descriptor.npy")) == 3
    assert capsys.readouterr().out == "exported scans 1 · encoders 1 · patches 3 to npy\n"
    assert (
        main(["export", "--duckdb", str(tmp_path / "x.db"), "--vectors", "--encoder", "toy", "-s", store, "--json"])
        == 0
    )
    done = json.loads(capsys.readouterr().out)
    assert (done["layout"], done["patches"], done["files"]) == ("duckdb", 8, 1)
    with duckdb.connect(str(tmp_path / "x.db"), read_only=True) as database:
        joined = database.sql(f"SELECT count(*) FROM patches JOIN vectors_{ENCODER} USING (patch)").fetchall()
    assert joined == [(8,)]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--parquet", "a", "--npy", "b"],
        ["--npy", "a", "--voxels"],
        ["--parquet", "a", "--vectors"],
        ["--parquet", "store"],
        ["--duckdb", "store"],
        ["--parquet", "none/a"],
        ["--scan", "one", "--out", "a.nii", "--parquet", "b"],
        ["--scan", "one", "--out", "a.nii", "--where", "true"],
        ["--parquet", "a", "--out", "a.nii"],
        ["--parquet", "a", "--force"],
        ["--out", "a.nii"],
    ],
)
def test_what_export_cannot_do_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
):
    whole_store(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    assert main(["export", *arguments, "-s", "store"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error[usage]: ")
    assert "Next: " in shown.err
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_export_of_no_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export", "--parquet", str(tmp_path / "a"), "-s", str(tmp_path / "none")]) == 10
    assert "error[store_not_found]" in capsys.readouterr().err


def test_one_scan(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with isi.create(tmp_path / "store") as store:
        store.add(tiny_scan(tmp_path / "one.nii"))
    asked = ["export", "--scan", "one", "--out", "x.nii.gz", "-s", "store"]
    assert main(asked) == 0
    given = nib.load("one.nii")
    size = "×".join(map(str, given.shape))
    assert capsys.readouterr().out == f"exported scan one · {size} · {given.get_data_dtype().name} · RAS to x.nii.gz\n"
    np.testing.assert_array_equal(nib.load("x.nii.gz").dataobj.get_unscaled(), given.dataobj.get_unscaled())
    assert main(asked) == 2
    assert "x.nii.gz is there already" in capsys.readouterr().err
    for wrong in ([], ["--out", "a.nrrd"], ["--out", "a.nii", "--labels", "a.nii"]):
        assert main(["export", "--scan", "one", *wrong, "-s", "store"]) == 2
        assert "Next: " in capsys.readouterr().err
    assert main([*asked, "--force", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["scan"], done["out"], done["labels"], done["changed"]) == ("one", "x.nii.gz", None, [])
    assert main([*asked, "--force", "--labels", "y.nii"]) == 1
    assert "error[not_found]: scan 'one' has no label map" in capsys.readouterr().err
    assert main(["export", "--scan", "two", "--out", "z.nii", "-s", "store"]) == 1
    assert "error[not_found]" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.nii", "store", "x.nii.gz"]


def test_one_scan_that_was_resampled_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with isi.create(tmp_path / "store") as store:
        store.add(tiny_scan(tmp_path / "one.nii"), spacing_mm=3)
    assert main(["export", "--scan", "one", "--out", str(tmp_path / "x.nii"), "-s", str(tmp_path / "store")]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("not as in its file: it was resampled")


def test_foreign_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """LPS numbers taken for RAS are caught, as most of this scan lies on one side of the origin."""
    store = isi.create(tmp_path / "store")
    store.add(tiny_scan(tmp_path / "one.nii"))
    ijk = np.argwhere(np.ones((6, 5, 3), bool)) * (2, 2, 3)
    ras = ijk * (2.0, 2.0, 3.0)
    lps = ras * (-1, -1, 1)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(ras[:, :2].ravel().astype(np.float32)), 2)
    columns = dict(zip(("x_mm", "y_mm", "z_mm"), lps.T, strict=True))
    pq.write_table(pa.table({"scan": ["one"] * len(ijk), **columns, "embedding": vectors}), tmp_path / "rows.parquet")
    (tmp_path / "card.json").write_text(json.dumps(CARD))
    asked = ["import", str(tmp_path / "rows.parquet"), "--card", str(tmp_path / "card.json"), "-s", str(store.path)]
    assert main(asked) == 1
    error = capsys.readouterr().err
    assert error.startswith("error[outside_scan]: positions lie outside of their scan: one (78 of 90); 1 of 1 scans.")
    assert "--space" in error
    assert main([*asked, "--space", "lps"]) == 0
    assert capsys.readouterr().out == "imported scans 0 · unchanged 1 · encoders 1 · patches 90\n"
    store.refresh()
    assert store.sql("SELECT max(x_mm) AS x, max(y_mm) AS y FROM patches").to_pylist() == [{"x": 20.0, "y": 16.0}]


def test_import_of_what_is_no_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "folder").mkdir()
    assert main(["import", str(tmp_path / "folder"), "-s", str(tmp_path / "store"), "-q"]) == 2
    assert "it has no export.json" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "folder"), "--space", "lps", "-s", str(tmp_path / "store")]) == 2
    assert "with a card only" in capsys.readouterr().err
