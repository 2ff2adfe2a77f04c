"""Patches are where they say: each stored vector against a crop of the file itself, cut out as the documentation says.

Nothing here uses the library's reader, grid or preprocessing: nibabel reads the file, and its voxels are never put into
another order. The voxels of a patch are points in mm around its stored centre; SciPy says what the file holds there.
The rules are those of "The working volume, exactly" in docs/explanation/coordinates.md.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from affines import affine_of
from scipy import ndimage

import isimed_index as isi
from isimed_index.api import Store
from isimed_index.config import PretrainConfig
from isimed_index.encoders.card import EncoderCard
from isimed_index.encoders.networks import build_network
from isimed_index.encoders.runtime import load_encoder, write_encoder
from isimed_index.pretrain.trainer import new_card
from isimed_index.scans.prepare import Intensity
from isimed_index.store.transaction import Proposal

EDGE, SPACING = 32, 4.0
WINDOW = (-150.0, 550.0)
CHECKED = 6  # patches a scan
# Of a vector's length. Float16 rounds each number by up to 2^-11 = 4.9e-4 of it. Positions are stored in float32: there
# the same sums were taken in another order, in float64 and by other libraries; seen 1e-6.
TOLERANCES = {"embedding": 5e-4, "descriptor": 5e-4, "position": 1e-5}


@dataclass(frozen=True)
class File:
    """A file to be added: its shape, its axes, and how its voxels become physical values."""

    name: str
    shape: tuple[int, int, int]
    affine: np.ndarray
    scaling: tuple[float, float] = (1.0, 0.0)
    added_at: float | None = None  # mm, of `--spacing`


FILES = [
    File("plain", (36, 44, 40), affine_of((0, 0, 0), (4, 4, 4), (1, 1, 1), (0, 1, 2), (-70, -90, -60))),
    File("nearly", (38, 40, 37), affine_of((0, 0, 0), (3.97, 4.03, 4), (1, 1, 1), (0, 1, 2), (-70, -90, -60))),
    File("oblique", (53, 51, 55), affine_of((-20, 12, 30), (3.1, 2.9, 2.7), (1, 1, 1), (0, 1, 2), (40, -90, 300), 0.1)),
    File("thick", (71, 65, 23), affine_of((0, 0, 0), (2.1, 2.3, 6.7), (1, 1, 1), (0, 1, 2), (-70, -60, 11))),
    File("left_handed", (55, 51, 47), affine_of((0, 0, 0), (2.7, 2.9, 3.3), (-1, 1, 1), (0, 1, 2), (70, -60, 5))),
    File("flipped", (37, 45, 41), affine_of((0, 0, 0), (4, 4, 4), (-1, -1, 1), (0, 1, 2), (70, 60, 5)), (0.5, -100)),
    File("other_order", (25, 61, 55), affine_of((9, -14, 11), (5.9, 2.6, 2.8), (1, -1, -1), (2, 0, 1), (9, 60, 80))),
    File(
        "hounsfield", (49, 47, 31), affine_of((5, 0, -8), (3.3, 3.3, 5.1), (-1, 1, -1), (1, 0, 2), (7, 8, 9)), (2, -7)
    ),
    File(
        "resampled", (62, 57, 35), affine_of((0, 10, 0), (2.3, 2.7, 4.6), (1, 1, -1), (0, 2, 1), (0, 0, 90)), added_at=3
    ),
]


def write(folder: Path, file: File, seed: int) -> None:
    """A ball of noise in air, off the middle, and a label map of noise: no voxel is like the one beside it."""
    rng = np.random.default_rng(seed)
    at = np.indices(file.shape) / np.array(file.shape)[:, None, None, None] - [[[[0.53]]], [[[0.46]]], [[[0.55]]]]
    inside = (at**2).sum(axis=0) < 0.45**2
    texture = ndimage.gaussian_filter(rng.normal(size=file.shape), 1.0)
    physical = inside * np.clip(300 + 900 * texture, 60, None) + rng.uniform(0, 20, file.shape)
    slope, intercept = file.scaling
    image = nib.Nifti1Image(physical, file.affine, dtype=np.int16)
    image.header.set_slope_inter(slope, intercept)
    image.set_sform(file.affine, code=1)
    image.set_qform(None, code=0)
    nib.save(image, folder / f"{file.name}.nii.gz")
    labels = (inside * rng.integers(0, 4, file.shape) * rng.integers(1, 3, file.shape)).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, file.affine), folder / f"{file.name}_seg.nii.gz")


def add_encoder(store: Store, intensity: Intensity) -> EncoderCard:
    """A network whose batch norms have seen data, so that its vectors depend on what is in a patch."""
    config = PretrainConfig(network="stem", width=4, embedding_dim=6, descriptor_dim=8, spacing_mm=SPACING)
    card = replace(new_card(config, f"window {intensity.window_low}", "tiny"), intensity=intensity)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = build_network(card.factory, card.outputs, card.network).train()
        with torch.no_grad():
            for seed in range(4):
                noise = np.random.default_rng(seed).uniform(-1, 1, (4, 1, EDGE, EDGE, EDGE)).astype(np.float32)
                network(torch.from_numpy(ndimage.uniform_filter(noise, (0, 0, 2, 2, 2))))
    with store._writing().transaction("pretrain") as transaction:
        directory = transaction.stage("encoder")
        card = write_encoder(directory, card, network.state_dict())
        artefact = transaction.add("encoder", directory, encoder=card.id)
        transaction.commit(lambda _: Proposal(add=[artefact]))
    return card


@dataclass(frozen=True)
class Indexed:
    """A store of all files, encoded with percentiles and with a window; treat it as read-only."""

    store: Store
    folder: Path
    cards: tuple[EncoderCard, EncoderCard]


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    root = tmp_path_factory.mktemp("places")
    store = isi.create(root / "c")
    for seed, file in enumerate(FILES):
        folder = root / ("files" if file.added_at is None else f"at {file.added_at}")
        folder.mkdir(exist_ok=True)
        write(folder, file, seed)
    store.add(root / "files", labels="{stem}_seg.nii.gz")
    store.add(root / "at 3" / "resampled.nii.gz", spacing_mm=3.0)
    cards = tuple(
        add_encoder(store, made) for made in (Intensity(), Intensity(window_low=WINDOW[0], window_high=WINDOW[1]))
    )
    for card, voxels in zip(cards, (4, 8), strict=True):
        store.index(card.id, stride_mm=voxels * SPACING)
    return Indexed(store, root, (cards[0], cards[1]))


# -- the documented preprocessing, written anew ----------------------------------------------------------------------


def axes_to_ras(affine: np.ndarray) -> tuple[list[int], list[int]]:
    """Which axis of a file grows nearest to Right, which to Anterior, which to Superior, and the sign of each.

    Of all 48 ways to name the axes, the one whose directions lie nearest to the patient's.
    """
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    ways = itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))
    order, signs = max(ways, key=lambda way: sum(way[1][to] * unit[to, way[0][to]] for to in range(3)))
    return list(order), list(signs)


@dataclass(frozen=True)
class Grid:
    """The working grid of a volume at `spacing` mm, in words of mm: where its extent is centred, and its axes."""

    centre_mm: np.ndarray  # (3,)
    steps_mm: np.ndarray  # (3, 3): a column is one voxel along an axis that grows to R, A or S
    shape: np.ndarray  # (3,)
    ratios: np.ndarray  # (3,) voxels of the source in one of its own

    @classmethod
    def of(cls, source: np.ndarray, affine: np.ndarray, spacing: float) -> Grid:
        """The grid of a source of any axis order."""
        order, signs = axes_to_ras(affine)
        columns = affine[:3, :3][:, order] * signs
        size, shape = np.linalg.norm(columns, axis=0), np.array(source.shape)[order]
        ratios = np.full(3, spacing) / size
        if (abs(size / spacing - 1) <= 0.01).all():
            ratios = np.ones(3)
        new = np.maximum(1, np.rint(shape / ratios)).astype(int)
        centre = affine[:3, :3] @ ((np.array(source.shape) - 1) / 2) + affine[:3, 3]
        return cls(centre, columns * ratios, new, ratios)

    def points_mm(self, first: np.ndarray, shape: np.ndarray) -> np.ndarray:
        """Places (3, x, y, z) of a box of voxels that begins at the voxel `first`."""
        voxels = np.indices(shape) + (first - (self.shape - 1) / 2)[:, None, None, None]
        return np.einsum("ij,jxyz->ixyz", self.steps_mm, voxels) + self.centre_mm[:, None, None, None]


class Working:
    """A file as an encoder sees it, asked point by point; its voxels stay in the file's own order."""

    def __init__(self, source: np.ndarray, affine: np.ndarray, spacing: float, window: bool = False) -> None:
        self.affine = affine
        self.grid = Grid.of(source, affine, spacing)
        self.smooth = source
        for axis, ratio in zip(axes_to_ras(affine)[0], self.grid.ratios, strict=True):
            if ratio > 1.01:
                sd = math.sqrt(ratio**2 - 1) / (2 * math.sqrt(2 * math.log(2)))
                self.smooth = ndimage.gaussian_filter1d(self.smooth, sd, axis, mode="nearest", radius=math.ceil(4 * sd))
        self.whole = self.physical(self.grid.points_mm(np.zeros(3), self.grid.shape))
        self.ends = WINDOW if window else tuple(np.percentile(self.whole, [5, 95]))
        self.limit = 1.0 if window else 1.5

    def voxels(self, points_mm: np.ndarray) -> np.ndarray:
        """Indices in the file (3, …), with fractions."""
        flat = np.linalg.solve(self.affine[:3, :3], points_mm.reshape(3, -1) - self.affine[:3, 3:])
        return flat.reshape(points_mm.shape)

    def physical(self, points_mm: np.ndarray) -> np.ndarray:
        """Physical values at places; beyond the outermost voxels theirs."""
        return ndimage.map_coordinates(self.smooth, self.voxels(points_mm), order=1, mode="nearest")

    def patch(self, centre_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places (3, x, y, z) of a patch's voxels, and which of them lie in the volume."""
        first = np.linalg.solve(self.grid.steps_mm, centre_mm - self.grid.centre_mm) + (self.grid.shape - EDGE) / 2
        np.testing.assert_allclose(first, np.rint(first), atol=1e-3)  # a centre is where voxels can be around it
        first = np.rint(first)
        voxels = np.indices((EDGE,) * 3) + first[:, None, None, None]
        inside = ((voxels >= 0) & (voxels < self.grid.shape[:, None, None, None])).all(axis=0)
        return self.grid.points_mm(first, np.full(3, EDGE)), inside

    def crop(self, centre_mm: np.ndarray) -> np.ndarray:
        """What the network is shown of the patch around a place."""
        points, inside = self.patch(centre_mm)
        low, high = self.ends
        scaled = np.clip(2 * (self.physical(points) - low) / (high - low) - 1, -self.limit, self.limit)
        return np.where(inside, scaled, -1).astype(np.float32)

    def label_shares(self, labels: np.ndarray, centre_mm: np.ndarray) -> dict[int, float]:
        """The share of a patch's voxels that each label but 0 has."""
        points, inside = self.patch(centre_mm)
        at = self.voxels(points)[:, inside]
        assert (np.abs(at - np.rint(at)) < 0.4999).all()  # none is half-way, where the file's order would matter
        nearest = np.clip(np.rint(at), 0, np.array(labels.shape)[:, None] - 1).astype(int)
        found, counts = np.unique(labels[tuple(nearest)], return_counts=True)
        return {int(label): n / EDGE**3 for label, n in zip(found, counts, strict=True) if label}


def opened(indexed: Indexed, file: File, window: bool) -> Working:
    """The working volume of a file, from what nibabel reads."""
    folder = indexed.folder / ("files" if file.added_at is None else f"at {file.added_at}")
    image = nib.load(folder / f"{file.name}.nii.gz")
    values, affine = image.get_fdata(), image.affine
    if file.added_at is not None:
        added = Working(values, affine, file.added_at)
        values, affine = added.whole, np.eye(4)
        affine[:3, :3] = added.grid.steps_mm
        affine[:3, 3] = added.grid.centre_mm - added.grid.steps_mm @ (added.grid.shape - 1) / 2
    return Working(values, affine, SPACING, window)


# -- what is stored --------------------------------------------------------------------------------------------------


def stored(indexed: Indexed, file: File, card: EncoderCard) -> tuple[np.ndarray, dict[str, np.ndarray], list[Any]]:
    """Centres (n, 3) in mm, vectors by output, and label shares of a scan's patches."""
    segment = indexed.store.snapshot.segments_by_scan(card.id)[file.name]
    rows = segment.patches()
    centres = np.stack([rows[f"{axis}_mm"].to_numpy() for axis in "xyz"], axis=1).astype(np.float64)
    shares = rows["label_shares"].to_pylist() if "label_shares" in rows.column_names else []
    return centres, {name: segment.vectors(name).astype(np.float32) for name in card.outputs}, shares


def some(count: int, seed: int) -> np.ndarray:
    """Random patches, the first and the last among them: those lie at borders of the volume."""
    drawn = np.random.default_rng(seed).choice(count, CHECKED - 2, replace=False)
    return np.array([0, count - 1, *drawn])


def wrong(crop: np.ndarray, working: Working, centre_mm: np.ndarray) -> dict[str, np.ndarray]:
    """Crops that are not the patch: one voxel aside, mirrored, with two axes exchanged."""
    steps = working.grid.steps_mm.T
    aside = {f"{sign:+d} along {axis}": (axis, sign) for axis in range(3) for sign in (-1, 1)}
    return {
        **{what: working.crop(centre_mm + sign * steps[axis]) for what, (axis, sign) in aside.items()},
        **{f"mirrored along {axis}": np.flip(crop, axis) for axis in range(3)},
        **{f"without axis {axis}": crop.swapaxes((axis + 1) % 3, (axis + 2) % 3) for axis in range(3)},
    }


@pytest.mark.parametrize("window", [False, True], ids=["percentiles", "window"])
@pytest.mark.parametrize("number", range(len(FILES)), ids=[file.name for file in FILES])
def test_a_stored_vector_is_that_of_the_voxels_around_its_centre(indexed: Indexed, number: int, window: bool) -> None:
    file, card = FILES[number], indexed.cards[window]
    working = opened(indexed, file, window)
    centres, vectors, _ = stored(indexed, file, card)
    encoder = load_encoder(indexed.store.snapshot.encoder_path(card.id), "cpu")
    for row in some(len(centres), number):
        crop = working.crop(centres[row])
        others = wrong(crop, working, centres[row])
        found = encoder.encode(np.ascontiguousarray(np.stack([crop, *others.values()])))
        for name, tolerance in TOLERANCES.items():
            off = np.linalg.norm(found[name] - vectors[name][row], axis=1) / np.linalg.norm(found[name][0])
            assert off[0] <= tolerance, f"{name} of patch {row}"
            if name != "embedding":  # which hardly tells one place from another before training
                least = 10 * tolerance if name == "descriptor" else 100 * tolerance
                assert not [what for what, far in zip(others, off[1:], strict=True) if far < least], name


@pytest.mark.parametrize("number", range(len(FILES)), ids=[file.name for file in FILES])
def test_label_shares_are_those_of_the_same_voxels(indexed: Indexed, number: int) -> None:
    file = FILES[number]
    working = opened(indexed, file, window=False)
    centres, _, shares = stored(indexed, file, indexed.cards[0])
    if file.added_at is not None:
        assert shares == []  # label maps are not resampled, so there is none
        return
    labels = np.asarray(nib.load(indexed.folder / "files" / f"{file.name}_seg.nii.gz").dataobj)
    steps = working.grid.steps_mm.T
    for row in some(len(centres), number):
        told = dict(shares[row])
        expected = working.label_shares(labels, centres[row])
        assert len(expected) >= 4
        assert told == {label: np.float32(share) for label, share in expected.items()}
        for step in (*steps, *-steps):
            assert working.label_shares(labels, centres[row] + step) != expected
