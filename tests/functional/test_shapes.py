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
        *(("best_of_n.best_of_n", [POOL, POOL, np.array([n])], "whole numbers in 1..4") for n in (0, 5, -1, 2.5)),
        ("best_of_n.best_of_n", [np.array([[0.0, np.nan]]), POOL[:, :2], np.array([2])], "a proxy score is NaN"),
        ("best_of_n.best_of_n_kl", [np.array([0])], "must be at least 1"),
        *(("best_of_n.tilted", [POOL, POOL, c], "kl_coef must be above 0") for c in (0.0, -1.0, math.nan)),
        ("best_of_n.tilted", [np.array([[0.0, np.inf]]), POOL[:, :2], 1.0], "every proxy score finite"),
        ("best_of_n.sizes", [0], "at least 1 completion"),
        *(("schedules.headroom", [1.0, ceiling], "a ceiling > 0 only") for ceiling in (0.0, -1.0, math.nan)),
        ("schedules.adaptive_kl_coef", [0.1, 1.0, math.nan, 100.0, 10], "needs a target KL > 0, got nan"),
        ("schedules.adaptive_kl_coef", [0.1, 1.0, 1.0, 0.0, 0], "the horizon of the KL coefficient, 0.0, must hold"),
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
