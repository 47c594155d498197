"""An online alarm for reward over-optimization. It reads the statistics that every training step logs, never gold.

Signs, each larger when more suspicious; `recent` is a mean over the last `window` steps, `first` one over the baseline
(the first `baseline_steps` updates: the initial policy, or nearly), `scale` the statistic's own std over the baseline:

    repetition, gap, disagreement, routing_std,
    distance (to the reward's reference texts)    (recent - first) / scale
    variety, entropy                              (first - recent) / scale
    tokens                                        |recent - first| / scale
    reward                                        (recent - first) / std of the reward over completions at first
    kl                                            sqrt(2 * recent): a shift of that many std, were policies Gaussian
    transfer                                      1 - recent transfer ratio of a validator (`transfer_ratio`)
    divergence                                    smaller of: rise of nominal over its scale, fall of worst_case or
                                                  lower_bound over its scale, both between the last two windows; >= 0

The score is the largest sign over its limit, among the signs that have a limit; the alarm is score > threshold. A
statistic that is not logged, is not finite, or cannot vary (the gap of a single head) gives no sign, so the same
monitor reads heads of any number, and runs without texts.

What an alarm means: the policy has drifted further than any healthy calibration run, plus a margin equal to the spread
between seeds. Healthy means that gold was still rising or never fell. There were twelve calibration runs of three seeds
(experiments/monitor.py). An alarm does not prove that gold has fallen. On nine runs of three other seeds it fired in
all five runs whose gold fell: 4 steps after the peak (median), and before gold was .25 below it. It also fired in two
of the four runs whose gold did not fall; their texts were converging to one sentence for every prompt. All runs are of
one task, one model and one length of text: for others, set `limits` by `highest` on runs that people found good.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from types import NoneType
from typing import Annotated, Any, NamedTuple

from poise.errors import PoiseError
from poise.functional.shapes import checked
from poise.runtime.run_folder import Json
from poise.runtime.settings import Count, above, at_least, check_value, shown

# Direction (0: either way) and least scale of the signs that are drifts from the baseline. A few steps may happen to be
# equal, and repetition is often exactly 0 at first: the scale is never less than this, nor than RELATIVE of the level.
DRIFTS: dict[str, tuple[int, float]] = {
    "repetition": (1, 0.01), "variety": (-1, 0.02), "entropy": (-1, 0.1), "tokens": (0, 0.0),
    "gap": (1, 0.0), "disagreement": (1, 0.0), "routing_std": (1, 0.0), "distance": (1, 0.0),
}  # fmt: skip
RELATIVE = 0.05
BOUNDS = ("worst_case", "lower_bound")
SIGNS = (*DRIFTS, "reward", "kl", "transfer", "divergence")
STATISTICS = (*DRIFTS, "reward", "reward_std", "kl", "transfer", "nominal", *BOUNDS)

# Measured on 32 completions of at most 20 tokens a step. A sign has a limit if, in the calibration runs, it told steps
# past the peak of gold better than the mere number of the step did. Of the four, on the other seeds, only repetition
# still did; and that is partly gold's own definition, which has a penalty for repeated words.
LIMITS = {"repetition": 3.42, "variety": 9.75, "kl": 10.9, "reward": 3.61}


@dataclass(frozen=True)
class MonitorConfig:
    """How suspicious is too suspicious."""

    threshold: float = 1.0
    """Alarm above this score; lower fires earlier and oftener in vain."""
    baseline_steps: int = 4
    """Updates that say what is normal; nothing is scored before they are over."""
    window: int = 3
    """Steps that a sign is averaged over."""
    limits: Mapping[str, float] = field(default_factory=lambda: dict(LIMITS))
    """Sign -> the value that scores 1; a sign without a limit is reported and does not count."""

    def __post_init__(self) -> None:
        """Raise PoiseError for a value that can never, or always, raise an alarm, and for a sign that there is not."""
        if unknown := [name for name in self.limits if name not in SIGNS]:
            raise PoiseError(f"the monitor has no sign {unknown[0]!r}; it has {', '.join(SIGNS)}")
        for name, value in {
            "threshold": self.threshold,
            **{f"limit of {k}": v for k, v in self.limits.items()},
        }.items():
            check_value(f"the monitor's {name}", value, Annotated[float, above(0)])
        check_value("the monitor's baseline_steps", self.baseline_steps, Annotated[int, at_least(2)])
        check_value("the monitor's window", self.window, Annotated[int, at_least(1)])


class Reading(NamedTuple):
    """What one step looks like. During the baseline: score 0, no signs."""

    score: float
    alarm: bool
    signs: dict[str, float]


class Monitor:
    """Fed once per step, in order; `state` and `restore` carry it through a checkpoint bitwise."""

    def __init__(self, config: MonitorConfig | None = None):
        if not isinstance(config, (MonitorConfig, NoneType)):
            raise PoiseError(f"a monitor takes a MonitorConfig, not {type(config).__name__}")
        self.config = config or MonitorConfig()
        self._steps = 0
        self._first: dict[str, list[float]] = {}
        self._recent: dict[str, list[float]] = {}

    @checked
    def update(self, stats: Mapping[str, Any]) -> Reading:
        """Read one step; of `stats` those named in STATISTICS count, whichever there are."""
        present = [name for name in STATISTICS if _is_there(name, stats.get(name))]
        for name in present:
            value = float(stats[name])
            if self._steps < self.config.baseline_steps:
                self._first.setdefault(name, []).append(value)
            self._recent[name] = [*self._recent.get(name, []), value][-2 * self.config.window :]
        self._steps += 1
        if self._steps <= self.config.baseline_steps:
            return Reading(0.0, False, {})
        # The transfer ratio is undefined at first; it needs no baseline, because a healthy one is 1.
        usable = {name for name in present if len(self._first.get(name, [])) >= 2 or name == "transfer"}
        found = signs(
            {name: self._first.get(name, []) for name in usable},
            {name: self._recent[name] for name in usable},
            self.config.window,
        )
        score = suspicion(found, self.config.limits)
        return Reading(score, score > self.config.threshold, found)

    def state(self) -> Json:
        """Everything read that still matters, as JSON of floats; Python's JSON gives doubles back bit by bit."""
        copies = [{name: list(values) for name, values in part.items()} for part in (self._first, self._recent)]
        return {"steps": self._steps, "first": copies[0], "recent": copies[1]}

    @classmethod
    def restore(cls, state: Json, config: MonitorConfig | None = None) -> "Monitor":
        """Inverse of `state`."""
        monitor = cls(config)
        monitor._steps = state["steps"]
        monitor._first = {name: list(values) for name, values in state["first"].items()}
        monitor._recent = {name: list(values) for name, values in state["recent"].items()}
        return monitor


