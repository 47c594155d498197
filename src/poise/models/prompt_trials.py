"""Whether texts that share prompts, rows or batches have the hidden states of each text alone: tried, not guessed.

The ways of reading are those of `models/shared_prompt.py`; the texts are short, and reach beyond a narrowed window.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from poise.errors import PoiseError
from poise.models.families import (
    REFUSALS,
    alike,
    has_longrope,
    narrow_windows,
    probe_tokens,
    say_once,
    windows,
)
from poise.models.loading import HfModel
from poise.models.shared_prompt import Family, cached_hidden, pack, packed_hidden, separate_hidden

# Texts to try a trunk with, as `probe_tokens` reads these numbers. Some reach beyond a window of `narrow_windows`, the
# prompts differ in length, and completions of the last one share a row of `cached_hidden`.
_TRIED = [
    Family([1, 2, 3, 4, 5, 6, 7], [[5, 6, 7], [8, 9, 1, 2, 3, 4]]),
    Family([3, 1], [[2], [4, 5, 6, 7, 8, 9, 1]]),
    Family([5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6], [[2, 8], [9, 4, 1], [7]]),
]


def shares_prompts(classifier: HfModel) -> bool:
    """Does `cached_hidden` give the hidden states of separate rows? Tried on short texts, beyond a narrowed window.

    If not, says so once. Texts longer than `steady_context` are read in rows of their own in any case.
    """

    def read(families: list[Family]) -> Tensor:
        parts = cached_hidden(classifier, families, 0, 64)
        found = {key: state for keys, states in parts for key, state in zip(keys, states, strict=True)}
        return torch.stack([found[key] for key in sorted(found)])

    if _reads_alike(classifier, read):
        return True
    say_once(classifier, "each completion is read with a copy of its prompt; scoring takes longer")
    return False


def takes_packed_rows(classifier: HfModel) -> bool:
    """Does `packed_hidden` give the hidden states of separate rows? Tried like `shares_prompts`; says once if not.

    State-space layers, chunked and bidirectional attention do not, nor positions that follow the columns (ALiBi).
    """

    def read(families: list[Family]) -> Tensor:
        return packed_hidden(classifier, pack(families, 0).to(next(classifier.parameters()).device))

    if not has_longrope(classifier) and _reads_alike(classifier, read):
        return True
    say_once(classifier, "texts are not packed into rows; training a trunk takes longer")
    return False


@torch.no_grad()
def _reads_alike(classifier: HfModel, read: Callable[[list[Family]], Tensor]) -> bool:
    """Does a way of reading texts give the hidden states that each text has in a batch of its own?"""
    if windows(classifier) is None:
        return False
    device = next(classifier.parameters()).device
    families = [
        Family(probe_tokens(classifier, prompt), [probe_tokens(classifier, completion) for completion in completions])
        for prompt, completions in _TRIED
    ]
    apart = [Family(prompt, [completion]) for prompt, completions in families for completion in completions]
    try:
        with narrow_windows(classifier):
            alone = [separate_hidden(classifier, pack([text], 0, one_per_row=True).to(device)) for text in apart]
            return alike(classifier, read(families), torch.cat(alone))
    except REFUSALS:
        return False


@torch.no_grad()
def padded_or_raise(classifier: HfModel) -> None:
    """Raise PoiseError if the hidden states of a text change with the padding of its batch.

    That holds for sparse attention that chooses padding, too. Tried on a second batch before it is said: where two
    experts of a mixture are nearly tied for a token, rounding decides.
    """
    device = next(classifier.parameters()).device
    with narrow_windows(classifier):
        for numbers in (range(1, 10), range(9, 0, -1)):
            long = probe_tokens(classifier, [*numbers, *numbers])
            texts = [Family(text[:-1], [text[-1:]]) for text in (long, long[2:7])]
            apart = [separate_hidden(classifier, pack([text], 0, one_per_row=True).to(device)) for text in texts]
            found = separate_hidden(classifier, pack(texts, 0, one_per_row=True).to(device))
            if alike(classifier, found, torch.cat(apart), only_way=True):
                return
    raise PoiseError(
        f"{classifier.config.model_type}: the hidden states of a text change with the padding of its batch; such a "
        f"reward model cannot be read, choose another model"
    )
