"""Metrics against brute force and closed forms."""

import itertools

import numpy as np
import pytest
import scipy.stats
import sklearn.calibration
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from poise.errors import PoiseError
from poise.functional.calibration import (
    aurc,
    brier,
    constant_log_loss,
    expected_calibration_error,
    folded,
    log_loss,
    reliability,
    risk_coverage,
    weighted_auroc,
)
from poise.functional.reward_benchmarks import REWARD_BENCH, picks_chosen, reward_bench, style_matrix, style_scores
from poise.functional.statistics import (
    auroc,
    bootstrap_interval,
    bootstrap_intervals,
    exact_at_ends,
    holm,
    interval_of_share,
    intervals_of_means,
    mean_between,
    mean_interval,
    movement,
    ratio_interval,
    resampled_counts,
    share_interval,
    smoothed,
    spearman,
    student_shares,
    t_interval,
)


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        low, high = bootstrap_interval(generator.normal(size=40), draws=500)
        covered += low <= 0.0 <= high
    assert 0.90 <= covered / 300 <= 0.98


@pytest.mark.parametrize("count", [2, 4, 12, 30])
def test_mean_interval_covers_the_mean_as_often_as_it_says_also_of_few(count: int) -> None:
    """A bootstrap of two covers it in half of all cases, and of one always says that it is certain."""
    generator = np.random.default_rng(count)
    covered = 0
    for _ in range(300):
        low, high = mean_interval(generator.normal(size=count))
        covered += low <= 0.0 <= high
    assert covered / 300 >= 0.91
    assert np.isnan(mean_interval(np.array([1.0]))).all()


@pytest.mark.parametrize(("right", "share"), [(7, 1.0), (0, 0.0), (60, 1.0)])
def test_the_interval_of_a_share_at_its_end_is_clopper_and_pearsons(right: int, share: float) -> None:
    units = right or 12
    low, high = scipy.stats.binomtest(right, units).proportion_ci(0.95, "exact")
    assert exact_at_ends([share, share], share, units) == pytest.approx([low, high])
    assert exact_at_ends([0.2, 0.4], 0.3, units) == [0.2, 0.4]


def test_t_interval_of_few_covers_the_mean_as_often_as_it_says() -> None:
    low, high = t_interval(np.random.default_rng(0).normal(size=(3, 2000)))
    assert 0.935 <= ((low <= 0) & (high >= 0)).mean() <= 0.965
    assert np.isnan(t_interval(np.ones((1, 4)))).all()


def test_auroc_equals_values_worked_out_by_hand() -> None:
    assert auroc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == pytest.approx((1 + 0.5 + 1 + 1) / 4)


# ---- probabilities of pairs ----

probabilities = st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 0.99]), min_size=2, max_size=40)


@given(probabilities)
def test_brier_and_log_loss_are_those_of_scikit_learn(listed: list[float]) -> None:
    p = np.array(listed)
    happened = np.arange(len(p)) % 2  # the same events, told the other way round on every second row
    told = np.where(happened == 1, p, 1 - p)
    assert brier(p) == pytest.approx(sklearn.metrics.brier_score_loss(happened, told))
    assert log_loss(p) == pytest.approx(sklearn.metrics.log_loss(happened, told, labels=[0, 1]))


def test_constant_log_loss_is_the_lowest_of_any_constant() -> None:
    constants = np.linspace(0.01, 0.99, 99)
    losses = [log_loss(np.repeat([c, 1 - c], [7, 3])) for c in constants]
    assert constants[np.argmin(losses)] == pytest.approx(0.7)
    assert constant_log_loss(0.7) == pytest.approx(min(losses))


def test_a_certain_and_wrong_prediction_loses_everything() -> None:
    assert log_loss(np.array([1.0, 0.0])) == np.inf


def test_reliability_equals_values_worked_out_by_hand() -> None:
    confidence, correct = folded(np.array([0.9, 0.4, 0.8, 0.3, 0.95]))
    np.testing.assert_allclose(confidence, [0.9, 0.6, 0.8, 0.7, 0.95])
    bins = reliability(confidence, correct, num_bins=2)
    np.testing.assert_allclose(bins.confidence, [0.7, 0.925])  # .6 .7 .8 | .9 .95
    np.testing.assert_allclose(bins.accuracy, [1 / 3, 1.0])
    assert bins.size.tolist() == [3, 2]
    assert expected_calibration_error(bins) == pytest.approx(3 / 5 * abs(1 / 3 - 0.7) + 2 / 5 * 0.075)


