"""How far right and wrong readings of one text differ in bfloat16, and what the two guards of PPO make of them.

    OMP_NUM_THREADS=1 python experiments/bfloat16_guard.py --output results/bfloat16-guard-DATE.json

`probes`: the first guard, `families.alike`, with which `rereading.choose` and `shared_prompt` try a way of reading.
Per model: the relative difference of hidden states between texts alone and texts padded (`padded`) or packed
(`packed`), over probes of random tokens; `allowed`; and of wrong readings the difference with the KL that it costs, in
nats per token. Wrong: positions of completions off by one, positions that count columns, no window.

`runs`: the second guard, `rereading.check_rereading`, on fresh rollouts. A completion, cut to its first tokens, is one
trial: the rms difference of log-probabilities, over what is allowed. `false_alarms` are right readings above 1. Of
wrong readings: the ratio over the whole rollout, and half of the mean square, which is about their KL.

Models: SmolLM2 and, of random weights, 12 layers of width 256 for eight families.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from poise.models import families, rereading
from poise.models.choices import DEFAULT_MODEL
from poise.models.families import narrow_windows, rounding, tolerance, windows
from poise.models.loading import load_tokenizer, load_weights, resolve_model
from poise.models.padding import pad_apart
from poise.models.policy import Policy
from poise.models.rereading import Reading
from poise.models.rollout import Part, Rollout, uniforms
from poise.runtime.run_folder import Json, environment

WINDOW, TRIALS, TOKENS = 32, 6, 12
WIDE: Json = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
    "max_position_embeddings": 512,
}  # fmt: skip
GROUPED = WIDE | {"num_key_value_heads": 2, "head_dim": 32}
MIXED = ["sliding_attention", "full_attention"] * 6
SHAPES: dict[str, Json] = {
    "llama": GROUPED,
    "qwen3": GROUPED,
    "mistral": GROUPED | {"sliding_window": WINDOW},
    "gemma2": GROUPED | {"sliding_window": WINDOW, "layer_types": MIXED, "query_pre_attn_scalar": 32},
    "gpt2": {"n_embd": 256, "n_layer": 12, "n_head": 8, "n_positions": 512},
    "opt": WIDE | {"ffn_dim": 512, "word_embed_proj_dim": 256},
    "gpt_neox": WIDE,
    "mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
}
KINDS = ({"tune": "lora"}, {"tune": "lora", "value_trunk": "own"}, {"tune": "full"})
PROMPTS = [
    "Name a color.",
    "Tell me about the long road that goes over the hill and through the wood, and where it ends.",
]


def models() -> Iterator[tuple[str, Any, Any]]:
    """(name, model in bfloat16, tokenizer)."""
    folder = resolve_model(DEFAULT_MODEL)
    tokenizer = load_tokenizer(folder)
    model = load_weights(transformers.AutoModelForCausalLM, folder, "language model", dtype=torch.bfloat16)
    pad_apart(tokenizer, model)
    yield "SmolLM2", model.eval(), tokenizer
    for kind, shape in SHAPES.items():
        torch.manual_seed(0)
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
        config = transformers.AutoConfig.for_model(kind, vocab_size=len(tokenizer), **ids, **shape)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.06)
        # Logits of std 3, as a trained model's: random ones are so even that no fault costs a tenth of a nat.
        head = model.get_output_embeddings().weight
        head.data = 3 * head.data / (head.data.std() * shape.get("hidden_size", 256) ** 0.5)
        yield kind, model.bfloat16().eval(), tokenizer


# ---- wrong readings: functions that replace `rereading.packed_attention` ----

right = rereading.packed_attention


def off_by_one(rollout: Rollout) -> tuple[Tensor, Tensor]:
    sees, positions = right(rollout)
    later = torch.arange(positions.shape[1]) >= rollout.prompt_ids_PL.shape[1]
    return sees, positions + later


def columns(rollout: Rollout) -> tuple[Tensor, Tensor]:
    sees, positions = right(rollout)
    return sees, torch.arange(positions.shape[1]).expand_as(positions)


WRONG = {"off by one": off_by_one, "columns": columns}


def misread(model: Any) -> Iterator[str]:
    """Within each step, packed rows are read wrongly."""
    for name, way in WRONG.items():
        rereading.packed_attention = way
        yield name
        rereading.packed_attention = right
    limits = windows(model)
    if limits and any(limits.values()):
        families.windows = lambda _: dict.fromkeys(limits)
        yield "no window"
        families.windows = windows


def apart(one: Tensor, other: Tensor) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


@torch.no_grad()
def probes(model: Any) -> Json:
    generator = torch.Generator().manual_seed(1)
    size = model.get_input_embeddings().num_embeddings
    head = model.get_output_embeddings()
    padded, packed, wrong = [], [], {}
    with narrow_windows(model):
        for trial in range(TRIALS):
            rollout = rereading._probe(model)
            if trial:
                for ids in (rollout.prompt_ids_PL, rollout.completion_ids_PMT):
                    ids.copy_(torch.randint(size // 10, size, ids.shape, generator=generator))
            alone = rereading._states_alone(model, rollout)
            padded.append(apart(rereading._states(model, rollout, Reading(packed=False)), alone))
            packed.append(apart(rereading._states(model, rollout, Reading(packed=True)), alone))
            for name in misread(model):
                states = rereading._states(model, rollout, Reading(packed=True))
                p, q = (head(x.to(head.weight.dtype)).float().log_softmax(-1) for x in (alone, states))
                found = wrong.setdefault(name, {"difference": [], "kl": []})
                found["difference"].append(apart(states, alone))
                found["kl"].append((p.exp() * (p - q)).sum(-1).mean().item())
    return {"allowed": 2**0.5 * rounding(model), "padded": padded, "packed": packed, "wrong": wrong}


@torch.no_grad()
def runs(model: Any, tokenizer: Any, kind: Json) -> Json:
    policy = Policy(model, tokenizer, adapted_layers=2, rank=4, **kind)
    rollout = policy.sample(PROMPTS, uniforms(len(PROMPTS), 4, TOKENS, torch.Generator().manual_seed(0)))
    base, sampled = policy._base, rollout.sampled_PMT
    assert sampled is not None
    each = torch.arange(len(PROMPTS)).unsqueeze(-1)
    alone = torch.cat([policy._read(base, rollout.part(Part(one)), reading=Reading(packed=False))[0] for one in each])
    mask = rollout.mask_PMT.bool()

    def over(logprob: Tensor, chosen: Tensor) -> float:
        """The rms difference over what `check_rereading` allows, on these tokens."""
        found, rms = ((x - sampled)[chosen].square().mean().sqrt().item() for x in (logprob, alone))
        allowed = 2 * (1 + 5 * int(chosen.sum()) ** -0.5) * rms
        return found / min(max(allowed, torch.finfo(torch.bfloat16).eps), tolerance(base))

    trials = []
    for p, m in torch.cartesian_prod(torch.arange(len(PROMPTS)), torch.arange(4)).tolist():
        for length in (1, 2, 4, 8, TOKENS):
            chosen = torch.zeros_like(mask)
            chosen[p, m, :length] = mask[p, m, :length]
            trials.append(over(rollout.logprob_PMT, chosen))
    whole = replace(rollout, hidden_PLH=None)  # all layers read again
    readings = {}
    if policy._reading.packed:
        readings = {name: policy._read(base, whole)[0] for name in misread(base)}
        logits = policy._predict(base, whole, logits=True).logits
        assert logits is not None
        warm = (logits.float() / 1.2).log_softmax(-1)
        readings["temperature 1.2"] = warm.gather(-1, rollout.completion_ids_PMT.unsqueeze(-1)).squeeze(-1)
    wrong = {
        name: {"over_allowed": over(logprob, mask), "half_square": (logprob - sampled)[mask].square().mean().item() / 2}
        for name, logprob in readings.items()
    }
    return {
        "trials": len(trials), "false_alarms": sum(ratio > 1 for ratio in trials), "highest": max(trials),
        "whole": over(rollout.logprob_PMT, mask), "rms": (alone - sampled)[mask].square().mean().sqrt().item(),
        "wrong": wrong,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    found: Json = {"environment": environment(), "probes": {}, "runs": {}}
    for name, model, tokenizer in models():
        found["probes"][name] = probes(model)
        for kind in KINDS if name == "SmolLM2" else KINDS[:1]:
            label = " ".join([name, *kind.values()])
            found["runs"][label] = runs(copy.deepcopy(model), tokenizer, kind)
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
