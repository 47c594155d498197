"""Figures of the report, as SVG text; the main one also as PNG. The only module that imports matplotlib.

Every function takes the JSON of a finished study and draws on a Figure of its own: no pyplot, no state, and no
influence of the user's matplotlibrc. The same input gives the same bytes. A null in the data is a gap in the line.
"""

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy import ndarray

from poise.functional.statistics import smoothed
from poise.reports.summary import noise_label
from poise.runtime.run_folder import Json


class Style(NamedTuple):
    """How an arm looks in every figure: told apart by color, and without color by dash and marker."""

    color: str
    dash: Literal["-", "--", "-.", ":"]
    marker: str


# Okabe and Ito's palette, made for color-blind readers; its yellow is too pale for lines on white.
_STYLES = (
    Style("#0072b2", "-", "o"), Style("#d55e00", "--", "s"), Style("#009e73", "-.", "^"), Style("#a8518a", ":", "D"),
    Style("#b07c00", "-", "v"), Style("#3a96c9", "--", "P"),
)  # fmt: skip
# The same in every figure of an evaluation; a random one, and any other, is gray.
UNCERTAINTY_STYLES = dict(
    zip(
        ("disagreement", "routing_std", "total_std", "last_layer_std", "small_margin", "error_probability"),
        _STYLES,
        strict=True,
    )
)
_GRAY = "#666666"
_FEWEST_PAIRS = 10  # whose error rate is worth a point of a curve

_LOOK = {
    "font.family": "sans-serif", "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4",
    "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.8, "axes.unicode_minus": True,
    "text.parse_math": False,  # a `$` in a label is a dollar
    "svg.fonttype": "none",  # text stays text: small, crisp and searchable
}  # fmt: skip


def arm_styles(comparison: Json, pool: Json | None) -> dict[str, Style]:
    """The style of every arm by name, then of every best-of-n curve that belongs to no arm."""
    names = [arm["name"] for arm in comparison["arms"]]
    names += [curve["name"] for curve in _curves(pool) if arm_of(curve, comparison) is None]
    return {name: _STYLES[i % len(_STYLES)] for i, name in enumerate(names)}


def arm_of(curve: Json, comparison: Json) -> Json | None:
    """The arm trained on what a best-of-n curve selects by: the same objective of the same reward model."""
    for arm in comparison["arms"]:
        if curve["name"] == arm["name"] or _target(curve) == _target(arm):
            return arm
    return None


def over_optimization(comparison: Json, pool: Json | None) -> str:
    """Gold and proxy against √KL: best-of-n and tilted policies where there is a pool, and PPO."""
    with _look("curves"):
        return _svg(_over_optimization(comparison, pool), "curves")


def save_over_optimization(comparison: Json, pool: Json | None, path: str | Path) -> None:
    """The figure of `over_optimization` as a PNG file."""
    with _look("curves"):
        _over_optimization(comparison, pool).savefig(path, format="png", dpi=160, metadata={"Software": None})


def heads(arm: Json, style: Style, identifier: str) -> str:
    """One arm's heads over training: mean rewards and disagreement; with stds also the gap and the routing std.

    identifier: unique on the page; it goes before every id in the SVG.
    """
    steps = [row for row in arm["steps"] if row.get("heads")]
    step = _column(steps, "step")
    panels = ["Reward of each head", "How far the heads are apart"]
    has_std = bool(np.nansum(_column(steps, "routing_std")) > 0)
    with _look(identifier):
        figure = Figure(figsize=(10, 2.9), layout="constrained")
        axes = figure.subplots(1, 3 if has_std else 2, squeeze=False)[0]
        for values in zip(*(row["heads"] for row in steps), strict=True):
            axes[0].plot(step, _floats(values), color=style.color, linewidth=1, alpha=0.7)
        if has_std:  # point heads have no std to choose a nominal head by
            axes[1].plot(step, _column(steps, "gap"), color=style.color, label="gap: nominal − worst case")
        axes[1].plot(step, _column(steps, "disagreement"), color=_GRAY, linestyle="--", label="disagreement")
        axes[1].set_ylim(bottom=0)
        axes[1].legend(loc="best")
        if has_std:
            panels.append("Routing std")
            axes[2].plot(step, _column(steps, "routing_std"), color=style.color)
        for ax, title in zip(axes, panels, strict=True):
            ax.set_title(title, loc="left")
            ax.set_xlabel("PPO step")
        return _svg(figure, identifier)


