"""What is held out for validation: whole prompts, or whole texts; never a part of what training saw."""

import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import make_tokenizer
from poise.data.types import Preference, Prompt
from poise.errors import PoiseError
from poise.reward.pairs import FEW_PROMPTS, PreferenceSplit, told_apart

SHARE = 0.2


def transcript(prompt: Prompt) -> list[tuple[str, str]]:
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [(turn["role"], turn["content"]) for turn in turns]


def texts(rows: list[Preference]) -> set[str]:
    return {text for row in rows for text in (row.chosen, row.rejected)}


def nested(one: Prompt, other: Prompt) -> bool:
    first, second = sorted((transcript(one), transcript(other)), key=len)
    return second[: len(first)] == first


def check_sides(split: PreferenceSplit) -> None:
    rows = split.train.tolist() + split.validation.tolist()
    assert sorted(rows) == list(range(len(split.preferences)))
    if split.unit == "text":
        assert not texts(split.fit_on) & texts(split.held_out)
    else:
        sides = itertools.product(split.fit_on, split.held_out)
        assert not any(nested(mine.prompt, other.prompt) for mine, other in sides)


def conversation(*said: str) -> Prompt:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


def votes(num_prompts: int, num_votes: int, start: int = 0) -> list[Preference]:
    return [
        Preference(f"prompt {i}", f"good {i}", f"bad {i}")
        for i in range(start, start + num_prompts)
        for _ in range(num_votes)
    ]


word = st.sampled_from("abcd")
prompts = st.one_of(
    st.integers(0, 30).map(lambda i: f"prompt {i}"),
    st.lists(word, min_size=1, max_size=4).map(lambda said: conversation(*said)),
)
answers = st.integers(0, 60).map(lambda i: f"text {i}")
pairs = st.tuples(prompts, answers, answers).filter(lambda pair: pair[1] != pair[2])


@settings(max_examples=150)
@given(st.lists(pairs, min_size=3, max_size=60), st.integers(0, 3), st.sampled_from([0.1, 0.2, 0.5]))
def test_no_prompt_or_text_is_on_both_sides(drawn: list[tuple[Prompt, str, str]], seed: int, share: float) -> None:
    rows = [Preference(*pair) for pair in drawn]
    try:
        split = PreferenceSplit.draw(rows, share, seed)
    except PoiseError:
        assume(False)
    check_sides(split)
    asked = max(1, round(share * len(rows)))
    assert asked / 2 <= len(split.validation) <= 2 * asked
    assert len(split.train) >= 2
    again = PreferenceSplit.draw(rows, share, seed)
    assert again.train.tolist() == split.train.tolist()


@settings(max_examples=50)
@given(st.lists(st.integers(1, 6), min_size=40, max_size=80), st.integers(0, 5))
def test_votes_stay_together_and_the_sizes_are_those_asked_for(sizes: list[int], seed: int) -> None:
    rows = [row for i, size in enumerate(sizes) for row in votes(1, size, i)]
    split = PreferenceSplit.draw(rows, SHARE, seed)
    check_sides(split)
    assert split.unit == "prompt"
    assert abs(len(split.validation) - SHARE * len(rows)) <= 3
    assert sum(split.num_units) == len(sizes)


