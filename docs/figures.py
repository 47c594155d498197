"""Pictures of the documentation, from the equations and from stored results: `python docs/figures.py`.

Each is an SVG in docs/images/. The same results give the same bytes, so a change of a picture is a change of its data.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from poise.functional.objectives import HeadRewards, disagreement, nominal_head, parse_objective, routing_std, total_std
from poise.reports.plot_style import GRAY, STYLES, look, svg

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "results"
ONE_HEAD, BRME, BOUNDED = STYLES[1], STYLES[3], STYLES[0]
ARMS = (("conventional", "one head", ONE_HEAD), ("brme", "BRME, λ = .4", BRME), ("settle", "bounded, settles", BOUNDED))


def overoptimization() -> Figure:
    """Proxy and gold of one head over 28 steps; gold over 60 steps, and gold against KL, of three policies."""
    short = json.loads((RESULTS / "quickstart-seeds-2026-11-23.json").read_text())["seeds"]
    long = json.loads((RESULTS / "holds-60-steps-2026-11-24.json").read_text())["seeds"]
    figure = Figure(figsize=(9.6, 3.1), layout="constrained")
    proxy, gold, frontier = figure.subplots(1, 3)

    runs = [seed["arms"]["conventional"]["steps"] for seed in short]
    for name, axis_gold in (("proxy", False), ("gold", True)):
        curves = smoothed(np.array([[step[name] for step in run] for run in runs]))
        curves = curves - curves[:, :1]
        style = STYLES[2] if axis_gold else ONE_HEAD
        for curve in curves:
            proxy.plot(curve, color=style.color, alpha=0.25, linewidth=0.8)
        proxy.plot(
            curves.mean(0), style.dash, color=style.color, label="gold" if axis_gold else "the reward it is given"
        )
    proxy.set(title="The reward rises, gold falls", xlabel="PPO step, one head, 5 seeds", ylabel="gain since step 0")

    for arm, label, style in ARMS:
        curves = smoothed(np.array([seed["arms"][arm]["gold"] for seed in long if arm in seed["arms"]]))
        kls = smoothed(np.array([seed["arms"][arm]["kl_by_step"] for seed in long if arm in seed["arms"]]))
        gold.plot(curves.mean(0), style.dash, color=style.color, label=label)
        for curve in curves:
            gold.plot(curve, color=style.color, alpha=0.2, linewidth=0.8)
        frontier.plot(*gold_by_kl(kls, curves), style.dash, color=style.color, label=label)
    gold.set(title="Bounded, gold holds", xlabel="PPO step, 5 seeds", ylabel="gold")
    frontier.set(
        title="At equal KL they are alike",
        xlabel="√KL to the initial policy",
        ylabel="gold, mean of runs that reach it",
    )
    for axes in (proxy, gold, frontier):
        axes.legend(fontsize=8)
    return figure


def gold_by_kl(kls: np.ndarray, curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """√KL on a grid, and the mean gold there of the runs that reach it, as far as all but one of them do."""
    grid = np.linspace(0.5, 9, 60)
    values = np.full((len(curves), len(grid)), np.nan)
    for row, (kl, curve) in enumerate(zip(kls, curves, strict=True)):
        distance = np.maximum.accumulate(np.sqrt(np.maximum(kl, 0)))
        inside = grid <= distance[-1]
        values[row, inside] = np.interp(grid[inside], distance, curve)
    enough = np.isfinite(values).sum(0) >= len(curves) - 1
    return grid[enough], np.nanmean(values[:, enough], axis=0)


def smoothed(curves: np.ndarray, width: int = 3) -> np.ndarray:
    """Means over `width` steps, (runs, steps - width + 1)."""
    return np.lib.stride_tricks.sliding_window_view(curves, width, axis=1).mean(-1)


def drawn_heads() -> tuple[np.ndarray, HeadRewards]:
    """x (200,) and five Gaussian heads on it: lines drawn from a Bayesian fit of data that lie between −1 and 1."""
    random = np.random.default_rng(3)
    at = random.uniform(-1, 1, 30)
    noise = 0.5
    design = np.stack([np.ones_like(at), at], 1)
    target = 0.5 + 0.8 * at + random.normal(0, noise, 30)
    covariance = np.linalg.inv(design.T @ design / noise**2 + np.eye(2))
    center = covariance @ design.T @ target / noise**2
    lines = random.multivariate_normal(center, covariance * 3, size=5)
    x = np.linspace(-4, 4, 200)
    features = np.stack([np.ones_like(x), x], 1)
    means = features @ lines.T
    spread = np.sqrt(np.einsum("ni,ij,nj->n", features, covariance, features))
    own = 0.15 + spread[:, None] * np.array([0.6, 1.0, 0.8, 1.2, 0.9])
    return x, HeadRewards(torch.tensor(means), torch.tensor(own))


def heads() -> Figure:
    """Five heads over the distance from the training data, and the uncertainties that they give."""
    x, rewards = drawn_heads()
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for head in range(5):
        left.plot(x, rewards.mean[:, head], color=GRAY, linewidth=1)
    middle = rewards.mean.gather(-1, nominal_head(rewards).unsqueeze(-1)).squeeze(-1)
    left.plot(x, middle, color=BOUNDED.color, label="nominal: the head with the lowest std")
    left.plot(x, rewards.mean.amin(-1), "--", color=ONE_HEAD.color, label="worst case: the lowest head")
    left.set(title="Five heads", xlabel="a text, by its distance from the training data", ylabel="reward")
    for function, style in ((disagreement, STYLES[0]), (routing_std, STYLES[1]), (total_std, STYLES[2])):
        right.plot(x, function(rewards), style.dash, color=style.color, label=function.__name__)
    right.set(title="Three uncertainties", xlabel="the same texts", ylabel="std of the reward")
    right.set_ylim(top=2.1)  # room for the legend
    for axes in (left, right):
        seen(axes)
    left.legend(fontsize=8)
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.93), ncols=3, columnspacing=1, handlelength=1.6)
    return figure


def objectives() -> Figure:
    """What objectives make of the five heads."""
    x, rewards = drawn_heads()
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axes = figure.subplots()
    names = ("nominal", "mean", "tradeoff(0.4)", "lower_confidence(1)", "uncertainty_weighted(0.5)", "worst_case")
    for name, style in zip(names, STYLES, strict=True):
        axes.plot(x, parse_objective(name)(rewards), style.dash, color=style.color, label=name)
    axes.set(
        title="One reward from five heads", xlabel="a text, by its distance from the training data", ylabel="reward"
    )
    seen(axes)
    axes.set_ylim(-4.5, 2.5)
    axes.legend(fontsize=8, loc="lower left", ncols=2)
    return figure


def scale() -> Figure:
    """Rewards of the initial policy on their scale with a ceiling, and the learning rate that settles there."""
    figure = Figure(figsize=(8.4, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    z = np.linspace(-3.5, 3.5, 200)
    left.fill_between(z, np.exp(-z * z / 2), color=GRAY, alpha=0.25, label="the initial policy's completions")
    left.axvline(2, color=ONE_HEAD.color, linestyle="--", label="ceiling: no reward beyond it")
    left.set(title="Zero and unit: the initial policy", xlabel="scaled reward, in stds", yticks=[])
    reward = np.linspace(-1, 2.4, 200)
    right.plot(reward, np.clip((2 - reward) / 2, 0, 1), color=BOUNDED.color)
    right.set(title="Settling", xlabel="mean reward of a step", ylabel="share of the learning rate")
    left.legend(fontsize=8, loc="upper left")
    return figure


def seen(axes: Axes) -> None:
    """Shades where the training data lie."""
    axes.axvspan(-1, 1, color=GRAY, alpha=0.12, linewidth=0)
    axes.text(0, axes.get_ylim()[1], "training data", fontsize=7, ha="center", va="top", color=GRAY)


FIGURES: dict[str, Callable[[], Figure]] = {
    "overoptimization": overoptimization, "heads": heads, "objectives": objectives, "scale": scale,
}  # fmt: skip


def drawn(name: str) -> str:
    """The SVG file of a picture, on white: forges show it in dark mode too."""
    with look(name):
        figure = FIGURES[name]()
        figure.set_facecolor("white")
        return svg(figure, name) + "\n"


if __name__ == "__main__":
    (DOCS / "images").mkdir(exist_ok=True)
    for one in FIGURES:
        (DOCS / "images" / f"{one}.svg").write_text(drawn(one), encoding="utf-8")
