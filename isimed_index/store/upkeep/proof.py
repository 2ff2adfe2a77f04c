"""The proof that ends a purge: no copy, no file and no generation holds anything of the subject.

copies on this machine go ─▶ what was found before is gone ─▶ every file is searched for ids (see `absence`)
"""

from __future__ import annotations

import warnings
from dataclasses import replace

from isimed_index.errors import StoreDamaged, StoreWarning
from isimed_index.store import files
from isimed_index.store.place.storage import Storage
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.upkeep.absence import Searched, Words, search
from isimed_index.store.upkeep.audit import History
from isimed_index.store.upkeep.collect import staged_by_living
from isimed_index.store.upkeep.traces import Traces
from isimed_index.store.upkeep.unfinished import Unfinished


def history_of(storage: Storage) -> History:
    """All manifests, without a word of those that only a copy stands for: `check` tells, and most of them expire."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        return History.read(storage)


def forget_copies(storage: Storage) -> None:
    """Drop from this machine's cache of a store elsewhere what is not the store's, or not any more.

    A directory has no copies: nothing happens there. Locks, and what living writers have staged, stay.
    """
    there = [
        f"{folder}/{path.name}"
        for folder in (*files.FOLDERS.values(), files.TMP)
        for path in (storage.root / folder).glob("*")
        if path.suffix != ".lock"
    ]
    staged = staged_by_living(storage)
    named = {made.path for manifest in history_of(storage).manifests.values() for made in manifest.artefacts}
    for path in there:
        if path not in named | staged:
            storage.forget(path)


def words_of(traces: Traces, head: Snapshot) -> Words:
    """What to look for: ids that nobody else has now."""
    scans = head.table("scans")
    others = _others(traces, head)
    words = Words.of({traces.subject, *traces.scans, *traces.digests} - {""}, others)
    sessions = traces.sessions - set(scans.column("session").to_pylist())
    return Words((*words.anywhere, *Words.of(sessions, others).anywhere), words.cells)


def _others(traces: Traces, head: Snapshot) -> set[str]:
    """Ids and digests that scans of others have now."""
    rows = [row for row in head.table("scans").to_pylist() if row["subject"] != traces.subject]
    return {str(row[name]) for row in rows for name in ("scan", "subject", "digest")}


def prove(storage: Storage, traces: Traces, record: Unfinished, head: Snapshot) -> Searched:
    """Search all that is left; `StoreDamaged`, naming files, when anything of the subject is there."""
    held = record.artefacts
    there = sorted(path for path in held if storage.exists(path))
    named = [
        number
        for number, made in history_of(storage).manifests.items()
        if any(one.path in held for one in made.artefacts)
    ]
    theirs = _others(traces, head) | set(head.table("scans").column("session").to_pylist())
    words = replace(words_of(traces, head), sealed=record.sealed().but({value for value in theirs if value}))
    searched = search(storage, words)
    found = sorted({*there, *searched.hits})
    if found or named:
        raise StoreDamaged(
            f"something of the subject is still in {len(found)} files ({', '.join(found[:10])}) and {len(named)} "
            "generations",
            next_step="remove files by hand that are not the store's, then run isimed purge again",
        )
    return searched
