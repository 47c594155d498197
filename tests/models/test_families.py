"""What holds for every model family, and docs/families.md, which says where it holds.

Tiny models of random weights; texts shorter and longer than their window of 32 tokens.

python tests/models/test_families.py      # writes docs/families.md anew
"""

import copy
import functools
import gc
import importlib.metadata
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import peft
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script

from conftest import make_tokenizer, rest_slow
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional import ppo
from poise.functional.objectives import RewardScale
from poise.integrations import trl_trainers
from poise.integrations.trl_reward import RobustReward
from poise.models.adapted_maps import linear_maps
from poise.models.chat_format import encode_prompt
from poise.models.context import context_length
from poise.models.encoding import Tokens
from poise.models.families import rounding, windows, without_noise
from poise.models.head_adapters import HeadLinear, add_head_adapters, apart
from poise.models.loading import load_policy
from poise.models.policy import Policy
from poise.models.prompt_trials import shares_prompts, takes_packed_rows
from poise.models.rereading import choose
from poise.models.reward_model import HeadLayout, load_trunk, save_reward_model
from poise.models.rollout import Rollout, packed_attention, uniforms
from poise.models.scorer import FeatureExtractor, Scorer
from poise.models.shared_prompt import Family, pack, packed_hidden, separate_hidden
from poise.policy import merge
from poise.policy.config import MergeConfig
from poise.reward import export
from poise.reward.config import ExportConfig
from poise.runtime.quiet import quiet_loading

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
COLUMNS = (
    "score alone", "in a batch", "beside siblings", "training features", "PPO", "GRPO", "RLOO", "export", "merge",
)  # fmt: skip
YES = "✓"
ROUTED = ("Mixtral", "PhiMoE", "Qwen 2, experts", "gpt-oss", "DeepSeek V3")  # mixtures of experts
WINDOW = 32
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

IDS = {"vocab_size": len(make_tokenizer()), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
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
    "PhiMoE": ("phimoe", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen 2, experts": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 32}),
    "gpt-oss": (
        "gpt_oss",
        GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW,
                   "layer_types": MIXED},
    ),
    "DeepSeek V3": (
        "deepseek_v3",
        SIZE | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
                "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "Falcon, ALiBi": ("falcon", {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": True}),
    "MPT": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 512}),
    "Cohere 2": ("cohere2", GROUPED | {"logit_scale": 0.3, "sliding_window": WINDOW, "layer_types": MIXED}),
    "Gemma 3, with images": (
        "gemma3",
        {"text_config": GEMMA | IDS, "mm_tokens_per_image": 4,
         "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "image_size": 28,
                           "num_attention_heads": 2, "patch_size": 14}},
    ),
    "Jamba": (
        "jamba",
        GROUPED | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
                   "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "Qwen 3 Next": (
        "qwen3_next",
        EXPERTS | {"head_dim": 8, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4,
                   "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                   "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "RWKV": (
        "rwkv",
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 64,
         "context_length": 512},
    ),
    "T5": ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
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
    config = transformers.AutoConfig.for_model(kind, **IDS | shape)
    config.num_labels = 1
    folder = tempfile.mkdtemp()
    with quiet_loading():
        try:
            model = getattr(transformers, auto).from_config(config)
        except ValueError:  # transformers has no such model of this family; a folder of it is the decoder alone
            model = transformers.AutoModel.from_config(config)
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
    return stock_logits(folder_of(name, "AutoModelForSequenceClassification"))[:, 0]


def stock_logits(folder: str) -> torch.Tensor:
    """Without a line of Poise: each text alone through the stock classifier (texts, labels)."""
    with quiet_loading():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for sample in SAMPLES:
        turns = [{"role": "user", "content": sample.prompt}] if isinstance(sample.prompt, str) else sample.prompt
        turns = [*turns, {"role": "assistant", "content": sample.completion}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            found.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0])
    return torch.stack(found)


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


def trl_reads_again_what_it_sampled(algorithm: Literal["grpo", "rloo"], name: str) -> str:
    return reads_again_by_trl(algorithm, folder_of(name, "AutoModelForCausalLM"))


