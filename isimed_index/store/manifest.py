"""Manifests: the sequenced, hash-sealed documents that say what a store holds at each generation.

A sealed document is JSON whose key `sha256` is the hash of its canonical form without that key: keys sorted, no
spaces, ASCII, whole numbers only. The file is that canonical form with the hash in it, and a line feed: so any flipped
bit or truncation breaks the seal.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

from isimed_index.contracts import check_version
from isimed_index.errors import IsimedError, NotFound, StoreDamaged, StoreNotFound, StoreUnreadable, StoreWarning
from isimed_index.store import files
from isimed_index.store.place.faults import spare

if TYPE_CHECKING:
    from isimed_index.store.place.storage import Storage

_ARTEFACT_PATH = re.compile(
    r"(scans/[0-7][0-9A-HJKMNP-TV-Z]{25}\.zarr|(tables|tombstones)/[0-7][0-9A-HJKMNP-TV-Z]{25}\.parquet"
    r"|(encoders|segments|frames|indexes|regions|references)/[0-7][0-9A-HJKMNP-TV-Z]{25})"
)
_SEAL = b'"sha256":"'
_Parsed = TypeVar("_Parsed")
_DIGITS = 20  # of a manifest's file name: enough for any 64-bit generation, and sorted as text


def canonical(document: Any) -> bytes:
    """The one JSON text that stands for `document` when it is hashed."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def seal(document: Mapping[str, Any]) -> bytes:
    """`document` as JSON bytes with its own hash under `sha256`."""
    # Key by key, so that a manifest of a hundred thousand artefacts is written once and not once more with its hash.
    items = {key: canonical(key) + b":" + canonical(value) for key, value in document.items() if key != "sha256"}
    bare = b"{" + b",".join(items[key] for key in sorted(items)) + b"}"
    items["sha256"] = canonical("sha256") + b":" + canonical(hashlib.sha256(bare).hexdigest())
    return b"{" + b",".join(items[key] for key in sorted(items)) + b"}\n"


def unseal(content: bytes, name: str) -> dict[str, Any]:
    """The document in `content`, seal checked; `StoreDamaged` naming the file `name` otherwise.

    The seal is cut out of the bytes and the rest is hashed: to write the document again and compare would take longer
    than all else at opening. No document of ours holds a `sha256` after that of its top level.
    """
    start = content.rfind(_SEAL)
    end = start + len(_SEAL) + 64 + 1
    if start < 1 or not content.endswith(b"}\n"):
        raise StoreDamaged(f"{name} is not a sealed JSON document", next_step=files.REPAIR)
    last = content[end:] == b"}\n"  # then the comma before it is cut too, otherwise the one behind it
    cut = slice(start - (last and content[start - 1 : start] == b","), end + (not last))
    expected = _SEAL + hashlib.sha256(content[: cut.start] + content[cut.stop : -1]).hexdigest().encode() + b'"'
    if content[cut] not in (expected, expected + b",", b"," + expected):
        raise StoreDamaged(f"{name} does not match its own hash", next_step=files.REPAIR)
    document: dict[str, Any] = json.loads(content)
    return document


def read_document(storage: Storage, relative: str, parse: Callable[[bytes], _Parsed]) -> _Parsed:
    """What `parse` makes of a sealed document, this file of it alone; `StoreDamaged` when it is missing or damaged.

    `StoreUnreadable` when it could not be read for a reason outside it.
    """
    name = relative.rpartition("/")[2]
    try:
        return parse(storage.read(relative))
    except IsimedError:
        raise
    except FileNotFoundError:
        raise StoreDamaged(f"{name} is missing", next_step=files.REPAIR) from None
    except OSError as error:
        spare(error, name)
        raise StoreDamaged(f"{name} cannot be read ({error.strerror})", next_step=files.REPAIR) from None


