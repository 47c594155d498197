"""Does a reward model still gain by more pairs? Its head, fitted anew on a quarter, a half and all of them.

If twice the pairs select no better, what is wrong with the reward is not a want of pairs, and no uncertainty about
heads can find it: look at the labels and at the features.

Shapes: _N pairs, _H hidden, _S numbers of pairs, _F folds, _T texts.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from poise.errors import PoiseError
from poise.reward.heads import best_prior, fit_bradley_terry
from poise.reward.pairs import FeaturePairs
from poise.runtime.progress import progress

FOLDS = 10
LEAST_GROUPS = 2 * FOLDS
SHARES = (0.25, 0.5, 1.0)  # of the pairs outside a fold


class Room(NamedTuple):
    """num_pairs: that the heads of each size were fitted to, on average over folds.

    accuracy_SF: share of a fold's pairs that are ordered rightly by heads that were fitted to other ones.
    right_N: of each pair, 1 where the heads of all pairs outside its fold order it rightly, 1/2 for a tie, else 0.
    reward_SFT: what the heads of each fold say of other texts.
    """

    num_pairs: list[float]
    accuracy_SF: Float[ndarray, "sizes folds"]
    right_N: Float[ndarray, " pairs"]
    reward_SFT: Float[ndarray, "sizes folds texts"]


def room(
    pairs: FeaturePairs, groups: Int[ndarray, " pairs"], texts_TH: Float[Tensor, "texts hidden"], seed: int
) -> Room:
    """Cross-validated Bradley-Terry heads for each share of the pairs.

    groups: pairs of one number, such as those of a prompt, are held out and left out together. Each size has a prior
    of its own, chosen on a part of the pairs of the first fold.
    Raises PoiseError for fewer than LEAST_GROUPS.
    """
    names, sizes = np.unique(groups, return_counts=True)
    size = dict(zip(names, sizes, strict=True))
    if len(names) < LEAST_GROUPS:
        raise PoiseError(f"{len(names)} prompts are too few to take a quarter of them; {LEAST_GROUPS} are needed")
    rng = np.random.default_rng(seed)
    names = rng.permutation(names)
    center, scale = pairs.texts_NH.mean(0), pairs.texts_NH.std(0).clamp_min(1e-6)
    pairs, texts = pairs.standardized(center, scale), (texts_TH.double() - center) / scale
    accuracy = np.zeros((len(SHARES), FOLDS))
    right = np.zeros(len(groups))
    reward = np.zeros((len(SHARES), FOLDS, len(texts)))
    counts = np.zeros(len(SHARES))
    priors: dict[float, float] = {}
    with progress("heads on a part of the pairs", FOLDS * len(SHARES)) as advance:
        for fold in range(FOLDS):
            held = np.flatnonzero(np.isin(groups, names[fold::FOLDS]))
            rest = rng.permutation(np.setdiff1d(names, names[fold::FOLDS]))
            paired = np.cumsum([size[name] for name in rest])  # some prompts have many pairs
            # Nested: a larger part holds the smaller ones.
            for i, share in enumerate(SHARES):
                taken = rest[: 1 + np.abs(paired - share * paired[-1]).argmin()]
                fit = np.flatnonzero(np.isin(groups, taken))
                if share not in priors:
                    inner = np.isin(groups[fit], taken[: max(1, len(taken) // 5)])
                    priors[share], _ = best_prior(_rows(pairs, fit[~inner]), _rows(pairs, fit[inner]))
                weight = fit_bradley_terry(_rows(pairs, fit), priors[share])
                margin = (_rows(pairs, held).difference_NH @ weight).numpy()
                right[held] = (np.sign(margin) + 1) / 2  # a tie is half right; the last size, of all pairs, stays
                accuracy[i, fold] = right[held].mean()
                reward[i, fold] = (texts @ weight).numpy()
                counts[i] += len(fit) / FOLDS
                advance(1)
    return Room(counts.tolist(), accuracy, right, reward)


def _rows(pairs: FeaturePairs, index: Int[ndarray, " rows"]) -> FeaturePairs:
    return pairs.rows(torch.from_numpy(index))
