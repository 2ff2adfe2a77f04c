"""The precision that losses are computed in."""

from __future__ import annotations

import torch


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision and integers as float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
