"""The miniature reward model: its data, its two stages against an independent fit, and what its heads know."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from poise.functional.objectives import disagreement, mean, nominal, routing_std
from poise.functional.statistics import auroc
from poise.toy import bandit
from poise.toy import unseen_responses as blind_spots


def make(seeds: range, num_pairs: int = 32, label_noise: float = 0.0) -> blind_spots.Worlds:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return blind_spots.make_worlds(generators, num_pairs, 5, label_noise)


def test_pairs_show_two_different_responses_of_those_seen() -> None:
    worlds = make(range(5))
    assert set((~worlds.seen_WPA).sum(-1).flatten().tolist()) == {2, 3, 4}
    for shown in (worlds.chosen_WPN, worlds.rejected_WPN):
        assert worlds.seen_WPA.gather(-1, shown).all()
    assert (worlds.chosen_WPN != worlds.rejected_WPN).all()


def test_a_seed_is_the_same_world_in_any_company() -> None:
    for part, alone in zip(make(range(3, 6)), make(range(4, 5)), strict=True):
        assert torch.equal(part[1], alone[0])


@pytest.mark.parametrize("label_noise", [0.0, 0.25])
def test_preferences_are_bradley_terry_draws(label_noise: float) -> None:
    worlds = make(range(4), num_pairs=2000, label_noise=label_noise)
    lead = worlds.gold_WPA.gather(-1, worlds.chosen_WPN) - worlds.gold_WPA.gather(-1, worlds.rejected_WPN)
    # of a pair whose rewards differ by d, the better one is chosen with probability sigmoid(d), if not flipped
    right = torch.sigmoid(lead.abs())
    expected = (right * (1 - label_noise) + (1 - right) * label_noise).mean().item()
    assert (lead > 0).float().mean().item() == pytest.approx(expected, abs=0.01)  # 64,000 draws: std .002


def test_stage_one_is_the_map() -> None:
    worlds = make(range(1))
    features, first = worlds.features_WPAD[0].double().numpy(), worlds.first_single_WPD[0].double().numpy()
    chosen, rejected = worlds.chosen_WPN[0].numpy(), worlds.rejected_WPN[0].numpy()

    def loss(flat: np.ndarray) -> float:
        weight = flat.reshape(first.shape)
        reward = np.einsum("pad,pd->pa", features, weight)
        lead = np.take_along_axis(reward, chosen, 1) - np.take_along_axis(reward, rejected, 1)
        return np.logaddexp(0, -lead).sum() + 0.5 * np.square(weight - first).sum()

    optimum = minimize(loss, first.ravel()).x.reshape(first.shape)
    got = blind_spots.fit_single(worlds)[0].numpy()
    np.testing.assert_allclose(got, np.einsum("pad,pd->pa", features, optimum), atol=0.02)


def test_heads_agree_on_what_they_saw_and_nowhere_else() -> None:
    worlds = make(range(3))
    single = blind_spots.fit_single(worlds)
    heads = blind_spots.fit_heads(worlds, single)
    error = (heads.mean - single.unsqueeze(-1)).abs()
    assert error[worlds.seen_WPA].mean() < 0.1 < error[~worlds.seen_WPA].mean()
    for uncertainty, least in ((disagreement(heads), 0.95), (routing_std(heads), 0.6)):
        assert auroc(uncertainty[~worlds.seen_WPA].numpy(), uncertainty[worlds.seen_WPA].numpy()) > least


def test_combined_reward_has_the_reference_policys_scale() -> None:
    worlds = make(range(2))
    heads = blind_spots.fit_heads(worlds, blind_spots.fit_single(worlds), num_steps=20)
    drawn = bandit.draw(worlds.reference_WPA, 4000, torch.Generator().manual_seed(0))
    shown = blind_spots.of_responses(heads, drawn[:, :, :3])
    assert torch.equal(shown.mean[1, 3 * 2 + 1], heads.mean[1, 2, drawn[1, 2, 1]])
    for objective in (nominal, mean):
        reward = blind_spots.combine(heads, blind_spots.fit_scales(heads, objective, drawn), objective)
        for world in range(2):
            pi = worlds.reference_WPA[world].exp().flatten() / 8
            average = (pi * reward[world].flatten()).sum()
            assert average.item() == pytest.approx(0, abs=0.03)
            assert (pi * (reward[world].flatten() - average).square()).sum().item() == pytest.approx(1, abs=0.05)
