"""The descriptor objective: the same point seen in two augmented views has the same descriptor, other points do not.

A dense InfoNCE in the manner of SAM (Yan et al., 2022, self-supervised anatomical embedding): near neighbours are
neither positive nor negative.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from isimed_index.pretrain.objectives.precision import at_least_float32


def dense_infonce(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    candidates: torch.Tensor,
    anchor_mm: torch.Tensor,
    candidate_mm: torch.Tensor,
    *,
    ignore_mm: float = 14.0,
    temperature: float = 0.1,
) -> torch.Tensor:
    """Mean of -log softmax of the positive among the candidates beyond `ignore_mm`; a scalar, float32 or float64.

    Args:
        anchors: (n, d) descriptors of view one, normalised here.
        positives: (n, d) descriptors of view two at the anchors' own places.
        candidates: (m, d) descriptors of view two (and of anything else that is not the anchor's place).
        anchor_mm, candidate_mm: (n, 3), (m, 3) places in one frame, mm; other scans' candidates are given at infinity.
        ignore_mm: candidates nearer than this are left out.
        temperature: divides the cosine similarity.
    """
    a, p, c = (F.normalize(at_least_float32(v), dim=1) for v in (anchors, positives, candidates))
    hit = (a * p).sum(1) / temperature  # (n,)
    logits = a @ c.T / temperature  # (n, m)
    near = torch.cdist(at_least_float32(anchor_mm), at_least_float32(candidate_mm)) < ignore_mm
    logits = logits.masked_fill(near, float("-inf"))
    total = torch.logsumexp(torch.cat([hit[:, None], logits], dim=1), dim=1)
    return (total - hit).mean()
