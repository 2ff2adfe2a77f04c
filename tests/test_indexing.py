"""`index`: only what is new is encoded, every scan gets a chart, and the index covers all that is encoded."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from cohorts import (
    COPIES,
    CROPPED,
    Cohort,
    Copy,
    add_random_encoder,
    head,
    rigid,
    segment_vectors,
    write_copy,
    write_nifti,
)
from zarr.codecs import BloscCodec

import isimed_index as isi
from isimed_cli.main import main
from isimed_index import charting, indexing, planning
from isimed_index.api import Store
from isimed_index.encode import Encoded, EncodeTask, Losses, Workers, cluster, encode_batches
from isimed_index.encoders.runtimes import trial
from isimed_index.encoders.runtimes.kind import Auto, Runtime
from isimed_index.encoders.runtimes.trial import Choice, Job
from isimed_index.errors import (
    IsimedWarning,
    NotFound,
    RecallBelowTarget,
    SqlRefused,
    StoreWarning,
    UsageError,
    WorkerFailed,
)
from isimed_index.frame import read_frame
from isimed_index.index.card import IndexCard
from isimed_index.indexing import IndexReport, IndexStopped
from isimed_index.progress import Silent
from isimed_index.scans.arrays import CHUNK
from isimed_index.store import segment
from isimed_index.store.transaction import Transaction


@pytest.fixture
def store(cohort: Cohort, tmp_path: Path) -> Store:
    """A copy of the indexed cohort that may be written to."""
    return isi.open(shutil.copytree(cohort.store, tmp_path / "store"))


def charts(store: Store) -> dict[str, bytes]:
    card = store.sql("SELECT encoder FROM encoders").column("encoder")[0].as_py()
    path = store.snapshot.frame_path(card)
    assert path is not None
    return {scan: chart.affine.tobytes() for scan, chart in read_frame(path).charts.items()}


def small(folder: Path, name: str = "small") -> Path:
    """A specimen far smaller than a patch."""
    voxels = np.random.default_rng(0).integers(0, 900, (6, 6, 6)).astype(np.int16)
    return write_nifti(folder / f"{name}.nii.gz", voxels, np.diag([4.0, 4.0, 4.0, 1.0]))


def test_a_rerun_changes_nothing(store: Store):
    before = store.generation
    report = store.index()
    assert (report.encoded, report.refused) == ([], [])
    assert sorted(report.skipped) == sorted(copy.stem for copy in (*COPIES, CROPPED))
    assert (report.recall_at_10, report.index_kind) == (1.0, "Flat")
    assert report.patches == store.info()["patches"]
    assert store.generation == before


def test_one_more_scan_extends_the_frame_and_the_index(store: Store, tmp_path: Path):
    old, segments = charts(store), [segment.path for segment in store.snapshot.segments()]
    new = Copy("sub-09_T1w", "IRP", rigid((4, 3, -5), (9, 9, 9)))
    store.add(write_copy(tmp_path / "new", new, head()))
    report = store.index()
    assert report.encoded == ["sub-09_T1w"]
    assert len(report.skipped) == 6
    after = charts(store)
    assert {scan: after[scan] for scan in old} == old
    assert [segment.path for segment in store.snapshot.segments()][:6] == segments
    assert store.info()["indexes"][0]["rows"] == report.patches
    found = store.lookup(new.moved([10, 20, 30]), new.stem, where="scan = 'sub-02_T1w'")[0]
    np.testing.assert_allclose(found.xyz_mm, COPIES[2].moved([10, 20, 30]), atol=1.0)


def test_where_chooses_scans_and_many_new_ones_refit_the_frame(cohort: Cohort, tmp_path: Path):
    store = isi.create(tmp_path / "store")
    store.add(cohort.images, labels="{stem}_seg.nii.gz")
    add_random_encoder(store.path)
    first = store.index(where="subject = 'sub-01'")
    assert sorted(first.encoded) == [COPIES[0].stem, COPIES[1].stem]
    before = charts(store)
    assert sorted(before) == first.encoded
    rest = store.index()
    assert sorted(rest.skipped) == first.encoded
    assert len(rest.encoded) == 4
    assert len(charts(store)) == 6
    assert charts(store)[COPIES[0].stem] != before[COPIES[0].stem]


def test_a_finer_stride_is_encoded_anew_and_answers_from_then_on(store: Store):
    with pytest.raises(UsageError, match="multiple of the encoder's spacing"):
        store.index(stride_mm=5.0)
    coarse = store.snapshot.segments_by_scan(store.snapshot.segments()[0].encoder)
    with (
        pytest.warns(IsimedWarning, match="2 scans are stored at another stride .16 mm."),
        pytest.warns(IsimedWarning, match="4 scans of the store stay at another stride .16 mm."),
    ):
        report = store.index(stride_mm=8.0, where="scan IN ('sub-02_T1w', 'sub-03_T1w')")
    assert sorted(report.encoded) == ["sub-02_T1w", "sub-03_T1w"]
    fine = store.snapshot.segments_by_scan(store.snapshot.segments()[0].encoder)
    assert fine["sub-02_T1w"].rows > 6 * coarse["sub-02_T1w"].rows
    assert fine["sub-04_T1w"].path == coarse["sub-04_T1w"].path
    found = store.lookup(COPIES[2].moved([10, 20, 30]), "sub-02_T1w", where="scan = 'sub-03_T1w'")[0]
    np.testing.assert_allclose(found.xyz_mm, COPIES[3].moved([10, 20, 30]), atol=0.01)


@pytest.mark.filterwarnings(r"ignore:\d+ scans? (is stored|are stored|of the store stay) at another stride")
def test_a_scan_has_one_segment_and_can_go_back_to_an_earlier_stride(store: Store):
    coarse = store.sql("SELECT count(*) AS n FROM patches").to_pylist()
    store.index(stride_mm=8.0, where="scan IN ('sub-02_T1w', 'sub-03_T1w')")
    assert store.sql("SELECT count(*) AS n FROM patches").to_pylist()[0]["n"] > coarse[0]["n"]
    finer = store.index()
    assert sorted(finer.encoded) == ["sub-02_T1w", "sub-03_T1w"]
    assert len(store.snapshot.segments()) == 6
    assert store.sql("SELECT count(*) AS n FROM patches").to_pylist() == coarse
    assert finer.patches == coarse[0]["n"]


def test_a_damaged_frame_is_fitted_again(store: Store):
    frame = store.snapshot.frame_path(store.snapshot.segments()[0].encoder)
    (frame / "template.npy").write_bytes(b"cut off")
    store.refresh()
    with pytest.warns(StoreWarning, match="fitted anew"):
        store.index()
    assert store.lookup(COPIES[2].moved([10, 20, 30]), "sub-02_T1w", same_subject="include")[0].in_view


def test_max_ram_holds_for_an_index_that_is_there(store: Store):
    with pytest.raises(RecallBelowTarget):
        store.index(max_ram=100)


@pytest.mark.parametrize(
    "where", ["true) OR (true", "scan = 'a') UNION ALL SELECT scan FROM scans WHERE (true", "1; SELECT 1"]
)
def test_where_is_a_condition_and_nothing_else(store: Store, where: str):
    with pytest.raises(SqlRefused):
        store.index(where=where)


def test_where_may_hold_a_comment(store: Store):
    assert len(store.index(where="nx > 3 -- all of them").skipped) == 6


def test_a_scan_without_a_single_patch_is_refused_and_the_rest_lands(store: Store, tmp_path: Path):
    store.add(small(tmp_path))
    report = store.index()
    assert [refusal.name for refusal in report.refused] == ["small"]
    assert len(report.skipped) == 6
    assert len(store.snapshot.segments()) == 6
    assert len([*(store.path / "segments").iterdir()]) == 6


def test_when_nothing_can_be_indexed(tmp_path: Path):
    store = isi.create(tmp_path / "store")
    with pytest.raises(NotFound, match="no encoder"):
        store.index()
    add_random_encoder(store.path)
    with pytest.raises(NotFound, match="no scan to index"):
        store.index()
    store.add([small(tmp_path)])
    report = store.index()
    assert (report.patches, len(report.refused), report.recall_at_10) == (0, 1, None)
    with pytest.raises(NotFound):
        store.index(where="false")


def test_a_damaged_scan_is_refused_alone(cohort: Cohort, tmp_path: Path):
    store = isi.create(tmp_path / "store")
    store.add([cohort.file(copy) for copy in COPIES[:3]])
    add_random_encoder(store.path)
    shard = next((store.path / store.snapshot.scan_row(COPIES[1].stem)["artefact"]).glob("0/c/*/*/*"))
    shard.write_bytes(shard.read_bytes()[:-50])
    report = store.index()
    assert [(refusal.name, refusal.kind) for refusal in report.refused] == [(COPIES[1].stem, "store_damaged")]
    assert sorted(report.encoded) == [COPIES[0].stem, COPIES[2].stem]


def test_charts_that_another_process_commits_meanwhile_are_kept(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = isi.create(tmp_path / "store")
    store.add([cohort.file(copy) for copy in COPIES[:4]])
    add_random_encoder(store.path)
    fit, calls = charting.fit_frame, []

    def slow_fit(*args, **kwargs):
        calls.append(1)
        frame = fit(*args, **kwargs)
        if len(calls) == 1:  # while the first process fits two scans, a second one indexes all
            isi.open(store.path).index()
        return frame

    monkeypatch.setattr(charting, "fit_frame", slow_fit)
    store.index(where="subject = 'sub-01'")
    assert len(charts(store)) == 4
    assert len(store.snapshot.artefacts("frame")) == 1
    assert len(store.lookup([10, 20, 30], COPIES[0].stem)) == 2


def test_an_interrupted_index_says_what_is_committed_and_nothing_else(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    store = isi.create(tmp_path / "store")
    store.add([cohort.file(copy) for copy in COPIES[:3]] + [small(tmp_path)])
    add_random_encoder(store.path)
    store.index(where="scan = 'sub-02_T1w'")
    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "commit", stop)  # encoded and staged, and not in the store
        with pytest.raises(IndexStopped) as caught:
            store.index()
    assert (caught.value.report.encoded, caught.value.report.skipped) == ([], ["sub-02_T1w"])
    with monkeypatch.context() as patch:
        patch.setattr(charting, "fit_frame", stop)
        with pytest.raises(IndexStopped, match="of 3 scans 2 are encoded and stay") as caught:
            store.index()
    report = caught.value.report
    assert report.interrupted
    assert sorted(report.encoded) == [COPIES[0].stem, COPIES[1].stem]
    assert report.skipped == ["sub-02_T1w"]
    assert [refusal.name for refusal in report.refused] == ["small"]
    assert (report.patches, report.recall_at_10) == (store.info()["patches"], None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, WorkerFailed, RuntimeError])
def test_a_run_that_ends_in_its_midst_tells_what_a_whole_one_tells(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    store = isi.create(tmp_path / "store")
    store.add([cohort.file(copy) for copy in COPIES[:3]] + [small(tmp_path)])
    add_random_encoder(store.path)

    def ends(tasks: Iterator[EncodeTask], where: Workers, losses: Losses) -> Iterator[list[Encoded]]:
        (first, *others) = (each for batch in encode_batches(tasks, where, losses) for each in batch)
        losses.workers += 2
        yield [first, *(each for each in others if each.task.scan == "small")]
        raise error("the end")

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "encode_batches", ends)
        with pytest.raises(error) as caught:
            store.index(runtime="torch")
    report = caught.value.report
    assert isinstance(report, IndexReport)
    assert report.encoded == store.sql("SELECT DISTINCT scan FROM patches").column("scan").to_pylist() != []
    assert (len(report.encoded), report.patches) == (1, store.info()["patches"])
    assert [refusal.name for refusal in report.refused] == ["small"]
    assert (report.runtime, report.precision, report.workers_lost) == ("torch", "fp32", 2)
    assert report.patches_per_s > 0
    assert report.interrupted == (error is KeyboardInterrupt)
    again = store.index()
    assert (len(again.encoded), again.skipped) == (2, report.encoded)


def test_two_encoders_side_by_side(store: Store):
    first = store.snapshot.encoder_artefact().fields["encoder"]
    second = add_random_encoder(store.path, "other", seed=1)
    store.index(encoder="other", where="subject IN ('sub-01', 'sub-02')")
    assert {row["encoder"]: row["rows"] for row in store.info()["indexes"]}.keys() == {first, second}
    assert len(store.lookup([10, 20, 30], COPIES[0].stem, encoder="other")) == 1
    assert len(store.lookup([10, 20, 30], COPIES[0].stem, encoder="random")) == 4
    with pytest.raises(NotFound, match="did you mean"):
        store.lookup([10, 20, 30], COPIES[0].stem, encoder="othr")


def test_a_missing_index_costs_time_only(store: Store):
    whole = store.search_patches([10, 20, 30], COPIES[0].stem).columns
    index = next((store.path / "indexes").iterdir())
    (index / "index.faiss").write_bytes(b"damaged")
    store.refresh()
    with pytest.warns(UserWarning, match="exact"):
        assert store.search_patches([10, 20, 30], COPIES[0].stem).columns == whole
    with pytest.warns(UserWarning, match="exact"):
        store.index()
    store.refresh()
    assert store.search_patches([10, 20, 30], COPIES[0].stem).columns == whole


def test_a_scan_that_takes_the_id_of_a_deleted_one_does_not_inherit_its_chart(tmp_path: Path) -> None:
    store = isi.create(tmp_path / "c")
    store.add([write_copy(tmp_path / "images", copy, head()) for copy in COPIES[1:4]])
    add_random_encoder(store.path)
    store.index()

    def means(column: str) -> list[float]:
        query = f"SELECT avg({column}) AS mean FROM patches WHERE scan IN ('sub-02_T1w', 'sub-03_T1w') GROUP BY scan"
        return sorted(store.sql(query).column("mean").to_pylist(), key=abs)

    before = np.diff(means("cx_mm"))
    store.delete("scan = 'sub-03_T1w'")
    store.add(write_copy(tmp_path / "other", Copy("sub-03_T1w", "RAS", rigid(shift=(200, 0, 0))), head()))
    store.index()
    assert abs(np.diff(means("x_mm"))) > 100  # it lies elsewhere in patient space,
    assert abs(np.diff(means("cx_mm")) - before) < 10  # and at the same place of the canonical frame


def test_scans_of_which_every_patch_was_deleted_do_not_answer(store: Store) -> None:
    store.delete("scan = 'sub-02_T1w'", "patches")
    found = store.lookup((0, 0, 0), "sub-01_ses-1_T1w", k=20).to_arrow()
    assert "sub-02_T1w" not in found.column("scan").to_pylist()
    store.index()  # and are not encoded again
    assert store.sql("SELECT count(*) AS n FROM patches WHERE scan = 'sub-02_T1w'").to_pylist() == [{"n": 0}]
    store.delete("true", "patches")
    with pytest.raises(NotFound, match="every patch"):
        store.index()


def test_a_purge_builds_anew_for_the_goal_that_was_asked_for(store: Store, tmp_path: Path) -> None:
    store.index(min_recall=0.99, max_ram=2**30, max_latency_ms=1e4)
    report = tmp_path / "erasure.json"
    erased = store.purge("sub-02", report=report)
    assert json.loads(report.read_text())["hits"] == erased.hits == 0
    (encoder,) = erased.index_again
    card = IndexCard.read(store.snapshot.index_path(encoder))
    assert (card.min_recall, card.max_ram_bytes, card.max_latency_ms) == (0.99, 2**30, 1e4)
    assert "sub-02_T1w" not in charts(store)
    assert len(charts(store)) == store.sql("SELECT count(*) AS n FROM scans").column("n")[0].as_py()


def test_a_purge_that_cannot_build_anew_still_reports(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, error: type[BaseException] = ValueError) -> None:
        raise error("too few")

    with monkeypatch.context() as patch:
        patch.setattr(charting, "fit_frame", lambda *_, **__: stop())
        with pytest.warns(StoreWarning, match="too few. Next: isimed index"):
            assert store.purge("sub-02").hits == 0
    store.index()
    report = tmp_path / "erasure.json"
    with monkeypatch.context() as patch:
        patch.setattr(charting, "fit_frame", lambda *_, **__: stop(error=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.purge("sub-03", report=report)
    assert json.loads(report.read_text())["scans"] == 1
    store.index()
    assert "sub-03_T1w" not in charts(store)


def test_an_encoder_whose_patches_all_died_has_nothing_to_build(store: Store) -> None:
    store.delete("true", "patches")
    assert len(store.purge("sub-02").index_again) == 1
    assert store.info()["indexes"] == []


def test_a_template_of_a_deleted_subject_is_fitted_again(store: Store, tmp_path: Path) -> None:
    def template() -> bytes:
        path = store.snapshot.frame_path(store.sql("SELECT encoder FROM encoders").column("encoder")[0].as_py())
        assert path is not None
        return (path / "template.npy").read_bytes()

    before = template()
    store.delete("subject = 'sub-03'")
    store.add(write_copy(tmp_path / "new", Copy("sub-09_T1w", "IRP", rigid((4, 3, -5), (9, 9, 9))), head()))
    store.index()
    assert template() == before
    assert not {"sub-03_T1w"} & charts(store).keys()
    store.gc(keep=1)  # of the subject, nothing but the template is left now
    with pytest.raises(NotFound, match="deleted scans"):  # no file says whose it was: it may be a typing error
        store.purge("sub-03")
    assert store.purge("sub-03", unknown=True).hits == 0
    assert template() != before
    assert "sub-09_T1w" in charts(store)
    with pytest.raises(NotFound):
        store.purge("sub-03", unknown=True)


def test_damaged_voxels_are_refused_by_name_and_the_rest_is_encoded(store: Store) -> None:
    from isimed_index.store import integrity

    encoder = add_random_encoder(store.path, "second", seed=1)
    store.refresh()
    voxels = store.path / store.snapshot.voxels_of["sub-02_T1w"] / "0" / "c" / "0" / "0" / "0"
    content = bytearray(voxels.read_bytes())
    content[50] ^= 1
    voxels.write_bytes(content)
    integrity._verify_hash.cache_clear()
    done = store.index(encoder)
    assert [(refusal.name, refusal.kind) for refusal in done.refused] == [("sub-02_T1w", "store_damaged")]
    assert len(done.encoded) == 5


@pytest.mark.filterwarnings(r"ignore:\d+ scans? (is stored|are stored|of the store stay) at another stride")
def test_a_disk_that_is_full_at_one_scan_costs_that_scan_until_the_next_run(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At another stride, so that there is something to lose: what a scan had stays until its new vectors are there."""
    others, full = ["sub-02_T1w", "sub-04_T1w"], "sub-03_T1w"
    where = f"scan IN ('{full}', '{others[0]}', '{others[1]}')"
    line = ["index", "-s", str(store.path), "--stride", "32", "--where", where, "--json", "--no-progress"]
    before, plain = segment_vectors(store.path), segment.write_segment
    room, written = False, []

    def write(directory: Path, rows: pa.Table, outputs: dict[str, Any]) -> dict[str, Any]:
        written.append(rows.column("scan")[0].as_py())
        if written[-1] == full and not room:
            (directory / "embedding.npy").write_bytes(bytes(1000))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory / "embedding.npy"))
        return plain(directory, rows, outputs)

    monkeypatch.setattr(segment, "write_segment", write)
    assert main(line) == 3
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert (sorted(report["encoded"]), report["refused"]) == (others, [full])
    (told,) = [text for text in said.err.splitlines() if full in text]
    assert "store_full" in told
    now = segment_vectors(store.path)
    assert {scan for scan in now if now[scan] != before[scan]} == set(others)
    assert now.keys() == before.keys()
    assert isi.check(store.path) == []
    room, written = True, []
    assert main(line) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["encoded"], sorted(report["skipped"]), written) == ([full], others, [full])
    after = segment_vectors(store.path)
    assert {scan for scan in after if after[scan] != now[scan]} == {full}


