"""Patches a second of every runtime, as a ratio to eager PyTorch in float32, and how far its vectors are from these.

    python benchmarks/runtimes.py [--patches N] [--spacing MM] [--rounds N] [--only densenet|stem] [--out FILE.json]

`densenet`: the paper's DenseNet121 on patches of 32³, random weights. `stem`: the default network over a whole head, a
vector every four voxels. Each engine has a process of its own, so that threads or memory that one leaves behind do not
count against another; rounds of all of them are interleaved, so that other load falls on all alike. `trial` is what
`--runtime auto` measures.

`eager` is the network as it is; `torch` what isimed runs: batch norms folded, channels innermost in memory. `cpu_ratio`
is the same ratio of processor seconds. `error` is the root mean square distance of vectors from eager's over the root
mean square length of eager's, `worst` that of the vector that is furthest off; both of the output where it is largest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isimed_index.config import pretrain_config
from isimed_index.encode import encode_volume
from isimed_index.encoders.card import read_card
from isimed_index.encoders.module import our_network
from isimed_index.encoders.networks import build_network
from isimed_index.encoders.protocol import Encoder, Vectors
from isimed_index.encoders.runtime import TorchEncoder, load_encoder, weights_file, write_encoder
from isimed_index.encoders.runtimes.checked import relative_errors
from isimed_index.encoders.runtimes.kind import NAMES, PRECISIONS, Runtime, missing_packages
from isimed_index.encoders.runtimes.trial import Job, choose
from isimed_index.pretrain.trainer import new_card
from isimed_index.scans.prepare import Intensity, prepare
from isimed_index.testing.templates import ellipsoid_head

EAGER = "eager"
DENSENET = "isimed_index.encoders.networks:PatchDenseNet121"
BATCH = 64
GOALS = {"densenet fp32": (1.5, 1e-5), "densenet bf16": (3.0, 1e-2)}  # ratio at least, error at most


@dataclass(frozen=True)
class Load:
    """What every engine encodes: random patches one by one, or the head of a given spacing in one piece."""

    network: str  # densenet or stem
    patches: int
    spacing_mm: float

    def encode(self, encoder: Encoder) -> tuple[int, float, float, Vectors]:
        """Patches, seconds, processor seconds and vectors of one round."""
        card = encoder.card
        if self.network == "densenet":
            rng, shape = np.random.default_rng(0), (self.patches, *(card.patch_vox,) * 3)
            values = rng.uniform(card.intensity.low, card.intensity.high, shape).astype(np.float32)
            began, before = time.perf_counter(), time.process_time()
            parts = [encoder.encode(values[start : start + BATCH]) for start in range(0, len(values), BATCH)]
            took, spent = time.perf_counter() - began, time.process_time() - before
            return len(values), took, spent, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        head = ellipsoid_head(self.spacing_mm)
        volume = prepare(head.values, head.affine, self.spacing_mm, card.intensity)
        began, before = time.perf_counter(), time.process_time()
        _, numbers, vectors, _ = encode_volume(encoder, volume, card.stride_vox)
        return len(numbers), time.perf_counter() - began, time.process_time() - before, vectors


def kept_encoder(folder: Path, network: str, spacing_mm: float) -> Path:
    """An encoder of random weights: the paper's network, or the default preset's."""
    folder.mkdir()
    torch.manual_seed(0)
    card = replace(
        new_card(pretrain_config("default"), network, "default"), spacing_mm=spacing_mm, intensity=Intensity()
    )
    if network == "densenet":
        outputs = {"embedding": 1024}
        card = replace(card, factory=DENSENET, network={}, outputs=outputs, match_output="embedding")
    write_encoder(folder, card, build_network(card.factory, card.outputs, card.network).state_dict())
    return folder


def engine(folder: Path, name: str, precision: str, load: Load, pipe: Connection) -> None:
    """A process with one engine: a round for each message, until there is None."""
    card = read_card(folder)
    if name == EAGER:
        network = our_network(card, weights_file(folder, card))
        encoder: Encoder = TorchEncoder(card, network, torch.device("cpu"))
    else:
        encoder = load_encoder(folder, "cpu", runtime=Runtime(name, precision))
    while pipe.recv() is not None:
        try:
            pipe.send(load.encode(encoder))
        except Exception as error:  # noqa: BLE001 — whatever it is, it is the engine's result
            pipe.send(f"{type(error).__name__}: {error}")


def measured(folder: Path, load: Load, rounds: int) -> dict[str, Any]:
    """Rates, ratios and errors of every engine that is installed."""
    engines = [(EAGER, "fp32")]
    engines += [(name, kind) for kind, able in PRECISIONS.items() for name in able if not missing_packages(name)]
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for name, precision in engines:
        here, there = spawn.Pipe()
        processes.append(spawn.Process(target=engine, args=(folder, name, precision, load, there), daemon=True))
        processes[-1].start()
        pipes.append(here)
    answers: list[list[Any]] = [[] for _ in engines]
    for _ in range(rounds + 1):  # the first one warms up and is not counted
        for pipe, given in zip(pipes, answers, strict=True):
            pipe.send("go")
            given.append(pipe.recv())
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    eager = answers[0]
    lines = {}
    for (name, precision), given in zip(engines, answers, strict=True):
        key = name if name == EAGER else f"{name} {precision}"
        lines[key] = {"failed": given[-1]} if isinstance(given[-1], str) else compared(given, eager)
    return lines


def compared(given: list[Any], eager: list[Any]) -> dict[str, float]:
    """Median rate, median ratios of rounds to eager's rounds beside them, and the relative error of the vectors."""
    vectors = ({name: y[:, :, None, None, None] for name, y in found[-1][3].items()} for found in (given, eager))
    errors = relative_errors(*vectors)
    return {
        "patches_per_s": round(statistics.median(n / took for n, took, _, _ in given[1:]), 1),
        "ratio": round(statistics.median(b[1] / a[1] for a, b in zip(given[1:], eager[1:], strict=True)), 2),
        "cpu_ratio": round(statistics.median(b[2] / a[2] for a, b in zip(given[1:], eager[1:], strict=True)), 2),
        "error": float(f"{errors.overall:.1e}"),
        "worst": float(f"{errors.worst:.1e}"),
    }


