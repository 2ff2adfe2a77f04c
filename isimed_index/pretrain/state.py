"""All that a run is at one moment: saved and restored, it goes on as if it had never stopped."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from isimed_index.config import PretrainConfig
from isimed_index.pretrain import checkpoint
from isimed_index.pretrain.averaging import Average
from isimed_index.pretrain.charts import Charts
from isimed_index.pretrain.checkpoint import Saved
from isimed_index.pretrain.monitor import Sample
from isimed_index.pretrain.validation import Best


@dataclass(slots=True)
class State:
    """Weights, optimiser and what an epoch has gathered so far.

    The random numbers and the sampler's position need no place of their own: both follow from the seed and `step`.
    """

    learned: torch.nn.ModuleDict  # network, and method with layers of its own
    optimiser: torch.optim.AdamW
    sample: Sample
    average: Average | None = None
    charts: Charts | None = None  # of the scans that are trained on, where they are asked for
    best: Best = field(default_factory=Best)
    step: int = 0  # the next one
    sums: dict[str, float] = field(default_factory=dict)  # of the losses of this epoch's steps
    spread: float = math.nan  # of the embeddings of the epoch before

    @classmethod
    def new(cls, learned: torch.nn.ModuleDict, config: PretrainConfig, per_epoch: int) -> State:
        """The state before the first step."""
        optimiser = torch.optim.AdamW(learned.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        average = Average(learned["network"], config.ema) if config.ema else None
        return cls(learned, optimiser, Sample(config, per_epoch), average)

    def weights(self) -> dict[str, torch.Tensor]:
        """The network's state that is judged and stored: the moving average where there is one."""
        own: dict[str, torch.Tensor] = self.learned["network"].state_dict()
        return own if self.average is None else self.average.state

    def save(self, directory: Path) -> None:
        """Write a checkpoint."""
        optimiser = {
            f"{number}.{name}": value
            for number, state in self.optimiser.state_dict()["state"].items()
            for name, value in state.items()
        }
        groups = {
            "learned": self.learned.state_dict(),
            "optimiser": optimiser,
            "average": self.average.state if self.average else {},
            "best": self.best.weights,
            "sample": self.sample.tensors(),
            "charts": self.charts.tensors() if self.charts else {},
        }
        best = None if math.isinf(self.best.loss) else self.best.loss
        notes = {
            "step": self.step,
            "sums": self.sums,
            "spread": self.spread,
            "best": {"loss": best, "epoch": self.best.epoch, "waited": self.best.waited},
        }
        checkpoint.save(directory, Saved(groups, notes))

    def load(self, directory: Path) -> bool:
        """Go on from the last checkpoint; False when none was written yet, `StoreDamaged` when it does not fit."""
        saved = checkpoint.load(directory)
        if saved is None:
            return False
        try:
            self._restore(saved)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise checkpoint.damaged() from error
        return True

    def _restore(self, saved: Saved) -> None:
        notes, groups = saved.notes, saved.groups
        self.learned.load_state_dict(dict(groups["learned"]))
        state: dict[int, dict[str, Any]] = {}
        for key, value in groups.get("optimiser", {}).items():
            number, name = key.split(".", 1)
            state.setdefault(int(number), {})[name] = value
        self.optimiser.load_state_dict({"state": state, "param_groups": self.optimiser.state_dict()["param_groups"]})
        if self.average:
            self.average.restore(dict(groups["average"]))
        self.sample.restore(dict(groups.get("sample", {})))
        if self.charts:
            self.charts.restore(dict(groups["charts"]))
        device = next(self.learned.parameters()).device
        weights = {name: tensor.to(device) for name, tensor in groups.get("best", {}).items()}
        loss = notes["best"]["loss"]
        self.best = Best(
            math.inf if loss is None else loss, int(notes["best"]["epoch"]), int(notes["best"]["waited"]), weights
        )
        self.sums, self.spread = dict(notes["sums"]), float(notes["spread"])
        self.step = int(notes["step"])
