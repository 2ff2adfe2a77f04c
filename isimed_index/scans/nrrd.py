"""NRRD, attached (.nrrd) or with a detached header (.nhdr), read without guessing.

Rules: the header must name an anatomical space (`space: left-posterior-superior` and the like), its directions and its
origin; without them the file is refused. The origin is the centre of the first voxel, whatever `centerings` says (NRRD
specification, section "space origin"). Data is raw, gzip or bzip2; text encodings and lists of data files are refused.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

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

_MOST_HEADER_BYTES = 2**20
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": (
        "longlong",
        "long long",
        "long long int",
        "signed long long",
        "signed long long int",
        "int64",
        "int64_t",
    ),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_DTYPES = {name: dtype for dtype, names in _TYPES.items() for name in names}
_ENCODINGS = {"raw": "raw", "gz": "gzip", "gzip": "gzip", "bz2": "bzip2", "bzip2": "bzip2"}
_SIGNS = {"right": (0, 1), "left": (0, -1), "anterior": (1, 1), "posterior": (1, -1), "superior": (2, 1)}
_SHORT = {"ras": "right-anterior-superior", "las": "left-anterior-superior", "lps": "left-posterior-superior"}
_VECTOR = re.compile(r"none|\(([^()]*)\)")
_SCALAR_KINDS = ("domain", "space", "none", "???", "stub", "scalar")


def load(path: Path, wanted: Wanted) -> Volume3D:
    """Read one file; raises `ScanRefused` without the file's name, which the caller adds."""
    with named_damage(), path.open("rb") as raw:
        fields = _fields(raw)
        axes = _kept_axes(fields)
        part = _part(fields, axes, wanted)
        dtype = _dtype(fields)
        affine = _affine(fields, axes)
        encoding = _ENCODINGS.get(fields.get("encoding", "").lower())
        if encoding is None:
            raise ScanRefused(
                f"its encoding is {fields.get('encoding')!r}, expected raw, gzip or bzip2",
                next_step="save it again with gzip encoding",
            )
        name = fields.get("data file", fields.get("datafile"))
        if name is None:
            voxels = _voxels(raw, encoding, fields, part, dtype, wanted)
        else:
            with _data_file(path, name).open("rb") as detached:
                voxels = _voxels(detached, encoding, fields, part, dtype, wanted)
    attributes = {"source_format": "NRRD", "affine_source": "space directions", **part.attributes}
    return turned_volume(voxels, affine, attributes)


def _fields(raw: BinaryIO) -> dict[str, str]:
    """The header's fields; the stream then stands behind the empty line that ends it."""
    if not raw.readline(16).startswith(b"NRRD000"):
        raise ScanRefused("this is not a NRRD file", next_step="convert the image to .nii.gz")
    fields: dict[str, str] = {}
    while line := raw.readline(_MOST_HEADER_BYTES):
        if raw.tell() > _MOST_HEADER_BYTES:
            raise ScanRefused("the header is damaged: it does not end", next_step=COPY_AGAIN)
        text = line.decode("ascii", "replace").strip()
        if not text:
            break
        key, colon, value = text.partition(":")
        if colon and not text.startswith("#") and not value.startswith("="):
            fields[key.strip().lower()] = value.strip()
    return fields


def _words(fields: dict[str, str], key: str) -> list[str]:
    """The words of a field that has one for every axis; `ScanRefused` when it does not."""
    words = fields.get(key, "").split()
    if not words or fields.get("dimension") != str(len(words)):
        raise ScanRefused(f"the header is damaged: its {key} do not fit its dimension", next_step=COPY_AGAIN)
    if key == "sizes" and not all(word.isdecimal() and len(word) < 12 for word in words):
        raise ScanRefused("the header is damaged: its sizes are no whole numbers", next_step=COPY_AGAIN)
    return words


def _kept_axes(fields: dict[str, str]) -> list[int]:
    """The axes of space, and any other longer than one; colour, vector and matrix axes are refused."""
    sizes = [int(word) for word in _words(fields, "sizes")]
    kinds = [word.lower() for word in _words(fields, "kinds")] if "kinds" in fields else ["???"] * len(sizes)
    for size, kind in zip(sizes, kinds, strict=True):
        if size > 1 and kind not in _SCALAR_KINDS and kind not in ("time", "list"):
            raise not_scalar(f"{kind} (several numbers a voxel)")
    spatial = [direction is not None for direction in _directions(fields)]
    if len(spatial) != len(sizes):
        raise ScanRefused("the header is damaged: its space directions do not fit its dimension", next_step=COPY_AGAIN)
    return [axis for axis, size in enumerate(sizes) if spatial[axis] or size > 1]


def _part(fields: dict[str, str], axes: list[int], wanted: Wanted) -> Part:
    """Which part of the data is asked for; the axis that counts volumes has no direction, and is the first or last."""
    sizes = [int(_words(fields, "sizes")[axis]) for axis in axes]
    directions = _directions(fields)
    if len(axes) != 4 or directions[axes[3]] is None:
        return checked_part(tuple(sizes), wanted)
    kinds = fields.get("kinds", "").lower().split()
    if directions[axes[0]] is not None or not kinds or kinds[axes[0]] not in ("list", "time"):
        raise ScanRefused(
            "it is 4-D, and its header does not say which axis counts volumes: expected the last one, or a first one "
            "of kind list or time",
            next_step="save it as 3-D volumes",
        )
    return checked_part(tuple(sizes), wanted, interleaved=True)


