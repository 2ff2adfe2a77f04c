"""Tags: names for generations, which a collector then keeps.

tags/<name>.json    sealed; names the generation and the hash of its manifest
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from isimed_index.contracts import validate
from isimed_index.errors import NotFound, StoreDamaged, UsageError
from isimed_index.store import files
from isimed_index.store.manifest import Manifest, load, read_published, seal, unseal, utc_now
from isimed_index.store.place.faults import told
from isimed_index.store.place.storage import Storage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class Tag:
    """A named generation."""

    name: str
    generation: int
    manifest: str  # sha256 that seals the manifest
    time: str  # UTC, ISO 8601, when the tag was set


def set_tag(storage: Storage, name: str, generation: int) -> Tag:
    """Name a generation; `UsageError` when the name is malformed or taken, `NotFound` without such a generation."""
    if not _NAME.fullmatch(name) or name.isdecimal():  # digits alone would be taken for a generation
        raise UsageError(
            f"expected a tag of up to 64 letters, digits, '.', '_' and '-', not digits alone, found {name!r}",
            next_step="isimed tag v1",
        )
    tag = Tag(name, generation, load(storage, generation).sha256, utc_now())
    content = {"tag": name, "generation": generation, "manifest": tag.manifest, "time": tag.time}
    try:
        with told(storage.root):
            storage.publish(tag_path(name), seal(content))
    except FileExistsError:
        raise UsageError(f"there is a tag {name!r} already", next_step=f"isimed tag --delete {name}") from None
    try:
        load(storage, generation)
    except NotFound:  # a collector that did not see the tag has taken it
        _remove(storage, name)
        raise
    return tag


def remove_tag(storage: Storage, name: str) -> None:
    """Forget a tag; `NotFound` when there is none. The generation itself stays until a collector takes it."""
    if not _NAME.fullmatch(name) or not storage.exists(tag_path(name)):
        raise _not_found(storage, name)
    with told(storage.root):
        _remove(storage, name)


def _remove(storage: Storage, name: str) -> None:
    """The copy goes first, for good: a tag without a file is none, but its copy might be taken for a later one's."""
    for path in (tag_path(name) + files.COPY, tag_path(name)):
        storage.remove(path)
        storage.settle([path])


def find_tag(storage: Storage, name: str) -> Tag:
    """The tag of that name; `NotFound` when there is none, `StoreDamaged` when it is not as written."""
    if not _NAME.fullmatch(name):
        raise _not_found(storage, name)
    if not storage.exists(tag_path(name)):  # whatever copy there is: see `_remove`
        raise _not_found(storage, name)
    try:
        return read_published(storage, tag_path(name), parser(name))
    except FileNotFoundError:
        raise _not_found(storage, name) from None  # removed meanwhile


def parser(name: str) -> Callable[[bytes], Tag]:
    """Reads the tag of one name, and refuses that of any other."""
    file = name + _SUFFIX

    def parse(content: bytes) -> Tag:
        found = unseal(content, file)
        validate("tag", found)
        if found["tag"] != name:
            raise StoreDamaged(f"{file} holds another tag", next_step=files.REPAIR)
        return Tag(found["tag"], found["generation"], found["manifest"], found["time"])

    return parse


def tag_names(storage: Storage) -> list[str]:
    """All tags, sorted, none of them opened."""
    try:
        names = storage.names(files.TAGS)
    except FileNotFoundError:
        return []
    return [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]


def tagged(storage: Storage, name: str) -> Manifest:
    """The manifest that a tag names; `StoreDamaged` when there is another one in its place."""
    tag = find_tag(storage, name)
    try:
        manifest = load(storage, tag.generation)
    except NotFound:
        if not storage.exists(tag_path(name)):
            raise _not_found(storage, name) from None  # removed meanwhile, and then collected
        raise StoreDamaged(
            f"generation {tag.generation}, which is tagged {name}, is missing", next_step=files.REPAIR
        ) from None
    if manifest.sha256 != tag.manifest:
        raise StoreDamaged(f"generation {tag.generation} is not the one that was tagged {name}", next_step=files.REPAIR)
    return manifest


def tag_path(name: str) -> str:
    """Where a tag is, relative to the store."""
    return f"{files.TAGS}/{name}{_SUFFIX}"


def _not_found(storage: Storage, name: str) -> NotFound:
    known = ", ".join(tag_names(storage)) or "none"
    return NotFound(f"the store has no tag {name!r}; there are: {known}", next_step="isimed tag")