def test_equal_counts_are_those_of_scikit_learns_quantile_bins() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1, 200)
    correct = (generator.random(200) < confidence).astype(float)
    accuracy, mean = sklearn.calibration.calibration_curve(correct, confidence, n_bins=10, strategy="quantile")
    bins = reliability(confidence, correct)
    np.testing.assert_allclose(bins.confidence, mean, atol=1e-12)
    np.testing.assert_allclose(bins.accuracy, accuracy, atol=1e-12)


def test_one_confidence_for_all_is_one_bin_whatever_the_order_of_rows() -> None:
    correct = np.array([1.0, 1.0, 1.0, 0.0])
    bins = reliability(np.full(4, 0.6), correct, num_bins=2)
    assert bins.accuracy.tolist() == [0.75, 0.75]
    assert expected_calibration_error(bins) == pytest.approx(0.15)
    assert reliability(np.array([0.7]), np.array([1.0])).size.tolist() == [1]  # no empty bins


def test_calibration_error_of_perfect_probabilities_is_as_small_as_the_docstring_says() -> None:
    generator = np.random.default_rng(0)
    errors = []
    for _ in range(50):
        confidence = generator.uniform(0.5, 1, 1000)
        correct = (generator.random(1000) < confidence).astype(float)
        errors.append(expected_calibration_error(reliability(confidence, correct)))
    assert np.mean(errors) == pytest.approx(np.sqrt(10 / 1000) / 3, rel=0.15)


# ---- uncertainties ----

rows = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 3)), min_size=1, max_size=6)


@given(rows)
def test_risk_coverage_is_the_average_over_every_order_of_ties(listed: list[tuple[float, int]]) -> None:
    correct, uncertainty = np.array([c for c, _ in listed]), np.array([float(u) for _, u in listed])
    orders = [
        order for order in itertools.permutations(range(len(listed))) if (np.diff(uncertainty[list(order)]) >= 0).all()
    ]
    kept = np.arange(1, len(listed) + 1)
    expected = np.mean([np.cumsum(1 - correct[list(order)]) / kept for order in orders], axis=0)
    coverage, risk = risk_coverage(correct, uncertainty)
    np.testing.assert_allclose(coverage, kept / len(listed))
    np.testing.assert_allclose(risk, expected, atol=1e-12)
    assert aurc(correct, uncertainty, np.ones((1, len(listed))))[0] == pytest.approx(expected.mean())


@given(rows, st.integers(0, 1000))
def test_area_and_auroc_of_a_resample_are_those_of_its_rows_written_out(
    listed: list[tuple[float, int]], seed: int
) -> None:
    correct, uncertainty = np.array([c for c, _ in listed]), np.array([float(u) for _, u in listed])
    counts = np.random.default_rng(seed).integers(0, 4, size=(3, len(listed))).astype(float)
    counts[:, 0] += 1
    areas, curves = aurc(correct, uncertainty, counts), weighted_auroc(1 - correct, uncertainty, counts)
    for times, area, curve in zip(counts.astype(int), areas, curves, strict=True):
        some_correct, some_uncertainty = np.repeat(correct, times), np.repeat(uncertainty, times)
        assert area == pytest.approx(risk_coverage(some_correct, some_uncertainty)[1].mean())
        # Half a wrong pair and half a right one: every row twice, as one of each.
        wrong = np.concatenate([some_correct < 1, some_correct == 0])
        if wrong.all() or not wrong.any():
            assert np.isnan(curve)
        else:
            both = np.tile(some_uncertainty, 2)
            assert curve == pytest.approx(auroc(both[wrong], both[~wrong]))
            assert curve == pytest.approx(sklearn.metrics.roc_auc_score(wrong, both))


def test_an_uncertainty_that_knows_nothing_has_the_error_rate_as_its_area() -> None:
    correct = np.array([1.0, 1.0, 0.0, 1.0, 0.0])
    assert aurc(correct, np.zeros(5), np.ones((1, 5)))[0] == pytest.approx(0.4)
    assert aurc(correct, 1 - correct, np.ones((1, 5)))[0] == pytest.approx((0 + 0 + 0 + 1 / 4 + 2 / 5) / 5)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=30))
