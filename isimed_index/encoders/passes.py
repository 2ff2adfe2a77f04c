"""Whether one pass of a network over a volume gives the vectors of its patches: tried, not believed.

    noise, a patch and two of the network's steps along each edge
      ├─▶ one pass ─▶ 3 × 3 × 3 vectors ─▶ some of them ─┐
      └─▶ the patches that lie there, one by one ────────┴─▶ the same to rounding?

A network may say of itself that it is exactly convolutional, and not be it: padding, a pooling over all it is shown, a
stride that is not the one it names. Over a volume it would then answer with other vectors, which look as right as any.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from isimed_index.encoders.runtimes.checked import BOUNDS, relative_errors
from isimed_index.encoders.runtimes.kind import Maps

_STEPS = 2  # of the network, along each edge of the noise beyond a patch
_PATCHES = 8  # of the 27 in it that are encoded alone


def passes_hold(network: nn.Module, patch: int, stride: int) -> bool:
    """Whether a network on the CPU is exactly convolutional, with that patch and total stride in voxels.

    It is run in float32, and left in evaluation mode. The bound is that by which runtimes are believed: networks of
    ours keep within a fifth of it, and zero-padded ones were at least forty times beyond. A network that gives NaN
    passes: it is refused for that elsewhere.
    """
    rng, edge = np.random.default_rng(0), patch + _STEPS * stride
    noise = rng.uniform(-1, 1, (edge, edge, edge)).astype(np.float32)
    places = rng.permutation(list(itertools.product(range(_STEPS + 1), repeat=3)))[:_PATCHES]  # (n, 3)
    starts = (places * stride).tolist()
    patches = np.stack([noise[x : x + patch, y : y + patch, z : z + patch] for x, y, z in starts])
    network.eval()
    alone, whole = _run(network, patches[:, None]), _run(network, noise[None, None])
    if not all(np.isfinite(vectors).all() for vectors in alone.values()):
        return True
    if any(maps.shape[2:] != (_STEPS + 1,) * 3 for maps in whole.values()):
        return False
    inside = {name: maps[0][(slice(None), *places.T)].T[:, :, None, None, None] for name, maps in whole.items()}
    return relative_errors(inside, alone).within(BOUNDS["fp32"])


def _run(network: nn.Module, values: NDArray[np.float32]) -> Maps:
    with torch.inference_mode():
        return {name: maps.numpy() for name, maps in network(torch.from_numpy(values)).items()}
