"""Draw batches of views from a cohort: what a scan shows depends on the seed, the step and its place in the batch.

So the processes of a training draw a batch together, each its share of the scans, and every thread draws a step of
its own, ahead of the training, in any order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from isimed_index.blas import one_blas_thread
from isimed_index.config import PretrainConfig
from isimed_index.errors import UsageError
from isimed_index.limits import cores
from isimed_index.pretrain.cohort import Cohort, Source, TrainingScan
from isimed_index.pretrain.holes import disturbed
from isimed_index.pretrain.sharing import give_way
from isimed_index.pretrain.views import cut, random_pose, reach, recolour, view_affine
from isimed_index.space import Affine, apply_affine

__all__ = ["Batch", "Cohort", "Source", "batches", "draw", "scans_of"]

NEAR_MM = 40.0  # how far a near crop is centred from another at most
_HALF_PATCH_VOX = 16.0
_MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """Views of one step: images (v, 1, s, s, s), view voxel → mm (v, 4, 4), and the scan and the crop of each view.

    Views of one crop stand next to each other. The millimetres are the patient's own, or, for pairs across scans, those
    of the reference that all are registered to, or measured from each scan's foreground centroid. Scans and crops are
    numbered in the whole batch, of which a process may hold a share.
    """

    images: torch.Tensor
    affines: NDArray[np.float64]
    scan_of: NDArray[np.int64]
    crop_of: NDArray[np.int64]


def draw(cohort: Cohort, config: PretrainConfig, step: int, share: tuple[int, int] = (0, 1)) -> Batch:
    """The batch of one step, or what process `rank` of `world` draws of it, `share=(rank, world)`: every world-th scan.

    The scans of an epoch are a random permutation, so that every scan is seen.
    """
    rank, world = share
    if not 0 <= rank < world <= config.batch_scans:
        raise UsageError(
            f"expected a scan of each batch for each of {world} processes, found batch_scans {config.batch_scans}",
            next_step=f"set batch_scans to {world} or more, or start fewer processes",
        )
    numbers = scans_of(len(cohort), config, step)
    images, affines, scan_of, crop_of = [], [], [], []
    for place in range(rank, config.batch_scans, world):
        shown, to_mm = _views(cohort.scan(numbers[place]), config, np.random.default_rng([config.seed, 0, step, place]))
        images += shown
        affines += to_mm
        scan_of += [place] * len(shown)
        crop_of += np.repeat(
            place * config.crops_per_scan + np.arange(config.crops_per_scan), config.views_per_crop
        ).tolist()
    return Batch(torch.stack(images)[:, None], np.stack(affines), np.array(scan_of), np.array(crop_of))


def _views(
    scan: TrainingScan, config: PretrainConfig, rng: np.random.Generator
) -> tuple[list[torch.Tensor], list[Affine]]:
    """The views of one scan, those of a crop next to each other, and for each view voxel → mm."""
    a, side = config.augmentation, config.view_vox
    placed = []
    for centre in _centres(scan, config, rng):
        for _ in range(config.views_per_crop):
            pose = random_pose(rng, a)
            shift = rng.uniform(-a.shift_vox, a.shift_vox, 3) if config.views_per_crop == 2 else np.zeros(3)
            if (
                not shift.any()
            ):  # a side is even: centred between two voxels, a still view lies on voxels, as patches do
                shift = np.full(3, 0.5)
            placed.append(view_affine(centre + shift, pose, side))
    windows = scan.windows([reach(to_volume, side, scan.shape) for to_volume in placed])
    images = []
    for window, to_volume in zip(windows, placed, strict=True):
        view = recolour(cut(window, to_volume, side), rng, a)
        images.append(disturbed(view, rng, a, scan.background))
    to_mm = _to_mm(scan, config)
    return images, [to_mm @ to_volume for to_volume in placed]


def _to_mm(scan: TrainingScan, config: PretrainConfig) -> Affine:
    """Working voxel → the millimetres that distances are measured in."""
    if config.registered_to:
        assert scan.to_common is not None  # or distances across scans would mean nothing
        return scan.to_common @ scan.affine
    to_mm = scan.affine.copy()
    if config.pairs == "all":
        to_mm[:3, 3] -= apply_affine(scan.affine, scan.centroid_vox)
    return to_mm


def _centres(scan: TrainingScan, config: PretrainConfig, rng: np.random.Generator) -> NDArray[np.float64]:
    """Where the crops of a scan are centred, (crops, 3) voxels."""
    centres = np.empty((config.crops_per_scan, 3))
    for crop in range(config.crops_per_scan):
        if config.places == "box":
            centres[crop] = _in_box(scan, config.view_vox, rng)
            continue
        inside = scan.foreground_vox
        if crop and config.near_crops and rng.random() < config.near_crops:
            apart = (inside - centres[rng.integers(crop)]) @ scan.affine[:3, :3].T
            near = inside[np.square(apart).sum(axis=1) <= NEAR_MM**2]
            inside = near if len(near) else inside
        centres[crop] = inside[rng.integers(len(inside))]
        if config.border_probability and rng.random() < config.border_probability:
            towards = rng.normal(size=3)
            towards *= _HALF_PATCH_VOX * np.cbrt(rng.random()) / np.linalg.norm(towards)  # even within a ball
            centres[crop] = np.clip(np.rint(centres[crop] + towards), 0, np.array(scan.shape) - 1)
    return centres


def _in_box(scan: TrainingScan, side: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """The centre of a cube that lies inside the box of the foreground; in its middle where the box is too small."""
    first, after = scan.body_vox
    room = after - first - side
    start = first + np.where(room > 0, rng.integers(0, np.maximum(room, 0) + 1), room // 2)
    return np.asarray(start + side / 2 - 1)


def scans_of(scans: int, config: PretrainConfig, step: int) -> NDArray[np.int64]:
    """Which scans step `step` shows: consecutive pieces of one permutation after another."""
    first = step * config.batch_scans
    rounds = range(first // scans, (first + config.batch_scans - 1) // scans + 1)
    order = np.concatenate([np.random.default_rng([config.seed, 1, turn]).permutation(scans) for turn in rounds])
    start = first - rounds[0] * scans
    return order[start : start + config.batch_scans]


def batches(
    cohort: Cohort, config: PretrainConfig, steps: range, share: tuple[int, int] = (0, 1)
) -> Generator[Batch, None, None]:
    """The batches of `steps` in order, drawn ahead by `sampler_threads` background threads, one step each.

    An error while drawing is raised where its batch is asked for. Close the iterator (`contextlib.closing`) where it is
    not used up: steps that are being drawn are finished, others are not begun, and no thread is left. NumPy's products
    have one thread meanwhile: with more, they would wait for cores that the training has.
    """
    threads = config.sampler_threads or min(_MOST_THREADS, max(1, cores() // 2))
    ahead = threads + 1  # one is ready while every thread is at work
    pool = ThreadPoolExecutor(threads, thread_name_prefix="sampler", initializer=give_way)
    try:
        coming: deque[Future[Batch]] = deque()
        with one_blas_thread():
            for begun, _ in enumerate(steps):
                while len(coming) <= ahead and begun + len(coming) < len(steps):
                    coming.append(pool.submit(draw, cohort, config, steps[begun + len(coming)], share))
                yield coming.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
