"""Figures for papers: a point and its matches in three planes, and an embedding coloured by anatomy.

Volumes arrive as arrays with their affine and are cut along the patient's own axes, so that oblique and anisotropic
scans are drawn to one scale. Figures are matplotlib objects without global state; nothing is shown on a screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.errors import MissingExtra, UsageError
from isimed_index.space import Affine, apply_affine, inverse, spacing_mm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Convention = Literal["radiological", "neurological"]

# Okabe and Ito's palette: told apart by readers with any colour vision, on grey and on white.
_QUERY, _MATCH, _TRUTH = "#E69F00", "#56B4E9", "#009E73"
_PLANES = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}  # patient axes drawn across and up
_ENDS = (("L", "R"), ("P", "A"), ("I", "S"))  # where each patient axis begins and ends
_AXES_MM = ("x: left → right (mm)", "y: posterior → anterior (mm)", "z: inferior → superior (mm)")
_SUFFIXES = (".png", ".svg", ".pdf")
_SMALLEST_STEP_MM = 0.5
_WIDTH_IN, _GAP_IN, _HEAD_IN, _TITLE_IN, _FOOT_IN = 7.0, 0.06, 0.16, 0.26, 0.24  # of match figures
_FONT = {"font.family": "DejaVu Sans", "font.size": 8, "svg.hashsalt": "isimed", "pdf.fonttype": 42}


@dataclass(frozen=True, slots=True)
class Panel:
    """One scan with a point in it."""

    scan: str
    values: NDArray[np.float32]  # (x, y, z)
    affine: Affine  # voxel index → RAS+ mm
    point_mm: tuple[float, float, float]  # RAS+, drawn with a cross hair
    truth_mm: tuple[float, float, float] | None = None  # RAS+, where it is known; drawn with a ring
    note: str = ""  # a short remark for the title, such as a score


def match_figure(
    query: Panel,
    matches: Sequence[Panel],
    convention: Convention = "radiological",
    field_mm: float | None = None,
) -> Figure:
    """The query and its matches, a row each: axial, coronal and sagittal planes through the point.

    All rows have one scale. Titles give the scan, the point in mm, and the distance to the truth where it is known.
    `field_mm` crops every plane to that edge length around the point; None shows the whole scan.
    """
    if convention not in ("radiological", "neurological"):
        raise UsageError(f"expected the convention radiological or neurological, found {convention!r}")
    if field_mm is not None and field_mm <= 0:
        raise UsageError(f"expected a field above 0 mm, found {field_mm}")
    panels = [query, *matches]
    middles, size = _fields(panels, field_mm)
    with style():
        figure, rows = _rows_of_planes(size, len(panels))
        for row, (panel, middle) in enumerate(zip(panels, middles, strict=True)):
            window = _window(panel.values)
            for axes, plane in zip(rows[row], _PLANES.values(), strict=True):
                _draw_plane(axes, panel, plane, middle - size / 2, middle + size / 2, window)
                _draw_marks(axes, panel, plane, _QUERY if row == 0 else _MATCH)
                _draw_ends(axes, *plane, mirrored=convention == "radiological" and plane[0] == 0)
            _draw_scale_bar(rows[row][-1])
            _write_title(figure, rows[row], f"{'query' if row == 0 else f'match {row}'}: {_title(panel)}")
        _write_foot(figure, panels, convention)
    return figure


def embedding_figure(
    xy: ArrayLike, centres_mm: ArrayLike, name: str = "UMAP", frame: str = "patient", seed: int = 0
) -> Figure:
    """A 2-D embedding (n, 2) three times, coloured by the patches' centres (n, 3) in mm along x, y and z.

    `name` labels the axes (UMAP, PC), `frame` says whose millimetres they are. Points are drawn in random order, so
    that no scan hides another.
    """
    points, centres = np.asarray(xy, dtype=np.float64), np.asarray(centres_mm, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or centres.shape != (points.shape[0], 3) or not len(points):
        raise UsageError(f"expected points (n, 2) and centres (n, 3), found {points.shape} and {centres.shape}")
    order = np.random.default_rng(seed).permutation(len(points))
    dot = float(np.clip(20_000 / len(points), 0.4, 14))  # pt²
    with style():
        figure = blank_figure(7.2, 2.75)
        figure.set_layout_engine("constrained")
        for axis, axes in enumerate(figure.subplots(1, 3, sharex=True, sharey=True)):
            shown = centres[order, axis]
            low, high = np.percentile(shown, (0.5, 99.5))
            dots = axes.scatter(
                *points[order].T, c=shown, s=dot, cmap="viridis", vmin=low, vmax=high, linewidths=0, rasterized=True
            )
            axes.set_aspect("equal", adjustable="box")
            axes.set(xticks=[], yticks=[], xlabel=f"{name} 1")
            axes.spines[["top", "right"]].set_visible(False)
            bar = figure.colorbar(dots, ax=axes, location="top", fraction=0.05, pad=0.04, aspect=30)
            bar.set_label(_AXES_MM[axis])
            bar.outline.set_visible(False)
            bar.ax.tick_params(length=2)
            if axis == 0:
                axes.set_ylabel(f"{name} 2")
        figure.supxlabel(
            f"{len(points):,} patches, coloured by their centres in {frame} coordinates", fontsize=7, color="0.25"
        )
    return figure


def check_suffix(path: Path) -> None:
    """`UsageError` when no figure can be written under that name."""
    if path.suffix not in _SUFFIXES:
        raise UsageError(
            f"expected a figure file {', '.join(_SUFFIXES)}, found {path.suffix or 'no suffix'}",
            next_step=f"name it {path.stem}.png",
        )


def save(figure: Figure, path: Path, dpi: int = 200) -> None:
    """Write a figure as .png, .svg or .pdf; the same figure gives the same bytes."""
    check_suffix(path)
    dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}
    with style():
        figure.savefig(path, dpi=dpi, metadata=dated[path.suffix], facecolor="white")


def plane_values(
    panel: Panel, plane: tuple[int, int], low: NDArray[np.float64], high: NDArray[np.float64], step_mm: float
) -> NDArray[np.float32]:
    """A plane through the panel's point, cut along patient axes `plane` = (across, up) from `low` to `high` (3,) mm.

    Linear interpolation at `step_mm`; element [0, 0] lies at `low`, NaN stands outside the scan.
    """
    from scipy.ndimage import map_coordinates

    across, up = plane
    steps = [low[axis] + step_mm * np.arange(int((high[axis] - low[axis]) / step_mm) + 1) for axis in plane]
    points = np.empty((steps[1].size, steps[0].size, 3))
    points[:] = panel.point_mm
    points[..., across], points[..., up] = steps[0][None, :], steps[1][:, None]
    voxels = apply_affine(inverse(panel.affine), points)
    sampled: NDArray[np.float32] = map_coordinates(
        panel.values, np.moveaxis(voxels, -1, 0), order=1, mode="constant", cval=np.nan, output=np.float32
    )
    return sampled


def _fields(panels: Sequence[Panel], field_mm: float | None) -> tuple[list[NDArray[np.float64]], NDArray[np.float64]]:
    """What to show: the middle (3,) of each panel's field in RAS+ mm, and the size (3,) in mm of all of them."""
    boxes = [_extent_mm(panel) for panel in panels]
    if field_mm is not None:
        return [np.asarray(panel.point_mm, dtype=np.float64) for panel in panels], np.full(3, field_mm)
    size: NDArray[np.float64] = np.max([high - low for low, high in boxes], axis=0)
    return [(low + high) / 2 for low, high in boxes], size


