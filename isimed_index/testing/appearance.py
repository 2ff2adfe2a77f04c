"""Random looks of one head: contrast curve, coil bias and noise, which leave every point where it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]


def contrast_curve(values: Values, rng: np.random.Generator, *, inverted: bool = False) -> Values:
    """Send values in 0…1 through a random monotone curve that keeps 0 at 0.

    A gamma of 0.65–1.6 follows a piecewise linear curve of random slopes. `inverted` turns tissue contrast over
    (bright becomes dark) but leaves the background dark.
    """
    knots = np.linspace(0.0, 1.0, 7)
    heights = np.concatenate([[0.0], np.cumsum(rng.uniform(0.4, 1.6, len(knots) - 1))])
    curved = np.interp(values, knots, heights / heights[-1]) ** rng.uniform(0.65, 1.6)
    if inverted:
        curved = np.where(values > 0.1, 1.1 - curved, curved)
    return np.asarray(curved, dtype=np.float32)


def bias_field(shape: tuple[int, int, int], rng: np.random.Generator, strength: float) -> Values:
    """A smooth multiplicative field (x, y, z) within 1 ± `strength`, as a receive coil leaves it."""
    from scipy.ndimage import zoom

    field = zoom(rng.uniform(-1.0, 1.0, (4, 4, 4)), np.asarray(shape) / 4, order=3, mode="nearest", grid_mode=True)
    scaled: Values = (1.0 + strength * field / max(np.abs(field).max(), 1e-6)).astype(np.float32)
    return scaled


def magnitude_noise(values: Values, rng: np.random.Generator, sd: float) -> Values:
    """Add complex gaussian noise and return the magnitude: Rician, as in MR images."""
    real = values + rng.normal(0.0, sd, values.shape).astype(np.float32)
    imaginary = rng.normal(0.0, sd, values.shape).astype(np.float32)
    noisy: Values = np.hypot(real, imaginary)
    return noisy
