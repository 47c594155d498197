"""Reward models as the server asks them: encoded samples in, logits out, and distances where there is a reference.

The local backend runs the trunk in this process; that of `poise.serve.vllm` asks vLLM servers for logits of the same
ids.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from poise.data.preferences import read_preferences
from poise.data.rows import Understood
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import HeadRewards
from poise.functional.typicality import Reference, distance
from poise.models.chat_format import HfTokenizer
from poise.models.encoding import Encoder, Tokens
from poise.models.reward_model import HeadLayout, heads_fingerprint
from poise.models.run_heads import taken_heads, validator_of
from poise.models.scorer import Ensemble, FeatureExtractor, Scorer
from poise.models.validator import say_validator
from poise.runtime.progress import console
from poise.serve.config import ServeConfig


class BackendAwayError(PoiseError):
    """Nobody reads for this server now."""


class Read(NamedTuple):
    """What a backend knows of samples, on the CPU."""

    logits: Float[Tensor, "samples labels"]
    distance: Float[Tensor, " samples"] | None = None  # to the reference texts (`poise.functional.typicality`)


Backend = Callable[[Sequence[Tokens]], Read]


class Member(NamedTuple):
    """One reward model: which trunk reads for it, its labels there, and its normalization in an ensemble."""

    trunk: int
    labels: slice
    layout: HeadLayout
    mean: float = 0.0
    std: float = 1.0


class RewardModels:
    """One or several reward models whose heads stand side by side.

    encoders, backends: one of each per trunk; members with equal trunks share one.
    layout: of all heads together; fingerprint: a hash of what the heads are.
    """

    def __init__(
        self,
        encoders: Sequence[Encoder],
        backends: Sequence[Backend],
        members: Sequence[Member],
        layout: HeadLayout,
        fingerprint: str,
    ):
        self.encoders, self.backends, self.members = list(encoders), list(backends), list(members)
        self.layout, self.fingerprint = layout, fingerprint

    @property
    def tokenizer(self) -> HfTokenizer:
        """That of the first trunk: its chat template is what rendered texts are read by."""
        return self.encoders[0].tokenizer

    @property
    def num_truncated(self) -> int:
        """Encodings so far that lost their oldest tokens."""
        return sum(encoder.num_truncated for encoder in self.encoders)

    def encode(self, sample: Sample) -> list[Tokens]:
        """Per trunk, the ids of a sample. Raises PoiseError for a sample that a chat template refuses."""
        return [encoder.encode(sample) for encoder in self.encoders]

    def __call__(self, encoded: Sequence[list[Tokens]]) -> HeadRewards:
        """(N, K) means and stds, on the CPU; with distances of a single reward model that has a reference."""
        read = [backend([tokens[i] for tokens in encoded]) for i, backend in enumerate(self.backends)]
        parts = []
        for member in self.members:
            heads = member.layout.decode(read[member.trunk].logits[:, member.labels])
            parts.append(HeadRewards((heads.mean - member.mean) / member.std, heads.std / member.std))
        far = read[0].distance
        return HeadRewards(
            torch.cat([h.mean for h in parts], -1), torch.cat([h.std for h in parts], -1),
            None if far is None else far.unsqueeze(-1),
        )  # fmt: skip


def local(config: ServeConfig) -> RewardModels:
    """The reward models that the settings name, in this process."""
    places = [taken_heads(reward, config.objective) for reward in config.rewards]
    if len(places) == 1:
        scorer = Scorer.load(places[0], config.max_length)
        fingerprint = heads_fingerprint(places[0])
    else:
        pairs = read_preferences(config.reference, understood=Understood(config.reference, can_skip=False))
        reference = [Sample(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
        scorer = Ensemble.fit(places, reference, config.max_length)
        parts = [*map(heads_fingerprint, places), *(f"{x:.5g}" for x in (*scorer.means, *scorer.stds))]
        fingerprint = hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()
    scorer.layout.check_objective(config.objective)
    return of_scorer(scorer, fingerprint)


def validator(config: ServeConfig) -> RewardModels | None:
    """The reward model that is only watched, if there is one.

    That of the reward's own run is watched where this process reads the reward, and so has room for a model; where vLLM
    does, a line names it.
    """
    path = config.validator
    if path == "" and len(config.rewards) == 1 and (path := validator_of(config.rewards[0])):
        if config.backend == "vllm":
            console.print(f"no validator is watched; --validator {path} does, in this process", markup=False)
            return None
        say_validator(path, "--validator None")
    if not path:
        return None
    return of_scorer(Scorer.load(path, config.max_length), heads_fingerprint(path))


def of_scorer(scorer: Scorer, fingerprint: str) -> RewardModels:
    """A loaded scorer, or all members of an ensemble."""
    scorers, means, stds = [scorer], [0.0], [1.0]
    if isinstance(scorer, Ensemble):
        scorers, means, stds = scorer.members, scorer.means, scorer.stds
    encoders: list[FeatureExtractor] = []
    weights: list[list[Tensor]] = []
    members = []
    for one, mean, std in zip(scorers, means, stds, strict=True):
        trunk = next((i for i, encoder in enumerate(encoders) if encoder is one.extract), len(encoders))
        if trunk == len(encoders):
            encoders.append(one.extract)
            weights.append([])
        start = sum(len(weight) for weight in weights[trunk])
        weights[trunk].append(one.weight)
        members.append(Member(trunk, slice(start, start + len(one.weight)), one.layout, mean, std))
    reference = scorer.reference if len(members) == 1 else None  # an ensemble has none
    backends = [_trunk(encoder, torch.cat(rows), reference) for encoder, rows in zip(encoders, weights, strict=True)]
    return RewardModels(encoders, backends, members, scorer.layout, fingerprint)


def _trunk(extract: FeatureExtractor, weight: Float[Tensor, "labels hidden"], reference: Reference | None) -> Backend:
    def read(tokens: Sequence[Tokens]) -> Read:
        features = extract.forward(tokens)
        far = None if reference is None else distance(features, reference).float()
        return Read((features.to(weight.device) @ weight.T).cpu(), far)

    return read


def finite_or_raise(heads: HeadRewards) -> None:
    """Raise PoiseError for heads that are not finite: a broken number must not become a reward."""
    if not all(part.isfinite().all() for part in heads if part is not None):
        raise PoiseError("a head is not finite: the reward model is broken")
