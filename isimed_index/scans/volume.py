"""What every reader hands on, and the careful reading of bytes that they share.

A header is not to be believed: how much a file can hold is known from its size before anything is allocated, a
compressed stream is read to its end so that its check sum is tested, and a stream that goes on far beyond what the
header announced is given up. Of a file with several volumes one is kept; the others pass through one block of memory.
"""

from __future__ import annotations

import bz2
import gzip
import io
import math
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import ScanRefused
from isimed_index.scans.part import COPY_AGAIN, Part, Wanted, times
from isimed_index.space import Affine, orientation, to_ras

MAX_VOXELS = 2**31
_MAX_TRAILING_BYTES = 2**26
_MAX_DEFLATE_RATIO = 1032  # zlib cannot expand one byte to more
_MAX_BZIP2_RATIO = 2**21
# Images shrink by 2 to 20 times, sparse masks by some hundred: more than this at such a size is a bomb.
_MAX_CREDIBLE_RATIO, _CREDIBLE_BYTES = 200, 2**28
_TILE, _SPARE = 256, 2  # voxels along one edge of what is turned at once, and those that keep its rows apart
_BLOCK = 2**22


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
    """Bytes to read voxels from, the most of them that there can be, and for a compressed file its size."""

    stream: BinaryIO
    most_bytes: int
    packed_bytes: int | None = None


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


def check_regular(path: Path) -> None:
    """Refuse a folder, a pipe or a device, of which the last two may never end; damage as in `named_damage`."""
    with named_damage():
        if not stat.S_ISREG(path.stat().st_mode):
            raise ScanRefused("it cannot be read: it is a folder, a pipe or a device", next_step="give a file")


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
                yield Source(stream, size * _MAX_DEFLATE_RATIO, size)  # type: ignore[arg-type]


def unpacked(raw: BinaryIO, encoding: str) -> Source:
    """The rest of a file through a decoder: `raw`, `gzip`, `zlib` or `bzip2`."""
    size = os.fstat(raw.fileno()).st_size
    if encoding == "gzip":
        return Source(gzip.open(raw), size * _MAX_DEFLATE_RATIO, size)  # type: ignore[arg-type]
    if encoding == "zlib":
        return Source(io.BufferedReader(_Inflated(raw)), size * _MAX_DEFLATE_RATIO, size)
    if encoding == "bzip2":
        return Source(bz2.open(raw), size * _MAX_BZIP2_RATIO, size)  # type: ignore[arg-type]
    return Source(raw, size)


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


def read_voxels(source: Source, part: Part, dtype: np.dtype[Any], wanted: Wanted, skip: int = 0) -> NDArray[Any]:
    """Voxels (x, y, z) of one volume, x fastest in the file, whose data begins after `skip` bytes.

    A compressed stream is read to its end, so that its check sum is tested. `ScanRefused` before anything is allocated
    when the file cannot hold so many or is a bomb, and for a stream that is short or goes on and on.
    """
    count = math.prod(part.shape)
    whole = part.count * count * dtype.itemsize
    begin = skip if source.packed_bytes is not None else source.stream.tell() + skip
    if begin + whole > source.most_bytes:
        raise truncated(part, dtype)
    checked_count(part.shape)
    if source.packed_bytes is not None:
        if count != wanted.labels:
            check_credible(source.packed_bytes, whole)
        if skip > _MAX_TRAILING_BYTES:
            raise _far_more_data()
    _skip(source, skip, part, dtype)
    stored = np.empty(count, dtype)
    size = count * dtype.itemsize
    if part.interleaved:
        _read_interleaved(source, part, dtype, stored)
        rest = 0
    else:
        _skip(source, part.number * size, part, dtype)
        _fill(source, stored.view(np.uint8).data, part, dtype)
        rest = (part.count - part.number - 1) * size
    if source.packed_bytes is not None:
        drain(source.stream, rest)
    elif source.most_bytes - begin - whole > _MAX_TRAILING_BYTES:
        raise _far_more_data()
    return stored.reshape(part.shape, order="F")


