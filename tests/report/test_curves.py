"""The curves of a training run."""

from __future__ import annotations

import pytest

from isimed_index.errors import UsageError
from isimed_index.report.curves import training_figure
from isimed_index.report.figures import save

EPOCHS = [
    {
        "epoch": n,
        "step": 10 * n,
        "learning_rate": 0.1,
        "patches_per_s": 5.0,
        "loss": 4.0 / n,
        "distance": 3.0 / n,
        "descriptor": 1.0 / n,
        "distance_error_mm": 20.0 / n,
        "distance_error_across_mm": None if n == 2 else 30.0 / n,
        "rankme": 3.0 + n,
        "participation_ratio": 2.0 + n,
        "spread": 0.5,
        "embedding_sd": 0.1,
        "embedding_sd_least": 0.05,
    }
    for n in (1, 2, 3)
]
HELD_OUT = {"validation_loss": 7.0, "validation_distance": 6.0, "validation_rankme": 2.0, "best_epoch": 2}


def drawn(figure) -> list[dict[str, list[float]]]:
    """The labelled lines of each panel."""
    return [
        {line.get_label(): list(line.get_ydata()) for line in axes.get_lines() if line.get_label()[0] != "_"}
        for axes in figure.axes
    ]


def test_every_figure_of_a_run_has_its_line(tmp_path):
    figure = training_figure([entry | HELD_OUT for entry in EPOCHS])
    loss, terms, errors, ranks = drawn(figure)
    assert loss == {"loss": [4.0, 2.0, 4 / 3], "loss, held out": [7.0] * 3}
    assert set(terms) == {"distance", "distance, held out", "descriptor"}
    assert set(errors) == {"within", "across scans"}
    assert errors["across scans"][1] != errors["across scans"][1]  # NaN: a gap
    assert set(ranks) == {"RankMe", "RankMe, held out", "participation ratio"}
    for axes in figure.axes:
        assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_label().startswith("_")] == [2]
    save(figure, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 20_000


def test_steep_curves_are_drawn_by_powers_of_ten():
    steep = [entry | {"loss": 100.0 if entry["epoch"] == 1 else 1.0} for entry in EPOCHS]
    assert [axes.get_yscale() for axes in training_figure(steep).axes] == ["log", "linear", "linear", "linear"]
    falling = [entry | {"loss": 100.0 if entry["epoch"] == 1 else -1.0} for entry in EPOCHS]
    low, high = training_figure(falling).axes[0].get_ylim()
    assert low <= -1 < 100 <= high


def test_metrics_of_an_older_version_are_drawn_without_what_they_lack():
    old = [{"epoch": 1, "step": 3, "loss": 2.0, "distance": 2.0, "distance_error_mm": None, "rankme": 1.5}]
    assert [set(panel) for panel in drawn(training_figure(old))] == [{"loss"}, {"distance"}, set(), {"RankMe"}]


def test_no_epoch_is_no_figure():
    with pytest.raises(UsageError, match="at least one epoch"):
        training_figure([])
