"""Held-out subjects: which they are, what the losses on them are, and the best weights by them.

subjects ─ hash under the seed ─▶ held out │ trained on        never patches of one subject on both sides
                                     │
         weights after an epoch ─▶ loss ─▶ the best so far is kept
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch

from isimed_index.config import PretrainConfig
from isimed_index.errors import UsageError
from isimed_index.pretrain.forward import Forward
from isimed_index.pretrain.monitor import Sample
from isimed_index.pretrain.sampler import Cohort, batches
from isimed_index.pretrain.schedule import epoch_steps


def split(subjects: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Rows of `subjects`, one a scan, to train on and to hold out: a `share` of the subjects, one at least.

    Subjects are put in the order of their hashes under `seed`; no order of the scans changes who is held out.
    `UsageError` where nobody would be left to train on.
    """
    if not share:
        return list(range(len(subjects))), []
    ordered = sorted(set(subjects), key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
    if len(ordered) < 2:
        raise UsageError(
            f"expected two subjects or more to hold one out, found {len(ordered)}",
            next_step="set validation_share to 0, or widen --where",
        )
    held = set(ordered[: min(max(1, round(share * len(ordered))), len(ordered) - 1)])
    rows = range(len(subjects))
    return [row for row in rows if subjects[row] not in held], [row for row in rows if subjects[row] in held]


@dataclass(slots=True)
class Best:
    """The weights with the lowest loss so far, of which epoch they are, and how many epochs came since."""

    loss: float = math.inf
    epoch: int = 0
    waited: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def consider(self, loss: float, epoch: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Take over the weights after `epoch`, if their loss is lower."""
        if loss < self.loss:
            self.loss, self.epoch, self.waited = loss, epoch, 0
            self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        else:
            self.waited += 1


class Validation:
    """The same batches of held-out scans after every epoch, through weights that do not change by it."""

    def __init__(self, config: PretrainConfig, cohort: Cohort, forward: Forward) -> None:
        # Batches as in training, whatever the number of processes: where there are fewer scans, some are seen twice.
        self.config = replace(config, steps_per_epoch=0)
        self.cohort = cohort
        self.forward = forward

    def figures(self, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Mean losses and the monitor's figures of `weights`, keys beginning with `validation_`."""
        modules: Iterable[torch.nn.Module] = (self.forward.network, self.forward.method)
        steps = range(epoch_steps(self.config, len(self.cohort)))
        sample, sums = Sample(self.config, len(steps)), dict[str, float]()
        for module in modules:
            module.eval()  # batch-norm neither learns from these scans nor depends on the batch
        share = (self.forward.processes.rank, self.forward.processes.world)
        try:
            with torch.no_grad(), closing(batches(self.cohort, self.config, steps, share=share)) as drawn:
                for step, batch in zip(steps, drawn, strict=True):
                    losses = self.forward.losses(batch, step, weights)
                    sample.take(losses, step)
                    for name, value in {"loss": losses.total, **losses.terms}.items():
                        sums[name] = sums.get(name, 0.0) + float(value) / len(steps)
        finally:
            for module in modules:
                module.train()
        found = self.forward.processes.from_first({**sums, **sample.figures()})
        return {f"validation_{name}": value for name, value in found.items()}
