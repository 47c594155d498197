"""Packed rows: the same rewards and gradients as separate rows, for any trunk that can take them."""

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface

from conftest import make_tokenizer
from poise.data.types import Sample
from poise.models.adapted_maps import has_conv1d, linear_maps
from poise.models.families import additive, windows
from poise.models.loading import load_policy
from poise.models.prompt_trials import shares_prompts, takes_packed_rows
from poise.models.reward_model import load_trunk
from poise.models.scorer import Scorer
from poise.models.shared_prompt import (
    EQUAL_COMPLETIONS,
    PADDING,
    Family,
    attends,
    cached_hidden,
    equal_completions,
    num_tokens,
    pack,
    packed_hidden,
    separate_hidden,
)
from poise.runtime.quiet import quiet_loading

FAMILIES = [
    Family(list(range(10, 40)), [[50, 51, 52], [60, 61], [70, 71, 72, 73, 74, 75]]),
    Family([7, 8], [[9], [11, 12]]),
    Family([5, 6, 7, 8, 9], [[20, 21]]),
]
APART = [Family(prompt, [completion]) for prompt, completions in FAMILIES for completion in completions]


def test_who_sees_whom_by_hand() -> None:
    # prompt a a, completion b, completion c, then another prompt d and its completion e, then padding
    group = torch.tensor([[0, 0, 0, 0, 1, 1, PADDING]])
    part = torch.tensor([[0, 0, 1, 2, 0, 1, 0]])
    sees = attends(group, part)[0].int().tolist()
    assert sees == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]


def test_rows_equal_those_worked_out_by_hand() -> None:
    rows = pack([Family([1, 2], [[3], [4, 5]]), Family([6], [[7]])], pad_id=0)
    assert rows.ids_BL.tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]
    assert rows.position_BL.tolist() == [[0, 1, 2, 2, 3], [0, 1, 0, 0, 0]]
    assert rows.last_C2.tolist() == [[0, 2], [0, 4], [1, 1]]


tokens = st.lists(st.integers(1, 99), min_size=1, max_size=8)
prompts = st.lists(st.integers(1, 99), max_size=8)
several = st.lists(st.tuples(prompts, st.lists(tokens, min_size=1, max_size=4)), min_size=1, max_size=6)


@given(several)
def test_every_text_can_be_read_back_from_what_its_last_token_sees(drawn: list) -> None:
    """An independent reading of the rows: the tokens visible from a completion's last one are the text itself."""
    families = [Family(prompt, completions) for prompt, completions in drawn]
    rows = pack(families, pad_id=0)
    sees = attends(rows.group_BL, rows.part_BL)
    texts = [prompt + completion for prompt, completions in families for completion in completions]
    for (row, column), text in zip(rows.last_C2.tolist(), texts, strict=True):
        assert rows.ids_BL[row][sees[row, column]].tolist() == text
        assert rows.position_BL[row][sees[row, column]].tolist() == list(range(len(text)))
    assert rows.ids_BL.shape[1] == max(num_tokens(family) for family in families)


@pytest.mark.parametrize("tokens_per_batch", [1, 40, 1000])
def test_cached_prompts_have_the_hidden_states_of_separate_rows(any_model: str, tokens_per_batch: int) -> None:
    """Whatever the batches: a prompt at a time and a completion at a time, or all at once, with padding."""
    classifier, _ = load_trunk(any_model, 0)
    assert shares_prompts(classifier)
    with torch.no_grad():
        parts = list(cached_hidden(classifier, FAMILIES, 0, tokens_per_batch))
    found = {key: state for keys, states in parts for key, state in zip(keys, states, strict=True)}
    assert len(parts) == {1: 4, 40: 2, 1000: 1}[tokens_per_batch]
    with torch.no_grad():
        separate = separate_hidden(classifier, pack(APART, pad_id=0, one_per_row=True))
    in_order = torch.stack([found[i, j] for i, family in enumerate(FAMILIES) for j in range(len(family.completions))])
    torch.testing.assert_close(in_order, separate, rtol=0, atol=1e-5)


def test_packed_rows_have_the_hidden_states_of_separate_ones(any_model: str) -> None:
    classifier, _ = load_trunk(any_model, 0)
    assert takes_packed_rows(classifier)
    with torch.no_grad():
        packed = packed_hidden(classifier, pack(FAMILIES, pad_id=0))
        separate = separate_hidden(classifier, pack(APART, pad_id=0, one_per_row=True))
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)
    assert (packed[0] - packed[1]).abs().max() > 0.01


