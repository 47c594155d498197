"""Tokenizers of other kinds than ours: texts are encoded whole, and decoded after their prompt."""

import contextlib
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from conftest import CHAT_TEMPLATE, save_model
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import HeadRewards
from poise.integrations.trl_reward import RobustReward
from poise.integrations.trl_trainers import _Ours
from poise.models.chat_format import decode_completions, encode, encode_conversation, encode_conversations
from poise.models.loading import load_policy
from poise.models.policy import Policy
from poise.models.reward_model import load_reward_model, load_trunk
from poise.models.rollout import uniforms
from poise.models.scorer import Scorer

LETTERS = [*"abcdefghijklmnopqrstuvwxyzH.\n"]
MERGES = [("o", "d"), ("o", "od"), ("g", "ood"), ("\n", "\n"), ("l", "y"), ("▁", "good"), ("▁", "▁")]


def finished(bare: Tokenizer, specials: list[str], ends: str, **named: str) -> Any:
    """ends: what is added to a text, such as "<s> $A </s>"."""
    bare.add_special_tokens(specials)
    used = [(token, bare.token_to_id(token)) for token in set(ends.split()) - {"$A"}]
    bare.post_processor = processors.TemplateProcessing(single=ends, special_tokens=used)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bare, clean_up_tokenization_spaces=False, **named)


def unigram(ends: str = "$A </s>") -> Any:
    """T5's way, or XLM-R's: a space before every text, the likeliest pieces, an end after it."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = [*("▁good", "good", "▁film", "film", "goo", "▁", "ly", "▁is"), *LETTERS]
    scored = [(piece, -2.0 - at / 10) for at, piece in enumerate(pieces)]
    bare = Tokenizer(models.Unigram([*((token, 0.0) for token in specials), *scored], unk_id=3))
    bare.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    named = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return finished(bare, specials, ends, **named)


def llama_2() -> Any:
    """BPE of sentencepiece: its normalizer writes a space before every text, its decoder takes one away."""
    specials, bytes_ = ["<unk>", "<s>", "</s>"], [f"<0x{number:02X}>" for number in range(256)]
    tokens = dict.fromkeys([*specials, *bytes_, "▁", *LETTERS, *(one + other for one, other in MERGES)])
    bare = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, MERGES, byte_fallback=True))
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bare.decoder = decoders.Sequence(parts)
    return finished(bare, specials, "<s> $A", eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def word_piece() -> Any:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokens = [*specials, "good", "film", "is", "##ly", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    bare = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    bare.normalizer, bare.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    bare.decoder = decoders.WordPiece()
    named = {"eos_token": "[SEP]", "bos_token": "[CLS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    return finished(bare, specials, "[CLS] $A [SEP]", **named)


def gpt_2(*, add_prefix_space: bool = False, special: str = "<|endoftext|>") -> Any:
    """One special token, no padding; line breaks and "good" are tokens that a boundary may divide."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(one.replace("\n", "Ċ"), other.replace("\n", "Ċ")) for one, other in MERGES if "▁" not in one]
    tokens = dict.fromkeys([special, *alphabet, *(one + other for one, other in merges)])
    bare = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    bare.decoder = decoders.ByteLevel()
    return finished(bare, [special], "$A", eos_token=special, bos_token=special)


KINDS = {
    "T5": unigram, "XLM-R": lambda: unigram("<s> $A </s>"), "Llama 2": llama_2, "WordPiece": word_piece, "GPT-2": gpt_2,
    "GPT-2, space before": lambda: gpt_2(add_prefix_space=True),
    "Llama 2, two beginnings": lambda: finished(llama_2().backend_tokenizer, [], "<s> <s> $A </s>", eos_token="</s>"),
}  # fmt: skip
TEXTS = [
    ("a film", " is good"), ("a film", "s"), ("goo", "d"), ("go", "odly film"), ("is\n", "\n\ngood"),
    ("is\n\n", "good"), ("good ", "good film"), ("", "good"), ("a", "  film"), ("a", "ß世"),
]  # fmt: skip


