"""Scans on disk: OME-Zarr 0.5 (Zarr v3, sharded) with the label map beside the image.

    <directory>/zarr.json            multiscales metadata; our own facts under the attribute `isimed`
    <directory>/0/                   voxels (x, y, z) in their stored type
    <directory>/1/ …                 coarser copies for viewers (`pyramid`); nothing here reads them
    <directory>/labels/anatomy/0/    labels on the same grids, their names in `image-label`

OME-Zarr 0.5 can say a scale and a translation only; the exact 4×4 affine of each level, slope and intercept are in
`isimed`. Every shard is written even when it is empty and every chunk carries a CRC-32C, so a missing or changed file
is an error and never a silent zero. (Zarr itself reads zeros where a shard is missing or has no bytes.)

A scan whose embeddings came without its voxels is a group without arrays: `isimed` then holds its `shape`, and
`"voxels": "absent"`. Whoever asks for its voxels is told so.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import NotFound, StoreDamaged, UsageError
from isimed_index.grid import Box
from isimed_index.scans.arrays import write_array, write_group
from isimed_index.scans.pyramid import Level, Triple, coarser_image, coarser_labels, levels
from isimed_index.scans.scan import LabelMap, Scan, physical_values
from isimed_index.space import Affine

LABELS_NAME = "anatomy"
_OME_VERSION = "0.5"
_METHODS = {
    "mean": "mean of the voxels of the level before; halves go to the even integer",
    "mode": "commonest label of the level before; of several one that is not 0, then the smallest",
}
_ABSENT = "absent"  # what `voxels` says of a scan that is stored without them
_GOLDEN_TURN = 0.618034  # of the hue from a label to the next: neighbours in number look unlike


def write_chunks(scan: Scan, labels: LabelMap | None, directory: Path) -> None:
    """Write `scan` and its label map into `directory`, which is new or empty."""
    if labels is not None and labels.voxels.shape != scan.shape:
        raise UsageError(f"expected labels of shape {scan.shape}, found {labels.voxels.shape}")
    pyramid = levels(scan.shape, scan.spacing_mm)
    affines = [level.affine(scan.affine) for level in pyramid]
    write_group(
        directory,
        {
            "ome": {"version": _OME_VERSION, "multiscales": [_multiscale("image", "mean", scan, pyramid)]},
            "isimed": {
                "affine": scan.affine.tolist(),
                "levels": [{"path": str(n), "affine": affine.tolist()} for n, affine in enumerate(affines)],
                "slope": scan.slope,
                "intercept": scan.intercept,
                "background": scan.background,
                "attributes": dict(scan.attributes),
            },
        },
    )
    _write_levels(directory, scan.voxels, pyramid, coarser_image)
    if labels is None:
        return
    write_group(directory / "labels", {"ome": {"version": _OME_VERSION, "labels": [LABELS_NAME]}})
    properties = [{"label-value": label, "name": name} for label, name in sorted(labels.names.items())]
    image_label: dict[str, Any] = {"source": {"image": "../../"}, "colors": _colours(labels)}
    if properties:
        image_label["properties"] = properties
    multiscales = [_multiscale(LABELS_NAME, "mode", scan, pyramid)]
    ome = {"version": _OME_VERSION, "multiscales": multiscales, "image-label": image_label}
    anatomy = directory / "labels" / LABELS_NAME
    write_group(anatomy, {"ome": ome})
    _write_levels(anatomy, labels.voxels, pyramid, coarser_labels)


def write_absent(
    shape: tuple[int, int, int], affine: Affine, attributes: Mapping[str, str | float | int], directory: Path
) -> None:
    """Write a scan of which only the geometry is known into `directory`, which is new or empty."""
    facts = {"affine": affine.tolist(), "slope": 1.0, "intercept": 0.0, "background": 0, "attributes": dict(attributes)}
    write_group(directory, {"isimed": {**facts, "shape": list(shape), "voxels": _ABSENT}})


@dataclass(frozen=True, slots=True, eq=False)
class StoredScan:
    """A scan that `write_chunks` wrote; voxels are read when they are asked for. Made by `open_chunks`.

    Of a scan that `write_absent` wrote, `voxels` and `values` raise `NotFound`; it has no label map.
    """

    directory: Path
    name: str  # for messages
    shape: tuple[int, int, int]  # voxels along x, y and z
    affine: Affine
    slope: float
    intercept: float
    background: int | float
    attributes: Mapping[str, str | float | int]
    label_names: dict[int, str]
    _image: Any
    _labels: Any

    @property
    def absent(self) -> bool:
        """Whether it is stored without its voxels."""
        return self._image is None

    def voxels(self, box: Box | None = None) -> NDArray[Any]:
        """Stored voxels of the box (all without one), background outside of the scan; `StoreDamaged` if unreadable."""
        if self.absent:
            raise NotFound(
                f"the voxels of {self.name} are not in this store: its embeddings were imported without them",
                next_step="add its file to a new store, or import an export that was made with --voxels into one",
            )
        return self._read(self._image, box, self.background)

    def values(self, box: Box | None = None) -> NDArray[np.float32]:
        """Physical values of the box (all without one), the least value outside of the scan."""
        return physical_values(self.voxels(box), self.slope, self.intercept)

    def labels(self, box: Box | None = None) -> NDArray[Any] | None:
        """Labels of the box (all without one), 0 outside of the scan; None where there is no label map."""
        return None if self._labels is None else self._read(self._labels, box, 0)

    def label_at(self, voxel: tuple[int, int, int]) -> int | None:
        """The label of one voxel; None outside of the scan or where there is no label map."""
        x, y, z = (int(index) for index in voxel)
        if self._labels is None or not all(0 <= i < n for i, n in zip((x, y, z), self.shape, strict=True)):
            return None
        return int(self._read(self._labels, Box((x, y, z), (x + 1, y + 1, z + 1)), 0)[0, 0, 0])

    def _read(self, array: Any, box: Box | None, fill: int | float) -> NDArray[Any]:
        with _damage(self.directory):
            source, target = (box or Box((0, 0, 0), self.shape)).slices(self.shape)
            found = np.asarray(array[source])
            _check_shards(self.directory, array)  # after the read: artefacts never change, so they were there
            if box is None or found.shape == box.shape:
                return found
            cut = np.full(box.shape, fill, dtype=array.dtype)
            cut[target] = found
            return cut


def open_chunks(directory: Path, scan: str | None = None) -> StoredScan:
    """Open what `write_chunks` or `write_absent` wrote, without reading voxels; `scan` is its id, for messages.

    `StoreDamaged` when something is missing or malformed.
    """
    import zarr.storage

    with _damage(directory):
        root = zarr.open_group(store=zarr.storage.LocalStore(directory, read_only=True), mode="r", zarr_format=3)
        facts: Any = root.attrs["isimed"]
        image = None if facts.get("voxels") == _ABSENT else _open_array(directory, root, "0")
        x, y, z = (int(n) for n in (facts["shape"] if image is None else image.shape))
        labels, names = None, {}
        if (directory / "labels").exists():
            where = f"labels/{LABELS_NAME}"
            labels = _open_array(directory, root, f"{where}/0")
            ome: Any = root[where].attrs["ome"]
            properties = ome["image-label"].get("properties", [])
            names = {int(entry["label-value"]): str(entry["name"]) for entry in properties}
        return StoredScan(
            directory=directory,
            name="this scan" if scan is None else f"scan {scan!r}",
            shape=(x, y, z),
            affine=np.array(facts["affine"], dtype=np.float64).reshape(4, 4),
            slope=float(facts["slope"]),
            intercept=float(facts["intercept"]),
            background=facts["background"],
            attributes=dict(facts["attributes"]),
            label_names=names,
            _image=image,
            _labels=labels,
        )


def _colours(labels: LabelMap) -> list[dict[str, Any]]:
    """A colour for every label that has a name, or, without any, that occurs: the same for a number in all scans.

    OME-Zarr's validators want colours and `properties` for the same labels.
    """
    coloured = []
    for label in sorted(labels.names or {0, *map(int, np.unique(labels.voxels))}):
        red, green, blue = colorsys.hsv_to_rgb(label * _GOLDEN_TURN % 1, 0.7, 0.95)
        rgba = [round(255 * part) for part in (red, green, blue)] + [255] if label else [0, 0, 0, 0]
        coloured.append({"label-value": label, "rgba": rgba})
    return coloured


def _multiscale(name: str, method: str, scan: Scan, pyramid: Sequence[Level]) -> dict[str, Any]:
    """OME-Zarr multiscales metadata: the axis-aligned part of each level's affine, seen from the first voxel."""
    datasets = []
    for number, level in enumerate(pyramid):
        factor = np.array(level.factor)
        scale = scan.spacing_mm * factor
        place = scan.affine[:3, 3] + scan.spacing_mm * (factor - 1) / 2
        transforms = [
            {"type": "scale", "scale": scale.tolist()},
            {"type": "translation", "translation": place.tolist()},
        ]
        datasets.append({"path": str(number), "coordinateTransformations": transforms})
    axes = [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "xyz"]
    said = {"description": _METHODS[method], "method": "isimed_index.scans.pyramid"}
    return {"name": name, "axes": axes, "datasets": datasets, "type": method, "metadata": said}


