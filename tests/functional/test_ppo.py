"""PPO's equations against loops in NumPy, the laws they obey, and a bandit whose optimum is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poise.functional import ppo


def example(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    rows, tokens = int(generator.integers(1, 5)), int(generator.integers(1, 7))
    lengths = generator.integers(1, tokens + 1, rows)
    mask = (np.arange(tokens) < lengths[:, None]).astype(float)
    draw = {name: generator.normal(size=(rows, tokens)) for name in ("logprob", "reference", "values", "new", "old")}
    return draw | {"mask": mask, "lengths": lengths, "score": generator.normal(size=rows)}


def tensors(case: dict[str, np.ndarray], *names: str) -> list[torch.Tensor]:
    return [torch.from_numpy(case[name]) for name in names]


@given(st.integers(0, 10_000))
def test_token_rewards_pay_kl_per_token_and_the_score_at_the_end(seed: int) -> None:
    case = example(seed)
    got = ppo.token_rewards(*tensors(case, "score", "logprob", "reference", "mask"), kl_coef=0.3).numpy()
    for row, length in enumerate(case["lengths"]):
        for t in range(case["mask"].shape[1]):
            expected = -0.3 * (case["logprob"][row, t] - case["reference"][row, t]) if t < length else 0.0
            expected += case["score"][row] if t == length - 1 else 0.0
            assert got[row, t] == pytest.approx(expected)


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_sum_of_its_definition(seed: int, discount: float, trace: float) -> None:
    case = example(seed)
    rewards = case["new"] * case["mask"]
    got, returns = ppo.gae(torch.from_numpy(rewards), *tensors(case, "values", "mask"), discount, trace)
    for row, length in enumerate(case["lengths"]):
        value = [*case["values"][row, :length], 0.0]
        delta = [rewards[row, t] + discount * value[t + 1] - value[t] for t in range(length)]
        for t in range(case["mask"].shape[1]):
            expected = sum((discount * trace) ** (i - t) * delta[i] for i in range(t, length)) if t < length else 0.0
            assert got[row, t].item() == pytest.approx(expected, abs=1e-9)
            if t < length:
                assert returns[row, t].item() == pytest.approx(expected + value[t], abs=1e-9)


def test_gae_with_trace_one_is_return_minus_value() -> None:
    case = example(3)
    rewards = torch.from_numpy(case["new"] * case["mask"])
    advantages, _ = ppo.gae(rewards, *tensors(case, "values", "mask"), 1.0, 1.0)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    values, mask = tensors(case, "values", "mask")
    torch.testing.assert_close(advantages, (to_go - values) * mask)


@given(st.integers(0, 10_000))
def test_policy_loss_equals_the_clipped_loss_token_by_token(seed: int) -> None:
    case = example(seed)
    new, old = 0.3 * case["new"], 0.3 * case["old"]
    loss, clipped = ppo.policy_loss(
        torch.from_numpy(new), torch.from_numpy(old), *tensors(case, "values", "mask"), clip=0.2
    )
    terms, outside = [], []
    for row, t in zip(*np.nonzero(case["mask"]), strict=True):
        ratio, advantage = math.exp(new[row, t] - old[row, t]), case["values"][row, t]
        terms.append(max(-ratio * advantage, -min(max(ratio, 0.8), 1.2) * advantage))
        outside.append(abs(ratio - 1) > 0.2)
    assert loss.item() == pytest.approx(np.mean(terms))
    assert clipped.item() == pytest.approx(np.mean(outside))


@given(st.integers(0, 10_000))
def test_value_loss_equals_the_clipped_loss_token_by_token(seed: int) -> None:
    case = example(seed)
    got = ppo.value_loss(*tensors(case, "new", "old", "values", "mask"), clip=0.2).item()
    terms = []
    for row, t in zip(*np.nonzero(case["mask"]), strict=True):
        new, old, target = (case[name][row, t] for name in ("new", "old", "values"))
        clipped = old + min(max(new - old, -0.2), 0.2)
        terms.append(max((new - target) ** 2, (clipped - target) ** 2) / 2)
    assert got == pytest.approx(np.mean(terms))


def test_whitened_entries_have_zero_mean_and_unit_variance() -> None:
    case = example(2)
    values, mask = tensors(case, "values", "mask")
    whitened = ppo.whiten(values, mask)
    kept = whitened[mask.bool()]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6)
    assert kept.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert (whitened[~mask.bool()] == 0).all()


def test_whitened_advantages_are_zero_where_there_is_nothing_to_compare() -> None:
    """One token, equal tokens, and none at all: no NaN, and nothing that would move a policy."""
    for values, mask in (
        ([[3.0, 7.0]], [[1.0, 0.0]]), ([[3.0, 3.0], [3.0, 9.0]], [[1.0, 1.0], [1.0, 0.0]]), ([[3.0]], [[0.0]]),
    ):  # fmt: skip
        whitened = ppo.whiten(torch.tensor(values), torch.tensor(mask))
        assert (whitened == 0).all()


def test_means_of_few_tokens_are_not_those_of_more() -> None:
    """A single token's loss is divided by 1, and that of no token by no less."""
    one = torch.tensor([[5.0, 9.0]])
    assert ppo.masked_mean(one, torch.tensor([[1.0, 0.0]])).item() == 5.0
    assert ppo.masked_mean(one, torch.zeros(1, 2)).item() == 0.0
    assert ppo.masked_mean(one, torch.tensor([[1.0, 0.0]]), torch.tensor(4.0)).item() == 1.25
    assert ppo.masked_mean(one, torch.zeros(1, 2), torch.tensor(0.0)).item() == 0.0