def test_a_scan_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator reads its files, too, to hash them; it decodes nothing."""
    template = head()
    beside = [(CHUNK - n // 2, CHUNK - (n - n // 2)) for n in template.values.shape[:2]]  # a part of it in each chunk
    voxels = np.pad(np.rint(template.values * 1000).astype(np.int16), [*beside, (0, 0)])
    labels = np.pad(template.labels, [*beside, (0, 0)])
    write_nifti(tmp_path / "s_seg.nii.gz", labels, template.affine)
    store = isi.create(tmp_path / "store")
    store.add(write_nifti(tmp_path / "s.nii.gz", voxels, template.affine), labels="{stem}_seg.nii.gz")
    add_random_encoder(store.path)
    decoded: list[bytes] = []
    plain = BloscCodec._decode_single

    async def decode(codec: BloscCodec, content: Any, spec: Any) -> Any:
        decoded.append(content.to_bytes())
        return await plain(codec, content, spec)

    monkeypatch.setattr(BloscCodec, "_decode_single", decode)
    assert store.index(stride_mm=32.0, runtime="torch").encoded == ["s"]
    assert len(decoded) == len(set(decoded)) == 2 * 4  # chunks of the image and of its label map


# -- runtimes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with scans and an encoder, nothing encoded; graphs of other runtimes in a cache of its own."""
    pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = isi.create(tmp_path / "fresh")
    store.add(cohort.images)
    add_random_encoder(store.path)
    return store


