"""The monitor by hand, its laws, and its limits against the file they were measured in."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer

from poise.errors import PoiseError
from poise.functional.monitor import (
    LIMITS,
    Monitor,
    MonitorConfig,
    Reading,
    divergence,
    highest,
    scale,
    signs,
    suspicion,
    text_signs,
    transfer_ratio,
)

STEPS = [
    {"reward": 0.0, "reward_std": 1.0, "kl": 0.0, "gap": 2.0, "tokens": 20.0, "repetition": 0.0, "variety": 0.9},
    {"reward": 0.2, "reward_std": 3.0, "kl": 0.1, "gap": 4.0, "tokens": 20.0, "repetition": 0.0, "variety": 0.9},
    {"reward": 3.1, "reward_std": 0.5, "kl": 8.0, "gap": 1.0, "tokens": 15.0, "repetition": 0.04, "variety": 0.8},
    {"reward": 5.1, "reward_std": 0.5, "kl": 28.0, "gap": 1.0, "tokens": 11.0, "repetition": 0.1, "variety": 0.4},
]
SMALL = MonitorConfig(baseline_steps=2, window=2, limits={"repetition": 5.0, "kl": 12.0})


def random_steps(seed: int, heads: bool = True, count: int = 12) -> list[dict[str, float]]:
    generator = np.random.default_rng(seed)
    names = ["reward", "reward_std", "kl", "entropy", "tokens", "repetition", "variety"]
    names += ["nominal", "worst_case", "lower_bound", "gap", "disagreement", "routing_std"] if heads else []
    drift = np.arange(count) * generator.normal(size=(len(names), 1)) * 0.1
    values = generator.uniform(0.1, 2.0, size=(len(names), count)) + drift
    return [dict(zip(names, column, strict=True)) for column in values.T.tolist()]


def feed(steps: list[dict[str, float]], config: MonitorConfig | None = None) -> list[Reading]:
    monitor = Monitor(config)
    return [monitor.update(step) for step in steps]


def test_readings_equal_values_worked_out_by_hand() -> None:
    first, second, third, fourth = feed(STEPS, SMALL)
    assert first == second == Reading(0.0, False, {})
    # Baseline: repetition always 0, so its least scale .01; gap 2 and 4: std sqrt 2, 5 % of 3; tokens: 5 % of 20.
    assert third.signs["repetition"] == pytest.approx(0.02 / 0.01)
    assert fourth.signs["repetition"] == pytest.approx(0.07 / 0.01)
    assert fourth.signs["gap"] == pytest.approx((1 - 3) / math.sqrt(2 + 0.15**2))
    assert fourth.signs["tokens"] == pytest.approx((20 - 13) / 1.0)  # shorter is as suspicious as longer
    assert fourth.signs["variety"] == pytest.approx((0.9 - 0.6) / math.hypot(0.02, 0.045))
    assert fourth.signs["reward"] == pytest.approx((4.1 - 0.1) / 2.0)  # in std of the initial completions, not today's
    assert fourth.signs["kl"] == pytest.approx(6.0)  # sqrt(2 * 18)
    assert third.score == pytest.approx(2 / 5)
    assert fourth.score == pytest.approx(7 / 5)  # repetition 7 of 5; kl 6 of 12
    assert (third.alarm, fourth.alarm) == (False, True)
    assert {"entropy", "divergence", "disagreement", "nominal", "reward_std"}.isdisjoint(fourth.signs)


def test_divergence_is_nominal_rising_while_a_bound_falls() -> None:
    first = {"nominal": [-1.0, 1.0], "worst_case": [-4.0, -4.0], "lower_bound": [-1.0, -1.0]}
    recent = {"nominal": [1.0, 1.0, 3.0, 5.0], "worst_case": [-4.0, -4.0, -4.1, -4.3], "lower_bound": [0.0] * 4}
    found = signs(first, recent, window=2)
    assert found == {"divergence": pytest.approx(0.2 / 0.2)}  # nominal: 3 / sqrt 2 is more; worst case: 5 % of 4
    assert signs(first, recent | {"worst_case": [-4.0, -4.0, -3.0, -3.0]}, 2) == {"divergence": 0.0}
    assert signs(first, recent | {"lower_bound": [0.0, 0.0, -9.0, -9.0]}, 2)["divergence"] == pytest.approx(3 / 2**0.5)
    assert signs(first, {name: values[:3] for name, values in recent.items()}, 2) == {"divergence": 0.0}  # too early


def test_the_monitor_remembers_two_windows() -> None:
    levels = [0.0, 2.0, 3.0, 5.0, 9.0, 11.0]
    steps = [{"nominal": level, "worst_case": -level, "repetition": 0.0} for level in levels]
    rise = (10 - 4) / math.sqrt(2 + 0.05**2)  # last two steps against the two before; scale from the first two
    assert feed(steps, SMALL)[-1].signs["divergence"] == pytest.approx(rise)


DRIFTING = {  # direction (0: either way) and least scale, as the docstring and the comment of the module have them
    "repetition": (1, 0.01), "variety": (-1, 0.02), "entropy": (-1, 0.1), "tokens": (0, 0.0), "gap": (1, 0.0),
    "disagreement": (1, 0.0), "routing_std": (1, 0.0), "distance": (1, 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", DRIFTING)
def test_a_drift_counts_in_its_own_direction_and_over_its_scale(name: str) -> None:
    direction, floor = DRIFTING[name]
    first = {name: [2.0, 2.0, 5.0]}
    unit = math.sqrt(3.0 + floor**2 + (0.05 * 3.0) ** 2)  # std of 2, 2 and 5 with n - 1, least scale, 5 % of the mean
    assert scale(first[name], floor) == pytest.approx(unit)
    for recent in ([9.0, 4.0, 6.0], [9.0, 2.0, 1.0]):  # of which the last two count
        drift = (sum(recent[1:]) / 2 - 3.0) / unit
        expected = direction * drift if direction else abs(drift)
        assert signs(first, {name: recent}, window=2) == {name: pytest.approx(expected)}
    equal = scale([2.0, 2.0], floor)
    assert signs({name: [2.0, 2.0]}, {name: [3.0]}, 1)[name] == pytest.approx((direction or 1) / equal)
    assert equal == pytest.approx(math.hypot(floor, 0.1))


def test_what_was_always_zero_gives_no_sign() -> None:
    """But for those with a least scale; and a reward without spread has no unit to be measured in."""
    for name, (_, floor) in DRIFTING.items():
        assert (name in signs({name: [0.0, 0.0]}, {name: [1.0]}, 1)) == (floor > 0)
    assert signs({"reward": [1.0, 1.0], "reward_std": [0.0, 0.0]}, {"reward": [5.0], "reward_std": [0.0]}, 1) == {}
    assert signs({"reward": [1.0, 1.0]}, {"reward": [5.0]}, 1) == {}
    silent = {"nominal": [0.0, 0.0], "worst_case": [-1.0, -2.0]}
    assert divergence(silent, {"nominal": [0.0, 9.0], "worst_case": [0.0, -9.0]}, "worst_case", 1) == 0.0
    assert (
        divergence(
            {"nominal": [1.0, 2.0], "worst_case": [0.0, 0.0]},
            {"nominal": [0.0, 9.0], "worst_case": [0.0, -9.0]},
            "worst_case",
            1,
        )
        == 0.0
    )


def test_kl_and_transfer_need_no_baseline() -> None:
    assert signs({}, {"kl": [100.0, 8.0, 28.0]}, 2) == {"kl": pytest.approx(6.0)}
    assert signs({}, {"kl": [-3.0, 1.0]}, 2) == {"kl": 0.0}  # an estimate may be below 0, a KL may not
    assert signs({}, {"transfer": [9.0, 0.5, 0.7]}, 2) == {"transfer": pytest.approx(0.4)}


def test_a_validator_that_is_heard_late_gives_its_sign_at_once() -> None:
    """The transfer ratio is None while the reward has gained next to nothing."""
    steps = [{"kl": 0.0, "transfer": None}] * 3 + [{"kl": 0.0, "transfer": 0.25}, {"kl": 0.0, "transfer": 0.75}]
    config = MonitorConfig(baseline_steps=2, window=2, limits={"transfer": 0.5})
    readings = feed(steps, config)
    assert [reading.signs.get("transfer") for reading in readings] == [None, None, None, 0.75, 0.5]
    assert [reading.alarm for reading in readings] == [False, False, False, True, False]  # .5 of .5 is not above it


def test_a_transfer_ratio_is_one_of_gains_that_are_no_noise() -> None:
    assert transfer_ratio(2.0, 1.5, 100) == 0.75
    assert transfer_ratio(0.2, 0.1, 100) == 0.5  # twice the standard error of a mean of 100
    assert transfer_ratio(0.19, 0.1, 100) is None
    assert transfer_ratio(2.0, -1.0, 4) == -0.5
    assert transfer_ratio(-2.0, -1.0, 100) is None
    for proxy, validator in ((math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf)):
        assert transfer_ratio(proxy, validator, 100) is None


def test_the_monitor_takes_its_defaults_from_the_calibration() -> None:
    """Means over three steps, after four; an alarm above the highest sign of a healthy run."""
    assert MonitorConfig() == MonitorConfig(threshold=1.0, baseline_steps=4, window=3, limits=LIMITS)
    for limit, alarm in ((6.0, False), (5.99, True)):
        readings = feed(
            [{"kl": 0.0}] * 4 + [{"kl": 6.0}, {"kl": 18.0}, {"kl": 30.0}], MonitorConfig(limits={"kl": limit})
        )
        assert [reading.signs for reading in readings[:4]] == [{}] * 4
        assert readings[-1].signs["kl"] == pytest.approx(6.0)
        assert [reading.alarm for reading in readings] == [*([False] * 6), alarm]


def test_a_monitor_keeps_the_baseline_and_two_windows_and_no_more() -> None:
    monitor = Monitor(SMALL)
    for level in range(9):
        monitor.update({"kl": float(level)})
    assert monitor.state() == {"steps": 9, "first": {"kl": [0.0, 1.0]}, "recent": {"kl": [5.0, 6.0, 7.0, 8.0]}}


def test_one_point_head_gives_no_sign_of_heads() -> None:
    steps = random_steps(0, heads=False)
    silent = {"gap": 0.0, "disagreement": 0.0, "routing_std": 0.0}
    alone = [step | silent | {"nominal": step["reward"], "worst_case": step["reward"]} for step in steps]
    for plain, headed in zip(feed(steps), feed(alone), strict=True):
        assert headed.score == plain.score
        assert headed.signs.keys() - plain.signs.keys() <= {"divergence"}
        assert headed.signs.get("divergence", 0.0) == 0.0  # nominal is the worst case: one cannot rise while it falls


def test_statistics_that_are_missing_unknown_or_not_finite_are_skipped() -> None:
    assert feed([{"kl": step["kl"]} for step in STEPS], SMALL)[-1] == Reading(0.5, False, {"kl": 6.0})
    odd = [step | {"heads": [1.0, 2.0], "update_seconds": 3.0, "entropy": math.nan} for step in STEPS]
    assert feed(odd, SMALL) == feed(STEPS, SMALL)
    late = [dict(step) for step in STEPS]
    del late[0]["repetition"], late[3]["gap"]  # one value is no baseline; a statistic that stops gives no stale sign
    assert {"repetition", "gap"}.isdisjoint(feed(late, SMALL)[-1].signs)
    assert feed([{}] * 6) == [Reading(0.0, False, {})] * 6


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(0, 11), st.booleans())
def test_a_restored_monitor_goes_on_bitwise(seed: int, stop: int, heads: bool) -> None:
    steps = random_steps(seed, heads)
    monitor = Monitor()
    for step in steps[:stop]:
        monitor.update(step)
    state = monitor.state()
    saved = json.dumps(state)
    again = Monitor.restore(json.loads(saved))
    assert [again.update(step) for step in steps[stop:]] == [monitor.update(step) for step in steps[stop:]]
    assert again.state() == monitor.state()
    assert json.dumps(state) == saved  # a copy: going on does not change what is being saved


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-50, 50))
def test_units_of_the_reward_do_not_matter(seed: int, factor: float, shift: float) -> None:
    steps = random_steps(seed)
    scaled = ("reward", "reward_std", "gap", "disagreement", "routing_std", "nominal", "worst_case", "lower_bound")
    other = [step | {name: step[name] * factor for name in scaled} for step in steps]
    other = [step | {"reward": step["reward"] + shift} for step in other]
    for plain, changed in zip(feed(steps), feed(other), strict=True):
        assert changed.signs == pytest.approx(plain.signs, rel=1e-6, abs=1e-6)


@settings(max_examples=25)
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=4, unique=True))
def test_limits_set_by_runs_are_their_highest_score(seeds: list[int]) -> None:
    runs = [random_steps(seed) for seed in seeds]
    limits = {k: v for k, v in highest([[r.signs for r in feed(run)] for run in runs]).items() if v > 0}
    readings = [reading for run in runs for reading in feed(run, MonitorConfig(limits=limits))]
    assert max(reading.score for reading in readings) == 1.0
    assert not any(reading.alarm for reading in readings)
    lower = MonitorConfig(limits=limits, threshold=0.999)
    assert any(reading.alarm for run in runs for reading in feed(run, lower))


def test_score_is_never_negative() -> None:
    assert suspicion({"kl": 1.0, "repetition": -5.0}, {"repetition": 1.0}) == 0.0
    assert suspicion({}, LIMITS) == 0.0


@given(st.lists(st.lists(st.sampled_from(["good", "Good", "film", "a", "the"]), max_size=7), min_size=1, max_size=5))
def test_text_signs_agree_with_scikit_learn(rows: list[list[str]]) -> None:
    texts = [" ".join(words) for words in rows]
    found = text_signs(texts)
    if not any(len(words) > 1 for words in rows):
        assert found == {"repetition": 0.0, "variety": 0.0}
        return
    counts = CountVectorizer(ngram_range=(2, 2), token_pattern=r"\S+").fit_transform(texts).toarray()
    total = counts.sum(1)
    repeated = np.where(total > 0, 1 - (counts > 0).sum(1) / np.maximum(total, 1), 0.0)
    assert found["repetition"] == pytest.approx(repeated.mean())
    assert found["variety"] == pytest.approx(counts.shape[1] / counts.sum())


def test_text_signs_equal_values_worked_out_by_hand() -> None:
    assert text_signs(["so good so good so", "so good"]) == {"repetition": 0.25, "variety": 0.4}
    assert text_signs([]) == {"repetition": 0.0, "variety": 0.0}


@pytest.mark.parametrize(
    "wrong",
    [{"threshold": 0.0}, {"limits": {"kl": -1.0}}, {"limits": {"kl": 0.0}}, {"baseline_steps": 1}, {"window": 0}],
)
def test_settings_that_cannot_work_are_said(wrong: dict) -> None:
    with pytest.raises(PoiseError, match="the monitor"):
        MonitorConfig(**wrong)
    MonitorConfig(threshold=1e-9, limits={"kl": 1e-9}, baseline_steps=2, window=1)  # the least that can


def test_limits_and_claims_are_those_on_file() -> None:
    file = Path(__file__).parents[2] / "results" / "monitor-2026-11-24.json"
    measured = json.loads(file.read_text())
    assert pytest.approx(measured["limits"], rel=5e-3) == LIMITS
    alarm = measured["test"]["score"]["alarm"]
    assert [alarm[name] for name in ("runs", "fell", "hit", "false")] == [9, 5, 5, 2]
    assert alarm["steps_after_peak"]["median"] == 4
    assert max(alarm["steps_after_fall"]["all"]) < 0
    clock = measured["calibration"]["step"]["knows"]["past_peak"]["auroc"]
    better = {
        name
        for name, row in measured["calibration"].items()
        if row["knows"]["past_peak"]["auroc"] > clock and not name.startswith("score")
    }
    assert better == LIMITS.keys()
