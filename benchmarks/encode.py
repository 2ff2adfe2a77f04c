"""What `isimed index` leaves of an encoder's own speed: zarr on disk → committed segments, against bare forward passes.

    python benchmarks/encode.py [--networks tiny,default,densenet] [--scans N] [--runtime auto] [--out FILE.json]

`forward` runs the network of the chosen runtime on the very arrays that encoding hands to it, which lie in memory, on a
GPU in the GPU's: the ceiling. `index` is what the command's progress shows as encoding: read, prepare, lay patches,
encode, write, commit. Rounds of both are interleaved; `share` is the median of each round's forward seconds over its
index seconds. The aim is 0.9. `cpu_share` is the same ratio of processor seconds, which other programs on the machine
disturb less.

Scans are ellipsoid heads of `--spacing` with noise, or with `--images FOLDER` the NIfTI files there; random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray

import isimed_index as isi
from isimed_index.config import pretrain_config
from isimed_index.encode import encode_volume, prepared
from isimed_index.encoders.card import read_card
from isimed_index.encoders.networks import build_network
from isimed_index.encoders.runtime import NetworkEncoder, load_encoder, write_encoder
from isimed_index.encoders.runtimes.by_torch import TorchRun
from isimed_index.encoders.runtimes.checked import Checked
from isimed_index.encoders.runtimes.kind import Maps, Runtime
from isimed_index.encoders.runtimes.trial import Job, choose
from isimed_index.pretrain.trainer import new_card
from isimed_index.progress import Silent
from isimed_index.scans.chunks import open_chunks
from isimed_index.scans.prepare import Intensity
from isimed_index.store.repository import Repository
from isimed_index.testing.templates import ellipsoid_head

DENSENET = "isimed_index.encoders.networks:PatchDenseNet121"
STRIDES_MM = {"densenet": 16.0}  # patch by patch, a lattice as dense as that of the others would take an hour


class Stopwatch(Silent):
    """Seconds, and processor seconds, of the encoding alone: without the trial before it and the index after it."""

    def __init__(self) -> None:
        self.task, self.seconds, self.cpu_seconds = "", 0.0, 0.0

    def start(self, task: str, total: int | None, unit: str) -> None:
        self.task, self._began, self._worked = task, time.perf_counter(), cpu_seconds()

    def finish(self) -> None:
        if self.task == "encode":
            self.seconds, self.cpu_seconds = time.perf_counter() - self._began, cpu_seconds() - self._worked


class Handed:
    """Keeps what a runtime is handed."""

    def __init__(self, encoder: NetworkEncoder) -> None:
        self.run, self.arrays = encoder._run, list[NDArray[np.float32]]()
        encoder._run = self

    def __call__(self, values: NDArray[np.float32]) -> Maps:
        self.arrays.append(values.copy())
        return self.run(values)


def cpu_seconds() -> float:
    """Of this process and those of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def made_store(place: Path, images: Path | None, scans: int, spacing_mm: float) -> Path:
    """A store of heads."""
    folder = place / "heads"
    folder.mkdir()
    for number in range(0 if images else scans):
        head = ellipsoid_head(spacing_mm)
        noise = np.random.default_rng(number).normal(scale=0.02, size=head.values.shape)
        nibabel.save(
            nibabel.Nifti1Image(np.rint((head.values + noise) * 1000).astype(np.int16), head.affine),
            folder / f"head-{number:03}.nii.gz",
        )
    files = sorted((images or folder).glob("*.nii*"))[:scans]
    store = isi.create(place / "heads.isimed")
    store.add(files)
    return place / "heads.isimed"


def kept_encoder(folder: Path, network: str) -> Path:
    """An encoder of random weights: a preset's, or the paper's network."""
    folder.mkdir()
    torch.manual_seed(0)
    preset = "default" if network == "densenet" else network
    card = new_card(pretrain_config(preset), network, preset)
    if network == "densenet":
        outputs = {"embedding": 1024}
        card = replace(card, factory=DENSENET, network={}, outputs=outputs, match_output="embedding")
    card = replace(card, intensity=Intensity())
    write_encoder(folder, card, build_network(card.factory, card.outputs, card.network).state_dict())
    return folder


