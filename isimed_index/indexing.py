"""`index`: encode what is not encoded yet, give every scan a chart, build an index whose recall is measured.

scans − committed tasks ─▶ encode ─▶ commit what has ended, while others go on ─▶ charts ─▶ commit ─▶
    calibration ─▶ commit ─▶ regions ─▶ commit ─▶ index ─▶ commit
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from isimed_index.calibrating import commit_calibration
from isimed_index.charting import commit_frame, some_of
from isimed_index.encode import (
    Encoded,
    EncodeTask,
    Losses,
    Pace,
    encode_batches,
    workers,
)
from isimed_index.encoders.card import EncoderCard, read_card
from isimed_index.errors import (
    Incompatible,
    IsimedError,
    IsimedWarning,
    NotFound,
    ScanRefused,
    StoreDamaged,
    StoreWarning,
)
from isimed_index.frame import LEAST_POINTS
from isimed_index.index.card import FORMAT_VERSION, IndexCard, row_ranges
from isimed_index.index.goal import Goal
from isimed_index.index.plan import build_index
from isimed_index.ingest.report import Refusal
from isimed_index.neighbours import Neighbours
from isimed_index.planning import (
    IndexOptions,
    Wanted,
    bare_pace_on,
    choose_runtime,
    job_of,
    no_scan,
    processes_now,
    sizes_of,
    tell_of_encoding_again,
    tell_of_other_strides,
    tell_of_stride,
    what_is_wanted,
)
from isimed_index.pretrain.stopping import Stopped
from isimed_index.progress import Progress
from isimed_index.regions import commit_regions
from isimed_index.store.derived import commit_derived
from isimed_index.store.manifest import Artefact, listed
from isimed_index.store.repository import Repository
from isimed_index.store.segment import Segment
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Proposal, Transaction

if TYPE_CHECKING:
    from isimed_index.encoders.runtimes.trial import Choice

_NO_PATCH = ScanRefused(
    "no patch of it holds enough foreground to be encoded", next_step="use an encoder with smaller patches or spacing"
)


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What `index` did: scans encoded now, encoded before, refused; patches and measured recall of the index.

    `stride_mm` is the lattice's step of the scans that are encoded and skipped; of others it may be another one.

    `runtime` and `precision` are empty when nothing had to be encoded; `skipped_by` says how many skipped scans each
    `runtime/precision` had encoded, `unknown` where that is not stored. `trial_patches_per_s` is empty when there was
    no trial. `patches_per_s` is over the wall time of encoding, from reading the first scan to the last commit; None
    when nothing was encoded. `bare_patches_per_s` is what the workers would do together if they did nothing but passes
    of the network over noise in memory; None where that was not measured. `workers_lost` counts workers of Dask that
    were lost while they were wanted: what they had been given was encoded by others. Of a run that was `interrupted`,
    `encoded` are the scans that are committed; `recall_at_10` is None when no index was built.
    """

    encoder: str
    stride_mm: float | None = None
    encoded: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    patches: int = 0
    recall_at_10: float | None = None
    index_kind: str = ""
    runtime: str = ""
    precision: str = ""
    trial_patches_per_s: dict[str, float] = field(default_factory=dict)
    patches_per_s: float | None = None
    bare_patches_per_s: float | None = None
    workers_lost: int = 0
    skipped_by: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def share_of_bare(self) -> float | None:
        """`patches_per_s` over `bare_patches_per_s`; None where one of them is."""
        known = self.patches_per_s is not None and self.bare_patches_per_s
        return self.patches_per_s / self.bare_patches_per_s if known else None  # type: ignore[operator]


