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
from isimed_index.scans.part import COPY_AGAIN, Part, Wanted, checked_part
from isimed_index.scans.volume import (
    Source,
    Volume3D,
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


def load(path: Path, wanted: Wanted) -> Volume3D:
    """Read one file; raises `ScanRefused` without the file's name, which the caller adds."""
    with named_damage(), path.open("rb") as raw:
        fields = _fields(raw)
        part = _part(fields, wanted)
        dtype = _dtype(fields)
        affine = _affine(fields)
        if not _true(fields, "BinaryData", "True"):
            raise ScanRefused("its voxels are text", next_step="save it with binary data")
        name = fields["ElementDataFile"]
        if name.upper() == "LOCAL":
            voxels = read_voxels(_data(raw, fields, part, dtype), part, dtype, wanted)
        else:
            with _data_file(path, name).open("rb") as detached:
                voxels = read_voxels(_data(detached, fields, part, dtype), part, dtype, wanted)
    attributes = {"source_format": "MetaImage", "affine_source": "TransformMatrix", **part.attributes}
    return turned_volume(voxels, affine, attributes)


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


def _part(fields: dict[str, str], wanted: Wanted) -> Part:
    sizes = _numbers(fields, "DimSize") or []
    if _numbers(fields, "NDims") != [float(len(sizes))] or not all(size == int(size) for size in sizes):
        raise ScanRefused("the header is damaged: its DimSize does not fit its NDims", next_step=COPY_AGAIN)
    if (_numbers(fields, "ElementNumberOfChannels") or [1.0]) != [1.0]:
        raise not_scalar("several numbers a voxel: vector or colour (RGB)")
    if len(sizes) > 4:
        raise ScanRefused(f"expected a 3-D header, found {len(sizes)}-D", next_step="save it as 3-D volumes")
    return checked_part(tuple(int(size) for size in sizes), wanted)


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
    axes = int((_numbers(fields, "NDims") or [3.0])[0])
    if (len(matrix), len(offset), len(spacing)) != (axes**2, axes, axes):
        raise ScanRefused(
            f"the header is damaged: its TransformMatrix, Offset and ElementSpacing are not those of {axes}-D",
            next_step=COPY_AGAIN,
        )
    turn = np.array(matrix).reshape(axes, axes).T  # the file lists one axis after the other
    if turn[3:, :3].any() or turn[:3, 3:].any():
        raise ScanRefused("its volumes do not lie at one place: time runs through space", next_step="save them in 3-D")
    affine = np.eye(4)
    affine[:3, :3] = turn[:3, :3] * spacing[:3]
    affine[:3, 3] = offset[:3]
    return checked_affine(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)


def _data_file(header: Path, name: str) -> Path:
    """The one data file of a detached header, in its folder or below."""
    if name.upper().startswith("LIST") or "%" in name:
        raise ScanRefused("its voxels lie in a list of files", next_step="save it as one .mha file")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ScanRefused("its data file is not beside it", next_step="put both files into one folder")
    if not (data := header.parent / name).is_file():
        raise ScanRefused("the file with its voxels is not beside it", next_step="copy both files")
    if data.samefile(header):
        raise ScanRefused("the header names itself as the file with its voxels", next_step="copy both files")
    return data


def _data(raw: BinaryIO, fields: dict[str, str], part: Part, dtype: np.dtype[Any]) -> Source:
    """The stream of voxels, behind the bytes that the header says to skip."""
    skip = _numbers(fields, "HeaderSize") or [0.0]
    if len(skip) != 1 or skip[0] != int(skip[0]) or skip[0] < -1:
        raise ScanRefused("the header is damaged: its HeaderSize is no number of bytes", next_step=COPY_AGAIN)
    source = unpacked(raw, "zlib" if _true(fields, "CompressedData") else "raw")
    if skip[0] == -1 and source.packed_bytes is None:  # the voxels are the file's last bytes
        raw.seek(max(0, source.most_bytes - part.count * math.prod(part.shape) * dtype.itemsize))
    elif skip[0] > 0:
        raw.seek(int(skip[0]))
    return source
