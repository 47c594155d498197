"""The type that scorers return: every part is changed alike, and only rewards have a unit."""

import pytest
import torch

from poise.functional.head_rewards import HeadRewards, joined

MEAN, STD = torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([[0.5, 0.25], [1.0, 4.0]])
DISTANCE = torch.tensor([[7.0], [9.0]])


@pytest.mark.parametrize("distance", [DISTANCE, None])
def test_each_changes_every_part_that_is_there(distance: torch.Tensor | None) -> None:
    heads = HeadRewards(MEAN, STD, distance).each(lambda part: part[1:])
    assert heads.mean.tolist() == [[3.0, 0.5]]
    assert heads.std.tolist() == [[1.0, 4.0]]
    assert (heads.distance is None) == (distance is None)
    if heads.distance is not None:
        assert heads.distance.tolist() == [[9.0]]


def test_a_unit_multiplies_means_and_stds_and_no_distance() -> None:
    heads = HeadRewards(MEAN, STD, DISTANCE).in_unit(2.0)
    assert heads.mean.tolist() == [[2.0, -4.0], [6.0, 1.0]]
    assert heads.std.tolist() == [[1.0, 0.5], [2.0, 8.0]]
    assert heads.distance is not None
    assert torch.equal(heads.distance, DISTANCE)


def test_batches_are_joined_in_order_with_distances_only_if_all_have_them() -> None:
    one, other = HeadRewards(MEAN[:1], STD[:1], DISTANCE[:1]), HeadRewards(MEAN[1:], STD[1:], DISTANCE[1:])
    whole = joined([one, other])
    assert torch.equal(whole.mean, MEAN)
    assert torch.equal(whole.std, STD)
    assert whole.distance is not None
    assert torch.equal(whole.distance, DISTANCE)
    assert joined([one, other._replace(distance=None)]).distance is None
    assert joined([one._replace(distance=None), other._replace(distance=None)]).distance is None
