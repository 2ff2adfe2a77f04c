"""Checkpoints of a run: tensors as safetensors, numbers as JSON; never pickle.

begin ─▶ begun.json                 a run with this configuration began; there may be no checkpoint yet
save  ─▶ checkpoint.safetensors     written aside, flushed, renamed: whole or not there, also after a power cut
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from isimed_index.config import PretrainConfig, naming_fields
from isimed_index.errors import StoreDamaged, UsageError
from isimed_index.store.files import new_id, replace_durably, sync_file

STATE = "checkpoint.safetensors"
METRICS = "metrics.jsonl"
BEGUN = "begun.json"


@dataclass(frozen=True, slots=True)
class Saved:
    """What a run needs to go on: groups of tensors by name, and numbers and texts that JSON can hold."""

    groups: Mapping[str, Mapping[str, torch.Tensor]]
    notes: Mapping[str, Any]


def begin(directory: Path, config: PretrainConfig) -> str:
    """Note that a run begins anew, forgetting the one before it; returns a name that its resumptions share."""
    (directory / STATE).unlink(missing_ok=True)
    run = new_id()
    content = {"run": run, "config": naming_fields(config)}
    replace_durably(directory / BEGUN, json.dumps(content, sort_keys=True).encode())
    return run


def begun(directory: Path, config: PretrainConfig) -> str:
    """The name of the run that `begin` noted.

    `UsageError` when there was none or it has another configuration.
    """
    try:
        content = json.loads((directory / BEGUN).read_text(encoding="utf-8"))
        run, made_with = str(content["run"]), content["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            "there is no checkpoint of a training with these options",
            next_step="repeat the options of the training that was interrupted, or drop --resume",
        ) from None
    if made_with != _plain(config):
        raise UsageError(
            "the checkpoint was made with another configuration", next_step="repeat its options, or drop --resume"
        )
    return run


def save(directory: Path, saved: Saved) -> None:
    """Write a checkpoint in place of the one before it, durably."""
    tensors = {
        f"{group}.{name}": tensor.detach().contiguous()
        for group, named in saved.groups.items()
        for name, tensor in named.items()
    }
    beside = directory / f"{STATE}.part"
    save_file(tensors, beside, metadata={"notes": json.dumps(saved.notes, sort_keys=True)})
    sync_file(beside)
    beside.replace(directory / STATE)
    sync_file(directory)


def load(directory: Path) -> Saved | None:
    """The last checkpoint, or None when none was written yet; `StoreDamaged` when it cannot be read."""
    path = directory / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads(file.metadata()["notes"])
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in load_file(path).items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = tensor
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise damaged() from error
    return Saved(groups, notes)


def damaged() -> StoreDamaged:
    """The error for a checkpoint that is not what was written."""
    return StoreDamaged(f"the checkpoint {STATE} cannot be read", next_step="start again without --resume")


def _plain(config: PretrainConfig) -> Any:
    return json.loads(json.dumps(naming_fields(config)))
