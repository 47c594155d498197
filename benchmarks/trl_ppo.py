"""A PPO step against TRL 1.12.0's PPOTrainer, the last release that has one: seconds, phase by phase, and peak memory.

    pip install --no-deps --target PEER trl==1.12.0   # beside the same transformers and torch
    OMP_NUM_THREADS=2 python benchmarks/trl_ppo.py --compare --peer PEER [--steps 5] [--repeats 2]
    PYTHONPATH=PEER OMP_NUM_THREADS=2 python benchmarks/trl_ppo.py --side trl --layers 10

Both sides: the same policy and adapters (LoRA r16 on all linear maps of the upper `--layers` layers, 0: of all), the
same reward model of 8 layers, 32 completions of 24 tokens a step after 4 prompts of 43 tokens, 8 completions each (no
row ends early), 4 epochs of 2 minibatches, float32, no gradient checkpointing. TRL's trainer takes one completion a
row, so its rows repeat the prompt, and has a value model of its own: here the reward model once more, all weights
trained. Ours reads values off the policy's trunk. That is part of what is compared: either trainer as it comes.

Each run in a process of its own, sides in turn; medians over steps, the first of each run left out. `cpu_s` well below
`step_s` times the threads means that something else had the machine: such seconds are not worth reporting.
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
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from poise.data.types import Prompt
from poise.models.adapted_maps import linear_maps
from poise.models.chat_format import encode, generation_prompt
from poise.models.loading import DEFAULT_MODEL, HfModel, HfTokenizer, load_policy, load_tokenizer, resolve_model
from poise.models.reward_model import load_trunk
from poise.policy.loop import Training
from poise.runtime.run_folder import Json, Run, environment, write_jsonl
from poise.studies.config import LAPTOP_POLICY

PROMPTS, COMPLETIONS, PROMPT_TOKENS, TOKENS, EPOCHS, MINIBATCHES = 4, 8, 43, 24, 4, 2
RANK, REWARD_LAYERS, LEARNING_RATE, KL_COEF = 16, 8, 1e-5, 0.05
FILMS = ("a lost dog", "a bank robbery", "two brothers", "a haunted house")
PHASES = ("generation", "scoring", "values", "reference", "update")


class Clock(transformers.TrainerCallback):
    """Seconds of each step, of the phases within it, and of the processor over all threads."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.phases: dict[str, float] = defaultdict(float)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter(), time.process_time()
        step, cpu = (end - start for end, start in zip(now, self._started, strict=True))
        self.steps.append({**self.phases, "step": step, "cpu": cpu})
        figures = "  ".join(f"{name} {seconds:.2f}" for name, seconds in self.steps[-1].items())
        print(f"step {len(self.steps)}: {figures} s, peak {peak_mib()} MiB", file=sys.stderr, flush=True)
        self.phases.clear()
        self._started = now

    @contextlib.contextmanager
    def within(self, phase: str, context: contextlib.AbstractContextManager[Any]) -> Iterator[Any]:
        """`context`, its time counted to `phase`."""
        start = time.perf_counter()
        with context as value:
            yield value
        self.phases[phase] += time.perf_counter() - start

    def call(self, phase: str, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, its time counted to `phase`."""
        with self.within(phase, contextlib.nullcontext()):
            return function(*args)


# ---- what both sides share ----


def peak_mib() -> int:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def prompts(tokenizer: HfTokenizer) -> list[Prompt]:
    """Requests that are PROMPT_TOKENS tokens long through the chat template."""
    found: list[Prompt] = []
    for film in FILMS[:PROMPTS]:
        request = (
            f"Write a one-sentence review of a film about {film}. It came out last year, lasts two hours and has "
            f"well-known actors, a famous director and music by a large orchestra from abroad."
        )
        ids = tokenizer(request, add_special_tokens=False).input_ids
        for end in range(len(ids), 0, -1):
            turns = [
                {"role": "system", "content": "You write short reviews."},
                {"role": "user", "content": tokenizer.decode(ids[:end])},
            ]
            if len(encode(tokenizer, generation_prompt(tokenizer, turns))) == PROMPT_TOKENS:
                found.append(turns)
                break
        else:
            raise SystemExit(f"no cut of the request about {film} is {PROMPT_TOKENS} tokens long for this model")
    return found


def never_end(model: HfModel, tokenizer: HfTokenizer) -> None:
    """Keep the model from writing its end of turn, or padding, so that every completion has all its tokens.

    It blocks what is sampled. Poise's updates read the hidden states, past this hook, and find the little that the two
    tokens would have had; the time is the same.
    """
    blocked = [tokenizer.eos_token_id, tokenizer.pad_token_id]

    def block(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
        logits[..., blocked] = -1e9  # not -inf, of which TRL's entropy would be NaN
        return logits

    model.get_output_embeddings().register_forward_hook(block)


def write_reward_model(model: str, folder: Path) -> None:
    """The first layers of the policy's model with one label: the reward model of both, and TRL's value model."""
    torch.manual_seed(0)
    classifier, tokenizer = load_trunk(model, REWARD_LAYERS, dtype=torch.float32)
    torch.nn.init.normal_(classifier.score.weight, std=1 / (classifier.config.hidden_size + 1) ** 0.5)
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- the two sides: each returns its steps, and the tokens it wrote in one ----


def poise_side(model: str, layers: int, steps: int, scratch: Path) -> tuple[list[dict[str, float]], int]:
    """The steps of `poise train-policy`."""
    write_reward_model(model, scratch / "reward")
    asked = prompts(load_tokenizer(resolve_model(model)))
    write_jsonl(scratch / "prompts.jsonl", [{"prompt": prompt} for prompt in asked])
    config = replace(
        LAPTOP_POLICY,
        prompts=str(scratch / "prompts.jsonl"), reward=str(scratch / "reward"), output=str(scratch / "run"),
        model=model, objective="nominal", kl_coef=KL_COEF, num_steps=steps, prompts_per_step=PROMPTS,
        completions_per_prompt=COMPLETIONS, max_tokens=TOKENS, learning_rate=LEARNING_RATE, num_epochs=EPOCHS,
        num_minibatches=MINIBATCHES, adapted_layers=layers, lora_rank=RANK, baseline_completions=1, save_every=10**6,
    )  # fmt: skip
    training = Training(config, Run.open(config.output, config), asked)
    never_end(training.policy.model, training.policy.tokenizer)
    laps = {"generation": "sample", "scoring": "score", "reference": "reference", "update": "update"}
    clock = Clock()
    clock.on_train_begin()
    for _ in range(steps):
        metrics = training.one_step()
        clock.phases.update({phase: metrics[f"{name}_seconds"] for phase, name in laps.items()})
        clock.on_step_end()
    return clock.steps, round(metrics["tokens"] * PROMPTS * COMPLETIONS)


def trl_side(model: str, layers: int, steps: int, scratch: Path) -> tuple[list[dict[str, float]], int]:
    """TRL's `PPOTrainer`, timed from outside: the functions and contexts its loop calls, and its callbacks."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    import peft

    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
    except ImportError:
        raise SystemExit(
            "this TRL has no PPOTrainer: put 1.12.0 on PYTHONPATH, as the head of the script says"
        ) from None

    write_reward_model(model, scratch / "reward")
    policy, tokenizer = load_policy(model)
    never_end(policy, tokenizer)
    reward, value = (
        transformers.AutoModelForSequenceClassification.from_pretrained(scratch / "reward", dtype=torch.float32)
        for _ in range(2)
    )
    rows = [encode(tokenizer, generation_prompt(tokenizer, p)) for p in prompts(tokenizer) for _ in range(COMPLETIONS)]
    depth = policy.config.num_hidden_layers
    adapters = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM",
        target_modules=linear_maps(policy, depth - layers if layers else 0),
    )  # fmt: skip
    config = PPOConfig(
        output_dir=str(scratch / "run"), per_device_train_batch_size=len(rows), gradient_accumulation_steps=1,
        num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS, total_episodes=len(rows) * steps,
        local_rollout_forward_batch_size=len(rows), response_length=TOKENS, temperature=1.0, kl_coef=KL_COEF,
        learning_rate=LEARNING_RATE, num_sample_generations=0, gradient_checkpointing=False, bf16=False, use_cpu=True,
        dataloader_pin_memory=False, save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    clock = Clock()
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=None, reward_model=reward, value_model=value,
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}), peft_config=adapters, callbacks=[clock],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)

    generate, score = ppo_trainer.batch_generation, ppo_trainer.get_reward
    reference, accumulate = trainer.null_ref_context, trainer.accelerator.accumulate
    written: list[int] = []

    def timed_generate(*args: Any) -> Any:
        ids, logits = clock.call("generation", generate, *args)
        written.append(int((ids[:, PROMPT_TOKENS:] != tokenizer.pad_token_id).sum()))
        return ids, logits

    def timed_score(classifier: HfModel, *args: Any) -> Any:
        return clock.call("values" if classifier is value else "scoring", score, classifier, *args)

    ppo_trainer.batch_generation, ppo_trainer.get_reward = timed_generate, timed_score
    trainer.null_ref_context = lambda: clock.within("reference", reference())
    trainer.accelerator.accumulate = lambda *models: clock.within("update", accumulate(*models))
    trainer.train()
    return clock.steps, written[-1]


