"""What the K heads of a reward model say of texts: the one type that scorers return and objectives read."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from poise.errors import PoiseError
from poise.functional.shapes import checked


class HeadRewards(NamedTuple):
    """What K heads say of some texts, in units of the standardized training reward.

    mean: (..., K) each head's reward.
    std:  (..., K) each head's own std, >= 0 (all zero for point heads).
    distance: (..., 1) how far each text lies from the reference texts (`poise.functional.typicality`), where the
        reward model has a reference. Its last axis is there so that all parts are indexed and reshaped alike.
    """

    mean: Float[Tensor, "*batch heads"]
    std: Float[Tensor, "*batch heads"]
    distance: Float[Tensor, "*batch 1"] | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "HeadRewards":
        """The same change of every part that is there: indexing, reshaping, a move to another device."""
        distance = None if self.distance is None else change(self.distance)
        return HeadRewards(change(self.mean), change(self.std), distance)

    def in_unit(self, unit: float) -> "HeadRewards":
        """Means and stds times `unit`; a distance has a unit of its own."""
        return self._replace(mean=unit * self.mean, std=unit * self.std)


@checked
def joined(parts: Sequence[HeadRewards]) -> HeadRewards:
    """Rewards of several batches as one, along the first axis; with distances only if every part has them."""
    if len({part.mean.shape[1:] for part in parts}) != 1:
        raise PoiseError("joined: parts must be at least one, and of the same heads")
    distances = [part.distance for part in parts if part.distance is not None]
    return HeadRewards(
        torch.cat([part.mean for part in parts]),
        torch.cat([part.std for part in parts]),
        torch.cat(distances) if len(distances) == len(parts) else None,
    )


# What makes one reward (...) of heads (..., K).
Objective = Callable[[HeadRewards], Tensor]
