"""Encoding: which patches, what is staged, what a damaged scan or a missing device does, and the same on processes."""

from __future__ import annotations

import errno
import json
import logging
import math
import platform
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from distributed import LocalCluster, Status
from threadpoolctl import threadpool_info, threadpool_limits

from isimed_index.config import PretrainConfig
from isimed_index.encode import (
    Encoded,
    EncodeTask,
    cluster,
    encode_batches,
    encode_volume,
    grid_key,
    prepared,
    stride_in_voxels,
    task_key,
    volume_lattice,
    workers,
)
from isimed_index.encode import scan as scan_module
from isimed_index.encode.scan import AT_ONCE, encode_scan
from isimed_index.encode.task import MIN_FOREGROUND, STARTS
from isimed_index.encoders.card import read_card
from isimed_index.encoders.networks import build_network
from isimed_index.encoders.runtime import write_encoder
from isimed_index.encoders.runtimes import exported
from isimed_index.encoders.runtimes.kind import Runtime
from isimed_index.errors import MissingExtra, RuntimeMismatch, StoreDamaged, StoreFull, UsageError, WorkerFailed
from isimed_index.lattice import FILE, Standard
from isimed_index.limits import cores
from isimed_index.pretrain.trainer import new_card
from isimed_index.scans.chunks import write_chunks
from isimed_index.scans.prepare import Volume
from isimed_index.scans.scan import Scan
from isimed_index.space import apply_affine
from isimed_index.testing.encoder import ToyEncoder

