"""What a bad or odd file is, and the pieces that several kinds of them are made of."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dicoms import grid

SHAPE = (7, 9, 6)
LPS = np.diag([-1.0, -1, 1, 1])
RAS = LPS @ grid()
GIB = 2**30
Truth = tuple[np.ndarray, np.ndarray]  # physical values (x, y, z), and their affine to RAS+ mm


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of file: `write` makes it in a folder; `says` is a part of the reason, None for what is read.

    What is read has the values and the affine that `truth` gives. `lines` is how many refusals there are.
    """

    name: str
    what: str
    says: str | None
    write: Callable[[Path], Any]
    truth: Callable[[str], Truth] | None = None
    lines: int = 1

    @property
    def format(self) -> str:
        """The first word of the name: the kind of file."""
        return self.name.split("-")[0]


def own(name: str, shape: tuple[int, ...] = SHAPE, dtype: Any = np.int16) -> np.ndarray:
    """Noise of a case's own."""
    return np.random.default_rng(zlib.crc32(name.encode())).integers(1, 120, shape).astype(dtype)


def edited(path: Path, at: int, values: Any, dtype: str) -> Path:
    """Overwrite numbers of a header."""
    raw = bytearray(path.read_bytes())
    new = np.array(values, dtype).tobytes()
    raw[at : at + len(new)] = new
    path.write_bytes(raw)
    return path


def cut(path: Path, keep: int) -> Path:
    path.write_bytes(path.read_bytes()[:keep])
    return path


def zeros_gzip(size: int) -> bytes:
    """`size` zeros as members of a gzip file, 64 MiB each."""
    return gzip.compress(bytes(2**26), 9) * (size // 2**26)


def zeros_deflate(size: int) -> bytes:
    """`size` zeros as blocks of one deflate stream, without its end."""
    deflate = zlib.compressobj(9, wbits=-15)
    return (deflate.compress(bytes(2**26)) + deflate.flush(zlib.Z_FULL_FLUSH)) * (size // 2**26)


def plain(name: str) -> Truth:
    return own(name), RAS
