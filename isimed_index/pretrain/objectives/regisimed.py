"""The regISImed objective: distances that mimic the patient's, kept from collapse by Barlow Twins (ISImed, §2.1.1)."""

from __future__ import annotations

from typing import Any

import torch

from isimed_index.pretrain.objectives.barlowtwins import barlowtwins_loss
from isimed_index.pretrain.objectives.isimed import distance_loss


def regisimed_loss(
    embeddings: torch.Tensor,
    centres_mm: torch.Tensor,
    scan_of: torch.Tensor,
    one: torch.Tensor,
    two: torch.Tensor,
    *,
    barlowtwins_weight: float = 1000.0,
    redundancy_weight: float = 0.005,
    **distance: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Distance loss + `barlowtwins_weight` × Barlow Twins loss; a scalar, and the two terms by name.

    Args:
        embeddings, centres_mm, scan_of: (m, d), (m, 3), (m,) of the patches of both views, for `distance_loss`.
        one, two: (n, e) outputs for the first and second views, for `barlowtwins_loss`.
        barlowtwins_weight: the paper's λ, which brings both losses to one order of magnitude.
        redundancy_weight: Barlow Twins' own λ.
        distance: what else `distance_loss` takes.
    """
    terms = {
        "distance": distance_loss(embeddings, centres_mm, scan_of, **distance),
        "barlowtwins": barlowtwins_loss(one, two, redundancy_weight=redundancy_weight),
    }
    return terms["distance"] + barlowtwins_weight * terms["barlowtwins"], terms
