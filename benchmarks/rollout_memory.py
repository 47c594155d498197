"""Peak memory and time of reading a rollout without gradients: all at once, and in passes.

python benchmarks/rollout_memory.py --output results/rollout-memory-DATE.json

The default model as a policy with adapters in its upper ten layers; 16 prompts x 8 completions x 128 tokens, from token
ids at random. Read are the reference's log-probabilities, with the hidden states that sampling keeps. Each in a process
of its own; peak is what the process's memory rose by (ru_maxrss) over that before the reading.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Json = dict[str, Any]
PROMPTS, COMPLETIONS, TOKENS, PROMPT_TOKENS, REPEATS = 16, 8, 128, 64, 1


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(tokens_per_pass: int) -> Json:
    import torch

    from poise.models import rollout as rollouts
    from poise.models.choices import DEFAULT_MODEL
    from poise.models.loading import load_policy
    from poise.models.policy import Policy

    torch.set_num_threads(1)
    rollouts.TOKENS_PER_PASS = tokens_per_pass
    policy = Policy(*load_policy(DEFAULT_MODEL), adapted_layers=10, rank=16)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(100, 1000, (PROMPTS, PROMPT_TOKENS), generator=generator)
    completion = torch.randint(100, 1000, (PROMPTS, COMPLETIONS, TOKENS), generator=generator)
    mask = torch.ones(completion.shape)
    width = policy.model.config.hidden_size
    hidden = torch.randn(PROMPTS, PROMPT_TOKENS + COMPLETIONS * TOKENS, width, generator=generator)
    rollout = rollouts.Rollout(prompt, torch.ones_like(prompt), completion, mask, mask, mask, hidden)
    policy.reference_logprobs(rollout.part(rollouts.Part(torch.arange(1))))  # what is allocated once
    before, times = peak_mib(), []
    for _ in range(REPEATS):
        started = time.process_time()
        policy.reference_logprobs(rollout)
        times.append(time.process_time() - started)
    return {"peak_mib": round(peak_mib() - before), "cpu_seconds": round(statistics.median(times), 2)}


def compare(measure: Callable[[int], Json], sizes: dict[str, int], about: Json, key: str) -> None:
    """The command of a benchmark that measures each of several sizes in a process of its own, of the same script.

    about: what the result says beside the figures, which it has under `key`.
    """
    script = Path(sys.argv[0])
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", default=f"results/{script.stem.replace('_', '-')}.json")
    parser.add_argument("--one", type=int, help="measure this size, in this process")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one)))
        return
    found = {}
    for name, size in sizes.items():
        done = subprocess.run(
            [sys.executable, str(script), "--one", str(size)], capture_output=True, text=True, check=True
        )
        found[name] = json.loads(done.stdout.splitlines()[-1])
    result = {"date": time.strftime("%Y-%m-%d"), **about, key: found}
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    compare(
        measure,
        {"all at once": 10**9, "passes of 4,096 tokens": 4_096, "passes of 1,024 tokens": 1_024},
        {"shape": [PROMPTS, COMPLETIONS, TOKENS, PROMPT_TOKENS]},
        "read",
    )
