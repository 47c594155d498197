"""Heads on a part of the pairs: a known answer, and whole prompts at a time."""

import numpy as np
import pytest
import torch

from poise.errors import PoiseError
from poise.functional.trust import doubling
from poise.reward import room as rooms
from poise.reward.pairs import FeaturePairs
from poise.reward.room import FOLDS, room


def labeled(count: int, hidden: int, seed: int = 0) -> FeaturePairs:
    """Pairs that people choose by a linear reward of `hidden` features, with Bradley-Terry noise."""
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(count, hidden, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.full((hidden,), 3.0 / hidden**0.5, dtype=torch.float64)
    flip = torch.rand(count, generator=generator, dtype=torch.float64) > torch.sigmoid((one - other) @ weight)
    chosen, rejected = torch.where(flip[:, None], other, one), torch.where(flip[:, None], one, other)
    return FeaturePairs(chosen, rejected, torch.zeros(count, dtype=torch.float64))


def test_room_is_seen_where_there_is_some_and_nowhere_else() -> None:
    texts = torch.randn(6, 120, generator=torch.Generator().manual_seed(1))
    groups = np.arange(1600)
    hungry, full = room(labeled(1600, 120), groups, texts, 0), room(labeled(1600, 2), groups, texts[:, :2], 0)
    low = doubling(hungry.accuracy_SF[-1] - hungry.accuracy_SF[-2])[1]
    assert low > 0  # 720 pairs for 120 features, and 1440
    low, high = doubling(full.accuracy_SF[-1] - full.accuracy_SF[-2])[1:]
    assert low < 0 < high < 0.02  # 720 pairs are plenty for two features
    assert hungry.num_pairs == pytest.approx([360, 720, 1440])
    assert hungry.reward_SFT.shape == (3, FOLDS, 6)


def test_no_prompt_is_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of one group are equal here: a head that had seen a part of a group would know the rest."""
    pairs, groups = labeled(40, 8), np.repeat(np.arange(40), 4)
    pairs = pairs.rows(torch.from_numpy(groups))
    seen: list[set[float]] = []
    fit = rooms.fit_bradley_terry

    def watched(part: FeaturePairs, precision: float) -> torch.Tensor:
        seen.append(set(part.chosen_NH[:, 0].tolist()))
        return fit(part, precision)

    monkeypatch.setattr(rooms, "fit_bradley_terry", watched)
    found = room(pairs, groups, torch.randn(2, 8), 0)
    assert [len(part) for part in seen] == [9, 18, 36] * FOLDS
    for fold in range(FOLDS):
        assert seen[3 * fold] < seen[3 * fold + 1] < seen[3 * fold + 2]
    whole = {value for part in seen for value in part}
    assert len(whole) == 40
    held = [whole - seen[3 * fold + 2] for fold in range(FOLDS)]
    assert sorted(value for part in held for value in part) == sorted(whole)  # each held out once
    assert set(np.unique(found.accuracy_SF * 4)) <= set(range(5))  # four groups a fold, each right or wrong as one
    assert (found.right_N == found.right_N[::4][groups]).all()
    assert found.right_N.mean() == pytest.approx(found.accuracy_SF[-1].mean())  # folds are equally large


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(PoiseError, match="19 prompts are too few"):
        room(labeled(38, 4), np.arange(38) % 19, torch.randn(2, 4), 0)


def test_a_half_is_one_of_the_pairs_where_prompts_have_more_or_fewer() -> None:
    """Twenty prompts of one pair and twenty of ten: half of the prompts may be a tenth of the pairs, or nine tenths."""
    groups = np.repeat(np.arange(40), np.where(np.arange(40) % 2, 10, 1))
    pairs = labeled(len(groups), 8)
    quarter, half, every = room(pairs, groups, torch.randn(2, 8), 0).num_pairs
    assert every == pytest.approx(0.9 * len(groups), abs=1)
    assert abs(half - every / 2) < 5  # half of the largest prompt
    assert abs(quarter - every / 4) < 5
