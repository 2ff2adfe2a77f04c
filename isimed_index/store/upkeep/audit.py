"""The audit: is everything there that the manifests name, as it was committed, and does it fit together?

    FORMAT.json · HEAD.json · folders ─▶ manifests ─▶ sizes of all artefacts, hashes of a share ─▶ what the newest
    generation holds (`soundness`) ─▶ tags ─▶ leftovers

Nothing is changed, and nothing that is found raises: what cannot be read is a finding.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from isimed_index.contracts import check_version
from isimed_index.errors import NotFound, StoreDamaged, StoreUnreachable, StoreWarning, UsageError
from isimed_index.progress import Progress, Silent
from isimed_index.store import files
from isimed_index.store.integrity import check_hash, check_size
from isimed_index.store.manifest import Artefact, Manifest, listed, load, manifest_name, unseal
from isimed_index.store.place.storage import Storage
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.tags import find_tag, tag_names
from isimed_index.store.upkeep.collect import entries_of, leased, size_of, staged_by_living
from isimed_index.store.upkeep.findings import Finding, Severity
from isimed_index.store.upkeep.soundness import Soundness, read_piece

__all__ = ["Finding", "audit"]

_FOLDERS = (files.MANIFESTS, files.INTENTS, files.TMP)  # the others appear when they are needed
_ALWAYS = ("table", "tombstone")  # small, and everything else is judged by them: always read whole


def audit(repository: Repository, read: float = 0.0, seed: int = 0, progress: Progress | None = None) -> list[Finding]:
    """What is not as it should be in a store, the newest generation first; an empty list when all is well.

    Sizes of all artefacts are compared, of all generations; a share `read` (0 to 1) of the bytes, drawn by `seed`, is
    read and hashed, whatever this process had read before. `Incompatible` when a newer version wrote the store.
    """
    if not 0 <= read <= 1:
        raise UsageError(f"expected a share to read from 0 to 1, found {read}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)  # what it tells is a finding here
        return _audit(repository, read, seed, progress or Silent())


def _audit(repository: Repository, read: float, seed: int, progress: Progress) -> list[Finding]:
    storage = repository.storage
    entries = entries_of(storage)  # before intents and manifests are read: see `collect`
    staged = staged_by_living(storage)
    found = [*_format(storage), *_folders(storage)]
    try:
        head = repository.pin()
    except (StoreDamaged, NotFound) as error:
        damaged = History.read(storage).damaged
        found += [Finding.of("manifest_damaged", manifest_name(number), text) for number, text in damaged.items()]
        return [*found, Finding.of("no_generation", "", error.message)]
    with head:
        past = History.read(storage, head.newest_generation)
        found += _manifests(storage, head, past)
        damage, hashed = _artefacts(storage, head, past, read, seed, progress)
        bad = {finding.artefact for finding in damage}
        checks = Soundness.of(head, bad, hashed)
        found += [*_named(damage, checks, past), *checks.findings(), *_tags(storage, head, past)]
        named = {
            artefact.path for manifest in (*past.manifests.values(), head.manifest) for artefact in manifest.artefacts
        }
        return [*found, *_leftovers(storage, [entry for entry in entries if entry not in named | staged])]


@dataclass(frozen=True, slots=True)
class History:
    """The manifests that can be read, and why the others cannot, by generation; newest first."""

    manifests: Mapping[int, Manifest] = field(default_factory=dict)
    damaged: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def read(cls, storage: Storage, until: int | None = None) -> History:
        """All manifests up to a generation; one that a collector removes meanwhile is left out."""
        manifests: dict[int, Manifest] = {}
        damaged: dict[int, str] = {}
        try:
            numbers = listed(storage)
        except StoreDamaged:
            numbers = []
        for number in reversed(numbers):
            if until is not None and number > until:
                continue
            try:
                manifests[number] = load(storage, number)
            except NotFound:
                continue
            except StoreDamaged as error:
                damaged[number] = error.message
        return cls(manifests, damaged)

    def naming(self, path: str) -> list[int]:
        """The generations that name an artefact, the newest first."""
        return [number for number, made in self.manifests.items() if any(path == one.path for one in made.artefacts)]


def _format(storage: Storage) -> Iterator[Finding]:
    try:
        form = unseal(storage.read(files.FORMAT), files.FORMAT)
    except FileNotFoundError:
        yield Finding.of("format_damaged", files.FORMAT, f"{files.FORMAT} is missing")
    except StoreUnreachable:
        raise
    except (OSError, ValueError) as error:  # StoreDamaged is an OSError
        message = error.message if isinstance(error, StoreDamaged) else f"{files.FORMAT} cannot be read"
        yield Finding.of("format_damaged", files.FORMAT, message)
    else:
        check_version(form)


def _folders(storage: Storage) -> Iterator[Finding]:
    for folder in _FOLDERS:
        if not storage.exists(folder):
            yield Finding.of("folder_missing", folder, f"the folder {folder} is missing", severity="warning")
    try:
        unseal(storage.read(files.HEAD), files.HEAD)
    except FileNotFoundError:
        if storage.exists(files.MANIFESTS) and max(listed(storage), default=0) > 0:
            yield Finding.of("head_missing", files.HEAD, f"{files.HEAD} is missing", severity="warning")
    except StoreUnreachable:
        raise
    except (OSError, ValueError):
        yield Finding.of("head_damaged", files.HEAD, f"{files.HEAD} is not as it was written")


def _manifests(storage: Storage, head: Snapshot, past: History) -> Iterator[Finding]:
    for number, message in past.damaged.items():
        if storage.exists(manifest_name(number)):
            yield Finding.of("manifest_damaged", manifest_name(number), message, generations=[number])
    there = {*past.manifests, *past.damaged}
    if head.behind and head.newest_generation not in there:
        message = f"generation {head.newest_generation} was published and is missing"
        yield Finding.of("manifest_missing", manifest_name(head.newest_generation), message)
    kept = leased(storage) | _tagged(storage)
    for number, manifest in past.manifests.items():
        if manifest.parent is None:
            continue
        parent, digest = manifest.parent
        if parent in past.manifests and past.manifests[parent].sha256 != digest:
            message = f"generation {parent} is not the one that generation {number} followed"
            yield Finding.of("manifest_replaced", manifest_name(parent), message, severity="warning")
        # A collector takes all that is older than some generation, but for those that are pinned or tagged.
        elif parent not in there and any(older < parent and older not in kept for older in there):
            message = f"generation {parent} is not in the history: it was collected or purged, or its manifest is lost"
            yield Finding.of("history_gap", manifest_name(parent), message, severity="info")


def _artefacts(
    storage: Storage, head: Snapshot, past: History, read: float, seed: int, progress: Progress
) -> tuple[list[Finding], set[str]]:
    """Artefacts of any generation that are not as committed, those of the head first; and which were read whole."""
    every: dict[str, Artefact] = {}
    for manifest in (head.manifest, *past.manifests.values()):
        for artefact in manifest.artefacts:
            every.setdefault(artefact.path, artefact)
    chosen = _drawn(list(every.values()), read, seed)
    ours = {artefact.path for artefact in head.manifest.artefacts}
    found = []
    progress.start("check", len(every), "artefacts")
    for path, artefact in every.items():
        progress.advance(1)
        what = _damage(storage, artefact, path in chosen)
        if what is None:
            continue
        naming = past.naming(path)
        if path not in ours and not any(storage.exists(manifest_name(number)) for number in naming):
            continue  # collected meanwhile
        severity: Severity = "damage" if path in ours else "warning"
        found.append(Finding.of(what[0], path, what[1], (), severity, naming))
    progress.finish()
    return found, chosen


def _drawn(artefacts: Sequence[Artefact], read: float, seed: int) -> set[str]:
    """Paths of a share of the bytes, in an order drawn by `seed`, and of what is always read."""
    chosen = {artefact.path for artefact in artefacts if artefact.kind in _ALWAYS}
    left = read * sum(artefact.bytes for artefact in artefacts)
    for artefact in random.Random(seed).sample(artefacts, len(artefacts)) if read else ():
        if left <= 0 and read < 1:
            break
        chosen.add(artefact.path)
        left -= artefact.bytes
    return chosen


def _damage(storage: Storage, artefact: Artefact, whole: bool) -> tuple[str, str] | None:
    """The kind and the text of what is wrong with an artefact; None when nothing is."""
    try:
        path = check_size(storage, artefact)
    except StoreDamaged as error:
        missing = not storage.exists(artefact.path)
        return "artefact_missing" if missing else "artefact_size", error.message
    try:
        if whole:
            check_hash(path, artefact)
    except StoreDamaged as error:
        return "artefact_hash", error.message
    if artefact.kind == "table" and read_piece(storage, artefact) is None:
        return "table_rows", f"a piece of the table {artefact.fields['table']} has lost rows or cannot be read"
    return None


def _named(damage: Sequence[Finding], checks: Soundness, past: History) -> list[Finding]:
    """The same findings with the ids of the scans that they hit."""
    kept = {artefact.path: artefact for made in past.manifests.values() for artefact in made.artefacts}
    return [
        Finding(
            finding.kind,
            finding.artefact,
            tuple(checks.scans_of(kept[finding.artefact])) if finding.artefact in kept else (),
            finding.message,
            finding.repair,
            finding.severity,
            finding.generations,
        )
        for finding in damage
    ]


def _tagged(storage: Storage) -> set[int]:
    found = set()
    for name in tag_names(storage):
        try:
            found.add(find_tag(storage, name).generation)
        except (StoreDamaged, NotFound):
            continue
    return found


def _tags(storage: Storage, head: Snapshot, past: History) -> Iterator[Finding]:
    for name in tag_names(storage):
        path = f"{files.TAGS}/{name}.json"
        try:
            tag = find_tag(storage, name)
        except NotFound:
            continue  # removed meanwhile
        except StoreDamaged as error:
            yield Finding.of("tag_damaged", path, error.message)
            continue
        if tag.generation > head.newest_generation:
            continue  # set after this audit began
        manifest = past.manifests.get(tag.generation)
        if manifest is None or manifest.sha256 != tag.manifest:
            message = f"the tag {name} names generation {tag.generation}, which is not there as it was tagged"
            yield Finding.of("tag_missing_generation", path, message)


def _leftovers(storage: Storage, orphans: Sequence[str]) -> Iterator[Finding]:
    there = [entry for entry in orphans if storage.exists(entry)]
    if there:
        size = sum(size_of(storage, entry) for entry in there)
        message = f"{len(there)} artefacts of {size} bytes that no generation names"
        yield Finding.of("orphan", "", message, severity="info")
    dead = _dead_writers(storage)
    if dead:
        yield Finding.of("stale_intent", "", f"{len(dead)} writers ended without cleaning up", severity="info")


def _dead_writers(storage: Storage) -> Set[str]:
    return {name for name, _, alive in storage.claims(files.INTENTS) if not alive}
