"""Which files to read, what to call them, and where their label maps lie."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from isimed_index.errors import ScanRefused, UsageError

SUFFIXES = (".nii.gz", ".nii")
_SKIPPED_FOLDERS = (".zarr", ".isimed")
_BIDS_ENTITY = re.compile(r"(?:^|_)((sub|ses)-[A-Za-z0-9]+)")


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files given, and all images (.nii, .nii.gz) of the folders given, recursively and sorted; each file once.

    Hidden files and folders are passed over. Raises `UsageError` for a path that does not exist and `ScanRefused` for a
    folder that holds no image.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            files = sorted(_images(path))
            if not files:
                raise ScanRefused(
                    f"no image file in folder {path.resolve().name}",
                    next_step="give a folder with .nii or .nii.gz files",
                )
        elif path.exists():
            files = [path]
        else:
            raise UsageError(f"there is no file or folder {path.name}", next_step="check the path")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def stem(path: Path) -> str:
    """A file's name without its image suffix: `X.nii.gz` → `X`."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def unique_ids(paths: Sequence[Path], taken: Collection[str]) -> list[str]:
    """One id a file, in order: its stem; its folder before it where the stem is not unique; then a number as well."""
    used = set(taken)
    repeated = Counter(stem(path) for path in paths)
    ids: list[str] = []
    for path in paths:
        name = stem(path)
        if repeated[name] > 1 or name in used:
            name = f"{path.resolve().parent.name}_{name}"
        candidate, number = name, 2
        while candidate in used:
            candidate, number = f"{name}-{number}", number + 1
        used.add(candidate)
        ids.append(candidate)
    return ids


def label_path(image: Path, pattern: str) -> Path:
    """Where the label map of `image` lies by a pattern such as `{stem}_seg.nii.gz` or `../seg/{stem}.nii.gz`.

    The pattern is relative to the image's folder; `UsageError` when it lacks `{stem}`.
    """
    if "{stem}" not in pattern:
        raise UsageError(
            f"the label pattern {pattern!r} does not hold {{stem}}", next_step="write for example {stem}_seg.nii.gz"
        )
    return Path(os.path.normpath(image.parent / pattern.replace("{stem}", stem(image))))


def without_labels(paths: Iterable[Path], pattern: str) -> list[Path]:
    """`paths` less those that are the label map of another one of them by `pattern`."""
    images = list(paths)
    labels = {label_path(image, pattern).resolve() for image in images}
    return [image for image in images if image.resolve() not in labels]


def subject_and_session(stem: str, regex: str | None = None) -> tuple[str, str | None]:
    """Subject and session of a file's stem.

    With `regex`, its group `subject` (or else the first group) and its group `session`, where it matches; otherwise the
    BIDS entities `sub-…` and `ses-…`; otherwise the stem itself and None. `UsageError` when the expression is malformed
    or has no group.
    """
    if regex is not None:
        match = _compiled(regex).search(stem)
        groups = match.groupdict() if match else {}
        subject = groups.get("subject") or (match.group(1) if match and "subject" not in groups else None)
        return subject or stem, groups.get("session")
    entities = {key: entity for entity, key in _BIDS_ENTITY.findall(stem)}
    return entities.get("sub", stem), entities.get("ses")


def _compiled(regex: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UsageError(f"the expression {regex!r} is malformed: {error}") from error
    if not pattern.groups:
        raise UsageError(f"the expression {regex!r} has no group", next_step="put the subject in brackets: (sub\\d+)")
    return pattern


def _images(folder: Path) -> Iterable[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and not name.endswith(_SKIPPED_FOLDERS)]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(where) / name
