"""`pretrain`: train an encoder on stored scans and store it, by one process or by several that torchrun started.

scans · subjects ─▶ train (checkpoints in tmp/pretrain-<hash>) ─▶ commit: weights, card, metrics     by rank 0 alone
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import Timeout

from isimed_index.config import PretrainConfig, naming_fields
from isimed_index.encoders.card import LONGEST_NAME, RUN, EncoderCard, is_name, read_card
from isimed_index.encoders.runtime import write_encoder
from isimed_index.errors import IsimedNote, StoreDamaged, StoreLocked, TrainingWarning, UsageError
from isimed_index.pretrain import checkpoint
from isimed_index.pretrain.processes import Processes, joined
from isimed_index.pretrain.reading import StoredSource, working_voxels
from isimed_index.pretrain.records import Watchers
from isimed_index.pretrain.stopping import Stopped
from isimed_index.pretrain.trainer import Trained, intensity_of, train
from isimed_index.progress import Progress
from isimed_index.scans.chunks import StoredScan, open_chunks
from isimed_index.scans.prepare import Intensity
from isimed_index.space import Affine
from isimed_index.store.place import locks
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal
from isimed_index.store.transforms import transforms_to

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

    def __post_init__(self) -> None:
        if self.name is not None and not is_name(self.name):
            raise UsageError(
                f"expected a name of 1 to {LONGEST_NAME} printable characters", next_step="give another --name"
            )


def pretrain(repository: Repository, scans: Sequence[str], training: Training, progress: Progress) -> EncoderCard:
    """Train on `scans` and store the encoder; `training.resume` goes on from the last checkpoint of the same training.

    Configuration, voxels, subjects and, where a reference is named, the transforms to it name a training: the same
    again finds its checkpoints, and is refused while the first one runs (`StoreLocked`). Of torchrun's processes the
    first one speaks and writes, and all return the card. What is resumed and finished already is not done again. An
    encoder that is stored already keeps its name.
    """
    with joined(training.device) as processes, repository.pin() as head:
        config = training.config
        rows = [head.scan_row(scan) for scan in sorted(scans)]
        frames = _frames(head, sorted(scans), config)
        shown = [[row["digest"], row["subject"]] for row in rows]
        if frames is not None:
            shown = [[*of_scan, frame.tolist()] for of_scan, frame in zip(shown, frames, strict=True)]
        run = repository.path / "tmp" / run_name(config, shown)
        if processes.from_first(run.name) != run.name:
            raise UsageError(
                "the processes of this training see different scans",
                next_step="let other work on the store end, and start the training again",
            )
        with _only_one(run, processes), _saying_what_is_kept(run):
            done = _finished(head, run) if training.resume and processes.first else None
            if done := processes.from_first(done):
                if processes.first:
                    warnings.warn(f"finished already: {done.id} · {done.name}", IsimedNote, stacklevel=3)
                return done
            intensity = intensity_of(config)
            trained = train(
                config,
                [_source(head, row, config.spacing_mm, intensity) for row in rows],
                run,
                subjects=[row["subject"] for row in rows],
                frames=frames,
                name=training.name or f"{config.method}-{training.preset}",
                preset=training.preset,
                device=training.device,
                resume=training.resume,
                watchers=training.watchers,
                processes=processes,
                progress=progress,
            )
            voxels = [head.voxels_of[scan] for scan in scans]
            return _stored_by_first(repository, trained, run, voxels, processes)


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


@contextmanager
def _saying_what_is_kept(run: Path) -> Iterator[None]:
    """Ctrl-C that ended no step, before the first one or a second time, says what a resumption would find."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if str(stop):
            raise
        if (run / checkpoint.STATE).exists():
            raise Stopped(
                "training stopped at once; its last checkpoint is kept", "run the same command again, with --resume"
            ) from None
        raise Stopped(
            "training stopped before its first checkpoint; nothing is saved yet", "run the same command again"
        ) from None


