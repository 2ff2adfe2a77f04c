"""The verb: take files, commit them in batches; bad files are refused by name and the rest lands."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from isimed_index.errors import ScanRefused
from isimed_index.ingest.agree import agreeing
from isimed_index.ingest.choose import Chosen, choose
from isimed_index.ingest.crew import Crew, Early, Outcome
from isimed_index.ingest.hide import hide
from isimed_index.ingest.late import commit_late, labels_of, late_labels, late_metadata, may_be_called
from isimed_index.ingest.options import AddOptions
from isimed_index.ingest.report import AddReport, FileOutcome, Refusal, shown_name
from isimed_index.ingest.rows import digests, overlaps, proposal, unnamed
from isimed_index.ingest.take import Job, Staged, Taken
from isimed_index.progress import Progress, Silent
from isimed_index.scans.label_names import read_label_names
from isimed_index.scans.layouts.found import some
from isimed_index.scans.metadata import Metadata, read_metadata
from isimed_index.store.manifest import Artefact
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.transaction import Transaction

BATCH = 16  # files between two commits
_SEALERS = 2  # threads that flush and hash what was written, while the next files are read


@dataclass(frozen=True, slots=True)
class _Entry:
    """One file of a batch; what is to land has a folder that is being sealed."""

    file: Chosen
    outcome: Outcome
    sealed: Future[Artefact] | None = None


def add(
    repository: Repository, paths: Sequence[Path], options: AddOptions, progress: Progress | None = None
) -> AddReport:
    """Read files and folders into the store; idempotent by content; one commit per batch of 16."""
    progress = progress or Silent()
    names = read_label_names(options.label_names) if options.label_names else {}
    metadata = read_metadata(options.metadata)
    report = AddReport()
    with Early(_most_workers(paths, options)) as early:
        chosen = hide(choose(paths, options, report, repository.path, progress), options, repository.path)
        head = repository.pin()
        chosen = agreeing(chosen, metadata, head, report)
        report.files.extend(map(FileOutcome.refused, report.refused))
        keeper = _Keeper(report, metadata, head)
        job, workers = Job(options, names), min(options.workers, len(chosen) or 1)
        progress.start("add", len(chosen), "scans")
        speed = _Speed()
        with (
            repository.transaction("add") as transaction,
            ThreadPoolExecutor(_SEALERS, thread_name_prefix="seal") as sealers,
            Crew(job, workers, digests(head), partial(transaction.stage, "scan"), early) as crew,
        ):
            batch: list[_Entry] = []
            for file, outcome in crew.each(chosen):
                sealed = None
                if isinstance(outcome, Taken) and outcome.folder is not None:
                    sealed = sealers.submit(transaction.add, "scan", outcome.folder)
                batch.append(_Entry(file, outcome, sealed))
                progress.advance(1, speed.after(outcome))
                if len(batch) == BATCH:
                    keeper.commit(transaction, batch)
                    batch = []
            keeper.commit(transaction, batch)
    keeper.note_rest()
    progress.finish()
    return report


def _most_workers(paths: Sequence[Path], options: AddOptions) -> int:
    """How many workers there can be use for, before it is known how many files there are."""
    return options.workers if any(path.is_dir() for path in paths) else min(options.workers, len(paths))


class _Keeper:
    """Commits batches and writes down what became of their files."""

    def __init__(self, report: AddReport, metadata: Metadata, head: Snapshot) -> None:
        self._report = report
        self._metadata = metadata
        self._now = head
        self._scans = digests(head)  # scan id by digest
        self._overlaps: list[int] = []  # voxels, of each new scan whose masks overlap
        self._completed: set[str] = set()  # stored scans that got metadata
        self._copies: list[str] = []  # files whose content is a scan of another name, which is told

    def commit(self, transaction: Transaction, batch: Sequence[_Entry]) -> None:
        """Add what is new of a batch in one generation; nothing new makes none."""
        staged = [
            Staged.of(entry.outcome, entry.sealed.result())
            for entry in batch
            if isinstance(entry.outcome, Taken) and entry.sealed is not None
        ]
        if staged:
            self._now = transaction.commit(partial(proposal, staged, self._metadata))
            self._scans = digests(self._now)
        report = self._report
        report.unnamed[:] = sorted({*report.unnamed, *unnamed(staged)})
        self._overlaps += overlaps(staged)
        # What another process has added meanwhile is in the store, but not from here.
        ours = {item.digest for item in staged if item.artefact.path in self._now.scan_of}
        read = [(entry, entry.outcome) for entry in batch if isinstance(entry.outcome, Taken)]
        old = [(entry.file, taken) for entry, taken in read if entry.sealed is None or taken.digest not in ours]
        late, known = self._late(transaction, old), {id(file) for file, _ in old}
        for entry in batch:
            self._tell(entry, late.get(id(entry.file), []), is_new=id(entry.file) not in known)

    def note_rest(self) -> None:
        """Say what is only known once all is done."""
        if self._copies:
            self._report.notes.append(
                f"{len(self._copies)} files hold what is stored under another name, and are counted as unchanged: "
                f"{some(self._copies)}"
            )
        if self._completed:
            self._report.notes.append(
                f"{len(self._completed)} scans that are stored already got metadata that they did not have: "
                f"{some(sorted(self._completed))}"
            )
        if self._overlaps:
            self._report.notes.append(
                f"{sum(self._overlaps)} voxels of {len(self._overlaps)} scans lie in more than one mask; they got the "
                "highest of the labels (column label_overlap_voxels)"
            )

    def _late(self, transaction: Transaction, files: Sequence[tuple[Chosen, Taken]]) -> dict[int, list[Refusal]]:
        """What comes too late for scans that are there already, by the identity of the file that brings it."""
        late: dict[int, list[Refusal]] = {}
        labelled = [
            (file, taken.labels, self._scans[taken.digest]) for file, taken in files if taken.labels is not None
        ]
        stored = labels_of([scan for _, _, scan in labelled], self._now) if labelled else {}
        for file, labels, scan in labelled:
            if (refused := late_labels(labels, stored[scan])) is not None:
                late.setdefault(id(file), []).append(Refusal.of(file.shown, refused))
        found = late_metadata([(file, taken.digest) for file, taken in files], self._metadata, self._now)
        for place, refusal in found.refused.items():
            late.setdefault(place, []).append(refusal)
        self._now = commit_late(transaction, found) or self._now
        self._completed |= found.scans.keys()
        return late

    def _tell(self, entry: _Entry, late: Sequence[Refusal], *, is_new: bool) -> None:
        """Write down what became of one file."""
        file, taken, report = entry.file, entry.outcome, self._report
        if isinstance(taken, ScanRefused):
            refusal = Refusal.of(file.shown, taken)
            report.refused.append(refusal)
            report.files.append(FileOutcome.refused(refusal))
            return
        scan = self._scans[taken.digest]
        name = file.name if file.series or file.hidden else file.shown
        (report.added if is_new else report.unchanged).append(scan)
        if not is_new and not may_be_called(file, scan):
            self._copies.append(f"{shown_name(name)} is {scan}")
        report.refused.extend(late)
        report.files.append(
            FileOutcome(
                name=name,
                outcome="added" if is_new else "unchanged",
                scan=scan,
                refusal=late[0] if late else None,
                facts=taken.facts,
                labels=None if taken.labels is None else len(taken.labels),
                seconds=taken.seconds,
                thumbnail=taken.thumbnail,
            )
        )


class _Speed:
    """Megabytes of voxels a second since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._megabytes = 0.0

    def after(self, outcome: Outcome) -> str:
        """The rate with one more file, such as `41 MB/s`."""
        self._megabytes += outcome.megabytes if isinstance(outcome, Taken) else 0.0
        return f"{self._megabytes / max(time.monotonic() - self._began, 1e-3):.0f} MB/s"
