"""A GRPO and an RLOO step of TRL against our PPO step with one epoch: seconds, phase by phase, and peak memory.

    OMP_NUM_THREADS=2 python benchmarks/grpo_step.py --reward RUN/brme [--steps 5] [--repeats 2]
    OMP_NUM_THREADS=2 python benchmarks/grpo_step.py --reward RUN/brme --side grpo --layers 10

All sides: the same policy and adapters (LoRA r16 on all linear maps of the upper `--layers` layers, 0: of all), the
same reward model through the same scorer, 4 prompts with 8 completions of 24 tokens each (no row ends early), one
update on all of them, KL to the reference, float32, no gradient checkpointing. TRL's trainers take one completion a
row, so their rows repeat the prompt, and they have no value head. Log-probabilities before the update are those of the
reference and, for RLOO only, of the policy that sampled.

Each run in a process of its own, sides in turn; medians over steps, the first of each run left out. `cpu_s` are seconds
of all threads: what to compare where the machine does other work, too.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from poise.data.types import Prompt
from poise.integrations.trl_reward import RobustReward
from poise.integrations.trl_trainers import TrlSettings, make_trainer
from poise.models.loading import DEFAULT_MODEL, HfModel, HfTokenizer, load_policy
from poise.policy.loop import Training
from poise.runtime.run_folder import Json, Run, environment, write_jsonl
from poise.studies.config import LAPTOP_POLICY

PROMPTS, COMPLETIONS, TOKENS, RANK, KL_COEF, LEARNING_RATE = 4, 8, 24, 16, 0.05, 1e-5
OBJECTIVE = "tradeoff(0.4)"
PHASES = ("generation", "scoring", "logprobs", "update")
Steps = list[dict[str, float]]


class Clock(transformers.TrainerCallback):
    """Seconds of each step, and of the phases within it."""

    def __init__(self) -> None:
        self.steps: Steps = []
        self._phases: dict[str, float] = defaultdict(float)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter(), time.process_time()
        self._phases.clear()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        step, cpu = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        self.steps.append({**self._phases, "step": step, "cpu": cpu})

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time counted to `phase`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._phases[phase] += time.perf_counter() - start

        return call


def prompts() -> list[Prompt]:
    """Requests of nearly one length."""
    films = ("a lost dog", "a bank robbery", "two brothers", "a haunted house")
    return [
        f"Write a one-sentence review of a film about {film}. It came out last year, lasts two hours and has "
        f"well-known actors and music by a large orchestra."
        for film in films
    ]


def never_end(model: HfModel, tokenizer: HfTokenizer) -> None:
    """Keep the model from writing its end of turn, or padding, so that every completion has all its tokens."""
    blocked = [tokenizer.eos_token_id, tokenizer.pad_token_id]

    def block(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
        logits[..., blocked] = -1e9
        return logits

    model.get_output_embeddings().register_forward_hook(block)


def trl_side(options: argparse.Namespace, scratch: Path) -> tuple[Steps, float]:
    """(steps, tokens of a completion) of TRL's trainer, as `poise train-policy --algorithm` sets it up."""
    settings = TrlSettings(
        algorithm=options.side, kl_coef=KL_COEF, num_steps=options.steps, prompts_per_step=PROMPTS,
        completions_per_prompt=COMPLETIONS, max_tokens=TOKENS, learning_rate=LEARNING_RATE, num_epochs=1,
        num_minibatches=1, clip=0.2, max_grad_norm=1.0, adapted_layers=options.layers, lora_rank=RANK,
        save_every=options.steps, seed=0,
    )  # fmt: skip
    model, tokenizer = load_policy(options.model)
    never_end(model, tokenizer)
    reward = RobustReward.load(options.reward, OBJECTIVE)
    trainer = make_trainer(settings, reward, model, tokenizer, prompts(), scratch)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(transformers.PrinterCallback)
    logprobs = trainer._get_per_token_logps_and_entropies
    before = clock.timed("logprobs", logprobs)  # of the reference and, for RLOO, of the policy that sampled

    def by_phase(*args: Any, **kwargs: Any) -> Any:
        return (logprobs if torch.is_grad_enabled() else before)(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = by_phase
    trainer._generate = clock.timed("generation", trainer._generate)
    trainer._calculate_rewards = clock.timed("scoring", trainer._calculate_rewards)
    trainer.train()
    for step in clock.steps:
        step["update"] = step["step"] - sum(step.get(phase, 0.0) for phase in PHASES)
    logged = [row for row in trainer.state.log_history if "reward" in row]
    return clock.steps, logged[-1]["completions/mean_length"]


def poise_side(options: argparse.Namespace, scratch: Path) -> tuple[Steps, float]:
    """(steps, tokens of a completion) of `poise train-policy` with one epoch of one minibatch."""
    write_jsonl(scratch / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts()])
    config = replace(
        LAPTOP_POLICY, prompts=str(scratch / "prompts.jsonl"), reward=options.reward, output=str(scratch / "run"),
        model=options.model, objective=OBJECTIVE, kl_coef=KL_COEF, num_steps=options.steps, prompts_per_step=PROMPTS,
        completions_per_prompt=COMPLETIONS, max_tokens=TOKENS, learning_rate=LEARNING_RATE, num_epochs=1,
        num_minibatches=1, adapted_layers=options.layers, lora_rank=RANK, baseline_completions=1, save_every=10**6,
    )  # fmt: skip
    training = Training(config, Run.open(config.output, config), prompts())
    never_end(training.policy.model, training.policy.tokenizer)
    laps = {"generation": "sample", "scoring": "score", "logprobs": "reference", "update": "update"}
    clock = Clock()
    for _ in range(options.steps):
        clock.on_step_begin()
        metrics = training.one_step()
        clock.on_step_end()
        clock.steps[-1] |= {phase: metrics[f"{lap}_seconds"] for phase, lap in laps.items()}
    return clock.steps, metrics["tokens"]


