"""Figures of a run, and the alarm for collapsed embeddings: on real runs that collapse, and not on good ones."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretraining import STILL, config, sources

from isimed_index.errors import TrainingWarning
from isimed_index.pretrain.methods import Losses, Method
from isimed_index.pretrain.monitor import (
    SAMPLE,
    Sample,
    collapse_warning,
    figures_of,
    participation_ratio,
    rankme,
)
from isimed_index.pretrain.trainer import train


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def alarm(embeddings: torch.Tensor) -> str | None:
    """The alarm for patches of three steps of two scans."""
    rows = torch.arange(len(embeddings))
    where = torch.stack([rows % 3, rows % 2], dim=1)
    return collapse_warning(figures_of(embeddings, 50 * normal(len(rows), 3, seed=1), where, 100.0))


def test_rankme_counts_equal_directions() -> None:
    axes = torch.cat([torch.eye(5), -torch.eye(5)])
    assert rankme(torch.nn.functional.pad(axes, (0, 3))) == pytest.approx(5, rel=1e-3)
    assert participation_ratio(torch.nn.functional.pad(axes, (0, 3))) == pytest.approx(5, rel=1e-6)


def test_rankme_and_participation_ratio_equal_their_formulas() -> None:
    x = normal(40, 6) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1, 0.1])
    values = np.linalg.svd((x - x.mean(0)).double().numpy(), compute_uv=False)
    share = values / values.sum()
    assert rankme(x) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    variances = np.linalg.eigvalsh(np.cov(x.double().numpy().T))
    assert participation_ratio(x) == pytest.approx(variances.sum() ** 2 / (variances**2).sum(), rel=1e-6)


@pytest.mark.parametrize(
    "embeddings",
    [torch.zeros(20, 8), torch.ones(20, 8), torch.nn.functional.pad(normal(20, 2), (0, 30)), normal(1, 8)],
    ids=["zeros", "constant", "rank 2", "one"],
)
def test_ranks_are_finite_on_zero_singular_values(embeddings: torch.Tensor) -> None:
    assert 0.99 < rankme(embeddings) < 3
    assert 0 <= participation_ratio(embeddings) < 3


def error_by_loops(z: Any, x: Any, where: Any, scale: float, *, within: bool) -> float:
    pairs = [
        (i, j)
        for i in range(len(z))
        for j in range(i)
        if where[i, 0] == where[j, 0] and (where[i, 1] == where[j, 1]) == within
    ]
    return float(np.mean([abs(scale * np.linalg.norm(z[i] - z[j]) - np.linalg.norm(x[i] - x[j])) for i, j in pairs]))


def test_distance_errors_are_of_pairs_of_one_step_within_and_across_scans() -> None:
    x, z = 50 * normal(24, 3), normal(24, 4)
    where = torch.from_numpy(np.random.default_rng(2).integers(0, 3, (24, 2)))
    figures = figures_of(z, x, where, 100.0)
    assert figures["distance_error_mm"] == pytest.approx(error_by_loops(z, x, where, 100.0, within=True), rel=1e-4)
    across = error_by_loops(z, x, where, 100.0, within=False)
    assert figures["distance_error_across_mm"] == pytest.approx(across, rel=1e-4)
    alone = figures_of(z[:2], x[:2], torch.tensor([[0, 0], [1, 0]]), 100.0)  # two steps: no pair at all
    assert math.isnan(alone["distance_error_mm"])
    assert math.isnan(alone["distance_error_across_mm"])


def test_distances_without_a_unit_are_scaled_to_fit_best() -> None:
    x = 50 * normal(20, 3)
    where = torch.zeros(20, 2, dtype=torch.int64)
    assert figures_of(x / 37, x, where, None)["distance_error_mm"] == pytest.approx(0, abs=1e-3)
    assert figures_of(x / 37, x, where, 1.0)["distance_error_mm"] > 10


def test_spread_is_that_of_single_dimensions_within_steps() -> None:
    z = normal(300, 3) * torch.tensor([1.0, 2.0, 0.5])
    where = torch.stack([torch.arange(300) % 3, torch.zeros(300, dtype=torch.int64)], dim=1)
    moved = z + where[:, :1] * 1000.0  # what weights do between steps
    for embeddings in (z, moved):
        figures = figures_of(embeddings, z, where, 100.0)
        assert figures["embedding_sd"] == pytest.approx(3.5 / 3, rel=0.1)
        assert figures["embedding_sd_least"] == pytest.approx(0.5, rel=0.1)
        assert figures["rankme"] > 2


@pytest.mark.parametrize(
    "embeddings",
    [torch.full((60, 16), 0.3), 0.3 + 1e-6 * normal(60, 16), normal(60, 1) @ torch.ones(1, 16)],
    ids=["a point", "a point with noise", "a line"],
)
def test_the_alarm_rings_on_collapse_and_says_what_to_do(embeddings: torch.Tensor) -> None:
    warning = alarm(embeddings)
    assert warning is not None
    assert "learning_rate" in warning
    drifting = embeddings + (torch.arange(60) % 3)[:, None] * normal(1, 16)  # a point that moves is still one
    assert alarm(drifting) is not None


@pytest.mark.parametrize("dim", [3, 64])
def test_the_alarm_is_silent_on_embeddings_that_fill_space(dim: int) -> None:
    assert alarm(normal(60, dim)) is None
    assert collapse_warning({}) is None  # a method that found nothing to look at


def losses(scans: int, patches: int, seed: int) -> Losses:
    n = scans * patches
    return Losses(torch.tensor(0.0), {}, normal(n, 4, seed=seed), normal(n, 3), torch.arange(n) // patches)


@pytest.mark.parametrize(
    ("steps", "scans", "patches"), [(1, 64, 64), (9, 64, 16), (100, 4, 512), (5000, 2, 8), (3, 1, 5)]
)
def test_a_sample_is_bounded_spread_over_the_epoch_and_has_both_kinds_of_pairs(
    steps: int, scans: int, patches: int
) -> None:
    sample = Sample(config(), steps)
    for step in range(steps):
        sample.take(losses(scans, patches, step % 7), step)
    kept = sample.tensors()["where"]
    assert len(kept) <= SAMPLE
    assert len(kept) >= min(SAMPLE // 2, steps * scans * patches)
    assert len(torch.unique(kept[:, 0])) >= min(steps, 100)
    assert kept[:, 0].max() >= 0.9 * (steps - 1)
    figures = sample.figures()
    assert math.isfinite(figures["distance_error_mm"])
    assert math.isfinite(figures["distance_error_across_mm"]) == (scans > 1)


def test_a_sample_that_is_restored_goes_on() -> None:
    one, other = Sample(config(), 10), Sample(config(), 10)
    for step in range(10):
        one.take(losses(3, 20, step), step)
        other.take(losses(3, 20, step), step)
        kept = other.tensors()
        other = Sample(config(), 10)
        other.restore(kept)
    assert one.figures() == other.figures()
    one.clear()
    assert one.figures() == {}


STEADY = config(
    width=4,
    epochs=3,
    steps_per_epoch=8,
    warmup_steps=4,
    descriptor_weight=0.0,
    learning_rate=1e-2,
    augmentation=STILL,
)


def warnings_of(directory: Path, **changes: Any) -> list[str]:
    torch.set_num_threads(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(replace(STEADY, **changes), sources(3), directory, device="cpu")
    return [str(warning.message) for warning in caught if warning.category is TrainingWarning]


def test_the_alarm_rings_when_weights_die(tmp_path: Path) -> None:
    said = warnings_of(tmp_path, learning_rate=1e-4, weight_decay=9e3, warmup_steps=0)
    assert "collapsing" in said[-1]


@pytest.mark.parametrize("method", ["isimed", "simclr"])
def test_the_alarm_rings_on_a_loss_that_is_least_at_a_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    real = Method.forward

    def attract(of: Method, outputs: Any, batch: Any, step: int) -> Losses:
        found = outputs["embedding"].flatten(2).transpose(1, 2).flatten(0, 1)  # (n, d)
        return replace(real(of, outputs, batch, step), total=(found - found.mean(dim=0)).square().mean())

    monkeypatch.setattr(Method, "forward", attract)
    said = warnings_of(tmp_path, method=method, epochs=5, steps_per_epoch=12, learning_rate=0.1, schedule="exponential")
    assert "collapsing" in said[-1]


@pytest.mark.parametrize("method", ["isimed", "simclr", "barlowtwins", "regisimed", "coordinate"])
def test_the_alarm_is_silent_on_a_good_run(tmp_path: Path, method: str) -> None:
    assert warnings_of(tmp_path, method=method) == []
