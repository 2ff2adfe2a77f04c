"""Analyze 7.5 pairs (.hdr and .img), which do not say which side is left: read where the user has said it.

Rules: three letters of the user's tell in which patient directions the voxel axes grow; without them the pair is
refused. The header's own `orient` is not asked, since most programs wrote 0 there whatever the image was. Lengths are
mm. RAS+ 0 is the voxel that SPM's `origin` names where that is filled and near the volume, else the volume's centre;
SPM's scale factor is honoured. Nothing but numbers is taken from the header: its texts may name the patient.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import ScanRefused
from isimed_index.scans.nifti import data_beside
from isimed_index.scans.part import COPY_AGAIN, Part, Wanted, checked_part
from isimed_index.scans.volume import Volume3D, not_scalar, open_source, read_voxels, turned_volume
from isimed_index.space import affine_along, checked_affine

_BYTES = 348
_NIFTI_MAGIC = (b"ni1", b"n+1")
_DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8"}
_NO_NUMBERS = {1: "1-bit (binary)", 32: "complex", 128: "colour (RGB)"}
_MM = ("", "mm", "mill")  # what is said of lengths, in its four letters


def is_analyze(path: Path) -> bool:
    """Whether a file is an Analyze 7.5 header and no more: of its length, and without the magic word of NIfTI."""
    with open_source(path) as source:
        block = source.stream.read(_BYTES + 1)
    return len(block) == _BYTES and block[344:347] not in _NIFTI_MAGIC and _order(block) is not None


def load(path: Path, wanted: Wanted) -> Volume3D:
    """Read a pair by its header; raises `ScanRefused` without the file's name, which the caller adds."""
    codes = wanted.analyze_axes
    if codes is None:
        raise ScanRefused(
            "this is an Analyze 7.5 header, which does not say which side of the patient is left",
            next_step="if you know in which directions its axes grow, say so with isimed add --analyze-axes; else "
            "convert it to NIfTI with a program that knows its orientation",
        )
    if any(path.with_name(_stem(path) + suffix).exists() for suffix in (".mat", ".MAT")):
        raise ScanRefused(
            "a .mat file of SPM beside it says where its voxels lie, and may contradict the axes that you state",
            next_step="convert it to NIfTI with SPM, or move the .mat file away if your axes are right",
        )
    with open_source(path) as source:
        header = _header(source.stream.read(_BYTES))
    part, dtype, offset = _layout(header, wanted)
    spacing = _spacing(header)
    zero, source_of_zero = _zero(header, part)
    slope = _slope(header)
    affine = checked_affine(affine_along(codes, spacing, zero))
    with open_source(data_beside(path)) as data:
        voxels = read_voxels(data, part, dtype, wanted, offset)
    attributes = {
        "source_format": "Analyze 7.5",
        "affine_source": f"stated axes, {source_of_zero}",
        "stated_orientation": codes,
        **part.attributes,
    }
    return turned_volume(voxels, affine, attributes, slope)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz")[: -len(".hdr")]


def _order(block: bytes) -> str | None:
    """The byte order in which the header has its length and a number of axes; None where it has neither."""
    for order, name in (("<", "little"), (">", "big")):
        size, axes = (int.from_bytes(block[at:end], name) for at, end in ((0, 4), (40, 42)))  # type: ignore[arg-type]
        if size == _BYTES and 1 <= axes <= 7:
            return order
    return None


def _header(block: bytes) -> Any:
    import nibabel as nib

    return nib.Spm99AnalyzeHeader(block, endianness=_order(block), check=False)


def _layout(header: Any, wanted: Wanted) -> tuple[Part, np.dtype[Any], int]:
    """Which part of the data is asked for, its voxel type, and the byte at which the data begins."""
    code, bits = int(header["datatype"]), int(header["bitpix"])
    if code in _NO_NUMBERS:
        raise not_scalar(_NO_NUMBERS[code])
    if code not in _DTYPES:
        raise ScanRefused(
            f"expected a voxel type of Analyze 7.5 (2, 4, 8, 16 or 64), found {code}",
            next_step="convert it to NIfTI with the program that wrote it",
        )
    dtype = np.dtype(_DTYPES[code]).newbyteorder(header.endianness)
    if bits not in (0, 8 * dtype.itemsize):
        raise ScanRefused(
            f"the header is damaged: its voxels are of type {dtype.name} and have {bits} bits", next_step=COPY_AGAIN
        )
    part = checked_part(tuple(int(n) for n in header.get_data_shape()), wanted)
    offset = float(header["vox_offset"])
    if not 0 <= offset < 2**31 or offset != int(offset):
        raise ScanRefused(f"the header is damaged: its voxels start at byte {offset:g}", next_step=COPY_AGAIN)
    return part, dtype, int(offset)


def _spacing(header: Any) -> NDArray[np.float64]:
    """Edge lengths (3,) of a voxel in mm."""
    said = bytes(header["vox_units"]).split(b"\0")[0].decode("latin-1")
    unit = "".join(letter for letter in said.lower() if letter.isalpha())
    if unit not in _MM:
        raise ScanRefused("its header gives lengths in another unit than mm", next_step="convert it to NIfTI, in mm")
    spacing = np.array(header["pixdim"][1:4], np.float64)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise ScanRefused(
            f"expected voxel sizes above 0 mm, found {'×'.join(f'{edge:g}' for edge in spacing)}",
            next_step="repair the header's pixdim",
        )
    return spacing


def _zero(header: Any, part: Part) -> tuple[NDArray[np.float64], str]:
    """The voxel index (3,) that lies at RAS+ 0, by SPM's rule, and what said so."""
    shape = np.array(part.shape)
    origin = np.array(header["origin"][:3], np.float64)
    if origin.any() and (origin > -shape).all() and (origin < 2 * shape).all():
        return origin - 1, "SPM origin"  # which counts from 1
    centre: NDArray[np.float64] = (shape - 1) / 2
    return centre, "centre of the volume"


def _slope(header: Any) -> float:
    """SPM's scale factor; 1 where there is none."""
    other = float(header["funused2"])
    if math.isfinite(other) and other != 0:
        raise ScanRefused(
            "its header adds a number to the values (funused2), which some programs do and others do not",
            next_step="convert it to NIfTI with the program that wrote it",
        )
    slope = float(header["scl_slope"])
    return slope if math.isfinite(slope) and slope != 0 else 1.0
