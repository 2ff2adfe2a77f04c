"""MetaImage (.mha, or .mhd with its data beside it), read as ITK reads it, without guessing.

Rules: the header must hold a TransformMatrix and an Offset (LPS mm, the centre of the first voxel); without them the
file is refused. AnatomicalOrientation only repeats the matrix and is not used, as in ITK. Lists of slices, several
numbers a voxel and text data are refused.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from isimed_index.errors import ScanRefused
from isimed_index.scans.volume import (
    COPY_AGAIN,
    Source,
    Volume3D,
    checked_shape,
    checked_type,
    named_damage,
    not_scalar,
    read_voxels,
    turned_volume,
    unpacked,
)
from isimed_index.space import Affine, checked_affine

_MOST_HEADER_BYTES = 2**16
_DTYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_OFFSETS = ("Offset", "Position", "Origin")
_MATRICES = ("TransformMatrix", "Orientation", "Rotation")
_ORDERS = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")


def load(path: Path) -> Volume3D:
    """Read one file; raises `ScanRefused` without the file's name, which the caller adds."""
    with named_damage(), path.open("rb") as raw:
        fields = _fields(raw)
        shape = _shape(fields)
        dtype = _dtype(fields)
        affine = _affine(fields)
        if not _true(fields, "BinaryData", "True"):
            raise ScanRefused("its voxels are text", next_step="save it with binary data")
        name = fields["ElementDataFile"]
        if name.upper() == "LOCAL":
            voxels = read_voxels(_data(raw, path.stat().st_size, fields, shape, dtype), shape, dtype)
        else:
            data = _data_file(path, name)
            with data.open("rb") as detached:
                voxels = read_voxels(_data(detached, data.stat().st_size, fields, shape, dtype), shape, dtype)
    return turned_volume(voxels, affine, {"source_format": "MetaImage", "affine_source": "TransformMatrix"})


def _fields(raw: BinaryIO) -> dict[str, str]:
    """The header's fields; ElementDataFile is the last, and the stream then stands behind its line."""
    fields: dict[str, str] = {}
    while line := raw.readline(_MOST_HEADER_BYTES):
        key, equals, value = line.decode("ascii", "replace").partition("=")
        if not equals or raw.tell() > _MOST_HEADER_BYTES:
            break
        fields[key.strip()] = value.strip()
        if key.strip() == "ElementDataFile":
            return fields
    raise ScanRefused("this is not a MetaImage file", next_step="convert the image to .nii.gz")


def _numbers(fields: dict[str, str], *keys: str) -> list[float] | None:
    """The numbers of the first of the fields that is there."""
    text = next((fields[key] for key in keys if key in fields), None)
    if text is None:
        return None
    try:
        numbers = [float(word) for word in text.split()]
    except ValueError:
        numbers = [math.nan]
    if not all(abs(number) < 2**53 for number in numbers):  # also false for NaN
        raise ScanRefused(f"the header is damaged: its {keys[0]} holds no numbers", next_step=COPY_AGAIN)
    return numbers


def _true(fields: dict[str, str], key: str, default: str = "False") -> bool:
    return fields.get(key, default).lower() in ("true", "t", "1")


def _shape(fields: dict[str, str]) -> tuple[int, int, int]:
    sizes = _numbers(fields, "DimSize") or []
    if _numbers(fields, "NDims") != [float(len(sizes))] or not all(size == int(size) for size in sizes):
        raise ScanRefused("the header is damaged: its DimSize does not fit its NDims", next_step=COPY_AGAIN)
    if (_numbers(fields, "ElementNumberOfChannels") or [1.0]) != [1.0]:
        raise not_scalar("several numbers a voxel: vector or colour (RGB)")
    dims = checked_shape(tuple(int(size) for size in sizes))
    if len(sizes) != 3:
        raise ScanRefused(f"expected a 3-D header, found {len(sizes)}-D", next_step="save it as a 3-D volume")
    return dims


def _dtype(fields: dict[str, str]) -> np.dtype[Any]:
    name = fields.get("ElementType", "untyped")
    if name not in _DTYPES:
        raise not_scalar(name)
    scale = (_numbers(fields, "ElementToIntensityFunctionSlope"), _numbers(fields, "ElementToIntensityFunctionOffset"))
    if scale[0] not in (None, [1.0]) or scale[1] not in (None, [0.0]):
        raise ScanRefused(
            "its header scales the values (ElementToIntensityFunction), which most programs ignore",
            next_step="save it with the values that are meant",
        )
    big = any(_true(fields, key) for key in _ORDERS)
    return checked_type(np.dtype(_DTYPES[name]).newbyteorder(">" if big else "<"))


def _affine(fields: dict[str, str]) -> Affine:
    """Voxel index → RAS+ mm."""
    matrix, offset = _numbers(fields, *_MATRICES), _numbers(fields, *_OFFSETS)
    spacing = _numbers(fields, "ElementSpacing")
    if matrix is None or offset is None or spacing is None:
        raise ScanRefused(
            "the header does not say where the voxels lie: it needs TransformMatrix, Offset and ElementSpacing",
            next_step="save it again with its orientation",
        )
    if (len(matrix), len(offset), len(spacing)) != (9, 3, 3):
        raise ScanRefused(
            "the header is damaged: its TransformMatrix, Offset and ElementSpacing are not those of 3-D",
            next_step=COPY_AGAIN,
        )
    affine = np.eye(4)
    affine[:3, :3] = np.array(matrix).reshape(3, 3).T * spacing  # the file lists one axis after the other
    affine[:3, 3] = offset
    return checked_affine(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)


def _data_file(header: Path, name: str) -> Path:
    """The one data file of a detached header, in its folder or below."""
    if name.upper().startswith("LIST") or "%" in name:
        raise ScanRefused("its voxels lie in a list of files", next_step="save it as one .mha file")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ScanRefused("its data file is not beside it", next_step="put both files into one folder")
    if not (data := header.parent / name).is_file():
        raise ScanRefused("the file with its voxels is not beside it", next_step="copy both files")
    return data


def _data(
    raw: BinaryIO, size: int, fields: dict[str, str], shape: tuple[int, int, int], dtype: np.dtype[Any]
) -> Source:
    """The stream of voxels, behind the bytes that the header says to skip."""
    skip = _numbers(fields, "HeaderSize") or [0.0]
    if len(skip) != 1 or skip[0] != int(skip[0]) or skip[0] < -1:
        raise ScanRefused("the header is damaged: its HeaderSize is no number of bytes", next_step=COPY_AGAIN)
    compressed = _true(fields, "CompressedData")
    if skip[0] == -1 and not compressed:  # the voxels are the file's last bytes
        raw.seek(max(0, size - int(np.prod(shape, dtype=object)) * dtype.itemsize))
    elif skip[0] > 0:
        raw.seek(int(skip[0]))
    return unpacked(raw, size - raw.tell(), "zlib" if compressed else "raw")
