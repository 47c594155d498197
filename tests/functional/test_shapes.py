"""Functions of arrays as users call them: what does not fit, or cannot be, is refused and not made into a number."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from as_installed import poise_as_installed

WIDE, ROWS, ONE = torch.ones(3, 3), torch.ones(3), torch.ones(3, 1)
POOL = np.array([[0.0, 2.0, 1.0, 3.0]])


@pytest.fixture(scope="module")
def of() -> Iterator[Callable[[str], Any]]:
    """`module.function` of poise.functional by name."""
    import importlib

    with poise_as_installed():
        yield lambda name: getattr(
            importlib.import_module(f"poise.functional.{name.split('.')[0]}"), name.split(".")[1]
        )


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        call()
    assert type(caught.value).__name__ == "PoiseError", repr(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "wrong"),
    [
        ("reward_losses.bradley_terry", [ROWS, ROWS], {1: ONE}),
        ("reward_losses.bradley_terry", [ROWS, ROWS, ROWS], {1: ONE, 2: ONE}),
        *(
            (f"reward_losses.{loss}", [WIDE, WIDE, WIDE, ROWS, WIDE], {1: ONE, 2: ONE, 3: ONE, 4: ROWS})
            for loss in ("sampled_mse", "gaussian_nll", "beta_nll", "crps")
        ),
        ("reward_losses.probit_pairs", [WIDE] * 5, {1: ONE, 2: ONE, 3: ROWS, 4: ROWS}),
        ("reward_losses.bradley_terry_heads", [WIDE, WIDE, ROWS, WIDE], {1: ONE, 2: ONE, 3: ROWS}),
        ("ppo.token_rewards", [ROWS, WIDE, WIDE, WIDE, 0.1], {0: ONE, 2: ROWS, 3: ONE}),
        ("ppo.gae", [WIDE, WIDE, WIDE, 1.0, 1.0], {0: ONE, 1: ONE, 2: ROWS}),
        ("ppo.whiten", [WIDE, WIDE], {1: ONE}),
        ("ppo.masked_mean", [WIDE, WIDE], {1: ROWS}),
        ("ppo.policy_loss", [WIDE, WIDE, WIDE, WIDE, 0.2], {1: ONE, 2: ROWS, 3: ONE}),
        ("ppo.value_loss", [WIDE, WIDE, WIDE, WIDE, 0.2], {1: ONE, 2: ROWS, 3: ONE}),
        ("ppo.step_kl", [WIDE, WIDE, WIDE], {1: ROWS, 2: ONE}),
        ("ppo.sequence_kl", [WIDE, WIDE, WIDE], {1: ONE, 2: ROWS}),
        ("ppo.sequence_kl_k3", [WIDE, WIDE, WIDE], {1: ONE, 2: ROWS}),
        ("shaping.regret_bonus", [WIDE, WIDE, 1.0], {1: ROWS}),
        ("best_of_n.best_of_n", [POOL, POOL, np.array([2])], {1: POOL[:, :1]}),
        ("best_of_n.tilted", [POOL, POOL, 1.0], {1: POOL[:, :1]}),
    ],
)
def test_arrays_that_do_not_fit_are_not_broadcast(
    of: Any, name: str, arguments: list[Any], wrong: dict[int, Any]
) -> None:
    function = of(name)
    function(*arguments)
    for place, array in wrong.items():
        given = [*arguments[:place], array, *arguments[place + 1 :]]
        assert "must be of shape (" in refused(lambda given=given: function(*given))


def test_heads_and_baselines_that_do_not_fit_are_not_broadcast(of: Any) -> None:
    heads = of("head_rewards.HeadRewards")
    said = refused(lambda: of("objectives.nominal")(heads(WIDE, ONE)))
    assert said == "nominal: std must be of shape (3, 3), as mean, not (3, 1)"
    for shaping in ("contrastive", "preference_as_reward"):
        for baseline in (WIDE, torch.ones(3, 4, 1)):
            assert "are compared with baselines (…, baselines, 3)" in refused(
                lambda name=f"shaping.{shaping}", one=baseline: of(name)(heads(WIDE, WIDE), heads(one, one))
            )
    with_bonus = of("shaping.with_regret_bonus")
    assert "3 rewards of 2 prompts and 2 texts" in refused(lambda: with_bonus(ROWS, ["a", "b"], ["c", "d"], 1.0))


def test_masks_of_any_kind_are_masks(of: Any) -> None:
    values, mask = torch.randn(3, 3), torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 0]])
    for name, arguments in (("whiten", [values]), ("masked_mean", [values]), ("sequence_kl", [values, 2 * values])):
        found = [of(f"ppo.{name}")(*arguments, one) for one in (mask, mask.bool(), mask.long())]
        assert all(torch.equal(one, found[0]) for one in found)


def test_a_completion_of_no_token_is_paid_nothing(of: Any) -> None:
    mask = torch.tensor([[0.0, 0, 0], [1, 1, 0], [1, 1, 1]])
    found = of("ppo.token_rewards")(ROWS, WIDE, WIDE, mask, 0.0)
    assert found.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_whole_numbers_of_rewards_lose_nothing(of: Any) -> None:
    values = torch.full((3, 3), 0.5)
    advantages, _ = of("ppo.gae")(WIDE.long(), values, WIDE, 1.0, 1.0)
    assert torch.equal(advantages, of("ppo.gae")(WIDE, values, WIDE, 1.0, 1.0)[0])


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        *(("best_of_n.best_of_n", [POOL, POOL, np.array([n])], "whole numbers in 1..4") for n in (0, 5, -1)),
        ("best_of_n.best_of_n", [POOL, POOL, np.array([2.5])], "n must hold whole numbers, not float64"),
        ("best_of_n.best_of_n", [np.array([[0.0, np.nan]]), POOL[:, :2], np.array([2])], "a proxy score is NaN"),
        ("best_of_n.best_of_n_kl", [np.array([0])], "must be at least 1"),
        *(("best_of_n.tilted", [POOL, POOL, c], "kl_coef must be above 0") for c in (0.0, -1.0, math.nan)),
        ("best_of_n.tilted", [np.array([[0.0, np.inf]]), POOL[:, :2], 1.0], "proxy must be finite, got inf"),
        ("best_of_n.sizes", [0], "at least 1 completion"),
        *(("schedules.headroom", [1.0, ceiling], "ceiling must be above 0") for ceiling in (0.0, -1.0, math.nan)),
        ("schedules.adaptive_kl_coef", [0.1, 1.0, math.nan, 100.0, 10], "target must be above 0, got nan"),
        ("schedules.adaptive_kl_coef", [0.1, 1.0, 1.0, 0.0, 0], "horizon must be above 0, got 0"),
        ("objective_names.check_parameter", ["tradeoff", "0.4"], "must be a number, got '0.4'"),
        ("objective_names.check_parameter", ["tradeoff", None], "must be a number, got None"),
        ("objectives.parse_objective", [None], "unknown objective None; choose from"),
    ],
)  # fmt: skip
def test_what_no_formula_has_is_refused(of: Any, name: str, arguments: list[Any], said: str) -> None:
    """A NaN ranked above all others; an n beyond the pool gave 0."""
    assert said in refused(lambda: of(name)(*arguments))


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 2.0, math.nan])
def test_a_share_of_swapped_labels_is_below_one_half(of: Any, smoothing: float) -> None:
    said = refused(lambda: of("reward_losses.bradley_terry")(ROWS, ROWS, label_smoothing=smoothing))
    assert said.startswith("bradley_terry: label_smoothing must be in [0, 0.5)")


# ---- arguments of another kind ----

HEADS = ("objectives.mean", "objectives.nominal", "objectives.quantile", "objectives.total_std", "objectives.typical")


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        (torch.ones(4, 0), torch.ones(4, 0), "mean is empty, of shape (4, 0); give at least one of heads"),
        (torch.tensor(1.0), torch.tensor(1.0), "mean must be of shape (*batch, heads), not ()"),
        (np.ones((4, 3)), np.ones((4, 3)), "mean must be a torch tensor, not ndarray"),
        ([1.0, 2.0], [1.0, 1.0], "mean must be a torch tensor, not list"),
        (torch.ones(4, 3), None, "std must be a torch tensor, not NoneType"),
        (torch.ones(4, 3), torch.ones(4, 1), "std must be of shape (4, 3), as mean, not (4, 1)"),
        (torch.ones(4, 3, dtype=torch.complex64), torch.ones(4, 3), "mean must hold real numbers, not complex64"),
        (torch.ones(4, 3), torch.ones(4, 3, device="meta"), "std must be on cpu, as mean, not on meta"),
    ],
)
def test_heads_that_are_none_are_refused_by_every_objective(of: Any, name: str, mean: Any, std: Any, said: str) -> None:
    heads = of("head_rewards.HeadRewards")(mean, std, torch.ones(4, 1))
    assert refused(lambda: of(name)(heads)) == f"{name.split('.')[1]}: {said}"


@pytest.mark.parametrize("name", HEADS)
def test_an_objective_reads_heads_only(of: Any, name: str) -> None:
    for given in (torch.ones(4, 3), np.ones(3), None, (torch.ones(3), torch.ones(3))):
        assert "heads must be HeadRewards, not " in refused(lambda given=given: of(name)(given))


@pytest.mark.parametrize("name", [*HEADS, "objectives.expected_tradeoff", "objectives.random_head"])
@pytest.mark.parametrize("kind", [torch.long, torch.float16, torch.bfloat16, torch.float64])
def test_whole_numbers_and_halves_of_heads_are_numbers(of: Any, name: str, kind: torch.dtype) -> None:
    mean, std = torch.tensor([[1.0, 4.0, 2.0], [0.0, 3.0, 5.0]]), torch.tensor([[2.0, 1.0, 3.0], [1.0, 2.0, 3.0]])
    heads = of("head_rewards.HeadRewards")(mean, std, torch.ones(2, 1))
    found = of(name)(heads.each(lambda part: part.to(kind)))
    assert torch.allclose(found.double(), of(name)(heads).double(), rtol=0.01)


@pytest.mark.parametrize("name", ["nominal", "tradeoff", "random_head", "expected_tradeoff", "expected_worst_case"])
def test_a_head_that_is_no_number_does_not_win_a_comparison(of: Any, name: str) -> None:
    """The lowest std is none where one is NaN: argmin took the NaN itself."""
    mean, std = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2)
    mean[0, 1] = std[0, 1] = math.nan
    found = of(f"objectives.{name}")(of("head_rewards.HeadRewards")(mean, std))
    assert found.isnan().tolist()[0]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("statistics.t_interval", [POOL[0]]), ("statistics.bootstrap_interval", [POOL[0], 0.95, 9, 0]),
        ("statistics.movement", [POOL[0]]), ("statistics.smoothed", [POOL[0]]),
        ("statistics.auroc", [POOL[0], POOL[0]]),
        ("statistics.spearman", [POOL[0], POOL[0]]), ("statistics.mean_between", [POOL[0], POOL[0], 0.0, 1.0]),
        ("calibration.brier", [POOL[0] / 4]), ("calibration.log_loss", [POOL[0] / 4]),
        ("calibration.risk_coverage", [POOL[0] / 4, POOL[0]]), ("calibration.reliability", [POOL[0] / 4, POOL[0] / 4]),
        ("best_of_n.best_of_n", [POOL, POOL, np.array([2])]), ("best_of_n.tilted", [POOL, POOL, 1.0]),
        ("best_of_n.fit_rl", [POOL[0], POOL[0]]), ("trust.gains", [POOL, POOL, np.array([2])]),
        ("trust.doubling", [POOL[0]]), ("reward_benchmarks.picks_chosen", [POOL[0], POOL[0]]),
        ("overoptimization.pair_accuracy", [POOL[None], POOL]), ("typicality.fit_reference", [torch.randn(4, 3)]),
        ("reward_losses.bradley_terry", [ROWS, ROWS]), ("ppo.gae", [WIDE, WIDE, WIDE, 1.0, 1.0]),
        ("ppo.masked_mean", [WIDE, WIDE]), ("shaping.regret_bonus", [WIDE, WIDE, 1.0]),
    ],
)  # fmt: skip
def test_what_is_no_array_of_numbers_is_refused(of: Any, name: str, arguments: list[Any]) -> None:
    function, first = of(name), arguments[0]
    function(*arguments)
    other = first.numpy() if isinstance(first, torch.Tensor) else torch.from_numpy(first)
    text = np.full(first.shape, "1") if isinstance(first, np.ndarray) else "1"
    masked = np.ma.masked_less(np.asarray(first), 1)  # its values are no longer all that count
    for wrong in (first.tolist(), None, other, text, first[:0], first + 1j, masked):
        said = refused(lambda wrong=wrong: function(wrong, *arguments[1:]))
        assert said.startswith(f"{name.split('.')[1]}: ")


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("calibration.brier", [np.array([0.5, 1.5])], "probability must be in [0, 1], got 1.5"),
        ("calibration.log_loss", [np.array([-0.5])], "probability must be in [0, 1], got -0.5"),
        ("calibration.risk_coverage", [np.ones(2), np.array([0.0, np.nan])], "uncertainty must be finite, got nan"),
        ("calibration.constant_log_loss", [2.0], "accuracy must be in [0, 1], got 2"),
        ("calibration.reliability", [np.ones(2), np.ones(2), 0], "num_bins must be at least 1, got 0"),
        ("trust.gains", [POOL, POOL * np.nan, np.array([2])], "score_PN must be finite, got nan"),
        ("trust.doubling", [np.ones(1)], "at least two folds"),
        ("reward_benchmarks.picks_chosen", [np.ones(1), np.array([np.nan])], "rejected must be no NaN, got nan"),
        ("reward_benchmarks.reward_bench", [{"math-prm": 0.5}, {}], "no count of pairs for 'math-prm'"),
        ("best_of_n.fit_rl", [np.array([-1.0, 2.0]), np.ones(2)], "root_kl must be at least 0, got -1"),
        ("statistics.bootstrap_interval", [np.ones(2), 95.0], "level must be in (0, 1), got 95"),
        ("statistics.bootstrap_interval", [np.ones(2), 0.9, 0], "draws must be at least 1, got 0"),
        ("statistics.bootstrap_interval", [np.ones(2), 0.9, 9, -1], "seed must be at least 0, got -1"),
        ("statistics.holm", [[0.5, 1.5]], "p_values[1] must be in [0, 1], got 1.5"),
        ("statistics.holm", ["0.5"], "p_values must be a list, not str"),
        ("ppo.policy_loss", [WIDE, WIDE, WIDE, WIDE, -0.2], "clip must be at least 0, got -0.2"),
        ("ppo.gae", [WIDE, WIDE, WIDE, "1", 1.0], "discount must be a number, got '1'"),
        ("shaping.worst_case_regret", [ROWS, ROWS, None], "radius must be a number, got None"),
        ("monitor.transfer_ratio", [2.0, 1.0, 0], "count must be at least 1, got 0"),
        ("monitor.text_signs", ["a film"], "completions must be a list, not str"),
        ("monitor.text_signs", [["a", None]], "completions[1] must be text, got None"),
        ("monitor.scale", [[1.0], 0.0], "of at least two steps"),
        ("memory.sampled_at_once", [8, 4, 0], "row must be at least 1, got 0"),
        ("head_rewards.joined", [[]], "parts must be at least one"),
        ("objectives.with_parameter", ["tradeoff", 0.4], "objective must be a function, not str"),
    ],
)  # fmt: skip
def test_what_stands_beside_an_argument_is_its_range(of: Any, name: str, arguments: list[Any], said: str) -> None:
    assert said in refused(lambda: of(name)(*arguments))


def test_a_matrix_is_read_as_an_array(of: Any) -> None:
    """Its `*` is the product of matrices."""
    found = of("best_of_n.tilted")(POOL.view(np.matrix), POOL, 1.0)
    assert np.allclose(found[0], of("best_of_n.tilted")(POOL, POOL, 1.0)[0])


def test_a_mask_of_what_is_no_number_pays_at_no_place_beyond_the_row(of: Any) -> None:
    mask = torch.tensor([[1.0, math.nan, 0.0]])
    one = torch.ones(1, 3)
    assert of("ppo.token_rewards")(torch.ones(1).double(), one, one, mask, 0.0).shape == (1, 3)


@pytest.mark.parametrize("stats", [{"kl": "high"}, {"kl": [1.0]}])
def test_the_monitor_reads_numbers(of: Any, stats: dict[str, Any]) -> None:
    assert refused(lambda: of("monitor.Monitor")().update(stats)).startswith("the monitor's kl must be a number, got")
