"""Losses against hand values, finite samples and what theory says of their minima."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poise.functional.reward_losses import (
    HEAD_LOSSES,
    adapter_diversity,
    beta_nll,
    bradley_terry,
    bradley_terry_heads,
    crps,
    gaussian_nll,
    probit_pairs,
    sampled_mse,
)


def test_bradley_terry_equals_values_worked_out_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    expected = (np.log1p(np.exp(-1)) + 0.01 * 1 + np.log1p(np.exp(2)) + 0.01 * 4) / 2
    assert bradley_terry(chosen, rejected).item() == pytest.approx(expected, rel=1e-6)


def test_bradley_terry_sees_differences_only_but_for_centering() -> None:
    chosen, rejected = torch.tensor([1.0, 0.3]), torch.tensor([0.0, 2.0])
    assert bradley_terry(chosen + 5, rejected + 5, centering=0.0) == pytest.approx(
        bradley_terry(chosen, rejected, centering=0.0).item()
    )
    assert bradley_terry(chosen + 5, rejected + 5) > bradley_terry(chosen, rejected)


def test_bradley_terry_heads_by_hand_and_as_numpy_has_it() -> None:
    mask = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    chosen, rejected = torch.tensor([[1.0, 0.0], [9.0, 2.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    # head 0 sees pair 0, a lead of 1 and a sum of 1; head 1 sees leads 0 and 1 less a margin of .5, sums 0 and 3
    by_hand = np.log1p(np.exp(-1)) + 0.01 + (np.log(2) + np.log1p(np.exp(-0.5)) + 0.01 * 9) / 2
    found = bradley_terry_heads(chosen, rejected, torch.tensor([0.0, 0.5]), mask)
    assert found.item() == pytest.approx(by_hand, rel=1e-6)

    random = np.random.default_rng(0)
    plus, minus, margin = random.normal(size=(7, 3)), random.normal(size=(7, 3)), random.uniform(size=7)
    seen = random.uniform(size=(7, 3)) < 0.6
    probability = 1 / (1 + np.exp(-(plus - minus - margin[:, None])))
    loss = -0.8 * np.log(probability) - 0.2 * np.log1p(-probability) + 0.3 * (plus + minus) ** 2
    expected = sum(loss[seen[:, head], head].mean() for head in range(3))
    tensors = [torch.from_numpy(one) for one in (plus, minus, margin, seen.astype(float))]
    found = bradley_terry_heads(*tensors, centering=0.3, label_smoothing=0.2)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_sampled_mse_equals_values_worked_out_by_hand() -> None:
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


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


def test_gaussian_nll_is_that_of_scipy() -> None:
    from scipy.stats import norm

    mean, std, target = column(0.3, -1.0), column(0.5, 2.0), torch.tensor([1.0, 0.2], dtype=torch.float64)
    expected = -norm.logpdf(target.numpy(), mean[:, 0].numpy(), std[:, 0].numpy()).mean()
    value = gaussian_nll(mean, std, torch.zeros_like(mean), target, torch.ones_like(mean))
    assert value.item() == pytest.approx(expected)


def test_crps_equals_its_definition() -> None:
    """CRPS = E|X - y| - E|X - X'| / 2, by Monte Carlo."""
    generator = np.random.default_rng(0)
    for mu, sigma, y in ((0.0, 1.0, 0.5), (-1.0, 0.3, 1.0), (2.0, 3.0, 2.0)):
        x, other = mu + sigma * generator.standard_normal((2, 400_000))
        expected = np.abs(x - y).mean() - np.abs(x - other).mean() / 2
        target = torch.tensor([y], dtype=torch.float64)
        value = crps(column(mu), column(sigma), column(0.0), target, column(1.0))
        assert value.item() == pytest.approx(expected, abs=8e-3)


def test_probit_pairs_agree_with_monte_carlo() -> None:
    """Phi(...) is the probability that noisy judgments of two Gaussian rewards come out in this order."""
    generator = np.random.default_rng(0)
    better = 0.8 + 0.5 * generator.standard_normal(400_000)
    worse = 0.1 + 1.2 * generator.standard_normal(400_000)
    share = (better - worse + generator.standard_normal(400_000) > 0).mean()
    value = probit_pairs(column(0.8), column(0.5), column(0.1), column(1.2), column(1.0))
    assert value.item() == pytest.approx(-np.log(share), abs=5e-3)


