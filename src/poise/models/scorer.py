"""Text in, `HeadRewards` out: the one home of templates, truncation, padding, batching, prefix sharing and caching for
reward models, of one checkpoint or of several that act as one.

A score does not depend on the batch it is computed in, nor on padding, nor on sharing its prompt (tested to 1e-5 in
float32).
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from poise.data.types import Prompt, Sample
from poise.errors import PoiseError
from poise.functional.objectives import HeadRewards
from poise.functional.typicality import Reference, distance
from poise.models.context import context_length
from poise.models.encoding import Encoder, Tokens
from poise.models.families import feature_size, steady_context
from poise.models.feature_cache import FeatureCache, row_keys
from poise.models.formats import ENSEMBLE_FILE, read_ensemble, refuse_nested
from poise.models.head_adapters import apart, num_adapted_heads
from poise.models.loading import HfModel, HfTokenizer
from poise.models.prompt_trials import padded_or_raise, shares_prompts
from poise.models.reward_model import HeadLayout, LastLayer, load_last_layer, load_reference, load_reward_model
from poise.models.shared_prompt import Family, cached_hidden, num_tokens, pack, separate_hidden
from poise.runtime.run_folder import Json, write_json
from poise.runtime.settings import LengthOrAll, check_value, finite_or_raise

TOKENS_PER_BATCH = 4096

Progress = Callable[[int], None]


class _Threads:
    """Has a model been read here by several threads? A fork of this process has their pool without the threads, and
    would wait for them for ever: it reads with one, as the workers of a DataLoader do."""

    used = lost = False

    @classmethod
    def in_child(cls) -> None:
        cls.lost = cls.used

    @classmethod
    def before_reading(cls) -> None:
        if cls.lost and torch.get_num_threads() > 1:
            torch.set_num_threads(1)
        cls.used = cls.used or torch.get_num_threads() > 1


os.register_at_fork(after_in_child=_Threads.in_child)


class FeatureExtractor(Encoder):
    """The trunk alone: the last hidden state at a sample's last token, where the `score` layer reads."""

    def __init__(self, classifier: HfModel, tokenizer: HfTokenizer, max_length: int = 0, *, cached: bool = False):
        """max_length: longest sample in tokens; 0 takes the model's context.

        cached: keep features on disk, for whoever asks for the same texts through the same trunk.
        """
        check_value("max_length", max_length or 0, LengthOrAll)
        config = classifier.config.get_text_config()
        context = context_length(config)
        longest = min(max_length or context, context)
        super().__init__(tokenizer, longest, classifier.get_input_embeddings().num_embeddings, config.pad_token_id)
        self.classifier = classifier
        self._tried = False  # whether padding changes what a text means
        self._cache = FeatureCache.of(classifier) if cached else None

    def __call__(self, samples: Sequence[Sample], progress: Progress | None = None) -> Float[Tensor, "samples hidden"]:
        """Features in the order of `samples`, float32.

        progress: told after each batch how many samples it finished.
        Samples that are too long lose their oldest tokens, the prompt's first; `num_truncated` counts them. An empty
        completion is a PoiseError.
        """
        tokens = self.encode_all(samples)
        if self._cache is None:
            return self.forward(tokens, progress)
        keys = row_keys([[*prompt, *completion] for prompt, completion in tokens])
        with self._cache as cache:
            return cache.fetch(tokens, keys, lambda part: self.forward(part, progress), progress)

    @torch.no_grad()
    def forward(self, tokens: Sequence[Tokens], progress: Progress | None = None) -> Float[Tensor, "samples hidden"]:
        """Features of encoded samples. The same text twice is computed once; a shared prompt is, too."""
        _Threads.before_reading()
        device = self.classifier.device
        features = torch.empty(len(tokens), feature_size(self.classifier), dtype=torch.float32, device=device)
        prompts: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for i, (prompt, completion) in enumerate(tokens):
            prompts.setdefault(prompt, {}).setdefault(completion, []).append(i)
        families = [Family(list(prompt), [list(text) for text in texts]) for prompt, texts in prompts.items()]
        with torch.autocast(device.type, enabled=False):  # a score is the same whatever is trained around it
            for part, hidden in self._hidden(families):
                for (prompt, completion), feature in zip(part, hidden.float(), strict=True):
                    features[prompts[prompt][completion]] = feature
                if progress:
                    progress(sum(len(prompts[prompt][completion]) for prompt, completion in part))
        return features

    def _hidden(self, families: list[Family]) -> Iterator[tuple[list[Tokens], Float[Tensor, "texts hidden"]]]:
        """Part by part, texts and their last hidden states."""
        pad_id = self.tokenizer.pad_token_id
        longest = steady_context(self.classifier)
        copies = max(num_adapted_heads(self.classifier), 1)
        several = [
            family
            for family in families
            if len(family.completions) > 1
            and family.prompt
            and len(family.prompt) + max(map(len, family.completions)) <= longest
        ]
        if several and not self._shares_prompts:
            several = []
        for keys, hidden in cached_hidden(self.classifier, several, pad_id, TOKENS_PER_BATCH // copies):
            yield [Tokens(tuple(several[i].prompt), tuple(several[i].completions[j])) for i, j in keys], hidden
        read = {tuple(family.prompt) for family in several}
        alone = [
            Family(prompt, [text])
            for prompt, completions in families
            if tuple(prompt) not in read
            for text in completions
        ]
        for batch in _batches(alone, copies):
            if len({num_tokens(family) for family in batch}) > 1 and not self._tried:
                padded_or_raise(self.classifier)
                self._tried = True
            rows = pack(batch, pad_id, one_per_row=True).to(self.classifier.device)
            texts = [Tokens(tuple(family.prompt), tuple(family.completions[0])) for family in batch]
            yield texts, separate_hidden(self.classifier, rows)

    @functools.cached_property
    def _shares_prompts(self) -> bool:
        return shares_prompts(self.classifier)


class Scorer:
    """A reward model ready to score: features, heads, layout."""

    def __init__(
        self,
        extract: FeatureExtractor,
        weight: Float[Tensor, "labels hidden"],
        layout: HeadLayout,
        last_layer: LastLayer | None = None,
        reference: Reference | None = None,
    ):
        self.extract, self.weight, self.layout, self.last_layer = extract, weight, layout, last_layer
        self.reference = reference

    @staticmethod
    def load(path: str, max_length: int = 0, *, cached: bool = False, place: torch.device | None = None) -> "Scorer":
        """From a checkpoint folder, a hub id, a `poise train-reward` run, or an ensemble of such.

        cached: keep features on disk, for whoever scores the same texts through the same trunk.
        place: where the weights lie; default `device`.
        """
        if (Path(path) / ENSEMBLE_FILE).exists():
            return Ensemble.load(path, max_length, cached=cached, place=place)
        classifier, tokenizer, layout = load_reward_model(path, place=place)
        extract = FeatureExtractor(classifier, tokenizer, max_length, cached=cached)
        weight = classifier.score.weight.data.float()
        weight = apart(weight, layout.num_heads) if layout.adapters else weight
        reference = load_reference(path, layout, weight.shape[1])
        return Scorer(extract, weight, layout.with_reference(reference), load_last_layer(path), reference)

    def with_heads_of(self, path: str) -> "Scorer":
        """The heads of another checkpoint on this one's trunk, so that one set of features serves both.

        Raises PoiseError unless the two trunks hold the same weights.
        """
        other = Scorer.load(path, self.extract.max_length)
        if not self.shares_trunk_with(other):
            raise PoiseError(f"{path} does not share its trunk with the other reward models of the run")
        return Scorer(self.extract, other.weight, other.layout, other.last_layer, other.reference)

    def shares_trunk_with(self, other: "Scorer") -> bool:
        """Would the other's trunk make the same features?"""
        mine, theirs = (scorer.extract.classifier.base_model.state_dict() for scorer in (self, other))
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    @property
    def num_truncated(self) -> int:
        """Samples so far that lost their oldest tokens."""
        return self.extract.num_truncated

    def __call__(self, samples: Sequence[Sample], progress: Progress | None = None) -> HeadRewards:
        """(len(samples), K) means and stds, on the CPU; with distances where the checkpoint has a reference."""
        return self.decode(self.extract(samples, progress))

    def decode(self, features: Float[Tensor, "*batch hidden"]) -> HeadRewards:
        """Heads on features that the same trunk made."""
        device = self.weight.device
        with torch.autocast(device.type, enabled=False):
            heads = self.layout.decode(features.to(device) @ self.weight.T)
        far = None if self.reference is None else distance(features, self.reference).float().unsqueeze(-1)
        return HeadRewards(heads.mean.cpu(), heads.std.cpu(), far)


class Ensemble(Scorer):
    """Several reward models as one: all their heads side by side, all point heads or all Gaussian ones.

    Each member is put on one scale first: less the mean, divided by the std, of its own reward (the mean of its heads)
    over a reference set. Otherwise the member with the widest scale would decide every worst case.
    """

    def __init__(self, members: Sequence[Scorer], means: Sequence[float], stds: Sequence[float]):
        self.members, self.means, self.stds = list(members), list(means), list(stds)
        layouts = [member.layout for member in members]
        num_heads = sum(layout.num_heads for layout in layouts)
        if len({layout.kind for layout in layouts}) > 1:
            raise PoiseError(
                "an ensemble of point heads and Gaussian heads: the nominal head would always be a point head, whose "
                "std is 0; take members of one kind"
            )
        kind = layouts[0].kind
        std_scale = [s for layout in layouts for s in layout.std_scale or (1.0,) * layout.num_heads]
        # In normalized units a member's Bradley-Terry scale grows by the std it was divided by.
        scale = sum(layout.reward_scale * std for layout, std in zip(layouts, stds, strict=True)) / len(layouts)
        offset = (0.0,) * (num_heads * (2 if kind == "gaussian" else 1))
        layout = HeadLayout(num_heads, kind, offset, reward_scale=scale, std_scale=tuple(std_scale))
        super().__init__(members[0].extract, members[0].weight, layout)

    @staticmethod
    def load(path: str, max_length: int = 0, *, cached: bool = False, place: torch.device | None = None) -> "Ensemble":
        """From a folder with an ensemble.json. Members with equal trunks share one."""
        saved = read_ensemble(path)
        return Ensemble(_load_members(saved.members, max_length, cached=cached, place=place), saved.means, saved.stds)

    @staticmethod
    def fit(
        paths: Sequence[str], reference: Sequence[Sample], max_length: int = 0, progress: Progress | None = None
    ) -> "Ensemble":
        """Of checkpoints, normalized on reference samples."""
        unscaled = Ensemble(_load_members(paths, max_length), [0.0] * len(paths), [1.0] * len(paths))
        rewards = [heads.mean.mean(-1) for heads in unscaled._opinions(reference, progress)]
        stds = [reward.std().item() for reward in rewards]
        if not all(std > 0 for std in stds):
            raise PoiseError("a member of the ensemble gives every reference sample the same reward")
        return Ensemble(unscaled.members, [reward.mean().item() for reward in rewards], stds)

    def save(self, folder: Path, paths: Sequence[str]) -> None:
        """Write ensemble.json: where the members are, seen from `folder`, and their normalization."""
        value: Json = {"members": list(paths), "means": self.means, "stds": self.stds}
        finite_or_raise(value, ENSEMBLE_FILE)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ENSEMBLE_FILE, value)

    @property
    def num_truncated(self) -> int:
        return sum(extract.num_truncated for extract in {id(m.extract): m.extract for m in self.members}.values())

    def __call__(self, samples: Sequence[Sample], progress: Progress | None = None) -> HeadRewards:
        opinions = self._opinions(samples, progress)
        scaled = [
            HeadRewards((heads.mean - mean) / std, heads.std / std)
            for heads, mean, std in zip(opinions, self.means, self.stds, strict=True)
        ]
        return HeadRewards(torch.cat([h.mean for h in scaled], -1), torch.cat([h.std for h in scaled], -1))

    def decode(self, features: Float[Tensor, "*batch hidden"]) -> HeadRewards:  # noqa: ARG002
        raise PoiseError("an ensemble of several trunks has no features of one; score texts instead")

    def _opinions(self, samples: Sequence[Sample], progress: Progress | None) -> list[HeadRewards]:
        features: dict[int, Tensor] = {}
        for member in self.members:
            if id(member.extract) not in features:
                # Each trunk reads every sample; one bar counts the first, and the others are as long.
                features[id(member.extract)] = member.extract(samples, None if features else progress)
        return [member.decode(features[id(member.extract)]) for member in self.members]


def _load_members(
    paths: Sequence[str], max_length: int, *, cached: bool = False, place: torch.device | None = None
) -> list[Scorer]:
    members: list[Scorer] = []
    for path in paths:
        refuse_nested(path)
        member = Scorer.load(path, max_length, cached=cached, place=place)
        twin = next((other for other in members if other.shares_trunk_with(member)), None)
        if twin is not None:
            member = Scorer(twin.extract, member.weight, member.layout, member.last_layer, member.reference)
        members.append(member)
    return members


def generated(prompt: Prompt, completion: str) -> Sample:
    """A policy's completion as a sample to score: one of no text at all counts as a full stop."""
    return Sample(prompt, completion if completion.strip() else ".")


def _batches(families: list[Family], copies: int = 1) -> list[list[Family]]:
    """Texts of similar length in batches of at most TOKENS_PER_BATCH tokens with padding, longest first."""
    batches: list[list[Family]] = []
    for family in sorted(families, key=lambda family: -num_tokens(family)):
        if batches and (len(batches[-1]) + 1) * num_tokens(batches[-1][0]) * copies <= TOKENS_PER_BATCH:
            batches[-1].append(family)
        else:
            batches.append([family])
    return batches
