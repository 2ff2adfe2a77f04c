"""NIfTI-1 and NIfTI-2, single files (.nii) and pairs (.hdr and .img), read without guessing.

Rules: the sform places the voxels when its code is set, else the qform; with neither the file is refused. Where both
are set and put a voxel into different places, how far apart they are at most is kept as an attribute. Lengths given
in metres or micrometres become millimetres. A compressed file is read to its end, so that its check sum is tested.
`nibabel` parses the header; the bytes are read here because its own reader skips that test. A pair without the magic
word of NIfTI is Analyze 7.5, and is not read here.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from isimed_index.errors import ScanRefused
from isimed_index.scans import nifti_header
from isimed_index.scans.part import COPY_AGAIN, Part, Wanted, checked_part
from isimed_index.scans.volume import Volume3D, checked_type, open_source, read_voxels, turned_volume
from isimed_index.space import Affine, checked_affine, largest_apart_mm

_NOTABLE_APART_MM = 1e-2
_MM_PER_UNIT = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}


def load(path: Path, wanted: Wanted) -> Volume3D:
    """Read one file, or a pair by its header; raises `ScanRefused` without the file's name, which the caller adds."""
    with open_source(path) as source:
        header, name, is_pair = _header(source.stream)
        part, dtype, offset = _layout(header, is_pair, wanted)
        kept = nifti_header.kept(header)
        affine, facts = _placed(header, part)
        slope, intercept = _scaling(header)
        if not is_pair:
            voxels = read_voxels(source, part, dtype, wanted, offset - header.sizeof_hdr)
    if is_pair:
        with open_source(data_beside(path)) as data:
            voxels = read_voxels(data, part, dtype, wanted, offset)
    attributes = {"source_format": name, **facts, "source_header": kept, **part.attributes}
    return turned_volume(voxels, affine, attributes, slope, intercept)


def data_beside(path: Path) -> Path:
    """The file with the voxels of the pair that a header belongs to, compressed or not; `ScanRefused` without it."""
    stem = path.name.removesuffix(".gz")[: -len(".hdr")]
    for suffix in (".img", ".IMG", ".img.gz"):
        if (data := path.with_name(stem + suffix)).is_file():
            return data
    raise ScanRefused("the file with its voxels (.img) is not beside it", next_step="copy both files of the pair")


def _header(stream: BinaryIO) -> tuple[Any, str, bool]:
    """The parsed header, the name of its format, and whether the voxels lie in a second file."""
    import nibabel as nib

    start = stream.read(4)
    not_nifti = ScanRefused("this is not a NIfTI file", next_step="convert the image to .nii.gz")
    if len(start) < 4:
        raise not_nifti
    sizes = {struct.unpack("<i", start)[0], struct.unpack(">i", start)[0]}
    if 348 in sizes:
        kind, name = nib.Nifti1Header, "NIfTI-1"
    elif 540 in sizes:
        kind, name = nib.Nifti2Header, "NIfTI-2"
    else:
        raise not_nifti
    block = start + stream.read(kind.sizeof_hdr - 4)
    if len(block) < kind.sizeof_hdr:
        raise ScanRefused("the file ends inside its header", next_step=COPY_AGAIN)
    header = kind(block, check=False)
    magic = bytes(header["magic"])[:3]
    if magic in (b"ni1", b"ni2"):
        return header, f"{name} pair", True
    if magic not in (b"n+1", b"n+2"):
        raise not_nifti
    return header, name, False


def _layout(header: Any, is_pair: bool, wanted: Wanted) -> tuple[Part, np.dtype[Any], int]:
    """Which part of the data is asked for, its voxel type, and the byte at which the data begins."""
    from nibabel.spatialimages import HeaderDataError

    try:
        dims = tuple(int(n) for n in header.get_data_shape())
        dtype: np.dtype[Any] = header.get_data_dtype()
    except (KeyError, HeaderDataError) as error:
        raise ScanRefused(f"the header is damaged ({error})", next_step=COPY_AGAIN) from error
    dtype, part = checked_type(dtype), checked_part(dims, wanted)
    offset = float(header["vox_offset"])
    if not (0 if is_pair else header.sizeof_hdr + 4) <= offset < 2**31:
        raise ScanRefused(f"the header is damaged: its voxels start at byte {offset:g}", next_step=COPY_AGAIN)
    return part, dtype, int(offset)


def _placed(header: Any, part: Part) -> tuple[Affine, dict[str, str | float | int]]:
    """Voxel index → RAS+ mm in the file's own axis order, and which of the header's transforms it came from."""
    transforms = {"sform": int(header["sform_code"]), "qform": int(header["qform_code"])}
    source = next((name for name, code in transforms.items() if code > 0), None)
    if source is None:
        raise ScanRefused(
            "the header does not say where the voxels lie: neither its sform nor its qform is set",
            next_step="set a qform or sform in the header",
        )
    affine = _transform(header, source)
    if min(transforms.values()) <= 0:
        return affine, {"affine_source": source}
    try:
        apart = largest_apart_mm(affine, _transform(header, "qform"), part.shape)
    except ScanRefused:
        return affine, {"affine_source": source}  # the qform is none
    disagree = apart > _NOTABLE_APART_MM
    return affine, {"affine_source": source, **({"other_transform_apart_mm": round(apart, 6)} if disagree else {})}


def _transform(header: Any, source: str) -> Affine:
    from nibabel.spatialimages import HeaderDataError

    try:
        if source == "qform" and header["pixdim"][0] == 0:
            header["pixdim"][0] = 1  # NIfTI standard: qfac 0 means 1
        matrix = header.get_sform() if source == "sform" else header.get_qform()
        mm = _MM_PER_UNIT[header.get_xyzt_units()[0]]
    except (ValueError, KeyError, HeaderDataError) as error:
        raise ScanRefused(
            f"the header's qform or length unit is damaged ({error})", next_step="repair the header's qform or sform"
        ) from error
    return checked_affine(np.diag([mm, mm, mm, 1.0]) @ matrix)


def _scaling(header: Any) -> tuple[float, float]:
    """Slope and intercept from stored to physical values; 1 and 0 where the header sets none."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0
    if not math.isfinite(intercept):
        raise ScanRefused("the header's scl_inter is not a number", next_step="repair the header's scl_inter")
    return slope, intercept
