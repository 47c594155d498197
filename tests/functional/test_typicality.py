"""Distances against hand values, Ledoit and Wolf's formula written anew, their laws, and the optimum they promise."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis

from poise.errors import PoiseError
from poise.functional.objectives import HeadRewards, RewardScale, joined, typical
from poise.functional.shaping import contrastive
from poise.functional.typicality import distance, fit_reference


def texts(seed: int, rows: int = 40, width: int = 6) -> torch.Tensor:
    """Correlated features of very different sizes, away from zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return noise @ mix * torch.logspace(-2, 2, width, dtype=torch.float64) + torch.arange(width)


def numpy_distances(reference: np.ndarray, asked: np.ndarray) -> tuple[list[float], float]:
    """(distances, shrinkage) from the formulas of the module's docstring and of the paper, with loops."""
    count, width = reference.shape
    center, spread = reference.mean(0), reference.std(0)
    z = (reference - center) / spread
    raw = z.T @ z / count
    size = np.trace(raw) / width  # the paper's m, d2 and b2, in its norm |A|^2 = tr(AA') / width
    away = np.linalg.norm(raw - size * np.eye(width)) ** 2 / width
    error = sum(np.linalg.norm(np.outer(row, row) - raw) ** 2 / width for row in z) / count**2
    shrinkage = max(min(error, away) / away, 1e-4)
    inverse = np.linalg.inv((1 - shrinkage) * raw + shrinkage * size * np.eye(width))
    unit = np.mean([mahalanobis(row, np.zeros(width), inverse) ** 2 for row in z])
    return [mahalanobis((row - center) / spread, np.zeros(width), inverse) ** 2 / unit for row in asked], shrinkage


def test_typicality_equals_values_worked_out_by_hand() -> None:
    """Independent features of std 1 and 2: d = (z1^2 + z2^2) / 2, whatever the shrinkage toward the identity."""
    reference = fit_reference(torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]]))
    asked = torch.tensor([[1.0, 2.0], [2.0, 2.0], [1.0, 8.0]])
    assert distance(asked, reference).tolist() == pytest.approx([0.0, 0.5, 4.5])
    assert reference.num_texts == 4


@given(st.integers(0, 1000), st.integers(3, 60), st.integers(2, 8))
def test_typicality_equals_numpy_and_the_papers_formula(seed: int, rows: int, width: int) -> None:
    """Also with fewer texts than features."""
    known, asked = texts(seed, rows, width), texts(seed + 1, 5, width)
    reference = fit_reference(known)
    expected, shrinkage = numpy_distances(known.numpy(), asked.numpy())
    assert reference.shrinkage == pytest.approx(shrinkage, abs=1e-9)
    assert distance(asked, reference).tolist() == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-50, 50))
def test_typicality_obeys_its_laws(seed: int, scale: float, shift: float) -> None:
    known, asked = texts(seed), texts(seed + 1)
    reference = fit_reference(known)
    found = distance(asked, reference)
    assert (found >= 0).all()
    assert distance(known, reference).mean().item() == pytest.approx(1)
    assert distance(known.mean(0), reference).item() == pytest.approx(0, abs=1e-12)
    # another unit of the features, or another zero, changes nothing
    moved = fit_reference(scale * known + shift)
    torch.testing.assert_close(distance(scale * asked + shift, moved), found, rtol=1e-6, atol=1e-9)
    # quadratic along every ray from the center
    away = reference.center_H + 3 * (asked - reference.center_H)
    torch.testing.assert_close(distance(away, reference), 9 * found)
    # a text's distance does not depend on what it is asked with
    torch.testing.assert_close(distance(asked[7], reference), found[7], rtol=1e-12, atol=1e-12)


def test_the_reward_has_its_maximum_where_the_docstring_says() -> None:
    """r(x) = w.x - c d(x): gradient ascent by autograd arrives there, near the texts; w.x alone never would."""
    known = texts(3)
    reference = fit_reference(known)
    weight, c = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / known.std(0), 2.0
    precision = reference.factor_HH @ reference.factor_HH.T
    best = (reference.center_H + torch.linalg.solve(precision, weight) / (2 * c)).requires_grad_()
    reward = weight @ best - c * (best - reference.center_H) @ precision @ (best - reference.center_H)
    (gradient,) = torch.autograd.grad(reward, best)
    torch.testing.assert_close(gradient, torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-10)
    around = best.detach() + 0.1 * known.std(0) * torch.randn(200, 6, dtype=torch.float64)
    heads = HeadRewards((around @ weight)[:, None], torch.zeros(200, 1), distance(around, reference)[:, None])
    assert (typical(heads, c) < reward.item()).all()
    assert distance(best, reference) < 3  # where texts of the reference lie


def test_a_feature_that_does_not_vary_keeps_its_unit() -> None:
    known = torch.cat([texts(0), torch.full((40, 1), 5.0)], 1)
    reference = fit_reference(known)
    assert distance(known, reference).mean().item() == pytest.approx(1)
    assert distance(known[0] + torch.eye(7)[6], reference).isfinite()


def test_two_texts_are_the_least_of_a_reference() -> None:
    reference = fit_reference(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
    assert reference.num_texts == 2
    assert distance(torch.tensor([[0.0, 1.0], [2.0, 5.0], [1.0, 3.0]]), reference).tolist() == pytest.approx([1, 1, 0])


def test_features_that_say_the_same_are_no_trouble() -> None:
    """Their covariance is singular, and Ledoit and Wolf's shrinkage is 0 where all texts lie equally far out."""
    signs = torch.tensor([[1.0], [-1.0]]).repeat(8, 3)
    reference = fit_reference(signs)
    assert reference.shrinkage == 1e-4
    assert distance(signs, reference).tolist() == pytest.approx([1.0] * 16)
    assert distance(torch.tensor([1.0, -1.0, 0.0]), reference) > 1e3  # the features never disagreed


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (torch.zeros(1, 3), "at least two texts"),
        (torch.full((4, 3), float("nan")), "finite features"),
        (torch.ones(4, 3), "all alike"),
    ],
)
def test_texts_that_make_no_reference_are_refused(features: torch.Tensor, said: str) -> None:
    with pytest.raises(PoiseError, match=said):
        fit_reference(features)


def test_distances_pass_through_what_is_done_to_heads() -> None:
    heads = HeadRewards(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.ones(2, 2), torch.tensor([[1.0], [4.0]]))
    scale = RewardScale.fit(heads, typical)
    assert scale.head_baseline == (1.5, 2.5)  # centered: 0 - 1 and 0 - 4
    assert scale.combine(heads, typical).tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])
    assert joined([heads, heads]).distance is not None
    assert joined([heads, heads._replace(distance=None)]).distance is None
    assert contrastive(heads, HeadRewards(torch.zeros(2, 3, 2), torch.ones(2, 3, 2))).distance is heads.distance
    assert heads.in_unit(2.0).distance is heads.distance
    assert typical(heads.in_unit(2.0)).tolist() == [3.0, 0.0]
    with pytest.raises(PoiseError, match="needs the distance to reference texts"):
        typical(heads._replace(distance=None))