def model_folder(tokenizer: Any, folder: Path, auto: str = "AutoModelForCausalLM") -> str:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        num_labels=1, max_position_embeddings=64,
    )  # fmt: skip
    return save_model(getattr(transformers, auto).from_config(config), tokenizer, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_encoded_as_one(kind: str) -> None:
    """No space that nobody wrote lies before the completion, no token over the boundary is missing."""
    tokenizer = KINDS[kind]()
    for prompt, completion in TEXTS:
        first, second = encode_conversation(tokenizer, prompt, completion)
        assert [*first, *second] == tokenizer(prompt + completion).input_ids
        assert second
        tokenizer.chat_template = "{{ messages[0]['content'] }}:{{ messages[1]['content'] if messages[1:] }}"
        first, second = encode_conversation(tokenizer, prompt, completion)
        text = f"{prompt}:{completion.strip()}"
        assert [*first, *second] == tokenizer(text, add_special_tokens=False).input_ids
        tokenizer.chat_template = None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"]
)
def test_texts_are_encoded_together_as_alone(kind: str, template: str | None) -> None:
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = template
    texts = [*TEXTS, *TEXTS]
    for marked in (
        ("a </s> film", "good"),
        ("a film", "is </s> good"),
    ):  # a tokenizer may have no other way to write it
        with contextlib.suppress(PoiseError):
            encode_conversation(tokenizer, *marked)
            texts.insert(len(TEXTS), marked)
    assert encode_conversations(tokenizer, texts) == [encode_conversation(tokenizer, *one) for one in texts]
    assert encode_conversations(tokenizer, []) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_policy_wrote_is_what_it_added_to_the_prompt(kind: str) -> None:
    tokenizer = KINDS[kind]()
    begun = encode(tokenizer, "a film")
    whole = tokenizer("a film is good", add_special_tokens=False).input_ids
    written = whole[len(tokenizer("a film", add_special_tokens=False).input_ids) :]
    assert decode_completions(tokenizer, begun, [written, [*written, tokenizer.eos_token_id], []]) == [
        " is good", " is good", "",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["Llama 2", "XLM-R"])
def test_a_completion_keeps_the_space_that_it_begins_with(kind: str) -> None:
    """TRL decodes it alone, and these tokenizers take a space from the beginning of a text; PPO's reward reads it."""
    tokenizer = KINDS[kind]()
    begun = tokenizer("a film", add_special_tokens=False).input_ids
    ids = [tokenizer(text, add_special_tokens=False).input_ids[len(begun) :] for text in ("a film is", "a film good")]
    passed = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert passed == ["is", "good"]

    def read(template: str | None, **columns: Any) -> list[str]:
        tokenizer.chat_template = template
        heads = HeadRewards(torch.tensor([[0.0, 1.0], [1.0, 3.0]]), torch.ones(2, 2))
        extract = Mock(tokenizer=tokenizer, max_length=9)
        scorer = Mock(spec=Scorer, return_value=heads, extract=extract, layout=Mock(), num_truncated=0)
        reward = RobustReward.of(scorer, "mean")
        reward(["a film", "a film"], passed, **columns)
        assert reward.last is not None
        return [sample.completion for sample in reward.last.samples]

    assert read(None, completion_ids=ids) == [" is", " good"]
    assert read(None) == ["is", "good"]
    assert read(None, completion_ids=ids[::-1]) == ["is", "good"]  # those of another tokenizer
    assert read("{{ messages[0]['content'] }}", completion_ids=ids) == ["is", "good"]  # a template reads no such space


def test_a_text_that_cannot_be_told_from_its_prompt_is_decoded_alone() -> None:
    """Bytes that are no character together with those before them: the decoder writes both in another way."""
    tokenizer = llama_2()
    begun = tokenizer("世", add_special_tokens=False).input_ids
    [found] = decode_completions(tokenizer, begun, [begun[1:2]])
    assert found == tokenizer.decode(begun[1:2]) == "\ufffd"


@pytest.mark.parametrize("kind", ["Llama 2", "XLM-R"])
def test_a_score_is_that_of_a_stock_classifier(kind: str, tmp_path: Path) -> None:
    folder = model_folder(KINDS[kind](), tmp_path, "AutoModelForSequenceClassification")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    samples = [Sample(prompt, text) for prompt, text in TEXTS]
    with torch.no_grad():
        wanted = [stock(**tokenizer(one.prompt + one.completion, return_tensors="pt")).logits[0] for one in samples]
    found = Scorer.load(folder)(samples).mean
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-5 * found.abs().max().item())
    assert found.std() > 0.01 * found.abs().max()


