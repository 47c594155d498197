"""Scores of the public benchmarks of reward models: RewardBench, RM-Bench, best-of-n sets. NumPy in, NumPy out."""

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from poise.errors import PoiseError
from poise.functional.shapes import KNOWN, checked
from poise.runtime.settings import Count, Share

_CODE = ("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust")

REWARD_BENCH = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer",
    ),
    "Reasoning": ("math-prm", *_CODE),
}  # fmt: skip


@checked
def reward_bench(accuracy: Mapping[str, Share], count: Mapping[str, Count]) -> dict[str, float]:
    """Score of every section of RewardBench (arXiv 2403.13787) that is present, from its subsets.

    The mean over a section's pairs, but in Reasoning math-prm counts half and the code subsets together the other
    half. The benchmark's own score is the mean of the four sections.
    """
    if missing := sorted(accuracy.keys() - count.keys()):
        raise PoiseError(f"reward_bench: no count of pairs for {missing[0]!r}; give one for each subset")
    scores = {}
    for section, members in REWARD_BENCH.items():
        parts = [("math-prm",), _CODE] if section == "Reasoning" else [members]
        present = [[name for name in part if name in accuracy] for part in parts]
        means = [
            np.average([accuracy[name] for name in part], weights=[count[name] for name in part])
            for part in present
            if part
        ]
        if means:
            scores[section] = float(np.mean(means))
    return scores


@checked
def style_matrix(
    chosen: Float[ndarray, "sets styles"], rejected: Float[ndarray, "sets styles"]
) -> Float[ndarray, "styles styles"]:
    """[i, j]: how often the chosen text in style i beats the rejected one in style j (RM-Bench, arXiv 2410.16184).

    Ties count half; the benchmark's own script counts them as lost.
    """
    return ((np.sign(chosen[:, :, None] - rejected[:, None, :]) + 1) / 2).mean(0)


@checked
def style_scores(matrix: Float[ndarray, "styles styles"]) -> dict[str, float]:
    """Easy, normal, hard and their mean over a style matrix whose styles go from plain to fancy.

    easy: the chosen text is the fancier one (below the diagonal); normal: both in one style; hard: the rejected one
    is the fancier (above the diagonal), e.g. a concise chosen text against a detailed rejected one.

    >>> style_scores(np.array([[0.5, 0.25, 0.5], [0.75, 0.5, 0.75], [1.0, 0.5, 0.5]]))["hard"]
    0.5
    """
    size = len(matrix)
    return {
        "easy": float(matrix[np.tril_indices(size, -1)].mean()),
        "normal": float(np.diag(matrix).mean()),
        "hard": float(matrix[np.triu_indices(size, 1)].mean()),
        "mean": float(matrix.mean()),
    }


@checked
def picks_chosen(
    chosen: Annotated[Float[ndarray, " m"], KNOWN], rejected: Annotated[Float[ndarray, " n"], KNOWN]
) -> float:
    """1 if the best of a set is a chosen text; where several are best, the share of chosen ones among them.

    By chance: m / (m + n).

    >>> picks_chosen(np.array([1.0, 3.0]), np.array([2.0])), picks_chosen(np.array([3.0]), np.array([3.0, 3.0]))
    (1.0, 0.3333333333333333)
    """
    best = max(chosen.max(), rejected.max())
    wins, losses = (chosen == best).sum(), (rejected == best).sum()
    return float(wins / (wins + losses))
