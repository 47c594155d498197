"""Which BRME head is trained on which pairs.

Shapes: _N pairs, _K heads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from poise.reward.config import ShardKind
from poise.reward.pairs import FeaturePairs


class Shards(NamedTuple):
    """Which head is trained on which pair, and which held-out pairs decide when its training stops."""

    fit_NK: Bool[Tensor, "fit heads"]
    held_NK: Bool[Tensor, "held heads"]


def make_shards(
    kind: ShardKind,
    fit: FeaturePairs,
    held: FeaturePairs,
    num_heads: int,
    generator: torch.Generator,
    sources: Sequence[str] = (),
    held_sources: Sequence[str] = (),
) -> Shards:
    """Assign pairs to heads. Every head gets at least one pair if there are as many pairs as heads.

    A head that owns a cluster or a source is judged on held-out pairs of that cluster or source, if there are any. On
    all held-out pairs its error would rise, and stop its training, once it fits its own part better than the rest.
    sources, held_sources: one name per pair, for `source`; the heads are divided among the sources.
    """
    count = len(fit.chosen_NH)
    all_held = torch.ones(len(held.chosen_NH), num_heads, dtype=torch.bool)
    if kind == "same":
        return Shards(torch.ones(count, num_heads, dtype=torch.bool), all_held)
    if kind == "bootstrap":
        return Shards(torch.rand(count, num_heads, generator=generator) < 0.8, all_held)
    if kind == "disjoint":
        return Shards(F.one_hot(torch.randperm(count, generator=generator) % num_heads, num_heads).bool(), all_held)
    if kind == "cluster":
        from sklearn.cluster import KMeans

        seed = int(torch.randint(2**31, (1,), generator=generator))
        kmeans = KMeans(min(num_heads, count), n_init=4, random_state=seed)
        fit_owner = kmeans.fit_predict(((fit.chosen_NH + fit.rejected_NH) / 2).numpy())
        held_owner = kmeans.predict(((held.chosen_NH + held.rejected_NH) / 2).numpy())
        fit_mask, held_mask = (
            F.one_hot(torch.tensor(owner).long(), num_heads).bool() for owner in (fit_owner, held_owner)
        )
    else:
        fit_mask = F.one_hot(_owner_by_source(sources, num_heads, generator), num_heads).bool()
        held_mask = torch.zeros_like(all_held)
        for i, source in enumerate(held_sources):
            mine = torch.tensor([other == source for other in sources])
            held_mask[i] = fit_mask[mine].any(0)
    return Shards(fit_mask, held_mask | ~held_mask.any(0))


def _owner_by_source(sources: Sequence[str], num_heads: int, generator: torch.Generator) -> Tensor:
    """Each pair's head. With more sources than heads, the next largest source joins the head with the fewest pairs.
    With fewer, the largest source is split at random."""
    owner = torch.zeros(len(sources), dtype=torch.long)
    members = {name: [i for i, source in enumerate(sources) if source == name] for name in dict.fromkeys(sources)}
    load = [0] * num_heads
    parts = sorted(members.values(), key=len, reverse=True)
    while len(parts) < num_heads and len(parts[0]) > 1:
        largest = parts.pop(0)
        order = torch.randperm(len(largest), generator=generator).tolist()
        half = len(largest) // 2
        parts += [[largest[i] for i in order[:half]], [largest[i] for i in order[half:]]]
        parts.sort(key=len, reverse=True)
    for part in parts:
        head = load.index(min(load))
        owner[torch.tensor(part)] = head
        load[head] += len(part)
    return owner
