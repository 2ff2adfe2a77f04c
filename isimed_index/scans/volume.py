"""What every reader hands on, and the careful reading of bytes that they share.

A header is not to be believed: how much a file can hold is known from its size before anything is allocated, a
compressed stream is read to its end so that its check sum is tested, and a stream that goes on far beyond what the
header announced is given up.
"""

from __future__ import annotations

import bz2
import gzip
import io
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import ScanRefused
from isimed_index.space import Affine, orientation, to_ras

MAX_VOXELS = 2**31
_MAX_TRAILING_BYTES = 2**26
_MAX_DEFLATE_RATIO = 1032  # zlib cannot expand one byte to more
_MAX_BZIP2_RATIO = 2**21
_BLOCK = 2**24
COPY_AGAIN = "copy or download the file again"


@dataclass(frozen=True, slots=True, eq=False)
class Volume3D:
    """A file's stored voxels (x, y, z) turned to nearest RAS+, with their affine, scaling and source facts."""

    voxels: NDArray[Any]
    affine: Affine
    slope: float
    intercept: float
    attributes: dict[str, str | float | int]


@dataclass(frozen=True, slots=True)
class Source:
    """Bytes to read voxels from, and the most of them that there can be, counted from the file's size."""

    stream: BinaryIO
    most_bytes: int


class _Inflated(io.RawIOBase):
    """A zlib stream (no gzip header) as a file; its check sum is tested when it is read to the end."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._inflate = zlib.decompressobj()

    def readable(self) -> bool:
        """Always: it is for reading only."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as one block goes; `EOFError` when the stream breaks off before its check sum."""
        while not self._inflate.eof:
            packed = self._inflate.unconsumed_tail or self._raw.read(2**16)
            if not packed:
                raise EOFError("it breaks off before its end")
            if block := self._inflate.decompress(packed, len(buffer)):
                buffer[: len(block)] = block
                return len(block)
        return 0


@contextmanager
def named_damage() -> Iterator[None]:
    """What reading a file may raise becomes `ScanRefused`, without the file's name."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ScanRefused(f"the compressed data is truncated or damaged ({error})", next_step=COPY_AGAIN) from error
    except OSError as error:
        if error.errno is None:  # bz2 says so of damaged data
            raise ScanRefused("the compressed data is truncated or damaged", next_step=COPY_AGAIN) from error
        raise ScanRefused(f"the file cannot be read ({error.strerror})", next_step="check its permissions") from error


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """The bytes of a file, unzipped where it is a gzip file; damage becomes `ScanRefused`."""
    with named_damage(), path.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        size = path.stat().st_size
        if not compressed:
            yield Source(raw, size)
        else:
            with gzip.open(raw) as stream:
                yield Source(stream, size * _MAX_DEFLATE_RATIO)  # type: ignore[arg-type]


def unpacked(raw: BinaryIO, size: int, encoding: str) -> Source:
    """The rest of a file of `size` bytes through a decoder: `raw`, `gzip`, `zlib` or `bzip2`."""
    if encoding == "gzip":
        return Source(gzip.open(raw), size * _MAX_DEFLATE_RATIO)  # type: ignore[arg-type]
    if encoding == "zlib":
        return Source(io.BufferedReader(_Inflated(raw)), size * _MAX_DEFLATE_RATIO)
    if encoding == "bzip2":
        return Source(bz2.open(raw), size * _MAX_BZIP2_RATIO)  # type: ignore[arg-type]
    return Source(raw, size)


def checked_shape(dims: tuple[int, ...]) -> tuple[int, int, int]:
    """The three extents of a 3-D volume, axes of one beyond the third left out; else `ScanRefused`."""
    while len(dims) > 3 and dims[-1] == 1:
        dims = dims[:-1]
    if not dims or min(dims) < 1:
        raise ScanRefused(f"the volume is empty: its shape is {times(dims)}", next_step=COPY_AGAIN)
    if len(dims) > 3:
        raise ScanRefused(
            f"expected a 3-D volume, found {len(dims)}-D data of shape {times(dims)}",
            next_step="split the series and give one 3-D volume of it",
        )
    if len(dims) < 3 or min(dims) == 1:
        raise ScanRefused(
            f"expected a 3-D volume, found a 2-D image of shape {times(dims)}", next_step="give the whole volume"
        )
    nx, ny, nz = dims
    return nx, ny, nz


def checked_type(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """`dtype` when it is integer or real and has at most 64 bits; else `ScanRefused`."""
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise not_scalar("colour (RGB)" if dtype.names else dtype.name)
    return dtype


def not_scalar(what: str) -> ScanRefused:
    """The refusal of voxels that are no single numbers."""
    return ScanRefused(
        f"expected integer or real voxels of at most 64 bits, found {what} voxels",
        next_step="convert it to a scalar image",
    )


def checked_count(shape: tuple[int, ...]) -> int:
    """How many voxels there are; `ScanRefused` when they are too many to take."""
    count = math.prod(shape)
    if count > MAX_VOXELS:
        raise ScanRefused(f"the volume has {count} voxels, more than {MAX_VOXELS}", next_step="crop or resample it")
    return count


def read_voxels(source: Source, shape: tuple[int, int, int], dtype: np.dtype[Any], skip: int = 0) -> NDArray[Any]:
    """Voxels (x, y, z), x fastest in the file, read after `skip` bytes; the stream is then read to its end.

    `ScanRefused` before anything is allocated when the file cannot hold so many, and for a stream that is short.
    """
    if skip + math.prod(shape) * dtype.itemsize > source.most_bytes:
        raise truncated(shape, dtype)
    count = checked_count(shape)
    source.stream.read(skip)
    stored = bytearray(count * dtype.itemsize)
    view = memoryview(stored)
    while view:
        got = source.stream.readinto(view[:_BLOCK])  # type: ignore[attr-defined]
        if not got:
            raise truncated(shape, dtype)
        view = view[got:]
    drain(source.stream)
    return np.frombuffer(stored, dtype).reshape(shape, order="F")


def drain(stream: BinaryIO) -> None:
    """Read to the end, where decoders compare check sums."""
    trailing = 0
    while block := stream.read(_BLOCK):
        trailing += len(block)
        if trailing > _MAX_TRAILING_BYTES:
            raise ScanRefused("the file holds far more data than its header says", next_step=COPY_AGAIN)


def turned_volume(
    voxels: NDArray[Any],
    affine: Affine,
    attributes: dict[str, str | float | int],
    slope: float = 1.0,
    intercept: float = 0.0,
) -> Volume3D:
    """The volume turned to nearest RAS+, in native byte order; `attributes` are joined by the source's orientation."""
    turned, ras_affine = to_ras(voxels, affine)
    native = np.ascontiguousarray(turned, dtype=voxels.dtype.newbyteorder("="))
    return Volume3D(native, ras_affine, slope, intercept, {"source_orientation": orientation(affine), **attributes})


def truncated(shape: tuple[int, ...], dtype: np.dtype[Any]) -> ScanRefused:
    """The refusal of a file that is too short for its voxels."""
    return ScanRefused(
        f"the file is truncated: it is too short for {times(shape)} voxels of type {dtype.name}",
        next_step=COPY_AGAIN,
    )


def times(shape: tuple[int, ...]) -> str:
    """Such as `256×256×180`."""
    return "×".join(map(str, shape))
