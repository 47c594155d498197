"""Text in, `HeadRewards` out: the one home of templates, truncation, padding and batching for reward models.

A score does not depend on the batch it is computed in, nor on padding (tested to 1e-5 in float32).
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from poise.data import Sample
from poise.errors import PoiseError
from poise.models import HfModel, HfTokenizer, Prompt, completion_text, encode, prompt_text
from poise.objectives import HeadRewards
from poise.reward_model import HeadLayout, load_reward_model

TOKENS_PER_BATCH = 4096


class FeatureExtractor:
    """The trunk alone: the last hidden state at a sample's last token, where the `score` layer reads."""

    def __init__(self, classifier: HfModel, tokenizer: HfTokenizer, max_length: int = 0):
        """max_length: longest sample in tokens; 0 takes the model's context."""
        self.classifier, self.tokenizer = classifier, tokenizer
        context = classifier.config.max_position_embeddings
        self.max_length = min(max_length or context, context)
        self.num_truncated = 0

    @torch.no_grad()
    def __call__(
        self, samples: Sequence[Sample], progress: Callable[[int], None] | None = None
    ) -> Float[Tensor, "samples hidden"]:
        """Features in the order of `samples`, float32, on the model's device.

        progress: told after each batch how many samples it finished.
        Samples that are too long lose their oldest tokens, the prompt's first; `num_truncated` counts them. An empty
        completion is a PoiseError.
        """
        device = self.classifier.score.weight.device
        tokens = [self._encode(sample) for sample in samples]
        features = torch.empty(len(tokens), self.classifier.config.hidden_size, device=device)
        for batch in _batches([len(ids) for ids in tokens]):
            longest = max(len(tokens[i]) for i in batch)
            ids = torch.full((len(batch), longest), self.tokenizer.pad_token_id, device=device)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(batch):
                ids[row, : len(tokens[i])] = torch.tensor(tokens[i], device=device)
                mask[row, : len(tokens[i])] = 1
            features[torch.tensor(batch, device=device)] = pooled_features(self.classifier, ids, mask)
            if progress:
                progress(len(batch))
        return features

    def _encode(self, sample: Sample) -> list[int]:
        if not sample.completion.strip():
            raise PoiseError("an empty completion cannot be scored")
        prompt = encode(self.tokenizer, prompt_text(self.tokenizer, sample.prompt))
        completion = encode(self.tokenizer, completion_text(self.tokenizer, sample.prompt, sample.completion))
        tokens = prompt + completion
        self.num_truncated += len(tokens) > self.max_length
        return tokens[-self.max_length :]


class Scorer:
    """A reward model ready to score: features, heads, layout."""

    def __init__(self, extract: FeatureExtractor, weight: Float[Tensor, "labels hidden"], layout: HeadLayout):
        self.extract, self.weight, self.layout = extract, weight, layout

    @classmethod
    def load(cls, path: str, max_length: int = 0) -> "Scorer":
        """From a checkpoint folder, a hub id or a `poise train-reward` run."""
        classifier, tokenizer, layout = load_reward_model(path)
        return cls(FeatureExtractor(classifier, tokenizer, max_length), classifier.score.weight.data.float(), layout)

    def with_heads_of(self, path: str) -> "Scorer":
        """The heads of another checkpoint on this one's trunk, so that one set of features serves both.

        Raises PoiseError unless the two trunks hold the same weights.
        """
        other = Scorer.load(path, self.extract.max_length)
        mine, theirs = (scorer.extract.classifier.base_model.state_dict() for scorer in (self, other))
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[name], theirs[name]) for name in mine):
            raise PoiseError(f"{path} does not share its trunk with the other reward models of the run")
        return Scorer(self.extract, other.weight, other.layout)

    def __call__(self, samples: Sequence[Sample], progress: Callable[[int], None] | None = None) -> HeadRewards:
        """(len(samples), K) means and stds, on the CPU."""
        return self.decode(self.extract(samples, progress))

    def decode(self, features: Float[Tensor, "*batch hidden"]) -> HeadRewards:
        """Heads on features that the same trunk made."""
        heads = self.layout.decode(features @ self.weight.T)
        return HeadRewards(heads.mean.cpu(), heads.std.cpu())


def generated(prompt: Prompt, completion: str) -> Sample:
    """A policy's completion as a sample to score: one of no text at all counts as a full stop."""
    return Sample(prompt, completion if completion.strip() else ".")


def pooled_features(
    classifier: HfModel, ids: Int[Tensor, "batch tokens"], mask: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch hidden"]:
    """Last hidden state at each row's last real token, whichever side the padding is on, float32."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    hidden = classifier.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)
    return hidden.last_hidden_state[torch.arange(len(ids), device=ids.device), last].float()


def _batches(lengths: list[int]) -> list[list[int]]:
    """Indices in batches of similar length, at most TOKENS_PER_BATCH tokens with padding, longest first."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= TOKENS_PER_BATCH:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