@given(st.integers(0, 10_000))
def test_step_kl_and_entropy_equal_values_worked_out_by_hand(seed: int) -> None:
    case = example(seed)
    new, old = 0.3 * case["new"], 0.3 * case["old"]
    got = ppo.step_kl(torch.from_numpy(new), torch.from_numpy(old), *tensors(case, "mask")).item()
    difference = (new - old)[case["mask"] > 0]
    assert got == pytest.approx(np.mean(np.exp(difference) - 1 - difference), abs=1e-12)
    assert got >= 0
    logits = np.random.default_rng(seed).normal(size=(2, 3, 7)) * 5
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    probability = shifted / shifted.sum(-1, keepdims=True)
    entropy = ppo.token_entropy(torch.from_numpy(logits)).numpy()
    assert entropy == pytest.approx(-(probability * np.log(probability)).sum(-1))


@given(st.integers(0, 10_000))
def test_losses_of_parts_add_up_to_that_of_the_whole(seed: int) -> None:
    case = example(seed)
    new, old, values, mask = tensors(case, "new", "old", "values", "mask")
    count = mask.sum()
    for equation in (
        lambda rows, n: ppo.policy_loss(new[rows], old[rows], values[rows], mask[rows], 0.2, n)[0],
        lambda rows, n: ppo.policy_loss(new[rows], old[rows], values[rows], mask[rows], 0.2, n)[1],
        lambda rows, n: ppo.value_loss(new[rows], old[rows], values[rows], mask[rows], 0.2, n),
        lambda rows, n: ppo.step_kl(new[rows], old[rows], mask[rows], n),
    ):
        parts = sum(equation(slice(i, i + 1), count) for i in range(len(mask)))
        torch.testing.assert_close(parts, equation(slice(None), None))


def test_whitening_over_processes_takes_the_moments_of_all() -> None:
    case = example(5)
    values, mask = tensors(case, "values", "mask")
    others = 2 * values + 1
    whole = ppo.whiten(torch.cat([values, others]), torch.cat([mask, mask]))
    mean = ppo.masked_mean(torch.cat([values, others]), torch.cat([mask, mask]))
    # what the other process adds: its tokens, their sum, their squared deviations from the common mean
    sums = iter([mask.sum(), (others * mask).sum(), ((others - mean).square() * mask).sum()])
    mine = ppo.whiten(values, mask, lambda part: part + next(sums))
    torch.testing.assert_close(mine, whole[: len(mask)])


def test_kl_estimators_agree_with_the_exact_kl() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(6).log_softmax(-1), torch.randn(6).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum().item()
    drawn = torch.multinomial(policy.exp(), 400_000, replacement=True).unsqueeze(-1)
    mask = torch.ones(len(drawn), 1)
    k1 = ppo.sequence_kl(policy[drawn], reference[drawn], mask)
    k3 = ppo.sequence_kl_k3(policy[drawn], reference[drawn], mask)
    assert k1.mean().item() == pytest.approx(exact, rel=1e-2)
    assert k3.mean().item() == pytest.approx(exact, rel=1e-2)
    assert (k3 >= 0).all()
    assert k3.var() < k1.var()