def test_spearman_is_that_of_scipy(listed: list[tuple[int, int]]) -> None:
    one, other = (np.array(values, dtype=float) for values in zip(*listed, strict=True))
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        assert np.isnan(spearman(one, other))
    else:
        assert spearman(one, other) == pytest.approx(scipy.stats.spearmanr(one, other).statistic)


def test_bootstrap_intervals_agree_with_the_plain_bootstrap_and_are_paired() -> None:
    values = np.random.default_rng(0).normal(size=200)

    def means(counts: np.ndarray) -> np.ndarray:
        mean = counts @ values / counts.sum(-1)
        return np.stack([mean, mean - mean, np.full(len(mean), np.nan)], -1)

    (low, high), difference, unknown = bootstrap_intervals(means, np.arange(200), draws=4000)
    assert (low, high) == pytest.approx(bootstrap_interval(values), abs=0.01)
    assert difference.tolist() == [0.0, 0.0]
    assert np.isnan(unknown).all()


def test_rows_of_one_unit_are_drawn_together() -> None:
    values = np.random.default_rng(0).normal(size=50)

    def mean(counts: np.ndarray) -> np.ndarray:
        return (counts @ np.repeat(values, 4) / counts.sum(-1))[:, None]

    together = bootstrap_intervals(mean, np.repeat(np.arange(50), 4), draws=4000)[0]
    apart = bootstrap_intervals(mean, np.arange(200), draws=4000)[0]
    assert tuple(together) == pytest.approx(bootstrap_interval(values), abs=0.02)
    assert np.ptp(together) == pytest.approx(2 * np.ptp(apart), rel=0.1)  # four copies of a value are one value


@pytest.mark.parametrize("count", [3, 8, 19])
def test_intervals_over_few_units_are_students(count: int) -> None:
    """Of a mean by hand; and as often right as they say, where a bootstrap of three covers in three of four cases."""
    values, covered = np.random.default_rng(count).normal(size=(300, count, 1)), 0
    for one in values:
        (low, high), *_ = intervals_of_means(one, np.arange(count), 0)
        assert [low, high] == pytest.approx(t_interval(one)[:, 0].tolist())
        covered += low <= 0 <= high
    assert covered / 300 >= 0.91


def test_a_statistic_that_one_of_few_units_makes_possible_has_percentiles() -> None:
    """An AUROC by the only error: without it there is none, and no pseudo-value."""
    wrong, value = np.eye(1, 6, 0)[0], np.array([3.0, 1, 2, 4, 5, 0])

    def statistics(counts: np.ndarray) -> np.ndarray:
        return weighted_auroc(wrong, value, counts)[:, None]

    assert np.isfinite(bootstrap_intervals(statistics, np.arange(6))).all()
    one_unit = bootstrap_intervals(lambda counts: counts @ value[:, None] / 15, np.zeros(6, dtype=int))
    assert one_unit.tolist() == [[1.0, 1.0]]  # nothing is known of how units differ


def test_the_interval_of_a_ratio_is_fiellers() -> None:
    """The ends are where the difference's own interval touches 0; as often right as they say."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        under = rng.normal(2.0, 0.5, size=5)
        over = 0.5 * under + rng.normal(0.0, 0.5, size=5)
        low, high = ratio_interval(over, under)
        if np.isnan(low):
            continue
        for end, side in ((low, 0), (high, 1)):
            assert t_interval(over - end * under)[side] == pytest.approx(0.0, abs=1e-9) or t_interval(
                over - end * under
            )[1 - side] == pytest.approx(0.0, abs=1e-9)
        covered += low <= 0.5 <= high
    assert 0.92 <= covered / 400 <= 0.98
    assert ratio_interval(under, under) == pytest.approx((1, 1))
    assert np.isnan(ratio_interval(over, under - under.mean())).all()  # divided by what may be 0
    assert np.isnan(ratio_interval(over[:1], under[:1])).all()


@pytest.mark.parametrize(("units", "each"), [(40, 6), (10, 5), (25, 2)])
def test_the_interval_of_a_share_knows_which_rows_depend_on_each_other(units: int, each: int) -> None:
    """Prompts differ (intraclass correlation .3): Wilson's interval of the rows covers in 78 to 92 % of cases."""
    rng, covered = np.random.default_rng(units), 0
    unit = np.repeat(np.arange(units), each)
    for _ in range(500):
        of_unit = rng.beta(0.7 * 7 / 3, 0.3 * 7 / 3, size=units)
        low, high = share_interval((rng.random(len(unit)) < of_unit[unit]).astype(float), unit)
        covered += low <= 0.7 <= high
    assert covered / 500 >= 0.93


