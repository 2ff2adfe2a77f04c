"""Names in BIDS: `sub-01_ses-1_run-2_T1w.nii.gz` is made of entities and a suffix; side-cars are inherited by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isimed_index.scans.layouts.documents import read_object

_EXTENSIONS = (".nii.gz", ".nii", ".json", ".tsv")


@dataclass(frozen=True, slots=True)
class BidsName:
    """A file's name taken apart: `{"sub": "01", "run": "2"}`, `T1w`, `.nii.gz`."""

    entities: Mapping[str, str]
    suffix: str
    extension: str

    def applies_to(self, other: BidsName) -> bool:
        """Whether a side-car of this name is about the file of the other one: it says nothing that it does not."""
        return self.suffix == other.suffix and self.entities.items() <= other.entities.items()


def parse(name: str) -> BidsName | None:
    """A base name taken apart; None when it is not made as BIDS makes them."""
    extension = next((extension for extension in _EXTENSIONS if name.endswith(extension)), None)
    if extension is None:
        return None
    *pairs, suffix = name[: -len(extension)].split("_")
    entities: dict[str, str] = {}
    for pair in pairs:
        key, dash, value = pair.partition("-")
        if not dash or not key.isalnum() or not value or key in entities:
            return None
        entities[key] = value
    return BidsName(entities, suffix, extension) if suffix.isalnum() else None


@dataclass(slots=True)
class SideCars:
    """Side-cars of one data set, each folder listed and each JSON read once."""

    root: Path
    _folders: dict[Path, list[tuple[BidsName, Path]]] = field(default_factory=dict)
    _contents: dict[Path, dict[str, Any]] = field(default_factory=dict)

    def of(self, file: Path, extension: str) -> Iterator[Path]:
        """Side-cars of that extension (`.json`, `.tsv`) that apply to a file, the most general first."""
        name = parse(file.name)
        below = file.parent.relative_to(self.root).parts
        for depth in range(len(below) + 1):
            folder = self.root.joinpath(*below[:depth])
            here = [
                (other, path)
                for other, path in self._named(folder)
                if name is not None and other.extension == extension and other.applies_to(name)
            ]
            yield from (path for _, path in sorted(here, key=lambda item: (len(item[0].entities), item[1].name)))

    def json(self, file: Path) -> dict[str, Any]:
        """The side-cars of a file as one: a more special one goes before a more general one, key by key."""
        merged: dict[str, Any] = {}
        for path in self.of(file, ".json"):
            merged |= self._content(path)
        return merged

    def _named(self, folder: Path) -> list[tuple[BidsName, Path]]:
        if folder not in self._folders:
            paths = sorted(path for path in folder.iterdir() if path.name.endswith((".json", ".tsv")))
            self._folders[folder] = [(name, path) for path in paths if (name := parse(path.name)) is not None]
        return self._folders[folder]

    def _content(self, path: Path) -> dict[str, Any]:
        if path not in self._contents:
            self._contents[path] = read_object(path) or {}
        return self._contents[path]
