"""Gold: a reference score that stands for human judgment of generated text. No training reads it.

An RL policy can raise the learned reward (the proxy) without writing better text. Gold is the independent score that
shows it. Gold is deterministic:

    gold = VADER compound sentiment - degeneracy,        clipped to [-1, 1]

VADER (Hutto & Gilbert 2014) is a rule and lexicon model fitted to ratings of ~20 people per text; `compound` is in
[-1, 1]. VADER reads single words. Text that a person would not accept as a sentence therefore gets a penalty in [0, 2]:
for repetition, for non-words, for fewer than four words. A high gold means: positive, and a readable sentence.

These rules score short reviews. For other texts a reward model serves as the gold standard (`gold_of`). It must be
trained on data that no proxy has seen.

No module that trains or chooses may import this one (tests/test_layers.py).
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from poise.errors import PoiseError
from poise.functional.objectives import mean
from poise.models.reward_model import heads_fingerprint
from poise.models.scorer import Scorer, generated
from poise.runtime.progress import progress
from poise.runtime.run_folder import Json
from poise.studies.config import REVIEWS

MIN_WORDS = 4
_WORD = re.compile(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*")


def gold_of(rows: Sequence[Json], gold: str) -> Float[ndarray, " rows"]:
    """Gold of rows of `prompt` and `completion`.

    gold: a reward model, whose mean over heads is taken; REVIEWS: `gold_rewards`.
    Raises PoiseError if the reward model gives NaN or infinity.
    """
    if gold == REVIEWS:
        return gold_rewards([row["completion"] for row in rows])
    scorer = Scorer.load(gold, cached=True)
    with progress("gold", len(rows)) as advance:
        heads = scorer([generated(row["prompt"], row["completion"]) for row in rows], advance)
    values = mean(heads).double().numpy()
    if not np.isfinite(values).all():
        raise PoiseError(f"gold {gold} says NaN or infinity of some completions; take another reward model")
    return values


def label_with_gold(rows: Sequence[Json], gold: str) -> bool:
    """Set `gold` of every row, and as `judge` the fingerprint of this gold. Returns False if the rows had them."""
    by = fingerprint(gold)
    if all(row.get("judge") == by for row in rows):
        return False
    for row, value in zip(rows, gold_of(rows, gold), strict=True):
        row.update(gold=float(value), judge=by)
    return True


def fingerprint(gold: str) -> str:
    """Fingerprint of a gold: of a reward model's heads, or of this file and VADER's version."""
    if gold != REVIEWS:
        return heads_fingerprint(gold)
    rules = Path(__file__).read_bytes() + metadata.version("vaderSentiment").encode()
    return hashlib.blake2b(rules, digest_size=16).hexdigest()


def gold_rewards(texts: Sequence[str]) -> Float[ndarray, " texts"]:
    """Gold of each text, in [-1, 1]."""
    return np.array([gold_reward(text) for text in texts])


def gold_reward(text: str) -> float:
    """VADER compound minus `degeneracy`, at least -1.

    >>> gold_reward("A warm, funny and beautifully acted film.") > 0.5
    True
    >>> gold_reward("perfect perfect feature perfect this perfect perfect perfect") < 0
    True
    """
    return max(-1.0, _sentiment().polarity_scores(text)["compound"] - degeneracy(text))


def degeneracy(text: str) -> float:
    """How far a text is from a sentence, in [0, 2]; 0 for ordinary prose.

    The sum, capped at 2, of
      repetition  4 * max(0, repeated share of words - 0.2): words that occurred before in the text, function words
                  and all; ordinary sentences of this length repeat up to a fifth;
      echoes      0.5 for every word directly following itself;
      non-words   4 * max(0, share - 0.25) of characters that are neither letters, spaces nor common punctuation,
                  and of words longer than 20 letters or without a vowel;
      shortness   1 for fewer than 4 words, 2 for none.

    >>> degeneracy("This is a film that I liked a lot.")
    0.0
    """
    words = [word.lower() for word in _WORD.findall(text)]
    if not words:
        return 2.0
    repeated = 1 - len(set(words)) / len(words)
    echoes = sum(first == second for first, second in itertools.pairwise(words))
    odd_characters = sum(not (c.isalpha() or c.isspace() or c in ".,;:!?'\"’“”()-–—&") for c in text) / len(text)
    odd_words = sum(len(word) > 20 or not re.search(r"[aeiouyà-ÿ]", word) for word in words) / len(words)
    penalty = 4 * max(0.0, repeated - 0.2) + 0.5 * echoes
    penalty += 4 * max(0.0, odd_characters - 0.25) + 4 * max(0.0, odd_words - 0.25)
    penalty += 1.0 if len(words) < MIN_WORDS else 0.0
    return min(2.0, penalty)


@functools.cache
def _sentiment() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
