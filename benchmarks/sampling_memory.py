"""Peak memory and time of sampling: all completions at once, and in turns that bound their keys and values.

python benchmarks/sampling_memory.py --output results/sampling-memory-DATE.json

The default model as a policy with adapters in all layers; 4 prompts x 6 completions x 96 tokens after prompts of about
256 tokens, none ends early. Each in a process of its own; peak is what its memory rose by (ru_maxrss) over that
after one short sampling. `completions` is a hash of them: rounding, of about 1e-5 nats, can turn one of 2,304 draws.
"""

import hashlib
import time

from rollout_memory import Json, compare, peak_mib

PROMPTS, COMPLETIONS, TOKENS, WORDS = 4, 6, 96, 250


def measure(mib: int) -> Json:
    import torch

    from poise.functional import memory
    from poise.models.choices import DEFAULT_MODEL
    from poise.models.loading import load_policy
    from poise.models.policy import Policy
    from poise.models.rollout import uniforms

    torch.set_num_threads(1)
    memory.SAMPLED_AT_ONCE = mib * 2**20
    policy = Policy(*load_policy(DEFAULT_MODEL), adapted_layers=0, rank=16)
    policy.end_ids = []
    prompts = ["the film was " * (WORDS // 3) + str(number) for number in range(PROMPTS)]
    numbers = uniforms(PROMPTS, COMPLETIONS, TOKENS, torch.Generator().manual_seed(0))
    policy.sample(prompts[:1], numbers[:1, :1, :2])  # what is allocated once
    before, started = peak_mib(), time.process_time()
    rollout = policy.sample(prompts, numbers)
    seconds, peak = time.process_time() - started, peak_mib() - before
    ids = hashlib.sha256(rollout.completion_ids_PMT.numpy().tobytes()).hexdigest()
    return {"peak_mib": round(peak), "cpu_seconds": round(seconds, 1), "completions": ids[:16]}


if __name__ == "__main__":
    compare(
        measure,
        {"at once": 10**6, "up to 128 MiB": 128, "up to 64 MiB": 64},
        {"shape": [PROMPTS, COMPLETIONS, TOKENS, WORDS]},
        "sampled",
    )
