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
) -> torch.Tensor:
    """Mean squared difference between latent and physical distance over pairs of patches; a scalar, float32 or float64.

    Args:
        embeddings: (n, d) latent vectors.
        centres_mm: (n, 3) patch centres in millimetres. With `pairs="all"` they must share one frame.
        scan_of: (n,) integer, which scan a patch came from.
        pairs: `within` compares patches of one scan only (exact, needs no common frame); `all` is the paper's full
            distance matrix over the batch.
        unit_mm: how many millimetres one unit of latent distance stands for.
        near_mm: weight a pair by 1 / (distance + near_mm), normalised to mean one, so that far pairs do not drown the
            near ones; None is the paper's plain mean.
    """
    physical = _distances(at_least_float32(centres_mm))  # (n, n) mm
    latent = _distances(at_least_float32(embeddings)) * unit_mm
    chosen = torch.ones_like(physical, dtype=torch.bool).triu(diagonal=1)
    if pairs == "within":
        chosen &= scan_of[:, None] == scan_of[None, :]
    weight = chosen.to(latent.dtype)
    if near_mm is not None:
        weight = weight / (physical + near_mm)
    error = ((latent - physical) / unit_mm).square()
    return (error * weight).sum() / weight.sum().clamp(min=1e-12)


def _distances(x: torch.Tensor) -> torch.Tensor:
    """All Euclidean distances (n, n) of the rows of x (n, d), by one matrix product; the gradient at 0 is finite."""
    centred = x - x.mean(dim=0).detach()
    norm = centred.square().sum(1)
    squared = norm[:, None] + norm[None, :] - 2 * centred @ centred.T
    return (squared.clamp(min=0) + 1e-8).sqrt()


def distance_error_mm(embeddings: torch.Tensor, centres_mm: torch.Tensor, unit_mm: float) -> torch.Tensor:
    """Mean of |D_latent - D_physical| in mm over all pairs (ISImed, Fig. 1); inputs (n, d) and (n, 3)."""
    latent = F.pdist(embeddings.float()) * unit_mm
    return (latent - F.pdist(centres_mm.float())).abs().mean()