def check_credible(packed: int, size: int) -> None:
    """Refuse what shrinks as no image does: `size` bytes of voxels out of `packed`."""
    if size <= max(_CREDIBLE_BYTES, _MAX_CREDIBLE_RATIO * packed):
        return
    raise ScanRefused(
        f"it is {packed} bytes and would unpack to {size}, more than {_MAX_CREDIBLE_RATIO} times as much: no image "
        "shrinks like that",
        next_step="if it is an image, save it uncompressed",
    )


def _skip(source: Source, size: int, part: Part, dtype: np.dtype[Any]) -> None:
    """Pass over bytes, one block at a time where they must be unpacked."""
    if source.packed_bytes is None:
        source.stream.seek(size, os.SEEK_CUR)
        return
    while size:
        block = source.stream.read(min(size, _BLOCK))
        if not block:
            raise truncated(part, dtype)
        size -= len(block)


def _fill(source: Source, view: memoryview, part: Part, dtype: np.dtype[Any]) -> None:
    while view:
        got = source.stream.readinto(view[:_BLOCK])  # type: ignore[attr-defined]
        if not got:
            raise truncated(part, dtype)
        view = view[got:]


def _read_interleaved(source: Source, part: Part, dtype: np.dtype[Any], voxels: NDArray[Any]) -> None:
    """Every `count`-th voxel, from one block to the next."""
    step = max(1, _BLOCK // (part.count * dtype.itemsize))
    block = np.empty((min(step, len(voxels)), part.count), dtype)
    for first in range(0, len(voxels), step):
        some = block[: len(voxels) - first]
        _fill(source, memoryview(some.data).cast("B"), part, dtype)
        voxels[first : first + step] = some[:, part.number]


def drain(stream: BinaryIO, announced: int = 0) -> None:
    """Read to the end, where decoders compare check sums; `announced` bytes are what the header says is left."""
    trailing = 0
    while block := stream.read(_BLOCK):
        trailing += len(block)
        if trailing > announced + _MAX_TRAILING_BYTES:
            raise _far_more_data()
    if trailing < announced:
        raise ScanRefused("the file is truncated: its last volumes are missing", next_step=COPY_AGAIN)


def _far_more_data() -> ScanRefused:
    return ScanRefused("the file holds far more data than its header says", next_step=COPY_AGAIN)


def turned_volume(
    voxels: NDArray[Any],
    affine: Affine,
    attributes: dict[str, str | float | int],
    slope: float = 1.0,
    intercept: float = 0.0,
) -> Volume3D:
    """The volume turned to nearest RAS+, in native byte order; `attributes` are joined by the source's orientation."""
    turned, ras_affine = to_ras(voxels, affine)
    native = _in_c_order(turned, voxels.dtype.newbyteorder("="))
    return Volume3D(native, ras_affine, slope, intercept, {"source_orientation": orientation(affine), **attributes})


def _in_c_order(voxels: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """`np.ascontiguousarray`; where x or y lie closest together in memory, by tiles of planes through a small block.

    A tile is copied as it lies, then turned while it is in the processor's cache: all of its rows would fall into the
    same few lines of a cache if they were turned where they are, a power of two apart.
    """
    closest = int(np.argmin(np.abs(voxels.strides)))  # the axis that becomes a plane's first; z is its last
    if closest == 2:
        return np.ascontiguousarray(voxels, dtype=dtype)
    turned = np.empty(voxels.shape, dtype)
    planes, targets = voxels.swapaxes(0, 1 - closest), turned.swapaxes(0, 1 - closest)
    step = -1 if voxels.strides[closest] < 0 else 1  # what runs backwards is turned round in the block
    _, along, deep = planes.shape
    block = np.empty((deep, min(_TILE, along) + _SPARE), dtype)
    for plane, target in zip(planes, targets, strict=True):
        for start in range(0, along, _TILE):
            tile = plane[start : start + _TILE]
            held = block[:, : len(tile)].T
            held[...] = tile[::step]
            target[start : start + _TILE] = held[::step]
    return turned


def truncated(part: Part, dtype: np.dtype[Any]) -> ScanRefused:
    """The refusal of a file that is too short for its voxels."""
    shape = part.shape if part.count == 1 else (*part.shape, part.count)
    return ScanRefused(
        f"the file is truncated: it is too short for {times(shape)} voxels of type {dtype.name}",
        next_step=COPY_AGAIN,
    )
