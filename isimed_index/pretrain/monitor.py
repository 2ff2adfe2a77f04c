"""Watching a run: distance errors in mm, effective rank and spread of an epoch's embeddings, and an alarm.

Every step of an epoch gives a few patches of a few scans to a sample of bounded size, which is measured when it ends.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from isimed_index.config import PretrainConfig
from isimed_index.pretrain.methods import Losses

COLLAPSED_RANK = 1.5
COLLAPSED_SD = 1e-4
COLLAPSED_SPREAD = 0.05  # of what it should be, while it shrinks
SAMPLE = 2048  # patches an epoch
_OF_A_STEP = 16  # at least, so that there are pairs within scans
_OF_A_SCAN = 8  # at least
_EPSILON = 1e-7


class Sample:
    """Patches of one epoch: embeddings (n, d), centres (n, 3) mm, and of which step and scan each is."""

    def __init__(self, config: PretrainConfig, steps: int) -> None:
        self.config = config
        self.every = math.ceil(steps * _OF_A_STEP / SAMPLE)
        self.most = SAMPLE // math.ceil(steps / self.every)
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def take(self, losses: Losses, step: int) -> None:
        """Keep some of a step's patches, decided by seed and step alone."""
        if step % self.every:
            return
        rng = np.random.default_rng([self.config.seed, 6, step])
        scan_of = losses.scan_of.cpu().numpy()
        scans = rng.permutation(np.unique(scan_of))[: max(2, self.most // _OF_A_SCAN)]
        each = max(1, self.most // max(1, len(scans)))
        rows = [rng.permutation(np.flatnonzero(scan_of == scan))[:each] for scan in np.sort(scans)]
        if not rows:  # a method may find no pair of views in a batch
            return
        chosen = torch.from_numpy(np.sort(np.concatenate(rows)))
        where = torch.stack([torch.full_like(chosen, step), torch.from_numpy(scan_of)[chosen]], dim=1)
        embeddings, centres = (x.detach().cpu().float()[chosen] for x in (losses.embeddings, losses.centres_mm))
        self._parts.append((embeddings, centres, where))

    def clear(self) -> None:
        """Begin a new epoch."""
        self._parts = []

    def tensors(self) -> dict[str, torch.Tensor]:
        """What has been kept, for a checkpoint: embeddings, centres_mm, and (step, scan) of each."""
        if not self._parts:
            return {}
        columns = (torch.cat(column) for column in zip(*self._parts, strict=True))
        return dict(zip(("embeddings", "centres_mm", "where"), columns, strict=True))

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what `tensors` gave."""
        self._parts = [(tensors["embeddings"], tensors["centres_mm"], tensors["where"])] if tensors else []

    def figures(self) -> dict[str, float]:
        """What the epoch's patches say, see `figures_of`; empty without patches."""
        kept = self.tensors()
        if not kept:
            return {}
        in_mm = self.config.method == "isimed" and self.config.distance_weight > 0
        unit_mm = self.config.unit_mm if in_mm else None
        return figures_of(kept["embeddings"], kept["centres_mm"], kept["where"], unit_mm)


def figures_of(
    embeddings: torch.Tensor, centres_mm: torch.Tensor, where: torch.Tensor, unit_mm: float | None
) -> dict[str, float]:
    """Distance errors, effective ranks and spread of patches of several steps.

    `distance_error_mm` is the mean of |D_latent − D_physical| over pairs of one scan, `distance_error_across_mm` over
    pairs of two scans (ISImed, Fig. 1), each of one step; NaN without such pairs. Across scans it holds what the scans'
    frames differ by, too. RankMe, participation ratio and sd are of embeddings whose step's mean was taken away: what
    the weights moved between steps is no spread. `spread` is 1 where latent distances are as long as physical ones;
    where they have no unit, it is the part of the embeddings' norm that differs between patches.

    Args:
        embeddings: (n, d).
        centres_mm: (n, 3) in the frame of the batch.
        where: (n, 2) integer, the step and the scan in that step.
        unit_mm: how many mm one unit of latent distance stands for; None: the scale that fits best.
    """
    latent, physical, within = _distances(embeddings, centres_mm, where)
    scale = unit_mm or float((latent * physical).sum() / (latent.square().sum() + _EPSILON))
    error = (latent * scale - physical).abs()
    steps = torch.unique(where[:, 0], return_inverse=True)[1]
    total = embeddings.new_zeros(int(steps.max()) + 1, embeddings.shape[1]).index_add_(0, steps, embeddings)
    rest = embeddings - (total / torch.bincount(steps)[:, None])[steps]
    sd = rest.double().square().mean(dim=0).sqrt()
    norm = embeddings.double().square().mean(dim=0).sqrt().norm()
    spread = latent.sum() * unit_mm / physical.sum() if unit_mm else sd.norm() / norm
    return {
        "distance_error_mm": float(error[within].mean()),
        "distance_error_across_mm": float(error[~within].mean()),
        "rankme": rankme(rest),
        "participation_ratio": participation_ratio(rest),
        "spread": float(spread),
        "embedding_sd": float(sd.mean()),
        "embedding_sd_least": float(sd.min()),
    }


def _distances(
    embeddings: torch.Tensor, centres_mm: torch.Tensor, where: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latent and physical distance of all pairs of each step, and whether a pair is of one scan."""
    latent, physical, within = [], [], []
    for step in torch.unique(where[:, 0]):
        rows = where[:, 0] == step
        scans = where[rows, 1]
        one, two = torch.triu_indices(len(scans), len(scans), offset=1)  # the order of pdist
        latent.append(F.pdist(embeddings[rows].float()))
        physical.append(F.pdist(centres_mm[rows].float()))
        within.append(scans[one] == scans[two])
    return torch.cat(latent), torch.cat(physical), torch.cat(within)


def rankme(embeddings: torch.Tensor) -> float:
    """Effective rank of (n, d) embeddings: the exponential of the entropy of their singular values.

    RankMe (Garrido et al., 2023), on centred embeddings; finite also where singular values are zero.
    """
    x = embeddings.double()
    values = torch.linalg.svdvals(x - x.mean(dim=0))
    share = values / (values.sum() + _EPSILON) + _EPSILON
    return float(torch.exp(-(share * share.log()).sum()))


def participation_ratio(embeddings: torch.Tensor) -> float:
    """How many directions share the variance of (n, d) embeddings: (Σλ)² / Σλ² of their covariance's eigenvalues λ."""
    x = embeddings.double()
    variance = torch.linalg.svdvals(x - x.mean(dim=0)).square()
    return float(variance.sum().square() / variance.square().sum().clamp(min=_EPSILON**4))


def collapse_warning(figures: dict[str, float], before: float = math.nan) -> str | None:
    """What is wrong and what to do, when the embeddings carry (almost) no information.

    `before` is the `spread` of the epoch before: a small one that grows is the beginning of a run and no collapse.
    """
    if "spread" not in figures:
        return None
    sd, rank, spread = figures["embedding_sd"], figures["rankme"], figures["spread"]
    shrunk = spread < COLLAPSED_SPREAD and spread < before
    if not (shrunk or sd < COLLAPSED_SD or rank < COLLAPSED_RANK):
        return None
    return (
        f"the embeddings are collapsing (RankMe {rank:.2f}, sd {sd:.1e}, spread {spread:.3f}); stop the run and lower "
        "learning_rate; if it happens again, weigh the objectives anew, or show more scans a batch (batch_scans)"
    )
