"""The look of all figures, and how figures become SVG or PNG.

No pyplot, no state, and no influence of the user's matplotlibrc. The same input gives the same bytes.
"""

import io
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from numpy import ndarray

from poise.runtime.run_folder import Json


class Style(NamedTuple):
    """How an arm looks in every figure: told apart by color, and without color by dash and marker."""

    color: str
    dash: Literal["-", "--", "-.", ":"]
    marker: str


# Okabe and Ito's palette, made for color-blind readers; its yellow is too pale for lines on white.
STYLES = (
    Style("#0072b2", "-", "o"), Style("#d55e00", "--", "s"), Style("#009e73", "-.", "^"), Style("#a8518a", ":", "D"),
    Style("#b07c00", "-", "v"), Style("#3a96c9", "--", "P"),
)  # fmt: skip
GRAY = "#666666"
ALARM = "#a3180b"

LOOK = {
    "font.family": "sans-serif", "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
    "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.8, "axes.unicode_minus": True,
    "text.parse_math": False,  # a `$` in a label is a dollar
    "svg.fonttype": "none",  # text stays text: small, crisp and searchable
}  # fmt: skip


# Colors of a figure on a page, as variables of page.css: a page has a dark mode, and its charts follow it.
_ON_PAGES = {style.color: f"var(--series-{i}, {style.color})" for i, style in enumerate(STYLES)} | {
    GRAY: f"var(--muted, {GRAY})", "#e4e4e4": "var(--grid, #e4e4e4)", "#000000": "var(--ink, #000000)",
    "#ffffff": "var(--paper, #ffffff)", ALARM: f"var(--alarm, {ALARM})",
}  # fmt: skip
_COLOR = re.compile("|".join(_ON_PAGES))

# matplotlib's settings are of the whole process, and a page may be drawn in a thread beside a run (live.py).
_ONE_AT_A_TIME = threading.RLock()

# ---- output: the canvases print at once what `Figure.savefig` draws twice, the first time for the layout alone ----


def on_pages(color: str) -> str:
    """A color of a figure as page.css has it, in light and in dark mode."""
    return _ON_PAGES.get(color, color)


@contextmanager
def look(identifier: str) -> Iterator[None]:
    """Our settings on matplotlib's own defaults, whatever the user's matplotlibrc says."""
    with _ONE_AT_A_TIME, matplotlib.style.context(["default", LOOK | {"svg.hashsalt": identifier}]):
        yield


def svg(figure: Figure, identifier: str) -> str:
    """The <svg> element alone, undated, every id made unique on the page by `identifier`, in the page's colors.

    identifier: may be the name of a folder; of characters that no id may have, the numbers are taken.
    """
    identifier = re.sub(r"[^A-Za-z0-9_-]", lambda found: f"-{ord(found[0]):x}-", identifier)
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{identifier}-", text[text.index("<svg") :])
    return _COLOR.sub(lambda found: _ON_PAGES[found[0]], text)


def save_png(figure: Figure, path: str | Path) -> None:
    """As a PNG file that names no software version."""
    figure.set_dpi(160)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


# ---- numbers ----


def floats(values: Sequence[Any]) -> ndarray:
    """Numbers as an array, null as NaN."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def column_of(rows: Sequence[Json], key: str) -> ndarray:
    """One number of every row; NaN where it is missing or null."""
    return floats([row.get(key) for row in rows])


def error_bars(intervals: Sequence[Json]) -> ndarray:
    """(2, N): how far intervals of mean, low and high reach below and above their means."""
    return np.abs(np.stack([column_of(intervals, "low"), column_of(intervals, "high")]) - column_of(intervals, "mean"))
