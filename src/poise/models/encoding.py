"""A sample as token ids, as a reward model reads it: chat template, truncation, and no weights."""

from collections.abc import Sequence
from typing import NamedTuple

from poise.data.types import Sample
from poise.errors import PoiseError
from poise.models.chat_format import encode_conversations
from poise.models.loading import HfTokenizer, embedded_or_raise
from poise.runtime.progress import shown_if_long

_TOGETHER = 256  # texts that the tokenizer is given at once: enough for many cores, few enough for a bar that moves


def cut_from_the_left(tokenizer: HfTokenizer, ids: list[int], length: int) -> tuple[list[int], list[int]]:
    """(token that is kept at the beginning, last tokens) of a text, together at most `length`.

    A token that begins every text and stands nowhere else (`<bos>`) is kept, as Hugging Face's own truncation keeps it:
    models that were trained with it may read nothing right without it. The first part is empty for a text that is not
    too long, and for a tokenizer without such a token.
    """
    bos = tokenizer.bos_token_id
    keeps = 1 < length < len(ids) and ids[0] == bos and bos not in ids[1:]
    return (ids[:1], ids[1 - length :]) if keeps else ([], ids[-length:])


class Tokens(NamedTuple):
    """A sample as its trunk reads it."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


class Encoder:
    """From samples to token ids. `num_truncated` counts the samples that lost their oldest tokens."""

    def __init__(self, tokenizer: HfTokenizer, max_length: int, num_embeddings: int, pad_id: int | None):
        """max_length: longest sample in tokens. pad_id: the token that the classifier takes for padding."""
        self.tokenizer, self.max_length = tokenizer, max_length
        self.num_truncated = 0
        self._num_embeddings, self._pad_id = num_embeddings, pad_id

    def without_weights(self) -> "Encoder":
        """An encoder of the same ids that holds no model."""
        return Encoder(self.tokenizer, self.max_length, self._num_embeddings, self._pad_id)

    def encode(self, sample: Sample) -> Tokens:
        """`encode_all` of one sample."""
        return self._encode([sample])[0]

    def encode_all(self, samples: Sequence[Sample]) -> list[Tokens]:
        """Token ids through the chat template, cut to `max_length` from the left; with a bar where that takes long.

        Padding tokens at the end are left out: a classifier reads its score before them. In those that others trained
        with padding that is the end of a turn, that is the last token of the answer.

        Raises PoiseError for an empty completion, a conversation that the template refuses, or a token that the trunk
        has no embedding of.
        """
        ends = [*range(_TOGETHER, len(samples), _TOGETHER), len(samples)]
        found: list[Tokens] = []
        for end in shown_if_long("tokens", ends, lambda: len(samples), lambda end: end):
            found += self._encode(samples[len(found) : end])
        return found

    def _encode(self, samples: Sequence[Sample]) -> list[Tokens]:
        if any(not sample.completion.strip() for sample in samples):
            raise PoiseError("an empty completion cannot be scored")
        read = encode_conversations(self.tokenizer, [(sample.prompt, sample.completion) for sample in samples])
        return [self._cut(prompt, completion) for prompt, completion in read]

    def _cut(self, prompt: list[int], completion: list[int]) -> Tokens:
        embedded_or_raise([*prompt, *completion], self._num_embeddings, self.tokenizer)
        while len(completion) > 1 and completion[-1] == self._pad_id:
            completion.pop()
        first, last = cut_from_the_left(self.tokenizer, [*prompt, *completion], self.max_length)
        self.num_truncated += len(first) + len(last) < len(prompt) + len(completion)
        at = max(len(last) - len(completion), 0)
        return Tokens((*first, *last[:at]), tuple(last[at:]))
