"""What every encoder can do; a toy without torch (`isimed_index.testing`) keeps the contract honest."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.card import EncoderCard
from isimed_index.grid import PatchGrid
from isimed_index.scans.prepare import Volume

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


def encode_grid(encoder: Encoder, volume: Volume, grid: PatchGrid, numbers: NDArray[np.int64]) -> Vectors:
    """Encode the patches `numbers` (n,) of a volume's grid, the fast way where the encoder has one."""
    whole = getattr(encoder, "encode_grid", None)
    if whole is not None:
        vectors: Vectors = whole(volume, grid, numbers)
        return vectors
    batches = [
        encoder.encode(grid.extract(volume.values, numbers[start : start + 64], volume.background))
        for start in range(0, len(numbers), 64)
    ]
    return {
        name: np.concatenate([batch[name] for batch in batches]) if batches else np.empty((0, dim), np.float32)
        for name, dim in encoder.card.outputs.items()
    }
