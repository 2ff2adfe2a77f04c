"""Where the figures of every epoch go: always lines of JSON, and TensorBoard or Weights & Biases where asked for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from isimed_index.errors import MissingExtra
from isimed_index.store.files import replace_durably

Entry = Mapping[str, float | None]  # `epoch` and `step` counted from 1, and figures; None where one does not exist


@dataclass(frozen=True, slots=True)
class Watchers:
    """Programs that show a run beside its metrics: a folder for TensorBoard, a project of Weights & Biases."""

    tensorboard: Path | None = None
    wandb: str | None = None


class Record(Protocol):
    """Takes the figures of one epoch after the other."""

    def write(self, entry: Entry) -> None:
        """Take in an epoch."""
        ...

    def close(self) -> None:
        """The run has ended, or was stopped."""
        ...


def open_records(
    metrics: Path, watchers: Watchers, *, name: str, run: str, settings: Mapping[str, Any], epochs: int
) -> list[Record]:
    """The records of a run of which `epochs` are done already; `MissingExtra` for a program that is not installed.

    `run` is the same for a run and its resumptions; `settings` are shown beside the curves.
    """
    lines = JsonLines(metrics, epochs)
    records: list[Record] = [lines]
    if watchers.tensorboard is not None:
        records.append(TensorBoard(watchers.tensorboard, lines.last_step))
    if watchers.wandb is not None:
        records.append(WeightsAndBiases(watchers.wandb, name, run, settings))
    return records


def plain(entry: Mapping[str, float]) -> dict[str, float | None]:
    """Figures as JSON can hold them: six decimals, None for what is no number."""
    return {key: round(value, 6) if math.isfinite(value) else None for key, value in entry.items()}


class JsonLines:
    """`metrics.jsonl`: one line an epoch; lines of epochs that are done again are dropped."""

    def __init__(self, path: Path, epochs: int) -> None:
        self.path = path
        kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:epochs] if path.exists() else []
        self.last_step = int(json.loads(kept[-1])["step"]) if kept else 0
        replace_durably(path, "".join(kept).encode())

    def write(self, entry: Entry) -> None:
        """Append a line; it is on the disk before the checkpoint that says it is written."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Nothing is open between lines."""


class TensorBoard:
    """Scalars by step in an event file; events of steps that are done again are hidden."""

    def __init__(self, folder: Path, last_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra(
                "TensorBoard is not installed", next_step="pip install 'isimed-index[tensorboard]'"
            ) from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write(self, entry: Entry) -> None:
        """Add one scalar a figure, and flush."""
        for key, value in entry.items():
            if key not in ("epoch", "step") and value is not None:
                group, _, rest = key.partition("_")
                tag = f"validation/{rest}" if group == "validation" else f"training/{key}"
                self._writer.add_scalar(tag, value, entry["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a project; where it goes (their service, or a folder with WANDB_MODE=offline) is their own setting.

    It is given the figures and the configuration, nothing of this machine, its files or its command lines.
    """

    def __init__(self, project: str, name: str, run: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra(
                "Weights & Biases is not installed", next_step="pip install 'isimed-index[wandb]'"
            ) from error
        private = wandb.Settings(
            console="off", save_code=False, disable_git=True, x_disable_meta=True, x_disable_stats=True, silent=True
        )
        self._run: Any = wandb.init(
            project=project, name=name, id=run, resume="allow", config=dict(settings), settings=private
        )

    def write(self, entry: Entry) -> None:
        """Log an epoch under its step."""
        self._run.log({key: value for key, value in entry.items() if value is not None}, step=entry["step"])

    def close(self) -> None:
        """End the run of the project."""
        self._run.finish()
