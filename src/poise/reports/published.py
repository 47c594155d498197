"""Published figures beside what a study found. Pure: a study's results in, rows of a table out.

`replicated`, from the 95 % interval of the study's own value; v is the published value:

    yes       the interval is above 0 and reaches v
    smaller   the interval is above 0 and ends below v
    no        the interval reaches down to 0 or below, and ends below v
    open      any other case

Published directions without a size: `yes` above 0, `no` below 0, `open` where the interval holds 0. With a single
reward model there is no interval and no row.

    not comparable   whatever the interval, for figures of arXiv 2310.02743: there gold labels the preferences, the
                     texts are the policy's own samples, and best-of-n goes to 8.4 nats. A study has people's labels,
                     and 3.9 nats at n = 128.
"""

from collections.abc import Iterable, Iterator, Sequence

from poise.reports.summary import difference, noise_label, over_checkpoints, seed_interval, values
from poise.runtime.run_folder import Json

ANSWERS = ("no", "smaller", "open", "not comparable", "yes")
_OTHER_TERMS = "(2310.02743)"
ENSEMBLES = ("mean", "worst_case", "uncertainty_weighted")


def published(results: Json) -> list[Json]:
    """Rows of claim, published figure, what came out here, and whether that replicates it; failures first."""
    return as_read_today([*_best_of_n(results), *_policies(results), *_benchmarks(results)])


def as_read_today(rows: Iterable[Json]) -> list[Json]:
    """Rows, failures first; those that earlier versions stored, too, with the answers of this one."""
    found = []
    for row in rows:
        answer = "not comparable" if _OTHER_TERMS in row["claim"] else row["replicated"]
        found.append(row | {"replicated": "open" if answer == "unclear" else answer})
    return sorted(found, key=lambda row: ANSWERS.index(row["replicated"]))


def _best_of_n(results: Json) -> Iterator[Json]:
    for noise, target in (("0", 0.30), ("0.25", 0.75), ("raters", 0.30)):
        where = f"best-of-n, {noise_label(noise)}"
        arms = (results.get("best_of_n") or {}).get(noise) or {}
        arms = {name: arm.get("measures") or {} for name, arm in arms.items() if arm["seeds"] > 1}
        for name in ENSEMBLES:
            if gain := (arms.get(name) or {}).get("relative_gain"):
                claim = f"{where}: gold gained by an ensemble ({name}) over one reward model (2310.02743)"
                yield _figure(claim, f"+{target:.0%}", target, gain["mean"], gain["interval"], "{:+.0%}")
        accuracy = (arms.get("brme_1") or {}).get("accuracy") or {}
        if "vs_baseline" in accuracy:
            claim = f"{where}: accuracy of the BRME's nominal head, minus that of one Bradley–Terry head (2409.15360)"
            interval = accuracy["vs_baseline_interval"]
            yield _figure(claim, "+1.1 %, read as points", 0.011, accuracy["vs_baseline"], interval, "{:+.1%}")


def _policies(results: Json) -> Iterator[Json]:
    cells = results.get("cells") or []
    for noise in dict.fromkeys(cell["noise"] for cell in cells):
        of_arm = {
            arm: [cell for cell in cells if (cell["noise"], cell["arm"]) == (noise, arm)]
            for arm in (*ENSEMBLES, "single", "single_large_kl", "brme_0.4", "brme_large_kl")
        }
        where = f"PPO, {noise_label(noise)}"
        for name in ENSEMBLES:
            claim = f"{where}: {name} at small KL against one reward model at large KL (2310.02743)"
            gap = _gap(of_arm[name], of_arm["single_large_kl"], "final_gold")
            if gap["interval"]:
                low, high = gap["interval"]
                yield _answer(claim, "as good", gap, "yes" if low >= 0 else "no" if high < 0 else "open")
        brme, single = of_arm["brme_0.4"], of_arm["single"]
        for measure, sign, what in (("final_gold", 1, "ends with more gold"), ("drawdown", -1, "falls less")):
            claim = f"{where}: BRME with the robust term {what} than one head (2409.15360)"
            yield from _direction(claim, _gap(brme, single, measure), sign)
        claim = f"{where}: BRME with the robust term ends with more gold than one head, both at large KL (2409.15360)"
        yield from _direction(claim, _gap(of_arm["brme_large_kl"], of_arm["single_large_kl"], "final_gold"), 1)
        for task in dict.fromkeys(task for cell in brme for task in cell.get("checkpoints") or {}):
            claim = f"{where}: the std of {task} over checkpoints is smaller with BRME than with one head (2409.15360)"
            of_both = over_checkpoints({"single": single, "brme_0.4": brme}, task, "single")
            std = of_both.get("brme_0.4", {}).get("std", {})
            gap = {"value": std.get("vs_baseline"), "interval": std.get("vs_baseline_interval")}
            yield from _direction(claim, gap, -1)


def _benchmarks(results: Json) -> Iterator[Json]:
    for noise, arms in ((results.get("benchmarks") or {}).get("contrasts") or {}).items():
        found = arms.get("brme_0.4")
        if found and found["against"] == "single":
            what = "mean accuracy over the benchmarks with BRME, minus that with one head (2409.15360)"
            claim, interval = f"PPO, {noise_label(noise)}: {what}", found["interval"]
            yield _figure(claim, "+1 to 4 points", 0.01, found["difference"], interval, "{:+.1%}")


def _gap(own: Sequence[Json], other: Sequence[Json], measure: str) -> Json:
    """A measure of one arm's cells minus another's: mean over reward models, and interval (None for fewer than two)."""
    gap = difference(values(own, measure), values(other, measure))
    return {"value": float(gap.mean()) if len(gap) else None, "interval": seed_interval(gap)}


def _figure(claim: str, said: str, target: float, value: float, interval: Sequence[float], form: str) -> Json:
    """A claim of a size."""
    low, high = interval
    kind = ("yes" if high >= target else "smaller") if low > 0 else "no" if high < target else "open"
    here = f"{form.format(value)} ({form.format(low)} to {form.format(high)})"
    return {"claim": claim, "published": said, "here": here, "replicated": kind}


def _direction(claim: str, gap: Json, sign: int) -> Iterator[Json]:
    """A claim that something is higher (sign 1) or lower (-1); none without an interval."""
    if gap["interval"]:
        low, high = sorted(sign * bound for bound in gap["interval"])
        yield _answer(claim, "yes", gap, "yes" if low > 0 else "no" if high < 0 else "open")


def _answer(claim: str, said: str, gap: Json, kind: str) -> Json:
    low, high = gap["interval"]
    here = f"{gap['value']:+.2f} ({low:+.2f} to {high:+.2f})"
    return {"claim": claim, "published": said, "here": here, "replicated": kind}