AFFINE = np.array([[0.0, 0.0, 2.0, -30.0], [2.0, 0.0, 0.0, 5.0], [0.0, 2.0, 0.0, 7.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def ball(shape: tuple[int, int, int] = (24, 20, 28), radius: float = 9.0) -> np.ndarray:
    """A textured ball in air."""
    at = np.indices(shape) - (np.array(shape)[:, None, None, None] - 1) / 2
    inside = np.sqrt((at**2).sum(axis=0)) < radius
    noise = np.random.default_rng(2).uniform(60, 100, shape)
    return (inside * noise).astype(np.float32)


def tasks(root: Path, count: int) -> list[EncodeTask]:
    """Scans on disk, one small encoder, and an empty bench, where it would be in a store."""
    encoder, bench = root / "encoder", root / "segments" / "bench"
    encoder.mkdir()
    bench.mkdir(parents=True)
    torch.manual_seed(0)
    card = new_card(PretrainConfig(width=2, embedding_dim=4, descriptor_dim=5), "test", "tiny")
    card = write_encoder(encoder, card, build_network(card.factory, card.outputs, card.network).state_dict())
    made = []
    for number in range(count):
        head = ball((36, 34, 38), 15.0)  # fills a fifth of a patch of 32
        scan = Scan(f"s{number}", (head * (number + 1)).astype(np.int16), AFFINE)
        chunks = root / f"{number}.zarr"
        write_chunks(scan, None, chunks)
        key = task_key(scan.digest, card, 8)
        made.append(EncodeTask(number, key, scan.id, str(chunks), str(encoder), str(bench), 8, "cpu"))
    return made


# -- lattice and names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride_mm", "expected"), [(None, 4), (2.0, 1), (8.0, 4), (16.0, 8), (8.0 + 1e-9, 4)])
def test_a_stride_in_voxels(stride_mm: float | None, expected: int) -> None:
    assert stride_in_voxels(ToyEncoder().card, stride_mm) == expected


@pytest.mark.parametrize("stride_mm", [3.0, 0.0, -8.0, 0.5, 1e-9, math.nan, math.inf])
def test_a_stride_that_is_no_whole_number_of_voxels_is_refused(stride_mm: float) -> None:
    with pytest.raises(UsageError, match="multiple of the encoder's spacing 2 mm") as refused:
        stride_in_voxels(ToyEncoder().card, stride_mm)
    assert "--stride 8" in refused.value.next_step


def test_a_stride_at_which_patches_would_not_touch_is_refused() -> None:
    card = ToyEncoder().card
    wide = card.patch_vox * card.spacing_mm
    assert stride_in_voxels(card, wide) == card.patch_vox
    with pytest.raises(
        UsageError, match=f"at most {wide:g} mm, .* found {wide + 2:g} mm: patches would not"
    ) as refused:
        stride_in_voxels(card, wide + card.spacing_mm)
    assert "--stride 8" in refused.value.next_step


def test_a_task_is_named_by_scan_encoder_and_lattice() -> None:
    card = ToyEncoder().card
    keys = {
        task_key("a", card, 4),
        task_key("b", card, 4),
        task_key("a", card, 8),
        task_key("a", replace(card, patch_vox=9), 4),
    }
    assert len(keys) == 4
    assert task_key("a", replace(card, name="other"), 4) in keys
    assert task_key("a", card, 4, "fp32") in keys  # stores from before there was another precision
    assert task_key("a", card, 4, "bf16") not in keys
    assert grid_key(card, 4) == "patch8-stride4-spacing2mm-fg0.15"


# -- one volume -----------------------------------------------------------------------------------------------------


def test_only_patches_with_foreground_are_encoded_and_every_one_of_them() -> None:
    encoder = ToyEncoder()
    volume = prepared(ball(), AFFINE, encoder.card)
    grid, numbers, vectors, share = encode_volume(encoder, volume, 4)
    truth = [
        np.pad(volume.foreground, 8)[tuple(slice(s + 8, s + 16) for s in start)].mean() for start in grid.starts_vox()
    ]
    assert numbers.tolist() == [n for n, part in enumerate(truth) if part >= MIN_FOREGROUND]
    assert 0 < len(numbers) < len(grid)
    np.testing.assert_allclose(share, np.array(truth)[numbers], atol=1e-6)
    expected = encoder.encode(grid.extract(volume.values, numbers, volume.background))
    np.testing.assert_allclose(vectors["descriptor"], expected["descriptor"])


def test_the_working_volume_has_the_encoders_spacing_and_scaling() -> None:
    card = ToyEncoder(spacing_mm=4.0).card
    volume = prepared(ball(), AFFINE, card)
    assert volume.values.shape == (12, 10, 14)
    np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), 4)
    assert np.abs(volume.values).max() <= card.intensity.clip


def test_a_volume_without_foreground_has_no_patches() -> None:
    empty = Volume(np.zeros((20, 20, 20), np.float32), np.eye(4), 0.0, np.zeros((20, 20, 20), bool))
    _, numbers, vectors, share = encode_volume(ToyEncoder(), empty, 4)
    assert (len(numbers), len(share), vectors["descriptor"].shape) == (0, 0, (0, 8))


def test_a_lattice_of_a_volume_that_is_not_stored() -> None:
    encoder = ToyEncoder()
    volume = prepared(ball(), AFFINE, encoder.card)
    grid, numbers, vectors, _ = encode_volume(encoder, volume, 4)
    standard = Standard.of("l2", vectors["descriptor"])
    places, unit = volume_lattice(encoder, volume, 4, standard).stored()
    np.testing.assert_allclose(places, grid.centres_mm(numbers), atol=1e-9)
    np.testing.assert_allclose(unit, standard.unit(vectors["descriptor"]))


# -- one task -------------------------------------------------------------------------------------------------------


def test_a_staged_segment_holds_patches_vectors_and_geometry(tmp_path: Path) -> None:
    task = tasks(tmp_path, 1)[0]
    done = encode_scan(task)
    assert done.error is None
    assert done.task == task
    staged = Path(done.staged)
    assert [*Path(task.bench).iterdir()] == [staged]
    table = pq.read_table(staged / "patches.parquet")
    assert done.fields["rows"] == table.num_rows > 0
    assert done.fields["task"] == task.key
    assert done.fields["grid"] == "patch32-stride8-spacing2mm-fg0.15"
    assert set(table.column("scan").to_pylist()) == {"s0"}
    dtypes = {name: np.load(staged / f"{name}.npy").dtype.name for name in done.fields["outputs"]}
    assert dtypes == {"embedding": "float16", "position": "float32", "descriptor": "float16"}
    affine = np.array(json.loads((staged / FILE).read_text())["affine"])
    ijk = np.stack([table.column(axis).to_numpy() for axis in "ijk"], axis=1)
    mm = np.stack([table.column(f"{axis}_mm").to_numpy() for axis in "xyz"], axis=1)
    np.testing.assert_allclose(apply_affine(affine, ijk), mm, atol=1e-4)


def test_a_damaged_scan_is_reported_not_raised(tmp_path: Path) -> None:
    task = tasks(tmp_path, 1)[0]
    chunk = max((path for path in Path(task.chunks).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[:-40])
    done = encode_scan(task)
    assert isinstance(done.error, StoreDamaged)
    assert done.fields == {}
    missing = encode_scan(replace(task, chunks=str(tmp_path / "gone.zarr")))
    assert isinstance(missing.error, StoreDamaged)
    assert not any(Path(task.bench).iterdir())


def test_a_damaged_encoder_or_a_missing_device_concerns_every_scan_and_is_raised(tmp_path: Path) -> None:
    task = tasks(tmp_path, 1)[0]
    with pytest.raises(UsageError, match="device"):
        encode_scan(replace(task, device="tpu"))
    (Path(task.encoder) / "weights.safetensors").unlink()
    with pytest.raises(StoreDamaged):
        encode_scan(task)


# -- many tasks -----------------------------------------------------------------------------------------------------


def vectors_of(done: Encoded) -> np.ndarray:
    return np.load(Path(done.staged) / "descriptor.npy")


def encoded(tasks: list[EncodeTask], scheduler: str = "threads") -> list[Encoded]:
    """All of them, encoded on workers of their own, in their order."""
    with workers(scheduler) as where:
        results = [done for batch in encode_batches(iter(tasks), where) for done in batch]
    return sorted(results, key=lambda done: done.task.number)


def test_a_damaged_scan_does_not_stop_the_others(tmp_path: Path) -> None:
    made = tasks(tmp_path, 2)
    broken = replace(made[0], chunks=str(tmp_path / "gone.zarr"))
    results = encoded([broken, made[1]])
    assert [type(done.error) for done in results] == [StoreDamaged, type(None)]
    assert len(vectors_of(results[1]))


def test_two_segments_of_one_content_are_both_written(tmp_path: Path) -> None:
    """Copies of a scan have the same task key; each result must still be about its own segment."""
    task, other = tasks(tmp_path, 2)
    twin = replace(task, scan="copy", number=other.number)
    results = encoded([task, twin])
    assert [done.task for done in results] == [task, twin]
    assert results[0].staged != results[1].staged
    np.testing.assert_array_equal(*map(vectors_of, results))


def test_products_of_numpy_have_one_thread_while_threads_encode() -> None:
    def number() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if "numpy" in pool["filepath"]}

    with threadpool_limits(2, user_api="blas"):
        with workers("threads") as where:
            assert where.submit(lambda _: number(), None, "asked").result() == {1}
        assert number() == {2}


def test_a_worker_whose_disk_is_full_costs_its_scan_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks(tmp_path, 1)[0]

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        done = encode_scan(task)
    assert isinstance(done.error, StoreFull)
    assert "isimed gc" in done.error.next_step
    assert not any(Path(task.bench).iterdir())
    monkeypatch.setattr(np, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ESTALE, "stale")))
    done = encode_scan(task)
    assert isinstance(done.error, WorkerFailed)
    assert platform.node() in str(done.error)
    assert str(tmp_path) not in str(done.error)


