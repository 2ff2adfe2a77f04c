"""PyTorch, as fast as it runs a network of ours without changing an answer by more than rounding."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from isimed_index.encoders.runtimes.exact import exact_float32
from isimed_index.encoders.runtimes.kind import Maps
from isimed_index.encoders.runtimes.transfer import Transfers


class TorchRun:
    """A network as a `Run`: as it is, or with bfloat16 wherever PyTorch's autocast uses it (heads stay in float32).

    On a GPU float32 is float32: TF32 is off while a pass is begun.
    """

    def __init__(self, network: nn.Module, device: torch.device, precision: str = "fp32") -> None:
        self._network = network.eval().to(device)
        self._device = device
        self._halved = precision == "bf16"
        self._transfers = Transfers(device)

    def __call__(self, values: NDArray[np.float32]) -> Maps:
        """Maps {output: (n, d, i, j, k)} of `values` (n, 1, x, y, z)."""
        return self.begin(values)()

    def begin(self, values: NDArray[np.float32]) -> Callable[[], Maps]:
        """Begin the pass over `values`; what is returned waits for the maps. On a CPU they are there at once."""
        with torch.inference_mode():
            return self._transfers.take(self.compute(self._transfers.give(values)))

    def resident(self, values: NDArray[np.float32]) -> torch.Tensor:
        """`values` where the network is."""
        return self._transfers.give(values)

    def compute(self, given: torch.Tensor) -> dict[str, torch.Tensor]:
        """The bare pass, from the device to the device, which may still be at it when this returns."""
        halved = torch.autocast(self._device.type, torch.bfloat16, enabled=self._halved)
        with torch.inference_mode(), exact_float32(self._device), halved:
            outputs: dict[str, torch.Tensor] = self._network(given)
            return outputs


def quick(network: nn.Module) -> nn.Module:
    """A copy: batch norms folded into the convolutions before them, channels innermost in memory."""
    fast = copy.deepcopy(network).eval()
    for module in list(fast.modules()):
        if isinstance(module, nn.Sequential):
            _fold(module)
    fast.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return fast


def _fold(layers: nn.Sequential) -> None:
    """Put every batch norm that directly follows a convolution into that one's weights."""
    names = list(layers._modules)
    for before, after in itertools.pairwise(names):
        convolution, norm = layers._modules[before], layers._modules[after]
        if isinstance(convolution, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d):
            layers._modules[before] = _folded(convolution, norm)
            layers._modules[after] = nn.Identity()


def _folded(convolution: nn.Conv3d, norm: nn.BatchNorm3d) -> nn.Conv3d:
    """γ · (w∗x + b − μ) / √(σ² + ε) + β as one convolution; computed in float64, so that only one rounding is left."""
    if norm.running_mean is None or norm.running_var is None:  # it would use the batch's own
        raise AssertionError("a batch norm without running statistics")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        scale = scale * norm.weight.double()
    shift = (norm.bias.double() if norm.affine else 0.0) - norm.running_mean.double() * scale
    if convolution.bias is not None:
        shift = shift + convolution.bias.double() * scale
    kernel = convolution.weight.double() * scale[:, None, None, None, None]
    convolution.weight = nn.Parameter(kernel.to(convolution.weight.dtype), requires_grad=False)
    convolution.bias = nn.Parameter(shift.to(convolution.weight.dtype), requires_grad=False)
    return convolution
