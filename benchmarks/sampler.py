"""How much of a training's speed the sampler leaves: real batches against random tensors that lie in memory.

Both trainings have the same network, method, optimiser, batch and precision; rounds of both are interleaved, so that
other load falls on both alike. A share of 1 means that training never waits, 0.85 is the aim.

    GOMP_SPINCOUNT=1000 python benchmarks/sampler.py [--presets tiny,default,paper] [--steps N] [--rounds N]
        [--out FILE.json]

`memory`: every prepared scan is kept; `store`: none is, so that each step reads boxes of the store. `cpu_share` is the
same ratio of processor seconds: what remains of the speed where training keeps every core busy, whatever else runs.
The spin count is what `isimed pretrain` sets before PyTorch is loaded (`isimed_index.pretrain.threads`).
`paper` is the paper's network and views of Barlow Twins, but 4 scans of 16 patches a step instead of 64 of 16. With
`--images FOLDER` (NIfTI files) their voxels are used instead of ellipsoid heads of 1.5 mm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from isimed_index.config import PretrainConfig, pretrain_config
from isimed_index.encoders.networks import build_network
from isimed_index.pretrain.forward import in_half
from isimed_index.pretrain.methods import build_method
from isimed_index.pretrain.reading import StoredSource, working_voxels
from isimed_index.pretrain.sampler import Batch, Cohort, batches, draw
from isimed_index.pretrain.trainer import intensity_of, new_card
from isimed_index.scans.chunks import open_chunks, write_chunks
from isimed_index.scans.read import read_scan
from isimed_index.scans.scan import Scan
from isimed_index.space import spacing_mm
from isimed_index.testing.templates import ellipsoid_head

SCANS = 8
CASES = ("random", "memory", "store")


def setup_of(preset: str) -> PretrainConfig:
    """The preset; the paper's with the views of the contrastive methods, and fewer scans a step."""
    config = pretrain_config(preset)
    if preset != "paper":
        return config
    views = replace(config.augmentation, holes=True, shuffle_probability=0.8)
    return replace(
        config, method="barlowtwins", views_per_crop=2, batch_scans=4, patches_per_scan=16, augmentation=views
    )


def stored_scans(folder: Path, images: Path | None) -> list[Path]:
    """Zarr groups of scans, in the page cache after they were written."""
    made = []
    files = [] if images is None else sorted(images.glob("*.nii*"))[:SCANS]
    for number in range(len(files) or SCANS):
        if files:
            scan = read_scan(files[number], f"scan-{number}")
        else:
            head = ellipsoid_head(1.5)
            noise = np.random.default_rng(number).normal(scale=0.02, size=head.values.shape)
            scan = Scan(f"head-{number}", np.rint((head.values + noise) * 1000).astype(np.int16), head.affine)
        directory = folder / f"{number}.zarr"
        directory.mkdir()
        write_chunks(scan, None, directory)
        made.append(directory)
    return made


def cohort_of(stored: list[Path], config: PretrainConfig, budget: int) -> Cohort:
    """The scans, all prepared once, so that what is measured is the steady state."""
    sources = []
    for directory in stored:
        scan = open_chunks(directory)
        voxels = working_voxels(scan.shape, spacing_mm(scan.affine).tolist(), config.spacing_mm)
        sources.append(StoredSource(partial(open_chunks, directory), config.spacing_mm, intensity_of(config), voxels))
    cohort = Cohort(sources, budget)
    for number in range(len(cohort)):
        cohort.scan(number)
    return cohort


class Training:
    """The steps of a training without its records: forward, loss, backward, optimiser."""

    def __init__(self, config: PretrainConfig, preset: str, device: torch.device) -> None:
        card = new_card(config, "benchmark", preset)
        torch.manual_seed(0)
        self.network = build_network(card.factory, card.outputs, card.network).to(device)
        self.method = build_method(config, self.network)
        self.network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        learned = [*self.network.parameters(), *self.method.parameters()]
        self.optimiser = torch.optim.AdamW(learned, config.learning_rate)
        self.device, self.half = device, in_half(config, device)

    def step(self, batch: Batch, number: int) -> None:
        images = batch.images.to(self.device, memory_format=torch.channels_last_3d)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            outputs = self.network(images)
        loss = self.method(outputs, batch, number).total
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        float(loss.detach())  # wait for the device, as the trainer does to show the loss


