"""Label maps of a BIDS data set, found for the images whose entities and grid they share.

`sub-01_T1w.nii.gz` may have `sub-01_seg-brain_dseg.nii.gz` beside it or in `derivatives/<pipeline>/sub-01/anat/`. The
name of a segmentation holds the entities of its source but not its suffix (T1w), so that the grid has to tell which of
several images it was made on. Masks (`label-lesion_mask`) are used where an image has no segmentation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from isimed_index.errors import UsageError
from isimed_index.scans.label_names import read_label_names
from isimed_index.scans.layouts.bids_names import BidsName, SideCars, parse
from isimed_index.scans.layouts.found import LabelFiles, some
from isimed_index.space import Affine

_DSEG, _MASK = "dseg", "mask"
LABEL_SUFFIXES = (_DSEG, _MASK, "roi")  # roi is what masks were called before
_DERIVED = ("space", "seg", "atlas", "label", "res", "den", "desc", "scale")  # a derivative's own entities
_IMAGES = (".nii.gz", ".nii")
_TOLERANCE_MM = 1e-3
_Grid = tuple[tuple[int, ...], Affine]


class LabelFinder:
    """Finds the label map of each image; those that fit none are counted."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._side_cars: dict[Path, SideCars] = {}
        self._of: dict[Path, LabelFiles] = {}
        self._several: list[str] = []
        self._unfit: list[str] = []
        self._shared: list[str] = []
        self._unreadable: list[str] = []

    def match(self, images: Sequence[tuple[Path, BidsName]]) -> None:
        """Find the label maps of all images."""
        candidates: dict[tuple[str, ...], list[tuple[Path, BidsName, Path]]] = {}
        for path, name, dataset in self._candidates():
            candidates.setdefault(_source(name), []).append((path, name, dataset))
        structures = sorted(
            {_structure(name) for some_ in candidates.values() for _, name, _ in some_ if name.suffix != _DSEG}
        )
        fit: Counter[Path] = Counter()  # label maps whose names do not say on which image they were drawn
        named: set[Path] = set()
        for path, name in images:
            grid = None
            mine: list[tuple[Path, BidsName, Path]] = []
            for candidate in candidates.get(_source(name), ()):
                if not _may_be_on(candidate[1], name):
                    continue
                grid = grid or _grid(path)
                if grid is not None and _same(grid, _grid(candidate[0])):
                    mine.append(candidate)
            fit.update(candidate[0] for candidate in mine if candidate[1].entities.get("space") != name.suffix)
            named.update(candidate[0] for candidate in mine)
            if mine:
                self._of[path] = self._chosen(path, mine, structures)
        self._unfit = [path.name for group in candidates.values() for path, _, _ in group if path not in named]
        self._shared = sorted(path.name for path, count in fit.items() if count > 1)

    def of(self, image: Path) -> LabelFiles | None:
        """The label map of an image, if one was found."""
        return self._of.get(image)

    def notes(self) -> list[str]:
        """What a person should know of label maps that were not taken."""
        notes = []
        if self._several:
            notes.append(
                f"{len(self._several)} images have more than one label map, and got one: {some(self._several)}"
            )
        if self._shared:
            notes.append(
                f"{len(self._shared)} label maps fit several images with one grid, and were given to each: "
                f"{some(self._shared)}"
            )
        if self._unfit:
            notes.append(
                f"{len(self._unfit)} label maps lie on the grid of no image of their name and were left out: "
                f"{some(self._unfit)}"
            )
        notes.extend(f"{message}; the labels go by their numbers" for message in sorted(set(self._unreadable)))
        return notes

    def _candidates(self) -> Iterator[tuple[Path, BidsName, Path]]:
        """Label maps of the data set and its derivatives: file, name, and the data set that it lies in."""
        derivatives = self._root / "derivatives"
        pipelines = [path for path in sorted(derivatives.iterdir()) if path.is_dir()] if derivatives.is_dir() else []
        for dataset in (self._root, *pipelines):
            self._side_cars[dataset] = SideCars(dataset)
            for subject in sorted(path for path in dataset.glob("sub-*") if path.is_dir()):
                for path in sorted(subject.rglob("*")):
                    name = parse(path.name) if path.name.endswith(_IMAGES) else None
                    if name is not None and name.suffix in LABEL_SUFFIXES and not path.name.startswith("."):
                        yield path, name, dataset

    def _chosen(self, image: Path, mine: list[tuple[Path, BidsName, Path]], structures: Sequence[str]) -> LabelFiles:
        """Of several: a segmentation before masks, one beside the image first, then by pipeline and name."""
        maps = [item for item in mine if item[1].suffix == _DSEG]
        if maps:
            maps.sort(key=lambda item: (item[2] != self._root, item[2].name, len(item[1].entities), item[0].name))
            if len(maps) > 1:
                self._several.append(f"{image.name} ({maps[0][0].name})")
            path, _, dataset = maps[0]
            return LabelFiles((path,), self._names(path, dataset))
        first = mine[0][2]  # masks of one pipeline only: two that drew the same structure would overlap
        masks = {_structure(name): path for path, name, dataset in mine if dataset == first}
        if len(masks) < len(mine):
            self._several.append(f"{image.name} (masks)")
        values = {structures.index(structure) + 1: structure for structure in masks}
        return LabelFiles(tuple(masks[values[value]] for value in sorted(values)), values, tuple(sorted(values)))

    def _names(self, path: Path, dataset: Path) -> dict[int, str]:
        """Names from the nearest `dseg.tsv` that applies, else from the label map's own JSON; else none."""
        tables = [*self._side_cars[dataset].of(path, ".json"), *self._side_cars[dataset].of(path, ".tsv")]
        for table in reversed(tables):
            try:
                return read_label_names(table)
            except UsageError as error:
                if table.suffix == ".tsv":
                    self._unreadable.append(error.message)
        return {}


def _source(name: BidsName) -> tuple[str, ...]:
    """What an image and the label maps made of it have in common."""
    return tuple(sorted(f"{key}-{value}" for key, value in name.entities.items() if key not in _DERIVED))


def _structure(name: BidsName) -> str:
    """What a mask shows: `label-lesion` → lesion, `desc-brain` → brain."""
    return name.entities.get("label") or name.entities.get("desc") or _MASK


def _may_be_on(label: BidsName, image: BidsName) -> bool:
    """Whether the names of label map and image allow one grid: `space-T1w` is that of T1w images."""
    space = label.entities.get("space")
    return space in (None, "orig", image.suffix, image.entities.get("space"))


def _grid(path: Path) -> _Grid | None:
    """Shape and affine from a header; None when it cannot be read: who reads the file says why."""
    import nibabel as nib

    if not path.is_file():
        return None
    try:
        header = nib.load(path)  # type: ignore[attr-defined,unused-ignore]
        return tuple(header.shape), np.asarray(header.affine, dtype=np.float64)
    except Exception:  # noqa: BLE001 - nibabel raises whatever a damaged header makes it trip over
        return None


def _same(one: _Grid, other: _Grid | None) -> bool:
    return other is not None and one[0] == other[0] and bool(np.allclose(one[1], other[1], atol=_TOLERANCE_MM))
