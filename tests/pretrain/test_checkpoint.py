"""Checkpoints: what is loaded is what was saved, and nothing else is accepted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from pretraining import config
from safetensors.torch import save_file

from isimed_index.config import PretrainConfig
from isimed_index.encoders.networks import ValidNet
from isimed_index.errors import StoreDamaged, UsageError
from isimed_index.pretrain import checkpoint
from isimed_index.pretrain.checkpoint import BEGUN, STATE
from isimed_index.pretrain.state import State


def state(seed: int, steps: int, dim: int = 2, setup: PretrainConfig | None = None) -> State:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = ValidNet({"embedding": dim}, width=2)
    network.to(memory_format=torch.channels_last_3d)
    learned = torch.nn.ModuleDict({"network": network, "method": torch.nn.Linear(2, 3)})
    new = State.new(learned, setup or config(ema=0.5), 3)
    descend(new, steps)
    return new


def descend(state: State, steps: int) -> None:
    for _ in range(steps):
        x = torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(state.step))
        state.optimiser.zero_grad()
        embedding = state.learned["network"](x)["embedding"].flatten(1)
        state.learned["method"](embedding).square().sum().backward()
        state.optimiser.step()
        assert state.average is not None
        state.average.update(state.learned["network"], state.step)
        state.step += 1


def equal(a: State, b: State) -> bool:
    mine, theirs = a.learned.state_dict(), b.learned.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine) and all(
        torch.equal(value, b.weights()[name]) for name, value in a.weights().items()
    )


def test_a_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    one = state(0, 2)
    one.best.consider(0.1 + 0.2, 7, one.weights())
    one.best.consider(0.5, 8, one.weights())
    one.sums = {"loss": 1 / 3}
    one.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    other = state(1, 0)
    assert other.load(tmp_path)
    assert (other.step, other.sums) == (2, {"loss": 1 / 3})
    assert (other.best.loss, other.best.epoch, other.best.waited) == (0.1 + 0.2, 7, 1)
    descend(one, 2)
    descend(other, 2)
    assert equal(one, other)
    for name, tensor in one.best.weights.items():
        assert torch.equal(tensor, other.best.weights[name])
    assert not torch.equal(one.best.weights["heads.embedding.weight"], one.weights()["heads.embedding.weight"])


def test_a_new_checkpoint_replaces_the_old_one(tmp_path: Path) -> None:
    one = state(0, 1)
    one.save(tmp_path)
    (tmp_path / f"{STATE}.part").write_bytes(b"left by a kill")
    descend(one, 4)
    one.save(tmp_path)
    other = state(1, 0)
    assert other.load(tmp_path)
    assert other.step == 5
    assert equal(one, other)
    assert [path.name for path in tmp_path.iterdir()] == [STATE]


def test_a_checkpoint_is_flushed_before_it_takes_the_old_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    rename = Path.replace

    def replaced(path: Path, target: Path) -> Path:
        said.append(("rename", path.name))
        return rename(path, target)

    monkeypatch.setattr(checkpoint, "sync_file", lambda path: said.append(("sync", path.name)))
    monkeypatch.setattr(Path, "replace", replaced)
    state(0, 1).save(tmp_path)
    assert said == [("sync", f"{STATE}.part"), ("rename", f"{STATE}.part"), ("sync", tmp_path.name)]


def test_a_run_that_began_is_known_by_its_configuration(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint") as refused:
        checkpoint.begun(tmp_path, config())
    assert "--resume" in refused.value.next_step
    name = checkpoint.begin(tmp_path, config())
    assert checkpoint.begun(tmp_path, config()) == name
    with pytest.raises(UsageError, match="another configuration"):
        checkpoint.begun(tmp_path, config(learning_rate=1e-5))
    assert [path.name for path in tmp_path.iterdir()] == [BEGUN]
    assert checkpoint.load(tmp_path) is None


def test_a_run_of_an_older_version_goes_on_only_where_it_would_be_the_same(tmp_path: Path) -> None:
    """It cut values off at ±1.5, knew of no reference, and had no fields to say so."""
    later = {"clip", "registered_to", "registered_kind"}
    written = {name: value for name, value in asdict(config()).items() if name not in later}
    (tmp_path / BEGUN).write_text(json.dumps({"run": "01OLD", "config": written}))
    assert checkpoint.begun(tmp_path, config()) == "01OLD"
    with pytest.raises(UsageError, match="another configuration"):
        checkpoint.begun(tmp_path, config(clip=0.0))


def test_a_run_that_begins_anew_forgets_the_checkpoint_before_it(tmp_path: Path) -> None:
    first = checkpoint.begin(tmp_path, config())
    state(0, 1).save(tmp_path)
    assert checkpoint.begin(tmp_path, config()) != first
    assert not state(0, 0).load(tmp_path)


@pytest.mark.parametrize("left", [0, 7, 500, -1])
def test_a_truncated_checkpoint_is_damage(tmp_path: Path, left: int) -> None:
    state(0, 1).save(tmp_path)
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:left])
    with pytest.raises(StoreDamaged, match="checkpoint"):
        state(0, 0).load(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"notes": "{}"}, {"notes": "x"}, {"notes": '{"step": 3}'}, {"step": "3"}])
def test_a_file_that_is_no_checkpoint_is_damage(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"learned.x": torch.zeros(1)}, tmp_path / STATE, metadata=metadata)
    with pytest.raises(StoreDamaged):
        state(0, 0).load(tmp_path)


def test_tensors_of_another_network_are_damage(tmp_path: Path) -> None:
    state(0, 1).save(tmp_path)
    with pytest.raises(StoreDamaged):
        state(0, 0, dim=3).load(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": 1}', '{"run": "a"}'])
def test_a_note_of_a_run_that_cannot_be_read_is_no_run(tmp_path: Path, content: str) -> None:
    (tmp_path / BEGUN).write_text(content)
    with pytest.raises(UsageError) as refused:
        checkpoint.begun(tmp_path, config())
    assert "drop --resume" in refused.value.next_step
