"""Samples as token ids: what is cut, what is counted, and where padding at the end is left out."""

import pytest

from conftest import make_tokenizer
from poise.data.types import Sample
from poise.models import encoding
from poise.models.encoding import Encoder, Tokens

PAD = 7


@pytest.mark.parametrize(
    ("max_length", "completion", "expected", "cut"),
    [
        (5, [4, 5], Tokens((1, 2, 3), (4, 5)), 0),
        (4, [4, 5], Tokens((2, 3), (4, 5)), 1),
        (1, [4, 5], Tokens((), (5,)), 1),
        (9, [4, PAD, PAD], Tokens((1, 2, 3), (4,)), 0),
        (4, [4, PAD, PAD], Tokens((1, 2, 3), (4,)), 0),  # padding counts for nothing
        (9, [PAD, 4], Tokens((1, 2, 3), (PAD, 4)), 0),
        (9, [PAD, PAD], Tokens((1, 2, 3), (PAD,)), 0),  # something is left to be scored
    ],
)
def test_the_oldest_tokens_are_cut_and_padding_at_the_end_is_none_of_the_text(
    max_length: int, completion: list[int], expected: Tokens, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "encode_conversation", lambda *_: ([1, 2, 3], list(completion)))
    encoder = Encoder(make_tokenizer(), max_length, 100, PAD)
    for one in (encoder, encoder.without_weights()):
        found = one.encode(Sample("p", "c"))
        assert (found, one.num_truncated, len(found)) == (expected, cut, sum(map(len, expected)))