def trial_of(folder: Path) -> dict[str, Any]:
    """What `auto` finds for a long job, and how long it takes to."""
    began = time.perf_counter()
    choice = choose(Job(str(folder), "cpu", (), Runtime(), 10**9, read_card(folder).stride_vox))
    return {
        "chosen": str(choice.runtime),
        "patches_per_s": {name: round(rate, 1) for name, rate in choice.patches_per_s.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }


def reached(results: dict[str, Any]) -> dict[str, bool]:
    """Whether some runtime has the ratio and the error that were aimed at."""
    found = {}
    for goal, (ratio, error) in GOALS.items():
        network, precision = goal.split()
        lines = results.get(network, {}).get("engines", {})
        mine = [line for name, line in lines.items() if name.endswith(precision) and "ratio" in line]
        if mine:
            found[goal] = any(line["ratio"] >= ratio and line["error"] <= error for line in mine)
    return found


def main() -> int:
    """Print what was measured as JSON, and write it to --out; 1 when an answer is further off than its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=256, help="of the DenseNet, a round")
    parser.add_argument("--spacing", type=float, default=2.0, help="of the head, in mm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["densenet", "stem"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "openvino", "onnxruntime") if name in installed()},
        "rounds": given.rounds,
    }
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = str(Path(place) / "cache")
        for network in [given.only] if given.only else ["densenet", "stem"]:
            folder = kept_encoder(Path(place) / network, network, given.spacing)
            load = Load(network, given.patches, given.spacing)
            result[network] = {"engines": measured(folder, load, given.rounds), "trial": trial_of(folder)}
    result["goals"] = reached(result)
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    wrong = [name for network in ("densenet", "stem") for name in failures(result.get(network))]
    return int(bool(wrong))


def installed() -> set[str]:
    """The packages whose runtimes are measured."""
    packages = {"torch": "torch", "openvino": "openvino", "onnx": "onnxruntime"}
    return {packages[name] for name in NAMES if not missing_packages(name)}


def failures(measurements: dict[str, Any] | None) -> list[str]:
    """Engines in float32 that failed, or whose vectors differ; bfloat16 may not be there at all."""
    lines = measurements["engines"] if measurements else {}
    return [name for name, line in lines.items() if not name.endswith("bf16") and line.get("error", 1.0) > 1e-5]


if __name__ == "__main__":
    sys.exit(main())
