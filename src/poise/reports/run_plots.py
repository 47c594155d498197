"""Small figures of runs, one panel each, as SVG text: a page puts as many side by side as its width takes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from poise.reports.plot_style import ALARM, GRAY, STYLES, column_of, look, svg
from poise.runtime.run_folder import Json

_SIZE = (3.5, 2.2)  # inches; pages show it about 300 px wide, so that 9 pt are 11 px
_FEW_HEADS = 8
_MOST_POINTS = 300  # of a line: as many as a panel has pixels
_NARROWEST = 1 / 150  # of an alarm's mark, as a share of the axis


class Line(NamedTuple):
    """One line of a panel. low, high: a band around it; faint: one of so many that each alone would hide the others."""

    label: str
    x: ndarray
    y: ndarray
    style: int = 0
    low: ndarray | None = None
    high: ndarray | None = None
    faint: bool = False


def panel(
    lines: Sequence[Line],
    title: str,
    identifier: str,
    *,
    xlabel: str = "step",
    ylabel: str = "",
    alarms: Sequence[float] = (),
    level: float | None = None,
    floor: float | None = None,
    ceiling: float | None = None,
) -> str:
    """Lines in one panel. alarms: steps that are shaded; level: a dashed line; floor, ceiling: ends of the axis.

    Long lines are drawn as means of as many steps as fit into a pixel (`steps_per_point`). identifier: unique on the
    page.
    """
    with look(identifier):
        figure = Figure(figsize=_SIZE, layout="constrained")
        ax = figure.subplots()
        for line in lines:
            _draw(ax, line)
        if len(alarms):
            ax.broken_barh(
                shaded(alarms, max(float(line.x[-1]) for line in lines)), (0, 1), transform=ax.get_xaxis_transform(),
                color=ALARM, alpha=0.16, linewidth=0, zorder=0.5,
            )  # fmt: skip
            ax.axvline(alarms[0], color=ALARM, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        if level is not None:
            ax.axhline(level, color=GRAY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        if floor is not None:
            ax.set_ylim(bottom=floor)
        if ceiling is not None:
            ax.set_ylim(top=ceiling)
        ax.set_title(title, loc="left")
        ax.set(xlabel=xlabel, ylabel=ylabel)
        if sum(bool(line.label) for line in lines) > 1:
            ax.legend(loc="best", fontsize=8)
        return svg(figure, identifier)


def over_steps(rows: Sequence[Json], key: str, label: str = "", style: int = 0, spread: str = "") -> Line:
    """One number of every step's metrics. spread: name of its std, which becomes a band."""
    y = column_of(rows, key)
    std = column_of(rows, spread) if spread else None
    low, high = (y - std, y + std) if std is not None else (None, None)
    return Line(label, column_of(rows, "step"), y, style, low, high)


def steps_per_point(steps: int) -> int:
    """How many steps a drawn point is the mean of."""
    return -(-steps // _MOST_POINTS)


def thinned(line: Line) -> Line:
    """The line as means of `steps_per_point` steps; NaN where a part has no number. The last part may be shorter."""
    size = steps_per_point(len(line.x))
    if size <= 1:
        return line

    def means(values: ndarray) -> ndarray:
        parts = [values[start : start + size] for start in range(0, len(values), size)]
        return np.array([np.nan if np.isnan(part).all() else np.nanmean(part) for part in parts])

    low, high = (None if end is None else means(end) for end in (line.low, line.high))
    return line._replace(x=means(line.x), y=means(line.y), low=low, high=high)


def shaded(steps: Sequence[float], last: float) -> list[tuple[float, float]]:
    """(start, width) of the stretches of steps, in order, wide enough to be seen on an axis that ends at `last`."""
    half = max(0.5, last * _NARROWEST / 2)
    found: list[list[float]] = []
    for step in steps:
        if found and step - half <= found[-1][1]:
            found[-1][1] = step + half
        else:
            found.append([step - half, step + half])
    return [(start, end - start) for start, end in found]


def heads(rows: Sequence[Json], identifier: str) -> str:
    """The mean reward of each head over the steps."""
    known = [row for row in rows if row.get("heads")]
    step, values = column_of(known, "step"), np.array([row["heads"] for row in known], dtype=float)
    faint = values.shape[-1] > _FEW_HEADS
    return panel([Line("", step, column, faint=faint) for column in values.T], "Reward of each head", identifier)


def reliability(bins: Sequence[Json], identifier: str, title: str = "Reliability") -> str:
    """Accuracy against claimed probability."""
    x, y = column_of(bins, "confidence"), column_of(bins, "accuracy")
    diagonal = Line("as often right as it says", np.array([0.5, 1.0]), np.array([0.5, 1.0]), len(STYLES))
    return panel(
        [diagonal, Line("pairs", x, y)], title, identifier,
        xlabel="probability that the model claims", ylabel="share in the right order",
    )  # fmt: skip


def _draw(ax: Axes, line: Line) -> None:
    line = thinned(line)
    known = STYLES[line.style % len(STYLES)] if line.style < len(STYLES) else None
    color, dash = (known.color, known.dash) if known else (GRAY, "--")
    marker = "o" if len(line.x) < 3 else ""
    width, alpha = (0.6, 0.4) if line.faint else (1.6, 1.0)
    ax.plot(
        line.x, line.y, color=color, linestyle=dash, marker=marker, linewidth=width, alpha=alpha,
        label=line.label or None,
    )  # fmt: skip
    if line.low is not None and line.high is not None:
        ax.fill_between(line.x, line.low, line.high, color=color, alpha=0.13, linewidth=0)