def _write_levels(
    group: Path, voxels: NDArray[Any], pyramid: Sequence[Level], coarser: Callable[[NDArray[Any], Triple], NDArray[Any]]
) -> None:
    """Write every level into a group, each made from the one before."""
    for number, level in enumerate(pyramid):
        voxels = coarser(voxels, level.step) if number else voxels
        write_array(group / str(number), voxels, "xyz")


def _open_array(directory: Path, root: Any, path: str) -> Any:
    array = root[path]
    _check_shards(directory, array)
    return array


def _check_shards(directory: Path, array: Any) -> None:
    """Raise `FileNotFoundError` when a shard of the array is missing or empty."""
    counts = [math.ceil(n / shard) for n, shard in zip(array.shape, array.shards, strict=True)]
    for index in product(*[range(count) for count in counts]):
        shard = directory.joinpath(array.path, "c", *map(str, index))
        if not shard.stat().st_size:
            raise FileNotFoundError(f"shard {shard.relative_to(directory)} is empty")


@contextmanager
def _damage(directory: Path) -> Iterator[None]:
    """Whatever Zarr, its codecs or the file system raise while reading becomes `StoreDamaged`."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise StoreDamaged(
            f"stored scan {directory.name} is missing, incomplete or damaged ({type(error).__name__})",
            next_step="restore the store from a backup, or add the file to a new one",
        ) from error


def slabs(directory: Path) -> Iterator[NDArray[Any]]:
    """The elements of any one stored array, decoded, a row of shards at a time; `StoreDamaged` when unreadable."""
    import zarr.storage

    with _damage(directory):
        array = zarr.open_array(store=zarr.storage.LocalStore(directory, read_only=True), mode="r")
        step = (array.shards or array.chunks or array.shape)[0] if array.shape else 1
        for start in range(0, array.shape[0] if array.shape else 1, step):
            yield np.ascontiguousarray(array[start : start + step] if array.shape else array[...])
