"""Figures of one comparison or one reward model, as SVG text; the main ones also as PNG.

Every function takes the JSON of a finished run. A null in the data is a gap in the line.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy import ndarray

from poise.functional.statistics import smoothed
from poise.reports.plot_style import GRAY, STYLES, Style, column_of, floats, look, save_png, svg
from poise.runtime.run_folder import Json

# Each uncertainty has one style in every figure of an evaluation; a random one, and any other, is gray.
UNCERTAINTY_STYLES = dict(
    zip(
        ("disagreement", "routing_std", "total_std", "last_layer_std", "small_margin", "error_probability"),
        STYLES,
        strict=True,
    )
)
_FEWEST_PAIRS = 10  # whose error rate is worth a point of a curve


def arm_styles(comparison: Json, pool: Json | None) -> dict[str, Style]:
    """The style of every arm by name, then of every best-of-n curve that belongs to no arm."""
    names = [arm["name"] for arm in comparison["arms"]]
    names += [curve["name"] for curve in _curves(pool) if arm_of(curve, comparison) is None]
    return {name: STYLES[i % len(STYLES)] for i, name in enumerate(names)}


def arm_of(curve: Json, comparison: Json) -> Json | None:
    """The arm trained on what a best-of-n curve selects by: the same objective of the same reward model."""
    for arm in comparison["arms"]:
        if curve["name"] == arm["name"] or _target(curve) == _target(arm):
            return arm
    return None


def over_optimization(comparison: Json, pool: Json | None) -> str:
    """Gold and proxy against √KL: best-of-n and tilted policies where there is a pool, and PPO."""
    with look("curves"):
        return svg(_over_optimization(comparison, pool), "curves")


def save_over_optimization(comparison: Json, pool: Json | None, path: str | Path) -> None:
    """The figure of `over_optimization` as a PNG file."""
    with look("curves"):
        save_png(_over_optimization(comparison, pool), path)


def heads(arm: Json, style: Style, identifier: str) -> str:
    """One arm's heads over training: mean rewards and disagreement; with stds also the gap and the routing std.

    identifier: unique on the page; it goes before every id in the SVG.
    """
    steps = [row for row in arm["steps"] if row.get("heads")]
    step = column_of(steps, "step")
    panels = ["Reward of each head", "How far the heads are apart"]
    has_std = bool(np.nansum(column_of(steps, "routing_std")) > 0)
    with look(identifier):
        figure = Figure(figsize=(10, 2.9), layout="constrained")
        axes = figure.subplots(1, 3 if has_std else 2, squeeze=False)[0]
        for values in zip(*(row["heads"] for row in steps), strict=True):
            axes[0].plot(step, floats(values), color=style.color, linewidth=1, alpha=0.7)
        if has_std:  # point heads have no std to choose a nominal head by
            axes[1].plot(step, column_of(steps, "gap"), color=style.color, label="gap: nominal − worst case")
        axes[1].plot(step, column_of(steps, "disagreement"), color=GRAY, linestyle="--", label="disagreement")
        axes[1].set_ylim(bottom=0)
        axes[1].legend(loc="best")
        if has_std:
            panels.append("Routing std")
            axes[2].plot(step, column_of(steps, "routing_std"), color=style.color)
        for ax, title in zip(axes, panels, strict=True):
            ax.set_title(title, loc="left")
            ax.set_xlabel("PPO step")
        return svg(figure, identifier)


def stage2(history: Sequence[Json], identifier: str = "stage2") -> str:
    """Fitting the BRME heads: error on held-out preferences, and the heads' own std (log scale)."""
    with look(identifier):
        figure = Figure(figsize=(10, 2.9), layout="constrained")
        axes = figure.subplots(1, 2)
        panels = (("mse", "Held-out squared error", "linear"), ("std", "Median std of the heads", "log"))
        for ax, (key, title, scale) in zip(axes, panels, strict=True):
            values = column_of(history, key)
            ax.plot(column_of(history, "step"), values, color=STYLES[1].color, marker="o", markersize=3)
            if scale == "log" and np.nanmin(values, initial=np.inf) > 0:
                ax.set_yscale(scale)
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter("{x:g}")
            else:
                ax.set_ylim(bottom=0)
            ax.set_title(title, loc="left")
            ax.set_xlabel("optimizer step")
        return svg(figure, identifier)


def calibration(pairs: Json, identifier: str) -> tuple[str, str]:
    """Reliability of a reward model's probabilities, and risk–coverage of its uncertainties."""
    found = []
    for draw, part in ((_reliability, "reliability"), (_risk_coverage, "risk")):
        with look(f"{identifier}{part}"):
            figure = Figure(figsize=(5, 4), layout="constrained")
            draw(figure.subplots(), pairs)
            found.append(svg(figure, f"{identifier}{part}"))
    return found[0], found[1]


