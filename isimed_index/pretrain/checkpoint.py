"""Checkpoints of a run: tensors as safetensors, numbers as JSON; never pickle. Written to the side, then renamed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from isimed_index.config import PretrainConfig
from isimed_index.errors import StoreDamaged, UsageError

STATE = "checkpoint.safetensors"
METRICS = "metrics.jsonl"


def save(
    directory: Path, network: torch.nn.Module, optimiser: torch.optim.AdamW, step: int, config: PretrainConfig
) -> None:
    """Write network, optimiser and step so that `load` continues as if the run had never stopped."""
    tensors = {f"network.{name}": value.contiguous() for name, value in network.state_dict().items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{number}.{name}": value.contiguous() for name, value in state.items()}
    meta = {"step": str(step), "config": json.dumps(asdict(config), sort_keys=True)}
    beside = directory / f"{STATE}.part"
    save_file(tensors, beside, metadata=meta)
    beside.replace(directory / STATE)


def load(directory: Path, network: torch.nn.Module, optimiser: torch.optim.AdamW, config: PretrainConfig) -> int:
    """Restore a checkpoint into network and optimiser; returns the next step.

    `UsageError` when there is none or it belongs to another configuration, `StoreDamaged` when it cannot be read.
    """
    path = directory / STATE
    if not path.exists():
        raise UsageError(
            "there is no checkpoint of a training with these options",
            next_step="repeat the options of the training that was interrupted, or drop --resume",
        )
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata()
        step, made_with = int(meta["step"]), json.loads(meta["config"])
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _damaged() from error
    if made_with != json.loads(json.dumps(asdict(config))):
        raise UsageError(
            "the checkpoint was made with another configuration", next_step="repeat its options, or drop --resume"
        )
    try:
        _restore(tensors, network, optimiser)
    except (KeyError, ValueError, RuntimeError) as error:
        raise _damaged() from error
    return step


def _damaged() -> StoreDamaged:
    return StoreDamaged(f"the checkpoint {STATE} cannot be read", next_step="start again without --resume")


def discard(directory: Path) -> None:
    """Remove a checkpoint, if there is one, so that nothing resumes from it."""
    (directory / STATE).unlink(missing_ok=True)


def _restore(tensors: dict[str, torch.Tensor], network: torch.nn.Module, optimiser: torch.optim.AdamW) -> None:
    network.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