def test_a_worker_without_the_stores_folder_or_of_another_version_says_so(tmp_path: Path) -> None:
    task = tasks(tmp_path, 1)[0]
    elsewhere = encode_scan(replace(task, bench=str(tmp_path / "segments" / "not mounted")))
    assert isinstance(elsewhere.error, WorkerFailed)
    assert "mount the store there" in elsewhere.error.next_step
    other = encode_scan(replace(task, version="0.0.1"))
    assert isinstance(other.error, WorkerFailed)
    assert "expected isimed-index 0.0.1" in str(other.error)
    assert encode_scan(replace(task, version=version("isimed-index"))).error is None


def test_an_attempt_that_begins_once_too_often_is_not_made(tmp_path: Path) -> None:
    """Each beginning is on disk before anything can kill it, and taken back when it ends."""
    task = tasks(tmp_path, 1)[0]
    mark = Path(task.bench) / "0.begun"
    mark.write_bytes(b"." * (STARTS - 1))
    assert encode_scan(task).error is None
    assert not mark.exists()
    mark.write_bytes(b"." * STARTS)
    done = encode_scan(task)
    assert isinstance(done.error, WorkerFailed)
    assert (done.suspect, done.staged) == (True, "")
    assert encode_scan(replace(task, starts=STARTS + 1)).error is None


