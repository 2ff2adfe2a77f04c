"""What `register` keeps in a store, and what becomes of it when scans go, runs end early, or files break.

How near the scans then lie is `test_register.py`'s; here the images are coarse and the optimiser takes few steps.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from cohorts import head, write_nifti
from registered_heads import HEADS, register_heads, rows_of, write_heads

import isimed_index as isi
from isimed_cli.main import main
from isimed_index.api import Store
from isimed_index.errors import MissingExtra, NotFound, StoreLocked, UsageError
from isimed_index.register import align as aligning
from isimed_index.register import cohort as verb
from isimed_index.register import images
from isimed_index.register.align import align
from isimed_index.space import apply_affine
from isimed_index.store.repository import Repository
from isimed_index.store.transaction import Proposal


@pytest.fixture(autouse=True, scope="module")
def hasty():
    """Images of 8 mm and 25 steps on each level."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_VOXELS", 8_000)
        patch.setattr(images, "COARSEST_MM", 8.0)
        patch.setattr(aligning, "_STEPS", 25)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_heads(tmp_path_factory.mktemp("heads"))


@pytest.fixture(scope="module")
def registered(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the heads, registered to their mean in two rounds; treat it as read-only."""
    return register_heads(files, tmp_path_factory.mktemp("registered") / "cohort.isimed")


@pytest.fixture
def mine(registered: Path, tmp_path: Path) -> Store:
    """The same, to be changed."""
    return isi.open(shutil.copytree(registered, tmp_path / "mine.isimed"))


def test_redo_of_the_same_scans_gives_the_same_bits_with_any_number_of_workers(mine: Store):
    before = rows_of(mine)
    done = mine.register(redo=True, workers=1)
    assert len(done.registered) == 4
    assert rows_of(mine) == before
    assert len(mine.snapshot.artefacts("reference")) == 1


def test_cut_short_it_goes_on_where_it_was(
    files: Path, registered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = isi.create(tmp_path / "s")
    store.add(files, labels="{stem}_seg.nii.gz")
    monkeypatch.setattr(verb, "COMMIT_SCANS", 2)
    count = 0

    def cut(*given, **more):
        nonlocal count
        count += 1
        if count == 7:  # in the second round, after its first group
            raise KeyboardInterrupt
        return align(*given, **more)

    monkeypatch.setattr(verb, "align", cut)
    with pytest.raises(KeyboardInterrupt):
        store.register()
    assert sorted(row["rounds"] for row in rows_of(store)) == [1, 1, 2, 2]
    count = 100
    done = store.register()
    assert len(done.registered) == 2
    assert rows_of(store) == rows_of(isi.open(registered))


def test_bad_options_and_an_empty_store(tmp_path: Path, files: Path):
    store = isi.create(tmp_path / "s")
    with pytest.raises(NotFound):
        store.register()
    store.add(files / "sub-01_T1w.nii.gz")
    for wrong in ({"kind": "elastic"}, {"rounds": 0}, {"workers": 0}):
        with pytest.raises(UsageError):
            store.register(**wrong)
    with pytest.raises(NotFound, match="no such transform"):
        store.transform("sub-01_T1w")


def test_the_query_of_the_page_gives_each_scan_once(mine: Store):
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "register.md").read_text(encoding="utf-8")
    frames, labels, unclear = (block.split("```")[0] for block in page.split("```sql\n")[1:])
    there = mine.snapshot.table("transforms")
    example = "b6be4b7f95b0"
    names = {"reference": (example, "0123456789ab"), "kind": ("rigid", "affine")}
    more = [
        {**row, "reference": reference, "kind": kind}
        for row in there.to_pylist()
        for reference in names["reference"]
        for kind in names["kind"]
    ]
    table = pa.Table.from_pylist(more, schema=there.schema)
    with Repository.open(mine.path).transaction("test") as transaction:
        transaction.commit(lambda head: Proposal(tables={"transforms": table}))
    mine.refresh()
    assert mine.sql(frames).num_rows == 1 + 4
    gains = [row["metric_after"] - row["metric_before"] for row in there.to_pylist() + more]
    assert mine.sql(unclear).num_rows == sum(gain < 0.05 for gain in gains)
    found = mine.sql(labels).to_pylist()
    assert sorted(row["scan"] for row in found) == sorted(copy.stem for copy in HEADS)
    for row in found:
        (centroid,) = mine.sql(
            "SELECT x_mm, y_mm, z_mm FROM labels WHERE label = 4 AND scan = $s", {"s": row["scan"]}
        ).to_pylist()
        landed = apply_affine(mine.transform(row["scan"], example, "rigid"), list(centroid.values()))
        np.testing.assert_allclose([row["x"], row["y"], row["z"]], landed, atol=1e-9)


def test_a_deleted_scan_has_no_transform_and_the_others_keep_theirs(mine: Store):
    before = rows_of(mine)
    mine.delete("scan = 'sub-02_T1w'")
    assert rows_of(mine) == [row for row in before if row["scan"] != "sub-02_T1w"]
    mine.compact()
    assert len(rows_of(mine)) == 3
    assert isi.check(mine.path, read=1.0) == []


def test_a_purged_patient_is_in_no_mean_image(mine: Store):
    mean = mine.snapshot.artefacts("reference")[0].path
    erased = mine.purge("sub-02")
    assert erased.register_again == 1  # those of earlier rounds were no more in the newest generation
    assert not (mine.path / mean).exists()
    assert (rows_of(mine), mine.snapshot.artefacts("reference")) == ([], [])
    done = mine.register()
    assert (done.mean_of, len(done.registered)) == (3, 3)
    assert {found.kind for found in isi.check(mine.path, read=1.0)} <= {"history_gap"}  # of expired generations


def test_a_purge_that_was_cut_short_still_tells_to_register_again(mine: Store, monkeypatch: pytest.MonkeyPatch):
    def cut(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("isimed_index.store.upkeep.purge.collect", cut)  # after its commit
        with pytest.raises(KeyboardInterrupt):
            mine.purge("sub-02")
    assert mine.purge("sub-02").register_again == 1
    assert mine.purge("sub-01").register_again == 0  # it was in the mean that is gone already


def test_the_command_line_tells_to_register_again(mine: Store, capsys: pytest.CaptureFixture[str]):
    mine.close()
    for subject, told in (("sub-02", True), ("sub-03", False)):
        assert main(["purge", subject, "--yes", "-s", str(mine.path)]) == 0
        assert ("Next: isimed register" in capsys.readouterr().err) is told


def test_a_purge_keeps_an_atlas_but_not_one_that_shows_the_patient(mine: Store, files: Path, tmp_path: Path):
    template = head()
    atlas = write_nifti(tmp_path / "atlas.nii.gz", template.values, template.affine)
    mine.delete("scan in ('sub-03_T1w', 'sub-04_T1w')")
    outside = mine.register(to=atlas).reference
    theirs = mine.register(to=files / "sub-02_T1w.nii.gz").reference
    assert {row["reference"] for row in rows_of(mine)} > {outside, theirs}
    mine.purge("sub-02")
    assert [(row["scan"], row["reference"]) for row in rows_of(mine)] == [("sub-01_T1w", outside)]


def test_an_atlas_whose_file_was_added_later_goes_with_its_patient(mine: Store, files: Path):
    atlas = files / "sub-02_T1w.nii.gz"
    mine.purge("sub-02")  # as if it had never been there
    mine.delete("scan in ('sub-03_T1w', 'sub-04_T1w')")
    theirs = mine.register(to=atlas).reference
    mine.add(atlas, spacing_mm=6.0)  # other content: not recognised, and said
    assert any("atlas" in line and "spacing" in line for line in mine.purge("sub-02").remains)
    assert [row["reference"] for row in rows_of(mine)] == [theirs]
    mine.add(atlas)
    erased = mine.purge("sub-02")
    assert (erased.register_again, rows_of(mine), mine.snapshot.artefacts("reference")) == (1, [], [])
    assert not list((mine.path / "references").iterdir())
    assert not any("atlas" in line for line in erased.remains)


def test_an_atlas_goes_whose_scan_was_deleted_before(mine: Store, files: Path):
    atlas = files / "sub-02_T1w.nii.gz"
    mine.delete("scan != 'sub-01_T1w'")
    theirs = mine.register(to=atlas).reference  # no stored scan shows it now; an older generation has one
    assert theirs in {row["reference"] for row in rows_of(mine)}
    mine.purge("sub-02")
    assert theirs not in {row["reference"] for row in rows_of(mine)}
    assert not list((mine.path / "references").iterdir())


def test_a_damaged_mean_is_told_and_made_again(mine: Store):
    mean = mine.snapshot.artefacts("reference")[0].path
    mine.close()
    shard = next(path for path in (mine.path / mean).rglob("c/**/*") if path.is_file())
    shard.write_bytes(bytes(len(shard.read_bytes())))
    fresh = subprocess.run(
        [sys.executable, "-m", "isimed_cli.main", "register", "-s", str(mine.path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (fresh.returncode, "error[store_damaged]" in fresh.stderr) == (12, True), fresh.stderr
    isi.repair(mine.path)
    assert mine.register().mean_of == 4
    assert len(rows_of(mine)) == 4


def test_a_reference_that_is_replaced_meanwhile_ends_the_run(mine: Store, monkeypatch: pytest.MonkeyPatch):
    def purged(*given, **more):
        if mine.snapshot.artefacts("reference"):
            with Repository.open(mine.path).transaction("test") as transaction:
                transaction.commit(lambda head: Proposal(drop=[one.path for one in head.artefacts("reference")]))
            mine.refresh()
        return align(*given, **more)

    monkeypatch.setattr(verb, "align", purged)
    with pytest.raises(StoreLocked, match="another process"):
        mine.register(rounds=3)


def test_an_export_holds_the_transforms_and_an_import_leaves_them_out(mine: Store, tmp_path: Path):
    import pyarrow.parquet as pq

    mine.export(tmp_path / "out", voxels=True)
    assert pq.read_table(tmp_path / "out" / "transforms.parquet").num_rows == 4
    copy = isi.create(tmp_path / "copy")
    assert len(copy.import_(tmp_path / "out").added) == 4
    assert rows_of(copy) == []


def test_a_store_with_transforms_is_not_for_versions_that_would_leave_them_behind(registered: Path):
    assert "transforms" in isi.open(registered, mode="r").snapshot.manifest.features


def test_without_simpleitk_it_says_what_to_install(mine: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(MissingExtra) as error:
        mine.register()
    assert "isimed-index[register]" in error.value.next_step


def test_it_loads_on_use():
    code = "import sys, isimed_index.api, isimed_index.register.cohort; print('SimpleITK' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
