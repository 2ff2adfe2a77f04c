"""How long a run is and how fast it learns: steps, epochs and the learning rate of every step."""

from __future__ import annotations

import math

from isimed_index.config import PretrainConfig


def epoch_steps(config: PretrainConfig, scans: int) -> int:
    """Steps of an epoch: as configured, or as many as show every one of `scans` once."""
    return config.steps_per_epoch or math.ceil(scans / config.batch_scans)


def learning_rate(config: PretrainConfig, step: int, per_epoch: int) -> float:
    """The learning rate of a step, of `per_epoch` in each of the configured epochs.

    `exponential` multiplies it by `decay` after every epoch (ISImed, §2.2.1); `cosine` falls over the whole run to 2 %.
    Both begin with a linear warm-up.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "exponential":
        share = float(config.decay ** (step // per_epoch))
    else:
        share = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / (per_epoch * config.epochs)))
    return config.learning_rate * warm * share
