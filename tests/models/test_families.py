"""What holds for every model family, and docs/families.md, which says where it holds.

Tiny models of random weights; texts shorter and longer than their window of 32 tokens.

python tests/models/test_families.py      # writes docs/families.md anew
"""

import copy
import functools
import importlib.metadata
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script

from conftest import make_tokenizer, rest_slow
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional import ppo
from poise.models.families import rounding, windows
from poise.models.loading import load_policy
from poise.models.policy import Policy, uniforms
from poise.models.rereading import choose
from poise.models.scorer import FeatureExtractor, Scorer, Tokens
from poise.models.shared_prompt import Family, pack, packed_hidden, separate_hidden, shares_prompts, takes_packed_rows
from poise.runtime.quiet import quiet_loading

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
COLUMNS = ("score alone", "in a batch", "beside siblings", "training features", "PPO")
YES = "✓"
WINDOW = 32
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

SIZE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
GROUPED = SIZE | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "layer_types": MIXED}
EXPERTS = GROUPED | {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0],
}  # fmt: skip
OPT = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}

# Name on the page: (model type, config).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", GROUPED),
    "Qwen 2": ("qwen2", GROUPED),
    "Qwen 2, sliding window": (
        "qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED},
    ),
    "Qwen 3": ("qwen3", GROUPED | {"head_dim": 8}),
    "Mistral": ("mistral", GROUPED | {"head_dim": 8, "sliding_window": None}),
    "Mistral, sliding window": ("mistral", GROUPED | {"head_dim": 8, "sliding_window": WINDOW}),
    "Gemma 2": ("gemma2", GEMMA),
    "Gemma 3, text": ("gemma3_text", GEMMA),
    "Phi-3": ("phi3", GROUPED | {"sliding_window": WINDOW}),
    "Phi-3, longrope": (
        "phi3",
        GROUPED | {"sliding_window": None, "rope_parameters": LONGROPE, "original_max_position_embeddings": 80},
    ),
    "GPT-2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "GPT-Neo": (
        "gpt_neo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
         "window_size": WINDOW, "max_position_embeddings": 512},
    ),
    "GPT-NeoX": ("gpt_neox", SIZE),
    "OPT": ("opt", OPT | {"word_embed_proj_dim": 32}),
    "OPT, projected embeddings": ("opt", OPT | {"word_embed_proj_dim": 16}),
    "BLOOM": ("bloom", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "Falcon": ("falcon", {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": False}),
    "OLMo 2": ("olmo2", GROUPED),
    "Mixtral": ("mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "Qwen 2, experts": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 32}),
}  # fmt: skip

LONG = "Tell me about the long road that goes over the hill and through the wood."
SAMPLES = [
    Sample("Hi", "Yes."),
    Sample("Hi", "No, and it is rather long for an answer to that."),
    Sample(LONG, "It is long."),
    Sample(LONG, "It is short and it bends."),
    Sample([{"role": role, "content": "A b?"} for role in ("user", "assistant", "user")], "D"),
]  # fmt: skip


@functools.cache
def folder_of(name: str, auto: str) -> str:
    """A model folder of a family, as a user's model would be."""
    kind, shape = FAMILIES[name]
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = transformers.AutoConfig.for_model(
        kind, **{"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | shape
    )
    config.num_labels = 1
    folder = tempfile.mkdtemp()
    with quiet_loading():
        model = getattr(transformers, auto).from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@functools.cache
def scorer_of(name: str) -> Scorer:
    return Scorer.load(folder_of(name, "AutoModelForSequenceClassification"))


@functools.cache
def stock_scores(name: str) -> torch.Tensor:
    """Without a line of Poise: each text alone through the stock classifier."""
    folder = folder_of(name, "AutoModelForSequenceClassification")
    with quiet_loading():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for sample in SAMPLES:
        turns = [{"role": "user", "content": sample.prompt}] if isinstance(sample.prompt, str) else sample.prompt
        turns = [*turns, {"role": "assistant", "content": sample.completion}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            scores.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0])
    return torch.stack(scores)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def score_alone(name: str) -> str:
    found = torch.cat([scorer_of(name)([sample]).mean[:, 0] for sample in SAMPLES])
    close(found, stock_scores(name))
    assert found.std() > 1e-3 * found.abs().max()  # texts do score apart
    return YES


def score_in_a_batch(name: str) -> str:
    """No two of one prompt; and with every text twice, in another order."""
    apart = [0, 2, 4]
    close(scorer_of(name)([SAMPLES[i] for i in apart]).mean[:, 0], stock_scores(name)[apart])
    wanted = torch.cat([stock_scores(name).flip(0), stock_scores(name)])
    close(scorer_of(name)([*SAMPLES[::-1], *SAMPLES]).mean[:, 0], wanted)
    return YES


def score_beside_siblings(name: str) -> str:
    for part in ([0, 1], [2, 3], [0, 1, 2, 3]):
        close(scorer_of(name)([SAMPLES[i] for i in part]).mean[:, 0], stock_scores(name)[part])
    return YES if shares_prompts(scorer_of(name).extract.classifier) else f"{YES} each with its prompt"


def training_features(name: str) -> str:
    """Of packed rows, and of the cache: those of scoring."""
    extract = scorer_of(name).extract
    classifier, tokens = extract.classifier, [extract.encode(sample) for sample in SAMPLES]
    scored = torch.cat([extract.forward([text]) for text in tokens])
    cached = FeatureExtractor(classifier, extract.tokenizer, cached=True)
    close(cached(SAMPLES), scored)
    close(cached(SAMPLES[::-1]), scored.flip(0))
    packed = takes_packed_rows(classifier)
    with torch.no_grad():
        close(_trained(classifier, tokens, packed=packed), scored)
    return YES if packed else f"{YES} each with its prompt"


def _trained(classifier: Any, tokens: list[Tokens], *, packed: bool) -> torch.Tensor:
    """Features as the trainer of trunks reads them."""
    if not packed:
        apart = [Family(list(text.prompt), [list(text.completion)]) for text in tokens]
        return separate_hidden(classifier, pack(apart, 0, one_per_row=True))
    pairs = [tokens[:2], tokens[2:4], tokens[4:]]
    families = [Family(list(texts[0].prompt), [list(text.completion) for text in texts]) for texts in pairs]
    return packed_hidden(classifier, pack(families, 0))


def ppo_reads_again_what_it_sampled(name: str) -> str:
    """KL 0 and ratio 1 before the first update; and after it, log-probabilities at sampling = at re-reading."""
    policy = Policy(*load_policy(folder_of(name, "AutoModelForCausalLM")), adapted_layers=2, rank=4)
    prompts, numbers = [LONG, "Hi"], uniforms(2, 2, 12, torch.Generator().manual_seed(0))
    for trained in (False, True):
        if trained:
            for parameter in policy.trained_parameters().values():
                torch.nn.init.normal_(parameter, std=0.05)
        rollout = policy.sample(prompts, numbers)
        policy.check_rereading(rollout)
        mask, sampled = rollout.mask_PMT, rollout.logprob_PMT
        with torch.no_grad():
            again = policy.evaluate(rollout)
        torch.testing.assert_close(again.logprob * mask, sampled, rtol=0, atol=2e-5)
        torch.testing.assert_close(again.value * mask, rollout.value_PMT, rtol=1e-5, atol=2e-5)
        kl = ppo.sequence_kl(
            sampled.flatten(0, 1), policy.reference_logprobs(rollout).flatten(0, 1), mask.flatten(0, 1)
        )
        assert (kl.abs().max() > 1e-2) if trained else (kl.abs().max() < 1e-4)
    return YES if policy._reading.packed else f"{YES} each with its prompt"


CHECKS: dict[str, Callable[[str], str]] = dict(
    zip(
        COLUMNS,
        (score_alone, score_in_a_batch, score_beside_siblings, training_features, ppo_reads_again_what_it_sampled),
        strict=True,
    )
)


@functools.cache
def cell(name: str, column: str) -> str:
    """✓, or the one line that a user gets instead."""
    try:
        return CHECKS[column](name)
    except PoiseError as error:
        return str(error)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", rest_slow(FAMILIES))
def test_a_family_reads_every_text_in_one_way(name: str, column: str) -> None:
    found = cell(name, column)
    assert found.startswith(YES) or (len(found) > 20 and "\n" not in found)


def test_windows_are_those_of_the_layers() -> None:
    limits = {name: windows(scorer_of(name).extract.classifier) for name in ("Llama", "Phi-3", "Gemma 2", "GPT-Neo")}
    assert limits == {
        "Llama": {"full_attention": None},
        "Phi-3": {"sliding_attention": WINDOW},
        "Gemma 2": {"full_attention": None, "sliding_attention": WINDOW},
        "GPT-Neo": None,
    }


@pytest.mark.parametrize("name", ["Qwen 2, sliding window", "Mistral, sliding window", "Gemma 3, text"])
def test_a_mask_without_the_window_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of a dozen tokens see a window of 32, and a run is stopped before its first update."""
    classifier = scorer_of(name).extract.classifier
    model, tokenizer = load_policy(folder_of(name, "AutoModelForCausalLM"))
    policy = Policy(model, tokenizer, adapted_layers=2, rank=4)
    assert shares_prompts(classifier)
    assert takes_packed_rows(classifier)
    assert choose(model, 0).packed
    limits = windows(classifier)
    assert limits is not None
    monkeypatch.setattr("poise.models.families.windows", lambda _: dict.fromkeys(limits))
    assert not shares_prompts(classifier)
    assert not takes_packed_rows(classifier)
    assert not choose(model, 0).packed
    policy.check_rereading(policy.sample(["Hi"], uniforms(1, 2, 4, torch.Generator().manual_seed(0))))  # within it
    rollout = policy.sample([LONG], uniforms(1, 2, 12, torch.Generator().manual_seed(0)))
    with pytest.raises(PoiseError, match=r"read again before the first update, differ by .* nats"):
        policy.check_rereading(rollout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_expected_rounding_is_near_the_measured_one(dtype: torch.dtype) -> None:
    model = load_policy(folder_of("Llama", "AutoModelForCausalLM"))[0].to(dtype)
    exact = copy.deepcopy(model).double()
    ids = torch.randint(3, 250, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (each.base_model(input_ids=ids).last_hidden_state.double() for each in (model, exact))
    assert 0.2 < rounding(model) / ((one - other).norm() / other.norm()).item() < 5


def page() -> str:
    """docs/families.md as it should be."""
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package).partition('+')[0]}"
        for package in ("transformers", "torch", "peft")
    )
    head = f"""# Model families

What holds for each family, as `tests/models/test_families.py` finds it, which also writes this page. Its models are
tiny and of random weights; its texts are shorter and longer than the sliding window, where there is one. With
{versions}; in float32 on a CPU.

- score alone, in a batch, beside siblings (other completions of the prompt): equal to the stock
  `AutoModelForSequenceClassification` on one text, to 1e-5 of the largest score.
- training features: what the trainer of trunks reads, and what the feature cache keeps, equal to what is scored.
- PPO: log-probabilities at sampling equal those at re-reading; KL is 0 and the ratio 1 before the first update.
- "each with its prompt": the model takes no mask from outside, so every completion is read in a row of its own with a
  copy of its prompt. Results are the same; reading takes longer.

"""
    rows = [("family", *COLUMNS), ("---",) * (1 + len(COLUMNS))]
    rows += [(name, *(cell(name, column) for column in COLUMNS)) for name in FAMILIES]
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def test_the_page_says_what_was_found() -> None:
    """If not: python tests/models/test_families.py."""
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch:
        patch.setenv("POISE_CACHE", cache)
        PAGE.write_text(page(), encoding="utf-8")