@dataclass(slots=True)
class _Encoding:
    """How the encoding of a run goes, filled in while it does: a run that ends before its end has to tell, too."""

    choice: Choice | None = None
    pace: Pace | None = None
    losses: Losses = field(default_factory=Losses)

    def told_in(self, report: IndexReport) -> IndexReport:
        """The report, with what is known of it by now."""
        if self.choice is None:
            return report
        return replace(
            report,
            runtime=self.choice.runtime.name,
            precision=self.choice.runtime.precision,
            trial_patches_per_s=dict(self.choice.patches_per_s),
            patches_per_s=self.pace.per_s if self.pace else None,
            bare_patches_per_s=self.pace.bare_per_s if self.pace else None,
            workers_lost=self.losses.workers,
        )


class IndexStopped(Stopped):
    """Ctrl-C or SIGTERM, with a `report` of what is committed."""

    def __init__(self, report: IndexReport, todo: int) -> None:
        done = f"of {todo} scans {len(report.encoded)} are encoded and stay" if todo else "every scan is encoded"
        super().__init__(f"index was stopped; {done}", "run the same command again: it goes on from there")
        self.report = report


def index_scans(repository: Repository, scans: Sequence[str], options: IndexOptions, progress: Progress) -> IndexReport:
    """Encode `scans`, fit the frame and build the index over all encoded scans; what is committed is not done again.

    Once it is known what is to be done, Ctrl-C is raised as `IndexStopped`, and any other error has a `report` of what
    is committed, where the store can still be read.
    """
    with repository.transaction("index") as transaction, repository.pin() as head:
        wanted = what_is_wanted(head, scans, options)
        report = IndexReport(
            wanted.card.id, wanted.stride_mm, skipped=wanted.skipped, skipped_by=_encoded_by(head, wanted)
        )
        encoding = _Encoding()
        try:
            return _index(transaction, head, wanted, report, encoding, options, progress)
        except KeyboardInterrupt:
            so_far = replace(_so_far(repository.snapshot(), wanted, encoding.told_in(report)), interrupted=True)
            raise IndexStopped(so_far, len(wanted.todo)) from None
        except Exception as error:
            with suppress(IsimedError, OSError):  # a store that cannot be read any more has nothing to tell
                error.report = _so_far(repository.snapshot(), wanted, encoding.told_in(report))  # type: ignore[attr-defined]
            raise


def _index(
    transaction: Transaction,
    head: Snapshot,
    wanted: Wanted,
    report: IndexReport,
    encoding: _Encoding,
    options: IndexOptions,
    progress: Progress,
) -> IndexReport:
    card = wanted.card
    tell_of_encoding_again(head, wanted)
    if wanted.todo:
        _encode(transaction, head, wanted, report, encoding, options, progress)
        report = encoding.told_in(report)
    if not report.encoded and not report.skipped:
        if report.refused:
            return report
        raise no_scan()
    rows = sum(segment.rows for segment in transaction.repository.snapshot().segments(card.id))
    if not rows:
        raise NotFound(
            "every patch of the encoded scans was deleted, so there is nothing to index",
            next_step="isimed restore a generation that has them, or isimed index --stride MM to encode anew",
        )
    _commit_frame_and_regions(transaction, card, progress, refit=options.refit)
    built = _commit_index(transaction, card, Goal(options.min_recall, options.max_ram, options.max_latency_ms))
    now = transaction.repository.snapshot()
    tell_of_other_strides(now, wanted)
    _tell_of_few_patches(now.segments_by_scan(card.id))
    return replace(report, patches=rows, recall_at_10=built.recall_at_10, index_kind=built.recipe.factory)


def _tell_of_few_patches(segments: Mapping[str, Segment]) -> None:
    """Warn of scans with patches, but too few to fit a chart to."""
    few = sorted(scan for scan, segment in segments.items() if 0 < segment.rows < LEAST_POINTS)
    if few:
        warnings.warn(
            f"{len(few)} of {len(segments)} encoded scans have fewer than {LEAST_POINTS} patches ({some_of(few)}): too "
            "few to fit a chart to, so no answer is in view there. Next: isimed index with a smaller --stride",
            IsimedWarning,
            stacklevel=4,
        )