@pytest.mark.parametrize("name", HEAD_LOSSES)
def test_known_noise_is_recovered(name: str) -> None:
    """Regions of noise .3 and 2: proper scores recover both stds to 5 %; the sampled MSE's collapses in both."""
    generator = torch.Generator().manual_seed(0)
    size = 20_000
    region = torch.arange(size) % 2
    spread = torch.tensor([0.3, 2.0])[region]
    target = torch.tensor([1.0, -1.0])[region] + spread * torch.randn(size, generator=generator)
    mean, log_std = (torch.zeros(2, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([mean, log_std], lr=0.05)
    for _ in range(400):
        noise = torch.randn(size, 1, generator=generator)
        std = log_std.exp()[region].unsqueeze(-1)
        loss = HEAD_LOSSES[name](mean[region].unsqueeze(-1), std, noise, target, torch.ones(size, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    std = log_std.exp().detach()
    torch.testing.assert_close(mean.detach(), torch.tensor([1.0, -1.0]), rtol=0, atol=0.06)
    if name == "sampled_mse":
        assert (std < torch.tensor([0.1, 0.1])).all()
    else:
        torch.testing.assert_close(std, torch.tensor([0.3, 2.0]), rtol=0.05, atol=0)


# ---- every option at once, against NumPy ----


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.log1p(np.exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("centering", [0.0, 0.01, 0.3])
def test_bradley_terry_with_every_option_is_its_equation(smoothing: float, centering: float) -> None:
    chosen, rejected, margin = np.random.default_rng(0).normal(size=(3, 7))
    margin = np.abs(margin)
    lead = chosen - rejected - margin
    expected = -(1 - smoothing) * log_sigmoid(lead) - smoothing * log_sigmoid(-lead)
    expected = (expected + centering * (chosen + rejected) ** 2).mean()
    found = bradley_terry(
        *(torch.from_numpy(part) for part in (chosen, rejected, margin)), centering=centering, label_smoothing=smoothing
    )
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_a_margin_makes_the_loss_larger_and_smoothing_keeps_the_best_lead_finite() -> None:
    chosen, rejected = torch.tensor([1.0]), torch.tensor([0.0])
    losses = [bradley_terry(chosen, rejected, margin, centering=0.0).item() for margin in (0.0, 0.5, 1.0)]
    assert losses == sorted(losses)
    assert losses[2] == pytest.approx(np.log(2))  # the lead is the margin
    leads = torch.linspace(0.5, 4, 351)
    smoothed = torch.stack([bradley_terry(x, 0 * x, centering=0.0, label_smoothing=0.2) for x in leads.split(1)])
    assert leads[smoothed.argmin()].item() == pytest.approx(np.log(0.8 / 0.2), abs=0.02)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_beta_nll_is_its_equation_and_holds_the_weight_constant(beta: float) -> None:
    generator = np.random.default_rng(1)
    mean, std, target = generator.normal(size=(5, 2)), generator.uniform(0.3, 2, size=(5, 2)), generator.normal(size=5)
    mask = np.array([[1, 1], [1, 0], [0, 1], [1, 1], [1, 0]], dtype=float)
    z = (target[:, None] - mean) / std
    nll = 0.5 * z**2 + np.log(std) + 0.5 * np.log(2 * np.pi)
    expected = ((std ** (2 * beta) * nll * mask).sum(0) / mask.sum(0)).sum()
    tensors = [torch.from_numpy(part) for part in (mean, std)]
    tensors[1].requires_grad_()
    given = (*tensors, torch.zeros(5, 2, dtype=torch.float64), torch.from_numpy(target), torch.from_numpy(mask))
    loss = beta_nll(*given, beta=beta)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    gradient = torch.autograd.grad(loss, tensors[1])[0].numpy()
    np.testing.assert_allclose(gradient, std ** (2 * beta) * (1 - z**2) / std * mask / mask.sum(0), rtol=1e-9)
    if beta == 0.5:
        assert beta_nll(*given).item() == loss.item()  # the default
    if beta == 0.0:
        assert gaussian_nll(*given).item() == pytest.approx(loss.item())


def test_crps_and_probit_pairs_are_their_equations() -> None:
    from scipy.stats import norm

    generator = np.random.default_rng(2)
    mean, std, target = generator.normal(size=(4, 2)), generator.uniform(0.3, 2, size=(4, 2)), generator.normal(size=4)
    z, ones = (target[:, None] - mean) / std, torch.ones(4, 2, dtype=torch.float64)
    expected = (std * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))).mean(0).sum()
    tensors = [torch.from_numpy(part) for part in (mean, std)]
    assert crps(*tensors, ones, torch.from_numpy(target), ones).item() == pytest.approx(expected, rel=1e-12)
    other, wide = generator.normal(size=(4, 2)), generator.uniform(0.3, 2, size=(4, 2))
    expected = -norm.logcdf((mean - other) / np.sqrt(1 + std**2 + wide**2)).mean(0).sum()
    found = probit_pairs(*tensors, torch.from_numpy(other), torch.from_numpy(wide), ones)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_a_head_without_samples_costs_nothing() -> None:
    mask = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    value = sampled_mse(torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2), mask)
    assert value.item() == 1.0


def test_the_diversity_of_adapters_by_hand() -> None:
    """Singular values 3 and 4 of orthogonal rows: (3 + 4) / 5."""
    apart = torch.tensor([[[3.0, 0.0, 0.0]], [[0.0, 4.0, 0.0]]])
    assert adapter_diversity(apart).item() == pytest.approx(7 / 5)
    alike = apart[:1].repeat(2, 1, 1)
    assert adapter_diversity(alike).item() == pytest.approx(1.0)


@given(st.integers(0, 10_000), st.floats(0.01, 100))
def test_laws_of_the_diversity_of_adapters(seed: int, scale: float) -> None:
    """As NumPy has it; between one and the root of the rank; scale-free; heads alike count as one; it can be raised."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    value = adapter_diversity(down)
    flat = down.detach().numpy().reshape(6, 5)
    assert value.item() == pytest.approx(np.linalg.norm(flat, "nuc") / np.linalg.norm(flat))
    assert 1 <= value.item() <= 5**0.5 + 1e-12
    assert adapter_diversity(down * scale).item() == pytest.approx(value.item())
    alone = adapter_diversity(down[:1]).item()
    assert adapter_diversity(down[:1].repeat(3, 1, 1)).item() == pytest.approx(alone)
    value.backward()
    assert down.grad is not None
    assert adapter_diversity(down + 1e-3 * down.grad / down.grad.norm()).item() > value.item() - 1e-12
