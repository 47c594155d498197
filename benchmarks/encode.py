"""Texts of preferences as token ids: one by one, and as reward models are given them; beside the tokenizer alone.

    RAYON_NUM_THREADS=1 python benchmarks/encode.py --preferences FILE --output encode.json [--pairs 400] [--repeats 5]

RAYON_NUM_THREADS is how many cores the tokenizer may take. Seconds are of the clock, medians over repeats, in turn.
The floor is one call of the tokenizer with the rendered texts, and one with their prompts.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from poise.data.preferences import read_preferences
from poise.data.types import Sample
from poise.models.chat_format import completion_text, prompt_text
from poise.models.choices import DEFAULT_MODEL
from poise.models.encoding import Encoder
from poise.models.loading import load_tokenizer, resolve_model
from poise.runtime.run_folder import environment, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preferences", required=True)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("encode.json"))
    options = parser.parse_args()
    tokenizer = load_tokenizer(resolve_model(options.model))
    pairs = read_preferences(options.preferences, "skip")[: options.pairs]
    samples = [Sample(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    encoder = Encoder(tokenizer, 10**6, len(tokenizer), None)
    before = [prompt_text(tokenizer, sample.prompt) for sample in samples]
    whole = [a + completion_text(tokenizer, s.prompt, s.completion) for a, s in zip(before, samples, strict=True)]
    prompts = list(dict.fromkeys(before))
    ways: dict[str, Callable[[], object]] = {
        "one by one": lambda: [encoder.encode(sample) for sample in samples],
        "together": lambda: encoder.encode_all(samples),
        "tokenizer alone": lambda: (tokenizer(whole), tokenizer(prompts)),
    }
    assert ways["one by one"]() == ways["together"]()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way, run in ways.items():
            began = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - began)
    medians = {way: statistics.median(of_way) for way, of_way in seconds.items()}
    found = {
        "texts": len(samples), "tokens of a text": sum(map(len, encoder.encode_all(samples))) / len(samples),
        "cores of the tokenizer": os.environ.get("RAYON_NUM_THREADS", "all"), "seconds": medians,
        "one by one / together": medians["one by one"] / medians["together"], "environment": environment(),
    }  # fmt: skip
    write_json(options.output, found)
    print(found)


if __name__ == "__main__":
    main()
