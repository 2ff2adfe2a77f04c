"""What a reader of a layout finds: images with what the data set says of them, and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from isimed_index.errors import ScanRefused
from isimed_index.scans.tables import Value


@dataclass(frozen=True, slots=True)
class LabelFiles:
    """Where the label map of an image comes from: one file with all labels, or a binary mask for each of `values`.

    A voxel that lies in several masks gets the last one of them.
    """

    files: tuple[Path, ...]
    names: Mapping[int, str] = field(default_factory=dict)  # by label
    values: tuple[int, ...] = ()  # the label of each file; empty where the only file holds labels itself


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a data set.

    `name` is the scan's id and, unlike the file's own name perhaps, says nothing that must not be stored.
    """

    path: Path
    name: str
    subject: str
    session: str | None = None
    modality: str | None = None
    split: str | None = None  # train, validation or test, where the data set says
    labels: LabelFiles | None = None
    facts: Mapping[str, Value] = field(default_factory=dict)  # further columns of `scans`
    person: Mapping[str, Value] = field(default_factory=dict)  # columns of `subjects`


@dataclass(frozen=True, slots=True)
class Found:
    """What one data set holds. `notes` say what was left out on purpose, `refused` what is not as it should be."""

    images: list[Image] = field(default_factory=list)
    refused: list[tuple[str, ScanRefused]] = field(default_factory=list)  # by base name
    notes: list[str] = field(default_factory=list)

    def refuse(self, name: str, message: str, next_step: str) -> None:
        """Leave out what has this base name."""
        self.refused.append((name, ScanRefused(message, next_step=next_step)))


def some(names: list[str], most: int = 3) -> str:
    """The first few of a list of names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def repeated(names: list[str]) -> list[str]:
    """The names that are there more than once, each once."""
    return [name for name, count in Counter(names).items() if count > 1]


def with_one_type(images: list[Image]) -> list[Image]:
    """The images with one type a column: whole and real numbers together are real, numbers and texts are texts."""
    types: dict[str, set[type]] = {}
    for image in images:
        for column, value in (*image.facts.items(), *image.person.items()):
            if value is not None:
                types.setdefault(column, set()).add(type(value))
    mixed: dict[str, Callable[[Any], Value]] = {
        column: (str if str in found else float) for column, found in types.items() if len(found) > 1
    }

    def turned(facts: Mapping[str, Value]) -> dict[str, Value]:
        return {
            column: mixed[column](value) if column in mixed and value is not None else value
            for column, value in facts.items()
        }

    if not mixed:
        return images
    return [replace(image, facts=turned(image.facts), person=turned(image.person)) for image in images]
