"""Conversations that other engines rendered are found again exactly, or refused."""

from datetime import datetime

import pytest

from conftest import CHAT_TEMPLATE, make_tokenizer
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.models.chat_format import _render, completion_text, generation_prompt, prompt_text
from poise.serve.rendered import sample_of_answer, sample_of_query, sample_of_text, turns_of
from stock_templates import PLAIN_TEXTS, TEMPLATES, family_tokenizer

PROMPTS = (
    [{"role": "user", "content": "Is tea hot?"}],
    [
        {"role": "user", "content": "Is tea hot?\n\nReally"},
        {"role": "assistant", "content": "Mostly."},
        {"role": "user", "content": "And coffee?"},
    ],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Is tea hot?"}],
)


@pytest.mark.parametrize("name", PLAIN_TEXTS)
def test_turns_of_every_stock_template_are_found(name: str) -> None:
    tokenizer = family_tokenizer(name)
    num_found = 0
    for prompt in PROMPTS:
        try:
            text = generation_prompt(tokenizer, prompt)
        except PoiseError:
            continue  # it has no system turns
        found = turns_of(tokenizer, text)
        if found is not None:  # two conversations may have one rendering; then either has the same ids
            assert generation_prompt(tokenizer, found) == text
            query = sample_of_query(tokenizer, text, f"{text}Yes.{tokenizer.eos_token}")
            assert query == Sample(found, "Yes.")
            num_found += 1
    assert num_found >= 2


SWITCHES = [{"enable_thinking": False}, {"enable_thinking": True}, {"thinking": True}, {"thinking": False}]


def test_a_switch_of_the_template_is_no_other_template_where_the_reward_model_reads_the_same_text() -> None:
    """slime's `--apply-chat-template-kwargs '{"enable_thinking": false}'` was refused for Qwen3's own reward models."""
    taken, refused = set(), set()
    for name in PLAIN_TEXTS:
        tokenizer = family_tokenizer(name)
        for options in SWITCHES:
            for prompt in PROMPTS[:2]:
                usual = generation_prompt(tokenizer, prompt)
                text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **options)
                if text == usual:
                    continue
                read = prompt_text(tokenizer, prompt) + completion_text(tokenizer, prompt, "Yes.")
                try:
                    found = sample_of_answer(tokenizer, text, "Yes.")
                except PoiseError:
                    assert not read.startswith(text)
                    refused.add(name)
                    continue
                again = prompt_text(tokenizer, found.prompt) + completion_text(tokenizer, found.prompt, "Yes.")
                assert again.startswith(text)
                taken.add(name)
    assert taken >= {"qwen3", "qwen3_5_think", "nemotron_3_nano"}
    assert "gemma4" in refused - taken


@pytest.mark.parametrize("name", ["llama3_2", "gptoss", "muse_glimmer"])
def test_a_prompt_of_another_day_is_read(name: str) -> None:
    """An engine that started a day after its server, or before, was told that its template was another one."""
    tokenizer, dated = family_tokenizer(name), 0
    for prompt in PROMPTS:
        ours = sample_of_answer(tokenizer, generation_prompt(tokenizer, prompt), "Yes.")
        for day in (datetime(2024, 2, 29), datetime(2031, 12, 1)):
            text = _render(tokenizer, prompt, add_generation_prompt=True, day=day)
            dated += text != generation_prompt(tokenizer, prompt)
            assert sample_of_answer(tokenizer, text, "Yes.") == ours
            assert sample_of_query(tokenizer, text, f"{text}Yes.") == ours
    assert dated >= 4


def chatml() -> object:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_whole_conversations_are_found() -> None:
    tokenizer = chatml()
    for prompt in PROMPTS:
        whole = prompt_text(tokenizer, prompt) + completion_text(tokenizer, prompt, "Yes.")
        for text in (whole, whole + "\n", whole.removesuffix("<|im_end|>")):
            assert sample_of_text(tokenizer, text) == Sample(prompt, "Yes.")
    for text in ("Yes.", "", whole.replace("assistant", "robot"), "<|im_start|>user\nHi<|im_end|>\n"):
        with pytest.raises(PoiseError, match="does not write this text"):
            sample_of_text(tokenizer, text)


