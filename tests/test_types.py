"""Under pytest every function of Poise checks the types and shapes of what it is given."""

import pytest
import torch
from jaxtyping import TypeCheckError

from poise.errors import PoiseError
from poise.functional import objectives, ppo
from poise.reward.pairs import FeaturePairs
from poise.runtime import run_folder


def test_a_wrong_type_is_refused() -> None:
    with pytest.raises(TypeCheckError):
        objectives.parse_objective(3)  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError):
        run_folder.write_json("no path", {})  # type: ignore[arg-type]


def test_a_wrong_shape_is_refused() -> None:
    assert ppo.whiten(torch.randn(2, 3), torch.ones(2, 3)).shape == (2, 3)
    with pytest.raises(PoiseError, match="mask must be of shape"):  # that one is checked wherever it is called
        ppo.whiten(torch.randn(2, 3), torch.ones(2, 4))
    pairs = FeaturePairs(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2))
    assert pairs.standardized(torch.zeros(3), torch.ones(3)).margin_N.shape == (2,)
    with pytest.raises(TypeCheckError):
        pairs.standardized(torch.zeros(3), torch.ones(4))
    heads = objectives.HeadRewards(torch.zeros(2, 3), torch.ones(2, 3))
    assert objectives.parse_objective("mean")(heads).shape == (2,)