def stage2(history: Sequence[Json], identifier: str = "stage2") -> str:
    """Fitting the BRME heads: error on held-out preferences, and the heads' own std (log scale)."""
    with _look(identifier):
        figure = Figure(figsize=(10, 2.9), layout="constrained")
        axes = figure.subplots(1, 2)
        panels = (("mse", "Held-out squared error", "linear"), ("std", "Median std of the heads", "log"))
        for ax, (key, title, scale) in zip(axes, panels, strict=True):
            values = _column(history, key)
            ax.plot(_column(history, "step"), values, color=_STYLES[1].color, marker="o", markersize=3)
            if scale == "log" and np.nanmin(values, initial=np.inf) > 0:
                ax.set_yscale(scale)
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter("{x:g}")
            else:
                ax.set_ylim(bottom=0)
            ax.set_title(title, loc="left")
            ax.set_xlabel("optimizer step")
        return _svg(figure, identifier)


def calibration(pairs: Json, identifier: str) -> str:
    """Reliability of a reward model's probabilities, and risk–coverage of its uncertainties."""
    with _look(identifier):
        return _svg(_calibration(pairs), identifier)


def save_calibration(pairs: Json, path: str | Path) -> None:
    """The figure of `calibration` as a PNG file."""
    with _look("calibration"):
        _calibration(pairs).savefig(path, format="png", dpi=160, metadata={"Software": None})


# ---- the over-optimization figure ----


def _over_optimization(comparison: Json, pool: Json | None) -> Figure:
    styles = arm_styles(comparison, pool)
    studies = [(title, key) for title, key in (("Best-of-n", "best_of_n"), ("Tilted", "tilted")) if _has(pool, key)]
    figure = Figure(figsize=(10, 6.0), layout="constrained")
    axes = figure.subplots(2, len(studies) + 1, sharex="col", sharey="row", squeeze=False)
    for row, quantity in enumerate(("gold", "proxy")):
        for column, (_, key) in enumerate(studies):
            for curve in _curves(pool):
                arm = arm_of(curve, comparison)
                style = styles[arm["name"] if arm else curve["name"]]
                _draw_points(axes[row, column], curve.get(key) or [], quantity, style)
        for arm in comparison["arms"]:
            _draw_training(axes[row, -1], arm, quantity, styles[arm["name"]])
        axes[row, 0].set_ylabel("gold" if quantity == "gold" else "proxy (std of the initial policy)")
    for column, title in enumerate([*(title for title, _ in studies), "PPO"]):
        axes[0, column].set_title(title, loc="left")
        axes[1, column].set_xlabel("√KL to the initial policy (√nats)")
        axes[1, column].set_xlim(left=0)
        for ax, start in zip(axes[:, column], (_initial_gold(comparison, pool), 0.0), strict=True):
            if start is not None:
                ax.axhline(start, color=_GRAY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
    _legend(figure, comparison, pool, styles)
    return figure


def _draw_points(ax: Axes, points: Sequence[Json], quantity: str, style: Style) -> None:
    """A line through independent points, with its interval as a band."""
    root_kl = _root(_column(points, "kl"))
    line: Json = {"color": style.color, "linestyle": style.dash, "marker": style.marker, "markersize": 3.5}
    ax.plot(root_kl, _column(points, quantity), **line)
    low, high = _column(points, f"{quantity}_low"), _column(points, f"{quantity}_high")
    ax.fill_between(root_kl, low, high, color=style.color, alpha=0.12, linewidth=0)


def _draw_training(ax: Axes, arm: Json, quantity: str, style: Style) -> None:
    """PPO steps, raw (faint) and smoothed, and the trained policy on held-out prompts as a large marker."""
    kl, values = _column(arm["steps"], "kl"), _column(arm["steps"], quantity)
    ax.plot(_root(kl), values, linestyle="none", color=style.color, marker=style.marker, markersize=3, alpha=0.22)
    ax.plot(_root(smoothed(kl)), smoothed(values), color=style.color, linestyle=style.dash)
    final = arm.get("final") or {}
    if final.get("kl") is None or final.get(quantity) is None:
        return
    end, value = _root(_floats([final["kl"]])), final[quantity]
    interval = final.get("interval") if quantity == "gold" else None
    if interval and None not in interval:
        ax.vlines(end, interval[0], interval[1], color=style.color, linewidth=1.4)
    edge: Json = {"markeredgecolor": "white", "markeredgewidth": 1.2, "markersize": 9}
    ax.plot(end, [value], color=style.color, marker=style.marker, zorder=5, **edge)


def _legend(figure: Figure, comparison: Json, pool: Json | None, styles: dict[str, Style]) -> None:
    labels = {item["name"]: item.get("label") or item["name"] for item in [*_curves(pool), *comparison["arms"]]}
    handles = [
        Line2D([], [], color=style.color, linestyle=style.dash, marker=style.marker, markersize=5, label=labels[name])
        for name, style in styles.items()
    ]
    handles.append(Line2D([], [], color=_GRAY, linewidth=0.9, linestyle=(0, (2, 2)), label="initial policy"))
    figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=10)