def _encoded_by(head: Snapshot, wanted: Wanted) -> dict[str, int]:
    """How many of the scans that are skipped were encoded by which runtime, in which precision."""
    ran = {segment.task: segment.artefact.fields.get("runtime") for segment in head.segments(wanted.card.id)}
    made = [ran[wanted.keys[scan]] for scan in wanted.skipped]
    return dict(sorted(Counter(f"{by['name']}/{by['precision']}" if by else "unknown" for by in made).items()))


def _so_far(now: Snapshot, wanted: Wanted, report: IndexReport) -> IndexReport:
    """The report of a run that did not end well: the store says what is committed, whatever was encoded by then."""
    segments = now.segments(wanted.card.id)
    done = {segment.task for segment in segments}
    encoded = [scan for scan in wanted.todo if wanted.keys[scan] in done]
    return replace(report, encoded=encoded, patches=sum(segment.rows for segment in segments))


def _encode(
    transaction: Transaction,
    head: Snapshot,
    wanted: Wanted,
    report: IndexReport,
    encoding: _Encoding,
    options: IndexOptions,
    progress: Progress,
) -> None:
    """Encode and commit what is wanted; `report` and `encoding` get what becomes of it, while it does."""
    points = {size.scan: size.points for size in sizes_of(head, wanted)}
    with workers(options.scheduler) as where:
        job = job_of(head, wanted, sum(points.values()), options)
        tell_of_stride(job, wanted.card, where)
        choice = encoding.choice = choose_runtime(job, where, progress)
        bare, processes = bare_pace_on(job, where, choice), processes_now(where)
        options = replace(options, runtime=choice.runtime)
        progress.start("encode", len(points), "scans")
        pace = encoding.pace = Pace(points, bare * processes if bare and processes else None)
        tasks = _tasks(_whole(head, wanted.todo, report), wanted, transaction.stage("segment"), options)
        for results in encode_batches(tasks, where, encoding.losses):
            pace.add([result.task.scan for result in results], _commit_segments(transaction, head, results, report))
            if processes_now(where) != processes:
                pace.bare_per_s = None  # of workers that come and go nobody can say what they could have done
            progress.advance(len(results), pace.note())
        progress.finish()


def derive_again(repository: Repository, encoder_id: str, progress: Progress, goal: Goal) -> None:
    """Fit the frame, pool regions and build the index of an encoder, if any row of it lives; nothing is encoded."""
    with repository.transaction("index") as transaction, repository.pin() as head:
        if any(segment.rows for segment in head.segments(encoder_id)):
            card = read_card(head.encoder_path(encoder_id))
            _commit_frame_and_regions(transaction, card, progress)
            _commit_index(transaction, card, goal)


def goals_asked_for(repository: Repository) -> dict[str, Goal]:
    """By encoder (card id), what its newest index was built for, where a generation still has its card."""
    found: dict[str, Goal] = {}
    for generation in reversed(listed(repository.storage)):
        with suppress(StoreDamaged, NotFound), warnings.catch_warnings():
            warnings.simplefilter("ignore", StoreWarning)  # of an index that is damaged: its card is not read
            snapshot = repository.snapshot(generation)
            for encoder in {made.fields["encoder"] for made in snapshot.artefacts("index")} - found.keys():
                built = _stored_index(snapshot, encoder)
                if built is not None:
                    found[encoder] = Goal(built.min_recall, built.max_ram_bytes, built.max_latency_ms)
    return found


def _whole(head: Snapshot, scans: Sequence[str], report: IndexReport) -> Iterator[tuple[str, Path]]:
    """Each scan whose voxels are as committed, and where they are on this machine; a damaged one is refused by name."""
    for scan in scans:
        try:
            yield scan, head.chunks_path(scan)
        except StoreDamaged as error:
            report.refused.append(Refusal.of(scan, error))


