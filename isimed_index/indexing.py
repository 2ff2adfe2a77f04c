"""`index`: encode what is not encoded yet, give every scan a chart, build an index whose recall is measured.

scans − committed tasks ─▶ encode ─▶ commit what has ended, while others go on ─▶ charts ─▶ commit ─▶ regions ─▶
    commit ─▶ index ─▶ commit
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from isimed_index.encode import (
    Encoded,
    EncodeTask,
    Workers,
    choose_on,
    encode_batches,
    stride_in_voxels,
    task_key,
    workers,
)
from isimed_index.encoders.card import EncoderCard, read_card
from isimed_index.encoders.runtimes.kind import NATIVE, Runtime
from isimed_index.errors import Incompatible, IsimedWarning, NotFound, ScanRefused, StoreDamaged, StoreWarning
from isimed_index.frame import Frame, extend_frame, fit_frame, read_frame, write_frame
from isimed_index.index.card import IndexCard, row_ranges
from isimed_index.index.plan import build_index, ram_bytes
from isimed_index.ingest.report import Refusal
from isimed_index.lattice import Lattice, Standard, read_lattice
from isimed_index.progress import Progress
from isimed_index.regions import commit_regions
from isimed_index.store.manifest import Artefact, listed
from isimed_index.store.repository import Repository
from isimed_index.store.segment import Segment
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal, Transaction

if TYPE_CHECKING:
    from isimed_index.encoders.runtimes.trial import Job

REFIT_SHARE = 0.25  # the frame is fitted anew when more than this share of the scans has no chart
_NO_PATCH = ScanRefused(
    "no patch of it holds enough foreground to be encoded", next_step="use an encoder with smaller patches or spacing"
)
_SAMPLE = 200  # vectors of each scan that the standard is estimated from


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What `index` did: scans encoded now, encoded before, refused; patches and measured recall of the index.

    `runtime` and `precision` are empty when nothing had to be encoded, `trial_patches_per_s` when there was no trial.
    """

    encoder: str
    encoded: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    patches: int = 0
    recall_at_10: float = 1.0
    index_kind: str = ""
    runtime: str = ""
    precision: str = ""
    trial_patches_per_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """Which encoder and lattice, where to run, and what the index has to reach."""

    encoder: str | None = None
    stride_mm: float | None = None
    scheduler: str = "threads"
    device: str = "auto"
    min_recall: float = 0.98
    max_ram: int | None = None
    trust: tuple[str, ...] = ()  # code outside of this library that the encoder may run
    runtime: Runtime = NATIVE  # `auto` means the one that a trial finds


def index_scans(repository: Repository, scans: Sequence[str], options: IndexOptions, progress: Progress) -> IndexReport:
    """Encode `scans`, fit the frame and build the index over all encoded scans; what is committed is not done again."""
    with repository.transaction("index") as transaction, repository.pin() as head:
        directory = head.encoder_path(options.encoder)
        card = read_card(directory)
        stride = stride_in_voxels(card, options.stride_mm)
        report = IndexReport(card.id)
        precision = options.runtime.precision
        keys = {scan: task_key(head.scan_row(scan)["digest"], card, stride, precision) for scan in scans}
        scans = list(dict.fromkeys(scans))
        done = {segment.task for segment in head.segments(card.id)}
        report.skipped.extend(scan for scan in scans if keys[scan] in done)
        todo = [scan for scan in scans if keys[scan] not in done]
        with workers(options.scheduler) as where:
            if todo:
                job = _job(head, card, todo, directory, stride, options)
                report, options = _with_runtime(job, where, report, options, progress)
            progress.start("encode", len(todo), "scans")
            whole = _whole(head, todo, report)
            tasks = _tasks(whole, keys, directory, transaction.stage("segment"), stride, options)
            patches = 0
            for results in encode_batches(tasks, where):
                patches += _commit_segments(transaction, head, card, results, report)
                progress.advance(len(results), f"{patches:,} patches")
            progress.finish()
        if not report.encoded and not report.skipped:
            if report.refused:
                return report
            raise NotFound("there is no scan to index", next_step="isimed add PATH, or widen --where")
        rows = sum(segment.rows for segment in repository.snapshot().segments(card.id))
        if not rows:
            raise NotFound(
                "every patch of the encoded scans was deleted, so there is nothing to index",
                next_step="isimed restore a generation that has them, or isimed index --stride MM to encode anew",
            )
        _commit_frame_and_regions(transaction, card, progress)
        built = _commit_index(transaction, card, options)
    return replace(report, patches=rows, recall_at_10=built.recall_at_10, index_kind=built.recipe.factory)


def derive_again(repository: Repository, encoder_id: str, progress: Progress, min_recall: float | None = None) -> None:
    """Fit the frame, pool regions and build the index of an encoder, if any row of it lives; nothing is encoded."""
    options = IndexOptions() if min_recall is None else IndexOptions(min_recall=min_recall)
    with repository.transaction("index") as transaction, repository.pin() as head:
        if any(segment.rows for segment in head.segments(encoder_id)):
            card = read_card(head.encoder_path(encoder_id))
            _commit_frame_and_regions(transaction, card, progress)
            _commit_index(transaction, card, options)


