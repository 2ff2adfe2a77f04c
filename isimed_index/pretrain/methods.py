"""The training methods: from a network's outputs on a batch to the loss that is minimised.

                    ┌ isimed       embedding ▶ distances  +  position ▶ offsets  +  descriptor ▶ dense InfoNCE
                    ├ barlowtwins  embedding of views 1 and 2 ▶ cross-correlation
  views ▶ network ▶ ┼ simclr       embedding of views 1 and 2 ▶ NT-Xent
                    ├ regisimed    embedding ▶ linear 512 ▶ distances  +  linear 2048 ▶ cross-correlation
                    └ coordinate   embedding ▶ linear 3 ▶ coordinates  (and position ▶ coordinates)

A network that slides over a view wider than its patch gives a map of outputs, one for each patch of a lattice, and all
of them count. The two-view methods pair *places*: view two's map is read off, by interpolation, at the places of view
one, for the views differ in pose; places that view two does not show are left out. A map of one patch has nothing to
interpolate: the two views of a crop are a pair as they are, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from isimed_index.config import PretrainConfig
from isimed_index.contracts import Metric
from isimed_index.encoders.networks import MM_PER_POSITION_UNIT, Network, Outputs
from isimed_index.pretrain.objectives.barlowtwins import barlowtwins_loss
from isimed_index.pretrain.objectives.coordinate import coordinate_loss, offset_loss
from isimed_index.pretrain.objectives.descriptor import dense_infonce
from isimed_index.pretrain.objectives.isimed import distance_loss
from isimed_index.pretrain.objectives.precision import at_least_float32
from isimed_index.pretrain.objectives.regisimed import regisimed_loss
from isimed_index.pretrain.objectives.simclr import simclr_loss
from isimed_index.pretrain.sampler import Batch
from isimed_index.space import apply_affine, inverse

DISTANCE_HEAD = 512  # ISImed, §2.1.1; linear, so neither is a projector head
REDUNDANCY_HEAD = 2048
_ROUNDING = 1e-6  # of a lattice step: views of one pose show each other's outermost places


@dataclass(frozen=True, slots=True)
class Losses:
    """The weighted sum that is minimised, each term by name, and what the monitor looks at."""

    total: torch.Tensor
    terms: dict[str, torch.Tensor]
    embeddings: torch.Tensor  # (n, d), of patches that the method saw, as the encoder will give them
    centres_mm: torch.Tensor  # (n, 3)
    scan_of: torch.Tensor  # (n,)


def outputs_of(config: PretrainConfig) -> dict[str, int]:
    """The outputs of an encoder that `config` trains, name → dimension; the method has a loss for each of them."""
    outputs = {"embedding": config.embedding_dim}
    if config.network == "densenet121":
        return outputs
    joint = config.method == "isimed"
    if config.method == "coordinate" or (joint and config.coordinate_weight > 0):
        outputs["position"] = 3
    if joint and config.descriptor_weight > 0:
        outputs["descriptor"] = config.descriptor_dim
    return outputs


def metric_of(config: PretrainConfig) -> Metric:
    """How vectors of the output that matches are searched in are compared: as the method compared them."""
    angles = config.method in ("simclr", "barlowtwins") or "descriptor" in outputs_of(config)
    return "cosine" if angles else "l2"


def view_lattice(network: Network, side: int) -> NDArray[np.float64]:
    """Centres (p, 3), in view voxels, of the patches that one pass over a view of `side` voxels encodes."""
    axis = np.arange((side - network.patch) // network.stride + 1) * network.stride + (network.patch - 1) / 2
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


def build_method(config: PretrainConfig, network: Network) -> Method:
    """The method that `config` names, for the outputs of `network`; layers of its own are drawn from torch's stream."""
    own: dict[str, nn.Module] = {}
    if config.method == "regisimed":
        own["distance"] = nn.Linear(config.embedding_dim, DISTANCE_HEAD)
        own["redundancy"] = nn.Linear(config.embedding_dim, REDUNDANCY_HEAD)
    if config.method == "coordinate":
        own["coordinate"] = nn.Linear(config.embedding_dim, 3)
    method = Method(config, view_lattice(network, config.view_vox), network.stride, own)
    return method.to(next(network.parameters()).device)


