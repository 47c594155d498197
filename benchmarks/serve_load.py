"""`poise serve` under load: 64 callers at once, against one caller at a time and against the scorer without a server.

    OMP_NUM_THREADS=1 python benchmarks/serve_load.py [--texts 512] [--callers 64] [--repeats 3] [--group 16]

One reward model of the first 8 layers of the default model with random heads, in a server of its own process; the
callers are threads of this one, each with one text a request. Ways in turn, after a warm-up: the scorer on all texts in
one call; the scorer on one text at a time; callers through the server. No two texts are alike. --group: texts of one
prompt; 1 gives each a prompt of its own. Latencies are those of the callers. `largest_difference`: between rewards of
the server and of the scorer. Prints JSON; dated results lie in results/.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from poise.data.types import Sample
from poise.functional.objectives import tradeoff
from poise.models.loading import DEFAULT_MODEL
from poise.models.reward_model import HeadLayout, load_trunk, save_reward_model
from poise.models.scorer import Scorer
from poise.runtime.run_folder import environment
from poise.serve.client import Client

HEADS = 5
STORY = "the film was a warm slow funny story about two old friends and their dog who never came home again"


def texts(count: int, group: int, seed: int) -> list[Sample]:
    """Prompts of about 20 tokens and answers of about 20."""
    generator = torch.Generator().manual_seed(seed)

    def words(number: int) -> str:
        known = STORY.split()
        return " ".join(known[i] for i in torch.randint(len(known), (number,), generator=generator).tolist())

    prompts = [f"Review film number {seed}-{i}: {words(12)}?" for i in range(-(-count // group))]
    return [Sample(prompts[i // group], f"{words(18)}.") for i in range(count)]


def make_reward_model(folder: Path, layers: int) -> str:
    """Random heads: what they say does not matter here."""
    classifier, tokenizer = load_trunk(DEFAULT_MODEL, layers)
    weight = torch.randn(2 * HEADS, classifier.config.hidden_size, generator=torch.Generator().manual_seed(0)) / 30
    save_reward_model(folder, classifier, tokenizer, weight, HeadLayout(HEADS, "gaussian", (0.0,) * 2 * HEADS))
    return str(folder)


def timed_callers(client: Client, samples: list[Sample], callers: int) -> tuple[float, list[float], list[float]]:
    """(seconds, latencies, rewards)"""

    def ask(sample: Sample) -> tuple[float, float]:
        start = time.perf_counter()
        reward = client.score(sample.prompt, [sample.completion])[0]["reward"]
        return time.perf_counter() - start, reward

    start = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        answers = list(pool.map(ask, samples))
    return time.perf_counter() - start, [a for a, _ in answers], [b for _, b in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_reward_model(Path(scratch) / "rm", options.layers)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = subprocess.Popen([sys.executable, "-m", "poise.cli", "serve", folder, "--port", str(port)])
        client, scorer = Client(f"http://127.0.0.1:{port}"), Scorer.load(folder)
        rows: list[dict[str, float]] = []
        try:
            for repeat in range(options.repeats + 1):
                samples = texts(options.texts, options.group, repeat)
                few = texts(options.texts // 8, options.group, 1000 + repeat)
                start = time.perf_counter()
                expected = tradeoff(scorer(samples), 0.4)
                offline = time.perf_counter() - start
                start = time.perf_counter()
                for sample in few:
                    scorer([sample])
                alone = time.perf_counter() - start
                one_caller, _, _ = timed_callers(client, few, 1)
                seconds, latencies, rewards = timed_callers(client, samples, options.callers)
                ranks = statistics.quantiles(latencies, n=100)
                rows.append(
                    {
                        "offline_per_s": len(samples) / offline,
                        "one_at_a_time_per_s": len(few) / alone,
                        "one_caller_per_s": len(few) / one_caller,
                        "callers_per_s": len(samples) / seconds,
                        "p50_s": ranks[49],
                        "p99_s": ranks[98],
                        "largest_difference": (torch.tensor(rewards) - expected).abs().max().item(),
                    }
                )
        finally:
            server.terminate()
            status = server.wait()
    rows = rows[1:]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    ratios = {
        "over_one_at_a_time": statistics.median(row["callers_per_s"] / row["one_at_a_time_per_s"] for row in rows),
        "share_of_offline": statistics.median(row["callers_per_s"] / row["offline_per_s"] for row in rows),
    }
    print(
        json.dumps(
            {
                **vars(options), "heads": HEADS, "load_average": os.getloadavg()[0], "exit_status": status,
                "repeats": rows, "medians": medians, **ratios, "environment": environment(),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
