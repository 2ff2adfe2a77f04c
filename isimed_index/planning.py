"""What there is to do before anything is encoded: which scans, how many patches, in which runtime, and how long.

`index` and its dry run begin with the same steps, so that the one does what the other one said.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from isimed_index.encode import (
    IndexPlan,
    Probe,
    Size,
    Workers,
    ask,
    check_scheduler,
    choose_on,
    foresee,
    lattice_points,
    measure,
    most_telling,
    stride_in_voxels,
    stride_of_grid,
    task_key,
    workers,
)
from isimed_index.encode.forecast import MEASURED, Measured
from isimed_index.encoders.card import EncoderCard, read_card
from isimed_index.encoders.runtimes.kind import NATIVE, Runtime
from isimed_index.errors import IsimedWarning, NotFound, StoreDamaged, WorkerFailed
from isimed_index.ingest.report import Refusal
from isimed_index.progress import Progress
from isimed_index.scans.prepare import WorkingGrid
from isimed_index.store.integrity import check_there
from isimed_index.store.segment import Segment
from isimed_index.store.snapshot import Snapshot

if TYPE_CHECKING:
    from isimed_index.encoders.runtimes.trial import Choice, Job

_LONG = 50_000  # patches at most from which on the bare network is measured for comparison, if it was not in a trial


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
    max_latency_ms: float | None = None  # of a single query without filter
    refit: bool = False  # the canonical frame, whatever charts it has

    def __post_init__(self) -> None:
        check_scheduler(self.scheduler)


def plan_index(snapshot: Snapshot, scans: Sequence[str], options: IndexOptions, progress: Progress) -> IndexPlan:
    """What `index_scans` would do with `scans`, and what that would take, from a measurement of some seconds.

    Nothing is written to the store. Scans are checked for missing files and sizes; those that are measured for hashes.
    """
    wanted = what_is_wanted(snapshot, scans, options)
    plan = IndexPlan(wanted.card.id, wanted.stride_mm, skipped=wanted.skipped)
    if not wanted.todo and not wanted.skipped:
        raise no_scan()
    tell_of_encoding_again(snapshot, wanted)
    tell_of_other_strides(snapshot, wanted)
    damaged: dict[str, Refusal] = {}
    sizes = list(_there(snapshot, wanted, damaged))
    probed = tuple(_readable(snapshot, most_telling(sizes), damaged))
    if not probed:  # nothing to encode, or nothing that could be measured
        return _with_numbers(plan, wanted.card, sizes, damaged, Measured(), processes=0, overlap=False)
    with workers(options.scheduler) as where:
        job = job_of(snapshot, wanted, sum(size.points for size in sizes_of(snapshot, wanted)), options)
        tell_of_stride(job, wanted.card, where)
        choice = choose_runtime(job, where, progress)
        probe = Probe(job.encoder, job.device, job.trust, choice.runtime, wanted.stride_vox, probed)
        progress.start("measure", None, "scans")
        died = WorkerFailed("the workers died that measured how long it would take", next_step="isimed index")
        measured = ask(measure, probe, where, died)
        progress.advance(len(measured.samples))
        progress.finish()
        processes = max(1, where.processes())
        overlap = where.places() > processes
    damaged |= measured.refused
    plan = replace(
        plan,
        runtime=choice.runtime.name,
        precision=choice.runtime.precision,
        trial_patches_per_s=dict(choice.patches_per_s),
    )
    return _with_numbers(plan, wanted.card, sizes, damaged, measured, processes=processes, overlap=overlap)


def _with_numbers(
    plan: IndexPlan,
    card: EncoderCard,
    sizes: Sequence[Size],
    damaged: Mapping[str, Refusal],
    measured: Measured,
    *,
    processes: int,
    overlap: bool,
) -> IndexPlan:
    """`plan` for those of the scans `sizes` that are not damaged."""
    sound = [size for size in sizes if size.scan not in damaged]
    plan = replace(plan, to_encode=[size.scan for size in sound], damaged=list(damaged.values()))
    if not sound:
        return replace(plan, basis=dict.fromkeys(("patches", "bytes_written"), MEASURED))
    return foresee(plan, card, sound, measured, processes=processes, overlap=overlap)


def no_scan() -> NotFound:
    """The error of a job that no scan is in."""
    return NotFound("there is no scan to index", next_step="isimed add PATH, or widen --where")


@dataclass(frozen=True, slots=True)
class Wanted:
    """An encoder, its lattice, and which scans have no vectors of these yet."""

    card: EncoderCard
    directory: Path
    stride_vox: int
    keys: Mapping[str, str]  # scan → key of its task
    todo: list[str]
    skipped: list[str]

    @property
    def stride_mm(self) -> float:
        """The step of the lattice."""
        return self.stride_vox * self.card.spacing_mm


def what_is_wanted(head: Snapshot, scans: Sequence[str], options: IndexOptions) -> Wanted:
    """The encoder and lattice of a job, and which of `scans` are not encoded by it yet, in their order."""
    directory = head.encoder_path(options.encoder)
    card = read_card(directory)
    stride = stride_in_voxels(card, options.stride_mm)
    precision = options.runtime.precision
    keys = {scan: task_key(head.scan_row(scan)["digest"], card, stride, precision) for scan in scans}
    done = {segment.task for segment in head.segments(card.id)}
    todo = [scan for scan in keys if keys[scan] not in done]
    return Wanted(card, directory, stride, keys, todo, [scan for scan in keys if keys[scan] in done])


def sizes_of(head: Snapshot, wanted: Wanted) -> Iterator[Size]:
    """The size of each scan that is to be encoded, from the catalogue."""
    for scan in wanted.todo:
        row = head.scan_row(scan)
        x, y, z = (int(row[f"n{axis}"]) for axis in "xyz")
        spacing = np.diag([*(row[f"d{axis}_mm"] for axis in "xyz"), 1.0])
        shape = WorkingGrid.of((x, y, z), spacing, wanted.card.spacing_mm).shape
        yield Size(scan, x * y * z, lattice_points(wanted.card, shape, wanted.stride_vox))


def _there(head: Snapshot, wanted: Wanted, damaged: dict[str, Refusal]) -> Iterator[Size]:
    """Those of the scans to encode whose files are there, in their sizes; the others go to `damaged`."""
    voxels = {artefact.path: artefact for artefact in head.artefacts("scan")}
    for size in sizes_of(head, wanted):
        try:
            check_there(head.storage, voxels[head.scan_row(size.scan)["artefact"]])
        except StoreDamaged as error:
            damaged[size.scan] = Refusal.of(size.scan, error)
        else:
            yield size


def _readable(head: Snapshot, sizes: Sequence[Size], damaged: dict[str, Refusal]) -> Iterator[tuple[str, str]]:
    """Scans and the paths of their voxels, which are as committed; the others go to `damaged`."""
    for size in sizes:
        try:
            yield size.scan, str(head.chunks_path(size.scan))
        except StoreDamaged as error:
            damaged[size.scan] = Refusal.of(size.scan, error)


def processes_now(where: Workers) -> int | None:
    """How many processes encode at the moment; None when the scheduler is lost, of which others will tell."""
    with suppress(WorkerFailed):
        return where.processes()
    return None


def bare_pace_on(job: Job, where: Workers, choice: Choice) -> float | None:
    """Patches a second of the bare network in one process: from the trial, or for a long job measured now."""
    from isimed_index.encoders.runtimes.trial import bare_pace

    if job.patches < _LONG or choice.runtime.name in choice.patches_per_s:
        return choice.patches_per_s.get(choice.runtime.name)
    died = WorkerFailed("the workers died that measured the network", next_step="isimed index again")
    return ask(bare_pace, replace(job, asked=choice.runtime), where, died)


def tell_of_stride(job: Job, card: EncoderCard, where: Workers) -> None:
    """Warn of a stride at which every patch is encoded by itself, though the network could share work between them."""
    from isimed_index.encoders.runtimes.trial import cheaper_strides

    if job.stride_vox == card.stride_vox:
        return
    died = WorkerFailed("the workers died that opened the encoder", next_step="isimed index again")
    near = [f"{stride * card.spacing_mm:g}" for stride in ask(cheaper_strides, job, where, died)]
    if near:
        warnings.warn(
            f"at a stride of {job.stride_vox * card.spacing_mm:g} mm patches share no work: each is encoded by itself, "
            f"seen to take 27 times as long. The nearest strides that share it are {' and '.join(near)} mm. "
            f"Next: isimed index --stride {near[-1]}",
            IsimedWarning,
            stacklevel=3,
        )


def tell_of_encoding_again(head: Snapshot, wanted: Wanted) -> None:
    """Warn of scans that are stored at another stride, and are to be encoded at this one instead."""
    stored = head.segments_by_scan(wanted.card.id)
    again, strides = _at_other_strides([stored[scan] for scan in wanted.todo if scan in stored], wanted)
    if strides:
        own = ", the encoder's own" if wanted.stride_vox == wanted.card.stride_vox else ""
        warnings.warn(
            f"{again} scan{'s are' if again > 1 else ' is'} stored at another stride ({strides} mm), which this one of "
            f"{wanted.stride_mm:g} mm{own}, takes the place of. "
            f"To keep theirs: isimed index --stride {strides.split()[0]}",
            IsimedWarning,
            stacklevel=3,
        )


def tell_of_other_strides(head: Snapshot, wanted: Wanted) -> None:
    """Warn of scans that this job is not about, and that are stored at another stride."""
    stored = head.segments_by_scan(wanted.card.id)
    others, strides = _at_other_strides([stored[scan] for scan in stored if scan not in wanted.keys], wanted)
    if strides:
        warnings.warn(
            f"{others} scan{'s' if others > 1 else ''} of the store stay{'' if others > 1 else 's'} at another stride "
            f"({strides} mm) than this one of {wanted.stride_mm:g} mm: their places are found to another precision. "
            f"Next: isimed index --stride {wanted.stride_mm:g} without --where",
            IsimedWarning,
            stacklevel=3,
        )


def _at_other_strides(segments: Iterable[Segment], wanted: Wanted) -> tuple[int, str]:
    """How many segments are of another stride, and these in mm: `4 and 16`; empty where none is."""
    strides = [stride_of_grid(segment.grid) for segment in segments]
    others = [stride for stride in strides if stride is not None and stride != wanted.stride_vox]
    named = [f"{stride * wanted.card.spacing_mm:g}" for stride in sorted(set(others))]
    return len(others), " and ".join(named)


def job_of(head: Snapshot, wanted: Wanted, patches: int, options: IndexOptions) -> Job:
    """The encoding of so many patches at most, and what is known of it: what encoded this encoder's last scans."""
    from isimed_index.encoders.runtimes.trial import Job

    ran = [
        segment.artefact.fields.get("runtime", {})
        for segment in sorted(head.segments(wanted.card.id), key=lambda segment: segment.first_row_id)
    ]
    before = ran[-1].get("name") if ran and ran[-1].get("precision") == options.runtime.precision else None
    chosen = [
        one["auto"]
        for one in ran
        if one.get("name") == before and one.get("precision") == options.runtime.precision and "auto" in one
    ]
    settled = any(auto["trial"] or patches <= auto["patches"] for auto in chosen)
    directory, asked = str(wanted.directory), options.runtime
    return Job(directory, options.device, options.trust, asked, patches, wanted.stride_vox, before, settled)


def choose_runtime(job: Job, where: Workers, progress: Progress) -> Choice:
    """The runtime that the workers will use; once a run, so that all of them use the same."""
    progress.start("runtime", 1, "choice")
    choice = choose_on(job, where)
    rate = choice.patches_per_s.get(choice.runtime.name)
    progress.advance(1, str(choice.runtime) + ("" if rate is None else f", {rate:,.0f} patches/s"))
    progress.finish()
    for name, reason in choice.failed.items():
        warnings.warn(f"the runtime {name} is left aside: {reason}", IsimedWarning, stacklevel=2)
    return choice
