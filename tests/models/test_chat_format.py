"""What a reward model reads is what the chat template writes for the whole conversation, for every stock template."""

from pathlib import Path

import pytest
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers

from conftest import CHAT_TEMPLATE, make_tokenizer
from poise.errors import PoiseError
from poise.models.chat_format import (
    completion_text,
    encode,
    encode_conversation,
    generation_prompt,
    prompt_text,
)

TEMPLATES = {path.stem: path.read_text() for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")}
DROP_PLAIN_TEXT = {"idefics3", "idefics3_training", "llava_next", "llava_next_training", "smolvlm", "smolvlm_training"}
PROMPTS = (
    "Pick a letter.",
    [
        {"role": "user", "content": "Is tea hot?"},
        {"role": "assistant", "content": "<think>\nTea.\n</think>\n\nMostly."},
        {"role": "user", "content": "a"},
    ],
)
ANSWERS = (
    *("a", "b", "d", "e", "n", "of", "end", "turn", "user", "assistant", "id"),
    *("<", ">", "|", "_", "<|", "<think>", "</think>", ".", "0", "'", "{{ 1 }}", "{% if %}"),
    *("  Yes.  ", "Yes.\n\n", "\n\nYes.", "Grüße, 世界 🌍", "a\u0301", "\u200b", "Pick a letter.", "line\n\n\nline"),
    *("<|im_end|>", "Yes.<|im_end|>", "<end_of_turn>\n<start_of_turn>user\nHi", "[/INST]", "<think></think>"),
    *("<think>Short thought here.</think> It is b.", "<think>\nShort.\n</think>\n\nIt is b.", "<think>\nShort.\n"),
    *("Short thought.\n</think>\n\nIt is b.", "a<think>b</think>c<think>d</think>e", "</think></think>"),
    '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>',
    "Two lines\nand  two blanks.\t",
)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_reward_model_reads_the_whole_conversation(name: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    if name in DROP_PLAIN_TEXT:
        with pytest.raises(PoiseError, match="writes nothing of a turn that is plain text"):
            prompt_text(tokenizer, PROMPTS[0])
        with pytest.raises(PoiseError, match="writes nothing of a turn that is plain text"):
            generation_prompt(tokenizer, PROMPTS[0])
        return
    for prompt in PROMPTS:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        before = prompt_text(tokenizer, prompt)
        generation = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert generation_prompt(tokenizer, prompt) == generation
        assert generation.startswith(before)
        for answer in ANSWERS:
            conversation = [*turns, {"role": "assistant", "content": answer.strip()}]
            whole = tokenizer.apply_chat_template(conversation, tokenize=False)
            text = before + completion_text(tokenizer, prompt, answer)
            assert text.rstrip() == whole.rstrip(), answer
            first, second = encode_conversation(tokenizer, prompt, answer)
            assert [*first, *second] == encode(tokenizer, text)
            assert second


def test_every_template_was_found() -> None:
    assert len(TEMPLATES) > 50
    assert TEMPLATES.keys() > DROP_PLAIN_TEXT


@pytest.mark.parametrize("name", ["chatml", "qwen2_5", "llama3", "gemma3", "phi3", "deepseek_r1_distill"])
def test_a_short_answer_is_not_looked_for_in_the_end_marker(name: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {**TEMPLATES, "chatml": CHAT_TEMPLATE}[name]
    end = completion_text(tokenizer, "Pick a letter.", "Zebra").removeprefix("Zebra")
    assert end
    assert end == end.rstrip()
    for answer in ("a", "c", "d", "end", "im", "<", ">", "|", "_", "of"):
        assert completion_text(tokenizer, "Pick a letter.", answer) == answer + end


def test_ids_are_those_of_the_parts_where_the_template_is_chatml() -> None:
    """The prompt's ids and the completion's, as if each were encoded alone; blanks around a completion do not count."""
    tokenizer = make_tokenizer()
    for answer in ("Yes.", " Yes.\n", "d"):
        first, second = encode_conversation(tokenizer, "Hi", answer)
        assert first == encode(tokenizer, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        assert second == encode(tokenizer, f"{answer.strip()}<|im_end|>")


def test_a_token_over_the_boundary_is_the_token_of_the_whole_text() -> None:
    """Encoded apart, the blank line after Qwen3.5's `<think>` would become two tokens instead of one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|im_end|>", *alphabet, "ĊĊ"])}
    bare = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATES["qwen3_5_think"]
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
    whole = encode(tokenizer, tokenizer.apply_chat_template(conversation, tokenize=False).rstrip())
    first, second = encode_conversation(tokenizer, "Hi", "Yes.")
    assert [*first, *second] == whole
    apart = encode(tokenizer, prompt_text(tokenizer, "Hi")) + encode(
        tokenizer, completion_text(tokenizer, "Hi", "Yes.")
    )
    assert apart != whole


def test_the_boundary_does_not_divide_a_special_token() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>"], special_tokens=True)
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}"
        "{% if add_generation_prompt %}<think>{% else %}<{{ messages[1]['content'] }}{% endif %}"
    )
    assert prompt_text(tokenizer, "Hi") == "Hi"
    assert completion_text(tokenizer, "Hi", "Yes") == "<Yes"


def test_another_template_is_another_text() -> None:
    tokenizer = make_tokenizer()
    before = prompt_text(tokenizer, "Hi")
    tokenizer.chat_template = TEMPLATES["gemma3"]
    assert prompt_text(tokenizer, "Hi") != before


@pytest.mark.parametrize(
    ("roles", "refusal"),
    [(("system", "user"), "System role not supported"), (("user", "user"), "roles must alternate")],
)
def test_a_template_that_refuses_a_conversation_is_one_line(roles: tuple[str, ...], refusal: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES["gemma"]
    prompt = [{"role": role, "content": "Be kind."} for role in roles]
    for read in (generation_prompt, prompt_text, lambda t, p: completion_text(t, p, "Yes.")):
        with pytest.raises(PoiseError, match=f"refuses a conversation of the turns {', '.join(roles)}.*{refusal}") as e:
            read(tokenizer, prompt)
        assert "\n" not in str(e.value)


def test_a_prompt_that_depends_on_its_completion_is_one_line() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if messages|length > 1 and 'z' in messages[1]['content'] %}Z{% endif %}{{ messages[0]['content'] }}:"
        "{% if not add_generation_prompt %}{{ messages[1]['content'] }}{% endif %}"
    )
    assert completion_text(tokenizer, "Hi", "Yes") == "Yes"
    with pytest.raises(PoiseError, match="differently before the completion 'zebra'"):
        completion_text(tokenizer, "Hi", "zebra")


def test_without_a_template_nothing_is_added() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    assert prompt_text(tokenizer, "Hi ") == "Hi " == generation_prompt(tokenizer, "Hi ")
    assert completion_text(tokenizer, "Hi ", " yes ") == " yes "