def reads_again_by_trl(algorithm: Literal["grpo", "rloo"], folder: str) -> str:
    """Log-probabilities at sampling, as TRL reads them again and as a stock model has for the text alone are equal."""
    model, tokenizer = load_policy(folder)
    drawn, read, draw, fill = [], [], torch.multinomial, trl_trainers.make_trainer

    def watched(*arguments: Any) -> Any:
        trainer = fill(*arguments)
        evaluate = trainer._get_per_token_logps_and_entropies

        def kept(*given: Any, **options: Any) -> Any:
            found = evaluate(*given, **options)
            read.append((*given[1:3], found[0].detach()))
            return found

        trainer._get_per_token_logps_and_entropies = kept
        return trainer

    def recorded(probabilities: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        tokens = draw(probabilities, *arguments, **options)
        if probabilities.shape[-1] == len(tokenizer):
            drawn.append((tokens[:, 0].tolist(), probabilities.gather(-1, tokens).log()[:, 0].tolist()))
        return tokens

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as run:
        patch.setattr(torch, "multinomial", recorded)
        patch.setattr(trl_trainers, "make_trainer", watched)
        patch.setattr(gc, "collect", lambda *_: 0)  # accelerate's, and peft's model card, take half of the time
        patch.setattr(peft.PeftModel, "create_or_update_model_card", lambda *_: None)
        trl_trainers.train(
            trl_settings(algorithm), LengthReward(), model, tokenizer, [LONG, "Hi"], Path(run),
            lambda _: None,
        )  # fmt: skip
    # TRL shuffles the rows between sampling and training: they are told apart by their tokens.
    at_sampling: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for row in zip(*(zip(*step, strict=True) for step in drawn), strict=True):
        drew, logprobs = zip(*row, strict=True)
        for i in range(1, len(drew) + 1):
            at_sampling.setdefault(drew[:i], []).append(torch.tensor(logprobs[:i]))
    alone = stock_language_model(folder)
    for ids, mask, logprob in read:  # of the reference, and of the policy before its first update
        for row in range(len(ids)):
            tokens, own = ids[row][mask[row].bool()], mask[row, -logprob.shape[1] :].bool()
            with torch.no_grad():
                wanted = alone(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1).gather(-1, tokens[1:, None])
            wanted = wanted[-int(own.sum()) :, 0]
            torch.testing.assert_close(logprob[row][own], wanted, rtol=0, atol=2e-5)
            sampled = at_sampling[tuple(tokens[-len(wanted) :].tolist())]
            assert min((one - wanted).abs().max() for one in sampled) < 2e-5
    assert read
    return YES


class LengthReward(RobustReward):
    """The reward of a completion is its length."""

    __name__ = "length"

    def __init__(self) -> None:
        super().__init__("", "mean", "no file", 0, -math.inf, math.inf)
        self.fitted = RewardScale((0.0,), 0.0, 1.0)

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float]:  # noqa: ARG002
        return [float(len(str(completion))) for completion in completions]


def trl_settings(algorithm: Literal["grpo", "rloo"]) -> trl_trainers.TrlSettings:
    return trl_trainers.TrlSettings(
        algorithm, kl_coef=0.1, num_steps=1, prompts_per_step=2, completions_per_prompt=2, max_tokens=6,
        learning_rate=1e-3, num_epochs=1, num_minibatches=1, clip=0.2, max_grad_norm=1.0, adapted_layers=2, lora_rank=4,
        save_every=9, seed=0,
    )  # fmt: skip


def stock_language_model(folder: str) -> Any:
    with quiet_loading():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def export_gives_the_rewards_of_its_source(name: str) -> str:
    """Three Gaussian heads as one label: without a line of Poise, the mean of their rewards."""
    extract = scorer_of(name).extract
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, scorer_of(name).weight.shape[1], generator=generator)
    layout = HeadLayout(3, "gaussian", (0.5, -0.5, 1.0, 0.0, 0.0, 0.0))
    with tempfile.TemporaryDirectory() as place:
        source = Path(place, "source")
        save_reward_model(source, extract.classifier, extract.tokenizer, weight, layout)
        expected = Scorer.load(str(source))(SAMPLES).mean
        exported = export.run(ExportConfig(str(source), f"{place}/exported", scalar="mean"))
        close(stock_logits(str(exported))[:, 0] - 1 / 3, expected.mean(-1))  # the mean of the offsets
    return YES


def merge_writes_what_the_adapted_model_writes(name: str) -> str:
    base = folder_of(name, "AutoModelForCausalLM")
    policy = Policy(*load_policy(base), adapted_layers=2, rank=4)
    for parameter in policy.trained_parameters().values():
        torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.tensor(encode_prompt(policy.tokenizer, LONG))[None]
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        policy.save(f"{place}/policy")
        adapted = policy.model(input_ids=ids).logits
        merged = stock_language_model(str(merge.run(MergeConfig(f"{place}/policy", f"{place}/merged"))))
        close(merged(input_ids=ids).logits, adapted)
        assert (stock_language_model(base)(input_ids=ids).logits - adapted).abs().max() > 1e-2 * adapted.abs().max()
    return YES


