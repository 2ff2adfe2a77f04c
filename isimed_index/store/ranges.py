"""A few rows of a .npy file without the rest of it, for files that lie elsewhere."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import StoreDamaged
from isimed_index.store.files import REPAIR
from isimed_index.store.place.storage import Storage

_HEAD_BYTES = 256  # holds the header of every array that numpy writes for two dimensions
_GAP_BYTES = 64 << 10  # rows that are closer are read together: transferring the gap costs less than a request
_AT_ONCE = 8  # requests


def read_rows(
    storage: Storage, relative: str, rows: NDArray[np.int64], shape: Sequence[int], dtype: str
) -> NDArray[Any]:
    """Rows (m, …) of an array in a .npy file of the store, in the order asked, repeated ones included.

    The file must hold an array of `shape` and `dtype` in C order with finite values, or `StoreDamaged`. Nothing else
    is checked: a hash of the whole cannot be.
    """
    name = relative.rpartition("/")[2]
    kind = np.dtype(dtype)
    start = _data_start(storage, relative, tuple(shape), kind)
    width = kind.itemsize * int(np.prod(shape[1:], dtype=np.int64))  # bytes of a row
    wanted, place = np.unique(rows, return_inverse=True)
    spans = _spans(wanted, max(1, _GAP_BYTES // max(width, 1)))

    def read(span: tuple[int, int]) -> bytes:
        length = (span[1] - span[0]) * width
        content = _asked(storage, relative, start + span[0] * width, length) if length else b""
        if len(content) != length:
            raise StoreDamaged(f"{name} of a segment is cut short", next_step=REPAIR)
        return content

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        pieces = list(pool.map(read, spans))
    found = np.empty((len(wanted), *shape[1:]), dtype=kind)
    for (first, end), content in zip(spans, pieces, strict=True):
        inside = (wanted >= first) & (wanted < end)
        found[inside] = np.frombuffer(content, dtype=kind).reshape(-1, *shape[1:])[wanted[inside] - first]
    if not np.isfinite(found).all():
        raise StoreDamaged(f"{name} of a segment holds values that are not finite", next_step=REPAIR)
    return found[place]


def _spans(rows: NDArray[np.int64], gap: int) -> list[tuple[int, int]]:
    """Half-open spans of rows that cover rising `rows`; rows closer than `gap` share one."""
    if not rows.size:
        return []
    cuts = np.flatnonzero(np.diff(rows) > gap) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(rows, cuts)]


def _data_start(storage: Storage, relative: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Where the values of a .npy file begin; `StoreDamaged` when it is another array than expected."""
    name = relative.rpartition("/")[2]
    stream = io.BytesIO(_asked(storage, relative, 0, _HEAD_BYTES))
    try:
        version = np.lib.format.read_magic(stream)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        found = np.lib.format.read_array_header_1_0(stream)
    except ValueError:
        raise StoreDamaged(f"{name} of a segment cannot be read", next_step=REPAIR) from None
    if found != (shape, False, dtype) and not (min(shape) == 0 and found[::2] == (shape, dtype)):
        raise StoreDamaged(
            f"{name} of a segment is {found[2]} of shape {found[0]}, expected {dtype} of shape {shape}",
            next_step=REPAIR,
        )
    return stream.tell()


def _asked(storage: Storage, relative: str, start: int, length: int) -> bytes:
    try:
        return storage.read_range(relative, start, length)
    except FileNotFoundError:
        raise StoreDamaged(f"{relative.rpartition('/')[2]} of a segment is missing", next_step=REPAIR) from None
