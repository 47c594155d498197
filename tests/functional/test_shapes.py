"""Functions of arrays as users call them: what does not fit, or cannot be, is refused and not made into a number."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import pytest
import torch
from jaxtyping import Bool, Float, Int

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


# ---- the check itself ----


@pytest.fixture(scope="module")
def taken(of: Any) -> Callable[[Any, Any], Any]:
    """What a checked function of one argument, `it`, gets; the annotation comes first."""

    def give(kind: Any, value: Any) -> Any:
        def got(it: Any) -> Any:
            return it

        got.__annotations__ = {"it": kind}
        return of("shapes.checked")(got)(value)

    return give


def test_numbers_are_numbers_and_whole_ones_whole(taken: Any) -> None:
    assert taken(int, 3) == 3
    assert taken(int, np.int64(3)) == 3
    assert taken(float, 2) == 2
    assert taken(float | None, None) is None
    for kind, words in ((int, "a whole number"), (float, "a number")):
        for wrong in (True, "1", [1]):
            assert refused(lambda kind=kind, wrong=wrong: taken(kind, wrong)).startswith(
                f"got: it must be {words}, got"
            )
    assert refused(lambda: taken(int, 1.5)) == "got: it must be a whole number, got 1.5"
    assert refused(lambda: taken(float | None, "1")).startswith("got: it must be a number")
    assert refused(lambda: taken(float, None)).startswith("got: it must be a number")


def test_the_ends_of_arrays_are_in_the_range(of: Any, taken: Any) -> None:
    finite = Annotated[Float[np.ndarray, " n"], of("shapes.FINITE")]
    known = Annotated[Float[np.ndarray, " n"], of("shapes.KNOWN")]
    large = np.array([-1e308, 0.0, 1e308])
    assert taken(finite, large).tolist() == large.tolist()
    assert taken(known, np.array([-np.inf, np.inf])).tolist() == [-np.inf, np.inf]
    for end in (-np.inf, np.inf, np.nan):
        said = refused(lambda end=end: taken(finite, np.array([0.0, end, 0.0])))
        assert said == f"got: it must be finite, got {end}"
    assert refused(lambda: taken(known, np.array([0.0, np.nan]))) == "got: it must be no NaN, got nan"
    share = Annotated[Float[np.ndarray, " n"], of("shapes.Range")(0, 1)]
    assert refused(lambda: taken(share, np.array([0.5, 1.5]))) == "got: it must be in [0, 1], got 1.5"
    assert refused(lambda: taken(share, np.array([-0.5, 0.5]))) == "got: it must be in [0, 1], got -0.5"


def test_lists_are_read_item_by_item(taken: Any) -> None:
    numbers = Sequence[float]
    for right in ([1.0], (1, 2), np.ones(2), np.ones((1, 2))[0]):
        assert taken(numbers, right) is right
    for wrong in (1.0, "ab", b"ab", iter([1.0]), np.array(1.0), {"a": 1.0}, {1.0}.__iter__()):
        assert refused(lambda wrong=wrong: taken(numbers, wrong)).startswith("got: it must be a list, not ")
    assert refused(lambda: taken(numbers, [1.0, "b"])) == "got: it[1] must be a number, got 'b'"
    assert taken(Mapping[str, float], {"a": 1}) == {"a": 1}
    assert refused(lambda: taken(Mapping[str, float], [1.0])) == "got: it must be a mapping, not list"
    assert refused(lambda: taken(Mapping[str, float], {"a": "b"})) == "got: it['a'] must be a number, got 'b'"
    assert refused(lambda: taken(Callable[[], int], 3)) == "got: it must be a function, not int"


def test_arrays_are_of_the_library_and_hold_the_numbers_that_are_meant(taken: Any) -> None:
    array, tensor = Float[np.ndarray, " n"], Float[torch.Tensor, " n"]
    assert refused(lambda: taken(array, ROWS)) == "got: it must be a NumPy array, not Tensor"
    assert refused(lambda: taken(tensor, np.ones(3))) == "got: it must be a torch tensor, not ndarray"
    assert refused(lambda: taken(tensor | None, [1.0])) == "got: it must be a torch tensor, not list"
    assert taken(tensor | None, None) is None
    assert taken(tensor | float, 2.0) == 2.0
    assert taken(tensor, ROWS) is ROWS
    assert taken(tensor, torch.tensor([1, 0])).dtype == torch.float32
    assert taken(tensor, torch.tensor([True, False])).tolist() == [1.0, 0.0]
    assert taken(array, np.array([1, 0])).dtype == float
    assert taken(array, np.ones(2, np.float16)).dtype == float  # NumPy solves nothing in halves
    half = torch.ones(2, dtype=torch.float16)
    assert taken(tensor, half) is half
    assert refused(lambda: taken(array, np.ones(2, complex))) == "got: it must hold real numbers, not complex128"
    flags, whole = Bool[np.ndarray, " n"], Int[torch.Tensor, " n"]
    assert taken(flags, np.array([True])).tolist() == [True]
    assert refused(lambda: taken(flags, np.array([1]))) == "got: it must hold booleans, not int64"
    assert taken(whole, torch.tensor([1])).tolist() == [1]
    assert taken(whole, torch.tensor([1], dtype=torch.uint8)).dtype == torch.uint8
    assert taken(tensor, torch.tensor([1], dtype=torch.uint8)).dtype == torch.float32
    assert refused(lambda: taken(whole, torch.tensor([1.0]))) == "got: it must hold whole numbers, not float32"
    assert refused(lambda: taken(whole, torch.tensor([True]))) == "got: it must hold whole numbers, not bool"


def test_a_named_tuple_is_replaced_only_where_a_part_was(of: Any, taken: Any) -> None:
    heads = of("head_rewards.HeadRewards")
    given = heads(torch.ones(2, 3), torch.ones(2, 3))
    assert taken(heads, given) is given
    for mean, std in ((torch.ones(2, 3).int(), WIDE[:2]), (WIDE[:2], torch.ones(2, 3).int())):
        found = taken(heads, heads(mean, std))
        assert (found.mean.dtype, found.std.dtype) == (torch.float32, torch.float32)
    assert refused(lambda: taken(heads, (WIDE, WIDE))) == "got: it must be HeadRewards, not tuple"
    assert refused(lambda: taken(heads, heads(WIDE, ONE))).startswith("got: std must be of shape (3, 3), as mean")


def test_axes_of_one_name_are_of_one_length(of: Any) -> None:
    def two(a: Float[np.ndarray, "*batch n"], b: Float[np.ndarray, "*batch n"], c: Float[np.ndarray, "n 2"]) -> None:
        pass

    check = of("shapes.checked")(two)
    check(np.ones((4, 5, 3)), np.ones((4, 5, 3)), np.ones((3, 2)))
    check(np.ones(3), np.ones(3), np.ones((3, 2)))
    check(np.ones((0, 3)), np.ones((0, 3)), np.ones((3, 2)))
    said = refused(lambda: check(np.ones((4, 5, 3)), np.ones((4, 6, 3)), np.ones((3, 2))))
    assert said == "two: b must be of shape (4, 5, 3), as a, not (4, 6, 3)"
    said = refused(lambda: check(np.ones((4, 3)), np.ones((4, 3)), np.ones((2, 2))))
    assert said == "two: c must be of shape (3, 2), as a, not (2, 2)"
    said = refused(lambda: check(np.ones(3), np.ones(3), np.ones((3, 4))))
    assert said == "two: c must be of shape (3, 2), not (3, 4)"
    said = refused(lambda: check(np.ones(3), np.ones(3), np.ones(3)))
    assert said == "two: c must be of shape (n, 2), not (3,)"
    said = refused(lambda: check(np.array(1.0), np.ones(3), np.ones((3, 2))))
    assert said == "two: a must be of shape (*batch, n), not ()"
    said = refused(lambda: check(np.ones((2, 0)), np.ones((2, 0)), np.ones((0, 2))))
    assert said == "two: a is empty, of shape (2, 0); give at least one of n"
    check(a=np.ones(3), b=np.ones(3), c=np.ones((3, 2)))
    assert "as a" in refused(lambda: check(np.ones(3), b=np.ones(4), c=np.ones((3, 2))))
    with pytest.raises(TypeError, match="4 were given"):
        check(np.ones(3), np.ones(3), np.ones((3, 2)), 1)


def test_the_argument_that_said_so_first_is_named(of: Any) -> None:
    def three(a: Float[np.ndarray, " n"], b: Float[np.ndarray, "n m"], c: Float[np.ndarray, "n m"]) -> None:
        pass

    check = of("shapes.checked")(three)
    for shape, first in (((3, 5), "b"), ((2, 4), "a"), ((2, 5), "a")):
        said = refused(lambda shape=shape: check(np.ones(3), np.ones((3, 4)), np.ones(shape)))
        assert said == f"three: c must be of shape (3, 4), as {first}, not {shape}"


def test_axes_without_a_name_are_any(of: Any) -> None:
    """Those of two arguments need not be the same."""

    def two(a: Float[np.ndarray, "n ..."], b: Float[np.ndarray, "n ..."]) -> None:
        pass

    check = of("shapes.checked")(two)
    check(np.ones(3), np.ones((3, 4, 5)))
    check(np.ones((3, 4)), np.ones((3, 5)))
    assert (
        refused(lambda: check(np.ones((3, 4)), np.ones((2, 4)))) == "two: b must be of shape (3, 4), as a, not (2, 4)"
    )


def test_tensors_of_one_call_are_on_one_device(of: Any) -> None:
    far = torch.ones(3, device="meta")
    said = refused(lambda: of("reward_losses.bradley_terry")(ROWS, far))
    assert said.endswith("must be on cpu, as chosen, not on meta")
