"""Preferences on their way to a head: split into training and validation, then turned into trunk features.

The split. Nothing that is trained may have seen what validation asks, so whole groups of pairs are held out:

    by prompt   Pairs of one prompt are one group, every vote on a pair among them. A prompt that another one goes on
                from (the first turns of a longer conversation) belongs to the same group.
    by text     Where there are fewer than `FEW_PROMPTS` such groups (e.g. reviews of a film), or where one prompt has
                nearly all pairs. Pairs that share a text are one group, and so are pairs linked by a chain of shared
                texts. Prompts are then on both sides; no text is.

Shapes: _N pairs, _H hidden.
"""

import sys
from collections.abc import Hashable, Iterable
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from poise.data.groups import components
from poise.data.types import Preference, Prompt, Sample
from poise.errors import PoiseError
from poise.models.chat_format import encode_conversation
from poise.models.loading import HfTokenizer
from poise.models.scorer import FeatureExtractor
from poise.runtime.progress import console, progress

# With fewer prompts, a held-out fifth would be one or two of them: its accuracy would tell how hard those two are, and
# training would lose all that the file says about them.
FEW_PROMPTS = 10

SplitUnit = Literal["prompt", "text"]


class PreferenceSplit(NamedTuple):
    """Preferences, and which of them train and which validate.

    train, validation: row numbers, in random order.
    generator: the one that drew the split; the training of the heads draws on from it.
    unit: what no two rows on different sides share.
    """

    preferences: list[Preference]
    train: Int[Tensor, " train"]
    validation: Int[Tensor, " validation"]
    generator: torch.Generator
    unit: SplitUnit = "prompt"

    @classmethod
    def draw(cls, preferences: list[Preference], validation_share: float, seed: int) -> "PreferenceSplit":
        """Hold out about `validation_share` of the preferences, in whole groups taken at random.

        The same preferences, share and seed give the same split.
        Raises PoiseError if fewer than two preferences are left to train on, or if the groups are so large that
        neither unit gives between half and twice the share.
        """
        count = len(preferences)
        size = max(1, round(count * validation_share))
        if count - size < 2:
            raise PoiseError(f"{count} preferences are too few to train on")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=generator)
        groups: dict[SplitUnit, ndarray] = {"prompt": prompt_groups(preferences), "text": text_groups(preferences)}
        units: list[SplitUnit] = ["prompt", "text"]
        if groups["prompt"].max() + 1 < FEW_PROMPTS:
            units.reverse()
        for unit in units:
            held = torch.from_numpy(_hold_out(groups[unit][order.numpy()], size))
            if size / 2 <= held.sum() <= min(2 * size, count - 2):
                return cls(preferences, order[~held], order[held], generator, unit)
        largest = np.bincount(groups["text"]).max()
        raise PoiseError(
            f"no validation part can be held out: {largest} of {count} preferences are linked by texts they share, and "
            "there are too few prompts to hold out whole ones; give preferences on more prompts or more texts"
        )

    @property
    def fit_on(self) -> list[Preference]:
        """The training rows."""
        return [self.preferences[i] for i in self.train]

    @property
    def held_out(self) -> list[Preference]:
        """The validation rows."""
        return [self.preferences[i] for i in self.validation]

    @property
    def num_units(self) -> tuple[int, int]:
        """How many prompts (or texts) are on the training side, and how many on the validation side."""
        train, held = (len(_units_of(rows, self.unit)) for rows in (self.fit_on, self.held_out))
        return train, held

    def __str__(self) -> str:
        train, held = self.num_units
        return (
            f"{len(self.train)} preferences train ({train} {self.unit}s), {len(self.validation)} validate "
            f"({held} {self.unit}s); no {self.unit} is on both sides"
        )


# ---- groups of preferences that stay on one side ----


def prompt_groups(preferences: list[Preference]) -> Int[ndarray, " preferences"]:
    """The number of each preference's conversation: equal where one prompt is, or begins, the other."""
    prompts = [_transcript(p.prompt) for p in preferences]
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    links = ((number[start], number[prompt]) for start, prompt in _beginnings(number))
    return components(links, len(number))[[number[prompt] for prompt in prompts]]


