"""Files and folders of a store: names, durable writes, sizes and digests.

Durable means: the bytes *and* the folder entries that lead to them were synced, so that they outlive a power cut.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FORMAT = "FORMAT.json"
HEAD = "HEAD.json"
MANIFESTS = "manifests"
INTENTS = "intents"
LEASES = "leases"
TAGS = "tags"
QUARANTINE = "quarantine"
TMP = "tmp"
COPY = ".copy"  # behind the name of a published document: the same bytes once more
CARD = "card.json"  # of an encoder
WEIGHTS = "weights.safetensors"
MODEL = "model.onnx"
REFERENCE = "reference.json"  # of a reference: where it comes from
NEXT_FRAME = "next"  # in a frame's folder: the one that replaces it as soon as it has a chart of every scan
REPAIR = "isimed check, then isimed repair"
RESTORE = "restore the store from a backup, or add its files to a new one"  # no command mends what is not derived
FOLDERS = {
    "scan": "scans",
    "encoder": "encoders",
    "segment": "segments",
    "table": "tables",
    "frame": "frames",
    "index": "indexes",
    "region": "regions",
    "reference": "references",
    "tombstone": "tombstones",
}  # where artefacts of each kind live
DERIVED = ("frame", "index", "region")  # kinds that one encoder's segments tell all of: `isimed index` makes them again
SUFFIXES = {"scan": ".zarr", "table": ".parquet", "tombstone": ".parquet"}

_BLOCK = 1 << 20  # bytes read at once while hashing


@dataclass(frozen=True, slots=True)
class TreeDigest:
    """Size and content hash of a file or folder: `sha256` over sorted lines `relpath NUL size NUL sha256(file)`."""

    bytes: int
    files: int
    sha256: str


def new_id() -> str:
    """A fresh ULID: 26 characters, ordered by time."""
    from ulid import ULID

    return str(ULID())


def sync_file(path: Path) -> None:
    """Flush one file, or the entries of one folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder of a store, durably, where a store of an earlier version lacks it."""
    if not path.exists():
        path.mkdir(exist_ok=True)
        sync_file(path.parent)


def sync_tree(path: Path) -> None:
    """Flush a file, or every file and folder below a folder, bottom up."""
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            sync_tree(entry)
    sync_file(path)


def tree_files(path: Path) -> Iterator[tuple[str, Path]]:
    """Each file of an artefact with its `/`-separated path inside it, in any order; a lone file has path ''."""
    if path.is_file():
        yield "", path
        return
    for folder, _, names in os.walk(path, onerror=_stop):
        for name in names:
            file = Path(folder, name)
            yield file.relative_to(path).as_posix(), file


def _stop(error: OSError) -> None:
    """A folder that cannot be listed is not empty; one that has gone is."""
    if not isinstance(error, FileNotFoundError):
        raise error


def tree_size(path: Path) -> tuple[int, int]:
    """Bytes and number of files of an artefact, without reading them."""
    sizes = [file.stat().st_size for _, file in tree_files(path)]
    return sum(sizes), len(sizes)


def file_digest(path: Path) -> tuple[int, str]:
    """Bytes and sha256 of one file."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def tree_digest(path: Path) -> TreeDigest:
    """Read an artefact whole and return its size and digest."""
    lines: list[bytes] = []
    total = 0
    for relative, file in tree_files(path):
        size, digest = file_digest(file)
        lines.append(f"{relative}\0{size}\0{digest}\n".encode())
        total += size
    return TreeDigest(total, len(lines), hashlib.sha256(b"".join(sorted(lines))).hexdigest())


def read_range(path: Path, start: int, length: int) -> bytes:
    """`length` bytes of a file from `start`, fewer at its end."""
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read(length)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and flush it; its folder's entry is left to the caller."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Put a file in the place of the one before it: whole or not there, also after a power cut."""
    draft = path.with_name(f"{path.name}.part")
    write_durably(draft, content)
    draft.replace(path)
    sync_file(path.parent)