ONE, TWO = "scan = 'sub-02_T1w'", "scan IN ('sub-02_T1w', 'sub-03_T1w')"


def runtimes(store: Store) -> list[str]:
    return [segment.artefact.fields["runtime"]["name"] for segment in store.snapshot.segments()]


def test_a_short_job_runs_on_torch_without_a_trial(fresh: Store):
    report = fresh.index(where=ONE)
    assert (report.runtime, report.precision, report.trial_patches_per_s) == ("torch", "fp32", {})
    assert (report.patches_per_s is None, report.bare_patches_per_s, report.share_of_bare) == (False, None, None)
    assert runtimes(fresh) == ["torch"]
    again = fresh.index(where=ONE)
    assert (again.runtime, again.precision, again.patches_per_s) == ("", "", None)


def test_what_is_counted_is_as_many_as_there_are(fresh: Store):
    """Two scans have two charts, also where these are fitted in two rounds."""
    shown = Notes([])
    fresh.index(where=TWO, progress=shown)
    tasks = ("runtime", "encode", "frame, round 1 of 2", "frame, round 2 of 2", "regions")
    assert shown.counts == {task: [1, 1] if task == "runtime" else [2, 2] for task in tasks}


def test_a_long_job_without_a_trial_is_compared_with_the_bare_network(fresh: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "_LONG", 1)
    monkeypatch.setattr(trial, "_EDGE", 8)
    notes: list[str] = []
    report = fresh.index(where=ONE, runtime="torch", progress=Notes(notes))
    assert report.trial_patches_per_s == {}
    assert report.bare_patches_per_s is not None
    assert report.share_of_bare == pytest.approx(report.patches_per_s / report.bare_patches_per_s)
    assert any(note.startswith(f"{report.patches:,} patches") for note in notes)


