"""One head as another scanner, another setting or another pose would show it; where every point goes is known exactly.

plain      as it is
contrast   a steep curve, and shading along one axis
inverted   bright tissue dark and dark tissue bright; air stays air
halffov    the lower 45 % of the field of view is missing
rot20      turned by about 20° within the same field of view
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from isimed_index.space import Affine, inverse

Variant = Literal["plain", "contrast", "inverted", "halffov", "rot20"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

_AIR = 0.08  # of the 99th percentile
_CUT = 0.45
_TURN_DEG = (12.0, -14.0, 10.0)


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A volume (x, y, z) with its label map (x, y, z) and voxel → RAS+ mm (4, 4); its axes run right, anterior, up."""

    values: NDArray[np.float32]
    labels: NDArray[np.integer[Any]]
    affine: Affine


def vary(head: Head, variant: Variant) -> tuple[Head, Affine]:
    """The head under a change of contrast, field of view or pose, and where its points go: plain mm → varied mm."""
    values, still = head.values, np.eye(4)
    top = np.float32(np.percentile(values, 99))
    if variant == "contrast":
        shading = np.exp(0.4 * np.linspace(-1, 1, values.shape[1], dtype=np.float32))[:, None]
        return replace(head, values=np.clip(values / top, 0, 1.2) ** np.float32(1.8) * shading * top), still
    if variant == "inverted":
        turned = np.where(values > _AIR * top, np.float32(1.1) * top - np.clip(values, 0, top), values)
        return replace(head, values=turned), still
    if variant == "halffov":
        cut = int(values.shape[2] * _CUT)
        affine = head.affine.copy()
        affine[:3, 3] += head.affine[:3, 2] * cut
        return Head(values[:, :, cut:], head.labels[:, :, cut:], affine), still
    if variant == "rot20":
        return _turned(head)
    return head, still


def _turned(head: Head) -> tuple[Head, Affine]:
    """The head turned about the middle of its volume."""
    to_plain = np.eye(4)  # voxel of the turned volume → voxel of the plain one
    to_plain[:3, :3] = Rotation.from_euler("xyz", _TURN_DEG, degrees=True).as_matrix()
    middle = np.array(head.values.shape) / 2
    to_plain[:3, 3] = middle - to_plain[:3, :3] @ middle
    values = ndimage.affine_transform(head.values, to_plain, order=1, output=np.float32)
    labels = ndimage.affine_transform(head.labels, to_plain, order=0)
    moved: Affine = head.affine @ inverse(to_plain) @ inverse(head.affine)
    return Head(values, labels, head.affine), moved
