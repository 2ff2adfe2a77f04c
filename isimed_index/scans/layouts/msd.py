"""The Medical Segmentation Decathlon: `Task09_Spleen/dataset.json`, `imagesTr`, `labelsTr`, `imagesTs`.

`dataset.json` lists the training pairs and the test images and says what labels and channels mean. A case is taken for
a subject of its own: the data sets do not say which cases are of one patient.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from isimed_index.errors import ScanRefused, UsageError
from isimed_index.scans.discover import stem
from isimed_index.scans.label_names import names_in_json
from isimed_index.scans.layouts.documents import read_object, read_text
from isimed_index.scans.layouts.found import Found, Image, LabelFiles, repeated

INDEX = "dataset.json"
_FOLDERS = ("imagesTr", "imagesTs")


def is_root(folder: Path) -> bool:
    """Whether a folder has a `dataset.json` that lists training pairs, as the decathlon's do and nnU-Net's do not."""
    if not any((folder / name).is_dir() for name in _FOLDERS):
        return False
    index = read_object(folder / INDEX)
    return index is not None and isinstance(index.get("training"), list)


def read(root: Path, volume: int | None = None) -> Found:
    """All images that `dataset.json` lists; those that lie there and are not listed are refused by name."""
    found = Found()
    index = read_object(root / INDEX) or {}
    names = _names(read_text(root / INDEX) or "", index, found)
    channels = _channels(index)
    listed: set[Path] = set()
    test = index.get("test", [])
    entries = [("train", entry) for entry in index.get("training", [])]
    entries += [("test", entry) for entry in (test if isinstance(test, list) else [])]
    for split, entry in entries:
        try:
            image, labels = _paths(root, entry)
        except ScanRefused as error:
            found.refused.append((INDEX, error))
            continue
        listed.add(image)
        if not image.is_file():
            found.refuse(image.name, f"{INDEX} lists it, but it is not there", "download the data set again")
            continue
        case = stem(image)
        if labels is not None and stem(labels) != case:
            found.refuse(
                image.name,
                f"{INDEX} gives it the label map of another case: expected {case}, found {stem(labels)}",
                f"mend {INDEX}, or name the label map as its image",
            )
            continue
        found.images.append(
            Image(
                path=image,
                name=case,
                subject=case,
                modality=_modality(channels, volume),
                split=split,
                labels=None if labels is None else LabelFiles((labels,), names),
                facts={"sequence": _sequence(channels, volume)},
            )
        )
    _refuse_repeated(found)
    for path in _unlisted(root, listed):
        found.refuse(path.name, f"it is not listed in {INDEX}", f"list it in {INDEX}, or add it with --layout files")
    return found


def _names(text: str, index: dict[str, Any], found: Found) -> dict[int, str]:
    if not index.get("labels"):
        return {}
    try:
        return names_in_json(INDEX, text)
    except UsageError as error:
        found.notes.append(f"{error.message}; labels go by their numbers")
        return {}


def _paths(root: Path, entry: Any) -> tuple[Path, Path | None]:
    """Image and label map of an entry: `{"image": "./imagesTr/x.nii.gz", "label": …}`, or the image alone."""
    pair = entry if isinstance(entry, dict) else {"image": entry}
    image, label = pair.get("image"), pair.get("label")
    if not isinstance(image, str) or not isinstance(label, str | None):
        raise ScanRefused(f"an entry of {INDEX} names no image file", next_step=f"mend {INDEX}")
    for name in (image, label):
        parts = PurePosixPath(name or "").parts
        if ".." in parts or PurePosixPath(name or "").is_absolute():
            raise ScanRefused(f"an entry of {INDEX} names a file outside of its folder", next_step=f"mend {INDEX}")
    return root / image, None if label is None else root / label


def _channels(index: dict[str, Any]) -> list[str]:
    """What the volumes of an image are, in order: `["CT"]`, or `["FLAIR", "T1w", "t1gd", "T2w"]`."""
    modality = index.get("modality")
    if not isinstance(modality, dict):
        return []
    return [str(modality[key]) for key in sorted(modality, key=lambda key: int(key) if key.isdecimal() else 0)]


def _modality(channels: list[str], volume: int | None) -> str | None:
    """CT or PT where the channel says so, else MR, which all its other channels are sequences of."""
    channel = _sequence(channels, volume) or (channels[0] if channels else None)
    if channel is None:
        return None
    return {"CT": "CT", "PET": "PT"}.get(channel.upper(), "MR")


def _sequence(channels: list[str], volume: int | None) -> str | None:
    """The channel that is read: the only one, or that of `--volume`."""
    if len(channels) == 1:
        return channels[0]
    return channels[volume] if volume is not None and volume < len(channels) else None


def _refuse_repeated(found: Found) -> None:
    """A case that is listed twice is in two splits, or a mistake: it is left out."""
    twice = set(repeated([image.name for image in found.images]))
    found.images[:] = [image for image in found.images if image.name not in twice]
    for name in sorted(twice):
        found.refuse(name, f"{INDEX} lists it more than once", f"mend {INDEX}")


def _unlisted(root: Path, listed: set[Path]) -> Iterator[Path]:
    for folder in _FOLDERS:
        for path in sorted((root / folder).glob("*.nii*")):
            if not path.name.startswith(".") and path not in listed:  # ._x.nii.gz is what macOS left in the archive
                yield path