# ---- one run, and all of them ----


def measure(side: str, options: argparse.Namespace) -> Json:
    """One run in this process: medians over its steps without the first."""
    transformers.logging.set_verbosity_error()
    work = {"poise": poise_side, "trl": trl_side}[side]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        steps, tokens = work(options.model, options.layers, options.steps, Path(folder))
    assert tokens == PROMPTS * COMPLETIONS * TOKENS, f"{tokens} tokens in a step: rows ended early"
    phases = {name: statistics.median(step.get(name, 0.0) for step in steps[1:]) for name in PHASES}
    total = statistics.median(step["step"] for step in steps[1:])
    phases["other"] = statistics.median(step["step"] - sum(step.get(n, 0.0) for n in PHASES) for step in steps[1:])
    result: Json = {
        "side": side,
        "layers": options.layers,
        "step_s": round(total, 2),
        "phases_s": {name: round(seconds, 2) for name, seconds in phases.items()},
        "cpu_s": round(statistics.median(step["cpu"] for step in steps[1:]), 2),
        "steps_s": [round(step["step"], 2) for step in steps],
        "peak_mib": peak_mib(),
        "environment": environment(),
    }
    if side == "trl":
        result["environment"]["versions"]["trl"] = sys.modules["trl"].__version__
    return result


