"""How many prepared operations PyTorch keeps on a CPU.

oneDNN prepares an operation for the exact shape of its input and keeps what it prepared, some megabytes each, up to
1,024 of them in each of two caches. The tiles of a cohort have hundreds of shapes: a process would grow all day.
"""

from __future__ import annotations

import os

from torch import nn

_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")  # read once, when a process first convolves
_LEAST = 64
_EACH = 4  # of a convolution: it and what turns its weights, for two shapes in turn


def keep_few(network: nn.Module) -> None:
    """Bound what this process keeps prepared, by the convolutions of the network that it opens first.

    Nothing where the user has chosen, or where a convolution ran before.
    """
    convolutions = sum(isinstance(module, nn.Conv3d) for module in network.modules())
    for cache in _CACHES:
        os.environ.setdefault(cache, str(max(_LEAST, _EACH * convolutions)))