def seconds_a_step(training: Training, coming: Iterator[Batch], steps: int) -> tuple[float, float]:
    """By the clock and of the processors, of `steps` steps after a first one, which fills the queue of batches."""
    training.step(next(coming), 0)
    began, worked = time.perf_counter(), time.process_time()
    for number in range(1, steps + 1):
        training.step(next(coming), number)
    return (time.perf_counter() - began) / steps, (time.process_time() - worked) / steps


class Utilisation:
    """The GPU's utilisation in percent, asked of nvidia-smi five times a second; empty without one."""

    def __enter__(self) -> list[float]:
        self.seen: list[float] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        if torch.cuda.is_available() and shutil.which("nvidia-smi"):
            self.thread.start()
        return self.seen

    def __exit__(self, *error: object) -> None:
        self.over.set()
        if self.thread.ident is not None:
            self.thread.join()

    def _watch(self) -> None:
        ask = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        while not self.over.wait(0.2):
            self.seen.append(float(subprocess.run(ask, capture_output=True, text=True).stdout.split()[0]))


def measure(preset: str, stored: list[Path], steps: int, rounds: int, device: torch.device) -> dict[str, object]:
    """Medians over rounds for one preset."""
    config = setup_of(preset)
    training = Training(config, preset, device)
    cohorts = {"memory": cohort_of(stored, config, 2**40), "store": cohort_of(stored, config, 0)}
    shown = draw(cohorts["memory"], config, 0)
    fixed = replace(shown, images=torch.randn_like(shown.images))
    seconds: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
    busy: dict[str, list[float]] = {case: [] for case in CASES}
    training.step(fixed, 0)
    for _ in range(rounds):
        for case in CASES:
            with Utilisation() as seen:
                if case == "random":
                    seconds[case].append(seconds_a_step(training, repeat(fixed), steps))
                else:
                    with closing(batches(cohorts[case], config, range(10**6))) as coming:  # drawn ahead to the end
                        seconds[case].append(seconds_a_step(training, coming, steps))
            busy[case] += seen
    began = time.thread_time()
    for step in range(2):
        draw(cohorts["memory"], config, step)
    drawing = (time.thread_time() - began) / 2
    # Each round's own ratio: what else runs on the machine changes from round to round.
    ratios = {case: np.array(seconds["random"]) / np.array(seconds[case]) for case in CASES[1:]}  # (rounds, 2)
    return {
        "views_a_step": len(fixed.images),
        "view_vox": config.view_vox,
        "seconds_a_step": {case: round(float(np.median(times, axis=0)[0]), 4) for case, times in seconds.items()},
        "share": {case: round(float(np.median(found[:, 0])), 3) for case, found in ratios.items()},
        "share_of_each_round": {case: found[:, 0].round(3).tolist() for case, found in ratios.items()},
        "cpu_share": {case: round(float(np.median(found[:, 1])), 3) for case, found in ratios.items()},
        "seconds_to_draw_a_step_with_one_thread": round(drawing, 4),
        "gpu_utilisation_percent": {case: statistics.mean(seen) for case, seen in busy.items() if seen},
    }


def main() -> int:
    """Print a line a preset, and write JSON where `--out` says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", default="tiny,default,paper")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=Path, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    device = torch.device(options.device)
    found: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "spin_count": os.environ.get("GOMP_SPINCOUNT"),
        "torch": torch.__version__,
        "steps": options.steps,
        "rounds": options.rounds,
    }
    with tempfile.TemporaryDirectory() as folder:
        stored = stored_scans(Path(folder), options.images)
        found["scans"] = [list(open_chunks(directory).shape) for directory in stored]
        for preset in options.presets.split(","):
            found[preset] = measure(preset, stored, options.steps, options.rounds, device)
            print(preset, json.dumps(found[preset]), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
