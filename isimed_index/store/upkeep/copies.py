"""The two files of every published document: which of them is good, and how the other is written again from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from isimed_index.errors import StoreDamaged
from isimed_index.store import files
from isimed_index.store.manifest import listed, manifest_name, parser, read_document, unseal
from isimed_index.store.place.storage import Storage
from isimed_index.store.tags import parser as tag_parser
from isimed_index.store.tags import tag_names, tag_path


@dataclass(frozen=True, slots=True)
class Document:
    """A published document as it lies in the store."""

    path: str
    damage: str | None  # what is wrong with the file itself; None when nothing is
    copy_damage: str | None  # the same of its copy
    copy_missing: bool

    @property
    def lost(self) -> bool:
        """Whether neither file is good."""
        return self.damage is not None and (self.copy_missing or self.copy_damage is not None)

    def mend(self, storage: Storage) -> bool:
        """Write the bad file again from the good one; whether there was one of each."""
        good, bad = self.path, self.path + files.COPY
        if self.damage is not None:
            good, bad = bad, good
        elif not self.copy_missing and self.copy_damage is None:
            return False
        if self.lost:
            return False
        storage.mend(bad, storage.read(good))
        return True


def documents(storage: Storage) -> Iterator[Document]:
    """FORMAT.json, every manifest and every tag, each read twice; nothing where the place keeps no copies."""
    if not storage.copies:
        return
    yield _document(storage, files.FORMAT, partial(unseal, name=files.FORMAT))
    try:
        generations = listed(storage)
    except StoreDamaged:
        generations = []
    for generation in generations:
        yield _document(storage, manifest_name(generation), parser(generation))
    for name in tag_names(storage):
        yield _document(storage, tag_path(name), tag_parser(name))


def _document(storage: Storage, path: str, parse: Callable[[bytes], Any]) -> Document:
    copy = path + files.COPY
    damage = _damage(storage, path, parse)
    copy_missing = not storage.exists(copy)
    copy_damage = None if copy_missing else _damage(storage, copy, parse)
    if damage is None and not copy_missing and copy_damage is None and storage.read(path) != storage.read(copy):
        copy_damage = f"{copy.rpartition('/')[2]} is the copy of another document"
    return Document(path, damage, copy_damage, copy_missing)


def _damage(storage: Storage, path: str, parse: Callable[[bytes], Any]) -> str | None:
    try:
        read_document(storage, path, parse)
    except StoreDamaged as error:
        return error.message
    return None
