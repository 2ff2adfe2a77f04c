"""The implementations of `Encoder` against the contract."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from isimed_index.config import PretrainConfig
from isimed_index.encoders import runtime
from isimed_index.encoders.networks import StemNet, ValidNet, build_network
from isimed_index.encoders.protocol import Encoder
from isimed_index.encoders.runtime import TorchEncoder
from isimed_index.pretrain.trainer import new_card
from isimed_index.testing.conformance import EncoderConformance
from isimed_index.testing.encoder import ToyEncoder


class TestToy(EncoderConformance):
    def make(self) -> Encoder:
        return ToyEncoder()


class TestToyWithOddPatches(EncoderConformance):
    def make(self) -> Encoder:
        return ToyEncoder(patch_vox=5, stride_vox=3, metric="cosine")


class TestTorch(EncoderConformance):
    network: Literal["stem", "valid"] = "stem"

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime, "TILE", 2)
        torch.set_num_threads(1)
        torch.manual_seed(1)

    def make(self) -> Encoder:
        config = PretrainConfig(network=self.network, width=2, embedding_dim=4, descriptor_dim=5)
        card = new_card(config, "test", "tiny")
        network = build_network(card.factory, card.outputs, card.network)
        assert isinstance(network, StemNet if self.network == "stem" else ValidNet)
        return TorchEncoder(card, settled(network), torch.device("cpu"))


class TestTorchOfEveryVoxel(TestTorch):
    network = "valid"


def settled(network: ValidNet | StemNet) -> ValidNet | StemNet:
    """A network whose batch norms have seen data: fresh ones would let a channel's scale vanish."""
    network.train()
    with torch.no_grad():
        for _ in range(8):
            network(torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (4, 1, 32, 32, 32)).astype(np.float32)))
    return network
