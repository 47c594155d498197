"""Attention over a policy's rows [prompt | completions], masked whole and taken apart: forward and backward of a layer.

    OMP_NUM_THREADS=2 python benchmarks/rows_attention.py > results/rows-attention-DATE.json

9 heads that share 3 keys, 64 channels each (SmolLM2-135M), 2 rows of 8 completions; medians, both sides in turn.
"""

import json
import statistics
import time
from functools import partial

import torch
from torch import nn
from transformers import AttentionInterface

from poise.models.families import additive
from poise.models.shared_prompt import _attend_apart, attends
from poise.runtime.run_folder import Json, environment

ROWS, COMPLETIONS, HEADS, KEY_HEADS, CHANNELS, REPEATS = 2, 8, 9, 3, 64, 15
SIZES = ((43, 24), (128, 128), (512, 64))  # tokens of the prompt, of each completion


def measure(prompt: int, tokens: int) -> Json:
    """Median milliseconds of each way, and the largest difference of their outputs."""
    number = torch.arange(1, COMPLETIONS + 1).repeat_interleave(tokens)
    part = torch.cat([torch.zeros(prompt, dtype=torch.long), number]).expand(ROWS, -1)
    mask = additive(attends(torch.zeros_like(part), part), torch.float32)
    query, key, value = (
        torch.randn(ROWS, part.shape[1], heads, CHANNELS).transpose(1, 2).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    module = nn.Module()
    module.num_key_value_groups = HEADS // KEY_HEADS
    ways = {"whole": AttentionInterface()["sdpa"], "apart": partial(_attend_apart, COMPLETIONS, tokens)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    outputs = {}
    for _ in range(REPEATS + 1):
        for name, attend in ways.items():
            start = time.perf_counter()
            outputs[name] = attend(module, query, key, value, mask, scaling=CHANNELS**-0.5)[0]
            outputs[name].sum().backward()
            seconds[name].append(time.perf_counter() - start)
    found = {f"{name}_ms": round(1000 * statistics.median(values[1:]), 2) for name, values in seconds.items()}
    difference = (outputs["whole"] - outputs["apart"]).abs().max().item()
    return {"prompt": prompt, "tokens": tokens, **found, "largest_difference": difference}


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps({"sizes": [measure(*size) for size in SIZES], "environment": environment()}, indent=1))
