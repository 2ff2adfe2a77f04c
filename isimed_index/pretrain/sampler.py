"""Draw batches of views from a cohort; the batch of a step depends on the seed and the step alone."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from isimed_index.config import PretrainConfig
from isimed_index.errors import UsageError
from isimed_index.pretrain.views import WorkingVolume, cut, random_pose, recolour, view_affine
from isimed_index.scans.prepare import Volume
from isimed_index.space import apply_affine

Source = Callable[[], Volume]  # reads and prepares one scan
_GIB = 2**30
_JITTER_VOX = 4.0  # how far the two views of a place are shifted against each other


@dataclass(frozen=True, slots=True)
class Batch:
    """Views of one step: images (v, 1, s, s, s), view voxel → mm (v, 4, 4), and the scan and the crop of each view.

    Views of one crop stand next to each other. The millimetres are the patient's own, or, for pairs across scans,
    measured from each scan's foreground centroid.
    """

    images: torch.Tensor
    affines: NDArray[np.float64]
    scan_of: NDArray[np.int64]
    crop_of: NDArray[np.int64]


class Cohort:
    """The training scans, prepared when first needed and kept in memory up to a budget."""

    def __init__(self, sources: Sequence[Source], budget_bytes: int) -> None:
        if not sources:
            raise UsageError("there is no scan to train on", next_step="isimed add PATH, or widen --where")
        self._sources = sources
        self._budget = budget_bytes
        self._kept: OrderedDict[int, WorkingVolume] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._sources)

    def volume(self, number: int) -> WorkingVolume:
        """The working volume of one scan, values as float16."""
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        prepared = self._sources[number]()
        foreground = np.argwhere(prepared.foreground).astype(np.int16)
        if not len(foreground):  # a scan without contrast: views are centred anywhere
            foreground = np.argwhere(np.ones_like(prepared.foreground)).astype(np.int16)
        volume = WorkingVolume(
            torch.tensor(prepared.values, dtype=torch.float16), prepared.affine, prepared.background, foreground
        )
        self._kept[number] = volume
        self._bytes += _size(volume)
        while self._bytes > self._budget and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return volume


def _size(volume: WorkingVolume) -> int:
    return volume.values.numel() * 2 + volume.foreground_vox.nbytes


def draw(cohort: Cohort, config: PretrainConfig, step: int) -> Batch:
    """The batch of one step; the scans of an epoch are a random permutation, so that every scan is seen."""
    rng = np.random.default_rng([config.seed, 0, step])
    images, affines, scan_of, crop_of = [], [], [], []
    for place, number in enumerate(_scans_of(len(cohort), config, step)):
        volume = cohort.volume(number)
        to_mm = volume.affine.copy()
        if config.pairs == "all":
            to_mm[:3, 3] -= apply_affine(volume.affine, volume.foreground_vox.mean(axis=0))
        for crop in range(config.crops_per_scan):
            centre = volume.foreground_vox[rng.integers(len(volume.foreground_vox))].astype(np.float64)
            for _ in range(config.views_per_crop):
                pose = random_pose(rng, config.augmentation)
                # A view has an even number of voxels: centred between two, a still one lies on voxels, as patches do.
                shift = rng.uniform(-_JITTER_VOX, _JITTER_VOX, 3) if config.views_per_crop == 2 else np.full(3, 0.5)
                view = cut(volume, centre + shift, pose, config.view_vox)
                images.append(recolour(view, rng, config.augmentation))
                affines.append(to_mm @ view_affine(centre + shift, pose, config.view_vox))
                scan_of.append(place)
                crop_of.append(place * config.crops_per_scan + crop)
    return Batch(torch.stack(images)[:, None], np.stack(affines), np.array(scan_of), np.array(crop_of))


def _scans_of(scans: int, config: PretrainConfig, step: int) -> NDArray[np.int64]:
    """Which scans step `step` shows: consecutive pieces of one permutation after another."""
    first = step * config.batch_scans
    rounds = range(first // scans, (first + config.batch_scans - 1) // scans + 1)
    order = np.concatenate([np.random.default_rng([config.seed, 1, turn]).permutation(scans) for turn in rounds])
    start = first - rounds[0] * scans
    return order[start : start + config.batch_scans]


def batches(cohort: Cohort, config: PretrainConfig, steps: range) -> Iterator[Batch]:
    """The batches of `steps`, each drawn in a background thread while the one before is learned from."""
    with ThreadPoolExecutor(1, thread_name_prefix="sampler") as pool:
        coming = deque(pool.submit(draw, cohort, config, step) for step in steps[:1])
        for step in steps:
            batch = coming.popleft().result()
            if step + 1 in steps:
                coming.append(pool.submit(draw, cohort, config, step + 1))
            yield batch
