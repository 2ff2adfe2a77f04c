"""`isimed check`, `repair` and `purge`: whether a store is whole, making it so, and erasing a patient."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isimed_cli.app import Format, Session, command
from isimed_cli.options import ReportOption

DAMAGED = 12
BELOW_TARGET = 14
LEAKING = 15


def parse_share(text: str) -> float:
    """`all`, or a share from 0 to 1."""
    try:
        share = 1.0 if text == "all" else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise typer.BadParameter(f"expected a share from 0 to 1, or all, found {text!r}")
    return share


@command("check", example="isimed check --read-data all", rows=True, out=True)
def check(
    session: Session,
    read_data: Annotated[
        float,
        typer.Option(metavar="SHARE|all", parser=parse_share, help="Share of the bytes to read and hash."),
    ] = 0.0,
    phi: Annotated[
        bool, typer.Option("--phi", help="Also search every file for what may identify a patient: names, dates, UIDs.")
    ] = False,
    phi_list: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, help="Identifiers to search for, one a line; turns --phi on."),
    ] = None,
    recall: Annotated[bool, typer.Option("--recall", help="Also measure the recall of every index again.")] = False,
) -> None:
    """Find what is damaged or out of place, and with --phi what may identify a patient.

    With --recall every index is asked anew, against exact search, whether it keeps the recall that it was built for,
    and what is below that with a confidence of 95 % (over all filters of an index together) is told.

    Sizes, counts, row ids, coverage, encoders and references are always compared.
    One row a finding; exit 12 when one of them is damage, 15 when one may identify a patient, 14 when an index
    has lost recall, 0 otherwise.
    """
    import isimed_index
    from isimed_cli.render import show_table
    from isimed_index.store.upkeep.findings import NOTHING, as_table

    with session.progress() as progress:
        found = isimed_index.check(session.store, read_data, progress, phi, phi_list, recall)
    if found or session.format is not Format.TABLE or session.out is not None:
        show_table(as_table(found), session.format, session.out)
    damage = sum(finding.severity == "damage" for finding in found)
    leaks = sum(finding.severity == "leak" for finding in found)
    told = f"{damage} damaged, " + (f"{leaks} may identify a patient, " if leaks else "")
    session.note(f"{told}{len(found) - damage - leaks} other findings" if found else "nothing found")
    if phi or phi_list is not None:
        session.note("writing that is burned into images cannot be found by a search: look at them")
    if read_data < 1:
        session.note(f"{read_data:.0%} of the bytes were read; --read-data all reads every one")
    if damage:
        session.note("Next: isimed repair")
        raise typer.Exit(DAMAGED)
    if leaks:
        raise typer.Exit(LEAKING)
    below = [finding for finding in found if finding.kind == "recall_below_target"]
    for finding in below:
        session.note(f"Next: {finding.repair.removeprefix(NOTHING)}")
    if below:
        raise typer.Exit(BELOW_TARGET)


@command("repair", example="isimed repair --report repaired.json", rows=True)
def repair(session: Session, report: ReportOption = None) -> None:
    """Mend what can be mended; move the rest to quarantine and list it.

    Reads the whole store first. What was derived is dropped where it is damaged, and comes back by isimed index.
    Exit 12 when something is left that only a backup can bring back.
    """
    import isimed_index
    from isimed_cli.render import show_fields, to_json

    with session.progress() as progress:
        done = isimed_index.repair(session.store, progress)
    fields = done.to_json()
    if report is not None:
        report.write_text(to_json(fields, indent=2) + "\n", encoding="utf-8")
    show_fields({name: value for name, value in fields.items() if value} or fields, session.format)
    if done.add_again:
        session.note(f"Next: isimed add the files of {len(done.add_again)} scans again")
    if done.encode_again or done.index_again:
        session.note("Next: isimed index")
    if done.encode_again:
        session.note("What had been deleted from the scans under encode_again comes back with it: delete it again")
    if done.lost:
        raise typer.Exit(DAMAGED)


@command("purge", example="isimed purge sub-13 --yes --report erasure.json", rows=True)
def purge(
    session: Session,
    subject: Annotated[str, typer.Argument(help="The subject to erase.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether it is meant.")] = False,
    unknown: Annotated[
        bool,
        typer.Option("--unknown", help="Also when nothing knows the subject: erase what is left of all deleted scans."),
    ] = False,
    report: ReportOption = None,
) -> None:
    """Erase a subject from all generations, and prove it.

    Tags and old generations that hold something of the subject go too: this cannot be undone.
    The report names neither the subject nor its scans; it is written before frames and indexes are built anew.
    Run it again to finish a purge that failed or was stopped.
    """
    import sys

    from isimed_cli.render import show_fields
    from isimed_index.errors import UsageError

    store = session.open(mode="a")
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("erasing cannot be undone and was not confirmed", next_step="add --yes")
        typer.confirm("Erase this subject from every generation? This cannot be undone", abort=True, err=True)
    with session.progress() as progress:
        done = store.purge(subject, progress, report, unknown)
    fields = done.to_json()
    short = {name: len(value) if isinstance(value, list | tuple) else value for name, value in fields.items()}
    show_fields(fields if session.format is not Format.TABLE else short, session.format)
    if not done.scans:
        session.note("no scan of this subject was known any more; what could not be told to be others' was erased")
    if done.register_again:
        session.note(f"Next: isimed register ({done.register_again} of its references went with the subject)")
    for remains in done.remains:
        session.note(f"not erased: {remains}")