# ---- the calibration figure ----


def _calibration(pairs: Json) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    reference: Json = {"color": _GRAY, "linewidth": 0.9, "linestyle": (0, (2, 2))}
    left.plot([0.5, 1], [0.5, 1], label="as often right as it says", **reference)
    shown = {"probability": "reward"}
    if pairs["heads_probability"]["bins"] != pairs["probability"]["bins"]:
        shown["heads_probability"] = "average of the heads"
    for (key, label), style in zip(shown.items(), _STYLES, strict=False):
        confidence, accuracy = (_column(pairs[key]["bins"], column) for column in ("confidence", "accuracy"))
        line: Json = {"color": style.color, "linestyle": style.dash, "marker": style.marker, "markersize": 4}
        left.plot(confidence, accuracy, label=label, **line)
    coverage = _floats(pairs["risk_coverage"]["coverage"])
    kept = coverage * pairs["num_pairs"] >= _FEWEST_PAIRS
    right.axhline(1 - pairs["accuracy"], label="knowing nothing", **reference)
    for name, risk in pairs["risk_coverage"]["risk"].items():
        style = UNCERTAINTY_STYLES.get(name, Style(_GRAY, "-", ""))
        right.plot(coverage[kept], _floats(risk)[kept], color=style.color, linestyle=style.dash, label=name)
    left.set(xlabel="probability of the order it gives a pair", ylabel="share of pairs ordered as people did")
    right.set(xlabel="share of pairs kept, least uncertain first", ylabel="share of them ordered wrongly")
    left.set_xlim(0.48, 1.02)
    right.set_xlim(0, 1.02)
    right.set_ylim(bottom=0)
    for ax, title in ((left, "Reliability"), (right, "Risk–coverage")):
        ax.set_title(title, loc="left")
        ax.legend(loc="best", fontsize=8)
    return figure


# ---- the toy ----


def save_toy(results: Json, path: str | Path) -> None:
    """`poise toy`: gold lost to one wrong score, predicted and simulated; what objectives gain on one head. PNG."""
    with _look("toy"):
        _toy(results).savefig(path, format="png", dpi=160, metadata={"Software": None})


def _toy(results: Json) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for statement, style in zip(
        ("worst response scored too high", "best response scored too low"), _STYLES, strict=False
    ):
        rows = [row for row in results["statements"] if row["statement"].startswith(statement)]
        error = _floats([row["statement"].split(" by ")[1].split(":")[0] for row in rows])
        line: Json = {"color": style.color, "linestyle": style.dash}
        left.plot(error, _column(rows, "predicted"), label=f"{statement}: predicted", **line)
        bars = _bars([row["difference"] for row in rows])
        points: Json = {"color": style.color, "marker": style.marker, "linestyle": "none"}
        left.errorbar(error, _column(rows, "simulated"), bars, **points)
        left.plot(error, _column(rows, "bound"), color=_GRAY, linewidth=0.9, linestyle=(0, (2, 2)))
    left.plot([], [], color=_GRAY, linestyle="none", marker="o", label="… simulated, 95 % intervals")
    left.plot([], [], color=_GRAY, linewidth=0.9, linestyle=(0, (2, 2)), label="the most an error can cost")
    left.set(xlabel="error of the score (std of gold 1)", ylabel="gold lost")
    left.set_ylim(bottom=0)
    left.legend(loc="best", fontsize=8)
    arms = [row for row in results["objectives"] if row["name"] not in ("reference", "gold", "single")][::-1]
    gain = [row["ppo"]["against_single"] for row in arms]
    points = {"color": _STYLES[0].color, "marker": "o", "linestyle": "none"}
    right.errorbar(_column(gain, "mean"), range(len(arms)), xerr=_bars(gain), **points)
    right.axvline(0, color=_GRAY, linewidth=0.9, linestyle=(0, (2, 2)))
    right.set_yticks(range(len(arms)), [row["name"] for row in arms])
    right.set(xlabel="gold after PPO, less that of the single head")
    for ax, title in ((left, "One wrong score"), (right, "Responses no preference shows")):
        ax.set_title(title, loc="left")
    return figure