def test_pairs_that_share_nothing_are_split_as_a_permutation_is() -> None:
    """So a file without repeated prompts keeps the split of earlier versions."""
    import torch

    split = PreferenceSplit.draw(votes(50, 1), SHARE, seed=3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    assert (split.validation.tolist(), split.train.tolist()) == (order[:10].tolist(), order[10:].tolist())
    assert split.validation.tolist() != PreferenceSplit.draw(votes(50, 1), SHARE, seed=4).validation.tolist()


def test_a_prompt_that_another_goes_on_from_is_on_its_side() -> None:
    rows = []
    for i in range(30):
        said = [f"question {i}", f"answer {i}", "and then?"]
        rows += [
            Preference(conversation(*said[:1]), f"a{i}", f"b{i}"),
            Preference(conversation(*said), f"c{i}", f"d{i}"),
        ]
        rows.append(Preference(f"question {i}", f"e{i}", f"f{i}"))  # plain text is the user's first turn
        rows.append(Preference(f"question {i} in short", f"g{i}", f"h{i}"))
    split = PreferenceSplit.draw(rows, SHARE, 0)
    held = sorted({row.chosen[1:] for row in split.held_out})
    assert split.unit == "prompt"
    assert len(held) == 6
    assert len(split.validation) == 24  # four each: "question 1" does not begin "question 10"


def test_few_prompts_are_split_by_text() -> None:
    few = [Preference(f"review {i % 3}", f"good {i // 2}", f"bad {i}") for i in range(60)]
    split = PreferenceSplit.draw(few, SHARE, 0)
    check_sides(split)
    assert split.unit == "text"
    assert len(split.validation) == 12
    assert split.num_units == (72, 18)
    assert str(split) == ("48 preferences train (72 texts), 12 validate (18 texts); no text is on both sides")
    at_the_bound = [Preference(f"review {i % FEW_PROMPTS}", f"good {i // 2}", f"bad {i}") for i in range(60)]
    assert PreferenceSplit.draw(at_the_bound, SHARE, 0).unit == "prompt"


def test_one_prompt_with_nearly_all_pairs_is_split_by_text() -> None:
    rows = [Preference("the one", f"a{i}", f"b{i}") for i in range(200)] + votes(12, 1)
    split = PreferenceSplit.draw(rows, SHARE, 0)
    assert split.unit == "text"
    check_sides(split)


def test_few_prompts_whose_texts_all_hang_together_are_split_by_prompt() -> None:
    rows = [Preference(f"prompt {i % 5}", f"answer {i // 5}", f"answer {i // 5 + 1}") for i in range(50)]
    split = PreferenceSplit.draw(rows, SHARE, 0)
    assert (split.unit, len(split.validation)) == ("prompt", 10)
    check_sides(split)


def test_a_group_larger_than_the_share_is_held_out_if_that_is_nearest() -> None:
    split = PreferenceSplit.draw(votes(12, 5), 0.05, 0)  # 3 of 60 asked for
    assert len(split.validation) == 5


def test_texts_that_all_hang_together_under_one_prompt_end_in_one_line() -> None:
    chain = [Preference("p", f"answer {i}", f"answer {i + 1}") for i in range(40)]
    with pytest.raises(PoiseError, match="40 of 40 preferences are linked by texts they share") as caught:
        PreferenceSplit.draw(chain, SHARE, 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(PoiseError, match="2 preferences are too few to train on"):
        PreferenceSplit.draw(votes(2, 1), SHARE, 0)


# ---- pairs that say nothing ----


@pytest.mark.parametrize(
    ("chosen", "rejected", "max_length", "kept"),
    [
        ("One. " + "a" * 40, "Two. " + "a" * 40, 32, False),  # cut from the left, they end alike
        ("One. " + "a" * 40, "Two. " + "a" * 40, 500, True),
        ("good", "bad", 32, True),
        ("It is good", "It is  good", 500, True),
        ("One. !!!", "Two. !!!", 500, True),
    ],
)
def test_pairs_that_the_model_reads_as_one_text_are_left_out(
    capsys: pytest.CaptureFixture[str], chosen: str, rejected: str, max_length: int, kept: bool
) -> None:
    preferences = [Preference("Say.", "yes", "no"), Preference("Say.", chosen, rejected)]
    found = told_apart(preferences, make_tokenizer(), max_length, "pairs.jsonl")
    assert found == preferences[: 1 + kept]
    said = " ".join("".join(capsys.readouterr()).split())
    line = f"pairs.jsonl: 1 of 2 pairs left out, whose two texts are the same cut to their last {max_length} tokens"
    assert said == ("" if kept else line)


def test_pairs_that_all_say_nothing_are_refused() -> None:
    preferences = [Preference("Say.", "One. " + "a" * 40, "Two. " + "a" * 40)]
    with pytest.raises(PoiseError, match=r"^pairs: 1 of 1 pairs left out, .* last 32 tokens; raise --max-length"):
        told_apart(preferences, make_tokenizer(), 32, "pairs")
