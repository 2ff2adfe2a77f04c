"""Pictures of scans: left is left in them, whatever way round a file is stored."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import nibabel as nib
import numpy as np
import pytest
from cohorts import write_nifti

from isimed_index.ingest.thumbnail import _LETTERS, MOST_BYTES, TILE, thumbnail, thumbnail_png
from isimed_index.scans.read import read_scan
from isimed_index.scans.scan import Scan

SHAPE = (48, 40, 32)  # right, anterior, superior
# A ball at each side of the patient, told apart by its brightness.
BALLS = {"R": 240, "L": 205, "A": 170, "P": 130, "S": 90, "I": 50}
PLACES = {"R": (44, 20, 16), "L": (3, 20, 16), "A": (24, 36, 16), "P": (24, 3, 16), "S": (24, 20, 28), "I": (24, 20, 3)}


def phantom() -> np.ndarray:
    """Balls at the sides in a grey box; nibabel, not our own code, says in `test_balls…` which side is which."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    voxels = np.full(SHAPE, 20, np.int16)
    for side, place in PLACES.items():
        voxels[((grid - place) ** 2).sum(axis=-1) <= 4] = BALLS[side]
    voxels[0, 0, 0], voxels[-1, -1, -1] = 0, 255
    return voxels


def balls(tile: np.ndarray) -> dict[str, tuple[float, float]]:
    """Row and column of the middle of each ball that a tile shows."""
    found = {}
    for side, value in BALLS.items():
        at = np.argwhere(np.abs(tile.astype(int) - value) <= 6)
        if len(at) >= 4:
            found[side] = tuple(at.mean(axis=0))
    return found


def letters(tile: np.ndarray) -> dict[str, str]:
    """Which letter is written at each edge of a tile."""
    middle = TILE // 2
    at = {"left": (middle, 4), "right": (middle, TILE - 5), "top": (5, middle), "bottom": (TILE - 6, middle)}
    read = {}
    for edge, (row, column) in at.items():
        block = tile[row - 3 : row + 4, column - 2 : column + 3] > 127
        rows = tuple(int("".join(str(int(bit)) for bit in line), 2) for line in block)
        read[edge] = next(letter for letter, bits in _LETTERS.items() if bits == rows)
    return read


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PSR", "AIL", "SRA"])
@pytest.mark.parametrize("spacing", [(2, 2, 2), (1.5, 2, 3)])
def test_balls_and_letters_are_on_the_patients_own_sides(tmp_path: Path, codes: str, spacing: tuple[float, ...]):
    voxels, affine = phantom(), np.diag([*spacing, 1.0])
    path = write_nifti(tmp_path / "a.nii.gz", voxels, affine, codes)
    image = nib.load(path)  # the judge of where the balls are
    assert "".join(nib.aff2axcodes(image.affine)) == codes
    centre = nib.affines.apply_affine(image.affine, (np.array(image.shape) - 1) / 2)
    for axis, (low, high) in enumerate((("L", "R"), ("P", "A"), ("I", "S"))):
        for side, sign in ((low, -1), (high, 1)):
            at = np.argwhere(np.asarray(image.dataobj) == BALLS[side]).mean(axis=0)
            assert sign * (nib.affines.apply_affine(image.affine, at) - centre)[axis] > 5

    scan = read_scan(path, "a")  # as a CT whose stored values are the greys that its window gives
    picture = thumbnail(Scan("a", scan.voxels, scan.affine, 400 / 255, -160.0, {"modality": "CT"}))
    axial, coronal, sagittal = np.hsplit(picture, 3)
    expected = {
        "axial": (axial, {"left": "R", "right": "L", "top": "A", "bottom": "P"}),
        "coronal": (coronal, {"left": "R", "right": "L", "top": "S", "bottom": "I"}),
        "sagittal": (sagittal, {"left": "P", "right": "A", "top": "S", "bottom": "I"}),
    }
    for name, (tile, sides) in expected.items():
        assert letters(tile) == sides, name
        seen = balls(tile)
        assert set(seen) == set(sides.values()), name
        rows, columns = ({side: seen[side][n] for side in seen} for n in (0, 1))
        assert min(columns, key=columns.__getitem__) == sides["left"], name
        assert max(columns, key=columns.__getitem__) == sides["right"], name
        assert min(rows, key=rows.__getitem__) == sides["top"], name
        assert max(rows, key=rows.__getitem__) == sides["bottom"], name


def test_millimetres_have_one_scale_in_all_directions():
    """A cube in voxels of 1 × 1 × 4 mm, 80 mm along each edge in a box of 120 mm, is drawn as a square."""
    voxels = np.zeros((120, 120, 30), np.uint8)
    voxels[20:100, 20:100, 5:25] = 200
    picture = thumbnail(Scan("a", voxels, np.diag([1.0, 1.0, 4.0, 1.0])))
    for tile in np.hsplit(picture, 3):
        inside = np.argwhere(tile[16:-16, 16:-16] > 100) + 16
        height, width = inside.max(axis=0) - inside.min(axis=0) + 1
        assert abs(height - TILE * 80 / 120) <= 3
        assert abs(width - TILE * 80 / 120) <= 3


def test_ct_has_a_window_and_other_modalities_their_own_range():
    voxels = np.zeros((30, 30, 30), np.int16)
    voxels[:10], voxels[10:20], voxels[20:] = -1000, 40, 2000  # air, water-like, metal
    flat = thumbnail(Scan("a", voxels, np.eye(4), attributes={"modality": "CT"}))[TILE // 2 + 12, :TILE]
    assert (flat.min(), flat.max()) == (0, 255)
    assert 100 < flat[TILE // 2] < 150  # half way up a window from -160 to 240 HU
    scaled = thumbnail(Scan("a", voxels, np.eye(4)))
    np.testing.assert_array_equal(scaled, thumbnail(Scan("a", voxels, np.eye(4), slope=7.0, intercept=-3.0)))


@pytest.mark.parametrize("shape", [(2, 2, 2), (300, 3, 5), (200, 200, 200), (97, 96, 95)])
def test_a_picture_is_small_whatever_is_in_it(shape: tuple[int, int, int]):
    noise = np.random.default_rng(0).integers(-1000, 4000, shape).astype(np.int16)
    packed = thumbnail_png(Scan("a", noise, np.eye(4)))
    assert len(packed) <= MOST_BYTES
    assert imagecodecs.png_decode(packed).shape == (TILE, 3 * TILE)
