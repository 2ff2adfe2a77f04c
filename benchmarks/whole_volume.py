"""One pass over a volume against patch-by-patch encoding: the same vectors, how many patches a second, how long a head.

    python benchmarks/whole_volume.py [--presets tiny,default] [--rounds N] [--out FILE.json]

The head is 1 mm and 200³ voxels. `ratio` is on it as the encoder works, at 2 mm, every 4 voxels. `seconds_a_head`
are of one scan: values in memory are prepared and encoded; beside it the same as if the encoder worked at 1 mm, whose
lattice has eight times as many patches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from isimed_index.config import pretrain_config
from isimed_index.encode.scan import encode_volume, prepared
from isimed_index.encoders.networks import build_network
from isimed_index.encoders.runtime import TorchEncoder
from isimed_index.pretrain.trainer import new_card
from isimed_index.scans.prepare import prepare
from isimed_index.space import Affine
from isimed_index.testing.templates import ellipsoid_head

SIDE = 200
PATCHES = 256  # encoded one by one


def head_1mm() -> tuple[np.ndarray, Affine]:
    """A head that fills 200³ voxels of 1 mm, with noise: nothing is skipped that a real head would show."""
    head = ellipsoid_head(1.0)
    values = np.zeros((SIDE,) * 3, np.float32)
    size = [min(SIDE, n) for n in head.values.shape]
    to, of = (
        tuple(slice((n - s) // 2, (n - s) // 2 + s) for n, s in zip(shape, size, strict=True))
        for shape in (values.shape, head.values.shape)
    )
    values[to] = head.values[of]
    values += np.random.default_rng(0).normal(scale=0.02, size=values.shape).astype(np.float32)
    return values, head.affine


def measure(preset: str, rounds: int) -> dict[str, object]:
    """Medians over interleaved rounds, so that other load falls on both alike."""
    card = new_card(pretrain_config(preset), "benchmark", preset)
    torch.manual_seed(0)
    encoder = TorchEncoder(card, build_network(card.factory, card.outputs, card.network), torch.device("cpu"))
    values, affine = head_1mm()
    whole, single, head, fine = [], [], [], []
    difference = 0.0
    for _ in range(rounds):
        began = time.perf_counter()
        volume = prepared(values, affine, card)
        at = time.perf_counter()
        grid, numbers, vectors, _ = encode_volume(encoder, volume, card.stride_vox)
        ended = time.perf_counter()
        head.append(ended - began)
        whole.append(len(numbers) / (ended - at))
        some = np.random.default_rng(0).permutation(len(numbers))[:PATCHES]
        patches = grid.extract(volume.values, numbers[some], volume.background)
        began = time.perf_counter()
        alone = encoder.encode(patches)
        single.append(PATCHES / (time.perf_counter() - began))
        for name in alone:
            difference = max(difference, float(np.abs(alone[name] - vectors[name][some]).max()))
        began = time.perf_counter()
        in_full = prepare(values, affine, 1.0, card.intensity)
        _, fine_numbers, *_ = encode_volume(encoder, in_full, card.stride_vox)
        fine.append(time.perf_counter() - began)
    ratios = np.array(whole) / np.array(single)
    return {
        "patches": {"2 mm": len(numbers), "1 mm": len(fine_numbers)},
        "whole_volume_patches_per_s": round(statistics.median(whole)),
        "patch_by_patch_patches_per_s": round(statistics.median(single), 1),
        "ratio": round(float(np.median(ratios)), 1),
        "ratio_of_each_round": ratios.round(1).tolist(),
        "seconds_a_head": {"2 mm": round(statistics.median(head), 2), "1 mm": round(statistics.median(fine), 2)},
        "largest_difference": difference,
    }


def main() -> int:
    """Print a line a preset, write JSON where `--out` says; 1 when the two ways differ by more than 1e-4."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", default="tiny,default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    found: dict[str, object] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "side": SIDE}
    different = False
    for preset in options.presets.split(","):
        found[preset] = figures = measure(preset, options.rounds)
        print(preset, json.dumps(figures), flush=True)
        different |= float(str(figures["largest_difference"])) > 1e-4
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
