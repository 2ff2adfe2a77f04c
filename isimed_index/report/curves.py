"""The curves of a training run: what its metrics say, epoch by epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from isimed_index.errors import UsageError
from isimed_index.report.figures import blank_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Epochs = Sequence[Mapping[str, float | None]]

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito
_HELD_OUT = "validation_"
_DWARFED = 12.0
# What an epoch's line holds beside the terms of its loss.
_NO_TERMS = {
    "epoch", "step", "learning_rate", "patches_per_s", "loss", "best_epoch", "distance_error_mm",
    "distance_error_across_mm", "rankme", "participation_ratio", "spread", "embedding_sd", "embedding_sd_least",
    "charts", "chart_deviation", "chart_change",
}  # fmt: skip


def training_figure(epochs: Epochs) -> Figure:
    """Four panels by epoch: loss, its terms, distance errors (mm), and effective ranks; held-out subjects are dashed.

    `epochs` are the lines of a run's metrics; what they lack is left out, and so is what has no value in an epoch.
    `UsageError` without any epoch.
    """
    if not epochs:
        raise UsageError("expected the metrics of at least one epoch, found none")
    terms = [key for key in epochs[0] if key not in _NO_TERMS and not key.startswith(_HELD_OUT)]
    panels = (
        ("loss", {"loss": "loss"}),
        ("terms of the loss", {key: key.replace("_", " ") for key in terms}),
        ("|D latent − D physical| (mm)", {"distance_error_mm": "within", "distance_error_across_mm": "across scans"}),
        ("effective rank", {"rankme": "RankMe", "participation_ratio": "participation ratio"}),
    )
    with style():
        figure = blank_figure(7.0, 4.4)
        figure.set_layout_engine("constrained")
        for axes, (label, lines) in zip(figure.subplots(2, 2, sharex=True).flat, panels, strict=True):
            for colour, (key, name) in zip(_COLOURS, lines.items(), strict=False):
                _draw(axes, epochs, key, name, colour)
                _draw(axes, epochs, _HELD_OUT + key, f"{name}, held out", colour, held_out=True)
            _scale(axes, may_be_steep=label != "effective rank")
            _mark_best(axes, epochs)
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
            axes.xaxis.get_major_locator().set_params(integer=True)
            if len(axes.get_lines()) > 1:
                axes.legend(framealpha=0.7, edgecolor="none", fontsize=6)
        figure.supxlabel("epoch")
    return figure


def _draw(axes: Axes, epochs: Epochs, key: str, name: str, colour: str, *, held_out: bool = False) -> None:
    values = np.array([np.nan if entry.get(key) is None else entry[key] for entry in epochs], dtype=np.float64)
    if np.isfinite(values).any():
        line = "--" if held_out else "-"
        numbers = np.array([entry["epoch"] for entry in epochs], dtype=np.float64)
        axes.plot(numbers, values, line, color=colour, marker="o", markersize=2, linewidth=1, label=name)


def _scale(axes: Axes, *, may_be_steep: bool) -> None:
    """From 0 on, or by powers of ten where the first epochs would dwarf the others."""
    values = np.concatenate([np.empty(0), *(np.asarray(line.get_ydata(), np.float64) for line in axes.get_lines())])
    values = values[np.isfinite(values)]
    if may_be_steep and len(values) and values.min() > 0 and values.max() / values.min() > _DWARFED:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.0), high + 0.05 * (high - min(low, 0.0)))


def _mark_best(axes: Axes, epochs: Epochs) -> None:
    """The epoch whose weights are stored, where validation chose it."""
    best = epochs[-1].get("best_epoch")
    if best:
        axes.axvline(best, color="0.6", linewidth=0.8, zorder=0)
