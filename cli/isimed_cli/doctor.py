"""`isimed doctor`: whether this machine and the store's file system will do, and what to do where they will not."""

from __future__ import annotations

import typer

from isimed_cli.app import Session, command


@command("doctor", example="isimed doctor --store cohort.isimed", rows=True)
def doctor(session: Session) -> None:
    """Probe the machine and where the store lies, or would lie.

    Exit 0 when no probe failed; warnings are not failures. Nothing of a store is written.
    """
    from isimed_cli.render import show_columns
    from isimed_index.doctor import Status, examine
    from isimed_index.store.place.storage import storage_of

    probes = examine(storage_of(session.store).root)  # of a store in a bucket, the place of its cache
    columns = {
        "probe": [probe.name for probe in probes],
        "status": [probe.status.value for probe in probes],
        "found": [probe.found for probe in probes],
        "next_step": [probe.next_step for probe in probes],
    }
    show_columns(columns, session.format)
    if any(probe.status is Status.FAILED for probe in probes):
        raise typer.Exit(1)
