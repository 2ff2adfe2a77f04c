"""The reference: the image that scans are registered to, an atlas or the cohort's own mean.

    references/<ulid>/reference.json     where it comes from, and which voxels are averaged in it
    references/<ulid>/image.zarr/        the working image as OME-Zarr, and beside it, as a label map, what is compared

Its affine maps to *common* RAS+ mm. It is kept so that a scan that comes later is registered to the very same image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import StoreDamaged
from isimed_index.register.align import Kind
from isimed_index.register.images import Working, pyramid, sampled, working_of, working_spacing
from isimed_index.scans.chunks import open_chunks, write_chunks
from isimed_index.scans.prepare import FOREGROUND_STEP, Intensity, Volume
from isimed_index.scans.scan import LabelMap, Scan
from isimed_index.space import Affine, apply_affine, inverse
from isimed_index.store.files import REFERENCE

Origin = Literal["atlas", "mean"]
IMAGE = "image.zarr"
_STEP = 1e-4  # of a stored value: working values are -1 to 1.5
_RIM_MM = 10.0  # of air around the body that is compared too: where the skin is tells much
_COMPARED = 1  # label
_BACKGROUND = Intensity().low


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What scans are registered to.

    `round` is how many rounds of registration a mean rests on (0: scans laid with their centres of mass on each other),
    and `kind` by which transforms. `made_from` are the paths of the stored voxels that are in it.
    """

    id: str
    origin: Origin
    kind: Kind | None
    round: int
    spacing_mm: float
    made_from: tuple[str, ...]
    image: Scan = field(repr=False)
    compared: NDArray[np.bool_] = field(repr=False)

    def working(self) -> Working:
        """The image as scans are registered to it."""
        values = self.image.values()
        volume = Volume(values, self.image.affine, _BACKGROUND, values > _BACKGROUND + FOREGROUND_STEP)
        return pyramid(volume, self.compared)


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """One scan's part in a mean: its working image, and patient RAS+ mm → common RAS+ mm."""

    working: Working
    affine: Affine


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """Where a mean image is computed: shape (x, y, z) and index → common RAS+ mm."""

    shape: tuple[int, int, int]
    affine: Affine

    @classmethod
    def around(cls, boxes: Sequence[NDArray[np.float64]], spacing: float) -> Grid:
        """The upright grid that the middle half of some boxes, given by their corners (8, 3) in common mm, agree on."""
        low = np.quantile([corners.min(axis=0) for corners in boxes], 0.25, axis=0)
        high = np.quantile([corners.max(axis=0) for corners in boxes], 0.75, axis=0)
        x, y, z = (int(n) for n in np.maximum(8, np.ceil((high - low) / spacing).astype(int)))
        affine = np.diag([spacing, spacing, spacing, 1.0])
        affine[:3, 3] = (low + high) / 2 - spacing * (np.array([x, y, z]) - 1) / 2
        return cls((x, y, z), affine)

    def places(self) -> NDArray[np.float64]:
        """All its points (n, 3) in common mm."""
        return apply_affine(self.affine, np.argwhere(np.ones(self.shape, bool)))


def from_atlas(atlas: Scan, made_from: Sequence[str]) -> Reference:
    """An atlas as a reference; its id is a hash of its content."""
    spacing = working_spacing(atlas.shape, atlas.affine)
    finest = working_of(atlas.values(), atlas.affine, spacing).finest
    image = _stored(finest.values, finest.affine)
    seen = np.ones(finest.values.shape, bool)
    return Reference(atlas.digest[:12], "atlas", None, 0, spacing, tuple(made_from), image, _compared(image, seen))


def mean_of(
    parts: Iterable[Placed], grid: Grid, spacing: float, kind: Kind, rounds: int, made_from: Sequence[str]
) -> Reference:
    """The mean of placed scans where at least half of them are seen; one is held in memory at a time."""
    places = grid.places()
    total, seen = np.zeros(len(places)), np.zeros(len(places))
    count = 0
    for part in parts:
        values, inside = sampled(part.working.finest, inverse(part.affine), places)
        total += values * inside
        seen += inside
        count += 1
    enough = (seen >= count / 2) & (seen > 0)
    mean = np.where(enough, total / np.maximum(seen, 1), _BACKGROUND).astype(np.float32).reshape(grid.shape)
    image = _stored(mean, grid.affine)
    compared = _compared(image, enough.reshape(grid.shape))
    return Reference(image.digest[:12], "mean", kind, rounds, spacing, tuple(sorted(made_from)), image, compared)


def _stored(values: NDArray[np.float32], affine: Affine) -> Scan:
    """Working values as they are stored: what is registered to must be the same before and after."""
    return Scan("reference", np.rint(values / _STEP).astype(np.int16), affine, slope=_STEP)


def _compared(image: Scan, seen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The body with a rim of air, as far as it is seen."""
    from scipy.ndimage import binary_dilation, binary_fill_holes

    body = binary_fill_holes(image.values() > _BACKGROUND + FOREGROUND_STEP)
    rim = max(1, round(_RIM_MM / float(image.spacing_mm.mean())))
    near: NDArray[np.bool_] = binary_dilation(body, iterations=rim) & seen
    return near


def write_reference(directory: Path, reference: Reference) -> None:
    """Write a reference into an empty folder."""
    content = {
        "reference": reference.id,
        "origin": reference.origin,
        "kind": reference.kind,
        "round": reference.round,
        "spacing_mm": reference.spacing_mm,
        "made_from": list(reference.made_from),
    }
    (directory / REFERENCE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    labels = LabelMap(reference.compared.astype(np.uint8), {_COMPARED: "compared"})
    write_chunks(reference.image, labels, directory / IMAGE)


def read_reference(directory: Path) -> Reference:
    """Read what `write_reference` wrote; `StoreDamaged` when something is missing or malformed."""
    try:
        content: dict[str, Any] = json.loads((directory / REFERENCE).read_text(encoding="utf-8"))
        stored = open_chunks(directory / IMAGE, "reference")
        image = Scan("reference", stored.voxels(), stored.affine, stored.slope, stored.intercept)
        compared = stored.labels()
        if compared is None:
            raise ValueError("no mask")
        return Reference(
            content["reference"],
            content["origin"],
            content["kind"],
            int(content["round"]),
            float(content["spacing_mm"]),
            tuple(content["made_from"]),
            image,
            compared == _COMPARED,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreDamaged("a reference cannot be read", next_step="isimed register --redo") from error


def anchored(affines: Sequence[Affine], centres_mm: Sequence[NDArray[np.float64]], kind: Kind) -> Affine:
    """What has to follow transforms (patient → common) so that a mean image does not drift, turn or shrink.

    After it, the mean of their linear parts is the identity (for rigid ones: its nearest rotation is), and the centres
    (3,) of the scans lie on average where they lie in the patients.
    """
    linear = np.mean([affine[:3, :3] for affine in affines], axis=0)
    if kind == "rigid":
        left, _, right = np.linalg.svd(linear)
        linear = left @ np.diag([1, 1, np.linalg.det(left @ right)]) @ right
    back = np.eye(4)
    back[:3, :3] = np.linalg.inv(linear)
    seen = np.mean([apply_affine(a, c) for a, c in zip(affines, centres_mm, strict=True)], axis=0)
    back[:3, 3] = np.mean(centres_mm, axis=0) - back[:3, :3] @ seen
    return back
