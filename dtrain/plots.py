"""Owns the figures: training curves, drawn without pyplot, so that no backend and no global state is touched."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING, VALIDATION, GRID, TEXT = "#1f5fa8", "#d9730d", "#e4e4e4", "#444444"


def training_curves(
    history: Mapping[str, Sequence[float]], epochs: Sequence[int], title: str | None = None
) -> "Figure":
    """Draws a history: a panel for each metric, training and validation together, at most two panels a row.

    Args:
        history: each metric's values, as in History.history; `val_` before a name means validation. A shorter list,
            such as that of a validation every other epoch, is drawn over the epochs that it fits best. A metric that is
            an array, one number a class, say, has no curve.
        epochs: the epochs' numbers from 0, as in History.epoch; shown from 1, as Keras prints them.
        title: stands above all panels.

    Returns:
        A matplotlib figure; a notebook shows it, `figure.savefig(path)` writes it.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    history = {name: values for name, values in history.items() if len(values) and np.ndim(values[0]) == 0}
    panels = _panels(history)
    columns = min(2, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(5.2 * columns, 3.2 * rows + (0.4 if title else 0.0)), dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes, metric in zip(grid, panels, strict=False):
        _draw(axes, metric, history, epochs)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    _label_bottoms(grid[: len(panels)], columns)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=TEXT)
    return figure


def _panels(history: Mapping[str, Sequence[float]]) -> list[str]:
    """Metrics without `val_`: loss first, the learning rate last, the others as they come."""
    metrics = list(dict.fromkeys(name.removeprefix("val_") for name, values in history.items() if len(values)))
    return sorted(metrics, key=lambda name: (name != "loss", name == "learning_rate"))


def _draw(axes: "Axes", metric: str, history: Mapping[str, Sequence[float]], epochs: Sequence[int]) -> None:
    shown: list[float] = []
    series = [("training", metric, TRAINING), ("validation", f"val_{metric}", VALIDATION)]
    series = [(label, name, colour) for label, name, colour in series if len(history.get(name, ()))]
    for label, name, colour in series:
        values = [float(value) for value in history[name]]
        at = [epoch + 1 for epoch in _epochs_of(len(values), epochs)]
        # A line needs two neighbours that are numbers: where there are few points, mark them.
        few = sum(map(math.isfinite, values)) <= 20
        axes.plot(
            at, [_drawable(value) for value in values], color=colour, label=label, linewidth=1.8,
            marker="o" if few else None, markersize=4,
        )  # fmt: skip
        shown += [value for value in values if math.isfinite(value)]
    if metric == "learning_rate" and shown and min(shown) > 0 and max(shown) / min(shown) >= 10:
        axes.set_yscale("log")
    _clean(axes)
    axes.set_title(metric.replace("_", " "), loc="left", fontsize=10.5, color=TEXT)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=TEXT)
    if not shown:
        axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", va="center", color=TEXT)
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] + 0.5, epochs[0] + 1.5)


def _epochs_of(length: int, epochs: Sequence[int]) -> Sequence[int]:
    """The epochs of a list that may be shorter than the others: every n-th of them, counted from the end of n."""
    if length >= len(epochs):
        return [*epochs, *range(len(epochs), length)][:length]
    every = len(epochs) // length
    return list(epochs[every - 1 :: every][:length])


def _drawable(value: float) -> float:
    """A gap for infinity too, which matplotlib would take for a limit."""
    return value if math.isfinite(value) else math.nan


def _clean(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=TEXT, labelsize=8.5, length=0)
    axes.margins(x=0.03, y=0.08)


def _label_bottoms(grid: Sequence[Any], columns: int) -> None:
    """Names the x axis once in each column, under its last panel."""
    for axes in grid[-columns:]:
        axes.set_xlabel("epoch", fontsize=9, color=TEXT)
