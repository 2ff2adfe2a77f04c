"""The verb: read, stage and commit files in batches; bad files are refused by name and the rest lands."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from isimed_index.errors import ScanRefused
from isimed_index.ingest.choose import Chosen, choose
from isimed_index.ingest.options import AddOptions
from isimed_index.ingest.report import AddReport, Refusal
from isimed_index.ingest.rows import digests, labelled, late_labels, late_metadata, proposal, unnamed
from isimed_index.ingest.take import Staged, each, stage
from isimed_index.progress import Progress, Silent
from isimed_index.scans.metadata import read_metadata
from isimed_index.scans.read import read_label_names
from isimed_index.store.repository import Repository

BATCH = 16  # scans in one commit


def add(
    repository: Repository, paths: Sequence[Path], options: AddOptions, progress: Progress | None = None
) -> AddReport:
    """Read files and folders into the store; idempotent by content; one commit per batch of 16."""
    progress = progress or Silent()
    names = read_label_names(options.label_names) if options.label_names else {}
    metadata = read_metadata(options.metadata) if options.metadata else {}
    report = AddReport()
    chosen = choose(paths, options, report, repository.path, progress)
    progress.start("add", len(chosen), "scans")
    with (
        repository.transaction("add") as transaction,
        ThreadPoolExecutor(options.workers, thread_name_prefix="add") as pool,
    ):
        for start in range(0, len(chosen), BATCH):
            head = repository.pin()
            known = set(digests(head))
            named = labelled(head)
            unlabelled = {digest for digest, scan in digests(head).items() if scan not in named}
            staged: list[Staged] = []
            repeated: list[tuple[Chosen, str]] = []  # with their digests
            for file, outcome in each(pool, chosen[start : start + BATCH], options, names):
                progress.advance(1)
                if isinstance(outcome, ScanRefused):
                    report.refused.append(Refusal.of(file.path.name, outcome))
                elif outcome.digest in known:
                    repeated.append((file, outcome.digest))
                    if outcome.labels is not None and outcome.digest in unlabelled:
                        report.refused.append(Refusal.of(file.path.name, late_labels()))
                else:
                    known.add(outcome.digest)
                    staged.append(stage(transaction, outcome))
            now = transaction.commit(partial(proposal, staged, metadata))
            ours = {item.artefact.path for item in staged} & now.scan_of.keys()
            report.unnamed[:] = sorted({*report.unnamed, *unnamed(staged)})
            scans = digests(now)
            report.added.extend(scans[item.digest] for item in staged if item.artefact.path in ours)
            old = [(item.file, item.digest) for item in staged if item.artefact.path not in ours] + repeated
            report.unchanged.extend(scans[digest] for _, digest in old)
            report.refused.extend(late_metadata(old, metadata, now) if metadata else ())
    progress.finish()
    return report