def handed_arrays(encoder: NetworkEncoder, store: Path, stride_vox: int) -> tuple[list[NDArray[np.float32]], int]:
    """What encoding one scan after the other hands to the network, and how many patches that are."""
    handed, patches = Handed(encoder), 0
    head = Repository.open(store).snapshot()
    for scan in isi.open(store).scans().column("scan").to_pylist():
        stored = open_chunks(head.chunks_path(scan))
        volume = prepared(stored.values(), stored.affine, encoder.card)
        patches += len(encode_volume(encoder, volume, stride_vox)[1])
    encoder._run = handed.run
    return handed.arrays, patches


def bare_passes(encoder: NetworkEncoder, arrays: list[NDArray[np.float32]], device: str) -> Callable[[], None]:
    """What runs the network on all arrays; arrays and results of a GPU stay on it, and it is waited for."""
    run = encoder._run._run if isinstance(encoder._run, Checked) else encoder._run
    if device != "cuda" or not isinstance(run, TorchRun):

        def passes() -> None:
            for values in arrays:
                encoder._run(values)

        return passes
    resident = [run.resident(values) for values in arrays]

    def resident_passes() -> None:
        for given in resident:
            run.compute(given)
        torch.cuda.synchronize()

    return resident_passes


def forward_seconds(passes: Callable[[], None]) -> tuple[float, float]:
    """By the clock, and of the processors."""
    began, worked = time.perf_counter(), cpu_seconds()
    passes()
    return time.perf_counter() - began, cpu_seconds() - worked


def index_seconds(store: Path, place: Path, encoder: Path, options: dict[str, Any]) -> tuple[float, float]:
    """By the clock, and of the processors, of a copy of the store in which nothing is encoded."""
    copy = place / "copy.isimed"
    shutil.copytree(store, copy)
    watch = Stopwatch()
    try:
        isi.open(copy, mode="a").index(encoder, progress=watch, **options)
    finally:
        shutil.rmtree(copy)
    return watch.seconds, watch.cpu_seconds


def measured(place: Path, store: Path, network: str, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """Medians over rounds for one network."""
    folder = kept_encoder(place / network, network)
    card = read_card(folder)
    stride_mm = STRIDES_MM.get(network, card.stride_vox * card.spacing_mm)
    stride_vox = round(stride_mm / card.spacing_mm)
    device, precision = options["device"], options["precision"]
    patches = 10**9  # a long job, for which `auto` tries what there is
    asked = Job(str(folder), device, (), Runtime(options["runtime"], precision), patches, stride_vox)
    runtime = choose(asked).runtime
    encoder = load_encoder(folder, device, runtime=runtime)
    assert isinstance(encoder, NetworkEncoder)
    arrays, patches = handed_arrays(encoder, store, stride_vox)
    named = {**options, "runtime": runtime.name, "stride_mm": stride_mm}
    passes = bare_passes(encoder, arrays, device)
    forward_seconds(passes)
    found = []
    for _ in range(rounds):
        found.append((*forward_seconds(passes), *index_seconds(store, place, folder, named)))
    forward, forward_cpu, index, index_cpu = np.array(found).T
    return {
        "runtime": str(runtime),
        "patches": patches,
        "forward_patches_per_s": round(patches / statistics.median(forward), 1),
        "index_patches_per_s": round(patches / statistics.median(index), 1),
        "share": round(float(np.median(forward / index)), 3),
        "share_of_each_round": (forward / index).round(3).tolist(),
        "cpu_share": round(float(np.median(forward_cpu / index_cpu)), 3),
    }


def main() -> int:
    """Print a line a network, and write JSON where `--out` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="tiny,default,densenet")
    parser.add_argument("--scans", type=int, help="12, or 100 on a GPU")
    parser.add_argument("--spacing", type=float, default=1.5, help="of the heads, in mm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--scheduler", default="threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.scans = given.scans or (100 if given.device == "cuda" else 12)
    options = {name: getattr(given, name) for name in ("runtime", "precision", "scheduler", "device")}
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if given.device == "cuda" else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rounds": given.rounds,
        "options": options,
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        store = made_store(place, given.images, given.scans, given.spacing)
        result["scans"] = [[row["nx"], row["ny"], row["nz"]] for row in isi.open(store).scans().to_pylist()]
        for network in given.networks.split(","):
            result[network] = measured(place, store, network, given.rounds, options)
            print(network, json.dumps(result[network]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