def read_published(storage: Storage, relative: str, parse: Callable[[bytes], _Parsed]) -> _Parsed:
    """What `parse` makes of a sealed document, or else, with a `StoreWarning`, of its copy.

    `StoreDamaged` where neither is good, and `FileNotFoundError` where neither is there.
    """
    try:
        return read_document(storage, relative, parse)
    except StoreDamaged as error:
        damage = error
    try:
        found = read_document(storage, relative + files.COPY, parse)
    except StoreDamaged:
        if not (storage.exists(relative) or storage.exists(relative + files.COPY)):
            raise FileNotFoundError(relative) from None
        raise damage from None
    with suppress(StoreDamaged):  # it may have been published between the two looks
        return read_document(storage, relative, parse)
    warnings.warn(f"{damage}; its copy is good and is read. Next: {files.REPAIR}", StoreWarning, stacklevel=3)
    return found


def utc_now() -> str:
    """The time now in UTC, ISO 8601 to the microsecond."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Artefact:
    """One immutable file or folder of a store: where it is, how large, what it hashes to, and what its kind adds."""

    kind: str  # scan, encoder, segment, table, frame, index, region, reference or tombstone
    path: str  # relative to the store, such as segments/<ulid>
    bytes: int
    files: int
    sha256: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its ULID, with the suffix of its kind: the last part of its path."""
        return self.path.split("/")[1]

    def to_json(self) -> dict[str, Any]:
        """The artefact as it stands in a manifest."""
        own = {"kind": self.kind, "path": self.path, "bytes": self.bytes, "files": self.files, "sha256": self.sha256}
        return {**self.fields, **own}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Artefact:
        """Read an entry of a manifest; a path that leaves its folder raises `StoreDamaged`."""
        own = ("kind", "path", "bytes", "files", "sha256")
        kind, path, size, count, digest = (entry[key] for key in own)
        if not _ARTEFACT_PATH.fullmatch(path) or files.FOLDERS.get(kind) != path.split("/")[0]:
            raise StoreDamaged("a manifest names an artefact outside its folder", next_step=files.RESTORE)
        return cls(kind, path, size, count, digest, {key: entry[key] for key in entry if key not in own})


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a store holds at one generation."""

    generation: int
    parent: tuple[int, str] | None  # generation and sha256 of the one before
    write_id: str  # names the write, so that a writer can tell its own commit
    time: str  # UTC, ISO 8601; never earlier than the parent's
    verb: str  # add, pretrain, index, …
    next_row_id: int  # the first patch row id that was never given
    artefacts: tuple[Artefact, ...] = ()
    features: tuple[str, ...] = ()
    format_version: int = 1
    digest: str | None = field(default=None, compare=False, repr=False)  # that sealed it, where it was read

    def to_bytes(self) -> bytes:
        """The manifest as sealed JSON."""
        parent = None if self.parent is None else {"generation": self.parent[0], "sha256": self.parent[1]}
        return seal(
            {
                "format_version": self.format_version,
                "generation": self.generation,
                "parent": parent,
                "write_id": self.write_id,
                "time": self.time,
                "verb": self.verb,
                "next_row_id": self.next_row_id,
                "artefacts": [artefact.to_json() for artefact in self.artefacts],
                "features": list(self.features),
            }
        )

    @classmethod
    def from_bytes(cls, content: bytes, name: str) -> Manifest:
        """Read sealed JSON; `StoreDamaged` when the seal or the shape is wrong, `Incompatible` when it is newer."""
        document = unseal(content, name)
        check_version(document)
        try:
            parent = document["parent"]
            return cls(
                generation=document["generation"],
                parent=None if parent is None else (parent["generation"], parent["sha256"]),
                write_id=document["write_id"],
                time=document["time"],
                verb=document["verb"],
                next_row_id=document["next_row_id"],
                artefacts=tuple(map(Artefact.from_json, document["artefacts"])),
                features=tuple(document["features"]),
                format_version=document["format_version"],
                digest=document["sha256"],
            )
        except (KeyError, TypeError, ValueError):
            raise StoreDamaged(f"{name} is not a manifest", next_step=files.RESTORE) from None

    @property
    def sha256(self) -> str:
        """The hash that seals this manifest, by which its child names it."""
        return self.digest or str(unseal(self.to_bytes(), "a manifest")["sha256"])

    @property
    def rows(self) -> int:
        """How many patch rows live: those of its segments that no tombstone names."""
        stored = {key: rows for found in self.find("segment") for key, rows in _stored_rows(found)}
        dead = (found.fields["dead"].items() for found in self.find("tombstone"))
        return sum(stored.values()) - sum(int(count) for piece in dead for key, count in piece if key in stored)

    def find(self, kind: str) -> list[Artefact]:
        """Artefacts of one kind, in the order they were committed."""
        return [artefact for artefact in self.artefacts if artefact.kind == kind]


@dataclass(frozen=True, slots=True)
class Generation:
    """One line of a store's history."""

    generation: int
    time: str  # UTC, ISO 8601
    verb: str
    artefacts: int
    rows: int  # patch rows of all segments


