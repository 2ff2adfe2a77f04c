"""What an encoding would take: the arithmetic by hand, the measurement against what a run then does."""

from __future__ import annotations

import hashlib
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from cohorts import COPIES, CROPPED, Cohort, add_random_encoder, tiny_scan

import isimed_index as isi
from isimed_index import planning
from isimed_index.api import Store
from isimed_index.encode import IndexPlan, Pace, Size, forecast, foresee, most_telling, pace, scan
from isimed_index.encode.forecast import Measured, Sample
from isimed_index.encoders.card import EncoderCard, read_card
from isimed_index.encoders.protocol import Vectors
from isimed_index.encoders.runtime import NetworkEncoder, load_encoder
from isimed_index.encoders.runtimes import trial
from isimed_index.errors import NotFound, UsageError
from isimed_index.grid import PatchGrid
from isimed_index.scans.prepare import Volume
from isimed_index.store import integrity

CARD = EncoderCard(
    name="by hand",
    factory="",
    network={},
    weights_sha256="",
    patch_vox=32,
    stride_vox=4,
    spacing_mm=4.0,
    outputs={"position": 3, "descriptor": 10},
    match_output="descriptor",
    metric="l2",
    training={},
)
# 100 of 400 lattice points hold foreground; 10 patches/s; 2 s for 1000 voxels; 5 bytes a row beside its vectors.
SAMPLE = Sample("a", voxels=1000, points=400, patches=100, read_s=2.0, encoded=50, encode_s=5.0, row_bytes=500)
MEASURED = Measured((SAMPLE,), bare_patches_per_s=12.0, load_s=0.5, bytes_a_voxel=20.0, process_bytes=1_000_000)
A, B, C = Size("a", 1000, 400), Size("b", 3000, 1200), Size("c", 500, 200)


def planned(sizes: list[Size], measured: Measured = MEASURED, processes: int = 1, overlap: bool = True) -> IndexPlan:
    return foresee(IndexPlan("c0ffee"), CARD, sizes, measured, processes=processes, overlap=overlap)


def test_numbers_of_one_process():
    plan = planned([A, B])
    assert plan.patches == 100 + 300
    assert plan.bytes_written == 400 * (3 * 4 + 10 * 2 + 5) + 2 * 2 * 128  # positions are stored in 32 bits
    assert (plan.patches_per_s, plan.bare_patches_per_s) == (10.0, 12.0)
    # 8 s of reading lie beside the encoding, but for one scan's.
    assert plan.seconds == pytest.approx(0.5 + 40.0 + 8.0 / 2)
    vectors = 1200 * 13 * 6
    assert plan.memory_bytes == 1_000_000 - 20 * 1000 + 2 * (20 * 3000 + vectors)
    assert plan.measured_scans == ["a"]
    assert plan.basis == {
        "patches": "extrapolated",
        "patches_per_s": "measured",
        "bare_patches_per_s": "measured",
        "bytes_written": "extrapolated",
        "seconds": "extrapolated",
        "memory_bytes": "extrapolated",
    }


def test_of_a_scan_that_was_measured_the_patches_are_known():
    plan = planned([A])
    assert (plan.patches, plan.basis["patches"]) == (100, "measured")
    assert plan.seconds == pytest.approx(0.5 + 10.0 + 2.0)  # nothing to overlap with
    assert plan.memory_bytes == 1_000_000 + 400 * 13 * 6  # no second scan either


def test_reading_may_be_what_takes_long():
    slow = replace(MEASURED, samples=(replace(SAMPLE, read_s=100.0),))
    assert planned([A, B], slow).seconds == pytest.approx(0.5 + 400.0 + 40.0 / 2)


def test_several_processes_share_scans_and_add_up():
    plan = planned([A, B, C], processes=2, overlap=False)
    assert plan.patches == 450
    assert plan.seconds == pytest.approx(0.5 + 2 / 3 * (45.0 + 9.0))  # one of the two has two scans of three
    assert (plan.patches_per_s, plan.basis["patches_per_s"]) == (20.0, "extrapolated")  # one was measured, alone
    assert plan.memory_bytes == 2 * (1_000_000 - 20 * 1000 + 20 * 3000 + 1200 * 13 * 6)
    idle = planned([A], processes=8)
    assert idle.memory_bytes == planned([A]).memory_bytes
    assert idle.seconds == planned([A]).seconds


