"""NIfTI-1 and NIfTI-2 single files, read without guessing.

Rules: the sform places the voxels when its code is set, else the qform; with neither the file is refused. Lengths given
in metres or micrometres become millimetres. A compressed file is read to its end, so that its check sum is tested.
`nibabel` parses the header; the bytes are read here because its own reader skips that test.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import ScanRefused
from isimed_index.space import Affine, checked_affine, orientation, to_ras

MAX_VOXELS = 2**31
_MAX_TRAILING_BYTES = 2**26
_MAX_DEFLATE_RATIO = 1032  # zlib cannot expand one byte to more
_BLOCK = 2**24
_COPY_AGAIN = "copy or download the file again"
_MM_PER_UNIT = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}


@dataclass(frozen=True, slots=True, eq=False)
class Volume3D:
    """A file's stored voxels (x, y, z) turned to nearest RAS+, with their affine, scaling and source facts."""

    voxels: NDArray[Any]
    affine: Affine
    slope: float
    intercept: float
    attributes: dict[str, str | float | int]


def load(path: Path) -> Volume3D:
    """Read one file; raises `ScanRefused` without the file's name, which the caller adds."""
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            most_bytes = path.stat().st_size * (_MAX_DEFLATE_RATIO if compressed else 1)
            if not compressed:
                return _volume(raw, most_bytes)
            with gzip.open(raw) as stream:
                return _volume(stream, most_bytes)  # type: ignore[arg-type]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ScanRefused(f"the compressed data is truncated or damaged ({error})", next_step=_COPY_AGAIN) from error
    except OSError as error:
        raise ScanRefused(f"the file cannot be read ({error.strerror})", next_step="check its permissions") from error


def _volume(stream: BinaryIO, most_bytes: int) -> Volume3D:
    header, name = _header(stream)
    shape, dtype, offset = _layout(header)
    count = math.prod(shape)
    if offset + count * dtype.itemsize > most_bytes:
        raise _truncated(shape, dtype)
    if count > MAX_VOXELS:
        raise ScanRefused(f"the volume has {count} voxels, more than {MAX_VOXELS}", next_step="crop or resample it")
    affine, affine_source = _affine(header)
    slope, intercept = _scaling(header)

    stream.read(offset - header.sizeof_hdr)
    stored = bytearray(count * dtype.itemsize)
    _fill(stream, stored, shape, dtype)
    _drain(stream)
    in_file_order = np.frombuffer(stored, dtype).reshape(shape, order="F")
    turned, ras_affine = to_ras(in_file_order, affine)
    return Volume3D(
        voxels=np.ascontiguousarray(turned, dtype=dtype.newbyteorder("=")),
        affine=ras_affine,
        slope=slope,
        intercept=intercept,
        attributes={
            "source_format": name,
            "source_orientation": orientation(affine),
            "affine_source": affine_source,
        },
    )


def _header(stream: BinaryIO) -> tuple[Any, str]:
    """The parsed header and the name of its format."""
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
        raise ScanRefused("the file ends inside its header", next_step=_COPY_AGAIN)
    header = kind(block, check=False)
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise not_nifti
    return header, name


def _layout(header: Any) -> tuple[tuple[int, int, int], np.dtype[Any], int]:
    """Shape, voxel type and byte offset of the data of a 3-D scalar volume."""
    from nibabel.spatialimages import HeaderDataError

    try:
        dims = tuple(int(n) for n in header.get_data_shape())
        dtype: np.dtype[Any] = header.get_data_dtype()
    except (KeyError, HeaderDataError) as error:
        raise ScanRefused(f"the header is damaged ({error})", next_step=_COPY_AGAIN) from error
    while len(dims) > 3 and dims[-1] == 1:
        dims = dims[:-1]
    if not dims or min(dims) < 1:
        raise ScanRefused(f"the volume is empty: its shape is {_times(dims)}", next_step=_COPY_AGAIN)
    if len(dims) > 3:
        raise ScanRefused(
            f"expected a 3-D volume, found {len(dims)}-D data of shape {_times(dims)}",
            next_step="split the series and give one 3-D volume of it",
        )
    if len(dims) < 3 or min(dims) == 1:
        raise ScanRefused(
            f"expected a 3-D volume, found a 2-D image of shape {_times(dims)}", next_step="give the whole volume"
        )
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        what = "colour (RGB)" if dtype.names else dtype.name
        raise ScanRefused(
            f"expected integer or real voxels of at most 64 bits, found {what} voxels",
            next_step="convert it to a scalar image",
        )
    offset = float(header["vox_offset"])
    if not header.sizeof_hdr + 4 <= offset < 2**31:
        raise ScanRefused(f"the header is damaged: its voxels start at byte {offset:g}", next_step=_COPY_AGAIN)
    nx, ny, nz = dims
    return (nx, ny, nz), dtype, int(offset)


def _affine(header: Any) -> tuple[Affine, str]:
    """Voxel index → RAS+ mm in the file's own axis order, and which of the header's transforms it came from."""
    from nibabel.spatialimages import HeaderDataError

    try:
        if int(header["sform_code"]) > 0:
            matrix, source = header.get_sform(), "sform"
        elif int(header["qform_code"]) > 0:
            if header["pixdim"][0] == 0:
                header["pixdim"][0] = 1  # NIfTI standard: qfac 0 means 1
            matrix, source = header.get_qform(), "qform"
        else:
            raise ScanRefused(
                "the header does not say where the voxels lie: neither its sform nor its qform is set",
                next_step="set a qform or sform in the header",
            )
        mm = _MM_PER_UNIT[header.get_xyzt_units()[0]]
    except (ValueError, KeyError, HeaderDataError) as error:
        if isinstance(error, ScanRefused):
            raise
        raise ScanRefused(
            f"the header's qform or length unit is damaged ({error})", next_step="repair the header's qform or sform"
        ) from error
    return checked_affine(np.diag([mm, mm, mm, 1.0]) @ matrix), source


def _scaling(header: Any) -> tuple[float, float]:
    """Slope and intercept from stored to physical values; 1 and 0 where the header sets none."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0
    if not math.isfinite(intercept):
        raise ScanRefused("the header's scl_inter is not a number", next_step="repair the header's scl_inter")
    return slope, intercept


def _fill(stream: BinaryIO, stored: bytearray, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Fill `stored` from the stream, block by block, or refuse the file as truncated."""
    view = memoryview(stored)
    while view:
        got = stream.readinto(view[:_BLOCK])  # type: ignore[attr-defined]
        if not got:
            raise _truncated(shape, dtype)
        view = view[got:]


def _drain(stream: BinaryIO) -> None:
    """Read to the end, where gzip compares its check sum."""
    trailing = 0
    while block := stream.read(_BLOCK):
        trailing += len(block)
        if trailing > _MAX_TRAILING_BYTES:
            raise ScanRefused("the file holds far more data than its header says", next_step=_COPY_AGAIN)


def _truncated(shape: tuple[int, ...], dtype: np.dtype[Any]) -> ScanRefused:
    return ScanRefused(
        f"the file is truncated: it is too short for {_times(shape)} voxels of type {dtype.name}",
        next_step=_COPY_AGAIN,
    )


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
