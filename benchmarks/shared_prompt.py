"""Scoring many completions of one long prompt: the prompt read once, against a row for each completion.

    python benchmarks/shared_prompt.py [--layers 8] [--prompt 256] [--completion 32] [--window 128]

The same trunk, the same 64 completions: `FeatureExtractor` as it is, and with sharing switched off, in turn; the naive
batches are what `AutoModelForSequenceClassification` on padded rows costs. Random tokens, no two texts alike. Prints
JSON; dated results lie in results/. Floor: the tokens each way must read; those it did read are counted. A largest
difference of exactly 0 is no mistake: a token's sums have the same terms in the same order either way, and masked terms
are exact zeros, so where the kernels treat rows alike (SmolLM2 on a CPU) the features are equal to the bit.

--window: a Mistral trunk of the model's sizes and random weights, with a sliding window of so many tokens.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from poise.models.encoding import Tokens
from poise.models.loading import DEFAULT_MODEL, HfModel
from poise.models.reward_model import load_trunk
from poise.models.scorer import FeatureExtractor
from poise.runtime.run_folder import environment

COMPLETIONS = 64


def windowed(config: Any, window: int) -> HfModel:
    """A Mistral classifier of the same sizes, with random weights."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "pad_token_id",
    )  # fmt: skip
    shape = {name: getattr(config, name) for name in names}
    torch.manual_seed(0)
    config = transformers.MistralConfig(**shape, sliding_window=window, num_labels=1)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


@contextlib.contextmanager
def counted(model: HfModel) -> Iterator[list[int]]:
    """Collect how many tokens, padding included, each forward pass reads."""
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, ids, __: read.append(ids[0].numel()))
    try:
        yield read
    finally:
        hook.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--completion", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--window", type=int, default=0, help="tokens of a sliding window; 0: the model itself")
    options = parser.parse_args()
    classifier, tokenizer = load_trunk(options.model, options.layers)
    if options.window:
        classifier = windowed(classifier.config, options.window)
    shared, naive = (FeatureExtractor(classifier, tokenizer) for _ in range(2))
    naive._shares_prompts = False
    rows = []
    for prompt_length in options.prompt:
        for length in options.completion:
            generator = torch.Generator().manual_seed(0)

            def draw(count: int, generator: torch.Generator = generator) -> tuple[int, ...]:
                return tuple(torch.randint(10, 40_000, (count,), generator=generator).tolist())

            prompt = draw(prompt_length)
            texts = [Tokens(prompt, draw(length)) for _ in range(COMPLETIONS)]
            with counted(classifier) as read:
                features = shared.forward(texts)
                shared_tokens = sum(read)
                difference = (features - naive.forward(texts)).abs().max().item()
            seconds: dict[str, list[float]] = {"shared": [], "naive": []}
            for _ in range(options.repeats):
                for name, extract in (("shared", shared), ("naive", naive)):
                    start = time.perf_counter()
                    extract.forward(texts)
                    seconds[name].append(time.perf_counter() - start)
            median = {name: statistics.median(values) for name, values in seconds.items()}
            rows.append(
                {
                    "prompt_tokens": prompt_length, "completion_tokens": length,
                    "shared_s": round(median["shared"], 3), "naive_s": round(median["naive"], 3),
                    "ratio": round(median["naive"] / median["shared"], 2),
                    "floor_ratio": round(COMPLETIONS * (prompt_length + length)
                                         / (prompt_length + COMPLETIONS * length), 2),
                    "shared_tokens": shared_tokens, "naive_tokens": sum(read) - shared_tokens,
                    "largest_feature_difference": difference,
                }
            )  # fmt: skip
    print(json.dumps({"layers": options.layers, "window": options.window, "completions": COMPLETIONS, "rows": rows,
                      "environment": environment()}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