@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_packed_rows_are_those_of_separate_ones(any_model: str, trained: str, checkpointing: bool) -> None:
    import peft

    classifier, _ = load_trunk(any_model, 0)
    if trained == "lora":
        config = peft.LoraConfig(
            r=4, target_modules=linear_maps(classifier), fan_in_fan_out=has_conv1d(classifier), init_lora_weights=False
        )
        peft.inject_adapter_in_model(config, classifier)
    if checkpointing:
        with quiet_loading():
            classifier.gradient_checkpointing_enable({"use_reentrant": False})
        classifier.train()
        for module in classifier.modules():  # GPT-2 has dropout
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    parameters = [p for p in classifier.base_model.parameters() if p.requires_grad]
    gradients = []
    for hidden in (
        packed_hidden(classifier, pack(FAMILIES, pad_id=0)),
        separate_hidden(classifier, pack(APART, pad_id=0, one_per_row=True)),
    ):
        loss = torch.nn.functional.softplus(hidden.sum(-1)).mean()
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    compared = [(a, b) for a, b in zip(*gradients, strict=True) if a is not None]
    assert len(compared) > 5
    scale = max(b.abs().max().item() for _, b in compared)
    for packed, separate in compared:
        torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5 * max(scale, 1.0))


def test_a_bidirectional_trunk_is_found_out(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is guessed from a name: a trunk whose own mask is not causal gives other states, and is told."""
    classifier, _ = load_trunk(tiny_model, 0)
    original = classifier.base_model.forward

    def forward(attention_mask: torch.Tensor, **kwargs: object) -> object:
        if attention_mask.dim() == 2:
            attention_mask = torch.zeros(len(attention_mask), 1, *[attention_mask.shape[1]] * 2)
        return original(attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(classifier.base_model, "forward", forward)
    assert not takes_packed_rows(classifier)
    assert not shares_prompts(classifier)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2)])
def test_attention_taken_apart_is_attention(tiny_model: str, heads: int, key_heads: int) -> None:
    """Outputs and gradients of the masked whole, written out; prompts and completions are padded."""
    prompt, per_prompt, size, channels = 5, 3, 4, 8
    number = torch.arange(1, per_prompt + 1).repeat_interleave(size)
    part = torch.cat([torch.zeros(prompt, dtype=torch.long), number]).expand(2, -1)
    group = torch.zeros_like(part)
    group[0, :2] = group[1, prompt + 2 : prompt + size] = group[1, -1] = PADDING
    sees = attends(group, part)
    draw = torch.Generator().manual_seed(0)
    query, key, value, direction = (
        torch.randn(2, part.shape[1], count, channels, generator=draw).transpose(1, 2).requires_grad_()
        for count in (heads, key_heads, key_heads, heads)
    )
    with equal_completions(load_policy(tiny_model)[0], per_prompt, size):
        attend = AttentionInterface()[EQUAL_COMPLETIONS]
    found, _ = attend(nn.Module(), query, key, value, additive(sees, query.dtype), scaling=0.3)
    owner = torch.arange(heads) // (heads // key_heads)
    scores = (query @ key[:, owner].transpose(-1, -2) * 0.3).masked_fill(~sees.unsqueeze(1), -torch.inf)
    wanted = (scores.softmax(-1) @ value[:, owner]).transpose(1, 2)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad((found * direction.transpose(1, 2)).sum(), (query, key, value)),
        torch.autograd.grad((wanted * direction.transpose(1, 2)).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_attention_is_taken_apart_where_it_can_be_and_only_there(tiny_model: str) -> None:
    model, _ = load_policy(tiny_model)
    with equal_completions(model, 2, 3):
        assert model.config._attn_implementation == EQUAL_COMPLETIONS
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError), equal_completions(model, 2, 3):
        raise RuntimeError("in the middle of a forward pass")
    assert model.config._attn_implementation == "sdpa"
    model.config._attn_implementation = "eager"
    with equal_completions(model, 2, 3):
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("kind", "limits"),
    [("mistral", {"sliding_attention": 8}), ("gemma2", {"full_attention": None, "sliding_attention": 8})],
)
def test_texts_beyond_a_sliding_window_score_alone_as_beside_siblings(kind: str, limits: dict, tmp_path: Path) -> None:
    """A mask from outside replaces the window, so it must include the window; prompts stay shared."""
    shape = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "sliding_window": 8, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    configs = {"mistral": transformers.MistralConfig, "gemma2": transformers.Gemma2Config}
    config = configs[kind](**shape, num_labels=1)
    classifier = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    assert windows(classifier) == limits
    assert shares_prompts(classifier)
    assert takes_packed_rows(classifier)
    classifier.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    scorer = Scorer.load(str(tmp_path))
    samples = [Sample("Review the lamp, which is tall and grey.", text) for text in ("good", "a very good lamp")]
    together = scorer(samples).mean
    alone = torch.cat([scorer([sample]).mean for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