class Notes(Silent):
    """Keeps what a job says of itself."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self.counts: dict[str, list[int]] = {}  # by task: how many, and how many came

    def start(self, task: str, total: int | None, unit: str) -> None:
        self.counts[task] = [total or 0, 0]

    def advance(self, n: int = 1, note: str = "") -> None:
        self.notes.append(note)
        list(self.counts.values())[-1][1] += n


def test_a_runtime_by_name_is_recorded_and_gone_on_with(fresh: Store):
    assert fresh.index(where=ONE, runtime="openvino").runtime == "openvino"
    assert fresh.index(where=TWO).runtime == "openvino"  # auto: as this encoder's scans were encoded before
    assert fresh.index(where="scan = 'sub-04_T1w'", runtime="torch").runtime == "torch"
    assert runtimes(fresh) == ["openvino", "openvino", "torch"]
    assert fresh.snapshot.segments()[0].artefact.fields["runtime"]["precision"] == "fp32"


def test_a_runtime_that_has_nothing_left_to_encode_is_told_of(fresh: Store):
    """Its name in a command does not mean that it made the vectors."""
    fresh.index(where=ONE, runtime="openvino")
    report = fresh.index(where=ONE, runtime="torch")
    assert (report.encoded, report.runtime, report.skipped_by) == ([], "", {"openvino/fp32": 1})
    report = fresh.index(where=TWO, runtime="torch")
    assert (report.runtime, report.skipped_by) == ("torch", {"openvino/fp32": 1})
    assert fresh.index(where=TWO).skipped_by == {"openvino/fp32": 1, "torch/fp32": 1}
    fresh.compact()
    assert fresh.index(where=TWO).skipped_by == {"unknown": 2}  # packed together, they do not say it any more


def test_scans_in_another_precision_are_encoded_again(fresh: Store):
    """As with another stride: what a store says it has in float32 must not be bfloat16 that was there before."""
    assert len(fresh.index(where=TWO, runtime="torch", precision="bf16").encoded) == 2
    assert fresh.index(where=TWO, precision="bf16").skipped == ["sub-02_T1w", "sub-03_T1w"]
    rough = fresh.snapshot.segments()[0].vectors("embedding").tobytes()
    report = fresh.index(where=TWO)
    assert (report.encoded, report.skipped, report.precision) == (["sub-02_T1w", "sub-03_T1w"], [], "fp32")
    now = fresh.snapshot.segments()
    assert [segment.artefact.fields["runtime"]["precision"] for segment in now] == ["fp32", "fp32"]
    assert now[0].vectors("embedding").tobytes() != rough


@pytest.mark.parametrize("verb", ["index", "plan_index"])
def test_a_stride_at_which_no_work_is_shared_is_told_before_it_starts(
    fresh: Store, monkeypatch: pytest.MonkeyPatch, verb: str
):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    ask = getattr(fresh, verb)
    monkeypatch.setattr(indexing, "encode_batches", stop)
    monkeypatch.setattr(planning, "measure", stop)
    near = r"stride of 24 mm patches share no work.* are 16 and 32 mm. Next: isimed index --stride 32$"
    with pytest.warns(IsimedWarning, match=near), pytest.raises(KeyboardInterrupt):
        ask(where=ONE, stride_mm=24.0, runtime="torch")
    for shared in (4.0, 8.0, 16.0, 48.0):  # not told of: warnings are errors here
        with pytest.raises(KeyboardInterrupt):
            ask(where=ONE, stride_mm=shared, runtime="torch")


@pytest.mark.parametrize("wrong", ["nonsense", "processes:0", "processes:many"])
def test_a_misspelt_scheduler_is_refused_also_when_there_is_nothing_to_encode(cohort: Cohort, wrong: str):
    with pytest.raises(UsageError, match="expected"):
        isi.open(cohort.store, mode="a").index(scheduler=wrong)


def test_packed_scans_still_say_what_encoded_them(fresh: Store):
    fresh.index(where=TWO, runtime="openvino")
    before = fresh.snapshot.segments()[0].artefact.fields["runtime"]
    fresh.compact()
    assert len({segment.path for segment in fresh.snapshot.segments()}) == 1
    assert fresh.snapshot.segments()[0].artefact.fields["runtime"] == before
    assert fresh.index(where="scan = 'sub-04_T1w'").runtime == "openvino"
    fresh.index(where="scan = 'sub-05_T1w'", runtime="torch")
    fresh.compact()
    assert "runtime" not in fresh.snapshot.segments()[0].artefact.fields  # of several


def test_a_rerun_in_a_runtime_ends_with_the_same_bits(fresh: Store):
    fresh.index(where=ONE, runtime="openvino")
    first = fresh.snapshot.segments()[0]
    before = first.vectors("embedding").tobytes()
    with pytest.warns(
        IsimedWarning, match=r"^1 scan is stored at another stride \(16 mm\), which this one of 32 mm, takes"
    ):
        assert fresh.index(where=ONE, runtime="openvino", stride_mm=32.0).stride_mm == 32.0
    own = r"\(32 mm\), which this one of 16 mm, the encoder's own, takes the place of. To keep theirs: .* --stride 32$"
    with pytest.warns(IsimedWarning, match=own):
        fresh.index(where=ONE, runtime="openvino")
    again = fresh.snapshot.segments()[0]
    assert again.path != first.path
    assert again.vectors("embedding").tobytes() == before


def test_lattices_that_differ_within_a_store_are_told_of(fresh: Store):
    fresh.index(where=ONE, stride_mm=32.0)
    rest = f"NOT ({ONE})"
    mixed = (
        r"^1 scan of the store stays at another stride \(32 mm\) than this one of 16 mm.*--stride 16 without --where$"
    )
    with pytest.warns(IsimedWarning, match=mixed):
        assert fresh.plan_index(where=rest).stride_mm == 16.0
    with pytest.warns(IsimedWarning, match=mixed):
        fresh.index(where=rest)
    fresh.compact()
    with pytest.warns(IsimedWarning, match=mixed):  # packed segments know it, too
        fresh.index(where=rest)


def test_scans_of_too_few_patches_for_a_chart_are_told_of(fresh: Store):
    fresh.index(where=ONE)
    few = fresh.sql("SELECT patch FROM patches ORDER BY patch LIMIT 11").column("patch").to_pylist()
    fresh.delete(f"patch > {few[-1]}", "patches")
    with pytest.warns(IsimedWarning, match=r"^1 of 1 encoded scans have fewer than 12 patches \("):
        fresh.index(where=ONE)


def test_a_long_job_has_one_trial_and_says_what_it_found(fresh: Store, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def tried(job: Job) -> Choice:
        asked.append(job)
        return Choice(Runtime("openvino"), {"torch": 100.0, "openvino": 230.0}, {"onnx": "it fails"})

    monkeypatch.setattr(cluster, "_choose", tried)
    with pytest.warns(IsimedWarning, match="runtime onnx is left aside: it fails"):
        report = fresh.index(where=TWO)
    assert (report.runtime, report.trial_patches_per_s) == ("openvino", {"torch": 100.0, "openvino": 230.0})
    assert report.bare_patches_per_s == 230.0  # of one process
    assert report.patches_per_s == pytest.approx(230.0 * report.share_of_bare)
    assert runtimes(fresh) == ["openvino", "openvino"]
    (job,) = asked
    assert report.patches <= job.patches <= 3 * report.patches  # it counts air as well
    assert (job.before, job.asked, job.stride_vox) == (None, Runtime(), 4)


def test_an_interrupted_job_goes_on_as_it_began(fresh: Store, monkeypatch: pytest.MonkeyPatch):
    """Whatever a second trial would say, and however PyTorch came to be chosen; a longer job is tried anew."""
    jobs: list[Job] = []

    def chosen(job: Job) -> Choice:
        jobs.append(job)
        return Choice(Runtime("torch", auto=Auto(job.patches, trial=False)))

    monkeypatch.setattr(cluster, "_choose", chosen)
    fresh.index(where=TWO)
    fresh.index(where="scan = 'sub-04_T1w'")  # no longer than two were
    fresh.compact()
    fresh.index(where="scan = 'sub-05_T1w'")
    assert [(job.before, job.settled) for job in jobs] == [(None, False), ("torch", True), ("torch", True)]
    assert fresh.snapshot.segments()[0].artefact.fields["runtime"]["auto"]["patches"] == jobs[0].patches
    now, options = fresh.snapshot, planning.IndexOptions(encoder=fresh.encoders().column("encoder")[0].as_py())
    wanted = planning.what_is_wanted(now, [], options)
    longer = planning.job_of(now, wanted, jobs[0].patches + 1, options)
    assert (longer.before, longer.settled) == ("torch", False)


def test_what_a_trial_chose_is_gone_on_with_however_long_the_job(fresh: Store, monkeypatch: pytest.MonkeyPatch):
    jobs: list[Job] = []

    def chosen(job: Job) -> Choice:
        jobs.append(job)
        return Choice(Runtime("torch", auto=Auto(job.patches, trial=len(jobs) == 1)))

    monkeypatch.setattr(cluster, "_choose", chosen)
    fresh.index(where=ONE)
    fresh.index(where=TWO + " OR scan = 'sub-04_T1w'")
    assert [(job.before, job.settled) for job in jobs] == [(None, False), ("torch", True)]
    assert jobs[1].patches > jobs[0].patches


def test_a_runtime_that_does_not_exist_is_refused_before_anything(fresh: Store):
    before = fresh.generation
    with pytest.raises(UsageError, match="found 'tensorrt'"):
        fresh.index(runtime="tensorrt")
    with pytest.raises(UsageError, match="onnx has no precision bf16"):
        fresh.index(runtime="onnx", precision="bf16")
    assert fresh.generation == before
