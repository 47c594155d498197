"""What a PPO step costs, phase by phase, against the plain way of doing the same work and against its floor.

    python benchmarks/ppo_step.py [--model MODEL] [--repeats 5]

The plain way: `generate` on every row with its own copy of the prompt, then full forward passes of padded rows for the
sampled tokens' log-probabilities, for the reference and for each update. The same model, adapters, prompts, number of
completions, completion length (no row ends early, for both), epochs and minibatches. Prints JSON; dated results lie
beside this file. Floor: the FLOPs that the shared way cannot avoid, over the GEMM rate measured in the same run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from poise import recipes
from poise.models import DEFAULT_MODEL, encode, load_policy, prompt_text
from poise.policy import Policy, Rollout
from poise.runs import environment

PROMPTS, COMPLETIONS, TOKENS, EPOCHS, MINIBATCHES, LAYERS, RANK = 4, 8, 20, 2, 2, 10, 16


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def gemm_rate() -> float:
    """FLOP/s of a product of the size of a minibatch through an MLP layer."""
    a, b = torch.randn(512, 576), torch.randn(576, 1536)
    return 2 * 512 * 576 * 1536 * 50 / median_seconds(lambda: [a @ b for _ in range(50)], 5)


def update(policy: Policy, losses: list[Callable[[], torch.Tensor]]) -> None:
    for _ in range(EPOCHS):
        for loss in losses:
            policy.zero_grad()
            loss().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, tokenizer = load_policy(options.model)
    policy = Policy(model, tokenizer, adapted_layers=LAYERS, rank=RANK)
    end = tokenizer.eos_token_id
    prompts = [recipes.review_prompt(f"a film about {film}") for film in recipes.TRAIN_FILMS[:PROMPTS]]

    def block_end(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
        logits[..., end] = -torch.inf
        return logits

    handle = model.lm_head.register_forward_hook(block_end)
    generator = torch.Generator().manual_seed(0)
    rollout = policy.sample(prompts, COMPLETIONS, TOKENS, generator)
    parts = torch.arange(PROMPTS).chunk(MINIBATCHES)

    ids = [encode(tokenizer, prompt_text(tokenizer, prompt)) for prompt in prompts for _ in range(COMPLETIONS)]
    longest = max(map(len, ids))
    padded = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    rows = torch.cat([padded, rollout.completion_ids_PMT.flatten(0, 1)], 1)
    rows_mask = torch.cat([mask, torch.ones(len(rows), TOKENS, dtype=mask.dtype)], 1)

    def plain_logprobs(index: torch.Tensor) -> torch.Tensor:
        logits = policy.model(input_ids=rows[index], attention_mask=rows_mask[index]).logits[:, longest - 1 : -1]
        return logits.log_softmax(-1).gather(-1, rows[index, longest:].unsqueeze(-1))

    def plain_reference() -> torch.Tensor:
        with torch.no_grad(), policy.model.disable_adapter():
            return plain_logprobs(torch.arange(len(rows)))

    def plain_sampling() -> torch.Tensor:
        return policy.model.generate(
            input_ids=padded, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=TOKENS, min_new_tokens=TOKENS
        )

    def shared_loss(part: Rollout) -> torch.Tensor:
        return policy.evaluate(part)[0].sum()

    def plain_loss(index: torch.Tensor) -> torch.Tensor:
        return plain_logprobs(index).sum()

    every_row = torch.arange(len(rows)).chunk(MINIBATCHES)
    shared_update = [lambda part=part: shared_loss(rollout.rows(part)) for part in parts]
    plain_update = [lambda index=index: plain_loss(index) for index in every_row]
    with torch.no_grad():
        plain_old = median_seconds(lambda: plain_logprobs(torch.arange(len(rows))), options.repeats)
    phases = {
        "sample": (
            median_seconds(lambda: policy.sample(prompts, COMPLETIONS, TOKENS, generator), options.repeats),
            median_seconds(plain_sampling, options.repeats),
        ),
        "old log-probabilities": (0.0, plain_old),
        "reference": (
            median_seconds(lambda: policy.reference_logprobs(rollout), options.repeats),
            median_seconds(plain_reference, options.repeats),
        ),
        "update": (
            median_seconds(lambda: update(policy, shared_update), options.repeats),
            median_seconds(lambda: update(policy, plain_update), options.repeats),
        ),
    }
    handle.remove()

    rate = gemm_rate()
    layer = sum(p.numel() for n, p in model.named_parameters() if ".layers.0." in n and "lora" not in n)
    head = model.get_output_embeddings().weight.numel()
    depth, written, packed = model.config.num_hidden_layers, PROMPTS * COMPLETIONS * TOKENS, rollout.hidden_PLH.shape
    prompt_tokens, row_tokens = PROMPTS * longest, packed[0] * packed[1]
    upper = LAYERS * layer * row_tokens + head * written  # multiply-adds of one pass over the adapted layers
    floors = {
        "sample": 2 * (depth * layer * (prompt_tokens + written) + head * written),
        "old log-probabilities": 0,
        "reference": 2 * upper,
        "update": EPOCHS * 2 * 2 * upper,  # forward, and backward to the inputs; frozen weights need no gradient
    }
    shared, plain = (sum(pair[i] for pair in phases.values()) for i in (0, 1))
    report = {
        "gemm_gflops": round(rate / 1e9),
        "phases": {
            name: {"shared_s": round(a, 2), "plain_s": round(b, 2), "floor_s": round(floors[name] / rate, 2)}
            for name, (a, b) in phases.items()
        },
        "step": {"shared_s": round(shared, 2), "plain_s": round(plain, 2), "ratio": round(plain / shared, 2)},
        "setting": f"{PROMPTS} prompts x {COMPLETIONS} completions x {TOKENS} tokens, {longest}-token prompts, "
        f"{EPOCHS} epochs x {MINIBATCHES} minibatches, LoRA r{RANK} in the upper {LAYERS} layers, without scoring",
        "environment": environment(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
