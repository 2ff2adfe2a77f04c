"""A moving average of the weights, which is often better than the weights of any one step."""

from __future__ import annotations

import torch


class Average:
    """Exponential moving average of a network's weights and batch-norm statistics, in the network's own dtypes.

    The decay grows from 2/11 to the one that is asked for, as (1 + t) / (10 + t), so that the random weights of the
    beginning are soon forgotten.
    """

    def __init__(self, network: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    def update(self, network: torch.nn.Module, step: int) -> None:
        """Take in the weights after `step`, counted from 0."""
        decay = min(self.decay, (2 + step) / (11 + step))
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                if tensor.is_floating_point():
                    self.state[name].lerp_(tensor, 1 - decay)
                else:
                    self.state[name].copy_(tensor)  # counters of batches have no mean

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a saved state; `KeyError` when it is another network's."""
        for name, tensor in self.state.items():
            tensor.copy_(state[name])
