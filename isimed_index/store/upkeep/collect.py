"""Garbage collection: remove what no kept generation names, and nothing that a reader or writer still needs.

    kept       the newest K generations · tagged ones · leased ones · those that writers build on
    removed    all other manifests · artefacts that no manifest names, but for those that a living intent names

The order is what makes it safe. Names in the store are listed *before* intents and manifests are read: what is listed
is a committed artefact (a manifest names it), a staged one (a living intent names it), or nobody's. Generations are
listed before it is read which of them writers build on: these stay, and so do their successors, lest a writer publish
into a gap. Manifests that expire are first moved to `tmp/`, then leases and tags are read again, and a manifest that
somebody has pinned goes back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from isimed_index.errors import StoreDamaged, StoreUnreachable, UsageError
from isimed_index.store import files
from isimed_index.store.manifest import generation_of, listed, load, manifest_name
from isimed_index.store.place.faults import told
from isimed_index.store.place.storage import Storage
from isimed_index.store.repository import Repository
from isimed_index.store.tags import find_tag, tag_names

KEEP = 10  # generations
_AWAY = "expired-"
_NAME = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}(\.zarr|\.parquet)?")  # what we name: other files are not ours


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed, or would remove."""

    generations: tuple[int, ...]
    artefacts: tuple[str, ...]  # paths, such as segments/<ulid>
    bytes: int


def collect(
    repository: Repository, keep: int = KEEP, *, dry_run: bool = False, expire: Set[int] = frozenset()
) -> Collected:
    """Remove old generations and what only they, or nobody, needs.

    The newest `keep` generations, tagged and leased ones stay; `expire` names generations that go even so, unless one
    is the newest or leased. `StoreLocked` while another process collects; `StoreDamaged` when the newest generation,
    or one that stays, cannot be read: what it names is not known then, and nothing is removed.
    """
    if keep < 1:
        raise UsageError(f"expected to keep at least 1 generation, found {keep}", next_step="isimed gc --keep 1")
    storage = repository.storage
    with told(storage.root), storage.exclusive("collect"):
        bring_back(storage)
        entries = entries_of(storage)
        staged = staged_by_living(storage)
        if repository.snapshot().behind:
            raise StoreDamaged("the newest generation is damaged, so nothing can be collected", next_step=files.REPAIR)
        every = listed(storage)
        stays = {*every[-keep:], *_tagged(storage)} - expire | {every[-1], *leased(storage), *_built_on(storage)}
        named = _named(storage, sorted(stays & set(every)))  # before anything goes: it fails where one is damaged
        expired = [generation for generation in every if generation not in stays]
        if not dry_run:
            late = _expire(storage, expired, expire)
            expired = [generation for generation in expired if generation not in late]
            named |= _named(storage, [*late, *(new for new in listed(storage) if new > every[-1])])
        dead = [entry for entry in entries if entry not in named and entry not in staged]
        size = sum(size_of(storage, entry) for entry in dead)
        if not dry_run:
            _remove(storage, dead)
    return Collected(tuple(expired), tuple(dead), size)


def leased(storage: Storage) -> set[int]:
    """Generations that a living reader has pinned."""
    found: set[int] = set()
    for _, notes, alive in storage.claims(files.LEASES):
        if alive:
            found |= {int(entry["generation"]) for entry in notes_of(notes)}
    return found


def notes_of(notes: bytes) -> list[dict[str, Any]]:
    """The notes of a claim; a last line that is cut short was never relied on."""
    lines = []
    for line in notes.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def entries_of(storage: Storage) -> list[str]:
    """Everything in the folders of artefacts that has a name of ours."""
    found = []
    for folder in files.FOLDERS.values():
        try:
            names = storage.names(folder)
        except FileNotFoundError:
            continue
        found += [f"{folder}/{name}" for name in names if _NAME.fullmatch(name)]
    return found


def staged_by_living(storage: Storage) -> set[str]:
    """What living writers have staged."""
    return {
        str(entry["staged"])
        for _, notes, alive in storage.claims(files.INTENTS)
        if alive
        for entry in notes_of(notes)
        if "staged" in entry
    }


def _tagged(storage: Storage) -> set[int]:
    return {find_tag(storage, name).generation for name in tag_names(storage)}


def _named(storage: Storage, generations: Sequence[int]) -> set[str]:
    return {artefact.path for generation in generations for artefact in load(storage, generation).artefacts}


def _built_on(storage: Storage) -> set[int]:
    """The generations that living writers commit after, and their successors, which they must find if they are late."""
    heads = [
        [int(entry["head"]) for entry in notes_of(notes) if "head" in entry][-1:]
        for _, notes, alive in storage.claims(files.INTENTS)
        if alive
    ]
    return {generation for head in heads for last in head for generation in (last, last + 1)}


def _expire(storage: Storage, generations: Sequence[int], untag: Set[int]) -> list[int]:
    """Take manifests away, but bring those back that were pinned or tagged meanwhile, and return these."""
    for generation in generations:
        storage.move(manifest_name(generation), _away(generation))
    late = sorted((leased(storage) | _tagged(storage) - untag) & set(generations))
    for generation in generations:
        if generation in late:
            storage.move(_away(generation), manifest_name(generation))
        else:
            storage.remove(_away(generation))
    storage.settle([_away(generation) for generation in generations])  # before what they name goes
    return late


def bring_back(storage: Storage) -> None:
    """Undo what a collector that died had taken away: a reader may have pinned it."""
    for name in storage.names(files.TMP):
        generation = generation_of(name.removeprefix(_AWAY)) if name.startswith(_AWAY) else None
        if generation is not None:
            storage.move(_away(generation), manifest_name(generation))


def _away(generation: int) -> str:
    return f"{files.TMP}/{_AWAY}{manifest_name(generation).split('/')[1]}"


def size_of(storage: Storage, entry: str) -> int:
    try:
        return storage.size(entry)[0]
    except StoreUnreachable:
        raise
    except OSError:
        return 0


def _remove(storage: Storage, dead: list[str]) -> None:
    for entry in dead:
        storage.remove(entry)
    storage.settle(dead)
    storage.sweep()
