"""Label maps of a BIDS data set, found for the images whose entities and grid they share.

`sub-01_T1w.nii.gz` may have `sub-01_seg-brain_dseg.nii.gz` beside it or in `derivatives/<pipeline>/sub-01/anat/`. The
name of a segmentation holds the entities of its source but not its suffix (T1w), so that the grid has to tell which of
several images it was made on. Masks (`label-lesion_mask`) are used where an image has no segmentation; each is named
by all that tells it from others (`label-kidney_desc-left` is "kidney left").
"""

from __future__ import annotations

from collections import Counter, defaultdict
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
_NAMING = ("label", "hemi", "desc", "seg", "atlas")  # entities that say what a mask shows, in the order of its name
_DERIVED = ("space", *_NAMING, "res", "den", "scale")  # a derivative's own entities
_IMAGES = (".nii.gz", ".nii")
_TOLERANCE_MM = 1e-3
_Grid = tuple[tuple[int, ...], Affine]
_Candidate = tuple[Path, BidsName, Path]  # a label map, its name, and the data set that it lies in
# How far a label map came with the image that suits it best; up to the last, it is left out, for the reason below.
_NO_IMAGE, _SPACE, _HEMISPHERE, _OTHER_GRID, _FITS = range(5)
_REASONS = (
    "are named after no image",
    "are in a space that is not their image's",
    "are of one hemisphere, and no image of their name is of that one,",
    "lie on another grid than the images of their name",
)


class LabelFinder:
    """Finds the label map of each image; those that fit none are counted."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._side_cars: dict[Path, SideCars] = {}
        self._of: dict[Path, LabelFiles] = {}
        self._several: list[str] = []
        self._pipelines: list[str] = []
        self._twice: list[str] = []
        self._came: dict[Path, int] = {}  # label map → _NO_IMAGE … _FITS
        self._shared: list[str] = []
        self._unreadable: list[str] = []

    def match(self, images: Sequence[tuple[Path, BidsName]]) -> None:
        """Find the label maps of all images."""
        candidates: dict[tuple[str, ...], list[_Candidate]] = {}
        for path, name, dataset in self._candidates():
            candidates.setdefault(_source(name), []).append((path, name, dataset))
            self._came[path] = _NO_IMAGE
        fit: Counter[Path] = Counter()  # label maps whose names do not say on which image they were drawn
        on: list[tuple[Path, BidsName, list[_Candidate]]] = []
        for path, name in images:
            mine = self._fitting(path, name, candidates.get(_source(name), ()))
            fit.update(candidate[0] for candidate in mine if candidate[1].entities.get("space") != name.suffix)
            on.append((path, name, mine))
        self._shared = sorted(path.name for path, count in fit.items() if count > 1)
        structures = sorted(
            {_structure(label, name) for _, name, mine in on for _, label, _ in mine if label.suffix != _DSEG}
        )
        for path, name, mine in on:
            chosen = self._chosen(path, name, mine, structures) if mine else None
            if chosen is not None:
                self._of[path] = chosen

    def _fitting(self, image: Path, name: BidsName, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """Those of the label maps with the entities of an image that lie on its grid."""
        grid = None
        mine = []
        for candidate in candidates:
            path, label, _ = candidate
            came = _agree(label, name)
            if came == _OTHER_GRID:
                grid = grid or _grid(image)
                came = _FITS if grid is not None and _same(grid, _grid(path)) else _OTHER_GRID
            if came == _FITS:
                mine.append(candidate)
            self._came[path] = max(came, self._came[path])
        return mine

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
        if self._pipelines:
            notes.append(
                f"{len(self._pipelines)} images have masks of several pipelines, and got those of one: "
                f"{some(self._pipelines)}"
            )
        if self._twice:
            notes.append(
                f"{len(self._twice)} images have several masks of one structure and got no labels: {some(self._twice)}"
            )
        if self._shared:
            notes.append(
                f"{len(self._shared)} label maps fit several images with one grid, and were given to each: "
                f"{some(self._shared)}"
            )
        for came, reason in enumerate(_REASONS):
            unfit = [path.name for path, reached in self._came.items() if reached == came]
            if unfit:
                notes.append(f"{len(unfit)} label maps {reason} and were left out: {some(unfit)}")
        notes.extend(f"{message}; the labels go by their numbers" for message in sorted(set(self._unreadable)))
        return notes

    def _candidates(self) -> Iterator[_Candidate]:
        """Label maps of the data set and its derivatives."""
        derivatives = self._root / "derivatives"
        pipelines = [path for path in sorted(derivatives.iterdir()) if path.is_dir()] if derivatives.is_dir() else []
        for dataset in (self._root, *pipelines):
            self._side_cars[dataset] = SideCars(dataset)
            for subject in sorted(path for path in dataset.glob("sub-*") if path.is_dir()):
                for path in sorted(subject.rglob("*")):
                    name = parse(path.name) if path.name.endswith(_IMAGES) else None
                    if name is not None and name.suffix in LABEL_SUFFIXES and not path.name.startswith("."):
                        yield path, name, dataset

    def _chosen(
        self, image: Path, name: BidsName, mine: list[_Candidate], structures: Sequence[str]
    ) -> LabelFiles | None:
        """Of several: a segmentation before masks, one beside the image first, then by pipeline and name."""
        maps = [item for item in mine if item[1].suffix == _DSEG]
        if maps:
            maps.sort(key=lambda item: (item[2] != self._root, item[2].name, len(item[1].entities), item[0].name))
            if len(maps) > 1:
                self._several.append(f"{image.name} ({maps[0][0].name})")
            path, _, dataset = maps[0]
            return LabelFiles((path,), self._names(path, dataset))
        first = mine[0][2]  # masks of one pipeline only: two that drew the same structure would overlap
        if any(dataset != first for _, _, dataset in mine):
            self._pipelines.append(f"{image.name} ({first.name})")
        masks: defaultdict[str, list[Path]] = defaultdict(list)
        for path, label, dataset in mine:
            if dataset == first:
                masks[_structure(label, name)].append(path)
        twice = [path.name for paths in masks.values() if len(paths) > 1 for path in paths]
        if twice:  # nothing tells which is meant, and a map without the structure would call it background
            self._twice.append(f"{image.name} ({', '.join(twice)})")
            return None
        values = {structures.index(structure) + 1: structure for structure in sorted(masks)}
        return LabelFiles(tuple(masks[structure][0] for structure in values.values()), values, tuple(values))

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


def _structure(label: BidsName, image: BidsName) -> str:
    """What a mask shows, less what it shares with its image: `hemi-L_label-amygdala` → amygdala L.

    If it shares everything that could name it, it is named by that (`desc-brain_mask` of `desc-brain_T1w`).
    """
    said = [(key, label.entities[key]) for key in _NAMING if key in label.entities]
    own = [value for key, value in said if image.entities.get(key) != value]
    return " ".join(own or [value for _, value in said]) or _MASK


def _agree(label: BidsName, image: BidsName) -> int:
    """How far the names of label map and image allow one grid: `space-T1w` is that of T1w images.

    A mask of one hemisphere is a structure of the whole image; a segmentation of one would call the other background.
    """
    if label.entities.get("space") not in (None, "orig", image.suffix, image.entities.get("space")):
        return _SPACE
    its, of_image = label.entities.get("hemi"), image.entities.get("hemi")
    if its is None and of_image is not None:
        return _NO_IMAGE
    if its != of_image and (label.suffix == _DSEG or of_image is not None):
        return _HEMISPHERE
    return _OTHER_GRID


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