def test_without_a_measurement_there_is_an_upper_bound_and_nothing_else():
    plan = planned([A, B], Measured())
    assert (plan.patches, plan.seconds, plan.patches_per_s, plan.memory_bytes) == (1600, None, None, None)
    assert plan.basis == {"patches": "upper bound", "bytes_written": "upper bound"}


def test_scans_of_air_alone_cost_their_reading():
    plan = planned([A, B], replace(MEASURED, samples=(replace(SAMPLE, patches=0, encoded=0, encode_s=0.0),)))
    assert (plan.patches, plan.patches_per_s, plan.seconds) == (0, None, pytest.approx(8.5))


def test_the_middle_the_largest_and_the_smallest_scan_tell_most():
    sizes = [Size(str(n), n, n) for n in (5, 1, 9, 3, 7)]
    assert [size.voxels for size in most_telling(sizes)] == [5, 9, 1]
    assert [size.voxels for size in most_telling(sizes[:2])] == [5, 1]
    assert most_telling(sizes[:1]) == sizes[:1]
    assert most_telling([]) == []


# -- a store --------------------------------------------------------------------------------------------------------

VOXELS_PER_S, PATCHES_PER_S = 20_000, 100


@pytest.fixture
def fresh(cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Scans and an encoder, nothing encoded; the bare network is measured on very little noise, and no other tried."""
    monkeypatch.setattr(trial, "_EDGE", 8)
    monkeypatch.setattr(trial, "WORTH_S", 1e9)
    store = isi.create(tmp_path / "fresh")
    store.add(cohort.images, labels="{stem}_seg.nii.gz")
    add_random_encoder(store.path)
    return store


def content(store: Store) -> dict[str, str]:
    """The hash of every file of a store that nobody has open."""
    store.close()
    files = sorted(path for path in store.path.rglob("*") if path.is_file())
    return {str(path.relative_to(store.path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_does_what_its_plan_said(fresh: Store):
    before, resident = content(fresh), psutil.Process().memory_info().rss
    plan = fresh.plan_index()
    assert content(fresh) == before
    assert plan.to_encode == fresh.snapshot.scan_ids()
    assert sorted(plan.to_encode) == sorted(copy.stem for copy in (*COPIES, CROPPED))
    assert (plan.skipped, plan.damaged, plan.runtime, plan.precision) == ([], [], "torch", "fp32")
    assert len(plan.measured_scans) == 3
    report = fresh.index()
    assert (report.encoder, report.runtime) == (plan.encoder, plan.runtime)
    assert abs(plan.patches - report.patches) <= 0.02 * report.patches
    written = [path.stat().st_size for path in (fresh.path / "segments").rglob("*.[np]*")]
    assert abs(plan.bytes_written - sum(written)) <= 0.02 * sum(written)
    assert plan.seconds is not None
    assert plan.seconds > 0
    assert plan.memory_bytes is not None
    assert resident <= plan.memory_bytes < 2**40
    again = fresh.plan_index()
    assert (again.to_encode, len(again.skipped), again.patches) == ([], 6, 0)
    assert (again.seconds, again.basis) == (None, {"patches": "measured", "bytes_written": "measured"})


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """What reading and encoding cost by a clock that nothing else moves: `VOXELS_PER_S` and `PATCHES_PER_S`, always."""
    spent: dict[str, list[float]] = {"read": [], "encode": []}
    clock = SimpleNamespace(perf_counter=lambda: sum(map(sum, spent.values())))
    for module in (forecast, trial):
        monkeypatch.setattr(module, "time", clock)
    scale, encode = scan.prepared, NetworkEncoder.encode_grid

    def prepared(values: np.ndarray, *others: Any) -> Volume:
        spent["read"].append(values.size / VOXELS_PER_S)
        return scale(values, *others)

    def encode_grid(encoder: NetworkEncoder, volume: Volume, grid: PatchGrid, numbers: np.ndarray) -> Vectors:
        spent["encode"].append(len(numbers) / PATCHES_PER_S)
        return encode(encoder, volume, grid, numbers)

    monkeypatch.setattr(scan, "prepared", prepared)
    monkeypatch.setattr(NetworkEncoder, "encode_grid", encode_grid)
    return spent


def test_the_time_of_a_known_speed_is_foreseen(fresh: Store, spent: dict[str, list[float]]):
    """Scans are read while others are encoded: it cannot take less than the longer of both, nor more than their sum."""
    plan = fresh.plan_index()
    assert plan.bare_patches_per_s == pytest.approx(PATCHES_PER_S)
    assert plan.patches_per_s == pytest.approx(PATCHES_PER_S)
    for each in spent.values():
        each.clear()
    report = fresh.index(runtime="torch")
    read_s, encode_s = (sum(each) for each in spent.values())
    assert encode_s == pytest.approx(report.patches / PATCHES_PER_S)
    assert encode_s > read_s > 0
    assert 0.9 * encode_s < plan.seconds < 1.1 * (read_s + encode_s)


def test_memory_is_that_of_the_process_and_of_the_scans_that_are_in_it_at_once(
    fresh: Store, monkeypatch: pytest.MonkeyPatch
):
    """Of a process that would have nothing but them."""
    monkeypatch.setattr(forecast.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=0))
    two = fresh.plan_index(stride_mm=32.0, where=f"scan IN ('{COPIES[2].stem}', '{COPIES[3].stem}')").memory_bytes
    encoder = load_encoder(fresh.snapshot.encoder_path(None), "cpu")
    tracemalloc.start()
    try:
        volume, _, labels = scan.read_scan(fresh.snapshot.chunks_path(COPIES[2].stem), encoder.card)
        grid, numbers, share = scan.kept_patches(encoder.card, volume, 8)
        scan.patch_rows(COPIES[2].stem, grid, numbers, share, labels)
        _, reading = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    one = reading + len(grid) * sum(encoder.card.outputs.values()) * (4 + 2)  # vectors as computed, and as stored
    assert scan.AT_ONCE * one / 2 < two < 2 * scan.AT_ONCE * one


def test_lattices_are_as_large_as_the_catalogue_says(fresh: Store):
    """What is counted without opening a scan is what its measurement counts."""
    plan = fresh.plan_index(where=f"scan = '{CROPPED.stem}'", stride_mm=32.0)
    report = fresh.index(where=f"scan = '{CROPPED.stem}'", stride_mm=32.0)
    assert (plan.patches, plan.basis["patches"]) == (report.patches, "measured")
    options = planning.IndexOptions(stride_mm=8.0)
    wanted = planning.what_is_wanted(fresh.snapshot, fresh.snapshot.scan_ids(), options)
    for size in planning.sizes_of(fresh.snapshot, wanted):
        row = fresh.snapshot.scan_row(size.scan)
        assert size.voxels == row["nx"] * row["ny"] * row["nz"]
        assert size.points == len(PatchGrid((row["nx"], row["ny"], row["nz"]), 32, 2, np.eye(4)))


def test_damaged_scans_are_named_and_not_counted(fresh: Store):
    everything = fresh.plan_index(stride_mm=32.0).patches
    integrity._verify_hash.cache_clear()
    cut, changed = (
        fresh.path / fresh.snapshot.voxels_of[copy.stem] / "0" / "c" / "0" / "0" / "0" for copy in (COPIES[1], CROPPED)
    )
    cut.write_bytes(cut.read_bytes()[:-50])
    found = bytearray(changed.read_bytes())
    found[50] ^= 1  # the smallest scan, which is measured: it is read, and so its hash is looked at
    changed.write_bytes(found)
    plan = fresh.plan_index(stride_mm=32.0)
    assert {refusal.name: refusal.kind for refusal in plan.damaged} == dict.fromkeys(
        (COPIES[1].stem, CROPPED.stem), "store_damaged"
    )
    assert len(plan.to_encode) == 4
    assert 0 < plan.patches < 0.8 * everything
    assert {refusal.name for refusal in fresh.index(stride_mm=32.0).refused} == {COPIES[1].stem, CROPPED.stem}


def test_where_nothing_can_be_measured_nothing_is_made_up(fresh: Store):
    where = f"scan IN ('{COPIES[1].stem}', '{CROPPED.stem}')"
    integrity._verify_hash.cache_clear()
    for copy in (COPIES[1], CROPPED):
        shard = fresh.path / fresh.snapshot.voxels_of[copy.stem] / "0" / "c" / "0" / "0" / "0"
        found = bytearray(shard.read_bytes())
        found[50] ^= 1
        shard.write_bytes(found)
    plan = fresh.plan_index(where=where)
    assert (plan.to_encode, len(plan.damaged), plan.patches, plan.seconds) == ([], 2, 0, None)
    more = [planning.Size("elsewhere", 1000, 400)]
    known = planning._with_numbers(plan, CARD, more, {}, Measured(), processes=0, overlap=False)
    assert (known.patches, known.seconds, known.memory_bytes) == (400, None, None)
    assert known.basis == {"patches": "upper bound", "bytes_written": "upper bound"}


def test_a_plan_refuses_what_a_run_would_refuse_and_what_would_be_written(fresh: Store, tmp_path: Path):
    with pytest.raises(NotFound, match="no scan to index"):
        fresh.plan_index(where="false")
    with pytest.raises(UsageError, match="multiple of the encoder's spacing"):
        fresh.plan_index(stride_mm=5.0)
    fresh.export_encoder(None, tmp_path / "mine")
    assert fresh.plan_index(str(fresh.encoder().id)[:6], stride_mm=64.0).encoder == fresh.encoder().id
    other = isi.create(tmp_path / "other")
    other.add(tiny_scan(tmp_path / "tiny.nii.gz"))
    with pytest.raises(UsageError, match="cannot import the encoder in 'mine'"):
        other.plan_index(str(tmp_path / "mine"))
    assert other.encoders().num_rows == 0


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 6])
def test_parts_are_all_patches_and_each_is_encoded_together(fresh: Store, stride: int):
    """6 shares no work; the others are cut where passes are."""
    directory = fresh.snapshot.encoder_path(None)
    encoder = load_encoder(directory, "cpu")
    grid = PatchGrid((150, 40, 40), read_card(directory).patch_vox, stride, np.eye(4))
    numbers = np.arange(0, len(grid), 7)
    parts = encoder.parts(grid, numbers)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), numbers)
    span = max(np.ptp(grid.ijk(part), axis=0).max() for part in parts)
    if encoder.shares_work(stride):  # type: ignore[attr-defined]
        assert len(parts) > 1
        assert span < 24 * 4 // stride  # 24 steps of the network, which are 4 voxels each
    else:
        assert max(map(len, parts)) <= 64


# -- progress -------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def test_pace_is_patches_over_wall_time_and_its_eta_goes_by_lattice_points(clock: list[float]):
    run = Pace({"a": 400, "b": 1200, "c": 400}, bare_per_s=20.0)
    assert (run.per_s, run.share) == (None, None)
    clock[0] += 10.0
    run.add(["a"], 100)
    assert run.note() == "100 patches · 10 patches/s, 50 % of bare passes · ETA 40 s"
    clock[0] += 30.0
    run.add(["b"], 0)  # refused, but it is not to come any more
    assert run.note() == "100 patches · 2 patches/s, 12 % of bare passes · ETA 10 s"
    clock[0] += 10.0
    run.add(["c"], 1400)
    clock[0] += 1000.0
    assert (run.per_s, run.share) == (30.0, 1.5)
    assert run.note() == "1,500 patches · 30 patches/s, 150 % of bare passes"


def test_pace_says_nothing_that_it_does_not_know(clock: list[float]):
    run = Pace({"a": 400, "b": 400})
    assert run.note() == "0 patches"
    clock[0] += 0.5
    run.add(["a"], 100)
    assert run.note() == "100 patches"
    clock[0] += 1.5
    run.add([], 0)
    assert run.note() == "100 patches · 50 patches/s · ETA 2 s"
    assert run.share is None
