"""Watching a run: distance error in mm, effective rank, spread; a warning when the embeddings collapse."""

from __future__ import annotations

import torch

from isimed_index.pretrain.objectives.isimed import distance_error_mm

COLLAPSED_RANK = 1.5
_EPSILON = 1e-7


def rankme(embeddings: torch.Tensor) -> float:
    """Effective rank of (n, d) embeddings: the exponential of the entropy of their singular values.

    RankMe (Garrido et al., 2023), on centred embeddings; finite also where singular values are zero.
    """
    x = embeddings.double()
    values = torch.linalg.svdvals(x - x.mean(dim=0))
    share = values / (values.sum() + _EPSILON) + _EPSILON
    return float(torch.exp(-(share * share.log()).sum()))


def spread(
    embeddings: torch.Tensor, centres_mm: torch.Tensor, scan_of: torch.Tensor, unit_mm: float
) -> dict[str, float]:
    """Figures of one batch: |D_latent − D_physical| within scans (mm), RankMe, and the mean sd of a dimension."""
    errors = [
        distance_error_mm(embeddings[scan_of == scan], centres_mm[scan_of == scan], unit_mm)
        for scan in range(int(scan_of.max()) + 1)
        if (scan_of == scan).sum() > 1
    ]
    return {
        "distance_error_mm": float(torch.stack(errors).mean()) if errors else float("nan"),
        "rankme": rankme(embeddings),
        "embedding_sd": float(embeddings.std(dim=0).mean()),
    }


def collapse_warning(figures: dict[str, float]) -> str | None:
    """What is wrong and what to do, when the embeddings carry (almost) no information."""
    if figures["embedding_sd"] < 1e-4 or figures["rankme"] < COLLAPSED_RANK:
        return (
            f"the embeddings are collapsing (RankMe {figures['rankme']:.2f}, sd {figures['embedding_sd']:.1e}); "
            "lower learning_rate or raise descriptor_weight"
        )
    return None
