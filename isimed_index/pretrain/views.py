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

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch.nn import functional as F

from isimed_index.config import Augmentation
from isimed_index.space import Affine, apply_affine


@dataclass(frozen=True, slots=True)
class WorkingVolume:
    """A prepared volume in training: values (x, y, z) float16 tensor, its affine (voxel → RAS+ mm), its fill value."""

    values: torch.Tensor
    affine: Affine
    background: float
    foreground_vox: NDArray[np.int16]  # (n, 3) voxels a view may be centred on


def random_pose(rng: np.random.Generator, augmentation: Augmentation) -> NDArray[np.float64]:
    """A random (3, 3) rotation times scaling."""
    angles = rng.uniform(-1, 1, 3) * augmentation.rotation_deg
    scale = np.exp(rng.uniform(-1, 1) * augmentation.scale)
    turn: NDArray[np.float64] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * scale
    return turn


def cut(volume: WorkingVolume, centre_vox: NDArray[np.float64], pose: NDArray[np.float64], side: int) -> torch.Tensor:
    """The (side, side, side) float32 view centred on `centre_vox` (3,) under `pose` (3, 3); background outside."""
    to_volume = view_affine(centre_vox, pose, side)
    shape = np.array(volume.values.shape)
    corners = np.stack(np.meshgrid(*[[0, side - 1]] * 3, indexing="ij"), -1).reshape(-1, 3)
    reach = apply_affine(to_volume, corners)
    start = np.clip(np.floor(reach.min(0)).astype(int), 0, shape - 1)
    stop = np.clip(np.ceil(reach.max(0)).astype(int) + 1, start + 1, shape)
    block = volume.values[start[0] : stop[0], start[1] : stop[1], start[2] : stop[2]].float() - volume.background
    size = torch.tensor(block.shape, dtype=torch.float32)
    axes = [torch.arange(side, dtype=torch.float32)] * 3
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)  # (side³, 3) view voxels
    linear = torch.tensor(to_volume[:3, :3], dtype=torch.float32)
    at = grid @ linear.T + torch.tensor(to_volume[:3, 3] - start, dtype=torch.float32)
    at = (at + 0.5) / size * 2 - 1  # grid_sample's own units, voxel edges at ±1
    at = at.flip(-1).reshape(1, side, side, side, 3)  # it wants (z, y, x)
    view = F.grid_sample(block[None, None], at, mode="bilinear", padding_mode="zeros", align_corners=False)
    return view[0, 0] + volume.background


def view_affine(centre_vox: NDArray[np.float64], pose: NDArray[np.float64], side: int) -> Affine:
    """View voxel → voxel of the working volume, (4, 4); the view's centre lies on `centre_vox`."""
    affine = np.eye(4)
    affine[:3, :3] = pose
    affine[:3, 3] = centre_vox - pose @ np.full(3, (side - 1) / 2)
    return affine


def recolour(view: torch.Tensor, rng: np.random.Generator, augmentation: Augmentation) -> torch.Tensor:
    """Change contrast, shading and noise of a (side, side, side) view in about −1…1; geometry is untouched."""
    a = augmentation
    if rng.random() < a.curve_probability:
        knots = 8
        if rng.random() < a.arbitrary_curve_probability:
            curve = rng.uniform(-1, 1, knots)
        else:
            curve = np.cumsum(rng.gamma(1.0, 1.0, knots))
            curve = 2 * (curve - curve[0]) / (curve[-1] - curve[0]) - 1
        if rng.random() < a.invert_probability:
            curve[1:] = curve[1:][::-1].copy()  # air, the first value, stays as it is
        position = ((view.clamp(-1, 1) + 1) / 2 * (knots - 1)).clamp(0, knots - 1 - 1e-4)
        lower = position.long()
        table = torch.tensor(curve, dtype=torch.float32)
        view = torch.lerp(table[lower], table[lower + 1], position - lower)
    if a.bias:
        coarse = torch.tensor(rng.normal(0, a.bias, (1, 1, 3, 3, 3)), dtype=torch.float32)
        field = F.interpolate(coarse, size=view.shape, mode="trilinear", align_corners=True)[0, 0]
        view = (view + 1) * field.exp() - 1
    if a.noise:
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        view = view + torch.randn(view.shape, generator=generator) * rng.uniform(0, a.noise)
    return view
