"""The search: every file of a store, by the user's list and by what identifiers look like.

Found is told as where, how often and what to do; never as what. Voxels are searched for the identifiers of the list
as bytes: writing that was burned into an image is a picture of letters, and no search finds it.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from isimed_index.errors import StoreDamaged
from isimed_index.phi.contents import Text, texts_of, unpacked
from isimed_index.phi.identifiers import Identifiers
from isimed_index.phi.patterns import OUR_TIME, found_in, holds_uid, is_suspicious
from isimed_index.progress import Progress, Silent
from isimed_index.scans.allowed import OLDEST_YEARS
from isimed_index.store import files
from isimed_index.store.place.storage import Storage
from isimed_index.store.upkeep.audit import History
from isimed_index.store.upkeep.findings import Finding

_LEAST_HOST = 6  # characters: shorter names of machines are words
_NEXT = {
    "phi_identifier": "nothing: purge the subject, and add its files again without the column, or with --surrogate-ids",
    "phi_column": "nothing: add the files to a new store with a table that lacks the column",
    "phi_age": "nothing: add the files to a new store with a table that says 90 for all above 89",
    "phi_path": "nothing: add the files to a new store without --keep-source, or without the column",
    "phi_unread": "nothing: isimed check, then isimed repair",
}
_Place = tuple[str, str, str]  # kind, place, what


def leaks(storage: Storage, identifiers: Identifiers | None = None, progress: Progress | None = None) -> list[Finding]:
    """What may identify a patient in the files of a store, one finding for each kind, file and place.

    A file that cannot be decoded is a finding of damage, because nothing is known of it; of a file that no generation
    names (a writer is at work, or a repair put it aside), a warning.
    """
    progress = progress or Silent()
    known = identifiers or Identifiers({})
    own = _of_this_machine()
    every = sorted(storage.every_file())
    named = {artefact.path for manifest in History.read(storage).manifests.values() for artefact in manifest.artefacts}
    progress.start("check for identifiers", len(every), "files")
    found: list[Finding] = []
    for relative, path in every:
        progress.advance(1)
        with suppress(FileNotFoundError):  # of a writer that is at work
            counts, readable = _in_file(relative, path, known, own)
            name = _shown(relative, known)
            found += [_finding(kind, name, place, what, n) for (kind, place, what), n in counts.items()]
            if not readable:
                ours = not _is_artefact(relative) or "/".join(relative.split("/")[:2]) in named
                found.append(
                    Finding.of(
                        "phi_unread",
                        name,
                        "it cannot be decoded, so nothing is known of it",
                        severity="damage" if ours and not relative.startswith(files.QUARANTINE) else "warning",
                        repair=_NEXT["phi_unread"],
                    )
                )
    progress.finish()
    return found


def _is_artefact(relative: str) -> bool:
    return relative.split("/")[0] in files.FOLDERS.values()


def _in_file(relative: str, path: Path, known: Identifiers, own: Identifiers) -> tuple[Counter[_Place], bool]:
    """What a file holds, counted; and whether it could be decoded whole."""
    content = path.read_bytes()
    counts: Counter[_Place] = Counter()
    readable = True
    in_texts: set[int] = set()
    try:
        for text in chain([Text(relative, "the name of the file")], texts_of(path, content)):
            in_texts |= known.in_text(text.text)
            for place, n in _in_text(text, known, own):
                counts[place] += n
        hits = set().union(*(known.in_bytes(plain) for plain in unpacked(path, content, voxels=bool(known.lines))))
    except StoreDamaged:
        readable = False
        hits = known.in_bytes(content)
    kinds = {kind for kind, _, _ in counts}
    if "phi_uid" not in kinds and holds_uid(content):
        counts["phi_uid", "bytes", "a DICOM UID"] += 1
    if "phi_path" not in kinds and own.in_bytes(content):
        counts["phi_path", "bytes", "the home folder or the name of this machine"] += 1
    for line in sorted(hits - in_texts):
        counts["phi_identifier", "bytes", f"the identifier in line {line} of the list"] += 1
    return counts, readable


def _in_text(text: Text, known: Identifiers, own: Identifiers) -> Iterator[tuple[_Place, int]]:
    """What one text holds."""
    place = text.place if _may_be_shown(text.place, known) else text.place.split(" ")[0]
    for line in sorted(known.in_text(text.text)):
        yield ("phi_identifier", place, f"the identifier in line {line} of the list"), text.count
    if own.in_text(text.text):
        yield ("phi_path", place, "the home folder or the name of this machine"), text.count
    if not (text.own_time and OUR_TIME.fullmatch(text.text)):
        for pattern in found_in(text.text):
            yield (pattern.kind, place, pattern.what), text.count
    if text.column and is_suspicious(text.column):
        yield ("phi_column", place, "values under a name that identifiers are kept under"), text.count
    if text.column.lower() in ("age", "age_years", "patient_age") and _above(text.text):
        yield ("phi_age", place, f"an age above {OLDEST_YEARS - 1} that is told to the year"), text.count


def _above(text: str) -> bool:
    try:
        return float(text) > OLDEST_YEARS
    except ValueError:
        return False


def _of_this_machine() -> Identifiers:
    """The home folder and the machine's name, which no file of a store needs."""
    home, host = str(Path.home()), socket.gethostname()
    names = [home] if home.count(os.sep) > 1 else []
    return Identifiers({name.casefold(): 0 for name in [*names, *([host] if len(host) >= _LEAST_HOST else [])]})


def _may_be_shown(text: str, known: Identifiers) -> bool:
    """Whether the name of a file, a column or a key names nobody."""
    return not known.in_text(text) and next(found_in(text), None) is None


def _shown(relative: str, known: Identifiers) -> str:
    """The path of a file, or its folder alone where its name may be an identifier itself."""
    if _may_be_shown(relative, known):
        return relative
    return f"{relative.split('/')[0]}/…" if "/" in relative else "…"


def _finding(kind: str, name: str, place: str, what: str, count: int) -> Finding:
    """A finding in words."""
    times = "" if count == 1 else f", {count} times"
    repair = _NEXT.get(kind, _NEXT["phi_identifier"])
    return Finding.of(kind, name, f"{what} in {place}{times}", severity="leak", repair=repair)