def test_the_kl_of_a_completion_is_that_of_the_tokens_it_wrote() -> None:
    policy, reference = torch.tensor([[-1.0, -2.0, 5.0]]), torch.tensor([[-1.5, -1.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    assert ppo.sequence_kl(policy, reference, mask).tolist() == [0.5 - 1.0]
    k3 = (math.exp(-0.5) - 1 + 0.5) + (math.exp(1.0) - 1 - 1.0)
    assert ppo.sequence_kl_k3(policy, reference, mask).tolist() == pytest.approx([k3])


def test_padding_counts_for_nothing_whatever_its_log_probabilities() -> None:
    """A pad token that a policy all but rules out: e^100 is infinite in float32, and infinity times 0 is no number."""
    mask, far = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, -200.0]])
    near = torch.tensor([[-1.5, -2.0]])
    for one, other in ((far, near), (near, far)):
        assert ppo.sequence_kl_k3(one, other, mask).item() == ppo.sequence_kl_k3(one[:, :1], other[:, :1], mask[:, :1])
        assert ppo.step_kl(one, other, mask) == ppo.step_kl(one[:, :1], other[:, :1], mask[:, :1])
        new = one.clone().requires_grad_()
        loss, clipped = ppo.policy_loss(new, other, torch.ones(1, 2), mask, 0.2)
        assert (loss, clipped) == ppo.policy_loss(one[:, :1], other[:, :1], torch.ones(1, 1), mask[:, :1], 0.2)
        loss.backward()  # type: ignore[no-untyped-call]
        assert new.grad is not None
        assert new.grad.isfinite().all()


@pytest.mark.parametrize(("kl", "less"), [(0.5, True), (0.62, True), (0.64, False), (2.0, False)])
def test_k3_has_less_variance_only_where_the_policies_are_close(kl: float, less: bool) -> None:
    """Gaussians, by quadrature: e^2KL - 1 - 2KL is below the 2KL of the plain estimate up to a KL of .63."""
    shift = (2 * kl) ** 0.5
    x = torch.linspace(-14, 14, 40_001, dtype=torch.float64) + shift
    weight = torch.exp(-0.5 * (x - shift).square())
    logprob, reference = -0.5 * (x - shift).square().unsqueeze(-1), -0.5 * x.square().unsqueeze(-1)
    mask = torch.ones_like(logprob)
    variance = []
    for estimate in (ppo.sequence_kl, ppo.sequence_kl_k3):
        values = estimate(logprob, reference, mask)
        mean = (weight * values).sum() / weight.sum()
        assert mean.item() == pytest.approx(kl, rel=1e-4)
        variance.append(((values - mean).square() * weight).sum() / weight.sum())
    assert (variance[1] < variance[0]).item() is less


def test_equations_learn_the_known_optimum_of_a_bandit() -> None:
    """One prompt, eight one-token responses: PPO must reach pi* ~ pi_ref exp(r / beta)."""
    torch.manual_seed(0)
    reference, reward, kl_coef = torch.randn(8).log_softmax(-1), torch.randn(8), 0.5
    optimum = (reference + reward / kl_coef).softmax(-1)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    mask = torch.ones(4096, 1)
    for _ in range(150):
        with torch.no_grad():
            old = logits.log_softmax(-1)
            drawn = torch.multinomial(old.exp(), len(mask), replacement=True)
            rewards = ppo.token_rewards(
                reward[drawn], old[drawn].unsqueeze(-1), reference[drawn].unsqueeze(-1), mask, kl_coef
            )
            value = rewards.mean().expand_as(rewards)
            advantages, _ = ppo.gae(rewards, value, mask, 1.0, 0.95)
        for _ in range(2):
            new = logits.log_softmax(-1)[drawn].unsqueeze(-1)
            loss, _ = ppo.policy_loss(new, old[drawn].unsqueeze(-1), advantages, mask, 0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    distance = 0.5 * (logits.softmax(-1) - optimum).abs().sum().item()
    start = 0.5 * (reference.softmax(-1) - optimum).abs().sum().item()
    assert distance <= 0.02
    assert start > 0.2  # the optimum was not where we began
