"""Augmented views of a scan whose coordinates are known exactly.

A view is a cube of voxels cut out of a working volume through a small random rotation and scaling, plus the affine
that says where in the patient each of its voxels lies. No view is ever mirrored: left stays left.

      working volume (voxels)               view (voxels, side³)
      ┌──────────────────┐   to_volume      ┌────────┐
      │     ╱╲  R·s      │ ◀──────────────  │        │      mm = volume.affine @ to_volume @ view voxel
      │    ╱  ╲          │                  └────────┘
      └──────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch.nn import functional as F

from isimed_index.config import Augmentation
from isimed_index.grid import Box
from isimed_index.scans.prepare import thick_slices
from isimed_index.space import Affine, apply_affine

_MOST = 65_504  # float16 can hold
_ASLANT = 1  # voxel: the lines of a view are followed to whole planes, which shifts them by no more


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """What is at hand of a working volume: float16 values from voxel `start` on, the fill value, the whole's shape."""

    values: torch.Tensor
    background: float
    start: tuple[int, int, int]
    shape: tuple[int, int, int]

    @classmethod
    def of(
        cls,
        values: NDArray[np.float32],
        background: float,
        start: tuple[int, int, int] = (0, 0, 0),
        shape: tuple[int, ...] | None = None,
    ) -> Window:
        """A window of these values (x, y, z); the whole volume where nothing else is said."""
        x, y, z = values.shape if shape is None else shape
        held = torch.tensor(values, dtype=torch.float16).clamp_(-_MOST, _MOST)  # where nothing is cut off: no infinity
        return cls(held, background, start, (x, y, z))


def random_pose(rng: np.random.Generator, augmentation: Augmentation) -> NDArray[np.float64]:
    """A random (3, 3) rotation times scaling."""
    angles = rng.uniform(-1, 1, 3) * augmentation.rotation_deg
    scale = np.exp(rng.uniform(-1, 1) * augmentation.scale)
    turn: NDArray[np.float64] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * scale
    return turn


def view_affine(centre_vox: NDArray[np.float64], pose: NDArray[np.float64], side: int) -> Affine:
    """View voxel → voxel of the working volume, (4, 4); the view's centre lies on `centre_vox`."""
    affine = np.eye(4)
    affine[:3, :3] = pose
    affine[:3, 3] = centre_vox - pose @ np.full(3, (side - 1) / 2)
    return affine


def reach(to_volume: Affine, side: int, shape: tuple[int, int, int]) -> Box:
    """The voxels of a working volume of `shape` that a view needs; one at the border where it lies outside."""
    corners = np.stack(np.meshgrid(*[[0, side - 1]] * 3, indexing="ij"), -1).reshape(-1, 3)
    seen = apply_affine(to_volume, corners)
    start = np.clip(np.floor(seen.min(0)).astype(int) - _ASLANT, 0, np.array(shape) - 1)
    stop = np.clip(np.ceil(seen.max(0)).astype(int) + 1 + _ASLANT, start + 1, shape)
    (ax, ay, az), (bx, by, bz) = start.tolist(), stop.tolist()
    return Box((ax, ay, az), (bx, by, bz))


def cut(window: Window, to_volume: Affine, side: int) -> torch.Tensor:
    """The (side, side, side) float32 view that `to_volume` (4, 4) puts into the volume; background outside of it.

    The window must hold what the view sees of the volume (`reach`).
    """
    box = reach(to_volume, side, window.shape)
    first = [start - held for start, held in zip(box.start, window.start, strict=True)]
    x, y, z = (slice(at, at + n) for at, n in zip(first, box.shape, strict=True))
    block = window.values[x, y, z].float()
    assert block.shape == box.shape  # the window holds the box
    whole = np.rint(to_volume[:3, 3])
    if np.array_equal(to_volume[:3, :3], np.eye(3)) and np.abs(to_volume[:3, 3] - whole).max() < 1e-6:
        return _placed(block, box, whole.astype(int).tolist(), side, window.background)
    return _sampled(block, box, to_volume, side, window.background)


def _placed(block: torch.Tensor, box: Box, corner: list[int], side: int, background: float) -> torch.Tensor:
    """A view that lies on whole voxels is a piece of the volume."""
    view = torch.full((side,) * 3, background)
    there = [(max(a, c), min(b, c + side)) for a, b, c in zip(box.start, box.stop, corner, strict=True)]
    if all(start < stop for start, stop in there):
        to, of = ([slice(a - o, b - o) for (a, b), o in zip(there, own, strict=True)] for own in (corner, box.start))
        view[*to] = block[*of]
    return view


