"""The SimCLR objective (NT-Xent): each view finds the other view of its place among all views of the batch.

Chen et al., 2020, without their projector (ISImed, §2.2.2). The similarities of 2n views are a (2n, 2n) matrix; it is
never held. Rows are done in pieces, whose similarities are computed again for the gradient:

    rows      forward                 backward
    0…255     z[0:256] @ z.T ─▶ lse   the same product again ─▶ gradient of this piece
    256…511   …                       …                        memory: one piece and (2n, d)
"""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from isimed_index.pretrain.objectives.precision import at_least_float32

_ROWS = 256


def simclr_loss(one: torch.Tensor, two: torch.Tensor, *, temperature: float = 0.05, rows: int = _ROWS) -> torch.Tensor:
    """Mean over all 2n views of -log softmax of the other view of the place, among all views but itself; a scalar.

    Args:
        one, two: (n, d) embeddings of the first and second views, normalised here; row i of both shows one place. None
            at all cost 0.
        temperature: divides the cosine similarity, τ.
        rows: how many rows of the similarities are held at once.
    """
    one, two = F.normalize(at_least_float32(one), dim=1), F.normalize(at_least_float32(two), dim=1)
    if not len(one):
        return (one.sum() + two.sum()) * 0.0
    views = torch.cat([one, two])  # (2n, d)
    totals = [
        checkpoint(_total, views, start, rows, temperature, use_reentrant=False, preserve_rng_state=False)
        for start in range(0, len(views), rows)
    ]
    hit = (one * two).sum(dim=1) / temperature  # (n,), of both views of a place
    return torch.stack(totals).sum() / len(views) - hit.mean()


def _total(views: torch.Tensor, start: int, rows: int, temperature: float) -> torch.Tensor:
    """Sum over the views `start` … `start + rows - 1` of log Σ exp(similarity to every view but itself)."""
    piece = views[start : start + rows]
    logits = piece @ views.T / temperature  # (rows, 2n)
    itself = torch.arange(len(piece), device=views.device)
    logits = logits.index_put((itself, itself + start), logits.new_tensor(float("-inf")))
    return torch.logsumexp(logits, dim=1).sum()
