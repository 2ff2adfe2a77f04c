"""A small picture of a scan: its three middle planes, to one scale, with the patient's sides written on them.

axial          coronal        sagittal        as seen by a radiologist: the patient's right is on the left of the
R  A  L        R  S  L        P  S  A         first two pictures; the third is seen from the patient's right side
   P              I              I
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.scans.scan import Scan
from isimed_index.space import spacing_mm, to_ras

TILE = 96  # pixels along each side of a plane
MOST_BYTES = 14_900  # of a picture: in base64 with what stands before it, fewer than 20,000
_GREYS = (256, 64, 32, 16, 8, 4, 2)  # tried in turn until the picture is small enough
_WINDOWS = {"CT": (-160.0, 240.0)}  # soft tissue, in HU; other modalities have no scale of their own
_PERCENTILES = (1.0, 99.0)
_PLANES = ((0, 1, 2), (0, 2, 1), (1, 2, 0))  # patient axes drawn across, drawn up, and cut
_ENDS = (("L", "R"), ("P", "A"), ("I", "S"))  # where each patient axis begins and ends
_LETTERS = {  # 5 × 7 pixels, a row of bits each
    "L": (16, 16, 16, 16, 16, 16, 31),
    "R": (30, 17, 17, 30, 20, 18, 17),
    "A": (14, 17, 17, 31, 17, 17, 17),
    "P": (30, 17, 17, 30, 16, 16, 16),
    "S": (15, 16, 16, 14, 1, 1, 30),
    "I": (14, 4, 4, 4, 4, 4, 14),
}


def thumbnail_png(scan: Scan) -> bytes:
    """A greyscale PNG of at most `MOST_BYTES`; reads three planes of the voxels and copies no more."""
    import imagecodecs

    picture = thumbnail(scan)
    for greys in _GREYS:
        step = 256 // greys
        packed = bytes(imagecodecs.png_encode(picture // step * step, level=9))
        if len(packed) <= MOST_BYTES:
            break
    return packed


def thumbnail(scan: Scan) -> NDArray[np.uint8]:
    """The three planes side by side, (`TILE`, 3 · `TILE`) in row, column; white on black."""
    voxels, affine = to_ras(scan.voxels, scan.affine)
    edges_mm = spacing_mm(affine)
    sizes_mm = edges_mm * voxels.shape
    pixel_mm = float(sizes_mm.max()) / TILE
    planes = [_plane(voxels, plane) * scan.slope + scan.intercept for plane in _PLANES]
    low, high = _window(planes, scan.attributes.get("modality"))
    tiles = []
    for plane, values in zip(_PLANES, planes, strict=True):
        tile = np.zeros((TILE, TILE), np.uint8)
        grey = np.clip((_resized(values, edges_mm[list(plane[:2])], pixel_mm) - low) / ((high - low) or 1.0), 0, 1)
        _draw(tile, (255 * grey).astype(np.uint8), mirrored=plane[0] == 0)
        _write_sides(tile, plane)
        tiles.append(tile)
    return np.hstack(tiles)


def _plane(voxels: NDArray[Any], plane: tuple[int, int, int]) -> NDArray[np.float64]:
    """The middle plane, (across, up) along growing patient axes."""
    cut = plane[2]
    return np.asarray(voxels.take(voxels.shape[cut] // 2, axis=cut), dtype=np.float64)


def _window(planes: list[NDArray[np.float64]], modality: object) -> tuple[float, float]:
    """The values that are drawn black and white."""
    if modality in _WINDOWS:
        return _WINDOWS[str(modality)]
    low, high = np.percentile(np.concatenate([plane.ravel() for plane in planes]), _PERCENTILES)
    return float(low), float(high)


def _resized(values: NDArray[np.float64], edges_mm: NDArray[np.float64], pixel_mm: float) -> NDArray[np.float64]:
    """The plane at one pixel size: the mean of the voxels in a pixel, or the nearest voxel of a coarse axis."""
    for axis in (0, 1):
        count = values.shape[axis]
        pixels = min(TILE, max(1, round(count * float(edges_mm[axis]) / pixel_mm)))
        starts = np.arange(pixels) * count // pixels
        if pixels >= count:
            values = values.take(starts, axis=axis)
            continue
        widths = np.diff(np.append(starts, count))
        values = np.add.reduceat(values, starts, axis=axis) / (widths[:, None] if axis == 0 else widths)
    return values


def _draw(tile: NDArray[np.uint8], plane: NDArray[np.uint8], *, mirrored: bool) -> None:
    """Put a plane (across, up) into the middle of a tile (row, column)."""
    picture = plane.T[::-1, :: -1 if mirrored else 1]  # rows go down, the patient's axis up
    top, left = ((TILE - n) // 2 for n in picture.shape)
    tile[top : top + picture.shape[0], left : left + picture.shape[1]] = picture


def _write_sides(tile: NDArray[np.uint8], plane: tuple[int, int, int]) -> None:
    """The letters of the patient's sides at the edges of a tile."""
    across, up, _ = plane
    left, right = _ENDS[across][::-1] if across == 0 else _ENDS[across]
    below, above = _ENDS[up]
    middle = TILE // 2
    for letter, row, column in (
        (left, middle, 4),
        (right, middle, TILE - 5),
        (above, 5, middle),
        (below, TILE - 6, middle),
    ):
        _write(tile, letter, row, column)


def _write(tile: NDArray[np.uint8], letter: str, row: int, column: int) -> None:
    """A letter in white on black, its middle at a pixel."""
    bits = np.array([[row_bits >> (4 - n) & 1 for n in range(5)] for row_bits in _LETTERS[letter]], np.uint8)
    tile[row - 4 : row + 5, column - 3 : column + 4] = np.pad(bits * 255, 1)
