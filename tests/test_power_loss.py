"""Power cuts during `index`: whatever one may leave opens, is sound, and is gone on with to the same end.

`ISIMED_REPLAY=all pytest tests/test_power_loss.py` looks at every image, which takes long.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cohorts import segment_vectors, shifted_heads

import isimed_index as isi
from isimed_index.encode import cluster, stream
from isimed_index.encode.cluster import Threads
from isimed_index.encode.task import Encoded, EncodeTask
from isimed_index.errors import IsimedError, IsimedWarning
from isimed_index.index.card import IndexCard
from isimed_index.indexing import IndexReport
from isimed_index.store.files import FOLDERS
from isimed_index.store.place.storage import LocalStorage
from isimed_index.store.repository import Repository
from isimed_index.store.transaction import Transaction
from isimed_index.testing.crash import Image, Recorder

EVERY = "ISIMED_REPLAY" in os.environ
SCANS = 3
COMMITS = 2 + 3  # two segments and one, the frame, the regions, the index
EACH = 3  # images looked at between two commits unless all are
# Of these `check` tells, and nothing is lost: what was being written, and who wrote it; the second copy of the newest
# manifest, which comes after it; the hint at it, which is never flushed.
HARMLESS = {"orphan", "stale_intent", "copy_missing", "head_damaged", "head_missing"}


class _Now(Executor):
    """Runs what is submitted at once: a recorder has to know who does what in which order."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 — a future carries whatever was raised
            future.set_exception(error)
        return future


@contextmanager
def one_by_one() -> Iterator[Threads]:
    """Workers that are this thread."""
    yield Threads(_Now())


@dataclass(frozen=True, slots=True)
class Run:
    """An `index` of the store `start` that nothing disturbed, and what power cuts during it may leave."""

    start: Path
    encoded: dict[str, str]
    derived: list[tuple[str, str]]
    images: list[Image] = field(repr=False)


def encoded(path: Path) -> dict[str, str]:
    """By scan, the vectors and the places of its patches, as a hash of every bit."""
    return {
        scan: hashlib.sha256(b"".join(arrays[name] for name in sorted(arrays))).hexdigest()
        for scan, arrays in segment_vectors(path).items()
    }


def derived(path: Path) -> list[tuple[str, str]]:
    """Kinds and hashes of all else that a store names: frame, regions, index, and what was there before.

    Of an index those of what it answers by: beside it stands how long that took.
    """
    made = Repository.open(path).snapshot().manifest.artefacts
    indexes = [IndexCard.read(path / artefact.path).sha256 for artefact in made if artefact.kind == "index"]
    others = [(artefact.kind, artefact.sha256) for artefact in made if artefact.kind not in ("segment", "index")]
    return sorted([*others, *(("index", sha256) for sha256 in indexes)])


def index(path: Path) -> IndexReport:
    """All of it, on a coarse lattice: as many commits, and fewer patches."""
    return isi.open(path).index(stride_mm=32.0, runtime="torch")


def recorded(start: Path, folder: Path, patch: pytest.MonkeyPatch) -> Run:
    """Index a copy of a store and keep every crash image of it."""
    path = Path(shutil.copytree(start, folder))
    commit = Transaction.commit
    with Recorder(path) as recorder, patch.context() as during:

        def acknowledging(transaction: Transaction, propose: Any) -> Any:
            snapshot = commit(transaction, propose)
            recorder.acknowledge()
            return snapshot

        during.setattr(Transaction, "commit", acknowledging)
        index(path)
    return Run(start, encoded(path), derived(path), recorder.images())


def chosen(images: list[Image]) -> list[Image]:
    """Some images from between any two commits, evenly spaced; the last of them first."""
    between: list[list[Image]] = [[] for _ in range(COMMITS + 1)]
    for image in images:
        between[image.acknowledged].append(image)
    return [image for some in between for image in some[:: -1 if EVERY else min(-1, len(some) // -EACH)]]


def examine(run: Run, image: Image, path: Path, patch: pytest.MonkeyPatch) -> None:
    """Demand of a crash image what an interrupted `index` promises."""
    path.mkdir()
    image.write(path)
    begin = Repository.open(run.start).snapshot().generation
    assert Repository.open(path).snapshot().generation >= begin + image.acknowledged
    assert {finding.kind for finding in isi.check(path, read=1.0)} <= HARMLESS
    kept = encoded(path)
    assert len(kept) >= min(SCANS, 2 * image.acknowledged)
    assert kept == {scan: run.encoded[scan] for scan in kept}
    begun: list[str] = []
    encode = stream.encode_scan

    def counted(task: EncodeTask) -> Encoded:
        begun.append(task.scan)
        return encode(task)

    with patch.context() as during:
        during.setattr(stream, "encode_scan", counted)
        report = index(path)
    assert sorted(report.skipped) == sorted(kept)
    assert sorted(begun) == sorted(report.encoded) == sorted(run.encoded.keys() - kept)
    assert encoded(path) == run.encoded
    assert derived(path) == run.derived
    assert {finding.kind for finding in isi.check(path, read=1.0)} <= HARMLESS
    isi.open(path).gc()
    assert {finding.kind for finding in isi.check(path, read=1.0)} <= HARMLESS - {"orphan", "stale_intent"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads and an encoder, nothing indexed."""
    return shifted_heads(tmp_path_factory.mktemp("heads"), SCANS)


@pytest.fixture(autouse=True)
def _in_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_threads", one_by_one)
    monkeypatch.setattr(stream, "COMMIT_SCANS", 2)


def test_an_index_goes_on_from_whatever_a_power_cut_leaves(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recorded(start, tmp_path / "whole", monkeypatch)
    images = chosen(run.images)
    print(f"{len(images)} of {len(run.images)} images")
    assert {image.acknowledged for image in images} == set(range(COMMITS + 1))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what the examination writes need not last
    for number, image in enumerate(images):
        examine(run, image, tmp_path / f"image-{number}", monkeypatch)
        shutil.rmtree(tmp_path / f"image-{number}")


def test_an_index_whose_segments_do_not_last_is_found_out(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = LocalStorage.settle

    def all_but_segments(self: LocalStorage, artefacts: Sequence[str]) -> None:
        settle(self, [path for path in artefacts if not path.startswith(FOLDERS["segment"])])

    with monkeypatch.context() as during:
        during.setattr(LocalStorage, "settle", all_but_segments)
        run = recorded(start, tmp_path / "whole", monkeypatch)
    promised = [image for image in run.images if image.acknowledged == COMMITS]
    least = min(promised, key=lambda image: len(image.content))
    with pytest.raises((AssertionError, IsimedError, IsimedWarning)):
        examine(run, least, tmp_path / "image", monkeypatch)
