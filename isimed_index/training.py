"""`pretrain`: train an encoder on stored scans and store it, by one process or by several that torchrun started.

scans · subjects ─▶ train (checkpoints in tmp/pretrain-<hash>) ─▶ commit: weights, card, metrics     by rank 0 alone
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from filelock import Timeout

from isimed_index.config import PretrainConfig
from isimed_index.encoders.card import EncoderCard
from isimed_index.encoders.runtime import write_encoder
from isimed_index.errors import StoreLocked, UsageError
from isimed_index.pretrain.processes import Processes, joined
from isimed_index.pretrain.reading import StoredSource, working_voxels
from isimed_index.pretrain.records import Watchers
from isimed_index.pretrain.trainer import Trained, intensity_of, train
from isimed_index.progress import Progress
from isimed_index.scans.chunks import StoredScan, open_chunks
from isimed_index.scans.prepare import Intensity
from isimed_index.store.place import locks
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal

_LOCK = "run.lock"


@dataclass(frozen=True, slots=True)
class Training:
    """What to train and how to watch it; `name` is the encoder's, by default method and preset."""

    config: PretrainConfig
    preset: str = "default"
    name: str | None = None
    device: str = "auto"
    resume: bool = False
    watchers: Watchers = field(default_factory=Watchers)


def pretrain(repository: Repository, scans: Sequence[str], training: Training, progress: Progress) -> EncoderCard:
    """Train on `scans` and store the encoder; `training.resume` goes on from the last checkpoint of the same training.

    Configuration, voxels and subjects name a training: the same again finds its checkpoints, and is refused while the
    first one runs (`StoreLocked`). Of torchrun's processes the first one speaks and writes, and all return the card.
    """
    with joined(training.device) as processes, repository.pin() as head:
        config = training.config
        rows = [head.scan_row(scan) for scan in sorted(scans)]
        shown = [[row["digest"], row["subject"]] for row in rows]
        run = repository.path / "tmp" / f"pretrain-{_hash([asdict(config), shown])}"
        if processes.from_first(run.name) != run.name:
            raise UsageError(
                "the processes of this training see different scans",
                next_step="let other work on the store end, and start the training again",
            )
        with _only_one(run, processes):
            intensity = intensity_of(config)
            trained = train(
                config,
                [_source(head, row, config.spacing_mm, intensity) for row in rows],
                run,
                subjects=[row["subject"] for row in rows],
                name=training.name or f"{config.method}-{training.preset}",
                preset=training.preset,
                device=training.device,
                resume=training.resume,
                watchers=training.watchers,
                processes=processes,
                progress=progress,
            )
            return _stored_by_first(repository, trained, run, processes)


@contextmanager
def _only_one(run: Path, processes: Processes) -> Iterator[None]:
    """Hold a training's folder; `StoreLocked` in all its processes where the same training runs already."""
    with ExitStack() as held:
        taken = False
        if processes.first:
            run.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout):
                held.enter_context(locks.take(run / _LOCK, 0))
                held.callback(_forget_lock, run)
                taken = True
        if not processes.from_first(taken):
            raise StoreLocked(
                "the same training, of the same scans, is running already",
                next_step="wait for its end, or train with another --seed",
            )
        yield


def _forget_lock(run: Path) -> None:
    """Leave of a training's folder what a resumption needs, and nothing where nothing was trained."""
    (run / _LOCK).unlink(missing_ok=True)
    with suppress(OSError):
        run.rmdir()


def _stored_by_first(repository: Repository, trained: Trained, run: Path, processes: Processes) -> EncoderCard:
    card = None
    if processes.first:
        card = _commit(repository, trained)
        shutil.rmtree(run)
    card = processes.from_first(card)
    assert card is not None
    return card


def _commit(repository: Repository, trained: Trained) -> EncoderCard:
    with repository.transaction("pretrain") as transaction:
        directory = transaction.stage("encoder")
        card = write_encoder(directory, trained.card, trained.state)
        shutil.copyfile(trained.metrics, directory / "metrics.jsonl")
        artefact = transaction.add("encoder", directory, encoder=card.id)

        def propose(head: Snapshot) -> Proposal:
            # The same run again gives the same weights, and so the same id: there is nothing to add.
            there = {known.fields["encoder"] for known in head.artefacts("encoder")}
            return Proposal(add=[] if card.id in there else [artefact])

        transaction.commit(propose)
    return card


def _source(snapshot: Snapshot, row: Mapping[str, Any], spacing_mm: float, intensity: Intensity) -> StoredSource:
    shape, spacing = [row[f"n{axis}"] for axis in "xyz"], [row[f"d{axis}_mm"] for axis in "xyz"]
    return StoredSource(
        partial(_opened, snapshot, row["scan"]), spacing_mm, intensity, working_voxels(shape, spacing, spacing_mm)
    )


def _opened(snapshot: Snapshot, scan: str) -> StoredScan:
    return open_chunks(snapshot.chunks_path(scan), scan)


def _hash(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
