"""A frame that all training scans share, without registration: a chart of each, by generalised Procrustes analysis.

    predicted ↔ true places of an epoch ─▶ moments of each scan ─▶ align ─▶ fit ─▶ centre ─▶ charts of the next epoch
                                                                  cohort   scan    mean = identity

The position head is taught offsets in each patient's own millimetres, in which size and pose of the bodies are noise:
it can only learn what they have in common. What it says of all places of one scan is therefore that scan in a frame of
the cohort, and the affine from the true places to what it says is the scan's chart, patient RAS+ mm → canonical mm.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from isimed_index.config import PretrainConfig
from isimed_index.consensus import robust_affine
from isimed_index.pretrain.objectives.precision import at_least_float32
from isimed_index.pretrain.sampler import Batch, scans_of
from isimed_index.pretrain.schedule import epoch_steps
from isimed_index.space import Affine, apply_affine, inverse

Array = NDArray[np.float64]

SCALE_MM = 24.0  # predictions much further from their scan's fit than this stop counting
RIDGE_MM = 20.0  # a chart leaves the identity in so far as the places of a visit spread further than this
KEPT = 0.8  # of what earlier visits said of a scan, when it is visited again: about five visits count
MOST = 0.5  # by which a chart moves a vector, as a part of its length: below 1 it can neither mirror nor flatten
MOST_OF_ALL = 0.8  # the same of what the head says of all scans together, or it cannot tell places yet


class Charts:
    """Charts of the training scans, (scans, 4, 4), and what the next ones are fitted from; 576 bytes a scan.

    Charts map the millimetres of a batch (patient RAS+ mm; with `pairs = "all"` from the scan's foreground centroid, or
    those of a reference) to canonical mm. Their mean is the identity, which is also the chart of a scan without one.
    """

    def __init__(self, config: PretrainConfig, scans: int) -> None:
        self.config = config
        self.affines: Array = np.tile(np.eye(4), (scans, 1, 1))
        self.fresh: Array = np.zeros((scans, 4, 7))  # moments Σ w (x, 1)(x, 1, p)ᵀ of this epoch, p as the head says it
        self.kept: Array = np.zeros((scans, 4, 7))  # those of the epochs before, p in canonical mm

    def carried(self, batch: Batch, step: int) -> Batch:
        """The whole batch of a step, its views in canonical mm."""
        own = self.affines[self._numbers(step)[batch.scan_of]]  # (v, 4, 4)
        return replace(batch, affines=own @ batch.affines)

    def take(self, positions: torch.Tensor, batch: Batch, lattice: Array, step: int) -> None:
        """Take in what the head says, (v, 3, i, j, k) mm, of the whole batch as it was drawn.

        Nothing is taken before epoch `charts_after`. `lattice` (p, 3) are patch centres in view voxels.
        """
        if step < (self.config.charts_after - 1) * epoch_steps(self.config, len(self.affines)):
            return
        said = at_least_float32(positions.detach()).flatten(2).transpose(1, 2).cpu().numpy().astype(np.float64)
        at = np.stack([apply_affine(affine, lattice) for affine in batch.affines])  # (v, p, 3)
        numbers = self._numbers(step)
        for place in np.unique(batch.scan_of):
            views = batch.scan_of == place
            self.fresh[numbers[place]] += _moments(at[views].reshape(-1, 3), said[views].reshape(-1, 3))

    def refit(self) -> dict[str, float]:
        """Fit the charts again from what was taken since the last time; empty when that is nothing.

        Returns how many scans have a chart, by how much the entries of their linear parts differ from the identity's
        (root mean square), and by how much they changed. While the head cannot tell places all charts stay.
        """
        seen = self.fresh[:, 3, 3] > 0
        if not seen.any():
            return {}
        before = self.affines.copy()
        known = seen & (self.kept[:, 3, 3] > 0)
        by = known if known.any() else seen  # where a scan without a chart lies in the frame is not known
        told = _told(self.fresh[by], self.affines[by])
        if np.linalg.norm(told[:3, :3] - np.eye(3), 2) <= MOST_OF_ALL:
            self.kept[seen] = KEPT * self.kept[seen] + _moved(self.fresh[seen], inverse(told))
            fitted = self.kept[:, 3, 3] > 0
            affines = _fitted(self.kept[fitted])
            back = inverse(affines.mean(axis=0))
            self.affines[fitted] = back @ affines
            self.kept = _moved(self.kept, back)
        self.fresh[:] = 0
        rows, linear = self.kept[:, 3, 3] > 0, self.affines[:, :3, :3]
        return {
            "charts": float(rows.sum()),
            "chart_deviation": _rms(linear[rows] - np.eye(3)),
            "chart_change": _rms(linear[rows] - before[rows, :3, :3]),
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that the charts are, for a checkpoint."""
        return {name: torch.from_numpy(getattr(self, name).copy()) for name in ("affines", "fresh", "kept")}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what `tensors` gave; `KeyError` or `ValueError` when it is of other scans."""
        for name, own in self.tensors().items():
            if tensors[name].shape != own.shape:
                raise ValueError(f"expected {name} of shape {tuple(own.shape)}, found {tuple(tensors[name].shape)}")
            setattr(self, name, tensors[name].numpy().copy())

    def _numbers(self, step: int) -> NDArray[np.int64]:
        return scans_of(len(self.affines), self.config, step)


def _moments(x: Array, p: Array) -> Array:
    """Weighted moments (4, 7) of places x and predictions p, (n, 3) mm, of one visit to a scan.

    The weight of a prediction falls with its distance from the robust affine of the visit (Geman–McClure); their sum is
    1 at most.
    """
    trust = np.full(len(x), 1 / len(x))
    fit = robust_affine(x, p, trust, prior=np.eye(4), ridge=RIDGE_MM**2, scale_mm=SCALE_MM)
    away = np.linalg.norm(apply_affine(fit, x) - p, axis=1)
    weight = trust / (1 + (away / SCALE_MM) ** 2) ** 2
    one = np.c_[x, np.ones(len(x))]
    return np.asarray((one * weight[:, None]).T @ np.c_[one, p])


def _moved(moments: Array, affine: Affine) -> Array:
    """The moments (…, 4, 7) when an affine is applied to every p."""
    said = moments[..., 4:] @ affine[:3, :3].T + moments[..., 3:4] * affine[:3, 3]
    return np.concatenate([moments[..., :4], said], axis=-1)


def _about_means(moments: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Of moments (s, 4, 7): weights (s, 1), means of x and p (s, 3), second moments about them of x and x, x and p."""
    weight = moments[:, 3, 3, None]
    x, p = moments[:, 3, :3] / weight, moments[:, 3, 4:] / weight
    outer = (weight * x)[:, :, None]
    return weight, x, p, moments[:, :3, :3] - outer * x[:, None], moments[:, :3, 4:] - outer * p[:, None]