def _sampled(block: torch.Tensor, box: Box, to_volume: Affine, side: int, background: float) -> torch.Tensor:
    """The block of the volume that `box` names, bilinear within its planes along one axis and then linear across them.

    Like trilinear interpolation this is exact for whatever is linear, at a third of the cost: PyTorch vectorises
    `grid_sample` in two dimensions only.
    """
    turn, origin = to_volume[:3, :3], to_volume[:3, 3] - np.array(box.start)
    across, along = divmod(int(np.abs(turn).argmax()), 3)  # lines of the view along one axis cross planes of the volume
    rows, columns = ([axis for axis in range(3) if axis != given] for given in (across, along))
    skew = turn[rows, along] / turn[across, along]  # how far a line moves within a plane from one plane to the next
    within = turn[np.ix_(rows, columns)] - np.outer(skew, turn[across, columns])
    steps, numbers = np.arange(side), np.arange(block.shape[across])
    crossing = torch.empty(2, len(numbers), side, side)  # column and row where the lines (u, v) cross every plane
    for n, (row, slant, by) in enumerate(zip(rows, skew, within, strict=True)):
        size = block.shape[row]
        plane = _plane(origin[row] - slant * origin[across], by, steps, size)
        torch.add(plane, _line(slant * numbers, size)[:, None, None], out=crossing[1 - n])
    planes = (block - background).movedim(across, 0)[:, None]
    crossed = _bilinear(planes, crossing)[:, 0].movedim(0, -1)  # (side, side, planes)
    depth = torch.empty(2, side, side, side)  # column and row of every voxel of a line, in the image of its crossings
    plane = _plane(origin[across], turn[across, columns], steps, len(numbers))
    torch.add(plane[..., None], _line(turn[across, along] * steps, len(numbers)), out=depth[0])
    depth[1] = (_line(steps + 0.5, side) - 1)[:, None]
    seen = _bilinear(crossed[:, None], depth)[:, 0]
    return seen.movedim(-1, along).add_(background)


def _plane(start: float, by: NDArray[np.float64], steps: NDArray[np.int64], size: int) -> torch.Tensor:
    """Voxel start + by · (u, v) of `size` ones in `grid_sample`'s own units, voxel edges at ±1; (side, side)."""
    first, second = (np.asarray(step * steps * 2 / size) for step in by)
    return torch.tensor(first[:, None] + second + ((start + 0.5) * 2 / size - 1), dtype=torch.float32)


def _line(voxels: NDArray[np.floating[Any]], size: int) -> torch.Tensor:
    """Distances in voxels of `size` ones in `grid_sample`'s own units."""
    return torch.tensor(voxels * (2 / size), dtype=torch.float32)


def _bilinear(images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Images (n, 1, rows, columns) at the columns and rows `places` (2, n, u, v), 0 outside."""
    grid = places.movedim(0, -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def recolour(view: torch.Tensor, rng: np.random.Generator, augmentation: Augmentation) -> torch.Tensor:
    """Change contrast, shading, resolution and noise of a (side, side, side) view in about −1…1, not its geometry."""
    a = augmentation
    if rng.random() < a.curve_probability:
        view = _curved(view, rng, a)
    if a.bias:
        coarse = torch.tensor(np.exp(rng.normal(0, a.bias, (3, 3, 3))), dtype=torch.float32)
        at = torch.linspace(0, 2, view.shape[0])  # linear interpolation between three factors along every axis
        linear = (1 - (at[:, None] - torch.arange(3)).abs()).clamp(min=0)  # (side, 3)
        field = torch.tensordot(linear, linear @ coarse @ linear.T, dims=1)
        view = field.mul_(view + 1).sub_(1)
    if a.slices_probability and rng.random() < a.slices_probability:
        thickness = rng.uniform(1, a.thickest_vox)
        slices = torch.tensor(thick_slices(view.shape[0], thickness, rng.uniform(0, thickness)))
        axis = int(rng.integers(3))
        view = (view.movedim(axis, -1) @ slices.T).movedim(-1, axis)
    if a.noise:
        values = _noise(view.numel())
        first, strength = int(rng.integers(len(values) - view.numel())), rng.uniform(-a.noise, a.noise)
        view = torch.add(view, values[first : first + view.numel()].view(view.shape), alpha=strength)
    return view


@cache
def _noise(n: int) -> torch.Tensor:
    """Four times n normal values, of which views take pieces: to draw them anew costs a quarter of a view."""
    return torch.randn(4 * n, generator=torch.Generator().manual_seed(0))


def _curved(view: torch.Tensor, rng: np.random.Generator, augmentation: Augmentation) -> torch.Tensor:
    """A random curve of eight straight pieces, applied to every value."""
    knots = 8
    if rng.random() < augmentation.arbitrary_curve_probability:
        curve = rng.uniform(-1, 1, knots)
    else:
        curve = np.cumsum(rng.gamma(1.0, 1.0, knots))
        curve = 2 * (curve - curve[0]) / (curve[-1] - curve[0]) - 1
    if rng.random() < augmentation.invert_probability:
        curve[1:] = curve[1:][::-1].copy()  # air, the first value, stays as it is
    bends = np.diff(curve, n=2, prepend=curve[0]) * (knots - 1) / 2  # of the slope, at every knot but the last
    inside = view.clamp(-1, 1)
    curved = torch.full_like(view, float(curve[0]))
    for at, bend in zip(np.linspace(-1, 1, knots)[:-1].tolist(), bends.tolist(), strict=True):
        curved.add_((inside - at).clamp_(min=0), alpha=bend)  # quicker than a look-up of every value
    return curved
