"""How well the unit of a reward is known: hand values, coverage, and what is said of it."""

import math

import numpy as np
import pytest
import torch

from poise.errors import PoiseError
from poise.functional.reward_scale import said_of_unit, std_interval


def test_the_interval_of_a_std_is_the_jackknife_over_prompts() -> None:
    values = np.array([[0.0, 1.0], [2.0, 5.0], [1.0, 1.5], [4.0, 0.0]])
    logs = [math.log(np.std(np.delete(values, i, 0), ddof=1)) for i in range(4)]
    pseudo = [4 * math.log(np.std(values, ddof=1)) - 3 * log for log in logs]
    center, half = np.mean(pseudo), 3.182446 * np.std(pseudo, ddof=1) / 2  # Student's, 3 degrees of freedom
    expected = pytest.approx((math.exp(center - half), math.exp(center + half)), rel=1e-5)
    assert std_interval(torch.tensor(values).flatten(), list("aabbccdd")) == expected
    turns = [{"role": "user", "content": "d"}]  # completions of a prompt need not stand together
    assert std_interval(torch.tensor(values).T.flatten(), ["a", "b", "c", turns] * 2) == expected


def test_too_few_prompts_have_no_interval() -> None:
    rewards = torch.arange(6.0)
    assert all(math.isfinite(end) for end in std_interval(rewards, list("aabbcc")))
    for values, prompts in ((rewards, list("aaabbb")), (torch.ones(6), list("aabbcc"))):
        assert all(math.isnan(end) for end in std_interval(values, prompts))
    with pytest.raises(PoiseError, match="6 rewards of 2 prompts"):
        std_interval(rewards, ["a", "b"])


def test_the_interval_of_the_unit_covers_the_truth() -> None:
    """Rewards with a part that a prompt's completions share: the jackknife over 8 prompts covers the std at 95 %."""
    generator, covered = torch.Generator().manual_seed(0), 0
    prompts = [number // 8 for number in range(64)]
    for _ in range(300):
        shared, own = torch.randn(8, 1, generator=generator), torch.randn(8, 8, generator=generator)
        low, high = std_interval((0.6 * shared + 0.8 * own).flatten(), prompts)
        covered += low <= 1.0 <= high
    assert covered / 300 >= 0.88


def test_a_unit_that_is_hardly_known_is_said_to_be() -> None:
    assert "as little" not in said_of_unit(1.0, (0.7, 1.5))
    assert "as little" in said_of_unit(1.0, (0.5, 2.0))
    assert "too few prompts for an interval; the KL coefficient means as" in said_of_unit(1.0, (math.nan, math.nan))
