"""Whoever renders a conversation with the template of a saved reward model reads the token where the scorer reads."""

from pathlib import Path

import pytest
import transformers

from conftest import CHAT_TEMPLATE, make_tokenizer
from poise.models.chat_format import encode_conversation, encode_prompt
from poise.models.scoring_template import UNCHANGED, ends_where_read, say_where_others_read, scoring_template
from stock_templates import PLAIN_TEXTS, PROMPTS, TEMPLATES, family_tokenizer

ANSWERS = ("Yes.", "Two\n\nlines", "<think>\nShort.\n</think>\n\nIt is b.")


def saved(tokenizer: transformers.PreTrainedTokenizerFast, folder: Path) -> transformers.PreTrainedTokenizerFast:
    """As a reward model's folder keeps it."""
    own = tokenizer.chat_template
    with scoring_template(tokenizer):
        tokenizer.save_pretrained(folder)
    assert tokenizer.chat_template == own
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", PLAIN_TEXTS)
def test_a_saved_template_ends_where_the_scorer_reads(name: str, tmp_path: Path) -> None:
    own = family_tokenizer(name)
    theirs = saved(own, tmp_path)
    assert ends_where_read(theirs)
    for prompt in PROMPTS:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        assert encode_prompt(theirs, prompt) == encode_prompt(own, prompt)  # generation: nothing changed
        open_ended = own.apply_chat_template(turns, tokenize=False)
        assert theirs.apply_chat_template(turns, tokenize=False) == open_ended
        for answer in ANSWERS:
            first, second = encode_conversation(own, prompt, answer)
            assert encode_conversation(theirs, prompt, answer) == (first, second)
            whole = [*turns, {"role": "assistant", "content": answer}]
            assert theirs.apply_chat_template(whole, return_dict=False) == [*first, *second]
            longer = [*whole, {"role": "user", "content": "Why?"}]
            assert theirs.apply_chat_template(longer, tokenize=False) == own.apply_chat_template(longer, tokenize=False)


def test_a_template_that_needs_no_change_stays(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    for template in (TEMPLATES["llama3"], None):
        tokenizer.chat_template = template
        with scoring_template(tokenizer):
            assert tokenizer.chat_template == template
    tokenizer.chat_template = CHAT_TEMPLATE
    assert not ends_where_read(tokenizer)
    once = saved(tokenizer, tmp_path / "once")
    assert once.chat_template != CHAT_TEMPLATE
    assert saved(once, tmp_path / "twice").chat_template == once.chat_template


@pytest.mark.parametrize("edge", ["\n{}", "{}\n", "{}\n\n", "  {}  "])
def test_white_space_of_the_template_itself_is_kept(edge: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = edge.format(CHAT_TEMPLATE)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Yes. "}]
    before = [tokenizer.apply_chat_template(part, tokenize=False) for part in (turns[:1], turns)]
    with scoring_template(tokenizer):
        assert ends_where_read(tokenizer)
        after = [tokenizer.apply_chat_template(part, tokenize=False) for part in (turns[:1], turns)]
    assert after == [before[0], before[1].rstrip()]


def test_several_templates_are_all_changed() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": TEMPLATES["llama3"]}
    with scoring_template(tokenizer):
        assert tokenizer.chat_template["default"] != CHAT_TEMPLATE
        assert tokenizer.chat_template["tool_use"] == TEMPLATES["llama3"]
        assert ends_where_read(tokenizer)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reward_model_is_padded_on_the_right_whatever_its_language_model_names(side: str, tmp_path: Path) -> None:
    """Who pads a batch of GPT-2 on the left, and passes no positions, gives shorter texts the vectors of later ones."""
    made = make_tokenizer()
    made.save_pretrained(tmp_path / "own")
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "own", padding_side=side)
    own.save_pretrained(tmp_path / "named")
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "named")
    theirs = saved(own, tmp_path / "reward")
    assert (own.padding_side, own.init_kwargs.get("padding_side", "right")) == (side, side)
    assert theirs.padding_side == "right"
    own.save_pretrained(tmp_path / "again")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "again").padding_side == side


def test_a_template_that_cannot_be_changed_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """No two renderings of it are alike, so nobody can tell that the changed one writes the same."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = own = CHAT_TEMPLATE + "{{ strftime_now('%H:%M:%S.%f') }}\n\n"
    for _ in range(2):  # said once
        with scoring_template(tokenizer):
            assert tokenizer.chat_template == own
            assert not ends_where_read(tokenizer)
    said = capsys.readouterr().err
    assert said == f"the chat template of the reward model {UNCHANGED}\n"


def test_a_classifier_that_others_read_elsewhere_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    for path in ("one", "one", "two"):
        say_where_others_read(tokenizer, path)
    said = capsys.readouterr().err
    assert (said.count("one: its chat template writes white space"), said.count("two: its")) == (1, 1)
    tokenizer.chat_template = tokenizer.chat_template.replace("\n", "")
    say_where_others_read(tokenizer, "three")
    assert capsys.readouterr().err == ""
