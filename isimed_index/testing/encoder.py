"""An encoder without a network, for tests of whatever is built upon encoders: a patch's moments are its vector."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.card import EncoderCard, Metric
from isimed_index.encoders.protocol import Vectors
from isimed_index.errors import EncoderMismatch


class ToyEncoder:
    """An `Encoder` on NumPy alone.

    `embedding` (3) is the mean gradient along the patch's axes; `descriptor` (8) is that, the mean, the standard
    deviation and the mean along three ramps from -1 to 1.
    """

    def __init__(self, patch_vox: int = 8, stride_vox: int = 4, spacing_mm: float = 2.0, metric: Metric = "l2") -> None:
        self.card = EncoderCard(
            name="toy",
            factory="isimed_index.testing.encoder:ToyEncoder",
            network={},
            weights_sha256=None,
            patch_vox=patch_vox,
            stride_vox=stride_vox,
            spacing_mm=spacing_mm,
            outputs={"embedding": 3, "descriptor": 8},
            match_output="descriptor",
            metric=metric,
        )

    def encode(self, patches: NDArray[np.float32]) -> Vectors:
        """Patches (n, x, y, z), scaled as the card says, → {output: (n, dim) float32}."""
        edge = self.card.patch_vox
        if patches.shape[1:] != (edge, edge, edge):
            raise EncoderMismatch(f"expected patches of {edge}³ voxels, found {patches.shape[1:]}")
        x = patches.astype(np.float64)
        ramp = np.linspace(-1, 1, edge)
        axes = (1, 2, 3)
        gradients = [np.diff(x, axis=axis).mean(axis=axes) for axis in axes]
        ramps = [np.tensordot(x, ramp, axes=(axis, 0)).mean(axis=(1, 2)) / edge for axis in axes]
        embedding = np.stack(gradients, axis=1)  # (n, 3)
        descriptor = np.column_stack([embedding, x.mean(axis=axes), x.std(axis=axes), *ramps])  # (n, 8)
        return {"embedding": embedding.astype(np.float32), "descriptor": descriptor.astype(np.float32)}
