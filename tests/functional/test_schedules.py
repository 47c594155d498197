"""Controllers against hand values, the laws they obey, and a plant they must hold."""

import pytest

from poise.errors import PoiseError
from poise.functional.schedules import adaptive_kl_coef, headroom, linear


def test_linear_moves_from_start_to_end_and_is_held_there() -> None:
    assert [linear(1.0, 0.2, p) for p in (0.0, 0.25, 1.0)] == pytest.approx([1.0, 0.8, 0.2])
    assert linear(1.0, 0.2, -0.5) == 1.0  # held at both ends
    assert linear(1.0, 0.2, 1.5) == pytest.approx(0.2)


def test_headroom_equals_values_worked_out_by_hand() -> None:
    assert [headroom(r, ceiling=2.0) for r in (0.0, 0.5, 1.9, 2.0)] == pytest.approx([1.0, 0.75, 0.05, 0.0])
    assert headroom(-0.4, ceiling=2.0) == 1.0  # below the initial policy: at most the full rate
    assert headroom(2.1, ceiling=2.0) == 0.0


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * (1 + 0.1 * 64 / 640)),  # 10 % above it
        (60.0, 0.1 * (1 + 0.2 * 64 / 640)),  # far above: clipped at .2
        (0.0, 0.1 * (1 - 0.2 * 64 / 640)),  # far below
    ],
)
def test_the_kl_coefficient_moves_toward_its_target(kl: float, expected: float) -> None:
    assert adaptive_kl_coef(0.1, kl, target=6.0, horizon=640.0, num_samples=64) == pytest.approx(expected)


def test_a_target_may_be_less_than_one_nat_and_the_horizon_one_step() -> None:
    assert adaptive_kl_coef(0.1, 0.55, target=0.5, horizon=64.0, num_samples=64) == pytest.approx(0.1 * 1.1)


def test_adaptive_kl_coef_brings_the_kl_to_its_target() -> None:
    kl_coef = 1.0
    for _ in range(400):  # a policy whose KL is .3 / beta
        kl_coef = adaptive_kl_coef(kl_coef, 0.3 / kl_coef, target=6.0, horizon=640.0, num_samples=64)
    assert kl_coef == pytest.approx(0.05, rel=1e-3)


def test_adaptive_kl_coef_refuses_what_it_cannot_do() -> None:
    with pytest.raises(PoiseError, match="target must be above 0, got 0"):
        adaptive_kl_coef(0.1, 1.0, target=0.0, horizon=100.0, num_samples=10)
    with pytest.raises(PoiseError, match="must hold a step's 64"):
        adaptive_kl_coef(0.1, 1.0, target=6.0, horizon=10.0, num_samples=64)
