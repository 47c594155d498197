"""What a PPO step costs, phase by phase, against the plain way of doing the same work and against its floor.

    python benchmarks/ppo_step.py [--layers 10|0] [--repeats 5]      # 0: adapters in all layers

The plain way: `generate` on every row with its own copy of the prompt, then full forward passes of padded rows for the
sampled tokens' log-probabilities, for the reference and for each update. The same model, adapters, prompts, number of
completions, completion length (no row ends early, for both), epochs and minibatches. Prints JSON; dated results lie in
results/. Floor: the larger of the FLOPs that cannot be avoided over the GEMM rate, and the bytes of weights
that must be read over the memory bandwidth, both measured in the same run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from poise.models.chat_format import encode, generation_prompt
from poise.models.loading import DEFAULT_MODEL, load_policy
from poise.models.policy import Policy
from poise.models.reward_model import HeadLayout, load_trunk
from poise.models.rollout import Part, Rollout, uniforms
from poise.models.scorer import FeatureExtractor, Scorer, generated
from poise.runtime.run_folder import environment
from poise.studies import quickstart as recipes

PROMPTS, COMPLETIONS, TOKENS, EPOCHS, MINIBATCHES, RANK, REWARD_LAYERS = 4, 8, 24, 4, 2, 16, 8


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


def bandwidth() -> float:
    """Bytes per second of reading memory that no cache holds."""
    much = torch.randn(2**26)
    return 4 * 2**26 / median_seconds(lambda: much.sum(), 5)


def update(policy: Policy, losses: list[Callable[[], torch.Tensor]]) -> None:
    for _ in range(EPOCHS):
        for loss in losses:
            policy.zero_grad()
            loss().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, tokenizer = load_policy(options.model)
    depth = model.config.num_hidden_layers
    adapted = options.layers or depth
    policy = Policy(model, tokenizer, adapted_layers=options.layers, rank=RANK)
    trunk, trunk_tokenizer = load_trunk(options.model, REWARD_LAYERS)
    layout = HeadLayout(5, "gaussian", (0.0,) * 10)
    scorer = Scorer(FeatureExtractor(trunk, trunk_tokenizer), torch.randn(10, trunk.config.hidden_size), layout)
    end = tokenizer.eos_token_id
    prompts = [recipes.review_prompt(f"a film about {film}") for film in recipes.TRAIN_FILMS[:PROMPTS]]

    def block_end(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
        logits[..., end] = -torch.inf
        return logits

    handle = model.lm_head.register_forward_hook(block_end)
    generator = torch.Generator().manual_seed(0)
    numbers = uniforms(PROMPTS, COMPLETIONS, TOKENS, generator)
    rollout = policy.sample(prompts, numbers)
    texts = policy.texts(rollout)
    samples = [generated(prompt, text) for prompt, row in zip(prompts, texts, strict=True) for text in row]
    parts = torch.arange(PROMPTS).chunk(MINIBATCHES)

    ids = [encode(tokenizer, generation_prompt(tokenizer, prompt)) for prompt in prompts for _ in range(COMPLETIONS)]
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

    def plain_scoring() -> list[object]:
        return [scorer([sample]) for sample in samples]  # no prompt shared; one by one, so that no padding is paid for

    def shared_loss(part: Rollout) -> torch.Tensor:
        return policy.evaluate(part).logprob.sum()

    def plain_loss(index: torch.Tensor) -> torch.Tensor:
        return plain_logprobs(index).sum()

    every_row = torch.arange(len(rows)).chunk(MINIBATCHES)
    shared_update = [lambda part=part: shared_loss(rollout.part(Part(part))) for part in parts]
    plain_update = [lambda index=index: plain_loss(index) for index in every_row]
    with torch.no_grad():
        plain_old = median_seconds(lambda: plain_logprobs(torch.arange(len(rows))), options.repeats)
    phases = {
        "sample": (
            median_seconds(lambda: policy.sample(prompts, numbers), options.repeats),
            median_seconds(plain_sampling, options.repeats),
        ),
        "score": (
            median_seconds(lambda: scorer(samples), options.repeats),
            median_seconds(plain_scoring, options.repeats),
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

    rate, speed = gemm_rate(), bandwidth()
    layer = sum(p.numel() for n, p in model.named_parameters() if ".layers.0." in n and "lora" not in n)
    head = model.get_output_embeddings().weight.numel()
    written, packed = PROMPTS * COMPLETIONS * TOKENS, PROMPTS * (longest + COMPLETIONS * TOKENS)
    upper = adapted * layer * packed + head * written  # multiply-adds of one pass over the trained layers
    flops = {
        "sample": 2 * (depth * layer * (PROMPTS * longest + written) + head * written),
        "score": 2 * REWARD_LAYERS * layer * packed,
        "old log-probabilities": 0,
        "reference": 2 * upper,
        "update": EPOCHS * 2 * 2 * upper,  # forward, and backward to the inputs; frozen weights need no gradient
    }
    passes = {
        "sample": TOKENS,
        "score": 1,
        "old log-probabilities": 0,
        "reference": 1,
        "update": 2 * EPOCHS * MINIBATCHES,
    }
    weights = {"sample": depth * layer + head, "score": REWARD_LAYERS * layer}
    floors = {
        name: max(flops[name] / rate, passes[name] * 4 * weights.get(name, adapted * layer + head) / speed)
        for name in flops
    }
    shared, plain = (sum(pair[i] for pair in phases.values()) for i in (0, 1))
    report = {
        "gemm_gflops": round(rate / 1e9),
        "bandwidth_gb_s": round(speed / 1e9, 1),
        "phases": {
            name: {"shared_s": round(a, 2), "plain_s": round(b, 2), "floor_s": round(floors[name], 2)}
            for name, (a, b) in phases.items()
        },
        "step": {"shared_s": round(shared, 2), "plain_s": round(plain, 2), "ratio": round(plain / shared, 2)},
        "setting": f"{PROMPTS} prompts x {COMPLETIONS} completions x {TOKENS} tokens, {longest}-token prompts, "
        f"{EPOCHS} epochs x {MINIBATCHES} minibatches, LoRA r{RANK} in the upper {adapted} of {depth} layers, "
        f"reward of {REWARD_LAYERS} layers",
        "environment": environment(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
