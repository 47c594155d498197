"""Reading rows: seconds and memory by number of rows; and the memory of `poise score` and `poise evaluate-reward`.

    python benchmarks/read_rows.py --output read-rows.json [--rows 10000 100000] [--score-rows 2000 20000 200000]
        [--forms jsonl parquet] [--evaluate-rows 2000 20000]

Every case runs in a process of its own, with one thread. Seconds are of processor time, of reading alone, without
imports. Memory is the highest resident size of the process; that of a process which reads ten rows stands beside it,
since imports are most of it. Rows are preferences of about 600 bytes; completions to score have about 150. The reward
model that `poise score` is given has one layer of width 16: its time says nothing of real models, and its memory is
that of reading, rendering, encoding and writing. Its file is read and written in one form.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from poise.runtime.run_folder import environment, write_json

FORMATS = ("jsonl", "csv", "parquet")
WORDS = ("slow", "careful", "story", "of", "two", "people", "who", "meet", "in", "the", "rain", "and", "part", "again")

READ = """
import resource, sys, time
from poise.data.preferences import read_preferences
started = time.process_time()
count = len(read_preferences(sys.argv[1]))
print(count, time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
SCORE = """
import resource, sys, time
import torch
from poise.reward import score
torch.set_num_threads(1)
started = time.process_time()
path = score.run(score.Config(sys.argv[1], sys.argv[2], output=sys.argv[3]))
seconds = time.process_time() - started
if path.suffix == ".parquet":
    import pyarrow.parquet
    count = pyarrow.parquet.read_metadata(path).num_rows
else:
    count = sum(1 for _ in path.open())
print(count, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
EVALUATE = """
import resource, sys, time
import torch
from poise.reward import evaluate
torch.set_num_threads(1)
started = time.process_time()
run = evaluate.run(evaluate.Config((sys.argv[1],), sys.argv[2], output=sys.argv[3], feature_cache=False))
seconds = time.process_time() - started
print(run.results["rewards"][0]["pairs"]["num_pairs"], seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def rows(count: int, words: int = 40) -> Iterator[dict[str, str]]:
    """Preferences, no two alike."""
    generator = random.Random(0)
    for i in range(count):
        text = " ".join(generator.choices(WORDS, k=words))
        yield {"prompt": f"Review film {i}. {text}", "chosen": f"{text} fine {i}", "rejected": f"{text} poor {i}"}


def written(folder: Path, kind: str, count: int) -> Path:
    """A file of preferences."""
    path = folder / f"{count}.{kind}"
    if kind == "jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(count))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
            table.writeheader()
            table.writerows(rows(count))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows(count))), path)
    return path


def samples(folder: Path, kind: str, count: int) -> Path:
    """A file of completions; one of Parquet has a single row group, as pandas writes it."""
    path = folder / f"samples.{kind}"
    texts = ({"prompt": row["prompt"], "completion": row["chosen"]} for row in rows(count, words=8))
    if kind == "jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in texts)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(texts)), path, row_group_size=count)
    return path


def measured(program: str, *arguments: str, repeats: int = 1) -> dict[str, Any]:
    """Rows, the lowest seconds and the highest memory, in MiB, of runs in fresh processes."""
    found = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        count, seconds, kilobytes = done.stdout.splitlines()[-1].split()
        found.append((int(count), float(seconds), int(kilobytes) / 1024))
    count, seconds, _ = min(found, key=lambda one: one[1])
    return {"rows": count, "seconds": round(seconds, 3), "peak_mb": round(max(one[2] for one in found), 1)}


def tiny_reward(folder: Path) -> str:
    """A reward model of one layer, width 16 and two Gaussian heads, with a byte-level tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from poise.models.reward_model import HeadLayout, save_reward_model

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        max_position_embeddings=1024, vocab_size=len(fast), pad_token_id=0, eos_token_id=2, num_labels=4,
    )  # fmt: skip
    torch.manual_seed(0)
    classifier = transformers.AutoModelForSequenceClassification.from_config(config)
    save_reward_model(folder, classifier, fast, torch.randn(4, 16), HeadLayout(2, "gaussian", (0.0,) * 4))
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--score-rows", type=int, nargs="*", default=[2_000, 20_000, 200_000])
    parser.add_argument("--forms", nargs="+", choices=("jsonl", "parquet"), default=["jsonl", "parquet"])
    parser.add_argument("--evaluate-rows", type=int, nargs="*", default=[2_000, 20_000])
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    started = time.monotonic()
    results: dict[str, Any] = {"reading": {}, "score": [], "evaluate": []}

    def kept() -> None:  # after every case: the largest take long, and may be stopped
        write_json(
            options.output, results | {"environment": environment(), "seconds": round(time.monotonic() - started)}
        )

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for kind in FORMATS if options.rows else ():
            found = []
            for count in (10, *options.rows):
                found.append(measured(READ, str(written(folder, kind, count)), repeats=options.repeats))
                print(kind, found[-1], flush=True)
                results["reading"][kind] = found
                kept()
        reward = tiny_reward(folder / "reward")
        for count in (10, *options.score_rows) if options.score_rows else ():
            for kind in options.forms:
                file = samples(folder, kind, count)
                found = measured(SCORE, reward, str(file), str(folder / f"scores.{kind}"))
                results["score"].append({"form": kind, **found})
                print("score", results["score"][-1], flush=True)
                kept()
        for count in options.evaluate_rows:
            file = written(folder, "jsonl", count)
            results["evaluate"].append(measured(EVALUATE, reward, str(file), str(folder / f"evaluation-{count}")))
            print("evaluate", results["evaluate"][-1], flush=True)
            kept()


if __name__ == "__main__":
    main()