def _tasks(
    scans: Iterator[tuple[str, Path]], wanted: Wanted, bench: Path, options: IndexOptions
) -> Iterator[EncodeTask]:
    release = version("isimed-index")
    for number, (scan, voxels) in enumerate(scans):
        yield EncodeTask(
            number,
            wanted.keys[scan],
            scan,
            str(voxels),
            str(wanted.directory),
            str(bench),
            wanted.stride_vox,
            options.device,
            options.trust,
            options.runtime,
            release,
        )


def _commit_segments(transaction: Transaction, head: Snapshot, results: Sequence[Encoded], report: IndexReport) -> int:
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
        stored = now.segments(report.encoder)
        there = {segment.task for segment in stored}
        fresh = [artefact for artefact in staged if artefact.fields["task"] not in there]
        again = {artefact.fields["scan_artefact"] for artefact in fresh}
        # A scan that is encoded on another lattice has that one from now on: one segment per scan and encoder.
        return Proposal(fresh, drop_segments=[segment for segment in stored if segment.scan_artefact in again])

    transaction.commit(propose)
    return sum(int(artefact.fields["rows"]) for artefact in staged)


def _commit_frame_and_regions(
    transaction: Transaction, card: EncoderCard, progress: Progress, *, refit: bool = False
) -> None:
    """A frame, its calibration, and regions by it: all again when another process takes one of them away."""
    done = False
    while not done:
        commit_frame(transaction, card, progress, refit=refit)
        refit = False
        commit_calibration(transaction, card, progress)
        done = commit_regions(transaction, card, progress)


def _commit_index(transaction: Transaction, card: EncoderCard, goal: Goal) -> IndexCard:
    """Build the index over the newest segment of every scan, unless the stored one covers these and is good enough."""
    with transaction.repository.pin() as snapshot:
        segments = sorted(snapshot.segments_by_scan(card.id).values(), key=lambda segment: segment.first_row_id)
        covers = [list(ends) for ends in row_ranges([segment.row_ids for segment in segments])]
        newest = snapshot.newest("index", card.id)
        if newest is not None and newest.fields["covers"] == covers:
            built = _stored_index(snapshot, card.id)
            if built is not None and _is_good_enough(built, goal):
                return built
        blocks = [(segment.row_ids, segment.vectors(card.match_output)) for segment in segments]
        cards: list[IndexCard] = []

        def build(directory: Path) -> None:
            limits = (goal.min_recall, goal.max_ram_bytes)
            centres = Neighbours(snapshot, card.id).common_mm()
            cards.append(
                build_index(
                    directory, blocks, card.metric, *limits, max_latency_ms=goal.max_latency_ms, centres=centres
                )
            )

        _commit_one(transaction, "index", build, card, covers=covers, instead_of=newest)
        return cards[0]


def _stored_index(snapshot: Snapshot, encoder_id: str) -> IndexCard | None:
    """The card of the stored index; None when there is none that this version can read: it can be built again."""
    path = snapshot.index_path(encoder_id)
    try:
        return None if path is None else IndexCard.read(path)
    except (StoreDamaged, Incompatible):
        return None


def _is_good_enough(built: IndexCard, goal: Goal) -> bool:
    """Whether a stored index promises what is asked for; one of an older format promises nothing under filters."""
    fits = goal.fits(built.recipe, built.rows, built.dim)
    quick = goal.max_latency_ms is None or goal.in_time(built.ms)
    return built.format_version == FORMAT_VERSION and built.min_recall >= goal.min_recall and fits and quick


def _commit_one(
    transaction: Transaction,
    kind: Literal["frame", "index"],
    write: Callable[[Path], object],
    card: EncoderCard,
    instead_of: Artefact | None,
    **fields: Any,
) -> bool:
    """Stage, write and commit one derived artefact `instead_of` the newest one; see `commit_derived`."""
    directory = transaction.stage(kind)
    write(directory)
    artefact = transaction.add(kind, directory, encoder=card.id, **fields)
    return commit_derived(transaction, artefact, {kind: instead_of})
