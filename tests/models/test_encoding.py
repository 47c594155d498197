"""Samples as token ids: what is cut, what is counted, and where padding at the end is left out."""

import pytest

from conftest import make_tokenizer
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.models import encoding
from poise.models.encoding import Encoder, Tokens, cut_from_the_left

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
    monkeypatch.setattr(encoding, "encode_conversations", lambda *_: [([1, 2, 3], list(completion))])
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    encoder = Encoder(tokenizer, max_length, 100, PAD)
    for one in (encoder, encoder.without_weights()):
        found = one.encode(Sample("p", "c"))
        assert (found, one.num_truncated, len(found)) == (expected, cut, sum(map(len, expected)))


@pytest.mark.parametrize(
    ("ids", "length", "expected"),
    [
        ([1, 5, 6, 7], 4, ([], [1, 5, 6, 7])),
        ([1, 5, 6, 7], 3, ([1], [6, 7])),
        ([1, 5, 6, 7], 2, ([1], [7])),
        ([1, 5, 6, 7], 1, ([], [7])),  # the last token holds the score
        ([1, 5, 1, 7], 3, ([], [5, 1, 7])),  # begins every turn, as <|im_start|> does
        ([4, 5, 6, 7], 3, ([], [5, 6, 7])),
    ],
)
def test_the_token_that_begins_every_text_is_kept(ids: list[int], length: int, expected: object) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token_id = 1
    assert cut_from_the_left(tokenizer, ids, length) == expected


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [(5, Tokens((1, 3), (4, 5, 6))), (4, Tokens((1,), (4, 5, 6))), (3, Tokens((1,), (5, 6))), (1, Tokens((), (6,)))],
)
def test_a_text_is_cut_behind_the_token_that_begins_it(
    max_length: int, expected: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "encode_conversations", lambda *_: [([1, 2, 3], [4, 5, 6])])
    tokenizer = make_tokenizer()
    tokenizer.bos_token_id = 1
    encoder = Encoder(tokenizer, max_length, 100, PAD)
    assert (encoder.encode(Sample("p", "c")), encoder.num_truncated) == (expected, 1)


def test_many_samples_are_encoded_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, with the same ids, cut and counted alike; an empty one is refused wherever it stands."""
    monkeypatch.setattr(encoding, "_TOGETHER", 4)
    samples = [Sample(f"{'a film ' * (i % 3)}", f"is good {'x' * (i % 5)}") for i in range(11)]
    whole = Encoder(make_tokenizer(), 10**6, 10**6, PAD).encode_all(samples)
    median = sorted(map(len, whole))[len(whole) // 2]
    together, alone = (Encoder(make_tokenizer(), median, 10**6, PAD) for _ in range(2))
    assert together.encode_all(samples) == [alone.encode(sample) for sample in samples]
    assert 0 < together.num_truncated == alone.num_truncated < len(samples)
    assert together.encode_all([]) == []
    with pytest.raises(PoiseError, match="empty completion"):
        together.encode_all([*samples, Sample("a", " ")])