def test_an_answer_loses_its_end_and_a_cut_prompt_is_whole() -> None:
    tokenizer = chatml()
    prompt = generation_prompt(tokenizer, "x" * 300 + " Is tea hot?")
    expected = Sample([{"role": "user", "content": "x" * 300 + " Is tea hot?"}], "Yes.")
    for query in (f"{prompt}Yes.", f"{prompt} Yes.\n<|im_end|><|im_end|>\n", f"{prompt[100:]}Yes.<|im_end|>"):
        got = sample_of_query(tokenizer, prompt, query)
        assert (got.prompt, got.completion.strip()) == (expected.prompt, "Yes.")
    assert sample_of_query(tokenizer, prompt, prompt).completion == "."  # no answer: as in training
    with pytest.raises(PoiseError, match="must begin with its prompt"):
        sample_of_query(tokenizer, prompt, "Yes.")


@pytest.mark.parametrize(
    ("written", "decoded"),
    [
        ("<|im_start|>", "<|im_start|> "),  # Llama 2 and all that have its tokenizer
        (" .", "."),  # transformers 4, of tokenizers such as Llama 3's
        ("<|im_start|>user\nIs 茶 ", "\ufffd\ufffd"),  # cut among the bytes of a character
    ],
)
def test_a_query_in_other_white_space_than_its_prompt_is_the_same(written: str, decoded: str) -> None:
    """OpenRLHF decodes prompt and answer together. Such a query was refused, and training ended without a reward."""
    tokenizer, question = chatml(), "Is 茶 hot . I mean , hot ? " + "Hot , very . " * 4
    prompt = generation_prompt(tokenizer, question)
    expected = Sample([{"role": "user", "content": question}], "Yes . It is.")
    query = prompt.replace(written, decoded)
    assert query != prompt
    assert sample_of_query(tokenizer, prompt, f"{query}Yes . It is.<|im_end|>") == expected
    tokenizer.chat_template = None
    plain = "Is 茶 hot .\n"
    found = sample_of_query(tokenizer, plain, "Is 茶 hot.\n Yes . It is.")
    assert found == Sample(plain, " Yes . It is.")
    with pytest.raises(PoiseError, match="must begin with its prompt"):
        sample_of_query(tokenizer, plain, "Is it hot.\n Yes . It is.")


def test_without_a_template_white_space_of_an_answer_is_kept() -> None:
    """It is read by the reward model then, so that every form must send the same."""
    tokenizer = chatml()
    tokenizer.chat_template, tokenizer.eos_token = None, "<|im_end|>"
    for answer in ("Yes.", "Yes. \n", " Yes.", "Yes.\n\n"):
        for tail in ("", "<|im_end|>", "<|im_end|>\n<|im_end|>\n"):
            assert sample_of_answer(tokenizer, "Is tea hot?", answer + tail) == Sample("Is tea hot?", answer)
            assert sample_of_query(tokenizer, "Is tea hot?", f"Is tea hot?{answer}{tail}").completion == answer
    assert sample_of_answer(tokenizer, "Is tea hot?", " \n<|im_end|>").completion == "."  # no answer


def test_another_familys_prompt_is_refused() -> None:
    """Read as plain text, it would get a reward that means nothing."""
    tokenizer = chatml()
    assert sample_of_answer(tokenizer, "Is tea hot? a < b", "Yes.") == Sample("Is tea hot? a < b", "Yes.")
    for name in ("llama3", "gemma3", "phi3", "deepseek_r1_distill"):
        foreign = family_tokenizer(name)
        with pytest.raises(PoiseError, match="another chat template"):
            sample_of_answer(tokenizer, generation_prompt(foreign, "Is tea hot?"), "Yes.")
    broken = generation_prompt(tokenizer, "Hi").replace("user", "human")
    with pytest.raises(PoiseError, match="another chat template"):
        sample_of_answer(tokenizer, broken, "Yes.")
    assert TEMPLATES