def _stored_rows(segment: Artefact) -> list[tuple[str, int]]:
    """By the key of each part, how many rows its files hold."""
    parts = segment.fields.get("parts", [segment.fields])
    return [(str(part["first_row_id"]), int(part["rows"])) for part in parts]


def manifest_name(generation: int) -> str:
    """Where the manifest of a generation is, relative to the store."""
    return f"{files.MANIFESTS}/{generation:0{_DIGITS}d}.json"


def generation_of(name: str) -> int | None:
    """The generation that a file name in `manifests/` stands for, a copy's too; None when it is no manifest's name."""
    stem, _, suffix = name.removesuffix(files.COPY).partition(".")
    return int(stem) if suffix == "json" and len(stem) == _DIGITS and stem.isdecimal() else None


def listed(storage: Storage) -> list[int]:
    """All generations that have a manifest file or a copy of one, oldest first, none of them opened."""
    try:
        names = storage.names(files.MANIFESTS)
    except (StoreUnreadable, StoreNotFound):  # StoreNotFound: not even the bucket is there
        raise
    except OSError as error:
        spare(error, files.MANIFESTS)
        raise StoreDamaged("the store's folder of manifests is missing", next_step=files.RESTORE) from None
    return sorted({number for name in names if (number := generation_of(name)) is not None})


def is_there(storage: Storage, generation: int) -> bool:
    """Whether a generation has a manifest file, or a copy of one."""
    path = manifest_name(generation)
    return storage.exists(path) or storage.exists(path + files.COPY)  # in this order: see `collect`


def load(storage: Storage, generation: int) -> Manifest:
    """The verified manifest of one generation; `NotFound`, `StoreDamaged` or `Incompatible` otherwise.

    Where it is damaged or missing and its copy is good, that is read, with a `StoreWarning`.
    """
    try:
        return read_published(storage, manifest_name(generation), parser(generation))
    except FileNotFoundError:
        raise NotFound(f"the store has no generation {generation}", next_step="isimed log") from None


def parser(generation: int) -> Callable[[bytes], Manifest]:
    """Reads the manifest of one generation, and refuses that of any other."""
    name = manifest_name(generation).split("/")[1]

    def parse(content: bytes) -> Manifest:
        manifest = Manifest.from_bytes(content, name)
        if manifest.generation != generation:
            raise StoreDamaged(f"{name} holds generation {manifest.generation}", next_step=files.REPAIR)
        return manifest

    return parse


def history(storage: Storage, until: int | None = None) -> list[Generation]:
    """The store's history up to a generation, oldest first; a damaged one is left out with a `StoreWarning`."""
    lines = []
    for generation in listed(storage):
        if until is not None and generation > until:
            break
        try:
            manifest = load(storage, generation)
        except NotFound:
            continue  # collected while the list was walked
        except StoreDamaged as error:
            warnings.warn(f"{error}; it is left out of the history", StoreWarning, stacklevel=3)
            continue
        lines.append(Generation(generation, manifest.time, manifest.verb, len(manifest.artefacts), manifest.rows))
    return lines


def hinted(storage: Storage) -> int:
    """The generation that the head hint names; -1 when there is none or it cannot be trusted.

    Read it *before* listing manifests: it is written after its manifest, so the listing then reaches it.
    """
    try:
        hint = unseal(storage.read(files.HEAD), files.HEAD)["generation"]
    except (OSError, KeyError, IsimedError):
        return -1
    return hint if isinstance(hint, int) else -1