def test_the_interval_of_a_share_by_hand() -> None:
    alone = share_interval(np.array([1.0] * 8 + [0.0] * 2), np.arange(10))
    assert alone == pytest.approx(tuple(scipy.stats.binomtest(8, 10).proportion_ci(0.95, "wilson")))
    # units of five rows, two of them all right and one all wrong: 15 rows are worth 15 / 7.5 = 2
    right, unit = np.repeat([1.0, 1.0, 0.0], 5), np.repeat(np.arange(3), 5)
    squares = 2 * (5 / 3) ** 2 + (10 / 3) ** 2
    assert squares * 3 / 2 / (15 * 2 / 9) == pytest.approx(7.5)
    t2 = scipy.stats.t.ppf(0.975, 2) ** 2
    middle = (2 / 3 + t2 / 4) / (1 + t2 / 2)
    half = (t2 / 2 * 2 / 9 + t2**2 / 16) ** 0.5 / (1 + t2 / 2)
    assert share_interval(right, unit) == pytest.approx((middle - half, middle + half))
    assert share_interval(np.ones(15), unit)[0] == pytest.approx(1 / (1 + t2 / 3))  # all right: worth three rows
    assert share_interval(np.array([1.0, 0.0]), np.array([3, 3])) == (0.0, 1.0)


def test_a_share_of_few_units_has_wilsons_interval_and_of_many_the_bootstraps() -> None:
    few, many = np.array([1.0] * 6 + [0.0] * 2), np.ones(30)
    assert interval_of_share([0.5, 1.0], few, np.arange(8)) == pytest.approx(share_interval(few, np.arange(8)))
    assert interval_of_share([1.0, 1.0], many, np.arange(30)) == pytest.approx([0.025 ** (1 / 30), 1.0])
    assert interval_of_share([0.4, 0.6], np.tile([0.0, 1.0], 15), np.arange(30)) == [0.4, 0.6]


# ---- benchmarks ----

# The benchmark's own weights: a section's score is the mean of its subsets weighted so (984 = 6 * 164).
REWARD_BENCH_COUNTS = {
    "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46, "refusals-dangerous": 100, "refusals-offensive": 100,
    "xstest-should-refuse": 154, "xstest-should-respond": 250, "donotanswer": 136, "math-prm": 984,
    "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164, "hep-rust": 164,
}  # fmt: skip


def test_reward_bench_sections_have_the_benchmarks_weights() -> None:
    accuracy = dict(zip(REWARD_BENCH_COUNTS, np.random.default_rng(0).random(23), strict=True))
    scores = reward_bench(accuracy, REWARD_BENCH_COUNTS | {"math-prm": 447})  # 447 pairs, weighted as 984
    assert list(scores) == ["Chat", "Chat Hard", "Safety", "Reasoning"]
    assert sum(len(members) for members in REWARD_BENCH.values()) == len(REWARD_BENCH_COUNTS)
    for section, members in REWARD_BENCH.items():
        weights = [REWARD_BENCH_COUNTS[name] for name in members]
        assert scores[section] == pytest.approx(np.average([accuracy[name] for name in members], weights=weights))


def test_reward_bench_equals_values_worked_out_by_hand_with_parts_missing() -> None:
    accuracy = {"math-prm": 0.9, "hep-cpp": 0.5, "hep-go": 0.8, "donotanswer": 0.25}
    count = {"math-prm": 1, "hep-cpp": 100, "hep-go": 50, "donotanswer": 4}
    assert reward_bench(accuracy, count) == pytest.approx({"Safety": 0.25, "Reasoning": (0.9 + 0.6) / 2})
    assert reward_bench({"math-prm": 0.9}, count) == {"Reasoning": pytest.approx(0.9)}
    assert reward_bench({"mine": 0.9}, {"mine": 3}) == {}