def recalls_asked_for(repository: Repository) -> dict[str, float]:
    """By encoder (card id), the recall that its newest index was built for, where a generation still has its card."""
    found: dict[str, float] = {}
    for generation in reversed(listed(repository.storage)):
        with suppress(StoreDamaged, NotFound), warnings.catch_warnings():
            warnings.simplefilter("ignore", StoreWarning)  # of an index that is damaged: its card is not read
            snapshot = repository.snapshot(generation)
            for encoder in {made.fields["encoder"] for made in snapshot.artefacts("index")} - found.keys():
                built = _stored_index(snapshot, encoder)
                if built is not None:
                    found[encoder] = built.min_recall
    return found


def _job(
    head: Snapshot, card: EncoderCard, scans: Sequence[str], directory: Path, stride: int, options: IndexOptions
) -> Job:
    """What is known of the encoding to come: how many patches at most, and what encoded this encoder's last scans."""
    from isimed_index.encoders.runtimes.trial import Job

    step_mm, patches = stride * card.spacing_mm, 0
    for row in map(head.scan_row, scans):
        patches += math.prod(max(1, math.ceil(row[f"n{axis}"] * row[f"d{axis}_mm"] / step_mm)) for axis in "xyz")
    last = max(head.segments(card.id), key=lambda segment: segment.first_row_id, default=None)
    ran = {} if last is None else last.artefact.fields.get("runtime", {})
    before = ran.get("name") if ran.get("precision") == options.runtime.precision else None
    return Job(str(directory), options.device, options.trust, options.runtime, patches, stride, before)


def _with_runtime(
    job: Job, where: Workers, report: IndexReport, options: IndexOptions, progress: Progress
) -> tuple[IndexReport, IndexOptions]:
    """Report and options with the runtime that the workers will use; once a run, so that all of them use the same."""
    progress.start("runtime", 1, "choice")
    choice = choose_on(job, where)
    rate = choice.patches_per_s.get(choice.runtime.name)
    progress.advance(1, str(choice.runtime) + ("" if rate is None else f", {rate:,.0f} patches/s"))
    progress.finish()
    for name, reason in choice.failed.items():
        warnings.warn(f"the runtime {name} is left aside: {reason}", IsimedWarning, stacklevel=2)
    told = replace(
        report,
        runtime=choice.runtime.name,
        precision=choice.runtime.precision,
        trial_patches_per_s=dict(choice.patches_per_s),
    )
    return told, replace(options, runtime=choice.runtime)


def _whole(head: Snapshot, scans: Sequence[str], report: IndexReport) -> Iterator[tuple[str, Path]]:
    """Each scan whose voxels are as committed, and where they are on this machine; a damaged one is refused by name."""
    for scan in scans:
        try:
            yield scan, head.chunks_path(scan)
        except StoreDamaged as error:
            report.refused.append(Refusal.of(scan, error))


def _tasks(
    scans: Iterator[tuple[str, Path]],
    keys: Mapping[str, str],
    encoder: Path,
    bench: Path,
    stride: int,
    options: IndexOptions,
) -> Iterator[EncodeTask]:
    release = version("isimed-index")
    for number, (scan, voxels) in enumerate(scans):
        yield EncodeTask(
            number,
            keys[scan],
            scan,
            str(voxels),
            str(encoder),
            str(bench),
            stride,
            options.device,
            options.trust,
            options.runtime,
            release,
        )


def _commit_segments(
    transaction: Transaction, head: Snapshot, card: EncoderCard, results: Sequence[Encoded], report: IndexReport
) -> int:
    """Commit a batch; a segment that another process committed meanwhile is left out. Returns the patches encoded."""
    staged: list[Artefact] = []
    for result in results:
        if result.error is not None:
            report.refused.append(Refusal.of(result.task.scan, result.error))
            continue
        if not result.fields["rows"]:
            report.refused.append(Refusal.of(result.task.scan, _NO_PATCH))
            continue
        fields = {**result.fields, "scan_artefact": head.scan_row(result.task.scan)["artefact"]}
        folder = transaction.stage("segment")
        Path(result.staged).rename(folder)  # from now on no worker knows where it is
        staged.append(transaction.add("segment", folder, **fields))
        report.encoded.append(result.task.scan)

    def propose(now: Snapshot) -> Proposal:
        stored = now.segments(card.id)
        there = {segment.task for segment in stored}
        fresh = [artefact for artefact in staged if artefact.fields["task"] not in there]
        again = {artefact.fields["scan_artefact"] for artefact in fresh}
        # A scan that is encoded on another lattice has that one from now on: one segment per scan and encoder.
        return Proposal(fresh, drop_segments=[segment for segment in stored if segment.scan_artefact in again])

    transaction.commit(propose)
    return sum(int(artefact.fields["rows"]) for artefact in staged)


def _commit_frame_and_regions(transaction: Transaction, card: EncoderCard, progress: Progress) -> None:
    """A frame, and regions that are measured by it: both again when another process takes one of them away."""
    done = False
    while not done:
        _commit_frame(transaction, card, progress)
        done = commit_regions(transaction, card, progress)


