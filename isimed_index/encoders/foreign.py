"""Encoders of other programs: what their networks are shown, and how what they answer becomes one vector a patch.

    patches (n, x, y, z) RAS ─▶ turned to the card's axes ─▶ their network (n, 1, p, p, p) ─▶ maps or vectors
                                                                └▶ pooled ─▶ compared with the card ─▶ (n, dim)

They are run patch by patch: that their networks give the same within a larger volume is nothing that can be known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.card import AXES, EncoderCard, Pool
from isimed_index.encoders.protocol import Vectors
from isimed_index.errors import EncoderMismatch

_VOXELS_AT_ONCE = 64 * 32**3  # that a network is shown
_OPPOSITE = {"R": "L", "L": "R", "A": "P", "P": "A", "S": "I", "I": "S"}
Run = Callable[[NDArray[np.float32]], Mapping[str, NDArray[Any]]]  # (n, 1, p, p, p) → {output: (n, dim, …)}


class ForeignEncoder:
    """An `Encoder` whose network is the function `run`, written by somebody else."""

    def __init__(self, card: EncoderCard, run: Run) -> None:
        self.card = card
        self._run = run

    def encode(self, patches: NDArray[np.float32]) -> Vectors:
        """Patches (n, x, y, z), scaled as the card says, → {output: (n, dim) float32}.

        `EncoderMismatch` when the network fails, or its answer has not the outputs and dimensions of the card.
        """
        edge = self.card.patch_vox
        if patches.shape[1:] != (edge, edge, edge):
            raise EncoderMismatch(f"expected patches of {edge}³ voxels, found {patches.shape[1:]}")
        turned = turn(patches, self.card.axes)
        step = max(1, _VOXELS_AT_ONCE // edge**3)
        batches = [self._vectors(turned[start : start + step]) for start in range(0, len(turned), step)]
        return {
            name: np.concatenate([np.empty((0, dim), np.float32), *(batch[name] for batch in batches)])
            for name, dim in self.card.outputs.items()
        }

    def _vectors(self, patches: NDArray[np.float32]) -> Vectors:
        given = self._run(np.ascontiguousarray(patches[:, None]))
        missing = sorted(set(self.card.outputs) - set(given))
        if missing:
            raise EncoderMismatch(
                f"{self._who} gave {sorted(given)} and not the output {missing[0]!r} of its card",
                next_step="name the outputs on the card as the network does",
            )
        return {name: self._pooled(name, given[name], len(patches)) for name in self.card.outputs}

    def _pooled(self, name: str, given: NDArray[Any], n: int) -> NDArray[np.float32]:
        """One output as vectors (n, dim), finite."""
        dim = self.card.outputs[name]
        if given.ndim not in (2, 5) or given.shape[:2] != (n, dim):
            raise EncoderMismatch(
                f"output {name!r} of {self._who}: expected vectors ({n}, {dim}) or maps ({n}, {dim}, i, j, k), "
                f"found shape {given.shape}",
                next_step="correct the dimension on the card, or have the factory give vectors",
            )
        if given.dtype.kind not in "fiu":
            raise EncoderMismatch(
                f"output {name!r} of {self._who}: expected numbers, found {given.dtype}",
                next_step="name another output on the card",
            )
        if given.ndim == 5 and given.shape[2:] != (1, 1, 1) and self.card.pool is None:
            raise EncoderMismatch(
                f"output {name!r} of {self._who} is a map of {'×'.join(map(str, given.shape[2:]))} vectors a patch",
                next_step='say on the card which one stands for the patch: "pool": "mean" or "centre"',
            )
        vectors = pooled(given.astype(np.float32, copy=False), self.card.pool or "mean")
        if not np.isfinite(vectors).all():
            raise EncoderMismatch(
                f"output {name!r} of {self._who} holds NaN or infinite values",
                next_step="check the intensity scaling on the card, and the weights",
            )
        return vectors

    @property
    def _who(self) -> str:
        return f"encoder {self.card.name!r}"


def turn(patches: NDArray[np.float32], axes: str) -> NDArray[np.float32]:
    """Patches (n, x, y, z), whose axes grow to Right, Anterior, Superior, with axes that grow as `axes` says."""
    order = [AXES.index(letter if letter in AXES else _OPPOSITE[letter]) for letter in axes]
    flipped = tuple(1 + axis for axis, letter in enumerate(axes) if letter not in AXES)
    return np.flip(patches.transpose(0, *(1 + axis for axis in order)), flipped)


def pooled(given: NDArray[np.float32], pool: Pool) -> NDArray[np.float32]:
    """Vectors (n, d) of maps (n, d, i, j, k): their mean, or what lies at the centre; vectors stay as they are.

    The centre of an even number of places is between two, so it is the mean of both: no side is favoured.
    """
    if given.ndim == 2:
        return given
    if pool == "centre":
        middle = tuple(slice((size - 1) // 2, size // 2 + 1) for size in given.shape[2:])
        given = given[(slice(None), slice(None), *middle)]
    return np.asarray(given.mean(axis=(2, 3, 4)), np.float32)
