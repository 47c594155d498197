"""Worst-case regret against all vertices of the ball of rewards; its bonus against derivatives and a known optimum."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linprog

from poise.functional.shaping import regret_bonus, with_regret_bonus, worst_case_regret

CHOICES = 5
rewards = hnp.arrays(np.float64, CHOICES, elements=st.floats(-3, 3))
weights = hnp.arrays(np.float64, CHOICES, elements=st.floats(0.01, 1))
radii = st.floats(0.01, 4)


def regret_by_vertices(reward: np.ndarray, policy: np.ndarray, radius: float) -> float:
    """A maximum of a convex function over an l1 ball lies at a vertex: one reward takes the whole error."""
    found = []
    for number, sign in itertools.product(range(len(reward)), (-1, 1)):
        wrong = reward.copy()
        wrong[number] += sign * radius
        found.append(wrong.max() - policy @ wrong)
    return max(found)


@given(rewards, weights, radii)
def test_worst_case_regret_is_that_at_the_worst_vertex(reward: np.ndarray, weight: np.ndarray, radius: float) -> None:
    policy = weight / weight.sum()
    found = worst_case_regret(torch.tensor(reward), torch.tensor(policy), radius).item()
    assert found == pytest.approx(regret_by_vertices(reward, policy, radius), abs=1e-9)
    assert found >= reward.max() - policy @ reward - 1e-9  # the regret under the reward as it is


@given(rewards, weights, radii)
def test_reward_and_bonus_are_the_derivative_of_the_regret(
    reward: np.ndarray, weight: np.ndarray, radius: float
) -> None:
    policy = weight / weight.sum()
    water = np.sort(reward - radius * policy)
    if water[-1] - water[-2] < 1e-3:
        return  # the maximum is attained twice: no derivative
    bonus = regret_bonus(torch.tensor(reward[None]), torch.tensor(policy[None]), radius)[0].numpy()
    for number in range(CHOICES):
        step = np.eye(CHOICES)[number] * 1e-5
        change = regret_by_vertices(reward, policy + step, radius) - regret_by_vertices(reward, policy - step, radius)
        # Probabilities are moved one by one, off the simplex: the term of radius * sum(policy) is a constant on it.
        assert -change / 2e-5 == pytest.approx(reward[number] + bonus[number], abs=1e-6)


def test_a_policy_that_follows_the_bonus_finds_the_smallest_worst_case_regret() -> None:
    """Exact natural policy gradients of a softmax over five choices, against the linear program."""
    reward, radius = torch.tensor([1.0, 0.9, 0.7, 0.0, -1.0], dtype=torch.float64), 0.5
    # min t - p . r  with  t >= r_j - radius * p_j,  p on the simplex
    best = linprog(
        np.append(-reward.numpy(), 1.0), A_ub=np.column_stack([-radius * np.eye(5), -np.ones(5)]), b_ub=-reward.numpy(),
        A_eq=[[1.0] * 5 + [0.0]], b_eq=[1.0], bounds=[(0, 1)] * 5 + [(None, None)],
    )  # fmt: skip
    logits, total = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for step in range(3000):
        policy = logits.softmax(-1)
        total += policy if step >= 1500 else 0.0  # the bonus jumps between equals; the average settles
        paid = reward + regret_bonus(reward[None], policy[None], radius)[0]
        logits += 0.3 / (1 + step) ** 0.5 * paid
    found = worst_case_regret(reward, total / 1500, radius).item()
    assert found == pytest.approx(best.fun + radius, abs=2e-3)
    without = worst_case_regret(reward, torch.eye(5, dtype=torch.float64)[0], radius).item()
    assert found < without - 0.05  # a policy that takes the highest reward alone has more


def test_the_bonus_goes_to_one_text_of_each_prompt() -> None:
    reward = torch.tensor([0.0, 2.0, 5.0, 5.0, 4.8, 1.0])
    prompts, texts = ["p", "p", "q", "q", "q", "q"], ["a", "b", "c", "c", "d", "e"]
    paid = with_regret_bonus(reward, prompts, texts, 1.0)
    # q: 5 - 2/4, 4.8 - 1/4, 1 - 1/4: the second best, which is rarer
    assert (paid - reward).tolist() == pytest.approx([0, 1, 0, 0, 1, 0])
    # 5 - 2/4, 4.4 - 1/4: the best, though it is more frequent
    near = with_regret_bonus(torch.tensor([5.0, 5.0, 4.4, 1.0]), ["q"] * 4, ["c", "c", "d", "e"], 1.0)
    assert near.tolist() == pytest.approx([6, 6, 4.4, 1])
    mixed = [3, 0, 5, 1, 2, 4]  # the order of the rows does not matter
    again = with_regret_bonus(reward[mixed], [prompts[i] for i in mixed], [texts[i] for i in mixed], 1.0)
    assert torch.equal(again, paid[mixed])
    assert with_regret_bonus(reward, prompts, texts, 0.0) is reward


@given(st.floats(-5, 5), st.floats(0.1, 3))
def test_a_constant_reward_pays_every_rarest_text_alike(value: float, radius: float) -> None:
    paid = with_regret_bonus(torch.full((4,), value), ["p"] * 4, ["a", "b", "c", "d"], radius)
    assert paid.std().item() == 0.0