def _commit_frame(transaction: Transaction, card: EncoderCard, progress: Progress) -> None:
    """Fit the frame anew when many scans have no chart in it, extend it when few have none.

    When another process commits a frame meanwhile, its charts are kept: this one begins again from there.
    """
    done = False
    while not done:
        with transaction.repository.pin() as snapshot:
            frame = _next_frame(snapshot, card, progress)
            if frame is None:
                return
            before = snapshot.newest("frame", card.id)
            write = partial(write_frame, frame=frame, voxels=snapshot.voxels_of)
            done = _commit_one(transaction, "frame", write, card, instead_of=before)


def _next_frame(snapshot: Snapshot, card: EncoderCard, progress: Progress) -> Frame | None:
    """A frame with a chart of every encoded scan; None when the stored one is that already."""
    # By name: the order of rows is that in which scans were encoded, and a sum of floats depends on its order.
    segments = dict(sorted(snapshot.segments_by_scan(card.id).items()))
    before = _stored_frame(snapshot, card)
    missing = [scan for scan in segments if before is None or scan not in before.charts]
    if not missing:
        return None
    if before is None or len(missing) > REFIT_SHARE * len(segments):
        standard = _standard(card, list(segments.values()))
        return fit_frame(card.id, standard, _lattices(segments, card, standard), progress=progress)
    new = {scan: segments[scan] for scan in missing}
    return extend_frame(before, _lattices(new, card, before.standard), progress)


def _stored_frame(snapshot: Snapshot, card: EncoderCard) -> Frame | None:
    """The frame that is stored; None when there is none, or when it is damaged: it can be fitted again."""
    try:
        path = snapshot.frame_path(card.id)
        return None if path is None else read_frame(path, snapshot.voxels_of)
    except StoreDamaged as error:
        warnings.warn(f"{error}; the frame is fitted anew", StoreWarning, stacklevel=2)
        return None


def _standard(card: EncoderCard, segments: Sequence[Segment]) -> Standard:
    """Estimate centre and scale of an encoder's vectors from a regular sample of every scan's patches."""
    samples = []
    for segment in segments:
        vectors = segment.vectors(card.match_output)
        samples.append(np.asarray(vectors[:: max(1, len(vectors) // _SAMPLE)], dtype=np.float32))
    return Standard.of(card.metric, np.concatenate(samples))


def _lattices(segments: Mapping[str, Segment], card: EncoderCard, standard: Standard) -> dict[str, Lattice]:
    return {scan: read_lattice(segment, card.match_output, standard) for scan, segment in segments.items()}


def _commit_index(transaction: Transaction, card: EncoderCard, options: IndexOptions) -> IndexCard:
    """Build the index over the newest segment of every scan, unless the stored one covers these and is good enough."""
    with transaction.repository.pin() as snapshot:
        segments = sorted(snapshot.segments_by_scan(card.id).values(), key=lambda segment: segment.first_row_id)
        covers = [list(ends) for ends in row_ranges([segment.row_ids for segment in segments])]
        newest = snapshot.newest("index", card.id)
        if newest is not None and newest.fields["covers"] == covers:
            built = _stored_index(snapshot, card.id)
            if built is not None and built.min_recall >= options.min_recall and _fits(built, options.max_ram):
                return built
        blocks = [(segment.row_ids, segment.vectors(card.match_output)) for segment in segments]
        cards: list[IndexCard] = []

        def build(directory: Path) -> None:
            cards.append(build_index(directory, blocks, card.metric, options.min_recall, options.max_ram))

        _commit_one(transaction, "index", build, card, covers=covers, instead_of=newest)
        return cards[0]


def _stored_index(snapshot: Snapshot, encoder_id: str) -> IndexCard | None:
    """The card of the stored index; None when there is none that this version can read: it can be built again."""
    path = snapshot.index_path(encoder_id)
    try:
        return None if path is None else IndexCard.read(path)
    except (StoreDamaged, Incompatible):
        return None


def _fits(built: IndexCard, max_ram: int | None) -> bool:
    return max_ram is None or ram_bytes(built.recipe, built.rows, built.dim) <= max_ram


def _commit_one(
    transaction: Transaction,
    kind: Literal["frame", "index"],
    write: Callable[[Path], object],
    card: EncoderCard,
    instead_of: Artefact | None,
    **fields: Any,
) -> bool:
    """Stage, write and commit one derived artefact `instead_of` the newest one, which is no longer named then.

    False, and nothing is committed, when another process has committed one since.
    """
    directory = transaction.stage(kind)
    write(directory)
    artefact = transaction.add(kind, directory, encoder=card.id, **fields)
    before = None if instead_of is None else instead_of.path

    def propose(now: Snapshot) -> Proposal:
        newest = now.newest(kind, card.id)
        if (None if newest is None else newest.path) != before:
            return Proposal()
        return Proposal(add=[artefact], drop=[before] if before else [])

    return artefact.path in {found.path for found in transaction.commit(propose).artefacts(kind)}
