"""One pass over a volume against patch-by-patch encoding: the same vectors, how many patches a second.

Run from the repository: python benchmarks/whole_volume.py
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import numpy as np
import torch

from isimed_index.config import pretrain_config
from isimed_index.encode import encode_volume
from isimed_index.encoders.networks import build_network
from isimed_index.encoders.runtime import TorchEncoder
from isimed_index.pretrain.trainer import new_card
from isimed_index.scans.prepare import Intensity, prepare
from isimed_index.testing.templates import ellipsoid_head

ROUNDS = 5
PATCHES = 256  # encoded one by one


def main() -> int:
    """Print medians, their ratio and the largest difference between the two as JSON; 1 when they differ."""
    head = ellipsoid_head(2.0)
    volume = prepare(head.values, head.affine, 2.0, Intensity())
    card = new_card(pretrain_config("tiny"), "benchmark", "tiny")
    torch.manual_seed(0)
    encoder = TorchEncoder(card, build_network(card.factory, card.outputs, card.network), torch.device("cpu"))
    whole, single = [], []
    difference = 0.0
    for _ in range(ROUNDS):  # interleaved, so that other load falls on both alike
        began = time.perf_counter()
        grid, numbers, vectors, _ = encode_volume(encoder, volume, card.stride_vox)
        whole.append(len(numbers) / (time.perf_counter() - began))
        some = np.random.default_rng(0).permutation(len(numbers))[:PATCHES]
        patches = grid.extract(volume.values, numbers[some], volume.background)
        began = time.perf_counter()
        alone = encoder.encode(patches)
        single.append(PATCHES / (time.perf_counter() - began))
        difference = max(
            difference, *(float(np.abs(alone[name] - vectors[name][some]).max()) for name in ("embedding",))
        )
    rates = {"whole_volume": statistics.median(whole), "patch_by_patch": statistics.median(single)}
    ratio = rates["whole_volume"] / rates["patch_by_patch"]
    print(json.dumps({f"{name}_patches_per_s": round(rate) for name, rate in rates.items()}))
    print(json.dumps({"ratio": round(ratio, 1), "largest_difference": difference}))
    return int(difference > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
