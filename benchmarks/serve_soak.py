"""10,000 requests of 64 callers to one `poise serve`: none lost, doubled or mixed up, and memory that stays flat.

    OMP_NUM_THREADS=1 python benchmarks/serve_soak.py [--requests 10000] [--callers 64]

The reward model is small (random weights, the default model's tokenizer): what is tested is the server. Each request is
another text, in groups of 16 of one prompt. The client refuses an answer that does not carry its request's hash; every
reward is compared with the scorer's; the server's log must hold each request once. `resident_mib`: the server's memory
after each tenth of the requests. Prints JSON; dated results lie in results/.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import transformers
from serve_load import HEADS, texts, timed_callers

from poise.functional.objectives import tradeoff
from poise.models.loading import DEFAULT_MODEL
from poise.models.reward_model import HeadLayout, load_trunk, save_reward_model
from poise.models.scorer import Scorer
from poise.runtime.run_folder import environment
from poise.serve.client import Client

PARTS = 10


def make_reward_model(folder: Path) -> str:
    """Two layers of width 64, with random heads."""
    torch.manual_seed(0)
    _, tokenizer = load_trunk(DEFAULT_MODEL, 1)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    classifier, tokenizer = load_trunk(str(folder / "model"), 2)
    save_reward_model(
        folder / "rm",
        classifier,
        tokenizer,
        torch.randn(2 * HEADS, 64) / 10,
        HeadLayout(HEADS, "gaussian", (0.0,) * 2 * HEADS),
    )
    return str(folder / "rm")


def resident_mib(process: int) -> float:
    """Memory of a process that is in use now."""
    line = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return round(int(line.split()[1]) / 1024, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--callers", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, log = make_reward_model(Path(scratch)), Path(scratch) / "log.jsonl"
        samples = texts(options.requests, 16, 0)
        assert len({(str(sample.prompt), sample.completion) for sample in samples}) == len(samples)
        expected = tradeoff(Scorer.load(folder)(samples), 0.4)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-m", "poise.cli", "serve", folder, "--port", port, "--log", str(log)]
        server = subprocess.Popen(command)
        client = Client(f"http://127.0.0.1:{port}")
        rewards, memory, seconds = [], [], 0.0
        try:
            client.post("/remote_rm", {"prompt": "Hi.", "response": "Good."})  # waits until it is there
            step = -(-len(samples) // PARTS)
            for i in range(0, len(samples), step):
                took, _, found = timed_callers(client, samples[i : i + step], options.callers)
                seconds, rewards = seconds + took, rewards + found
                memory.append(resident_mib(server.pid))
        finally:
            server.terminate()
            status = server.wait()
        logged = Counter(json.loads(line)["request"] for line in log.read_text().splitlines()[1:])
    result = {
        **vars(options), "heads": HEADS, "answers": len(rewards), "requests_in_the_log": len(logged),
        "logged_more_than_once": sum(count > 1 for count in logged.values()),
        "largest_difference": (torch.tensor(rewards) - expected).abs().max().item(),
        "spread_of_rewards": expected.std().item(), "resident_mib": memory, "requests_per_s": len(rewards) / seconds,
        "exit_status": status, "load_average": os.getloadavg()[0], "environment": environment(),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