def test_passes_of_the_network_take_turns_and_few_scans_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tasks(tmp_path, 6)
    now = {"scans": 0, "passes": 0}
    most = dict(now)

    def counted(kind: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with lock:
                now[kind] += 1
                most[kind] = max(most[kind], now[kind])
            time.sleep(0.02)
            try:
                return work(*arguments)
            finally:
                with lock:
                    now[kind] -= 1

        return call

    lock = threading.Lock()
    monkeypatch.setattr(scan_module, "encode_grid", counted("passes", scan_module.encode_grid))
    monkeypatch.setattr(scan_module, "_attempt", counted("scans", scan_module._attempt))
    with ThreadPoolExecutor(6) as threads:  # as many as a large Dask worker may have
        assert all(done.error is None for done in threads.map(encode_scan, made))
    assert most == {"scans": 2, "passes": 1}


def test_an_unknown_scheduler_is_refused() -> None:
    with pytest.raises(UsageError, match="threads, processes, processes:N, cuda or an address"), workers("cluster"):
        pass
    for count in ("", "0", "-1", "two"):
        with pytest.raises(UsageError, match="a number of processes"), workers(f"processes:{count}"):
            pass


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("proceses:2", "processes:2"),
        ("process", "processes"),
        ("threads:2", "processes:2"),
        ("Processes:3", "processes:3"),
        ("thread", "threads"),
    ],
)
def test_a_misspelt_scheduler_is_told_what_was_meant(typed: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"found '{typed}'; did you mean {meant}\?") as refused:
        cluster.check_scheduler(typed)
    assert f"--scheduler {meant}" in refused.value.next_step


@pytest.mark.parametrize(
    "address", ["node0:8786", "tcp://node0:8786", "tls://processes:8786", "[::1]:8786", "inproc://x"]
)
def test_an_address_has_a_scheme_or_a_port(address: str) -> None:
    cluster.check_scheduler(address)
    with pytest.raises(UsageError, match="or an address, found 'node0:eight'"):
        cluster.check_scheduler("node0:eight")


def test_gpus_have_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device") as refused, workers("cuda"):
        pass
    assert "dask-cuda" not in refused.value.line()


def test_gpus_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with pytest.raises(MissingExtra, match="dask-cuda") as missing, workers("cuda"):
        pass
    assert "pip install dask-cuda" in missing.value.next_step


def test_gpus_have_a_process_each_and_give_what_threads_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: dask-cuda's cluster is a local one, here of one worker in this process, on the CPU."""
    started: list[LocalCluster] = []

    class LocalCUDACluster(LocalCluster):
        def __init__(self, **options: Any) -> None:
            self.options = options
            super().__init__(n_workers=1, processes=False, **options)
            started.append(self)

    monkeypatch.setitem(sys.modules, "dask_cuda", SimpleNamespace(LocalCUDACluster=LocalCUDACluster))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    made = tasks(tmp_path, 2)
    torch.set_num_threads(AT_ONCE)  # as many as the worker has
    here, there = encoded(made), encoded(made, "cuda")
    (one,) = started
    assert one.options == {
        "threads_per_worker": AT_ONCE,  # a scan is read while another one is on the GPU
        "dashboard_address": "127.0.0.1:0",
        "scheduler_kwargs": {"dashboard": False},
    }
    assert one.status is Status.closed
    for done, other in zip(here, there, strict=True):
        assert Path(done.staged) != Path(other.staged)
        np.testing.assert_array_equal(vectors_of(done), vectors_of(other))


