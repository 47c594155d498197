"""Preferences on their way to a head: split into training and validation, then turned into trunk features.

Shapes: _N pairs, _H hidden.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from poise.data.preferences import Check, OnBadRow, read_preferences
from poise.data.types import Preference, Sample
from poise.errors import PoiseError
from poise.models.scorer import FeatureExtractor
from poise.runtime.progress import progress


class PreferenceSplit(NamedTuple):
    """Preferences, and which of them train and which validate.

    train, validation: row numbers, in random order.
    generator: the one that drew the split; the training of the heads draws on from it.
    """

    preferences: list[Preference]
    train: Int[Tensor, " train"]
    validation: Int[Tensor, " validation"]
    generator: torch.Generator

    @classmethod
    def read(
        cls, path: str, validation_share: float, seed: int, on_bad_row: OnBadRow = "error", check: Check | None = None
    ) -> "PreferenceSplit":
        """Read preferences and split them at random. PoiseError if fewer than two are left to train on."""
        preferences = read_preferences(path, on_bad_row, check)
        count = len(preferences)
        num_validation = max(1, round(count * validation_share))
        if count - num_validation < 2:
            raise PoiseError(f"{count} preferences are too few to train on")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=generator)
        return cls(preferences, order[num_validation:], order[:num_validation], generator)

    @property
    def fit_on(self) -> list[Preference]:
        """The training rows."""
        return [self.preferences[i] for i in self.train]

    @property
    def held_out(self) -> list[Preference]:
        """The validation rows."""
        return [self.preferences[i] for i in self.validation]


class FeaturePairs(NamedTuple):
    """Trunk features of N pairs, and by how much the reward of the chosen text must exceed the other's."""

    chosen_NH: Float[Tensor, "pairs hidden"]
    rejected_NH: Float[Tensor, "pairs hidden"]
    margin_N: Float[Tensor, " pairs"]

    def rows(self, index: Tensor) -> "FeaturePairs":
        return FeaturePairs(*(part[index] for part in self))

    def standardized(self, center: Float[Tensor, " hidden"], scale: Float[Tensor, " hidden"]) -> "FeaturePairs":
        return FeaturePairs((self.chosen_NH - center) / scale, (self.rejected_NH - center) / scale, self.margin_N)

    @property
    def difference_NH(self) -> Tensor:
        return self.chosen_NH - self.rejected_NH

    @property
    def texts_NH(self) -> Tensor:
        return torch.cat([self.chosen_NH, self.rejected_NH])


def pair_features(extract: FeatureExtractor, preferences: list[Preference]) -> FeaturePairs:
    """What the trunk makes of each pair's texts, float64, as it gives them."""
    samples = [Sample(p.prompt, p.chosen) for p in preferences] + [Sample(p.prompt, p.rejected) for p in preferences]
    with progress("reward model: trunk features", len(samples)) as advance:
        chosen, rejected = extract(samples, advance).cpu().double().split(len(preferences))
    return FeaturePairs(chosen, rejected, torch.tensor([p.margin for p in preferences], dtype=torch.float64))
