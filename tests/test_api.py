"""The facade: opening, pinning, read-only, training and the small questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cohorts import COPIES, Cohort, add_random_encoder, tiny_scan
from store_builders import finish, start

import isimed_index as isi
from isimed_index.calibrating import trained_on_voxels
from isimed_index.errors import NotFound, StoreNotFound, UsageError


class Recorder:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int | None]] = []
        self.done: dict[str, int] = {}

    def start(self, task: str, total: int | None, unit: str) -> None:
        self.tasks.append((task, total))

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done[self.tasks[-1][0]] = self.done.get(self.tasks[-1][0], 0) + n

    def finish(self) -> None: ...


def test_create_open_and_modes(tmp_path: Path):
    with pytest.raises(StoreNotFound):
        isi.open(tmp_path / "store")
    store = isi.create(str(tmp_path / "store"))
    assert (store.path, store.generation) == (tmp_path / "store", 0)
    with pytest.raises(UsageError):
        isi.create(tmp_path / "store")
    with pytest.raises(UsageError, match="mode r or a"):
        isi.open(tmp_path / "store", mode="w")
    tiny_scan(tmp_path / "a.nii")
    for read_only in (isi.open(tmp_path / "store", mode="r"), isi.open(tmp_path / "store", generation=0)):
        for write in (lambda s: s.add(tmp_path / "a.nii"), lambda s: s.index(), lambda s: s.pretrain()):
            with pytest.raises(UsageError, match="read-only"):
                write(read_only)


def test_a_reader_sees_the_same_rows_until_it_refreshes(tmp_path: Path):
    writer = isi.create(tmp_path / "store")
    writer.add(tiny_scan(tmp_path / "a.nii", 0))
    reader = isi.open(tmp_path / "store", mode="r")
    before = reader.scans().to_pylist()
    code = "import sys, isimed_index as isi; isi.open(sys.argv[1]).add(sys.argv[2])"
    finish(start(code, str(tmp_path / "store"), str(tiny_scan(tmp_path / "b.nii", 1))))
    assert reader.scans().to_pylist() == before
    assert isi.open(tmp_path / "store", generation=1).scans().to_pylist() == before
    reader.refresh()
    assert reader.scans().column("scan").to_pylist() == ["a", "b"]


def test_two_processes_adding_at_once_both_land(tmp_path: Path):
    isi.create(tmp_path / "store")
    for process in range(2):
        for n in range(20):
            tiny_scan(tmp_path / f"in{process}" / f"p{process}_{n:02d}.nii", 100 * process + n, (5, 5, 5))
        tiny_scan(tmp_path / f"in{process}" / f"shared_{process}.nii", 999, (5, 5, 5))
        tiny_scan(tmp_path / f"in{process}" / "same_name.nii", 500 + process, (5, 5, 5))
    code = (
        "import sys, isimed_index as isi\n"
        "store = isi.open(sys.argv[1])\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "report = store.add(sys.argv[2])\n"
        "print(len(report.added), len(report.unchanged), len(report.refused))"
    )
    processes = [start(code, str(tmp_path / "store"), str(tmp_path / f"in{n}")) for n in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    counts = [list(map(int, finish(process).split())) for process in processes]
    assert sum(added for added, _, _ in counts) == 43  # the content that both have lands once
    assert sorted(unchanged for _, unchanged, _ in counts) == [0, 1]
    store = isi.open(tmp_path / "store")
    scans = store.scans().column("scan").to_pylist()
    assert len(scans) == len(set(scans)) == 43
    assert {f"p{process}_{n:02d}" for process in range(2) for n in range(20)} < set(scans)
    assert sum("same_name" in scan for scan in scans) == 2
    assert len([*(store.path / "scans").iterdir()]) == 43
    assert not any((store.path / "intents").iterdir())


def test_points_are_three_finite_numbers(cohort: Cohort):
    store = isi.open(cohort.store)
    for wrong in ((1, 2), (1, 2, 3, 4), (1, 2, float("nan")), ("a", 2, 3), 5, (1, 2, None)):
        with pytest.raises(UsageError, match="three finite numbers") as caught:
            store.lookup(wrong, COPIES[0].stem)
        assert caught.value.next_step
    assert len(store.lookup(["10", 20, 30], COPIES[0].stem, k=1)) == 1


def test_small_questions(cohort: Cohort):
    store = isi.open(cohort.store)
    info = store.info()
    assert (info["scans"], info["subjects"], info["encoders"]) == (6, 5, ["random"])
    assert info["patches"] == store.sql("SELECT count(*) AS n FROM patches").column("n")[0].as_py()
    assert store.encoders().column("name").to_pylist() == ["random"]
    verbs = store.log().column("verb").to_pylist()
    assert verbs[:3] == ["create", "add", "pretrain"]
    assert set(verbs[3:]) == {"index"}
    assert len(verbs) >= 7  # scans in one commit or more; frame, regions, index
    assert {"digest", "artefact"}.isdisjoint(store.scans().column_names)
    assert store.sql("SELECT $n AS n", {"n": 4}).to_pylist() == [{"n": 4}]
    centres = store.sql("SELECT count(*) AS n FROM patches WHERE cx_mm IS NULL").column("n")[0].as_py()
    assert centres == 0


def test_pretrain_index_and_ask(cohort: Cohort, tmp_path: Path):
    """One epoch of a few steps: the path from files to answers, with its progress, and an encoder of that name."""
    store = isi.create(tmp_path / "store")
    store.add([cohort.file(copy) for copy in COPIES[:3]])
    config = tmp_path / "few.toml"
    config.write_text("steps_per_epoch = 2\nwidth = 2\nspacing_mm = 4.0\nview_vox = 36\nwarmup_steps = 1\n")
    progress = Recorder()
    card = store.pretrain(preset="tiny", config=config, epochs=1, name="few", where="subject = 'sub-01'", seed=3)
    assert (card.name, card.spacing_mm, card.training["seed"]) == ("few", 4.0, 3)
    assert not any((store.path / "tmp").iterdir())
    shown = trained_on_voxels(store.snapshot, card)
    trained_on = {scan for scan, voxels in store.snapshot.voxels_of.items() if voxels in shown}
    assert trained_on == {copy.stem for copy in COPIES[:3] if copy.stem.startswith("sub-01")}
    report = store.index(progress=progress)
    assert len(report.encoded) == progress.done["encode"] == 3
    assert dict(progress.tasks)["frame, round 2 of 2"] == progress.done["frame, round 2 of 2"] == 3
    found = store.lookup([10, 20, 30], COPIES[0].stem)[0]
    assert found.xyz_mm == pytest.approx(COPIES[2].moved([10, 20, 30]), abs=1.0)
    store.plot("training", tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 5000


def test_pretrain_without_scans_says_so(tmp_path: Path):
    store = isi.create(tmp_path / "store")
    with pytest.raises((NotFound, UsageError)):
        store.pretrain(preset="tiny", epochs=1)
    assert store.encoders().num_rows == 0


def test_add_reports_progress(tmp_path: Path):
    store, progress = isi.create(tmp_path / "store"), Recorder()
    store.add([tiny_scan(tmp_path / f"{n}.nii", n) for n in range(3)], progress=progress)
    assert (progress.tasks, progress.done) == ([("add", 3)], {"add": 3})


def test_random_encoder_ids_follow_their_weights(tmp_path: Path):
    isi.create(tmp_path / "a")
    isi.create(tmp_path / "b")
    assert add_random_encoder(tmp_path / "a") == add_random_encoder(tmp_path / "b", name="renamed")
    assert add_random_encoder(tmp_path / "a", seed=1) != add_random_encoder(tmp_path / "b")


def test_embeddings_come_scan_by_scan_with_their_patch_ids(cohort: Cohort) -> None:
    with isi.open(cohort.store, mode="r") as store:
        every = list(store.embeddings())
        assert len(every) == len(store.snapshot.segments())
        ids = np.concatenate([row_ids for row_ids, _ in every])
        assert sorted(ids) == store.sql("SELECT patch FROM patches ORDER BY patch").column("patch").to_pylist()
        some = list(store.embeddings("scan = 'sub-02_T1w' AND i < 4", output="embedding"))
        assert [vectors.shape[1] for _, vectors in some] == [8]
        kept = store.sql("SELECT patch FROM patches WHERE scan = 'sub-02_T1w' AND i < 4 ORDER BY patch")
        assert some[0][0].tolist() == kept.column("patch").to_pylist()
