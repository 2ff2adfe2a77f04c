"""What every encoder can do; a toy without torch (`isimed_index.testing`) keeps the contract honest."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.card import EncoderCard
from isimed_index.errors import EncoderMismatch
from isimed_index.grid import PatchGrid
from isimed_index.scans.prepare import Volume

BATCH = 64  # patches in memory at once
Vectors = dict[str, NDArray[np.float32]]  # output name → (n, dim)


class Encoder(Protocol):
    """Turns prepared patches into named vectors."""

    @property
    def card(self) -> EncoderCard:
        """What made it and what it expects."""
        ...

    def encode(self, patches: NDArray[np.float32]) -> Vectors:
        """Patches (n, x, y, z), scaled as the card says, → {output: (n, dim) float32}."""
        ...


class GridEncoder(Encoder, Protocol):
    """An encoder that has a faster way to encode many patches of one volume than one by one."""

    def encode_grid(self, volume: Volume, grid: PatchGrid, numbers: NDArray[np.int64]) -> Vectors:
        """The same vectors as `encode` of each patch `numbers` (n,) of `grid`."""
        ...


def halved(name: str, vectors: NDArray[np.float32]) -> NDArray[np.float16]:
    """Vectors (n, d) in the 16 bits in which they are stored; `EncoderMismatch` when these cannot hold them.

    Below the smallest normal number of float16 vectors would lose their digits and then become zeros, which are all as
    near to each other; so are vectors that are all zeros from the start. One vector of zeros among others passes, and
    so does what is not finite: it is refused where it is written.
    """
    largest, half = float(np.abs(vectors).max(initial=0)), np.finfo(np.float16)
    if vectors.size and largest == 0:
        raise EncoderMismatch(
            f"output {name!r} is zero for every patch: no place can be told from another",
            next_step="check the weights, and that the intensity scaling on the card is the network's",
        )
    if float(half.max) < largest < np.inf or 0 < largest < float(half.smallest_normal):
        raise EncoderMismatch(
            f"output {name!r}: its numbers, up to {largest:.3g}, are too {'large' if largest > 1 else 'small'} to be "
            "stored in 16 bits",
            next_step="multiply it by a constant that makes them about 1, within the network",
        )
    return vectors.astype(np.float16)


def encode_grid(encoder: Encoder, volume: Volume, grid: PatchGrid, numbers: NDArray[np.int64]) -> Vectors:
    """Encode the patches `numbers` (n,) of a volume's grid, the fast way where the encoder has one."""
    whole = getattr(encoder, "encode_grid", None)
    if whole is not None:
        vectors: Vectors = whole(volume, grid, numbers)
        return vectors
    return encode_patches(encoder, volume, grid, numbers)


def encode_patches(encoder: Encoder, volume: Volume, grid: PatchGrid, numbers: NDArray[np.int64]) -> Vectors:
    """Encode the patches `numbers` (n,) of a volume's grid one by one, a batch at a time."""
    batches = [
        encoder.encode(grid.extract(volume.values, numbers[start : start + BATCH], volume.background))
        for start in range(0, len(numbers), BATCH)
    ]
    return {
        name: np.concatenate([np.empty((0, dim), np.float32), *(batch[name] for batch in batches)])
        for name, dim in encoder.card.outputs.items()
    }
