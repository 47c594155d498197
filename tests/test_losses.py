"""Losses against hand values, finite samples and what theory says of their minima."""

import numpy as np
import pytest
import torch

from poise.losses import bradley_terry, sampled_mse


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    expected = (np.log1p(np.exp(-1)) + 0.01 * 1 + np.log1p(np.exp(2)) + 0.01 * 4) / 2
    assert bradley_terry(chosen, rejected).item() == pytest.approx(expected, rel=1e-6)


def test_bradley_terry_sees_differences_only_but_for_centring() -> None:
    chosen, rejected = torch.tensor([1.0, 0.3]), torch.tensor([0.0, 2.0])
    assert bradley_terry(chosen + 5, rejected + 5, 0.0) == pytest.approx(bradley_terry(chosen, rejected, 0.0).item())
    assert bradley_terry(chosen + 5, rejected + 5) > bradley_terry(chosen, rejected)


def test_sampled_mse_by_hand() -> None:
    mean, std = torch.tensor([[1.0, 0.0], [2.0, 1.0]]), torch.tensor([[0.5, 1.0], [0.1, 2.0]])
    noise, target = torch.tensor([[1.0, -1.0], [0.0, 0.5]]), torch.tensor([1.0, 0.0])
    mask = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    # head 0 sees sample 0: (1.5 - 1)^2; head 1 sees both: (-1 - 1)^2 and (2 - 0)^2
    assert sampled_mse(mean, std, noise, target, mask).item() == pytest.approx(0.25 + (4 + 4) / 2)


def test_sampled_mse_expectation_is_squared_error_plus_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    size = 400_000
    mean, std = torch.full((size, 1), 0.7), torch.full((size, 1), 1.3)
    noise = torch.randn(size, 1, generator=generator)
    value = sampled_mse(mean, std, noise, torch.full((size,), 0.2), torch.ones(size, 1)).item()
    assert value == pytest.approx(0.5**2 + 1.3**2, rel=5e-3)


def test_std_gradient_does_not_see_the_residual() -> None:
    """Why the std is a coverage counter: in expectation its gradient is 2 std, however wrong the mean is."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400_000, 1, generator=generator)
    gradients = []
    for residual in (0.0, 5.0):
        std = torch.tensor([[0.8]], requires_grad=True)
        mean = torch.full_like(noise, residual)
        loss = sampled_mse(mean, std.expand_as(noise), noise, torch.zeros(len(noise)), torch.ones_like(noise))
        gradients.append(torch.autograd.grad(loss, std)[0].item())
    assert gradients == pytest.approx([1.6, 1.6], rel=3e-2)


def test_heads_see_only_their_shard() -> None:
    mean = torch.zeros(4, 2, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    sampled_mse(mean, torch.ones(4, 2), torch.zeros(4, 2), torch.ones(4), mask).backward()
    assert mean.grad is not None
    assert ((mean.grad != 0) == mask.bool()).all()
