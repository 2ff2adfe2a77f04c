"""One batch through network and method: in which precision each of them computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pretraining import config, sources

from isimed_index.encoders.networks import build_network
from isimed_index.pretrain.forward import Forward
from isimed_index.pretrain.methods import build_method
from isimed_index.pretrain.processes import ALONE
from isimed_index.pretrain.sampler import Cohort, draw
from isimed_index.pretrain.trainer import new_card


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_trunk_computes_in_the_precision_that_is_asked_for_and_losses_in_float32(precision: Any) -> None:
    setup = config(precision=precision)
    card = new_card(setup, "a", "tiny")
    network = build_network(card.factory, card.outputs, card.network)
    seen: set[torch.dtype] = set()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv3d) and layer.kernel_size != (1, 1, 1):
            layer.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    forward = Forward(setup, network, build_method(setup, network), torch.device("cpu"), ALONE)
    losses = forward.losses(draw(Cohort(sources(2), 2**30), setup, 0), 0)
    assert seen == {getattr(torch, precision)}
    assert {loss.dtype for loss in (losses.total, *losses.terms.values())} == {torch.float32}