def save_calibration(pairs: Json, path: str | Path) -> None:
    """The figure of `calibration` as a PNG file."""
    with look("calibration"):
        save_png(_calibration(pairs), path)


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
                ax.axhline(start, color=GRAY, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
    _legend(figure, comparison, pool, styles)
    return figure


def _draw_points(ax: Axes, points: Sequence[Json], quantity: str, style: Style) -> None:
    """A line through independent points, with its interval as a band."""
    root_kl = _root(column_of(points, "kl"))
    line: Json = {"color": style.color, "linestyle": style.dash, "marker": style.marker, "markersize": 3.5}
    ax.plot(root_kl, column_of(points, quantity), **line)
    low, high = column_of(points, f"{quantity}_low"), column_of(points, f"{quantity}_high")
    ax.fill_between(root_kl, low, high, color=style.color, alpha=0.12, linewidth=0)


def _draw_training(ax: Axes, arm: Json, quantity: str, style: Style) -> None:
    """PPO steps, raw (faint) and smoothed, and the trained policy on held-out prompts as a large marker."""
    kl, values = column_of(arm["steps"], "kl"), column_of(arm["steps"], quantity)
    ax.plot(_root(kl), values, linestyle="none", color=style.color, marker=style.marker, markersize=3, alpha=0.22)
    ax.plot(_root(smoothed(kl)), smoothed(values), color=style.color, linestyle=style.dash)
    final = arm.get("final") or {}
    if final.get("kl") is None or final.get(quantity) is None:
        return
    end, value = _root(floats([final["kl"]])), final[quantity]
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
    handles.append(Line2D([], [], color=GRAY, linewidth=0.9, linestyle=(0, (2, 2)), label="initial policy"))
    figure.legend(handles=handles, loc="outside upper left", ncols=2, fontsize=10)


# ---- the calibration figure ----


def _calibration(pairs: Json) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _reliability(left, pairs)
    _risk_coverage(right, pairs)
    return figure


_REFERENCE: Json = {"color": GRAY, "linewidth": 0.9, "linestyle": (0, (2, 2))}


def _reliability(ax: Axes, pairs: Json) -> None:
    ax.plot([0.5, 1], [0.5, 1], label="as often right as it says", **_REFERENCE)
    shown = {"probability": "reward"}
    if pairs["heads_probability"]["bins"] != pairs["probability"]["bins"]:
        shown["heads_probability"] = "average of the heads"
    for (key, label), style in zip(shown.items(), STYLES, strict=False):
        confidence, accuracy = (column_of(pairs[key]["bins"], column) for column in ("confidence", "accuracy"))
        line: Json = {"color": style.color, "linestyle": style.dash, "marker": style.marker, "markersize": 4}
        ax.plot(confidence, accuracy, label=label, **line)
    ax.set(xlabel="probability of the order it gives a pair", ylabel="share of pairs ordered as people did")
    ax.set_xlim(0.48, 1.02)
    ax.set_title("Reliability", loc="left")
    ax.legend(loc="best", fontsize=8)


def _risk_coverage(ax: Axes, pairs: Json) -> None:
    coverage = floats(pairs["risk_coverage"]["coverage"])
    kept = coverage * pairs["num_pairs"] >= _FEWEST_PAIRS
    ax.axhline(1 - pairs["accuracy"], label="knowing nothing", **_REFERENCE)
    for name, risk in pairs["risk_coverage"]["risk"].items():
        style = UNCERTAINTY_STYLES.get(name, Style(GRAY, "-", ""))
        ax.plot(coverage[kept], floats(risk)[kept], color=style.color, linestyle=style.dash, label=name)
    ax.set(xlabel="share of pairs kept, least uncertain first", ylabel="share of them ordered wrongly")
    ax.set_xlim(0, 1.02)
    ax.set_ylim(bottom=0)
    ax.set_title("Risk–coverage", loc="left")
    ax.legend(loc="best", fontsize=8)


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


def _root(kl: ndarray) -> ndarray:
    """√KL; an estimate from few samples can be a little below zero, and counts as zero."""
    return np.sqrt(np.maximum(kl, 0.0))


# ---- the model card ----


def save_reliability(bins: Sequence[Json], path: str | Path) -> None:
    """Accuracy against claimed confidence, one point per bin with its number of pairs, as a PNG file."""
    confidence, accuracy = column_of(bins, "confidence"), column_of(bins, "accuracy")
    low = min(0.5, np.nanmin(confidence, initial=0.5), np.nanmin(accuracy, initial=0.5))
    with look("reliability"):
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        ax = figure.subplots()
        ax.plot([low, 1.0], [low, 1.0], color=GRAY, linewidth=0.9, linestyle=(0, (2, 2)), label="claims what it keeps")
        ax.plot(confidence, accuracy, color=STYLES[0].color, marker="o", label="pairs, by claimed probability")
        for row, x, y in zip(bins, confidence, accuracy, strict=True):
            ax.annotate(str(row["count"]), (x, y), xytext=(0, 6), textcoords="offset points", ha="center", color=GRAY)
        ax.set_xlabel("probability the model claims")
        ax.set_ylabel("share in the right order")
        ax.legend(loc="lower right")
        save_png(figure, path)