CHECKS: dict[str, Callable[[str], str]] = dict(
    zip(
        COLUMNS,
        (
            score_alone, score_in_a_batch, score_beside_siblings, training_features, ppo_reads_again_what_it_sampled,
            functools.partial(trl_reads_again_what_it_sampled, "grpo"),
            functools.partial(trl_reads_again_what_it_sampled, "rloo"),
            export_gives_the_rewards_of_its_source, merge_writes_what_the_adapted_model_writes,
        ),
        strict=True,
    )
)  # fmt: skip


@functools.cache
def cell(name: str, column: str) -> str:
    """✓, or the one line that a user gets instead."""
    try:
        return CHECKS[column](name)
    except PoiseError as error:
        folders = (folder_of(name, f"AutoModelFor{kind}") for kind in ("CausalLM", "SequenceClassification"))
        return functools.reduce(lambda line, folder: line.replace(folder, "MODEL"), folders, str(error))


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", list(FAMILIES)[:1])  # the page below is of all of them
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


@pytest.mark.parametrize("dtype", rest_slow([torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("name", ["Qwen 2, sliding window", "Mistral, sliding window", "Gemma 3, text"])
def test_a_mask_without_the_window_is_found_out(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of a dozen tokens see a window of 32, and a run is stopped before its first update."""
    classifier = copy.deepcopy(scorer_of(name).extract.classifier).to(dtype)
    model, tokenizer = load_policy(folder_of(name, "AutoModelForCausalLM"))
    model = model.to(dtype)
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


@pytest.mark.parametrize("algorithm", rest_slow(["grpo", "rloo"]))
def test_a_models_generation_config_changes_nothing_that_is_sampled(
    algorithm: Literal["grpo", "rloo"], tmp_path: Path
) -> None:
    """Else the log-probabilities that are trained on are not those of sampling. PPO reads no such settings."""
    folder = shutil.copytree(folder_of("Llama", "AutoModelForCausalLM"), tmp_path / "model")
    transformers.GenerationConfig(
        do_sample=True, temperature=0.3, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.5, no_repeat_ngram_size=1,
        suppress_tokens=list(range(40, 200)), begin_suppress_tokens=[2, 9], min_new_tokens=6, bad_words_ids=[[201]],
        forced_eos_token_id=2, typical_p=0.5, epsilon_cutoff=1e-3, sequence_bias=[[[202], 5.0]], eos_token_id=2,
        encoder_no_repeat_ngram_size=2, exponential_decay_length_penalty=(1, 2.0), num_beams=2,
    ).save_pretrained(folder)  # fmt: skip
    assert reads_again_by_trl(algorithm, str(folder)) == YES


@pytest.mark.parametrize("name", rest_slow(["OPT", "GPT-2", "BLOOM", "Falcon", "Mixtral", "PhiMoE"]))
def test_a_model_that_is_trained_drops_nothing_out(name: str) -> None:
    rates = {
        "BLOOM": {"hidden_dropout": 0.5, "attention_dropout": 0.5}, "Falcon": {"hidden_dropout": 0.5},
        "Mixtral": {"attention_dropout": 0.5, "router_jitter_noise": 0.5},
    }  # fmt: skip
    config = transformers.AutoConfig.from_pretrained(folder_of(name, "AutoModelForCausalLM"), **rates.get(name, {}))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder_of(name, "AutoModelForCausalLM"), config=config, attn_implementation="eager"
    )
    ids = torch.arange(3, 40)[None]

    def read() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    wanted, before = model.eval() and read(), model.config.to_dict()
    model.train()
    assert (read() - wanted).abs().max() > 1e-2
    with without_noise(model):
        torch.testing.assert_close(read(), wanted, rtol=0, atol=1e-6)
    assert (read() - wanted).abs().max() > 1e-2
    assert model.config.to_dict() == before


def off_by_one(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    sees, positions = packed_attention(rollout)
    return sees, positions + (torch.arange(positions.shape[1]) >= rollout.prompt_ids_PL.shape[1])


def sees_padding(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    sees, positions = packed_attention(rollout)
    return sees | torch.ones_like(sees[0]).tril(), positions


def by_columns(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    sees, positions = packed_attention(rollout)
    return sees, torch.arange(positions.shape[1]).expand_as(positions)


@pytest.mark.parametrize("wrong", [off_by_one, sees_padding, by_columns])
@pytest.mark.parametrize("name", rest_slow(["Phi-3", "Gemma 2", "GPT-2", "OPT", "OLMo 2"]))
def test_in_bfloat16_a_wrong_reading_is_not_taken_for_rounding(
    name: str, wrong: Callable[[Rollout], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each, the KL is a few hundredths of a nat: these models know next to nothing."""
    model = load_policy(folder_of(name, "AutoModelForCausalLM"))[0].to(torch.bfloat16)
    assert choose(model, 0).packed
    monkeypatch.setattr("poise.models.rereading.packed_attention", wrong)
    assert not choose(model, 0).packed


@pytest.mark.parametrize(("kind", "why"), [
    ("bert", "written token by token"),
    ("lfm2", "cannot be sampled from"),
    ("modernbert-decoder", "TRL computes other log-probabilities"),
    ("longcat_flash", "has no stack of 4 decoder layers"),
    ("xlm", "cannot be sampled from"),
])  # fmt: skip
def test_what_cannot_be_trained_is_one_line(kind: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders; states that cannot be repeated; a layer between decoder and output; two layers that count as one; a
    model that asserts what it is given."""
    shapes = {
        "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 64},
        "longcat_flash": {"num_layers": 2, "num_hidden_layers": 4, "num_key_value_heads": 4, "kv_lora_rank": 8,
                          "q_lora_rank": 8, "head_dim": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                          "v_head_dim": 8, "n_routed_experts": 4, "zero_expert_num": 1, "moe_topk": 2,
                          "expert_ffn_hidden_size": 32, "ffn_hidden_size": 64},
        "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
    }  # fmt: skip
    monkeypatch.setitem(FAMILIES, kind, (kind, (SIZE if kind == "bert" else GROUPED) | shapes.get(kind, {})))
    with pytest.raises(PoiseError, match=why) as caught:
        trl_reads_again_what_it_sampled("grpo", kind)
    assert "\n" not in str(caught.value)
    if kind != "modernbert-decoder":
        with pytest.raises(PoiseError, match=why):
            ppo_reads_again_what_it_sampled(kind)


def test_grouped_maps_are_not_adapted() -> None:
    """DeepSeek V4 has a linear layer that takes several vectors; PEFT would add a map of another shape to it."""

    class Grouped(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.einsum("...gi,goi->...go", input, self.weight.view(2, -1, self.in_features)).flatten(-2)

    model, _ = load_policy(folder_of("Llama", "AutoModelForCausalLM"))
    before = linear_maps(model)
    model.model.layers[2].mlp.down_proj = Grouped(32, 16, bias=False)
    assert before == [*linear_maps(model), "model.layers.2.mlp.down_proj"]


def test_sparse_attention_that_chooses_padding_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doge attends to a number of tokens of its choice: 16 here, of texts of 30 and more."""
    monkeypatch.setitem(FAMILIES, "Doge", ("doge", GROUPED | {"keep_window_size": 16, "head_dim": 8}))
    score_alone("Doge")
    for check in (score_in_a_batch, score_beside_siblings, training_features):
        with pytest.raises(PoiseError, match="change with the padding of its batch; such a reward model"):
            check("Doge")


def test_routers_that_return_more_than_a_map_are_not_adapted() -> None:
    model, _ = load_policy(folder_of("PhiMoE", "AutoModelForCausalLM"))
    assert any(isinstance(m, torch.nn.Linear) and n.endswith("router") for n, m in model.named_modules())
    names = linear_maps(model)
    assert names
    assert not any("router" in name for name in names)


@pytest.mark.parametrize("name", rest_slow(["DeepSeek V3", "Qwen 2, experts", "Mixtral"]))
def test_adapters_of_a_mixture_are_in_the_upper_layers(name: str) -> None:
    """PEFT takes some names for those of all experts, lower layers too, which count as frozen here."""
    policy = Policy(*load_policy(folder_of(name, "AutoModelForCausalLM")), adapted_layers=1, rank=4)
    adapters = [name for name in policy.trained_parameters() if "lora" in name]
    assert adapters
    assert all(".layers.2." in name for name in adapters)


def test_only_the_text_tower_is_adapted() -> None:
    """The vision tower has as many layers."""
    model, _ = load_policy(folder_of("Gemma 3, with images", "AutoModelForCausalLM"))
    assert {name.split(".layers")[0] for name in linear_maps(model)} == {"model.language_model"}


def test_merging_is_compared_with_base_and_adapters(tmp_path: Path) -> None:
    """PEFT's sum for Jamba is not what its adapters compute."""
    model, _ = load_policy(folder_of("Jamba", "AutoModelForCausalLM"))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=linear_maps(model, 1))
    )
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "policy")
    with pytest.raises(PoiseError, match="the folded model has other logits than base and adapters"):
        merge.run(MergeConfig(str(tmp_path / "policy"), str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()


def test_a_context_without_a_limit_is_none() -> None:
    assert context_length(transformers.XLNetConfig()) == sys.maxsize


def test_the_context_of_mpt_has_a_name_of_its_own() -> None:
    assert context_length(transformers.MptConfig(max_seq_len=64)) == 64


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
        for package in ("transformers", "torch", "peft", "trl")
    )
    head = f"""# Model families

What holds for each family, as `tests/models/test_families.py` finds it, which also writes this page. Its models are
tiny and of random weights; its texts are shorter and longer than the sliding window, where there is one. With
{versions}; in float32 on a CPU.

- score alone, in a batch, beside siblings (other completions of the prompt): equal to the stock
  `AutoModelForSequenceClassification` on one text, to 1e-5 of the largest score.
- training features: what the trainer of trunks reads, and what the feature cache keeps, equal to what is scored.
- PPO: log-probabilities at sampling equal those at re-reading; KL is 0 and the ratio 1 before the first update.
- GRPO, RLOO: of one step of `--algorithm grpo` and `rloo`, log-probabilities at sampling, at re-reading before the
  update, and of a stock model for the text alone are equal. No dropout, whatever the config says.
- export: three Gaussian heads exported as one label; the stock classifier gives the mean of their rewards.
- merge: adapters folded in; the stock model gives the logits of base and adapters.
- "each with its prompt": the model takes no mask from outside, so every completion is read in a row of its own with a
  copy of its prompt. Results are the same; reading takes longer. A mixture of experts may be read so in any run: where
  two experts are nearly tied for a token that is tried, rounding decides. Here it has a ✓ either way.
- "with images": what is found of its language model. Commands refuse a folder whose config.json names a vision or audio
  tower, in one line, since images in a prompt would be dropped.

"""
    notes: dict[str, int] = {}

    def shown(name: str, column: str) -> str:
        found = cell(name, column)
        if name in ROUTED and found.startswith(YES):
            return YES
        return found if found.startswith(YES) else f"({notes.setdefault(found, len(notes) + 1)})"

    rows = [("family", *COLUMNS), ("---",) * (1 + len(COLUMNS))]
    rows += [(name, *(shown(name, column) for column in COLUMNS)) for name in FAMILIES]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    said = "".join(f"{number}. {line}\n" for line, number in notes.items())
    return f"{head}{table}\nWhere there is a number, the command ends in one line:\n\n{said}"


@pytest.mark.slow  # every family through every command
def test_the_page_says_what_was_found() -> None:
    """If not: python tests/models/test_families.py."""
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch:
        patch.setenv("POISE_CACHE", cache)
        PAGE.write_text(page(), encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["Phi-3, longrope", "OPT, projected embeddings", "Mixtral", "MPT", "Jamba", "Gemma 3, text"]
)
def test_heads_with_adapters_of_their_own_say_what_peft_says(name: str, tmp_path: Path) -> None:
    classifier, tokenizer = load_trunk(folder_of(name, "AutoModelForCausalLM"), 0)
    add_head_adapters(classifier, 2, 2, 1)
    for module in classifier.modules():
        if isinstance(module, HeadLinear):
            torch.nn.init.normal_(module.up_KOR, std=0.3)
    weight = torch.randn(2, classifier.score.in_features)
    layout = HeadLayout(2, "point", (0.0, 0.0), adapters=True)
    save_reward_model(tmp_path / "rm", classifier, tokenizer, apart(weight, 2), layout)
    samples = [Sample("Review a film.", "good"), Sample("Review a film.", "bad film"), Sample("x", "y z")]
    scorer = Scorer.load(str(tmp_path / "rm"))
    found = scorer(samples).mean
    for head in range(2):
        stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
        adapted = peft.PeftModel.from_pretrained(stock, str(tmp_path / "rm" / "adapters" / f"head_{head}")).eval()
        for i, sample in enumerate(samples):
            prompt, completion = scorer.extract.encode(sample)
            with torch.no_grad():
                told = adapted(torch.tensor([[*prompt, *completion]])).logits[0, head]
            torch.testing.assert_close(found[i, head], told, rtol=1e-5, atol=1e-5)


def test_bloom_takes_no_adapters_for_each_head() -> None:
    """Its positions are one table for rows times attention heads, which is not copied row by row."""
    classifier, _ = load_trunk(folder_of("BLOOM", "AutoModelForCausalLM"), 0)
    with pytest.raises(PoiseError, match="a bloom cannot carry an adapter for each head"):
        add_head_adapters(classifier, 2, 2)
