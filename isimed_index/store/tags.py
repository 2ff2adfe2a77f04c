"""Tags: names for generations, which a collector then keeps.

tags/<name>.json    sealed; names the generation and the hash of its manifest
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from isimed_index.contracts import validate
from isimed_index.errors import IsimedError, NotFound, StoreDamaged, UsageError
from isimed_index.store import files
from isimed_index.store.manifest import Manifest, load, seal, unseal, utc_now
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
            storage.publish(_path(name), seal(content))
    except FileExistsError:
        raise UsageError(f"there is a tag {name!r} already", next_step=f"isimed tag --delete {name}") from None
    try:
        load(storage, generation)
    except NotFound:  # a collector that did not see the tag has taken it
        storage.remove(_path(name))
        raise
    return tag


def remove_tag(storage: Storage, name: str) -> None:
    """Forget a tag; `NotFound` when there is none. The generation itself stays until a collector takes it."""
    if not _NAME.fullmatch(name) or not storage.exists(_path(name)):
        raise _not_found(storage, name)
    with told(storage.root):
        storage.remove(_path(name))
        storage.settle([_path(name)])


def find_tag(storage: Storage, name: str) -> Tag:
    """The tag of that name; `NotFound` when there is none, `StoreDamaged` when it is not as written."""
    if not _NAME.fullmatch(name):
        raise _not_found(storage, name)
    file = name + _SUFFIX
    try:
        content = unseal(storage.read(_path(name)), file)
    except FileNotFoundError:
        raise _not_found(storage, name) from None
    except IsimedError:
        raise
    except OSError as error:
        raise StoreDamaged(f"{file} cannot be read ({error.strerror})", next_step=files.REPAIR) from None
    validate("tag", content)
    return Tag(content["tag"], content["generation"], content["manifest"], content["time"])


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
        if not storage.exists(_path(name)):
            raise _not_found(storage, name) from None  # removed meanwhile, and then collected
        raise StoreDamaged(
            f"generation {tag.generation}, which is tagged {name}, is missing", next_step=files.REPAIR
        ) from None
    if manifest.sha256 != tag.manifest:
        raise StoreDamaged(f"generation {tag.generation} is not the one that was tagged {name}", next_step=files.REPAIR)
    return manifest


def _path(name: str) -> str:
    return f"{files.TAGS}/{name}{_SUFFIX}"


def _not_found(storage: Storage, name: str) -> NotFound:
    known = ", ".join(tag_names(storage)) or "none"
    return NotFound(f"the store has no tag {name!r}; there are: {known}", next_step="isimed tag")
