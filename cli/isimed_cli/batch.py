"""What `add` and `index` say about a batch: counts, refusals, a report file, exit 3 when part was refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import typer

from isimed_cli.app import PARTIAL, Format, Session
from isimed_cli.render import show_columns, to_json

if TYPE_CHECKING:
    from isimed_index.api import AddReport, Refusal, Store


def add_first(session: Session, paths: Sequence[Path] | None) -> tuple[Store, list[Refusal]]:
    """Open the store for writing, after adding `paths` (and making the store) when there are any.

    The refusals are the caller's to list, also when what comes next fails.
    """
    if not paths:
        return session.open(mode="a"), []
    store = session.open_or_create()
    with session.progress() as progress:
        report = store.add(paths, progress=progress)
    session.note(counts(added_groups(report), report.refused))
    return store, list(report.refused)


def added_groups(report: AddReport) -> dict[str, list[str]]:
    """The scan ids of an add, by what happened to them."""
    return {"added": list(report.added), "unchanged": list(report.unchanged)}


def counts(groups: Mapping[str, Sequence[str]], refused: Sequence[Refusal]) -> str:
    """Such as `added 16 · unchanged 0 · refused 1`."""
    parts = [f"{name} {len(scans)}" for name, scans in groups.items()]
    return " · ".join([*parts, f"refused {len(refused)}"])


def show_batch(session: Session, groups: Mapping[str, Sequence[str]], refused: Sequence[Refusal]) -> None:
    """Counts as a line, or one row a scan with name, status, kind, reason and next_step."""
    if session.format is Format.TABLE:
        print(counts(groups, refused))
        return
    rows: list[tuple[str | None, ...]] = [
        (scan, status, None, None, None) for status, scans in groups.items() for scan in scans
    ]
    rows += [(item.name, "refused", item.kind, item.reason, item.next_step) for item in refused]
    names = ("name", "status", "kind", "reason", "next_step")
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    show_columns(dict(zip(names, columns, strict=True)), session.format)


def write_report(path: Path | None, groups: Mapping[str, Any], refused: Sequence[Refusal]) -> None:
    """The batch as one JSON object, where --report asks for it."""
    if path is not None:
        listed = [
            {"name": item.name, "kind": item.kind, "reason": item.reason, "next_step": item.next_step}
            for item in refused
        ]
        path.write_text(to_json({**groups, "refused": listed}, indent=2) + "\n", encoding="utf-8")


@contextmanager
def pictures_for(report: Path | None) -> Iterator[Path | None]:
    """A folder for pictures of scans while a report that shows them is made; None for other reports."""
    from isimed_index.report.added import PAGE, check_target

    if report is not None:
        check_target(report)
    if report is None or report.suffix.lower() not in PAGE:
        yield None
        return
    with TemporaryDirectory(prefix="isimed-") as folder:
        yield Path(folder)


def write_added_report(path: Path | None, done: AddReport, thumbnails: Path | None) -> None:
    """What became of each file, where --report asks for it."""
    from isimed_index.report.added import write_added

    if path is not None:
        write_added(done, path, thumbnails)


def list_refusals(refused: Sequence[Refusal]) -> None:
    """Each refused file and why, one line each on stderr."""
    for item in refused:
        where = "" if item.name in item.reason else f"{item.name}: "  # most reasons name their file themselves
        line = " ".join(f"error[{item.kind}]: {where}{item.reason}".split()).rstrip(".")
        print(f"{line}. Next: {item.next_step}" if item.next_step else f"{line}.", file=sys.stderr)


def end_batch(landed: int, refused: Sequence[Refusal]) -> None:
    """Exit 3 when some of the batch landed, 1 when nothing did, 0 without refusals."""
    if refused:
        raise typer.Exit(PARTIAL if landed else 1)