def test_a_model_that_pays_for_style_alone_is_easy_to_be_right_with_and_always_wrong_on_hard() -> None:
    style = np.array([[0.0, 1.0, 2.0]])  # concise, detailed, detailed with markdown
    matrix = style_matrix(style, style)
    assert matrix.tolist() == [[0.5, 0.0, 0.0], [1.0, 0.5, 0.0], [1.0, 1.0, 0.5]]
    assert style_scores(matrix) == {"easy": 1.0, "normal": 0.5, "hard": 0.0, "mean": 0.5}


def test_style_matrix_equals_one_worked_out_by_hand() -> None:
    chosen, rejected = np.array([[5.0, 1.0, 2.0], [0.0, 9.0, 3.0]]), np.array([[1.0, 3.0, 4.0], [1.0, 2.0, 3.0]])
    expected = [[0.5, 0.5, 0.5], [0.75, 0.5, 0.5], [1.0, 0.5, 0.25]]
    assert style_matrix(chosen, rejected).tolist() == expected
    scores = style_scores(np.array(expected))
    assert scores["hard"] == pytest.approx(0.5)  # [0,1], [0,2] and [1,2]: the rejected text is the fancier
    assert scores["easy"] == pytest.approx(2.25 / 3)
    assert scores["normal"] == pytest.approx(1.25 / 3)
    uneven = style_scores(np.array([[0.0, 0.25, 0.5], [0.125, 1.0, 0.75], [0.25, 1.0, 0.5]]))
    assert uneven == pytest.approx({"easy": 1.375 / 3, "normal": 0.5, "hard": 0.5, "mean": 4.375 / 9})
    unlike = style_scores(np.array([[0.0, 0.25, 1.0], [0.125, 1.0, 0.0], [0.25, 1.0, 0.5]]))
    assert unlike["hard"] == pytest.approx(1.25 / 3)  # all three cells above the diagonal


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 100))
def test_picking_from_a_set_at_random_is_right_as_often_as_chance(m: int, n: int, seed: int) -> None:
    assert picks_chosen(np.zeros(m), np.zeros(n)) == pytest.approx(m / (m + n))
    scores = np.random.default_rng(seed).integers(0, 3, m + n).astype(float)
    best = np.flatnonzero(scores == scores.max())
    assert picks_chosen(scores[:m], scores[m:]) == pytest.approx(np.mean(best < m))


# ---- resamples and shares ----


def test_resampled_counts_are_shares_of_a_bootstrap() -> None:
    counts = resampled_counts(5, 3000, 0)
    assert counts.shape == (3000, 5)
    np.testing.assert_allclose(counts.sum(-1), 1.0)
    np.testing.assert_allclose(counts * 5, (counts * 5).round())
    np.testing.assert_allclose((counts * 5).var(), 0.8, rtol=0.1)  # binomial: 5 * .2 * .8
    assert np.abs(np.corrcoef(counts[1:, 0], counts[:-1, 0])[0, 1]) < 0.1


def test_shares_of_few_units_give_students_interval() -> None:
    values = np.array([1.0, 4.0, 2.0])
    shares = student_shares(3, 60_000, 0)
    np.testing.assert_allclose(shares.sum(-1), 1.0)
    np.testing.assert_allclose(np.quantile(shares @ values, [0.025, 0.975]), t_interval(values), rtol=0.05, atol=0.05)
    assert student_shares(1, 4, 0).tolist() == [[1.0]] * 4
    two = t_interval(values[:2])
    np.testing.assert_allclose(two, 2.5 + np.array([-1, 1]) * 12.706 * np.sqrt(4.5 / 2), rtol=1e-3)
    assert np.isnan(t_interval(values[:1])).all()


def test_smoothing_averages_over_its_width() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0, np.nan])
    assert smoothed(values, 1)[:5].tolist() == [1, 2, 4, 8, 16]
    np.testing.assert_allclose(smoothed(values), [1.5, 7 / 3, 14 / 3, 28 / 3, 12, 16])
    np.testing.assert_allclose(smoothed(values, 5), [7 / 3, 15 / 4, 31 / 5, 30 / 4, 28 / 3, 12])
    assert np.isnan(smoothed(np.array([np.nan, np.nan, np.nan, 1.0]))[0])


