"""The record of a purge that is not finished: enough to go on when all that told of the subject has gone already.

    tmp/purge-<ulid>.json    sealed; written before anything goes, removed when the absence is proved

It names the subject and its scans by salted hashes alone, so only who knows the subject finds it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from isimed_index.errors import StoreDamaged
from isimed_index.store import files
from isimed_index.store.manifest import seal, unseal
from isimed_index.store.place.storage import Storage
from isimed_index.store.upkeep.absence import Sealed, Words

_RECORD, _SUFFIX = "purge-", ".json"


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What a purge found and did so far; nothing in it names anybody."""

    salt: str
    subject: str  # salted hash, as are those of the next three
    scans: frozenset[str] = frozenset()
    anywhere: frozenset[str] = frozenset()  # words to look for in any text
    cells: frozenset[str] = frozenset()  # words to look for as whole ids
    spans: frozenset[tuple[int, int]] = frozenset()  # row ids
    artefacts: frozenset[str] = frozenset()  # paths of what held something
    generations: frozenset[int] = frozenset()  # that expire
    index_again: frozenset[str] = frozenset()  # encoders (card ids)
    register_again: frozenset[str] = frozenset()  # paths of references
    rewritten: int = 0

    @classmethod
    def find(cls, storage: Storage, subject: str) -> Unfinished:
        """All that purges of a subject left behind, in one; an empty one, with a new salt, when there is nothing."""
        found = [record for _, record in _of(storage, subject)]
        return found[-1].joined(found[:-1]) if found else cls.new(subject)

    @classmethod
    def new(cls, subject: str) -> Unfinished:
        """The record of a purge that begins."""
        salt = files.new_id() + files.new_id()
        return cls(salt, Sealed(salt).hash(subject))

    @property
    def begun(self) -> bool:
        """Whether a purge was begun before."""
        return bool(self.cells)

    def joined(self, others: Collection[Unfinished]) -> Self:
        """This record with what others say; their words only where they have the same salt."""
        made = self
        for other in others:
            words = ("scans", "anywhere", "cells") if other.salt == self.salt else ()
            sets = ("spans", "artefacts", "generations", "index_again", "register_again", *words)
            both = {name: getattr(made, name) | getattr(other, name) for name in sets}
            made = replace(made, **both, rewritten=max(made.rewritten, other.rewritten))
        return made

    def knowing(self, scans: Collection[str], words: Words) -> Self:
        """The same, with the ids of scans and the words that are known now."""
        of = Sealed(self.salt).hash
        return replace(
            self,
            scans=self.scans | set(map(of, scans)),
            anywhere=self.anywhere | set(map(of, words.anywhere)),
            cells=self.cells | {self.subject} | set(map(of, words.cells)),
        )

    def sealed(self) -> Sealed:
        """Its words, to be looked for."""
        return Sealed(self.salt, self.anywhere, self.cells)

    def publish(self, storage: Storage, subject: str) -> None:
        """Make the record durable, then remove those that it replaces."""
        before = [path for path, _ in _of(storage, subject)]
        own = asdict(self)
        content = {name: sorted(value) if isinstance(value, frozenset) else value for name, value in own.items()}
        storage.mend(f"{files.TMP}/{_RECORD}{files.new_id()}{_SUFFIX}", seal(content))
        for path in before:
            storage.remove(path)

    @staticmethod
    def forget(storage: Storage, subject: str) -> None:
        """Remove what is recorded of a subject, durably."""
        found = [path for path, _ in _of(storage, subject)]
        for path in found:
            storage.remove(path)
        storage.settle(found)


def _of(storage: Storage, subject: str) -> list[tuple[str, Unfinished]]:
    """Path and content of every record of a subject, the newest last; one that cannot be read is of nobody."""
    found = []
    for name in storage.names(files.TMP):
        if not (name.startswith(_RECORD) and name.endswith(_SUFFIX)):
            continue
        try:
            fields = unseal(storage.read(f"{files.TMP}/{name}"), name)
        except (FileNotFoundError, StoreDamaged):
            continue
        if fields.get("subject") == Sealed(fields["salt"]).hash(subject):
            found.append((f"{files.TMP}/{name}", _record(fields)))
    return found


def _record(content: Mapping[str, Any]) -> Unfinished:
    own: dict[str, Any] = {name: content[name] for name in Unfinished.__dataclass_fields__}
    own["spans"] = [(first, end) for first, end in content["spans"]]
    for name, value in own.items():
        own[name] = frozenset(value) if isinstance(value, list) else value
    return Unfinished(**own)
