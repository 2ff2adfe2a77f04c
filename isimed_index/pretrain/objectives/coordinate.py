"""The coordinate objectives: predicted coordinates of patches equal the true ones.

Distances alone leave a mirror image open; offsets along Right, Anterior and Superior do not. Comparing offsets
*within* a scan needs no common frame: one function of appearance has to explain the offsets of every scan at once, so
the frame that all scans share emerges from the training and is fixed up to one translation. The plain regressor that
the ISImed paper's code has compares coordinates themselves, and so needs scans in a common frame.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from isimed_index.pretrain.objectives.precision import at_least_float32


def coordinate_loss(
    positions_mm: torch.Tensor, centres_mm: torch.Tensor, *, unit_mm: float = 100.0, huber: float | None = None
) -> torch.Tensor:
    """Mean over patches of the squared distance between predicted and true coordinates, in units; a scalar.

    Args:
        positions_mm: (n, 3) predicted coordinates, mm.
        centres_mm: (n, 3) true patch centres in a frame that all scans share, mm.
        unit_mm: the unit in which the error is measured.
        huber: from how many units on an axis's error counts linearly; half its square counts below. None: its square.
    """
    error = (at_least_float32(positions_mm) - at_least_float32(centres_mm)) / unit_mm  # (n, 3)
    if huber is None:
        return error.square().sum(dim=1).mean()
    return F.huber_loss(error, torch.zeros_like(error), delta=huber) * 3.0


def offset_loss(
    positions_mm: torch.Tensor, centres_mm: torch.Tensor, scan_of: torch.Tensor, *, unit_mm: float = 100.0
) -> torch.Tensor:
    """Huber loss between predicted and true coordinates after each scan's own mean is taken from both; a scalar.

    For squared errors this equals the mean over all pairs of a scan of |(p_i - p_j) - (x_i - x_j)|², up to a factor.

    Args:
        positions_mm: (n, 3) predicted coordinates, mm.
        centres_mm: (n, 3) true patch centres, RAS+ mm.
        scan_of: (n,) integer, which scan a patch came from, values 0 … scans-1.
        unit_mm: the unit in which the error is measured; errors above a fifth of it count linearly.
    """
    error = (at_least_float32(positions_mm) - at_least_float32(centres_mm)) / unit_mm  # (n, 3)
    total = error.new_zeros(int(scan_of.max()) + 1, 3).index_add_(0, scan_of, error)
    count = torch.bincount(scan_of).clamp(min=1)[:, None]
    rest = error - (total / count)[scan_of]
    return F.huber_loss(rest, torch.zeros_like(rest), delta=0.2) * 3.0
