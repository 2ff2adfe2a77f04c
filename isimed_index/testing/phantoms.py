"""Cohorts whose true correspondence is known: one template, many 'subjects' made from it by known deformations.

    template ──(pose + smooth displacement, contrast, bias, noise, field of view, spacing, axis order)──▶ sub-01 …

`DeformedCohort.map_point` says where a template point lies in each subject, exactly, because the image itself was
resampled through the same map (`isimed_index.testing.deformation`).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.errors import NotFound, UsageError
from isimed_index.progress import Progress, Silent
from isimed_index.space import Affine, apply_affine, inverse
from isimed_index.testing.appearance import bias_field, contrast_curve, magnitude_noise
from isimed_index.testing.deformation import Deformation, random_deformation, random_rotation
from isimed_index.testing.templates import Template, ellipsoid_head, mni152_template, read_template

__all__ = [
    "CohortOptions",
    "DeformedCohort",
    "Subject",
    "Template",
    "deformed_cohort",
    "ellipsoid_head",
    "mni152_template",
    "warp",
]

# Axis orders that scanners, converters and veterinarians really write.
AXIS_CODES = ("RAS", "LPS", "PSR", "LAS", "RPI", "AIL", "SRA", "LPI", "PIR", "ASL", "IRP", "SAR")
# Which face of the box is cut away; "" leaves the head whole.
CROPS = ("", "inferior", "", "superior", "left", "", "posterior", "inferior", "right", "", "anterior", "superior")
_FACES = {
    "left": (0, 0),
    "right": (0, 1),
    "posterior": (1, 0),
    "anterior": (1, 1),
    "inferior": (2, 0),
    "superior": (2, 1),
}
_SLAB_VOXELS = 400_000  # how many voxels are mapped at once: bounds the memory of a warp to some 50 MB


@dataclass(frozen=True, slots=True)
class CohortOptions:
    """How far subjects differ from the template; every range is symmetric about 'no change'."""

    amplitude_mm: float = 9.0  # largest smooth displacement
    degrees: float = 8.0  # rotation of the head about each axis
    scale: float = 0.08  # relative stretch along each axis
    oblique_degrees: float = 5.0  # rotation of the voxel grid against the patient
    spacing_mm: tuple[float, float] = (1.0, 2.0)
    max_voxels: int = 2_000_000
    margin_mm: float = 15.0  # most air around the head
    crop: float = 0.22  # largest part of the head cut away at one face, in the subjects that are cut
    bias: float = 0.25
    noise: float = 0.02  # largest noise sd, as a part of the brightest tissue
    inverted: float = 0.0  # how likely a subject's contrast is turned over
    contrast: bool = True
    test_fraction: float = 0.25  # the last subjects are the test split


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """One member of a cohort: its file (name inside the cohort's folder), its grid and its true deformation."""

    id: str
    file: str
    split: str
    shape: tuple[int, int, int]
    affine: Affine  # voxel index of the file → RAS+ mm
    deformation: Deformation

    @property
    def scan(self) -> str:
        """The scan id that the file gets in a store: its stem."""
        return self.file.removesuffix(".nii.gz")


@dataclass(frozen=True, slots=True, eq=False)
class DeformedCohort:
    """Files of a cohort and the truth about them."""

    directory: Path
    subjects: tuple[Subject, ...]

    def subject(self, name: str) -> Subject:
        """The subject of that id (`sub-01`) or scan id (`sub-01_T1w`)."""
        for subject in self.subjects:
            if name in (subject.id, subject.scan):
                return subject
        raise NotFound(f"no subject {name!r} in this cohort of {len(self.subjects)}")

    def split(self, name: str) -> tuple[Subject, ...]:
        """The subjects of one split, `train` or `test`."""
        return tuple(subject for subject in self.subjects if subject.split == name)

    def map_point(self, subject: str, template_mm: ArrayLike) -> NDArray[np.float64]:
        """Where template points (…, 3) lie in a subject; RAS+ mm to RAS+ mm, exact to 1e-6 mm."""
        points = np.asarray(template_mm, dtype=np.float64)
        return self.subject(subject).deformation.to_subject(points.reshape(-1, 3)).reshape(points.shape)

    def map_back(self, subject: str, subject_mm: ArrayLike) -> NDArray[np.float64]:
        """Where points (…, 3) of a subject lie in the template; RAS+ mm to RAS+ mm, exact."""
        points = np.asarray(subject_mm, dtype=np.float64)
        return self.subject(subject).deformation.to_template(points.reshape(-1, 3)).reshape(points.shape)

    def in_view(self, subject: str, template_mm: ArrayLike) -> NDArray[np.bool_]:
        """Whether template points (…, 3) fall inside the subject's field of view."""
        member = self.subject(subject)
        index = apply_affine(inverse(member.affine), self.map_point(subject, template_mm))
        inside = (index >= 0) & (index <= np.asarray(member.shape) - 1)  # (…, 3)
        return np.asarray(inside.all(axis=-1))

    def save(self) -> Path:
        """Write `participants.tsv` and `truth.npz` (arrays only, no pickle) beside the images."""
        with (self.directory / "participants.tsv").open("w", newline="") as file:
            rows = csv.writer(file, delimiter="\t", lineterminator="\n")
            rows.writerow(["participant_id", "split"])
            rows.writerows([subject.id, subject.split] for subject in self.subjects)
        path = self.directory / "truth.npz"
        np.savez_compressed(
            path,
            subjects=np.asarray([s.id for s in self.subjects]),
            files=np.asarray([s.file for s in self.subjects]),
            splits=np.asarray([s.split for s in self.subjects]),
            shapes=np.asarray([s.shape for s in self.subjects]),
            affines=np.asarray([s.affine for s in self.subjects]),
            poses=np.asarray([s.deformation.pose for s in self.subjects]),
            lattices=np.asarray([s.deformation.lattice for s in self.subjects]),
            coefficients_mm=np.asarray([s.deformation.coefficients_mm for s in self.subjects]),
        )
        return path

    @staticmethod
    def load(directory: Path) -> DeformedCohort:
        """Read the truth that `save` wrote."""
        with np.load(directory / "truth.npz", allow_pickle=False) as stored:
            truth = {name: stored[name] for name in stored.files}
        subjects = tuple(
            Subject(
                id=str(truth["subjects"][i]),
                file=str(truth["files"][i]),
                split=str(truth["splits"][i]),
                shape=_shape(truth["shapes"][i]),
                affine=truth["affines"][i],
                deformation=Deformation(truth["poses"][i], truth["coefficients_mm"][i], truth["lattices"][i]),
            )
            for i in range(len(truth["subjects"]))
        )
        return DeformedCohort(directory, subjects)


def warp(
    template: Template, deformation: Deformation, shape: tuple[int, int, int], affine: Affine, *, labels: bool = False
) -> NDArray[np.float32]:
    """Resample the template's values (or labels) onto a subject's grid: linear (or nearest), 0 outside the template."""
    from scipy.ndimage import map_coordinates

    source = template.labels if labels else template.values
    if source is None:
        raise UsageError("expected a template with labels, found one without")
    to_index = inverse(template.affine)
    warped = np.empty(shape, dtype=np.float32)
    thick = max(1, _SLAB_VOXELS // (shape[1] * shape[2]))
    for first in range(0, shape[0], thick):
        slab = warped[first : first + thick]
        index = np.indices(slab.shape).reshape(3, -1).T + np.array([first, 0, 0])  # (n, 3)
        at = apply_affine(to_index, deformation.to_template(apply_affine(affine, index)))
        slab[...] = map_coordinates(source, at.T, order=0 if labels else 1, output=np.float32).reshape(slab.shape)
    return warped


def deformed_cohort(
    template: Template | Path,
    n: int,
    seed: int,
    out_dir: Path,
    *,
    options: CohortOptions | None = None,
    labels_dir: Path | None = None,
    progress: Progress | None = None,
) -> DeformedCohort:
    """Make `n` subjects from a template (or a NIfTI file of one) and write them as `out_dir/sub-01_T1w.nii.gz` ….

    Writes `participants.tsv` (participant_id, split) and `truth.npz` too; label maps of the subjects go to
    `labels_dir/sub-01_T1w_dseg.nii.gz` where one is given. The same seed gives the same files.
    """
    if n < 1:
        raise UsageError(f"expected at least one subject, found n={n}")
    source = template if isinstance(template, Template) else read_template(template)
    settings = options or CohortOptions()
    for directory in filter(None, (out_dir, labels_dir)):
        directory.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(seed)
    codes = np.resize(order.permutation(AXIS_CODES), n)
    crops = np.resize(order.permutation(CROPS), n)
    trained = n - round(n * settings.test_fraction)
    head = apply_affine(source.affine, np.argwhere(source.foreground())[::97])  # every 97th voxel outlines the head
    subjects = []
    shown = progress or Silent()
    shown.start("make subjects", n, "subjects")
    for i in range(n):
        rng = np.random.default_rng([seed, i])
        deformation = random_deformation(
            rng,
            head.min(axis=0),
            head.max(axis=0),
            amplitude_mm=settings.amplitude_mm,
            degrees=settings.degrees,
            scale=settings.scale,
        )
        shape, affine = _field_of_view(deformation.to_subject(head), str(crops[i]), rng, settings)
        values = _appearance(source, warp(source, deformation, shape, affine), rng, settings)
        stem = f"sub-{i + 1:02d}_T1w"
        file_shape, file_affine = _write(out_dir / f"{stem}.nii.gz", values, affine, str(codes[i]))
        if labels_dir is not None:
            numbers = warp(source, deformation, shape, affine, labels=True)
            _write(labels_dir / f"{stem}_dseg.nii.gz", numbers, affine, str(codes[i]))
        split = "train" if i < trained else "test"
        subjects.append(Subject(stem[:-4], f"{stem}.nii.gz", split, file_shape, file_affine, deformation))
        shown.advance()
    shown.finish()
    cohort = DeformedCohort(out_dir, tuple(subjects))
    cohort.save()
    return cohort


def _field_of_view(
    head_mm: NDArray[np.float64], crop: str, rng: np.random.Generator, settings: CohortOptions
) -> tuple[tuple[int, int, int], Affine]:
    """A voxel grid near RAS, slightly oblique, around the head points (n, 3) but without the cropped face."""
    turn = random_rotation(rng, settings.oblique_degrees)
    in_grid = head_mm @ turn  # mm along the grid's own axes
    low = in_grid.min(axis=0) - rng.uniform(3.0, settings.margin_mm, 3)
    high = in_grid.max(axis=0) + rng.uniform(3.0, settings.margin_mm, 3)
    part = rng.uniform(settings.crop / 2, settings.crop)
    if crop:
        axis, side = _FACES[crop]
        cut = part * np.ptp(in_grid[:, axis])
        if side:
            high[axis] = in_grid[:, axis].max() - cut
        else:
            low[axis] = in_grid[:, axis].min() + cut
    spacing = _random_spacing(float((high - low).prod()), rng, settings)
    shape = _shape(np.ceil((high - low) / spacing))
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = turn @ (low + spacing / 2)
    return shape, affine


def _random_spacing(volume_mm3: float, rng: np.random.Generator, settings: CohortOptions) -> NDArray[np.float64]:
    """Voxel edges (3,) in mm from the allowed range such that the volume stays within `max_voxels`."""
    finest, coarsest = settings.spacing_mm
    for _ in range(200):
        spacing = rng.uniform(finest, coarsest, 3)
        if volume_mm3 / spacing.prod() <= 0.95 * settings.max_voxels:  # 5 % for rounding up each axis
            return np.round(spacing, 3)
    raise UsageError(
        f"expected a head that fits {settings.max_voxels} voxels of at most {coarsest} mm, found {volume_mm3:.0f} mm³",
        next_step="raise max_voxels or spacing_mm",
    )


def _appearance(
    template: Template, values: NDArray[np.float32], rng: np.random.Generator, settings: CohortOptions
) -> NDArray[np.float32]:
    """Give warped template values the subject's own contrast, bias and noise, in scanner units of 0 … some 2000."""
    looks = np.clip(values / np.percentile(template.values[template.values > 0], 99.5), 0.0, 1.0)
    looks = looks.astype(np.float32)
    if settings.contrast:
        looks = contrast_curve(looks, rng, inverted=bool(rng.random() < settings.inverted))
    looks *= bias_field(_shape(values.shape), rng, settings.bias)
    looks = magnitude_noise(looks, rng, settings.noise * rng.uniform(0.25, 1.0))
    scaled: NDArray[np.float32] = looks * np.float32(rng.uniform(300.0, 1500.0))
    return scaled


def _write(path: Path, values: NDArray[np.float32], affine: Affine, codes: str) -> tuple[tuple[int, int, int], Affine]:
    """Write int16 NIfTI with its axes in the order of `codes`; returns the shape and affine as stored."""
    import nibabel as nib

    source = nib.orientations.io_orientation(affine)
    turn = nib.orientations.ornt_transform(source, nib.orientations.axcodes2ornt(codes))
    turned = nib.orientations.apply_orientation(np.rint(values).astype(np.int16), turn)
    turned_affine = affine @ nib.orientations.inv_ornt_aff(turn, values.shape)
    image = nib.Nifti1Image(turned, turned_affine)
    image.set_sform(turned_affine, code=1)
    image.set_qform(turned_affine, code=1)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return _shape(turned.shape), turned_affine


def _shape(size: Sequence[int] | NDArray[Any]) -> tuple[int, int, int]:
    """Three sizes as plain integers."""
    x, y, z = (int(n) for n in size)
    return x, y, z