def _rows_of_planes(size: NDArray[np.float64], count: int) -> tuple[Figure, list[list[Axes]]]:
    """Axes placed by hand, so that a millimetre has one length all over the figure.

    title
    axial   coronal   sagittal      each centred in the row's height
    """
    widths = [size[across] for across, _ in _PLANES.values()]
    scale = (_WIDTH_IN - 4 * _GAP_IN) / sum(widths)  # inches a millimetre
    tallest = scale * max(size[up] for _, up in _PLANES.values())
    row_height = tallest + _TITLE_IN
    height = count * row_height + _FOOT_IN + _HEAD_IN
    figure = blank_figure(_WIDTH_IN, height)
    rows: list[list[Axes]] = []
    for row in range(count):
        left, bottom, axes = _GAP_IN, height - _HEAD_IN - (row + 1) * row_height, []
        for (plane, (_, up)), width in zip(_PLANES.items(), widths, strict=True):
            wide, high = scale * width, scale * size[up]
            box = (left / _WIDTH_IN, (bottom + (tallest - high) / 2) / height, wide / _WIDTH_IN, high / height)
            axes.append(figure.add_axes(box))
            if row == 0:
                middle = (left + wide / 2) / _WIDTH_IN
                figure.text(middle, 1 - 0.03 / height, plane, ha="center", va="top", color="0.35")
            left += wide + _GAP_IN
        rows.append(axes)
    return figure, rows


def _draw_plane(
    axes: Axes,
    panel: Panel,
    plane: tuple[int, int],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    window: tuple[float, float],
) -> None:
    step = max(_SMALLEST_STEP_MM, float(spacing_mm(panel.affine).min()) / 2)
    values = plane_values(panel, plane, low, high, step)
    across, up = plane
    left, bottom = low[across] - step / 2, low[up] - step / 2
    bounds = (left, left + step * values.shape[1], bottom, bottom + step * values.shape[0])
    axes.imshow(
        values, cmap="gray", origin="lower", extent=bounds, vmin=window[0], vmax=window[1], interpolation="bilinear"
    )
    axes.set(xlim=(low[across], high[across]), ylim=(low[up], high[up]), xticks=[], yticks=[], facecolor="black")
    axes.set_aspect("equal")
    axes.spines[:].set_visible(False)


