"""Small cohorts for tests: heads whose copies show the same voxels elsewhere in space, and an untrained encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from isimed_index.api import Store, create
from isimed_index.space import Affine, apply_affine, inverse
from isimed_index.store.repository import Repository
from isimed_index.store.transaction import Proposal
from isimed_index.testing.phantoms import Template, ellipsoid_head

SPACING_MM = 4.0
CROPPED_MM = 64.0  # cut from below the cropped copy: a whole number of lattice steps


@dataclass(frozen=True)
class Copy:
    """One file of the cohort: its name, axis order, and the rigid motion (mm) of the head in it."""

    stem: str
    codes: str
    motion: Affine

    def moved(self, head_mm: ArrayLike) -> NDArray[np.float64]:
        """Where a point of the head lies in this copy; RAS+ mm."""
        return apply_affine(self.motion, head_mm)


def rigid(angles: Sequence[float] = (0, 0, 0), shift: Sequence[float] = (0, 0, 0)) -> Affine:
    """A rotation about the world's axes in degrees, then a shift in mm."""
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    motion[:3, 3] = shift
    return motion


COPIES = (
    Copy("sub-01_ses-1_T1w", "RAS", rigid()),
    Copy("sub-01_ses-2_T1w", "LAS", rigid(shift=(3, 0, 0))),
    Copy("sub-02_T1w", "LPS", rigid(shift=(37, -12, 5))),
    Copy("sub-03_T1w", "PSR", rigid((8, -6, 10))),
    Copy("sub-04_T1w", "AIL", rigid((-20, 12, 30), (-50, 20, 100))),
)
CROPPED = Copy("sub-05_T1w", "SRA", rigid(shift=(0, 9, 0)))


def head() -> Template:
    """The ellipsoid head at 4 mm, with a fine texture that makes every place of it unlike all others."""
    template = ellipsoid_head(SPACING_MM)
    texture = np.random.default_rng(5).uniform(0.8, 1.2, template.values.shape)
    return Template((template.values * texture).astype(np.float32), template.affine, template.labels)


def write_nifti(path: Path, voxels: NDArray, affine: Affine, codes: str | None = None) -> Path:
    """Write a file whose axes are in the order of `codes`."""
    if codes is not None:
        turn = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
        )
        affine = affine @ nib.orientations.inv_ornt_aff(turn, voxels.shape)
        voxels = nib.orientations.apply_orientation(voxels, turn)
    image = nib.Nifti1Image(voxels, affine)
    image.set_sform(affine, code=1)
    image.set_qform(None, code=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def write_copy(folder: Path, copy: Copy, template: Template, *, below: int = 0) -> Path:
    """Write the head as `copy` has it, without its lowest `below` planes; a label map goes beside it."""
    affine = copy.motion @ template.affine
    affine[:3, 3] = apply_affine(affine, [0, 0, below])
    values = np.rint(template.values[:, :, below:] * 1000).astype(np.int16)
    write_nifti(folder / f"{copy.stem}_seg.nii.gz", template.labels[:, :, below:], affine, copy.codes)
    return write_nifti(folder / f"{copy.stem}.nii.gz", values, affine, copy.codes)


def tiny_scan(path: Path, seed: int = 0, shape: tuple[int, int, int] = (12, 10, 9)) -> Path:
    """A sound file of noise, for tests that never encode it."""
    voxels = np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)
    return write_nifti(path, voxels, np.diag([2.0, 2.0, 3.0, 1.0]))


def add_random_encoder(path: Path, name: str = "random", seed: int = 0) -> str:
    """Commit a small network with random weights and return its card id."""
    import torch

    from isimed_index.encoders.card import EncoderCard
    from isimed_index.encoders.networks import build_network
    from isimed_index.encoders.runtime import write_encoder

    factory, outputs, arguments = "isimed_index.encoders.networks:ValidNet", {"embedding": 8, "descriptor": 16}, 4
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build_network(factory, outputs, {"width": arguments})
    card = EncoderCard(
        name=name,
        factory=factory,
        network={"width": arguments},
        weights_sha256="",
        patch_vox=32,
        stride_vox=4,
        spacing_mm=SPACING_MM,
        outputs=outputs,
        match_output="descriptor",
        metric="l2",
        training={"method": "isimed"},
    )
    with Repository.open(path).transaction("pretrain") as transaction:
        directory = transaction.stage("encoder")
        card = write_encoder(directory, card, network.state_dict())
        artefact = transaction.add("encoder", directory, encoder=card.id)
        transaction.commit(lambda _: Proposal(add=[artefact]))
    return card.id


def shifted_heads(root: Path, count: int) -> Path:
    """A store of so many heads, head n moved by (n, -n, 2 n) mm, and an encoder; nothing is indexed."""
    template = head()
    for n in range(count):
        write_copy(root / "images", Copy(f"sub-{n:02d}", "RAS", rigid(shift=(n, -n, 2 * n))), template)
    store = create(root / "cohort.isimed")
    store.add(sorted((root / "images").glob("sub-??.nii.gz")))
    add_random_encoder(store.path)
    return store.path


def segment_vectors(store: Path) -> dict[str, dict[str, bytes]]:
    """By scan, every output of its segment, bit for bit, and where its patches are."""
    snapshot = Repository.open(store).snapshot()
    found = {}
    for segment in snapshot.segments():
        arrays = {name: segment.vectors(name) for name in segment.outputs}
        arrays["lattice"] = np.stack([segment.patches([axis]).column(axis).to_numpy() for axis in "ijk"])
        found[snapshot.scan_of[segment.scan_artefact]] = {name: y.tobytes() for name, y in arrays.items()}
    return found


@dataclass(frozen=True)
class Cohort:
    """An indexed store of copies of one head, with the files that it was made from."""

    store: Path
    images: Path
    outside: Path  # a file with the content of a stored scan, moved a little, that is not in the store
    metadata: Path

    def file(self, copy: Copy) -> Path:
        """The image file of a copy."""
        return self.images / f"{copy.stem}.nii.gz"

    def voxel_of(self, copy: Copy, xyz_mm: ArrayLike) -> NDArray[np.float64]:
        """The voxel index of a place in the copy's own file, as nibabel reads it."""
        return apply_affine(inverse(nib.load(self.file(copy)).affine), xyz_mm)


def make_cohort(root: Path) -> Cohort:
    """Write the files, add them with label maps and metadata, and index them."""
    template = head()
    images = root / "images"
    for copy in COPIES:
        write_copy(images, copy, template)
    write_copy(images, CROPPED, template, below=int(CROPPED_MM / SPACING_MM))
    outside = write_copy(root / "outside", Copy("elsewhere", "RPI", rigid((0, 5, 0), (11, 0, 0))), template)
    metadata = root / "participants.tsv"
    ages = ("34", "41", "n/a", "58", "63.5")
    rows = [f"sub-{n:02d}\t{age}\tsite{n % 2}" for n, age in enumerate(ages, start=1)]
    metadata.write_text("\n".join(["participant_id\tage\tsite", *rows]) + "\n")
    names = root / "names.csv"
    names.write_text("label,name\n3,brain\n4,white matter\n")
    store: Store = create(root / "cohort.isimed")
    store.add([images], labels="{stem}_seg.nii.gz", label_names=names, metadata=metadata)
    add_random_encoder(store.path)
    store.index()
    return Cohort(store.path, images, outside, metadata)
