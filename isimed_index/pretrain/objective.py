"""The joint objective of a batch: distances, coordinates and descriptors, each where its weight is above zero.

views ─▶ network ─┬▶ embedding  ─▶ distance loss   (latent distance = distance in mm)
                  ├▶ position   ─▶ offset loss     (predicted offsets = true offsets)
                  └▶ descriptor ─▶ dense InfoNCE   (same place in two views = same descriptor)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from isimed_index.config import PretrainConfig
from isimed_index.encoders.networks import Network, Outputs
from isimed_index.pretrain.objectives.coordinate import offset_loss
from isimed_index.pretrain.objectives.descriptor import dense_infonce
from isimed_index.pretrain.objectives.isimed import distance_loss
from isimed_index.pretrain.sampler import Batch
from isimed_index.space import apply_affine, inverse


@dataclass(frozen=True, slots=True)
class Losses:
    """The weighted sum that is minimised, each term by name, and what the monitor looks at."""

    total: torch.Tensor
    terms: dict[str, torch.Tensor]
    embeddings: torch.Tensor  # (n, d), the patches that the distance objective saw
    centres_mm: torch.Tensor  # (n, 3)
    scan_of: torch.Tensor  # (n,)


def view_lattice(network: Network, side: int) -> NDArray[np.float64]:
    """Centres (p, 3), in view voxels, of the patches that one pass over a view of `side` voxels encodes."""
    axis = np.arange((side - network.patch) // network.stride + 1) * network.stride + (network.patch - 1) / 2
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


def joint_loss(outputs: Outputs, batch: Batch, network: Network, config: PretrainConfig, step: int) -> Losses:
    """All objectives of one batch; `outputs` are the network's maps (v, dim, i, j, k) of the batch's views."""
    lattice = view_lattice(network, config.view_vox)  # (p, 3)
    device = outputs["embedding"].device
    places = np.stack([apply_affine(affine, lattice) for affine in batch.affines])  # (v, p, 3)
    mm = torch.tensor(places, dtype=torch.float32, device=device)
    scan_of = torch.tensor(np.repeat(batch.scan_of, len(lattice)), device=device)  # (v·p,)
    flat = {name: y.float().flatten(2).transpose(1, 2) for name, y in outputs.items()}  # (v, p, dim)

    chosen = torch.tensor(_choose(scan_of.cpu().numpy(), config, step), device=device)
    embeddings = flat["embedding"].flatten(0, 1)[chosen]
    centres = mm.flatten(0, 1)[chosen]
    terms = {
        "distance": distance_loss(
            embeddings,
            centres,
            scan_of[chosen],
            pairs=config.pairs,
            unit_mm=config.unit_mm,
            near_mm=config.near_mm or None,
        )
    }
    total = config.distance_weight * terms["distance"]
    if config.coordinate_weight > 0:
        terms["coordinate"] = offset_loss(flat["position"].flatten(0, 1), mm.flatten(0, 1), scan_of)
        total = total + config.coordinate_weight * terms["coordinate"]
    if config.descriptor_weight > 0:
        terms["descriptor"] = _descriptor_loss(outputs["descriptor"].float(), mm, batch, lattice, network, config)
        total = total + config.descriptor_weight * terms["descriptor"]
    return Losses(total, terms, embeddings.detach(), centres, scan_of[chosen])


def _choose(scan_of: NDArray[np.int64], config: PretrainConfig, step: int) -> NDArray[np.int64]:
    """At most `patches_per_scan` patches of each scan, drawn without replacement."""
    rng = np.random.default_rng([config.seed, 2, step])
    shuffled = rng.permutation(len(scan_of))
    picks = [shuffled[scan_of[shuffled] == scan][: config.patches_per_scan] for scan in np.unique(scan_of)]
    return np.sort(np.concatenate(picks))


def _descriptor_loss(
    descriptors: torch.Tensor,
    mm: torch.Tensor,
    batch: Batch,
    lattice: NDArray[np.float64],
    network: Network,
    config: PretrainConfig,
) -> torch.Tensor:
    """InfoNCE between the two views of every crop; view two is interpolated at the places of view one.

    Negatives are all places of view two and of the second views of the scan's other crops.
    """
    losses = []
    edge = descriptors.shape[-1]
    for first in range(0, len(batch.images), 2):
        second = first + 1
        to_second = inverse(batch.affines[second]) @ batch.affines[first]
        at = (apply_affine(to_second, lattice) - lattice[0]) / network.stride  # (p, 3) in view two's lattice
        seen = ((at >= 0) & (at <= edge - 1)).all(axis=1)
        if not seen.any():
            continue
        shown = torch.tensor(seen, device=mm.device)
        grid = torch.tensor(at[seen] / (edge - 1) * 2 - 1, dtype=torch.float32, device=mm.device)
        unit = F.normalize(descriptors[second : second + 1], dim=1)
        positives = F.grid_sample(unit, grid.flip(-1)[None, :, None, None, :], align_corners=True)[0, :, :, 0, 0].T
        same_scan = np.flatnonzero(batch.scan_of == batch.scan_of[first])
        others = [view for view in same_scan if view % 2 and view != second]
        candidates = descriptors[[second, *others]].flatten(2).transpose(1, 2).flatten(0, 1)  # (m, d)
        losses.append(
            dense_infonce(
                descriptors[first].flatten(1).T[shown],
                positives,
                candidates,
                mm[first][shown],
                mm[[second, *others]].flatten(0, 1),
                ignore_mm=config.ignore_mm,
                temperature=config.temperature,
            )
        )
    return torch.stack(losses).mean() if losses else descriptors.sum() * 0.0