def test_a_scheduler_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_CONNECT_S", 0.3)
    for address in ("tcp://127.0.0.1:1", "nonsense://x:1"):
        with pytest.raises(UsageError, match="no Dask scheduler"), workers(address):
            pass


class Errors(logging.Handler):
    """Keeps the errors that are logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def test_processes_give_what_threads_give(tmp_path: Path) -> None:
    logged = Errors()
    logging.getLogger("distributed.scheduler").addHandler(logged)
    made = tasks(tmp_path, 2)
    torch.set_num_threads(cores())  # bits depend on the number of threads of a pass
    here = encoded(made)
    broken = replace(made[0], number=2, chunks=str(tmp_path / "gone.zarr"))
    there = encoded([*made, broken], "processes:1")
    logging.getLogger("distributed.scheduler").removeHandler(logged)
    assert logged.said == []  # such as a traceback for a client that is not told of its own end
    assert [type(done.error) for done in there] == [type(None), type(None), StoreDamaged]
    assert there[2].error is not None
    assert there[2].error.next_step == "restore the store from a backup, or add the file to a new one"
    for one, other in zip(here, there, strict=False):
        np.testing.assert_array_equal(vectors_of(one), vectors_of(other))


# -- runtimes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """The runtime, with a cache of its own."""
    pytest.importorskip("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Runtime("openvino")


def test_workers_use_the_runtime_of_their_task_and_say_so(tmp_path: Path, openvino: Runtime) -> None:
    task = tasks(tmp_path, 1)[0]
    torch.set_num_threads(cores())
    made = [replace(task, number=n, runtime=runtime) for n, runtime in enumerate([Runtime("torch"), *[openvino] * 3])]
    by_torch, *others = encoded(made[:3]) + encoded(made[3:], "processes:1")
    assert [done.fields["runtime"]["name"] for done in (by_torch, *others)] == ["torch", *["openvino"] * 3]
    assert all(done.fields["runtime"]["version"] and done.fields["runtime"]["precision"] == "fp32" for done in others)
    first = vectors_of(others[0])
    for done in others[1:]:  # another thread, another process: the same bits
        np.testing.assert_array_equal(vectors_of(done), first)
    scale = np.abs(vectors_of(by_torch)).max()
    np.testing.assert_allclose(first, vectors_of(by_torch), rtol=0, atol=1e-3 * scale)  # float16
    exact = [np.load(Path(done.staged) / "position.npy") for done in (by_torch, others[0])]
    np.testing.assert_allclose(exact[1], exact[0], rtol=0, atol=1e-5 * np.abs(exact[0]).max())


def test_a_runtime_with_other_answers_concerns_every_scan_and_is_raised(tmp_path: Path, openvino: Runtime) -> None:
    task = replace(tasks(tmp_path, 1)[0], runtime=openvino)
    card = json.loads((Path(task.encoder) / "card.json").read_text())
    torch.manual_seed(9)
    other = build_network(card["factory"], {name: y["dim"] for name, y in card["outputs"].items()}, card["network"])
    graph = exported.export(other, list(card["outputs"]), 32)
    name = exported.graph_name(read_card(Path(task.encoder)))
    exported._keep(tmp_path / "cache/isimed-index/graphs" / name, graph)
    with pytest.raises(RuntimeMismatch, match="runtime openvino does not give the vectors"):
        encode_scan(task)
    assert not any(Path(task.bench).iterdir())
