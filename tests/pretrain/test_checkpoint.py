"""Checkpoints: what is loaded is what was saved, and nothing else is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pretraining import config
from safetensors.torch import save_file

from isimed_index.encoders.networks import ValidNet
from isimed_index.errors import StoreDamaged, UsageError
from isimed_index.pretrain import checkpoint
from isimed_index.pretrain.checkpoint import STATE


def run(seed: int, steps: int) -> tuple[ValidNet, torch.optim.AdamW]:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = ValidNet({"embedding": 2}, width=2)
    network.to(memory_format=torch.channels_last_3d)
    optimiser = torch.optim.AdamW(network.parameters(), 1e-2)
    descend(network, optimiser, steps)
    return network, optimiser


def descend(network: ValidNet, optimiser: torch.optim.AdamW, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        network(x)["embedding"].square().sum().backward()
        optimiser.step()


def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    network, optimiser = run(0, 2)
    checkpoint.save(tmp_path, network, optimiser, 2, config())
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    other, other_optimiser = run(1, 0)
    assert checkpoint.load(tmp_path, other, other_optimiser, config()) == 2
    descend(network, optimiser, 2)
    descend(other, other_optimiser, 2)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_a_new_checkpoint_replaces_the_old_one(tmp_path: Path) -> None:
    network, optimiser = run(0, 1)
    checkpoint.save(tmp_path, network, optimiser, 1, config())
    (tmp_path / f"{STATE}.part").write_bytes(b"left by a kill")
    checkpoint.save(tmp_path, network, optimiser, 5, config())
    assert checkpoint.load(tmp_path, network, optimiser, config()) == 5
    assert [path.name for path in tmp_path.iterdir()] == [STATE]


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    network, optimiser = run(0, 1)
    checkpoint.save(tmp_path, network, optimiser, 1, config())
    with pytest.raises(UsageError, match="another configuration"):
        checkpoint.load(tmp_path, network, optimiser, config(learning_rate=1e-5))


def test_without_a_checkpoint_nothing_can_be_resumed(tmp_path: Path) -> None:
    network, optimiser = run(0, 0)
    with pytest.raises(UsageError, match="no checkpoint") as refused:
        checkpoint.load(tmp_path, network, optimiser, config())
    assert "--resume" in refused.value.next_step


@pytest.mark.parametrize("left", [0, 7, 500, -1])
def test_a_truncated_checkpoint_is_damage(tmp_path: Path, left: int) -> None:
    network, optimiser = run(0, 1)
    checkpoint.save(tmp_path, network, optimiser, 1, config())
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:left])
    with pytest.raises(StoreDamaged, match="checkpoint"):
        checkpoint.load(tmp_path, network, optimiser, config())


@pytest.mark.parametrize("metadata", [None, {"step": "3"}, {"step": "x", "config": "{}"}, {"step": "3", "config": "{"}])
def test_a_file_that_is_no_checkpoint_is_damage(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    network, optimiser = run(0, 0)
    save_file({"network.x": torch.zeros(1)}, tmp_path / STATE, metadata=metadata)
    with pytest.raises((StoreDamaged, UsageError)):
        checkpoint.load(tmp_path, network, optimiser, config())


def test_tensors_of_another_network_are_damage(tmp_path: Path) -> None:
    network, optimiser = run(0, 1)
    checkpoint.save(tmp_path, network, optimiser, 1, config())
    other = ValidNet({"embedding": 3}, width=2)
    with pytest.raises(StoreDamaged):
        checkpoint.load(tmp_path, other, torch.optim.AdamW(other.parameters()), config())
