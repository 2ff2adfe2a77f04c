"""The ISImed objective: latent distances between patches mimic physical distances (ISImed, §2.1, Eq. 1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F

from isimed_index.pretrain.objectives.precision import at_least_float32

Pairs = Literal["within", "all"]


def distance_loss(
    embeddings: torch.Tensor,
    centres_mm: torch.Tensor,
    scan_of: torch.Tensor,
    *,
    pairs: Pairs = "within",
    unit_mm: float = 100.0,
    near_mm: float | None = None,
    huber: float | None = None,
) -> torch.Tensor:
    """Mean squared difference between latent and physical distance over pairs of patches; a scalar, float32 or float64.

    Nothing here is bound to millimetres but the names: with centres in voxels, `unit_mm` and `near_mm` are voxels too.

    Args:
        embeddings: (n, d) latent vectors.
        centres_mm: (n, 3) patch centres in millimetres. With `pairs="all"` they must share one frame.
        scan_of: (n,) integer, which scan a patch came from.
        pairs: `within` compares patches of one scan only (exact, needs no common frame); `all` is the paper's full
            distance matrix over the batch.
        unit_mm: how many millimetres one unit of latent distance stands for.
        near_mm: weight a pair by 1 / (distance + near_mm), normalised to mean one, so that far pairs do not drown the
            near ones; None is the paper's plain mean.
        huber: from how many units on a difference counts linearly, and half its square below; None is its square.
    """
    physical = _distances(at_least_float32(centres_mm))  # (n, n) mm
    latent = _distances(at_least_float32(embeddings)) * unit_mm
    chosen = torch.ones_like(physical, dtype=torch.bool).triu(diagonal=1)
    if pairs == "within":
        chosen &= scan_of[:, None] == scan_of[None, :]
    weight = chosen.to(latent.dtype)
    if near_mm is not None:
        weight = weight / (physical + near_mm)
    difference = (latent - physical) / unit_mm
    if huber is None:
        error = difference.square()
    else:
        error = F.huber_loss(difference, torch.zeros_like(difference), reduction="none", delta=huber)
    return (error * weight).sum() / weight.sum().clamp(min=1e-12)


def _distances(x: torch.Tensor) -> torch.Tensor:
    """All Euclidean distances (n, n) of the rows of x (n, d), by one matrix product; the gradient at 0 is finite."""
    centred = x - x.mean(dim=0).detach()
    norm = centred.square().sum(1)
    squared = norm[:, None] + norm[None, :] - 2 * centred @ centred.T
    return (squared.clamp(min=0) + 1e-8).sqrt()
