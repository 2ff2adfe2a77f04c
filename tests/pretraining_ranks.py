"""One step of several methods, alone or under torchrun, for `test_processes`: `python pretraining_ranks.py OUT`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pretraining import config, sources
from safetensors.torch import save_file

from isimed_index.pretrain.charts import Charts
from isimed_index.pretrain.forward import Forward
from isimed_index.pretrain.methods import build_method
from isimed_index.pretrain.processes import Processes, joined
from isimed_index.pretrain.sampler import Cohort, draw
from isimed_index.pretrain.trainer import build_network, new_card

METHODS: dict[str, dict[str, Any]] = {
    "isimed": {},
    "regisimed": {},
    "simclr": {},
    "barlowtwins": {},
    "coordinate": {},
    "all": {"pairs": "all", "coordinate_weight": 0.0, "descriptor_weight": 0.0},
    "charts": {"charts_after": 1, "pairs": "all"},
}


def one_step(name: str, processes: Processes) -> dict[str, torch.Tensor]:
    """Loss, every gradient, and the network's state after one step's backward pass, in float64."""
    named = name if name not in ("all", "charts") else "isimed"
    setup = config(method=named, batch_scans=4, **METHODS[name])
    card = new_card(setup, "a", "tiny")
    torch.manual_seed(1)
    network = build_network(card.factory, card.outputs, card.network).double().train()
    method = build_method(setup, network).double()
    processes.convert(network)
    forward = Forward(setup, network, method, torch.device("cpu"), processes)
    learned = torch.nn.ModuleDict({"network": network, "method": method})
    batch = draw(Cohort(sources(5), 2**30), setup, 3, (processes.rank, processes.world))
    charts = Charts(setup, 5) if setup.charts_after else None
    if charts:  # as if earlier epochs had given every scan another one
        charts.affines[:, :3] += 0.05 * torch.randn(5, 3, 4, dtype=torch.float64).numpy()
    losses = forward.losses(replace(batch, images=batch.images.double()), 3, charts=charts)
    losses.total.backward()
    processes.average_gradients(learned.parameters())
    found = {f"{name}.loss": losses.total.detach(), f"{name}.embeddings": losses.embeddings}
    if charts:
        found[f"{name}.taken"] = charts.tensors()["fresh"]
    for key, parameter in learned.named_parameters():
        if parameter.grad is not None:
            found[f"{name}.gradient.{key}"] = parameter.grad
    return found | {f"{name}.state.{key}": tensor for key, tensor in network.state_dict().items()}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with joined("cpu") as processes:
        found: dict[str, torch.Tensor] = {}
        for name in METHODS:
            found |= one_step(name, processes)
        assert processes.any(processes.rank == processes.world - 1)
        assert not processes.any(False)
        assert processes.from_first(f"rank {processes.rank}") == "rank 0"
        if processes.first:
            save_file({key: tensor.contiguous() for key, tensor in found.items()}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
