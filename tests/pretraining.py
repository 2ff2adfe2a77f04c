"""Small cohorts and configurations for tests of pretraining."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from isimed_index.config import Augmentation, PretrainConfig
from isimed_index.pretrain.sampler import Source
from isimed_index.progress import Silent
from isimed_index.scans.prepare import Volume

STILL = Augmentation(rotation_deg=0.0, scale=0.0, curve_probability=0.0, bias=0.0, noise=0.0)
OBLIQUE = np.array([[1.8, -0.3, 0.1, -40.0], [0.4, 1.9, -0.2, 12.0], [0.0, 0.3, 2.1, 7.0], [0.0, 0.0, 0.0, 1.0]])


class Interrupt(Silent):
    """A progress display whose user presses Ctrl-C at the n-th step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def advance(self, n: int = 1, note: str = "") -> None:
        self.left -= n
        if self.left <= 0:
            raise KeyboardInterrupt


def config(**changes: Any) -> PretrainConfig:
    """A configuration that trains in well under a second: three steps of two scans, two epochs."""
    small = PretrainConfig(
        network="valid",
        width=2,
        embedding_dim=4,
        descriptor_dim=4,
        view_vox=36,
        crops_per_scan=1,
        patches_per_scan=12,
        epochs=2,
        steps_per_epoch=3,
        warmup_steps=2,
        precision="float32",
        seed=5,
    )
    return replace(small, **changes)


def volume(seed: int, shape: tuple[int, int, int] = (44, 40, 42)) -> Volume:
    """A smooth random volume within about −1…1, with an oblique and anisotropic affine."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    values = (noise / np.abs(noise).max()).astype(np.float32)
    return Volume(values, OBLIQUE.copy(), float(values.min()), values > 0)


def sources(count: int) -> list[Source]:
    """Readers of `count` volumes that differ."""
    return [partial(volume, seed) for seed in range(count)]
