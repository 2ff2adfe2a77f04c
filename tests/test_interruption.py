"""A process that dies in the middle leaves a store that opens, and a rerun that does only what is missing."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from cohorts import segment_vectors, shifted_heads
from started import Started

import isimed_index as isi
from isimed_index.store.repository import Repository

SCANS = 12


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve heads and an encoder, nothing indexed."""
    return shifted_heads(tmp_path_factory.mktemp("heads"), SCANS)


@pytest.fixture(scope="module")
def undisturbed(heads: Path) -> dict[str, dict[str, bytes]]:
    """The vectors of an index that nothing stops."""
    store = shutil.copytree(heads, heads.with_name("undisturbed.isimed"))
    isi.open(store).index()
    return segment_vectors(store)


@pytest.fixture
def store(heads: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(heads, tmp_path / "cohort.isimed"))


def segments(store: Path) -> list[str]:
    return [artefact.path for artefact in Repository.open(store).snapshot().artefacts("segment")]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_index_goes_on_where_it_was_stopped(
    store: Path, undisturbed: dict[str, dict[str, bytes]], number: signal.Signals
):
    told = store.with_name("report.json")
    process = Started("index", "-s", str(store), "--no-progress", "--report", str(told))
    deadline = time.monotonic() + 60
    while not segments(store) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), errors
    kept = segments(store)
    assert 0 < len(kept) < SCANS
    assert told.exists() == (number == signal.SIGTERM)
    if number == signal.SIGTERM:
        report, now = json.loads(told.read_text()), Repository.open(store).snapshot()
        assert report["interrupted"] is True
        assert sorted(report["encoded"]) == sorted(now.scan_of[segment.scan_artefact] for segment in now.segments())
        assert (report["skipped"], report["refused"], report["recall_at_10"]) == ([], [], None)
        assert report["patches"] == sum(segment.rows for segment in now.segments())
        assert f"error[interrupted]: index was stopped; of {SCANS} scans {len(kept)} are encoded and stay" in errors

    after = isi.open(store)  # opens, and answers
    assert after.scans().num_rows == SCANS
    assert after.info()["patches"] == sum(segment.rows for segment in after.snapshot.segments()) > 0
    assert {segment.encoder for segment in after.snapshot.segments()} == {after.snapshot.segments()[0].encoder}

    again = Started("index", "-s", str(store), "--no-progress", "--json")
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    report = json.loads(output)
    of = Repository.open(store).snapshot().scan_of
    whole = Repository.open(store).snapshot().segments()
    assert [segment.path for segment in whole][: len(kept)] == kept
    assert sorted(report["skipped"]) == sorted(of[segment.scan_artefact] for segment in whole[: len(kept)])
    assert report["interrupted"] is False
    assert len(report["encoded"]) == SCANS - len(kept)
    assert len({segment.task for segment in whole}) == len(whole) == SCANS
    assert segment_vectors(store) == undisturbed

    after.refresh()
    found = after.lookup([10, 20, 30], "sub-00", k=SCANS)
    assert len(found) == SCANS - 1
    for match in found:
        n = int(match.scan[-2:])
        np.testing.assert_allclose(match.xyz_mm, [10 + n, 20 - n, 30 + 2 * n], atol=1.0)


def test_an_add_that_is_killed_leaves_whole_batches(tmp_path: Path):
    from cohorts import tiny_scan

    for n in range(64):
        tiny_scan(tmp_path / "in" / f"s{n:02d}.nii", n, (24, 24, 24))
    isi.create(tmp_path / "store")
    process = Started("add", str(tmp_path / "in"), "-s", str(tmp_path / "store"), "--no-progress")
    repository = Repository.open(tmp_path / "store")
    while repository.head() == 0 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=60)
    kept = isi.open(tmp_path / "store").scans().column("scan").to_pylist()
    assert len(kept) in (16, 32, 48)
    report = isi.open(tmp_path / "store").add(tmp_path / "in")
    assert report.unchanged == kept == [f"s{n:02d}" for n in range(len(kept))]
    assert len(report.added) == 64 - len(kept)
