"""Charts are committed in groups: an interruption keeps them, and ends nowhere else than a run without one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cohorts import shifted_heads

import isimed_index as isi
from isimed_index import charting
from isimed_index.api import Store
from isimed_index.encoders.card import read_card
from isimed_index.errors import NotFound, StoreWarning
from isimed_index.frame import LEAST_POINTS, Chart, Frame, fit_chart, read_frame, write_frame
from isimed_index.progress import Silent
from isimed_index.store.files import NEXT_FRAME

SCANS = 7
FEW = "scan IN ('sub-00', 'sub-01', 'sub-02')"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven heads, of which three have charts, and the vectors of the others."""
    store = shifted_heads(tmp_path_factory.mktemp("charting"), SCANS)
    isi.open(store).index(where=FEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charting, "fit_frame", stop)
        with pytest.raises(KeyboardInterrupt):
            isi.open(store).index()
    return store


@pytest.fixture
def store(encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A copy of it, where a template is made from four scans, and two charts are worth a commit."""
    monkeypatch.setattr(charting, "FOUNDERS", 4)
    monkeypatch.setattr(charting, "_GROUP", 2)
    return isi.open(shutil.copytree(encoded, tmp_path / "store"))


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def frame_of(store: Store) -> Path:
    store.refresh()
    (artefact,) = store.snapshot.artefacts("frame")
    return store.path / artefact.path


def without_frame(store: Store) -> Store:
    """The store as if its vectors had just been encoded."""
    from isimed_index.store.repository import Repository
    from isimed_index.store.transaction import Proposal

    derived = [made.path for kind in ("frame", "index", "region") for made in store.snapshot.artefacts(kind)]
    with Repository.open(store.path).transaction("index") as transaction:
        transaction.commit(lambda _: Proposal(drop=derived))
    store.refresh()
    return store


def without_charts(store: Store, scans: list[str]) -> Store:
    """The store with a frame that lacks some scans, as if they had come later."""
    from isimed_index.store.repository import Repository
    from isimed_index.store.transaction import Proposal

    (made,) = store.snapshot.artefacts("frame")
    frame = read_frame(store.path / made.path)
    fewer = replace(frame, charts={scan: chart for scan, chart in frame.charts.items() if scan not in scans})
    with Repository.open(store.path).transaction("index") as transaction:
        directory = transaction.stage("frame")
        write_frame(directory, fewer, store.snapshot.voxels_of)
        artefact = transaction.add("frame", directory, encoder=frame.encoder)
        transaction.commit(lambda _: Proposal(add=[artefact], drop=[made.path]))
    store.refresh()
    return store


def bits(frame: Frame) -> tuple[dict[str, bytes], bytes]:
    return {scan: chart.affine.tobytes() for scan, chart in frame.charts.items()}, frame.template.vectors.tobytes()


def index_until(store: Store, groups: int) -> None:
    """Index, and Ctrl-C in the midst of the group after so many."""
    extend, done = charting.extend_frame, []

    def extend_some(*arguments: object) -> Frame:
        done.append(1)
        return extend(*arguments) if len(done) <= groups else stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charting, "extend_frame", extend_some)
        with pytest.raises(KeyboardInterrupt):
            store.index()


def test_an_interruption_costs_a_group_and_changes_no_bit(store: Store, tmp_path: Path):
    plain = without_frame(isi.open(shutil.copytree(store.path, tmp_path / "plain")))
    plain.index()
    without_frame(store)
    index_until(store, 1)
    kept = read_frame(frame_of(store))
    assert len(kept.charts) == 4 + 2
    assert kept.awaited == SCANS - 6
    (lacking,) = set(store.scans().column("scan").to_pylist()) - kept.charts.keys()
    with pytest.warns(StoreWarning, match=rf"1 of 7 encoded scans have no chart yet, and cannot answer \({lacking}\)"):
        assert len(store.lookup((10, 20, 30), "sub-00", k=SCANS)) == 5  # what has a chart answers
    assert store.info()["awaited"] == [{"encoder": kept.encoder, "scans": 1, "named": [lacking]}]
    with pytest.raises(NotFound, match="has no chart in the frame"):
        store.lookup((10, 20, 30), lacking)

    fitted = []
    with pytest.MonkeyPatch.context() as patch:
        fit = charting.extend_frame
        patch.setattr(charting, "fit_frame", stop)
        patch.setattr(charting, "extend_frame", lambda *a: fitted.extend(a[1]) or fit(*a))
        store.index()
    assert sorted(fitted) == sorted(set(store.scans().column("scan").to_pylist()) - kept.charts.keys())
    whole = read_frame(frame_of(store))
    assert (len(whole.charts), whole.awaited) == (SCANS, 0)
    assert store.info()["awaited"] == []
    assert bits(whole) == bits(read_frame(frame_of(plain)))
    for n in range(1, SCANS):
        found = store.lookup((10, 20, 30), "sub-00", where=f"scan = 'sub-{n:02d}'")[0]
        np.testing.assert_allclose(found.xyz_mm, (10 + n, 20 - n, 30 + 2 * n), atol=1.0)


def test_a_frame_answers_until_its_successor_is_whole(store: Store):
    before = bits(read_frame(frame_of(store)))
    index_until(store, 1)
    assert bits(read_frame(frame_of(store))) == before
    assert len(store.lookup((10, 20, 30), "sub-00")) == 2
    successor = read_frame(frame_of(store) / NEXT_FRAME)
    assert len(successor.charts) == 6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charting, "fit_frame", stop)
        store.index()
    after = read_frame(frame_of(store))
    assert len(after.charts) == SCANS
    assert bits(after)[1] == bits(successor)[1]
    assert bits(after)[0]["sub-00"] != before[0]["sub-00"]  # the mean of all is the identity
    assert {scan: after.charts[scan].affine.tobytes() for scan in successor.charts} == bits(successor)[0]
    assert not (frame_of(store) / NEXT_FRAME).exists()


def test_scans_that_no_chart_has_are_counted_and_some_are_named(store: Store):
    """Also where the frame is whole for what there was when it was fitted, is damaged, or is not there."""
    encoder = read_frame(frame_of(store)).encoder
    assert store.info()["awaited"] == [
        {"encoder": encoder, "scans": 4, "named": ["sub-03", "sub-04", "sub-05", "sub-06"]}
    ]
    (frame_of(store) / "charts.parquet").write_bytes(b"damaged")
    all_of_them = {"encoder": encoder, "scans": SCANS, "named": [f"sub-{n:02d}" for n in range(5)]}
    assert store.info()["awaited"] == [all_of_them]
    assert without_frame(store).info()["awaited"] == [all_of_them]
    store.delete("scan IN ('sub-00', 'sub-02')", "patches")
    assert store.info()["awaited"][0]["named"] == ["sub-01", "sub-03", "sub-04", "sub-05", "sub-06"]


@pytest.mark.filterwarnings("ignore:.* at another stride")
def test_charts_of_a_coarse_stride_are_fitted_anew_at_a_finer_one(store: Store, tmp_path: Path):
    plain = without_frame(isi.open(shutil.copytree(store.path, tmp_path / "plain")))
    plain.index()
    store.index(stride_mm=32)
    store.index()
    assert bits(read_frame(frame_of(store))) == bits(read_frame(frame_of(plain)))


@pytest.mark.filterwarnings("ignore:.* at another stride")
def test_a_coarse_chart_among_fine_ones_is_fitted_anew_when_its_scan_gets_finer(store: Store):
    """The template is fine by then: what is coarse is known of each chart alone."""
    store.index()
    store.index(where="scan = 'sub-06'", stride_mm=32)
    without_charts(store, ["sub-06"]).index(where="scan = 'sub-06'", stride_mm=32)
    before = read_frame(frame_of(store))
    strides = {scan: chart.stride_mm for scan, chart in before.charts.items()}
    assert strides == {f"sub-{n:02d}": 16.0 for n in range(SCANS - 1)} | {"sub-06": 32.0}
    store.index()
    after = read_frame(frame_of(store))
    assert after.charts["sub-06"].stride_mm == 16.0
    assert after.charts["sub-06"].affine.tobytes() != before.charts["sub-06"].affine.tobytes()
    assert after.charts["sub-00"].affine.tobytes() == before.charts["sub-00"].affine.tobytes()
    assert (after.awaited, store.info()["awaited"]) == (0, [])


def test_a_frame_is_fitted_anew_on_request(store: Store):
    """In groups as the first one; it ends as the first one would, and nothing is left of the one before."""
    store.index()
    before = bits(read_frame(frame_of(store)))
    fitted: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        fit, extend = charting.fit_frame, charting.extend_frame
        patch.setattr(charting, "fit_frame", lambda *a, **k: fitted.append("founders") or fit(*a, **k))
        patch.setattr(charting, "extend_frame", lambda *a: fitted.append(len(a[1])) or extend(*a))
        store.index(refit=True)
    assert fitted == ["founders", 2, 1]
    where = frame_of(store)
    refitted = read_frame(where)
    assert (len(refitted.charts), refitted.awaited) == (SCANS, 0)
    assert not (where / NEXT_FRAME).exists()
    assert bits(refitted) == before  # which was fitted to the same scans
    store.index()
    assert frame_of(store) == where


def test_a_chart_of_too_few_points_does_not_hold(store: Store):
    """An affine goes through four points exactly: a residual of 0.0 mm would say nothing."""
    template = read_frame(frame_of(store)).template
    few = np.zeros_like(template.mask)
    few[tuple(np.argwhere(template.mask)[: LEAST_POINTS - 1].T)] = True
    for lattice, onto in ((replace(template, mask=few), template), (template, replace(template, mask=few))):
        chart = fit_chart(lattice, onto)
        assert (chart.holds, chart.residual_mm) == (False, float("inf"))
    assert fit_chart(template, template).residual_mm < 1.0


def test_names_are_some():
    assert charting.some_of(["a"]) == "a"
    assert charting.some_of(list("abcde")) == "a, b, c, d, e"
    assert charting.some_of(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_a_successor_that_cannot_be_used_is_begun_again(store: Store, monkeypatch: pytest.MonkeyPatch):
    index_until(store, 1)
    there, asked = charting._successor, []

    def unusable_once(*arguments: object) -> Frame | None:
        asked.append(1)
        return there(*arguments) if len(asked) > 1 else None

    monkeypatch.setattr(charting, "_successor", unusable_once)
    store.index()
    assert len(read_frame(frame_of(store)).charts) == SCANS


def test_a_purge_finds_a_subject_in_the_successor_alone(store: Store):
    index_until(store, 1)
    gone = next(scan for scan in read_frame(frame_of(store) / NEXT_FRAME).charts if scan > "sub-02")
    assert gone not in read_frame(frame_of(store)).charts
    assert store.purge(gone).hits == 0
    tables = list((store.path / "frames").rglob("charts.parquet"))
    assert tables
    assert all(gone not in pq.read_table(table).column("scan").to_pylist() for table in tables)


def test_scans_that_come_while_a_frame_grows_are_charted_too(store: Store, monkeypatch: pytest.MonkeyPatch):
    without_frame(store)
    index_until(store, 0)
    store.delete("scan = 'sub-06'")  # one of those that are awaited, or a founder: both are possible
    fits = []
    fit = charting.fit_frame
    monkeypatch.setattr(charting, "fit_frame", lambda *a, **k: fits.append(1) or fit(*a, **k))
    store.index()
    assert not fits
    assert read_frame(frame_of(store)).charts.keys() == {f"sub-{n:02d}" for n in range(SCANS - 1)}


def test_scans_of_which_every_patch_was_deleted_found_nothing(store: Store):
    """Here all that would be chosen among the names are such scans."""
    without_frame(store)
    names = [f"sub-{n:02d}" for n in range(SCANS)]
    assert not {"sub-01", "sub-03"} & set(charting._founders(names))
    store.delete("scan NOT IN ('sub-01', 'sub-03')", "patches")
    store.index()
    charts = read_frame(frame_of(store)).charts
    assert list(charts) != names  # founders first
    assert sorted(charts) == names
    assert {scan for scan, chart in charts.items() if chart.holds} == {"sub-01", "sub-03"}
    assert [match.scan for match in store.lookup((11, 19, 32), "sub-01", k=SCANS)] == ["sub-03"]


def test_no_frame_is_made_of_scans_without_patches(store: Store):
    from isimed_index.store.repository import Repository

    without_frame(store).delete("true", "patches")
    repository = Repository.open(store.path)
    card = read_card(repository.snapshot().encoder_path())
    with pytest.raises(NotFound, match="none of 7 scans has a patch"), repository.transaction("index") as transaction:
        charting.commit_frame(transaction, card, Silent())


def test_founders_are_spread_among_the_names(monkeypatch: pytest.MonkeyPatch):
    names = [f"{site}-{n:04d}" for site in "abcd" for n in range(250)]
    founders = charting._founders(names)
    assert len(set(founders)) == charting.FOUNDERS == 128
    assert founders == sorted(founders)
    assert {site: sum(name[0] == site for name in founders) for site in "abcd"} == dict.fromkeys("abcd", 32)
    assert charting._founders(names[:128]) == names[:128]


def test_progress_counts_every_chart_once_a_round(store: Store):
    class Counted(Silent):
        def __init__(self) -> None:
            self.totals: dict[str, int | None] = {}
            self.done: dict[str, int] = {}
            self.open = ""

        def start(self, task: str, total: int | None, unit: str) -> None:
            assert task not in self.totals
            self.totals[task], self.open, self.done[task] = total, task, 0

        def advance(self, n: int = 1, note: str = "") -> None:
            self.done[self.open] += n

    counted = Counted()
    store.index(progress=counted)
    del counted.totals["regions"], counted.done["regions"]
    assert counted.totals == counted.done == {"frame, round 1 of 2": 4, "frame, round 2 of 2": 4, "frame": SCANS - 4}


def test_lattices_beyond_what_memory_is_for_are_read_again(store: Store, monkeypatch: pytest.MonkeyPatch):
    plain = isi.open(shutil.copytree(store.path, store.path.with_name("plain")))
    plain.index()
    monkeypatch.setattr(charting, "_KEPT_BYTES", 0)
    store.index()
    assert bits(read_frame(frame_of(store))) == bits(read_frame(frame_of(plain)))


def test_an_older_frame_says_nothing_of_awaited_scans(store: Store):
    import json

    path = frame_of(store) / "frame.json"
    content = json.loads(path.read_text())
    assert content.pop("awaited") == 0
    copy = shutil.copytree(path.parent, store.path.with_name("older"))
    (copy / "frame.json").write_text(json.dumps(content))
    older = read_frame(copy)
    assert older.awaited == 0
    assert all(isinstance(chart, Chart) for chart in older.charts.values())