def test_movement_equals_values_worked_out_by_hand() -> None:
    one, two, rising = (movement(np.array(values)) for values in ([1.0], [1.0, 3.0], [1.0, 2.0, 5.0]))
    assert np.isnan(one["std"])
    assert two == {"std": pytest.approx(2**0.5), "range": 2.0, "largest_drop": 0.0}
    assert rising["largest_drop"] == 0.0
    assert movement(np.array([3.0, 1.0, 4.0, 0.5]))["largest_drop"] == 3.5


def test_bootstrap_intervals_are_the_same_in_chunks_and_by_default_of_95_percent() -> None:
    """Rows so many that resamples are drawn a few at a time, and statistics that some or all draws do not know."""
    generator = np.random.default_rng(0)
    values, unit = generator.normal(size=(3000, 1)) + 5, np.arange(3000)
    sizes = []

    def statistics(counts: np.ndarray) -> np.ndarray:
        sizes.append(len(counts))
        np.testing.assert_array_equal(counts.sum(-1), 3000)
        means = counts @ values / 3000
        missing = np.where(counts[:, :1] == 0, np.nan, means)  # NaN where row 0 is not drawn
        return np.concatenate([means, missing, np.full_like(means, np.nan)], -1)

    found = bootstrap_intervals(statistics, unit)
    assert sizes == [666, 334]
    width = 2 * 1.96 * values.std() / 3000**0.5
    assert found[0, 1] - found[0, 0] == pytest.approx(width, rel=0.1)
    assert found[1, 1] - found[1, 0] == pytest.approx(width, rel=0.1)
    assert np.isnan(found[2]).all()
    assert intervals_of_means(values, unit, 0)[0] == pytest.approx(found[0].tolist())


def test_units_are_all_drawn_and_their_rows_together() -> None:
    unit = np.concatenate([[0, 0, 1, 2, 2, 2], np.arange(3, 24)])
    drawn = []

    def statistics(counts: np.ndarray) -> np.ndarray:
        drawn.append(counts)
        return counts[:, :1]

    bootstrap_intervals(statistics, unit, draws=500)
    [counts] = drawn
    assert (counts[:, 0] == counts[:, 1]).all()
    np.testing.assert_array_equal(counts[:, [0, 2, *range(5, 27)]].sum(-1), 24)  # 24 units, drawn 24 times
    assert len(counts) == 500
    drawn.clear()
    bootstrap_intervals(statistics, unit[:6])  # of three each is left out once: for Student's interval
    np.testing.assert_array_equal(drawn[0], [[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


# ---- at equal x ----


def test_mean_between_equals_values_worked_out_by_hand() -> None:
    x, y = np.array([4.0, 0.0, 2.0, 2.0]), np.array([8.0, 0.0, 1.0, 3.0])  # the line: 0 to 2 over 2, then to 8 over 2
    assert mean_between(x, y, 0.0, 4.0) == pytest.approx((1.0 * 2 + 5.0 * 2) / 4)
    assert mean_between(x, y, 1.0, 3.0) == pytest.approx((1.5 * 1 + 3.5 * 1) / 2)
    assert mean_between(x, y, 4.0, 9.0) == pytest.approx(8.0)  # flat beyond the points
    with pytest.raises(PoiseError, match="needs a range from low to high"):
        mean_between(x, y, 3.0, 3.0)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12, unique=True), st.floats(-4, 4), st.floats(0.1, 4))
def test_mean_between_is_the_integral_of_the_line(places: list[float], low: float, width: float) -> None:
    x = np.array(places)
    y, high = np.sin(x), low + width
    fine = np.linspace(low, high, 20_001)
    expected = np.interp(fine, np.sort(x), y[np.argsort(x)]).mean()
    assert mean_between(x, y, low, high) == pytest.approx(expected, abs=2e-3)
    assert mean_between(x, 3 * y + 1, low, high) == pytest.approx(3 * mean_between(x, y, low, high) + 1, abs=1e-6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_the_closed_test_of_all_subsets(values: list[float]) -> None:
    """A hypothesis is kept until every intersection that holds it is refused by Bonferroni."""
    for i, adjusted in enumerate(holm(values)):
        subsets = (s for size in range(1, len(values) + 1) for s in itertools.combinations(range(len(values)), size))
        expected = max(min(1.0, len(s) * min(values[j] for j in s)) for s in subsets if i in s)
        assert adjusted == pytest.approx(expected)