def compare(options: argparse.Namespace) -> Json:
    """Both sides in turn, each run in a fresh process; ratios of medians over runs, peaks the largest."""
    report: Json = {}
    for layers in (0, 10):
        runs: dict[str, list[Json]] = {"poise": [], "trl": []}
        for _ in range(options.repeats):
            for side, found in runs.items():
                command = [sys.executable, __file__, "--side", side, "--layers", str(layers)]
                command += ["--steps", str(options.steps), "--model", options.model]
                where = os.environ | ({"PYTHONPATH": options.peer} if side == "trl" else {})
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=where)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        row: Json = {
            side: {
                "step_s": round(statistics.median(run["step_s"] for run in found), 2),
                "phases_s": {
                    name: round(statistics.median(run["phases_s"][name] for run in found), 2)
                    for name in found[0]["phases_s"]
                },
                "cpu_s": round(statistics.median(run["cpu_s"] for run in found), 2),
                "runs_step_s": [run["step_s"] for run in found],
                "peak_mib": max(run["peak_mib"] for run in found),
                "environment": found[0]["environment"],
            }
            for side, found in runs.items()
        }
        row["times_faster"] = round(row["trl"]["step_s"] / row["poise"]["step_s"], 2)
        row["share_of_peak"] = round(row["poise"]["peak_mib"] / row["trl"]["peak_mib"], 2)
        report["adapters in all layers" if layers == 0 else f"adapters in the upper {layers} layers"] = row
    setting = {
        "prompts": PROMPTS, "completions": COMPLETIONS, "prompt_tokens": PROMPT_TOKENS, "new_tokens": TOKENS,
        "epochs": EPOCHS, "minibatches": MINIBATCHES, "lora_rank": RANK, "reward_layers": REWARD_LAYERS,
        "steps": options.steps, "repeats": options.repeats,
    }  # fmt: skip
    return {"setting": setting, **report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--side", choices=["poise", "trl"], help="one run in this process; prints one JSON line")
    kind.add_argument("--compare", action="store_true", help="both sides, all layers and the upper ten")
    parser.add_argument("--peer", help="with --compare: the folder TRL 1.12.0 is in")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first is left out")
    if options.compare and not options.peer:
        parser.error("--compare needs --peer")
    if options.side:
        return print(json.dumps(measure(options.side, options)))
    return print(json.dumps(compare(options), indent=1))


if __name__ == "__main__":
    main()
