"""A folder of exported files: it appears whole or not at all, and `export.json` says what it holds.

export.json: `format`, `format_version`, `isimed_index`, `generation`, `layout`, `voxels`, `counts`, and `files`: bytes
and sha256 of every other file by its relative path.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isimed_index.errors import Incompatible, IsimedError, StoreDamaged, UsageError
from isimed_index.store.files import file_digest, new_id, sync_file, sync_tree, tree_files

SEAL = "export.json"
FORMAT = "isimed-export"
VERSION = 1  # of the layout of exported folders
_AGAIN = "copy the folder again, or export it again"


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote."""

    layout: str  # parquet, npy or duckdb
    generation: int
    scans: int
    encoders: int
    patches: int
    files: int
    bytes: int


@contextmanager
def becoming(target: Path, *, a_file: bool = False, replace: bool = False) -> Iterator[Path]:
    """A path beside `target` that takes its name when the block ends well, flushed; else what is there is removed.

    `UsageError` when `target` cannot be made: it is there already (an empty folder may be, in place of which another
    one comes; with `replace` a file may be, in place of which another one comes), or the place has no room.
    """
    target = target.absolute()
    _refuse_occupied(target, a_file, replace)
    draft = target.with_name(f".{new_id()}.partial")
    try:
        yield draft
        sync_tree(draft)
        _refuse_occupied(target, a_file, replace)  # another process may have been first
        draft.rename(target)
        sync_file(target.parent)
    except OSError as error:
        if isinstance(error, IsimedError):
            raise
        raise UsageError(
            f"{target.name} cannot be written ({error.strerror or type(error).__name__})",
            next_step="make room, or choose another place",
        ) from error
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def _refuse_occupied(target: Path, a_file: bool, replace: bool) -> None:
    if not target.parent.is_dir():
        raise UsageError(f"the folder for {target.name!r} does not exist", next_step="make it first")
    if replace and target.is_file():
        return
    if target.exists() and (a_file or not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target.name} is there already", next_step="choose another path, or remove it")


def write_seal(folder: Path, fields: Mapping[str, Any]) -> tuple[int, int]:
    """Write `export.json` over all other files of a folder; returns how many files there are, and their bytes."""
    digests = {relative: file_digest(path) for relative, path in tree_files(folder)}
    listed = {name: {"bytes": size, "sha256": sha256} for name, (size, sha256) in sorted(digests.items())}
    content = {"format": FORMAT, "format_version": VERSION, **fields, "files": listed}
    (folder / SEAL).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return len(digests) + 1, sum(size for size, _ in digests.values()) + (folder / SEAL).stat().st_size


def read_seal(folder: Path) -> dict[str, Any]:
    """What `export.json` says, after every file that it lists was read and compared.

    `UsageError` for a folder that is no export, `Incompatible` for a newer one, `StoreDamaged` when a file is missing
    or is not as it was written.
    """
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        known = content["format"] == FORMAT and isinstance(content["files"], dict)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{folder.name} is no folder that isimed export --parquet wrote: it has no {SEAL}",
            next_step="isimed import PATH --card FILE for embeddings of another program",
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise StoreDamaged(f"{SEAL} in {folder.name} cannot be read", next_step=_AGAIN)
    version = content.get("format_version")
    if not isinstance(version, int) or version > VERSION:
        raise Incompatible(
            f"expected an export of format version {VERSION} or older, found {version}",
            next_step="upgrade isimed-index",
        )
    for name, said in content["files"].items():
        _check_file(folder, name, said)
    return dict(content)


def _check_file(folder: Path, name: str, said: Mapping[str, Any]) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{SEAL} names a file outside of its folder", next_step=_AGAIN)
    try:
        found = file_digest(path)
        expected = said["bytes"], said["sha256"]
    except (OSError, KeyError, TypeError):
        raise StoreDamaged(f"the export lacks {name}", next_step=_AGAIN) from None
    if found != expected:
        raise StoreDamaged(f"{name} of the export is not as it was written", next_step=_AGAIN)
