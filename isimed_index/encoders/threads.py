"""How many threads a pass of a network may use in this process."""

from __future__ import annotations

import torch


def use_threads(count: int) -> None:
    """Compute on `count` threads from now on; runtimes that are opened later take that number from PyTorch."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
