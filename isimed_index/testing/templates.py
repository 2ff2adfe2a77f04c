"""What subjects are made from: a real brain that ships in a wheel, or an analytic head that needs no file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import MissingExtra, UsageError
from isimed_index.space import Affine, apply_affine, checked_affine, spacing_mm

_LLOYD_ROUNDS = 10
_LANDMARK_CANDIDATES = 20_000  # enough to spread some dozen points evenly


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """What subjects are made from: values (x, y, z), affine to RAS+ mm, and label numbers on the same grid if any."""

    values: NDArray[np.float32]
    affine: Affine
    labels: NDArray[np.int16] | None = None
    label_names: tuple[str, ...] = ()  # name of label i + 1

    def foreground(self) -> NDArray[np.bool_]:
        """True (x, y, z) where the head is: a tenth of the brightest tissue, holes filled."""
        from scipy.ndimage import binary_fill_holes

        mask: NDArray[np.bool_] = binary_fill_holes(self.values > 0.1 * np.percentile(self.values, 99.5))
        return mask

    def landmarks_mm(self, n: int, margin_mm: float = 8.0) -> NDArray[np.float64]:
        """`n` points (n, 3) in RAS+ mm spread evenly through the head, each at least `margin_mm` below its surface.

        Farthest-point sampling from the most central voxel, which alone would crowd the surface, then centres of the
        nearest regions (Lloyd's rounds): the same points every time, deep and shallow in proportion to their volume.
        """
        from scipy.ndimage import distance_transform_edt
        from scipy.spatial import KDTree

        depth = distance_transform_edt(np.pad(self.foreground(), 1), sampling=spacing_mm(self.affine))[1:-1, 1:-1, 1:-1]
        points = apply_affine(self.affine, np.argwhere(depth >= margin_mm))
        points = points[:: max(1, len(points) // _LANDMARK_CANDIDATES)]
        if len(points) < n:
            raise UsageError(f"expected room for {n} landmarks {margin_mm} mm deep, found {len(points)} voxels")
        chosen = [int(np.argmin(np.linalg.norm(points - points.mean(axis=0), axis=1)))]
        nearest = np.full(len(points), np.inf)
        while len(chosen) < n:
            nearest = np.minimum(nearest, np.linalg.norm(points - points[chosen[-1]], axis=1))
            chosen.append(int(np.argmax(nearest)))
        centres = points[chosen]
        for _ in range(_LLOYD_ROUNDS):
            region = KDTree(centres).query(points)[1]
            means = np.stack([points[region == i].mean(axis=0) for i in range(n)])
            centres = points[KDTree(points).query(means)[1]]  # back onto a voxel that is deep enough
        return centres


def read_template(path: Path) -> Template:
    """Read a NIfTI file as a template, its values shifted to start at 0."""
    import nibabel as nib

    image = nib.load(path)
    values = np.asarray(image.dataobj, dtype=np.float32)
    return Template(values - values.min(), checked_affine(image.affine))


def mni152_template() -> Template:
    """The MNI152 T1 brain at 1 mm that ships inside the nilearn wheel (no download); `MissingExtra` without nilearn.

    Source: Fonov et al. 2011, ICBM 152 nonlinear symmetric 2009a, skull-stripped.
    """
    try:
        from nilearn.datasets import load_mni152_template
    except ImportError as missing:
        raise MissingExtra(
            "the MNI152 template comes with nilearn, which is not installed",
            next_step="pip install 'isimed-index[demo]'",
        ) from missing
    image = load_mni152_template(resolution=1)
    return Template(np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine, dtype=np.float64))


# Painted in this order, later over earlier: name, centre mm, radii mm, brightness. Left and right differ a little.
_HEAD = (
    ("scalp", (0, 0, 0), (78, 98, 88), 0.55),
    ("skull", (0, 0, 2), (72, 92, 82), 0.12),
    ("brain", (0, -2, 6), (65, 84, 70), 0.70),
    ("white matter", (0, -2, 10), (48, 64, 50), 0.95),
    ("ventricle left", (-11, 4, 16), (6, 24, 9), 0.20),
    ("ventricle right", (12, 6, 15), (7, 27, 10), 0.20),
    ("nucleus left", (-24, 8, 6), (9, 15, 11), 0.60),
    ("nucleus right", (25, 6, 5), (8, 16, 12), 0.60),
    ("cerebellum", (0, -52, -38), (38, 24, 20), 0.78),
    ("brain stem", (0, -26, -44), (11, 12, 30), 0.88),
    ("eye left", (-31, 80, -22), (12, 12, 12), 0.30),
    ("eye right", (32, 79, -21), (12, 12, 12), 0.30),
)


def ellipsoid_head(spacing: float = 4.0) -> Template:
    """An analytic 'head' of nested ellipsoids with smooth inner texture and labels 1…12; no file is needed."""
    half = np.array([84.0, 104.0, 94.0])
    size = np.ceil(2 * half / spacing).astype(int)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -spacing * (size - 1) / 2
    index = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), axis=-1)
    mm = apply_affine(affine, index)  # (x, y, z, 3)
    values, labels = np.zeros(size), np.zeros(size, dtype=np.int16)
    for number, (_, centre, radii, brightness) in enumerate(_HEAD, start=1):
        inside = (((mm - np.asarray(centre)) / np.asarray(radii)) ** 2).sum(axis=-1) <= 1
        values[inside], labels[inside] = brightness, number
    x, y, z = np.moveaxis(mm, -1, 0)
    texture = np.sin(x / 9 + y / 23) + np.sin(y / 11 + z / 19) + np.sin(z / 8 - x / 27)
    values *= 1 + 0.05 * texture
    return Template(values.astype(np.float32), affine, labels, tuple(name for name, *_ in _HEAD))
