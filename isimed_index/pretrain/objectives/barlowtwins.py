"""The Barlow Twins objective: two views agree in every dimension, and no two dimensions say the same.

Zbontar et al., 2021, without their projector (ISImed, §2.2.2).
"""

from __future__ import annotations

import torch

from isimed_index.pretrain.objectives.precision import at_least_float32

_EPSILON = 1e-5  # that of batch normalisation


def barlowtwins_loss(one: torch.Tensor, two: torch.Tensor, *, redundancy_weight: float = 0.005) -> torch.Tensor:
    """Sum of squared differences between the cross-correlation of two views and the identity; a scalar.

    Each dimension is standardised over the batch as by batch normalisation without affine, with this batch's own mean
    and variance: nothing runs along from batch to batch, so there is no training and evaluation mode to mix up.

    Args:
        one, two: (n, d) embeddings of the first and second views; row i of both shows one place. None at all cost 0.
        redundancy_weight: the weight of everything that is not on the diagonal, λ.
    """
    one, two = at_least_float32(one), at_least_float32(two)
    if not len(one):
        return (one.sum() + two.sum()) * 0.0
    correlation = _standardised(one).T @ _standardised(two) / len(one)  # (d, d)
    diagonal = correlation.diagonal()
    agreement = (diagonal - 1).square().sum()
    redundancy = correlation.square().sum() - diagonal.square().sum()
    return agreement + redundancy_weight * redundancy


def _standardised(x: torch.Tensor) -> torch.Tensor:
    """(n, d) with mean 0 and variance 1 in every dimension; a constant dimension becomes 0."""
    centred = x - x.mean(dim=0)
    return centred / (centred.square().mean(dim=0) + _EPSILON).sqrt()
