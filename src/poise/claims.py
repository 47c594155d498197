"""What the literature reports, beside what a study found. Pure: a study's results in, rows of a table out.

`replicated` claims no more than the interval: `yes` where all of it is on the published side of zero, `no` where it
ends short of the published figure, `unclear` otherwise.
"""

from collections.abc import Sequence

from jaxtyping import Float
from numpy import ndarray

from poise.metrics import bootstrap_interval
from poise.runs import Json
from poise.study_summary import difference, noise_label, values

ENSEMBLES = ("mean", "worst_case", "uncertainty_weighted")


def published(results: Json) -> list[Json]:
    """Rows of claim, published figure, what came out here, and whether that replicates it; failures first."""
    rows = [*_best_of_n(results), *_policies(results), *_benchmarks(results)]
    order = ("no", "unclear", "yes")
    return sorted(rows, key=lambda row: order.index(row["replicated"]))


def _best_of_n(results: Json) -> list[Json]:
    rows = []
    for noise, target in (("0", 0.30), ("0.25", 0.75), ("raters", 0.30)):
        arms = (results.get("best_of_n") or {}).get(noise) or {}
        for name in ENSEMBLES:
            gain = (arms.get(name) or {}).get("measures", {}).get("relative_gain")
            if gain:
                what = f"gold gained by an ensemble ({name}) over one reward model (2310.02743)"
                claim = f"best-of-n, {noise_label(noise)}: {what}"
                rows.append(_row(claim, f"+{target:.0%}", target, gain["mean"], gain["interval"], "{:+.0%}"))
        accuracy = (arms.get("brme_1") or {}).get("measures", {}).get("accuracy", {})
        if "less_first" in accuracy:
            head = "the BRME's nominal head, less that of one Bradley–Terry head"
            claim = f"accuracy of {head}, {noise_label(noise)} (2409.15360)"
            interval = accuracy["less_first_interval"]
            rows.append(_row(claim, "+1.1 points", 0.011, accuracy["less_first"], interval, "{:+.1%}"))
    return rows


def _policies(results: Json) -> list[Json]:
    rows = []
    for noise, arms in (results.get("summary") or {}).items():
        where = f"PPO, {noise_label(noise)}"
        for name in ENSEMBLES:
            less = _less(results["cells"], noise, name, "single_large_kl")
            if len(less) > 1:
                claim = f"{where}: {name} at small KL against one reward model at large KL (2310.02743)"
                interval = bootstrap_interval(less)
                kind = "yes" if interval[0] >= 0 else "no" if interval[1] < 0 else "unclear"
                rows.append(_answer(claim, "as good", less.mean(), interval, kind, " gold"))
        of_brme = arms.get("brme_0.4") or {}
        for measure, sign, what in (("final_gold", 1, "ends with more gold"), ("drawdown", -1, "falls less")):
            claim = f"{where}: BRME with the robust term {what} than one head (2409.15360)"
            rows += _less_first(claim, of_brme.get(measure) or {}, sign)
        less = _less(results["cells"], noise, "brme_large_kl", "single_large_kl")
        if len(less) > 1:
            claim = f"{where}: the same with both at twenty times the KL coefficient: more gold (2409.15360)"
            rows.append(_signed(claim, less.mean(), bootstrap_interval(less), 1))
        for task, moves in (of_brme.get("checkpoints") or {}).items():
            claim = (
                f"{where}: the score on {task} moves less over checkpoints of BRME than of one head: std (2409.15360)"
            )
            rows += _less_first(claim, moves.get("std") or {}, -1)
    return rows


def _benchmarks(results: Json) -> list[Json]:
    rows = []
    for policy in ((results.get("benchmarks") or {}).get("policies") or [])[1:]:
        average = policy.get("average") or {}
        if average.get("difference") is not None and "brme_0.4" in policy["name"]:
            claim = f"{policy['name']}: mean accuracy over the benchmarks, less that of the start (2409.15360)"
            interval = average["interval"]
            rows.append(_row(claim, "+1 to 4 points", 0.01, average["difference"], interval, "{:+.1%}"))
    return rows


def _row(claim: str, said: str, target: float, value: float, interval: Sequence[float], form: str) -> Json:
    low, high = interval
    kind = "yes" if low > 0 else "no" if high < target else "unclear"
    here = f"{form.format(value)} ({form.format(low)} to {form.format(high)})"
    return {"claim": claim, "published": said, "here": here, "replicated": kind}


def _less_first(claim: str, measure: Json, sign: int) -> list[Json]:
    """A claim that a measure is higher (sign 1) or lower (-1) than the first arm's; none of fewer than two seeds."""
    if not measure.get("less_first_interval"):
        return []
    return [_signed(claim, measure["less_first"], measure["less_first_interval"], sign)]


def _signed(claim: str, value: float, interval: Sequence[float], sign: int) -> Json:
    low, high = sorted(sign * bound for bound in interval)
    return _answer(claim, "yes", value, interval, "yes" if low > 0 else "no" if high < 0 else "unclear")


def _answer(claim: str, said: str, value: float, interval: Sequence[float], kind: str, unit: str = "") -> Json:
    here = f"{value:+.2f}{unit} ({interval[0]:+.2f} to {interval[1]:+.2f})"
    return {"claim": claim, "published": said, "here": here, "replicated": kind}


def _less(cells: Sequence[Json], noise: str, one: str, other: str) -> Float[ndarray, " reward_seeds"]:
    """Final gold of an arm less another's, of each reward model that both have."""
    of_arm = [
        values((cell for cell in cells if (cell["noise"], cell["arm"]) == (noise, arm)), "final_gold")
        for arm in (one, other)
    ]
    return difference(*of_arm)