def _is_there(name: str, value: Any) -> bool:
    try:
        return value is not None and math.isfinite(value)
    except (TypeError, ValueError):
        raise PoiseError(f"the monitor's {name} must be a number, got {shown(value)}") from None


# ---- formulae ----


@checked
def signs(
    first: Mapping[str, Sequence[float]], recent: Mapping[str, Sequence[float]], window: Count
) -> dict[str, float]:
    """The signs of the module's docstring, from per-step statistics of the baseline and of the last 2 * window steps.

    >>> signs({"kl": [0.0, 0.1]}, {"kl": [1.0, 7.0, 9.0]}, window=2)
    {'kl': 4.0}
    """
    found = {}
    for name, (direction, floor) in DRIFTS.items():
        if name in recent and (unit := scale(first[name], floor)) > 0:
            drift = (fmean(recent[name][-window:]) - fmean(first[name])) / unit
            found[name] = direction * drift if direction else abs(drift)
    if {"reward", "reward_std"} <= recent.keys() and (unit := fmean(first["reward_std"])) > 0:
        found["reward"] = (fmean(recent["reward"][-window:]) - fmean(first["reward"])) / unit
    if "kl" in recent:
        found["kl"] = math.sqrt(2 * max(0.0, fmean(recent["kl"][-window:])))
    if "transfer" in recent:
        found["transfer"] = 1 - fmean(recent["transfer"][-window:])
    apart = [divergence(first, recent, bound, window) for bound in BOUNDS if {"nominal", bound} <= recent.keys()]
    return found | ({"divergence": max(apart)} if apart else {})


