"""The listed optimum: closed forms against NumPy, and PPO that must reach it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poise.toy import bandit


def example(seed: int, prompts: int = 3, responses: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """(log pi, reward), (P, A) each, float64."""
    generator = torch.Generator().manual_seed(seed)
    logits, reward = torch.randn(2, prompts, responses, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1), reward


def test_log_probabilities_of_a_table_and_a_network_equal_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = bandit.new_policy((3, 4, 4, 5), generator)
    first, second, third = (layer[0].numpy() for layer in policy)
    for prompt in range(3):
        logits = np.tanh(np.tanh(first[prompt]) @ second) @ third
        expected = logits - np.log(np.exp(logits).sum())
        np.testing.assert_allclose(bandit.log_probabilities(policy)[0, prompt].numpy(), expected, rtol=1e-4, atol=1e-5)
    (table,) = bandit.new_policy((3, 5), generator)
    assert torch.equal(bandit.log_probabilities((table,)), table.log_softmax(-1))


@given(st.integers(0, 10_000), st.floats(0.2, 5.0))
def test_tilted_is_the_maximum(seed: int, kl_coef: float) -> None:
    reference, reward = example(seed)
    optimum = bandit.exact_optimum(reference, reward, kl_coef)

    def objective(policy: torch.Tensor) -> torch.Tensor:
        return bandit.expected(policy, reward) - kl_coef * bandit.exact_kl(policy, reference)

    best = kl_coef * torch.logsumexp(reference + reward / kl_coef, -1)  # beta log sum pi_ref e^{r / beta}
    torch.testing.assert_close(objective(optimum), best)
    other, _ = example(seed + 1)
    # what another policy lacks is beta KL to the optimum
    torch.testing.assert_close(best - objective(other), kl_coef * bandit.exact_kl(other, optimum))


def test_distances_equal_values_worked_out_by_hand() -> None:
    one, other = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert bandit.total_variation(one, other).item() == pytest.approx(0.25)
    assert bandit.exact_kl(one, other).item() == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert bandit.expected(other, torch.tensor([[4.0, 8.0]])).item() == pytest.approx(7.0)


@given(st.integers(0, 10_000), st.floats(-3.0, 3.0), st.floats(0.2, 5.0))
def test_misscoring_loss_is_the_gold_that_the_tilted_policy_loses(seed: int, error: float, kl_coef: float) -> None:
    reference, gold = (table.numpy()[0] for table in example(seed))

    def policy(reward: np.ndarray) -> np.ndarray:
        weight = np.exp(reference + reward / kl_coef)
        return weight / weight.sum()

    right, wrong = policy(gold), policy(gold + error * np.eye(5)[2])
    others = np.delete(right, 2) @ np.delete(gold, 2) / (1 - right[2])
    loss = bandit.misscoring_loss(float(right[2]), float(others - gold[2]), error, kl_coef)
    assert loss == pytest.approx((right - wrong) @ gold, abs=1e-9)


def test_misscoring_costs_at_most() -> None:
    assert bandit.misscoring_loss(0.2, gap=2.0, error=30.0, kl_coef=1.0) == pytest.approx(0.8 * 2.0)  # (1 - p) gap
    assert bandit.misscoring_loss(0.2, gap=-2.0, error=-30.0, kl_coef=1.0) == pytest.approx(0.2 * 2.0)  # p |gap|


def test_policy_gradients_are_those_of_the_definition() -> None:
    logprob, reward = (table.float() for table in example(1))
    generator = torch.Generator().manual_seed(2)
    drawn = bandit.draw(logprob.expand(4, -1, -1), 6, generator)
    score = reward.expand(4, -1, -1).gather(-1, drawn)
    got = bandit.policy_gradients(logprob, drawn, score).numpy()
    pi = logprob.exp().numpy()
    for batch in range(4):
        for prompt in range(3):
            terms = [reward[prompt, a].item() * (np.eye(5)[a] - pi[prompt]) for a in drawn[batch, prompt].tolist()]
            np.testing.assert_allclose(got[batch, prompt], -np.mean(terms, 0) / 3, atol=1e-6)


@given(st.integers(0, 10_000), st.floats(0.0, 2.0))
def test_gradient_moments_equal_those_of_listing_every_draw(seed: int, noise_std: float) -> None:
    logprob, reward = example(seed, prompts=2, responses=3)
    mean, trace = bandit.policy_gradient_moments(logprob, reward, 4, noise_std)
    total = 0.0
    for prompt in range(2):
        pi, table = logprob[prompt].exp().numpy(), reward[prompt].numpy()
        # noise of +-s with equal chances has std s
        draws = [
            (pi[a] / 2, -(table[a] + sign * noise_std) * (np.eye(3)[a] - pi) / 2) for a in range(3) for sign in (-1, 1)
        ]
        first = sum(weight * gradient for weight, gradient in draws)
        np.testing.assert_allclose(mean[prompt].numpy(), first, atol=1e-12)
        total += sum(weight * gradient @ gradient for weight, gradient in draws) - first @ first
    assert trace.item() == pytest.approx(total / 4)


def run(reward: torch.Tensor, sizes: tuple[int, ...], seeds: int, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(policy, reference) after PPO at beta = 0.5."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    start = bandit.stack([bandit.new_policy(sizes, generator) for generator in generators])
    reference = bandit.log_probabilities(start)
    trained = bandit.train(
        start, reference, lambda _, drawn: reward.gather(-1, drawn), 0.5, num_steps=num_steps, num_samples=64, seed=0,
        advance=lambda _: None,
    )  # fmt: skip
    return trained, reference


@pytest.mark.parametrize("sizes", [(8, 8), (8, 32, 32, 8)])
def test_ppo_reaches_the_optimum(sizes: tuple[int, ...]) -> None:
    reward = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(9))
    trained, reference = run(reward, sizes, 3, 150)
    optimum = bandit.exact_optimum(reference, reward, 0.5)
    assert bandit.total_variation(trained, optimum).max() <= 0.02
    assert bandit.total_variation(reference, optimum).mean() > 0.3  # it had some way to go


def test_worlds_do_not_touch_one_another() -> None:
    reward = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(9))
    (one, _), (other, _) = (
        run(torch.stack([reward[0], second]), (4, 8, 3), 2, 5) for second in (reward[1], -reward[1])
    )
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])
