"""Gold reads sentiment and punishes what is no sentence."""

import pytest

from poise.studies.gold import degeneracy, gold_reward, gold_rewards

SENTENCES = [
    "A warm, funny and beautifully acted film.",
    "The plot is thin, but the two leads make it a pleasure to watch.",
    "I can't recommend this phone: the battery died after a week.",
    "It isn't a great vacuum cleaner, and not a cheap one either.",
]


def test_ordinary_sentences_pay_nothing() -> None:
    assert [degeneracy(text) for text in SENTENCES] == [0.0] * 4
    assert gold_reward(SENTENCES[0]) > 0.7
    assert gold_reward(SENTENCES[2]) < 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 2.0),
        ("?!", 2.0),
        ("Great!", 1.0),
        # words 6, repeated 1 - 2/6 = 2/3: 4 * (2/3 - .2) = 1.867; echoes 4 * .5 = 2: capped
        ("perfect perfect perfect luxury luxury luxury", 2.0),
        # 8 words, 3 of them repeats: 4 * (.375 - .2) = .7; no echo
        ("good film and good story and good end", 0.7),
        # 4 words, half without a vowel: 4 * (.5 - .25) = 1
        ("xkcd brrr nice film", 1.0),
    ],
)
def test_degeneracy_equals_values_worked_out_by_hand(text: str, expected: float) -> None:
    assert degeneracy(text) == pytest.approx(expected)


def test_odd_characters_count_as_degenerate() -> None:
    assert degeneracy("nice film #### @@@@ $$$$ good one") == pytest.approx(4 * (12 / 33 - 0.25))


def test_a_fooled_reward_does_not_fool_gold() -> None:
    honest, hacked = "A lovely, perfect film.", "lovely perfect lovely perfect lovely perfect lovely perfect"
    assert gold_reward(honest) > 0.5 > 0 > gold_reward(hacked)


def test_gold_stays_in_its_range_and_repeats_itself() -> None:
    texts = [*SENTENCES, "", "x" * 500, "good " * 100]
    values = gold_rewards(texts)
    assert ((values >= -1) & (values <= 1)).all()
    assert (values == gold_rewards(texts)).all()
