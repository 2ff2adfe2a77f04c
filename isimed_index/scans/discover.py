"""Which files to read, what to call them, and where their label maps lie."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from isimed_index.errors import ScanRefused, UsageError
from isimed_index.scans import formats
from isimed_index.scans.dicom import files as dicom_files

SUFFIXES = formats.SUFFIXES
_SKIPPED_FOLDERS = (".zarr", ".isimed")
_VOLUME, _NUMBER = r"(?:_vol-\d+)?", r"(?:-\d+)?"  # what ids may end in
_BIDS_ENTITY = re.compile(r"(?:^|_)((sub|ses)-[A-Za-z0-9]+)")


def find_files(paths: Sequence[Path], without: Collection[Path] = ()) -> list[Path]:
    """The files given, and all images of the folders given, recursively and sorted; each file once.

    Images are known by their suffix (`SUFFIXES`), DICOM by its content, whatever its name. Hidden files and folders are
    passed over, and so are the folders `without`, as they are found below those given. Raises `UsageError` for a path
    that does not exist and `ScanRefused` for a folder that holds no image.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            files = sorted(_images(path, without))
            if not files:
                raise ScanRefused(
                    f"no image file in folder {path.resolve().name}",
                    next_step="give a folder with NIfTI, DICOM, NRRD, MetaImage or MGH files",
                )
        else:
            check_there(path)
            files = [path]
        for file in files:
            found.setdefault(real(file), file)
    return list(found.values())


def check_there(path: Path) -> None:
    """Raise `UsageError` for a path that does not exist."""
    if not path.exists():
        raise UsageError(f"there is no file or folder {path.name}", next_step="check the path")


def real(path: Path) -> Path:
    """Where a path leads, links followed; `Path.resolve` raises where links lead in a circle."""
    return Path(os.path.realpath(path))


def stem(path: Path) -> str:
    """A file's name without its image suffix: `X.nii.gz` → `X`."""
    suffix = formats.suffix_of(path)
    return path.name[: -len(suffix)] if suffix else path.stem


def is_text(name: str) -> bool:
    """Whether a name can be stored and shown: no control characters, no bytes that are no text, no line breaks."""
    return not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name)


def unique_ids(paths: Sequence[Path], taken: Collection[str], ending: str = "") -> list[str]:
    """One id a file, in order: its stem; its folder before it where the stem is not unique; then a number as well.

    `ending` follows every stem.
    """
    used = set(taken)
    repeated = Counter(stem(path) for path in paths)
    ids: list[str] = []
    for path in paths:
        name = stem(path) + ending
        if repeated[stem(path)] > 1 or name in used:
            name = f"{_folders(path)[0]}_{name}"
        candidate, number = name, 2
        while candidate in used:
            candidate, number = f"{name}-{number}", number + 1
        used.add(candidate)
        ids.append(candidate)
    return ids


def could_be_id(path: Path, scan: str) -> bool:
    """Whether `unique_ids` could have given a file this id, or the id of one of its volumes, among other files."""
    name = re.escape(stem(path))
    folder = re.escape(_folders(path)[0])
    return re.fullmatch(rf"{name}{_VOLUME}|{folder}_{name}{_NUMBER}{_VOLUME}{_NUMBER}", scan) is not None


def is_numbered(name: str, scan: str) -> bool:
    """Whether an id is this name, or one of its volumes, with or without a number that makes it unique."""
    return re.fullmatch(rf"{re.escape(name)}{_NUMBER}{_VOLUME}{_NUMBER}", scan) is not None


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
    labels = {real(label_path(image, pattern)) for image in images}
    return [image for image in images if real(image) not in labels]


def subject_and_session(
    path: Path, folder: Path | None = None, regex: str | None = None
) -> tuple[str | None, str | None]:
    """Subject and session of a file that was found in `folder` (None: it was given by itself), by its names alone.

    Without `regex`, the BIDS entities `sub-…` and `ses-…`: each from the stem, or else from the nearest parent folder
    that has it. With `regex`, its group `subject` (or else the first group) and its group `session`, from the first
    that it matches of the stem, the path below `folder` without suffix (`P012/anat/T1`), and the parent folders,
    nearest first. What is not found is None. `UsageError` when the expression is malformed or has no group.
    """
    name, folders = stem(path), _folders(path)
    if regex is None:
        entities: dict[str, str] = {}
        for text in (name, *folders):
            entities = {key: entity for entity, key in _BIDS_ENTITY.findall(text)} | entities
        return entities.get("sub"), entities.get("ses")
    pattern = _compiled(regex)
    below = [] if folder is None else [(path.relative_to(folder).parent / name).as_posix()]
    for text in (name, *below, *folders):
        match = pattern.search(text)
        groups = match.groupdict() if match else {}
        subject = groups.get("subject") or (match.group(1) if match and "subject" not in groups else None)
        if subject:
            return subject, groups.get("session")
    return None, None


def _folders(path: Path) -> list[str]:
    """Names of the folders that a file lies in, nearest first; a link lies where it is, not where it points to."""
    return [parent.name for parent in Path(os.path.normpath(path.absolute())).parents]


def _compiled(regex: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UsageError(f"the expression {regex!r} is malformed: {error}") from error
    if not pattern.groups:
        raise UsageError(f"the expression {regex!r} has no group", next_step="put the subject in brackets: (sub\\d+)")
    return pattern


def is_skipped(folder: str) -> bool:
    """Whether a folder of this name is passed over: hidden ones, and those that are stores or OME-Zarr."""
    return folder.startswith(".") or folder.endswith(_SKIPPED_FOLDERS)


def _images(folder: Path, without: Collection[Path]) -> Iterable[Path]:
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_skipped(name) and Path(where) / name not in without]
        for name in files:
            if not name.startswith(".") and _is_image(path := Path(where) / name):
                yield path


def _is_image(path: Path) -> bool:
    """Whether a file of a folder is one to read; one that is not what its suffix says is refused when it is read."""
    if formats.is_pair_data(path):
        return formats.header_beside(path) is None
    return path.name.lower().endswith((*SUFFIXES, *dicom_files.SUFFIXES)) or dicom_files.is_dicom(path)
