"""A PPO run killed with SIGKILL at random moments, restarted each time, against one left alone: are they bitwise equal?

    python experiments/killed.py [--kills 20] [--layers 4]

The first layers of the default model as the policy, and a random reward head on two of them: what is tested is the
bookkeeping, not the learning. Prints JSON.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
import yaml
from safetensors.torch import load_file

from poise.models.loading import DEFAULT_MODEL, load_tokenizer, resolve_model
from poise.models.padding import pad_apart
from poise.models.reward_model import HeadLayout, load_trunk, save_reward_model
from poise.runtime.quiet import quiet_loading
from poise.runtime.records import read_rows
from poise.runtime.run_folder import config_dict, environment, write_jsonl
from poise.studies import quickstart as recipes
from poise.studies.config import LAPTOP_POLICY


def write_models(folder: Path, layers: int) -> tuple[str, str]:
    """(policy, reward model)."""
    source = resolve_model(DEFAULT_MODEL)
    config = transformers.AutoConfig.from_pretrained(source)
    config.num_hidden_layers = layers
    config.layer_types = None
    tokenizer = load_tokenizer(source)
    with quiet_loading():
        policy = transformers.AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float32)
        pad_apart(tokenizer, policy)
        policy.save_pretrained(folder / "policy")
        tokenizer.save_pretrained(folder / "policy")
    trunk, trunk_tokenizer = load_trunk(DEFAULT_MODEL, 2)
    weight = torch.randn(10, trunk.config.hidden_size, generator=torch.Generator().manual_seed(0))
    save_reward_model(folder / "reward", trunk, trunk_tokenizer, weight, HeadLayout(5, "gaussian", (0.0,) * 10))
    return str(folder / "policy"), str(folder / "reward")


def start(settings: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "poise.cli", "train-policy", "--config", str(settings), "--output", str(output)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        policy, reward = write_models(folder, options.layers)
        write_jsonl(
            folder / "prompts.jsonl", [{"prompt": recipes.review_prompt(f"a {p}")} for p in recipes.TRAIN_PRODUCTS]
        )
        config = replace(
            LAPTOP_POLICY,
            prompts=str(folder / "prompts.jsonl"), reward=reward, model=policy, num_steps=2 * options.kills,
            prompts_per_step=2, completions_per_prompt=2, max_tokens=8, adapted_layers=2, save_every=1,
            baseline_completions=16, shaping="contrastive", kl_target=5.0,
        )  # fmt: skip
        settings = folder / "config.yaml"
        settings.write_text(yaml.safe_dump(config_dict(config)))
        calm, stormy = folder / "calm", folder / "stormy"
        if start(settings, calm).wait():
            raise SystemExit("the undisturbed run failed")
        killed_at: list[int] = []
        while len(killed_at) < options.kills:
            process = start(settings, stormy)
            metrics = stormy / "metrics.jsonl"
            before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            target = before + generator.randint(0, 2)
            while process.poll() is None:
                rows = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                if rows > target or (rows == target and generator.random() < 0.002):
                    time.sleep(generator.uniform(0, 0.2))
                    os.kill(process.pid, signal.SIGKILL)
                    killed_at.append(rows)
                    break
                time.sleep(0.003)
            process.wait()
            if (stormy / "results.json").exists():
                break
        if start(settings, stormy).wait():
            raise SystemExit("the last restart failed")
        one, other = (load_file(run / "checkpoint.safetensors") for run in (calm, stormy))
        same = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        rows = [list(read_rows(run / "samples.jsonl")) for run in (calm, stormy)]
        print(
            json.dumps(
                {
                    "kills": len(killed_at), "killed_at_step": killed_at, "steps": config.num_steps,
                    "checkpoint_bitwise_equal": same, "samples_equal": rows[0] == rows[1],
                    "final_equal": (calm / "final.jsonl").read_text() == (stormy / "final.jsonl").read_text(),
                    "environment": environment(),
                },
                indent=1,
            )
        )  # fmt: skip


if __name__ == "__main__":
    main()