def _dtype(fields: dict[str, str]) -> np.dtype[Any]:
    name = fields.get("type", "").lower()
    if name not in _DTYPES:
        raise not_scalar(name or "untyped")
    dtype = np.dtype(_DTYPES[name])
    if dtype.itemsize > 1 and "endian" not in fields:
        raise ScanRefused("the header does not say its byte order", next_step="add the field endian to the header")
    return checked_type(dtype.newbyteorder(">" if fields.get("endian", "").lower() == "big" else "<"))


def _directions(fields: dict[str, str]) -> list[list[float] | None]:
    """The space direction of every axis; None where an axis has none."""
    try:
        return [
            None if found[0] == "none" else [float(number) for number in found[1].split(",")]
            for found in _VECTOR.finditer(fields.get("space directions", "").lower())
        ] or [None] * int(fields.get("dimension", "0"))
    except ValueError as error:
        raise ScanRefused("the header is damaged: its space directions are no numbers", next_step=COPY_AGAIN) from error


def _affine(fields: dict[str, str], axes: list[int]) -> Affine:
    """Voxel index → RAS+ mm."""
    unplaced = ScanRefused(
        "the header does not say where the voxels lie: it needs an anatomical space, space directions and space origin",
        next_step="save it again with its orientation",
    )
    space = fields.get("space", "").lower().removesuffix("-time").removesuffix("t")
    words = _SHORT.get(space, space).split("-")
    if len(words) != 3 or sorted(_SIGNS.get(word, (9, 0))[0] for word in words) != [0, 1, 2]:
        raise unplaced
    units = set(re.findall(r'"([^"]*)"', fields.get("space units", "")))
    if not units <= {"mm", "millimeter", "millimetre", ""}:
        raise ScanRefused(f"its space units are {', '.join(sorted(units))}, expected mm", next_step="save it in mm")
    every = _directions(fields)
    # Of four axes one counts volumes.
    directions = [every[axis] for axis in axes if len(axes) < 4 or every[axis] is not None]
    origin = _VECTOR.fullmatch(fields.get("space origin", ""))
    if origin is None or origin[1] is None or any(direction is None for direction in directions):
        raise unplaced
    try:
        columns = np.array(
            [*directions, [float(number) for number in origin[1].split(",")]], dtype=np.float64
        )  # (4, 3)
    except ValueError as error:
        raise ScanRefused(
            "the header is damaged: its space directions or origin are no numbers", next_step=COPY_AGAIN
        ) from error
    if columns.shape != (4, 3):
        raise ScanRefused(
            "the header is damaged: expected three space directions and an origin of three numbers",
            next_step=COPY_AGAIN,
        )
    affine = np.eye(4)
    for row, word in enumerate(words):
        axis, sign = _SIGNS[word]
        affine[axis] = [*(sign * columns[:, row])]
    return checked_affine(affine)


def _data_file(header: Path, name: str) -> Path:
    """The one data file of a detached header, in its folder or below."""
    if name.upper().startswith("LIST") or len(name.split()) > 1:
        raise ScanRefused("its voxels lie in a list of files", next_step="save it as one .nrrd file")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ScanRefused("its data file is not beside it", next_step="put both files into one folder")
    if not (data := header.parent / name).is_file():
        raise ScanRefused("the file with its voxels is not beside it", next_step="copy both files")
    if data.samefile(header):
        raise ScanRefused("the header names itself as the file with its voxels", next_step="copy both files")
    return data


def _voxels(
    raw: BinaryIO, encoding: str, fields: dict[str, str], part: Part, dtype: np.dtype[Any], wanted: Wanted
) -> NDArray[Any]:
    """The voxels, behind the lines and bytes that the header says to skip."""
    try:
        lines = int(fields.get("line skip", fields.get("lineskip", "0")))
        count = int(fields.get("byte skip", fields.get("byteskip", "0")))
    except ValueError as error:
        raise ScanRefused(
            "the header is damaged: its line skip or byte skip is no whole number", next_step=COPY_AGAIN
        ) from error
    if lines < 0 or count < -1 or (count == -1 and encoding != "raw"):
        raise ScanRefused("the header is damaged: its line skip or byte skip is negative", next_step=COPY_AGAIN)
    for _ in range(lines):
        if not raw.readline(_MOST_HEADER_BYTES):
            raise ScanRefused("the file is truncated: it has fewer lines than its header skips", next_step=COPY_AGAIN)
    source: Source = unpacked(raw, encoding)
    if count == -1:  # the voxels are the file's last bytes
        raw.seek(max(raw.tell(), source.most_bytes - part.count * math.prod(part.shape) * dtype.itemsize))
    return read_voxels(source, part, dtype, wanted, max(count, 0))