def _told(moments: Array, charts: Array) -> Affine:
    """How the head tells canonical places: the affine of least squares from those of the charts to what it says.

    It is one for all scans, fitted to the spread within each. What a head says shrinks towards the middle, for it is
    not certain; charts that were fitted to that would shrink again in every round, and the frame to a point.
    """
    weight, x, p, xx, xp = _about_means(moments)
    turn = charts[:, :3, :3]
    y = (turn @ x[:, :, None])[:, :, 0] + charts[:, :3, 3]
    square, product = (turn @ xx @ turn.transpose(0, 2, 1)).sum(axis=0), (turn @ xp).sum(axis=0)
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.lstsq(square, product, rcond=None)[0].T
    affine[:3, 3] = (weight * (p - y @ affine[:3, :3].T)).sum(axis=0) / weight.sum()
    return affine


def _fitted(moments: Array) -> Array:
    """The affines (s, 4, 4) from x to p of moments (s, 4, 7), with a ridge towards the identity, and clamped."""
    _, x, p, xx, xp = _about_means(moments)
    away = np.linalg.solve(xx + RIDGE_MM**2 * np.eye(3), xp - xx).transpose(0, 2, 1)  # from the identity
    most = np.linalg.norm(away, 2, axis=(1, 2))
    linear = np.eye(3) + away * np.minimum(1, MOST / np.maximum(most, MOST))[:, None, None]
    affines = np.tile(np.eye(4), (len(x), 1, 1))
    affines[:, :3, :3] = linear
    affines[:, :3, 3] = p - (linear @ x[:, :, None])[:, :, 0]
    return affines


def _rms(values: Array) -> float:
    return float(np.sqrt(np.square(values).mean())) if values.size else 0.0