def _draw_marks(axes: Axes, panel: Panel, plane: tuple[int, int], colour: str) -> None:
    """The cross hair, open in the middle so that it hides nothing, and a ring at the truth."""
    x, y = (panel.point_mm[axis] for axis in plane)
    gap = 6.0
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    line: dict[str, Any] = {"colors": colour, "linewidth": 0.8, "alpha": 0.9}
    axes.hlines([y, y], [left, x + gap], [x - gap, right], **line)
    axes.vlines([x, x], [bottom, y + gap], [y - gap, top], **line)
    if panel.truth_mm is not None:
        true_x, true_y = (panel.truth_mm[axis] for axis in plane)
        axes.plot(true_x, true_y, "o", mfc="none", mec=_TRUTH, ms=7, mew=1.3)


def _draw_ends(axes: Axes, across: int, up: int, *, mirrored: bool) -> None:
    """Letters for the patient's directions; radiological planes are mirrored, the patient's right on the left."""
    if mirrored:
        axes.invert_xaxis()
    left, right = _ENDS[across][::-1] if mirrored else _ENDS[across]
    bottom, top = _ENDS[up]
    places = {(0.02, 0.5): left, (0.98, 0.5): right, (0.5, 0.02): bottom, (0.5, 0.98): top}
    for (x, y), letter in places.items():
        side = {0.02: "left", 0.5: "center", 0.98: "right"}[x]
        height = {0.02: "bottom", 0.5: "center", 0.98: "top"}[y]
        _write_on_image(axes, (x, y), letter, transform=axes.transAxes, ha=side, va=height, weight="bold")


def _draw_scale_bar(axes: Axes) -> None:
    left, right = sorted(axes.get_xlim())
    length = next((mm for mm in (100, 50, 20, 10, 5, 2) if mm < (right - left) / 3), 1)
    bottom = axes.get_ylim()[0] + 0.05 * np.ptp(axes.get_ylim())
    start = right - 0.04 * (right - left) - length
    axes.hlines(bottom, start, start + length, colors="white", linewidth=2)
    above = (start + length / 2, bottom + 0.01 * np.ptp(axes.get_ylim()))
    _write_on_image(axes, above, f"{length} mm", ha="center", va="bottom")


def _write_on_image(axes: Axes, place: tuple[float, float], text: str, **style: Any) -> None:
    """White letters with a dark rim, readable on any tissue."""
    from matplotlib.patheffects import withStroke

    axes.text(*place, text, color="white", path_effects=[withStroke(linewidth=1.5, foreground="black")], **style)


def _title(panel: Panel) -> str:
    x, y, z = panel.point_mm
    parts = [panel.scan, f"({x:.1f}, {y:.1f}, {z:.1f}) mm"]
    if panel.truth_mm is not None:
        parts.append(f"error {float(np.linalg.norm(np.subtract(panel.point_mm, panel.truth_mm))):.1f} mm")
    return "   ".join([*parts, panel.note] if panel.note else parts)


def _write_title(figure: Figure, row: Sequence[Axes], text: str) -> None:
    top = max(axes.get_position().y1 for axes in row)
    figure.text(_GAP_IN / _WIDTH_IN, top + 0.04 / figure.get_figheight(), text, ha="left", va="bottom", fontsize=9)


def _write_foot(figure: Figure, panels: Sequence[Panel], convention: Convention) -> None:
    side = "left" if convention == "radiological" else "right"
    ring = " Ring: known position." if any(panel.truth_mm is not None for panel in panels) else ""
    text = f"{convention.capitalize()} convention: axial and coronal planes show the patient's right on the {side}."
    figure.text(
        _GAP_IN / _WIDTH_IN,
        0.05 / figure.get_figheight(),
        f"{text} Points in RAS+ mm.{ring}",
        ha="left",
        va="bottom",
        fontsize=7,
        color="0.25",
    )


def _extent_mm(panel: Panel) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The box (low, high) in RAS+ mm that holds the whole scan and its point."""
    if panel.values.ndim != 3:
        raise UsageError(f"expected a volume (x, y, z), found shape {panel.values.shape}")
    corners = np.stack(np.meshgrid(*[(-0.5, n - 0.5) for n in panel.values.shape], indexing="ij"), axis=-1)
    points = np.vstack([apply_affine(panel.affine, corners.reshape(-1, 3)), panel.point_mm])
    return points.min(axis=0), points.max(axis=0)


def _window(values: NDArray[np.float32]) -> tuple[float, float]:
    """Grey levels for black and white: percentiles 1 and 99.5 of a thinned copy."""
    thin = values[tuple(slice(None, None, max(1, n // 64)) for n in values.shape)]
    low, high = np.nanpercentile(thin, (1, 99.5))
    return float(low), float(high) if high > low else float(low) + 1


def blank_figure(width_in: float, height_in: float) -> Figure:
    """An empty figure that is drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in))
    FigureCanvasAgg(figure)
    return figure


def style() -> Any:
    """The fonts of all figures, for as long as one is drawn or written."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib is not installed", next_step="pip install 'isimed-index[plot]'") from error
    return matplotlib.rc_context(_FONT)