def _finished(head: Snapshot, run: Path) -> EncoderCard | None:
    """The stored result of the training whose folder is `run`, unless that training has begun again since."""
    if (run / checkpoint.BEGUN).exists():
        return None
    for artefact in reversed(head.artefacts("encoder")):
        with suppress(StoreDamaged, OSError, ValueError, KeyError, TypeError):  # of others, which are not asked for
            directory = head.verified(artefact)
            if json.loads((directory / RUN).read_text(encoding="utf-8"))["run"] == run.name:
                return read_card(directory)
    return None


def _stored_by_first(
    repository: Repository, trained: Trained, run: Path, voxels: Sequence[str], processes: Processes
) -> EncoderCard:
    card = None
    if processes.first:
        card = _commit(repository, trained, run.name, voxels)
        shutil.rmtree(run)
        if card.name != trained.card.name:
            warnings.warn(f"there already: {card.id} · {card.name}", TrainingWarning, stacklevel=4)
        _tell_of_namesakes(repository, card)
    card = processes.from_first(card)
    assert card is not None
    return card


def _tell_of_namesakes(repository: Repository, card: EncoderCard) -> None:
    """Say that a name stands for another encoder from now on: names are labels, and the newest is taken."""
    others: list[str] = []
    with repository.pin() as head:
        for kept in head.artefacts("encoder"):
            with suppress(StoreDamaged):  # of others, which are not asked for
                other = head.card(kept)
                others += [str(other["id"])] if other["name"] == card.name and other["id"] != card.id else []
    if others:
        warnings.warn(
            f"the name {card.name!r} is now that of {len(others) + 1} encoders, and stands for the newest, {card.id}; "
            f"the one before it is {others[-1]}: ask for it by this id, or give each training a --name",
            IsimedNote,
            stacklevel=5,
        )


def _commit(repository: Repository, trained: Trained, run: str, voxels: Sequence[str]) -> EncoderCard:
    """Store the encoder, and the paths of the `voxels` it was shown; returns its card, with the name that is stored."""
    with repository.transaction("pretrain") as transaction:
        directory = transaction.stage("encoder")
        card = write_encoder(directory, trained.card, trained.state)
        shutil.copyfile(trained.metrics, directory / "metrics.jsonl")
        (directory / RUN).write_text(json.dumps({"run": run, "voxels": sorted(voxels)}) + "\n", encoding="utf-8")
        artefact = transaction.add("encoder", directory, encoder=card.id)
        known: list[str] = []

        def propose(head: Snapshot) -> Proposal:
            # The same run again gives the same weights, and so the same id: there is nothing to add.
            there = [kept for kept in head.artefacts("encoder") if kept.fields["encoder"] == card.id]
            known[:] = [str(head.card(kept)["name"]) for kept in there]
            return Proposal(add=[] if there else [artefact])

        transaction.commit(propose)
    return replace(card, name=known[-1]) if known else card


def _frames(head: Snapshot, scans: Sequence[str], config: PretrainConfig) -> list[Affine] | None:
    """The scans' transforms to the reference that the configuration names; None where it names none."""
    if not config.registered_to:
        return None
    return transforms_to(head, scans, config.registered_to, config.registered_kind)


def _source(snapshot: Snapshot, row: Mapping[str, Any], spacing_mm: float, intensity: Intensity) -> StoredSource:
    shape, spacing = [row[f"n{axis}"] for axis in "xyz"], [row[f"d{axis}_mm"] for axis in "xyz"]
    return StoredSource(
        partial(_opened, snapshot, row["scan"]), spacing_mm, intensity, working_voxels(shape, spacing, spacing_mm)
    )


def _opened(snapshot: Snapshot, scan: str) -> StoredScan:
    return open_chunks(snapshot.chunks_path(scan), scan)


def run_name(config: PretrainConfig, shown: Sequence[Any]) -> str:
    """The name of a training's folder: a hash of its configuration and of what is `shown` to it, scan by scan."""
    text = json.dumps([naming_fields(config), shown], sort_keys=True)
    return f"pretrain-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