# ---- the study ----


def save_study(results: Json, path: str | Path) -> None:
    """`poise study`: what best-of-n gains over the first arm, where policies end, a benchmark while they train. PNG."""
    with _look("study"):
        _study(results).savefig(path, format="png", dpi=160, metadata={"Software": None})


def _study(results: Json) -> Figure:
    noises = dict.fromkeys([*(results.get("best_of_n") or {}), *(results.get("summary") or {})])
    styles = dict(zip(noises, itertools.cycle(_STYLES), strict=False))
    panels = [panel for panel, key in ((_gains, "best_of_n"), (_endings, "cells")) if results.get(key)]
    asked = [
        arms for arms in (results.get("summary") or {}).values() if any("checkpoints" in arm for arm in arms.values())
    ]
    figure = Figure(figsize=(5.4 * len(panels) + 4.4 * bool(asked), 5.2), layout="constrained")
    axes = figure.subplots(1, len(panels) + bool(asked), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=False):
        names = panel(ax, results, styles)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(-0.6, len(names) - 0.4)
    if asked:
        _while_training(axes[-1], asked[0])
    handles = [
        Line2D([], [], color=style.color, marker=style.marker, label=noise_label(noise))
        for noise, style in styles.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _gains(ax: Axes, results: Json, styles: dict[str, Style]) -> list[str]:
    """Gain of best-of-N in gold, as a share of the first arm's, by arm and noise; the arms, from below."""
    of_noise = results["best_of_n"]
    arms = next(iter(of_noise.values()))
    first = next(iter(arms))
    # The control gains nothing: on the axis it would leave no room for the others.
    names = [name for name in arms if name not in (first, "constant")][::-1]
    for i, (noise, found) in enumerate(of_noise.items()):
        gains = {row: found[name]["measures"].get("relative_gain") for row, name in enumerate(names)}
        known = {row + 0.24 * (1 - i): gain for row, gain in gains.items() if gain}
        points: Json = {"color": styles[noise].color, "marker": styles[noise].marker, "markersize": 4}
        ends = _ends(list(known.values()))
        ax.errorbar(100 * _column(ends, "mean"), list(known), xerr=100 * _bars(ends), linestyle="none", **points)
    ax.axvline(0, color=_GRAY, linewidth=0.9, linestyle=(0, (2, 2)))
    ax.set(xlabel=f"gold gained by best-of-n, less {first}'s, in % of it")
    ax.set_title("Best-of-n", loc="left")
    return names


def _endings(ax: Axes, results: Json, styles: dict[str, Style]) -> list[str]:
    """Final gold of every policy, faint, and the mean of its arm with an interval; the arms, from below."""
    names = list(dict.fromkeys(cell["arm"] for cell in results["cells"]))[::-1]
    for noise, arms in results["summary"].items():
        style = styles[noise]
        cells = [cell for cell in results["cells"] if cell["noise"] == noise]
        golds, rows = [cell["final_gold"] for cell in cells], [names.index(cell["arm"]) for cell in cells]
        faint: Json = {"color": style.color, "marker": style.marker, "markersize": 4, "alpha": 0.35}
        ax.plot(golds, rows, linestyle="none", **faint)
        ends, at = _ends([arm["final_gold"] for arm in arms.values()]), [names.index(name) for name in arms]
        points: Json = {"color": style.color, "marker": style.marker, "markersize": 7}
        ax.errorbar(_column(ends, "mean"), at, xerr=_bars(ends), linestyle="none", **points)
    for arms in (results.get("best_of_n") or {}).values():  # one pool: the same initial policy for all
        start = next(iter(arms.values()))["initial_gold"]
        ax.axvline(start, color=_GRAY, linewidth=0.9, linestyle=(0, (2, 2)))
    golds = [cell["final_gold"] for cell in results["cells"]]
    room = 0.1 * (max(golds) - min(golds)) + 0.1  # an interval of few seeds can reach far beyond every policy
    ax.set_xlim(min(golds) - room, max(golds) + room)
    ax.set(xlabel="gold on held-out prompts, after training; dashed: before")
    ax.set_title("PPO", loc="left")
    return names


def _while_training(ax: Axes, arms: Json) -> None:
    """A benchmark over the checkpoints of every arm that was asked it: means over reward models."""
    task = next(iter(next(arm["checkpoints"] for arm in arms.values() if "checkpoints" in arm)))
    found = {name: arm["checkpoints"][task] for name, arm in arms.items() if task in arm.get("checkpoints", {})}
    for i, (name, scores) in enumerate(found.items()):
        again = (i + i // len(_STYLES)) % len(_STYLES)  # of two arms of one color each has its own dash and marker
        color, style = _STYLES[i % len(_STYLES)].color, _STYLES[again]
        line: Json = {"color": color, "linestyle": style.dash, "marker": style.marker, "markersize": 4}
        ax.plot(scores["steps"], scores["mean"], label=f"{name} ({scores['reward_seeds']})", **line)
    ax.set_ylim(bottom=0)
    ax.legend(loc="best", fontsize=7.5)
    ax.set(xlabel="PPO step; in brackets: reward models", ylabel=f"{task}, share right")
    ax.set_title("While policies train", loc="left")


def _ends(measures: Sequence[Json]) -> list[Json]:
    bounds = [m["interval"] or (None, None) for m in measures]  # of a single reward model there are none
    return [{"mean": m["mean"], "low": low, "high": high} for m, (low, high) in zip(measures, bounds, strict=True)]


# ---- numbers ----


def _curves(pool: Json | None) -> list[Json]:
    return list((pool or {}).get("curves") or [])


def _has(pool: Json | None, key: str) -> bool:
    return any(curve.get(key) for curve in _curves(pool))


def _target(item: Json) -> tuple[str, str]:
    return Path(str(item.get("reward"))).name, str(item.get("objective")).replace(" ", "")


def _initial_gold(comparison: Json, pool: Json | None) -> float | None:
    """Of the best-of-n pool, which is the larger sample, else of the first arm."""
    if pool and pool.get("initial_gold") is not None:
        return float(pool["initial_gold"])
    start = comparison["arms"][0].get("initial_gold")
    return None if start is None else float(start)


def _floats(values: Sequence[Any]) -> ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _column(rows: Sequence[Json], key: str) -> ndarray:
    return _floats([row.get(key) for row in rows])


def _bars(intervals: Sequence[Json]) -> ndarray:
    """(2, N): how far intervals of mean, low and high reach below and above their means."""
    return np.abs(np.stack([_column(intervals, "low"), _column(intervals, "high")]) - _column(intervals, "mean"))


def _root(kl: ndarray) -> ndarray:
    """√KL; an estimate from few samples can be a little below zero, and counts as zero."""
    return np.sqrt(np.maximum(kl, 0.0))


# ---- output ----


@contextmanager
def _look(identifier: str) -> Iterator[None]:
    """Our settings on matplotlib's own defaults, whatever the user's matplotlibrc says."""
    with matplotlib.style.context(["default", _LOOK | {"svg.hashsalt": identifier}]):
        yield


def _svg(figure: Figure, identifier: str) -> str:
    """The <svg> element alone, undated, every id made unique on the page by `identifier`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{identifier}-", text[text.index("<svg") :])


# ---- the model card ----


def save_reliability(bins: Sequence[Json], path: str | Path) -> None:
    """Accuracy against claimed confidence, one point per bin with its number of pairs, as a PNG file."""
    confidence, accuracy = _column(bins, "confidence"), _column(bins, "accuracy")
    low = min(0.5, np.nanmin(confidence, initial=0.5), np.nanmin(accuracy, initial=0.5))
    with _look("reliability"):
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        ax = figure.subplots()
        ax.plot([low, 1.0], [low, 1.0], color=_GRAY, linewidth=0.9, linestyle=(0, (2, 2)), label="claims what it keeps")
        ax.plot(confidence, accuracy, color=_STYLES[0].color, marker="o", label="pairs, by claimed probability")
        for row, x, y in zip(bins, confidence, accuracy, strict=True):
            ax.annotate(str(row["count"]), (x, y), xytext=(0, 6), textcoords="offset points", ha="center", color=_GRAY)
        ax.set_xlabel("probability the model claims")
        ax.set_ylabel("share in the right order")
        ax.legend(loc="lower right")
        figure.savefig(path, format="png", dpi=160, metadata={"Software": None})