def test_policies_of_every_algorithm_are_scored_with_the_space_that_they_wrote(tmp_path: Path) -> None:
    policy = Policy(*load_policy(model_folder(llama_2(), tmp_path)), adapted_layers=1, rank=2)
    tokenizer = policy.tokenizer
    rollout = policy.sample(["a film"], uniforms(1, 1, 4, torch.Generator().manual_seed(0)))
    written = tokenizer.convert_tokens_to_ids(["▁good", "▁", "l", "</s>"])
    rollout.completion_ids_PMT[0, 0] = torch.tensor(written)
    assert policy.texts(rollout) == [[" good l"]]

    class Trl:
        processing_class = tokenizer

        def _calculate_rewards(self, *given: Any) -> Any:
            return given

    trainer = object.__new__(type("Trainer", (_Ours, Trl), {}))
    rows = [{"asked": '"a film"'}]
    _, asked, completions, ids = trainer._calculate_rewards(rows, ["a film"], ["good l"], [written])
    assert (asked, completions, ids) == (["a film"], [" good l"], [written])
    tokenizer.chat_template = CHAT_TEMPLATE
    prompts = [[{"role": "user", "content": "a film"}]]
    turns = [[{"role": "assistant", "content": "good l"}]]
    assert trainer._calculate_rewards(rows, prompts, turns, [written])[1:] == (asked, completions, ids)


# ---- padding ----


def test_a_policy_without_a_token_to_spare_gets_one_row_that_is_always_the_same(tmp_path: Path) -> None:
    """It was drawn at random: another one at the merge. Its logit is the mean of the others."""
    folder = model_folder(gpt_2(), tmp_path)
    (model, tokenizer), (again, _) = load_policy(folder), load_policy(folder)
    assert tokenizer.pad_token_id == len(gpt_2()) == model.get_output_embeddings().out_features - 1
    ids = torch.tensor([[5, 6, 7, 8]])
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found, wanted = model(ids).logits, stock(ids).logits
        torch.testing.assert_close(again(ids).logits, found, rtol=0, atol=0)
    torch.testing.assert_close(found[..., :-1], wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[..., -1], wanted.mean(-1), rtol=0, atol=1e-5)
    assert (found.softmax(-1)[..., -1] <= 1 / found.shape[-1]).all()


def test_classifiers_of_one_trunk_have_one_row_of_padding(tmp_path: Path) -> None:
    folder = model_folder(gpt_2(), tmp_path)
    (one, tokenizer), (other, _) = load_trunk(folder, 0), load_trunk(folder, 0)
    rows = one.get_input_embeddings().weight
    assert tokenizer.pad_token_id == len(rows) - 1 == len(gpt_2())
    assert torch.equal(rows, other.get_input_embeddings().weight)


def test_adapters_of_a_classifier_with_a_row_of_padding_find_their_base(tmp_path: Path) -> None:
    """config.json counts the row, and the base model does not have it."""
    classifier, tokenizer = load_trunk(model_folder(gpt_2(), tmp_path / "base"), 0)
    adapted = peft.get_peft_model(
        classifier, peft.LoraConfig(task_type="SEQ_CLS", r=2, modules_to_save=["score"], target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path / "rm", save_embedding_layers=False)
    classifier.config.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    found, _, _ = load_reward_model(str(tmp_path / "rm"))
    assert found.config.pad_token_id == len(gpt_2()) == found.get_input_embeddings().num_embeddings - 1
    ids = torch.tensor([[5, 6, 7, tokenizer.pad_token_id]])
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, adapted(ids).logits, rtol=0, atol=1e-6)


def test_a_prompt_without_a_token_is_one_line(tmp_path: Path) -> None:
    policy = Policy(*load_policy(model_folder(gpt_2(), tmp_path)), adapted_layers=1, rank=2)
    with pytest.raises(PoiseError, match="a text has no token"):
        policy.sample(["good", ""], uniforms(2, 1, 2, torch.Generator().manual_seed(0)))


def test_how_long_a_text_may_be_is_what_the_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", said.append)
    tokenizer = gpt_2()
    tokenizer.model_max_length = 2
    assert tokenizer("a good film").input_ids
    assert len(said) == 1
    _, found = load_policy(model_folder(tokenizer, tmp_path))
    assert found.model_max_length == 2
    assert len(encode(found, "a good film")) > 2
    assert len(said) == 1