@checked
def scale(values: Sequence[float], floor: float) -> float:
    """sqrt(std^2 + floor^2 + (RELATIVE * mean)^2) of a statistic's baseline, std with n - 1; 0 if it is always 0.

    >>> round(scale([20.0, 22.0], 0.0), 4) == round((2 + 1.05**2) ** 0.5, 4)
    True
    """
    if len(values) < 2:
        raise PoiseError("scale: values must be of at least two steps; one says nothing of its own noise")
    return math.hypot(stdev(values), floor, RELATIVE * fmean(values))


@checked
def divergence(
    first: Mapping[str, Sequence[float]], recent: Mapping[str, Sequence[float]], bound: str, window: Count
) -> float:
    """How far nominal rose while `bound` fell, over their scales, between the last two windows; 0 if they did not."""
    if missing := sorted({"nominal", bound} - (first.keys() & recent.keys())):
        raise PoiseError(f"divergence: {missing[0]!r} must be in first and in recent")
    moves = []
    for name, direction in (("nominal", 1), (bound, -1)):
        unit, values = scale(first[name], 0.0), recent[name]
        if len(values) < 2 * window or unit == 0:
            return 0.0
        moves.append(direction * (fmean(values[-window:]) - fmean(values[-2 * window : -window])) / unit)
    return max(0.0, min(moves))


@checked
def transfer_ratio(proxy_gain: float, validator_gain: float, count: Count) -> float | None:
    """validator_gain / proxy_gain: how much of what a reward gained another reward model sees, too.

    Gains since the start, each in stds of the initial policy's completions. 1: all of it. Falling: the policy finds
    what only its own reward likes. count: of the independent parts that a gain is a mean of: prompts, where there are
    several completions of each, which are alike. None, not NaN, while the proxy's gain is below 2 / sqrt(count), no
    less than twice the standard error of such a mean: the ratio would be one of noise.

    >>> transfer_ratio(2.0, 1.5, 100), transfer_ratio(0.1, 0.3, 100)
    (0.75, None)
    """
    if not (math.isfinite(proxy_gain) and math.isfinite(validator_gain)) or proxy_gain < 2 / math.sqrt(count):
        return None
    return validator_gain / proxy_gain


@checked
def suspicion(found: Mapping[str, float], limits: Mapping[str, Annotated[float, above(0)]]) -> float:
    """The largest sign over its limit, at least 0; signs that are missing are left out.

    >>> suspicion({"kl": 4.0, "variety": 3.0, "gap": 99.0}, {"kl": 8.0, "variety": 2.0, "repetition": 1.0})
    1.5
    """
    return max([0.0, *(found[name] / limit for name, limit in limits.items() if name in found)])


@checked
def highest(runs: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """The highest value of each sign in any reading of any run: limits, if the runs are healthy.

    >>> highest([[{"kl": 1.0}, {"kl": 3.0, "gap": 0.5}], [{"kl": 2.0}]])
    {'kl': 3.0, 'gap': 0.5}
    """
    found: dict[str, float] = {}
    for reading in itertools.chain.from_iterable(runs):
        for name, value in reading.items():
            found[name] = max(value, found.get(name, value))
    return found


@checked
def text_signs(completions: Sequence[str]) -> dict[str, float]:
    """Statistics of the texts of one step, from pairs of neighboring words, lower-cased, split at white space.

    repetition: repeated pairs as a share of a completion's pairs, mean over completions; 0 for one without pairs.
    variety: distinct pairs as a share of all pairs of all completions; 0 without pairs. It falls as the number of
    completions grows, so feed every step equally many.

    >>> text_signs(["a fine film", "a fine phone"])
    {'repetition': 0.0, 'variety': 0.75}
    """
    rows = [list(itertools.pairwise(text.lower().split())) for text in completions]
    repeated = [1 - len(set(pairs)) / len(pairs) if pairs else 0.0 for pairs in rows]
    every = list(itertools.chain.from_iterable(rows))
    return {
        "repetition": fmean(repeated) if repeated else 0.0,
        "variety": len(set(every)) / len(every) if every else 0.0,
    }