SIDES = {"grpo": trl_side, "rloo": trl_side, "poise": poise_side}


def measure(options: argparse.Namespace) -> Json:
    """One run in this process: medians over its steps without the first."""
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        steps, tokens = SIDES[options.side](options, Path(folder))
    assert tokens == TOKENS, f"{tokens} tokens in a completion: rows ended early"
    return {
        "side": options.side,
        "layers": options.layers,
        "step_s": round(statistics.median(step["step"] for step in steps[1:]), 2),
        "phases_s": {name: round(statistics.median(step.get(name, 0.0) for step in steps[1:]), 2) for name in PHASES},
        "cpu_s": round(statistics.median(step["cpu"] for step in steps[1:]), 2),
        "steps_s": [round(step["step"], 2) for step in steps],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def compare(options: argparse.Namespace) -> Json:
    """Each side in turn, each run in a fresh process; medians over runs."""
    report: Json = {}
    for layers in (0, 10):
        runs: dict[str, list[Json]] = {side: [] for side in options.sides}
        for _ in range(options.repeats):
            for side, found in runs.items():
                command = [sys.executable, __file__, "--side", side, "--layers", str(layers), "--model", options.model]
                command += ["--steps", str(options.steps), "--reward", options.reward]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        report["adapters in all layers" if layers == 0 else f"adapters in the upper {layers} layers"] = {
            side: {
                "step_s": round(statistics.median(run["step_s"] for run in found), 2),
                "phases_s": {
                    name: round(statistics.median(run["phases_s"][name] for run in found), 2) for name in PHASES
                },
                "cpu_s": round(statistics.median(run["cpu_s"] for run in found), 2),
                "runs_step_s": [run["step_s"] for run in found],
                "peak_mib": max(run["peak_mib"] for run in found),
            }
            for side, found in runs.items()
        }
    setting = {
        "prompts": PROMPTS, "completions": COMPLETIONS, "new_tokens": TOKENS, "updates": 1, "lora_rank": RANK,
        "objective": OBJECTIVE, "steps": options.steps, "repeats": options.repeats,
    }  # fmt: skip
    return {"setting": setting, **report, "environment": _environment()}


def _environment() -> Json:
    from importlib.metadata import version

    found = environment()
    found["versions"]["trl"] = version("trl")
    found["device"] = f"cpu, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"
    return {key: value for key, value in found.items() if key != "command"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reward", required=True, help="reward model, say of 8 layers: a checkpoint folder")
    parser.add_argument("--side", choices=list(SIDES), help="one run in this process; prints one JSON line")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first is left out")
    print(json.dumps(measure(options)) if options.side else json.dumps(compare(options), indent=1))


if __name__ == "__main__":
    main()