def text_groups(preferences: list[Preference]) -> Int[ndarray, " preferences"]:
    """The number of each preference's texts: equal where a chain of preferences, each sharing a text with the next,
    leads from one to the other."""
    number = {text: i for i, text in enumerate(dict.fromkeys(text for p in preferences for text in _texts(p)))}
    links = ((number[p.chosen], number[p.rejected]) for p in preferences)
    return components(links, len(number))[[number[p.chosen] for p in preferences]]


def _units_of(preferences: list[Preference], unit: SplitUnit) -> set[Hashable]:
    if unit == "prompt":
        return {_transcript(p.prompt) for p in preferences}
    return {text for p in preferences for text in _texts(p)}


def _texts(preference: Preference) -> tuple[str, str]:
    return preference.chosen, preference.rejected


def _transcript(prompt: Prompt) -> str:
    """A prompt as one text, so that a conversation begins with the transcript of its first turns."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return "".join(f"\0{turn['role']}\0{turn['content']}" for turn in turns)


def _beginnings(transcripts: Iterable[str]) -> Iterable[tuple[str, str]]:
    """(beginning, transcript) for every transcript that goes on from another; never from the middle of a word."""
    above: list[str] = []  # each begins the next; in sorted order a beginning comes right before what goes on from it
    for transcript in sorted(transcripts):
        while above and not transcript.startswith(above[-1]):
            above.pop()
        for start in above:
            if not (start[-1].isalnum() and transcript[len(start)].isalnum()):
                yield start, transcript
        above.append(transcript)


def _hold_out(groups: Int[ndarray, " rows"], size: int) -> ndarray:
    """Which rows to hold out: whole groups in the order of their first rows, as far as they fit into `size` rows, then
    the smallest other group if that brings the number nearer to `size`."""
    rows_of = np.bincount(groups)
    held, num_held = np.zeros(len(rows_of), dtype=bool), 0
    for group in dict.fromkeys(groups.tolist()):
        if num_held + rows_of[group] <= size:
            held[group] = True
            num_held += rows_of[group]
    others = np.flatnonzero(~held)  # there is one: `size` is less than all rows
    smallest = others[np.argmin(rows_of[others])]
    held[smallest] = rows_of[smallest] < 2 * (size - num_held)
    return held[groups]


# ---- pairs that say nothing ----


def told_apart(preferences: list[Preference], tokenizer: HfTokenizer, max_length: int, name: str) -> list[Preference]:
    """Without the pairs whose two texts are the same tokens to the model: how many, a line says.

    Texts lose their oldest tokens beyond `max_length`, so that two long ones may end alike; and a tokenizer may read
    two spellings as one. Such a pair has no gradient, and is a tie whatever is trained. name: what messages call the
    preferences. Raises PoiseError if no pair is left.
    """
    kept = [one for one in preferences if _end(one.chosen) != _end(one.rejected) or _differ(one, tokenizer, max_length)]
    if left_out := len(preferences) - len(kept):
        longest = f"cut to their last {max_length} tokens" if max_length < sys.maxsize else "as tokens"
        line = f"{name}: {left_out} of {len(preferences)} pairs left out, whose two texts are the same {longest}"
        if not kept:
            raise PoiseError(f"{line}; raise --max-length, or give other pairs")
        console.print(line, markup=False)
    return kept


def _differ(preference: Preference, tokenizer: HfTokenizer, max_length: int) -> bool:
    texts = (encode_conversation(tokenizer, preference.prompt, text) for text in _texts(preference))
    chosen, rejected = ([*prompt, *completion][-max_length:] for prompt, completion in texts)
    return chosen != rejected


def _end(text: str) -> str:
    """The last letters: where they differ, so do the last tokens, and no tokenizer need be asked."""
    return "".join(letter for letter in text[-64:].casefold() if letter.isalnum())[-4:]


# ---- features ----


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
