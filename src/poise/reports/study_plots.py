"""Figures of `poise study` and `poise toy`, as PNG files, from the JSON of a finished run."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from poise.reports.plot_style import GRAY, STYLES, Style, column_of, error_bars, floats, look, save_png
from poise.reports.summary import noise_label
from poise.runtime.run_folder import Json

# ---- the toy ----


def save_toy(results: Json, path: str | Path) -> None:
    """`poise toy`: gold lost to one wrong score, predicted and simulated; what objectives gain on one head. PNG."""
    with look("toy"):
        save_png(_toy(results), path)


def _toy(results: Json) -> Figure:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for statement, style in zip(
        ("worst response scored too high", "best response scored too low"), STYLES, strict=False
    ):
        rows = [row for row in results["statements"] if row["statement"].startswith(statement)]
        error = floats([row["statement"].split(" by ")[1].split(":")[0] for row in rows])
        line: Json = {"color": style.color, "linestyle": style.dash}
        left.plot(error, column_of(rows, "predicted"), label=f"{statement}: predicted", **line)
        bars = error_bars([row["difference"] for row in rows])
        points: Json = {"color": style.color, "marker": style.marker, "linestyle": "none"}
        left.errorbar(error, column_of(rows, "simulated"), bars, **points)
        left.plot(error, column_of(rows, "bound"), color=GRAY, linewidth=0.9, linestyle=(0, (2, 2)))
    left.plot([], [], color=GRAY, linestyle="none", marker="o", label="… simulated, 95 % intervals")
    left.plot([], [], color=GRAY, linewidth=0.9, linestyle=(0, (2, 2)), label="the most an error can cost")
    left.set(xlabel="error of the score (std of gold 1)", ylabel="gold lost")
    left.set_ylim(bottom=0)
    left.legend(loc="best", fontsize=8)
    arms = [row for row in results["objectives"] if row["name"] not in ("reference", "gold", "single")][::-1]
    gain = [row["ppo"]["against_single"] for row in arms]
    points = {"color": STYLES[0].color, "marker": "o", "linestyle": "none"}
    right.errorbar(column_of(gain, "mean"), range(len(arms)), xerr=error_bars(gain), **points)
    right.axvline(0, color=GRAY, linewidth=0.9, linestyle=(0, (2, 2)))
    right.set_yticks(range(len(arms)), [row["name"] for row in arms])
    right.set(xlabel="gold after PPO, minus that of the single head")
    for ax, title in ((left, "One wrong score"), (right, "Responses no preference shows")):
        ax.set_title(title, loc="left")
    return figure


# ---- the study ----


def save_study(results: Json, path: str | Path) -> None:
    """`poise study`: what best-of-n gains over the first arm, where policies end, a benchmark while they train. PNG."""
    with look("study"):
        save_png(_study(results), path)


def _study(results: Json) -> Figure:
    noises = dict.fromkeys([*(results.get("best_of_n") or {}), *(results.get("summary") or {})])
    styles = dict(zip(noises, itertools.cycle(STYLES), strict=False))
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
        ax.errorbar(100 * column_of(ends, "mean"), list(known), xerr=100 * error_bars(ends), linestyle="none", **points)
    ax.axvline(0, color=GRAY, linewidth=0.9, linestyle=(0, (2, 2)))
    ax.set(xlabel=f"gold gained by best-of-n, minus {first}'s, in % of it")
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
        ax.errorbar(column_of(ends, "mean"), at, xerr=error_bars(ends), linestyle="none", **points)
    for arms in (results.get("best_of_n") or {}).values():  # one pool: the same initial policy for all
        start = next(iter(arms.values()))["initial_gold"]
        ax.axvline(start, color=GRAY, linewidth=0.9, linestyle=(0, (2, 2)))
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
        again = (i + i // len(STYLES)) % len(STYLES)  # of two arms of one color each has its own dash and marker
        color, style = STYLES[i % len(STYLES)].color, STYLES[again]
        line: Json = {"color": color, "linestyle": style.dash, "marker": style.marker, "markersize": 4}
        ax.plot(scores["steps"], scores["mean"], label=f"{name} ({scores['reward_seeds']})", **line)
    ax.set_ylim(bottom=0)
    ax.legend(loc="best", fontsize=7.5)
    ax.set(xlabel="PPO step; in brackets: reward models", ylabel=f"{task}, share right")
    ax.set_title("While policies train", loc="left")


def _ends(measures: Sequence[Json]) -> list[Json]:
    bounds = [m["interval"] or (None, None) for m in measures]  # of a single reward model there are none
    return [{"mean": m["mean"], "low": low, "high": high} for m, (low, high) in zip(measures, bounds, strict=True)]
