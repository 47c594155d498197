"""Stage-1 training of the trunk against TRL's RewardTrainer: pairs a second, losses step by step, memory.

    pip install --no-deps trl==1.16.0
    python benchmarks/train_trunk.py --preferences hh_rlhf.jsonl.gz [--layers 8] [--steps 50]

Both train the same classifier (same trunk, same first head) by `transformers.Trainer` on the same tokens in the same
order with the same optimizer, schedule and centering; TRL is given token ids, so that neither tokenizes in the run.
Each runs in processes of its own, in turn, `--repeats` times; medians over steps, the first two left out. Floor: the
tokens each must read, prompt once against prompt twice and padding.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from poise.data.preferences import iter_preferences
from poise.models.loading import DEFAULT_MODEL
from poise.models.reward_model import load_trunk
from poise.models.scorer import FeatureExtractor
from poise.reward.trunk_training import (
    PairModel,
    PairTrainer,
    TrunkTraining,
    preference_loss,
    token_pairs,
    training_arguments,
)
from poise.runtime.run_folder import environment

BATCH = 8


class Clock(transformers.TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def child(side: str, options: argparse.Namespace) -> None:
    """One run, in this process; prints JSON."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    classifier, tokenizer = load_trunk(options.model, options.layers, dtype=torch.float32)
    torch.nn.init.normal_(classifier.score.weight, std=1 / (classifier.config.hidden_size + 1) ** 0.5)
    extract = FeatureExtractor(classifier, tokenizer, options.max_length)
    preferences = list(itertools.islice(iter_preferences(options.preferences), BATCH * options.steps))
    settings = TrunkTraining(
        kind="full", epochs=1.0, learning_rate=1e-5, batch_size=BATCH, device_batch_size=BATCH, lora_rank=16,
        gradient_checkpointing=False, save_steps=10**6, seed=0,
    )  # fmt: skip
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(settings, Path(folder))
        if side == "poise":
            pairs = token_pairs(extract, preferences)
            tokens = sum(len(f.prompt) + sum(map(len, f.completions)) for pair in pairs for f in pair.families)
            model = PairModel(classifier, packed=True)
            trainer: Any = PairTrainer(model, args, pairs, tokenizer.pad_token_id, preference_loss(), callbacks=[clock])
        else:
            import datasets
            import trl

            rows = [
                {"chosen_ids": [*p.families[0].prompt, *p.families[0].completions[0]],
                 "rejected_ids": [*p.families[-1].prompt, *p.families[-1].completions[0]]}
                for p in token_pairs(extract, preferences, share=False)
            ]  # fmt: skip
            tokens = sum(len(ids) for row in rows for ids in row.values())
            shared = (
                "output_dir", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "warmup_steps",
                "lr_scheduler_type", "weight_decay", "max_grad_norm", "logging_steps", "save_strategy", "save_steps",
                "bf16", "use_cpu", "dataloader_pin_memory", "disable_tqdm", "seed", "data_seed",
            )  # fmt: skip
            settled = {name: getattr(args, name) for name in shared}
            settled |= {"gradient_checkpointing": False, "max_length": None, "center_rewards_coefficient": 0.01}
            peer = trl.RewardConfig(**settled, report_to="none", dataset_num_proc=None)
            trainer = trl.RewardTrainer(
                model=classifier, args=peer, train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer, callbacks=[clock],
            )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        trainer.train()
    print(
        json.dumps(
            {
                "seconds": clock.seconds,
                "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
                "tokens": tokens,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "before_mib": before // 1024,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preferences", required=True)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--child", choices=["poise", "trl"])
    options = parser.parse_args()
    if options.child:
        return child(options.child, options)
    runs: dict[str, list[dict[str, Any]]] = {"poise": [], "trl": []}
    for _ in range(options.repeats):
        for side, found in runs.items():
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--child", side], check=True, capture_output=True, text=True
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
    ours, theirs = runs["poise"][0]["losses"], runs["trl"][0]["losses"]
    result: dict[str, Any] = {"setting": {k: v for k, v in vars(options).items() if k not in ("child", "preferences")}}
    for side, found in runs.items():
        step = statistics.median(s for run in found for s in run["seconds"][2:])
        result[side] = {
            "step_s": round(step, 3),
            "pairs_per_s": round(BATCH * sum(len(r["seconds"]) - 2 for r in found)
                                 / sum(sum(r["seconds"][2:]) for r in found), 2),
            "tokens": found[0]["tokens"], "peak_mib": max(run["peak_mib"] for run in found),
            "first_loss": found[0]["losses"][0], "last_loss": found[0]["losses"][-1],
        }  # fmt: skip
    result["pairs_per_s_ratio"] = round(result["poise"]["pairs_per_s"] / result["trl"]["pairs_per_s"], 2)
    result["largest_loss_difference"] = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return print(json.dumps({**result, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