class Method(nn.Module):
    """A training method: outputs of a batch → losses. Its own layers are trained, but not stored with the encoder."""

    def __init__(
        self, config: PretrainConfig, lattice: NDArray[np.float64], stride: int, layers: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.config = config
        self.lattice = lattice  # (p, 3) patch centres, view voxels
        self.stride = stride
        self.layers = nn.ModuleDict(layers)

    def forward(self, outputs: Outputs, batch: Batch, step: int) -> Losses:
        """Losses of the maps (v, dim, i, j, k) of all views of a batch, in float32 at least.

        Of the batch, affines and the scan of each view are used, its images are not. `step` decides which patches are
        chosen where there are more than `patches_per_scan`.
        """
        with torch.autocast(outputs["embedding"].device.type, enabled=False):
            maps = {name: at_least_float32(y) for name, y in outputs.items()}
            views = _Views(maps, batch, self.lattice, self.stride, self.config, step)
            losses = _LOSSES[self.config.method](views, self.layers)
        return replace(losses, embeddings=losses.embeddings.detach())


class _Views:
    """A batch's maps, where in the patients their patches lie, and which places two views share."""

    def __init__(
        self, maps: Outputs, batch: Batch, lattice: NDArray[np.float64], stride: int, config: PretrainConfig, step: int
    ) -> None:
        self.maps = maps  # (v, dim, i, j, k)
        self.batch = batch
        self.lattice = lattice
        self.stride = stride
        self.config = config
        self.step = step
        like = maps["embedding"]
        places = np.stack([apply_affine(affine, lattice) for affine in batch.affines])
        self.mm = torch.tensor(places, dtype=like.dtype, device=like.device)  # (v, p, 3)
        self.scan_of = torch.tensor(np.repeat(batch.scan_of, len(lattice)), device=like.device)  # (v·p,)

    def flat(self, name: str) -> torch.Tensor:
        """An output as (v·p, dim), patches of a view next to each other."""
        return _flat(self.maps[name]).flatten(0, 1)

    def sample(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings (n, d), centres (n, 3) mm and scans (n,) of at most `patches_per_scan` patches of each scan."""
        chosen = self._choose(self.scan_of)
        return self.flat("embedding")[chosen], self.mm.flatten(0, 1)[chosen], self.scan_of[chosen]

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings of the same places in first and second views (n, d) twice, and which places they are (n,).

        There are at most `patches_per_scan` places of each scan. `places` says where they lie.
        """
        two, seen = self.second(self.maps["embedding"])
        rows = torch.tensor(np.flatnonzero(seen), device=two.device)
        rows = rows[self._choose(self._scan_of_first()[rows])]
        one = _flat(self.maps["embedding"][::2]).flatten(0, 1)
        return one[rows], two.flatten(0, 1)[rows], rows

    def places(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres (2n, 3) mm and scans (2n,) of what `pairs` found: n in first views, then n in second views.

        Maps are interpolated at the first views' places. A map of one patch is not: its view may lie elsewhere.
        """
        apart = int(self.maps["embedding"].shape[-1] == 1)
        mm = torch.cat([self.mm[view::2].flatten(0, 1)[rows] for view in (0, apart)])
        scan_of = self._scan_of_first()[rows]
        return mm, torch.cat([scan_of, scan_of])

    def _scan_of_first(self) -> torch.Tensor:
        """(v/2·p,) of the patches of first views."""
        return self.scan_of.reshape(-1, 2, len(self.lattice))[:, 0].flatten()

    def second(self, maps: torch.Tensor) -> tuple[torch.Tensor, NDArray[np.bool_]]:
        """Second views' maps (of v, d, i, j, k) at the places of the first (v/2, p, d), and whether they show them.

        A map of one patch stands for its view, wherever the other view lies.
        """
        edge = maps.shape[-1]
        if edge == 1:
            return _flat(maps[1::2]), np.ones((len(maps) // 2, 1), bool)
        affines = zip(self.batch.affines[::2], self.batch.affines[1::2], strict=True)
        places = np.stack([apply_affine(inverse(second) @ first, self.lattice) for first, second in affines])
        at = (places - self.lattice[0]) / self.stride  # (v/2, p, 3) in view two's lattice
        seen = ((at >= -_ROUNDING) & (at <= edge - 1 + _ROUNDING)).all(axis=-1)
        grid = torch.tensor(at / (edge - 1) * 2 - 1, dtype=maps.dtype, device=maps.device)
        grid = grid.flip(-1)[:, :, None, None, :]  # it wants (z, y, x)
        values = F.grid_sample(maps[1::2], grid, padding_mode="border", align_corners=True)  # (v/2, d, p, 1, 1)
        return values[:, :, :, 0, 0].transpose(1, 2), seen

    def _choose(self, scan_of: torch.Tensor) -> torch.Tensor:
        """Rows of at most `patches_per_scan` of each scan, drawn without replacement."""
        scans = scan_of.cpu().numpy()
        shuffled = np.random.default_rng([self.config.seed, 2, self.step]).permutation(len(scans))
        most = self.config.patches_per_scan
        picks = [shuffled[scans[shuffled] == scan][:most] for scan in np.unique(scans)]
        chosen = np.sort(np.concatenate(picks)) if picks else shuffled
        return torch.tensor(chosen, device=scan_of.device)


def _flat(maps: torch.Tensor) -> torch.Tensor:
    """(v, d, i, j, k) → (v, p, d)."""
    return maps.flatten(2).transpose(1, 2)


def _isimed(views: _Views, layers: nn.ModuleDict) -> Losses:
    config, seen = views.config, views.sample()
    terms = {"distance": _distance_loss(*seen, config)}
    total = config.distance_weight * terms["distance"]
    if config.coordinate_weight > 0:
        terms["coordinate"] = offset_loss(views.flat("position"), views.mm.flatten(0, 1), views.scan_of)
        total = total + config.coordinate_weight * terms["coordinate"]
    if config.descriptor_weight > 0:
        terms["descriptor"] = _descriptor_loss(views)
        total = total + config.descriptor_weight * terms["descriptor"]
    return Losses(total, terms, *seen)


def _distance_loss(
    embeddings: torch.Tensor, centres_mm: torch.Tensor, scan_of: torch.Tensor, config: PretrainConfig
) -> torch.Tensor:
    return distance_loss(
        embeddings,
        centres_mm,
        scan_of,
        pairs=config.pairs,
        unit_mm=config.unit_mm,
        near_mm=config.near_mm or None,
        huber=config.huber or None,
    )


def _descriptor_loss(views: _Views) -> torch.Tensor:
    """InfoNCE between the two views of every crop; negatives are all places of the scan's second views."""
    descriptors, batch = views.maps["descriptor"], views.batch
    positives, seen = views.second(F.normalize(descriptors, dim=1))
    losses = []
    for crop in np.flatnonzero(seen.any(axis=1)):
        first = 2 * int(crop)
        shown = torch.tensor(seen[crop], device=descriptors.device)
        second = [int(view) for view in np.flatnonzero(batch.scan_of == batch.scan_of[first]) if view % 2]
        losses.append(
            dense_infonce(
                descriptors[first].flatten(1).T[shown],
                positives[crop][shown],
                descriptors[second].flatten(2).transpose(1, 2).flatten(0, 1),
                views.mm[first][shown],
                views.mm[second].flatten(0, 1),
                ignore_mm=views.config.ignore_mm,
                temperature=views.config.descriptor_temperature,
            )
        )
    return torch.stack(losses).mean() if losses else descriptors.sum() * 0.0


def _coordinate(views: _Views, layers: nn.ModuleDict) -> Losses:
    """The embedding is read out by a linear layer; a network that tells positions is held to them as well."""
    config, mm = views.config, views.mm.flatten(0, 1)
    readings = {"read_out": layers["coordinate"](views.flat("embedding")) * MM_PER_POSITION_UNIT}
    if "position" in views.maps:
        readings["coordinate"] = views.flat("position")
    terms = {}
    for name, positions in readings.items():
        if config.pairs == "within":
            terms[name] = offset_loss(positions, mm, views.scan_of, unit_mm=config.unit_mm)
        else:
            terms[name] = coordinate_loss(positions, mm, unit_mm=config.unit_mm, huber=config.huber or None)
    return Losses(torch.stack(list(terms.values())).sum(), terms, *views.sample())


def _barlowtwins(views: _Views, layers: nn.ModuleDict) -> Losses:
    one, two, _ = views.pairs()
    loss = barlowtwins_loss(one, two, redundancy_weight=views.config.redundancy_weight)
    return Losses(loss, {"barlowtwins": loss}, *views.sample())


def _simclr(views: _Views, layers: nn.ModuleDict) -> Losses:
    one, two, _ = views.pairs()
    loss = simclr_loss(one, two, temperature=views.config.simclr_temperature)
    return Losses(loss, {"simclr": loss}, *views.sample())


def _regisimed(views: _Views, layers: nn.ModuleDict) -> Losses:
    config = views.config
    one, two, rows = views.pairs()
    distance, redundancy = layers["distance"], layers["redundancy"]
    total, terms = regisimed_loss(
        torch.cat([distance(one), distance(two)]),
        *views.places(rows),
        redundancy(one),
        redundancy(two),
        barlowtwins_weight=config.barlowtwins_weight,
        redundancy_weight=config.redundancy_weight,
        pairs=config.pairs,
        unit_mm=config.unit_mm,
        near_mm=config.near_mm or None,
        huber=config.huber or None,
    )
    return Losses(total, terms, *views.sample())


_LOSSES: dict[str, Callable[[_Views, nn.ModuleDict], Losses]] = {
    "isimed": _isimed,
    "barlowtwins": _barlowtwins,
    "simclr": _simclr,
    "regisimed": _regisimed,
    "coordinate": _coordinate,
}
