"""What `poise plan` computes against what a training takes here, on a CPU, in float32.

    python benchmarks/plan_memory.py [--model MODEL] [--only CASE …] > results/plan-memory-DATE.json
    python benchmarks/plan_memory.py --again results/plan-memory-DATE.json      # new formulas, the old measurements

Each case is trained for one step in a process of its own: PPO (LoRA, all weights of the upper layers, own values), RLOO
and GRPO through TRL, and the trunk of a reward model (LoRA, all weights). Measured are the bytes of all tensors,
counted operation by operation and those of the weights that were loaded before, and the growth of the resident memory
of the process. `ratio` is predicted over counted. Completions never end early, so that their length is the planned one.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from poise.functional.memory import (
    GIB,
    Memory,
    PolicyRun,
    RewardRun,
    TrlRun,
    policy_memory,
    reward_memory,
    trl_memory,
)
from poise.integrations import trl_trainers
from poise.integrations.trl_reward import RobustReward
from poise.models import sizing
from poise.models.chat_format import encode_prompt
from poise.models.choices import DEFAULT_MODEL
from poise.models.loading import load_policy, resolve_model
from poise.models.policy import Policy
from poise.models.reward_model import HeadLayout, load_trunk
from poise.models.scorer import FeatureExtractor, Scorer
from poise.policy.config import Config
from poise.policy.loop import Training
from poise.reward import trunk_training as trunk
from poise.runtime.run_folder import Run, environment

PROMPTS, COMPLETIONS, TOKENS, MINIBATCHES, PARTS, LAYERS, RANK = 4, 8, 24, 2, 2, 10, 16
PAIRS, LENGTH = 4, 128
CASES = ("ppo-lora", "ppo-full", "ppo-own-values", "rloo", "grpo", "reward-lora", "reward-full")
ASKED = [f"Write a few sentences about the number {number}, its divisors and its squares." for number in range(PROMPTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--only", choices=CASES, nargs="+", default=CASES)
    parser.add_argument("--again", type=Path)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(options.case, options.model)))
        return
    found = json.loads(options.again.read_text())["cases"] if options.again else {}
    for case, one in found.items():
        one.update(_compared(case, options.model, one["prompt_tokens"], one["counted_mib"] * 2**20))
    for case in () if options.again else options.only:
        command = [sys.executable, __file__, "--model", options.model, "--case", case]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, found[case]["ratio"], file=sys.stderr)
    ratios = [one["ratio"] for one in found.values()]
    settings = {
        "model": options.model, "prompts": PROMPTS, "completions": COMPLETIONS, "tokens": TOKENS, "pairs": PAIRS,
        "sample_tokens": LENGTH, "adapted_layers": LAYERS, "rank": RANK,
    }  # fmt: skip
    summary = {"lowest_ratio": min(ratios), "highest_ratio": max(ratios)}
    print(json.dumps({"settings": settings, "cases": found, **summary, "environment": environment()}, indent=1))


def measured(case: str, model: str) -> dict[str, Any]:
    """One case, in this process."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    _warm()
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        prepare = {"ppo": _ppo, "reward": _reward}.get(case.split("-")[0], _trl)
        tokens, modules, work = prepare(case, model, Path(folder))
        there = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in _tensors(modules)}
        with sizing.counted() as live:
            work()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counted = sum(there.values()) + live.peak
    seen = {"counted_mib": counted // 2**20, "resident_growth_mib": (after - before) // 2**10, "prompt_tokens": tokens}
    return seen | _compared(case, model, tokens, counted)


def _compared(case: str, model: str, tokens: int, counted: int) -> dict[str, Any]:
    """The plan of a case beside what was counted."""
    plan = _plan(case, model, tokens)
    return {
        "predicted_mib": plan.total // 2**20, "ratio": round(plan.total / counted, 3), "phase": plan.peak_phase,
        "parts_gib": {name: round(size / GIB, 3) for name, size in plan.peak.items() if size},
    }  # fmt: skip


Prepared = tuple[int, list[torch.nn.Module], Callable[[], object]]  # tokens of the prompts, models, what is measured


def _tensors(modules: list[torch.nn.Module]) -> Iterator[torch.Tensor]:
    for module in modules:
        yield from itertools.chain(module.parameters(), module.buffers())


def _warm() -> None:
    """Import and start what takes memory once."""
    import peft  # noqa: F401

    (torch.ones(8, 8, requires_grad=True) @ torch.ones(8, 8)).sum().backward()


def _ppo(case: str, model: str, folder: Path) -> Prepared:
    """A step of PPO."""
    classifier, scorer = _scorer(model)
    config = Config(
        prompts="p", reward="r", output=str(folder), model=model, objective="mean", prompts_per_step=PROMPTS,
        completions_per_prompt=COMPLETIONS, max_tokens=TOKENS, num_minibatches=MINIBATCHES, accumulation=PARTS,
        adapted_layers=LAYERS, lora_rank=RANK, tune="full" if case == "ppo-full" else "lora",
        value_trunk="own" if case == "ppo-own-values" else "shared", baseline_completions=1, num_epochs=1,
    )  # fmt: skip
    given = RobustReward.of(scorer, "mean", path="")
    Training.save = lambda _: None  # type: ignore[method-assign]  # a checkpoint is no part of a step
    sample = Policy.sample

    def endless(self: Policy, *args: Any, **kwargs: Any) -> Any:
        self.end_ids = []
        return sample(self, *args, **kwargs)

    Policy.sample = endless  # type: ignore[method-assign]
    training = Training(config, Run(folder), ASKED, given)
    policy = training.policy
    return policy._encode(ASKED, TOKENS)[0].shape[1], [policy, *policy._reference, classifier], training.one_step


def _scorer(model: str) -> tuple[Any, Scorer]:
    """(a classifier of the model's trunk, and what scores by it)."""
    classifier, tokenizer = load_trunk(model, 0)
    layout = HeadLayout(1, "point", (0.0,))
    return classifier, Scorer(FeatureExtractor(classifier, tokenizer), classifier.score.weight.data, layout)


def _trl(case: str, model: str, folder: Path) -> Prepared:
    """A step of RLOO or GRPO."""
    classifier, scorer = _scorer(model)
    settings = trl_trainers.TrlSettings(
        algorithm=case, kl_coef=0.05, num_steps=1, prompts_per_step=PROMPTS, completions_per_prompt=COMPLETIONS,  # type: ignore[arg-type]
        max_tokens=TOKENS, learning_rate=1e-4, num_epochs=1, num_minibatches=MINIBATCHES, clip=0.2, max_grad_norm=1.0,
        adapted_layers=LAYERS, lora_rank=RANK, save_every=1, seed=0,
    )  # fmt: skip
    trl_trainers.end_token_ids = lambda *_: []  # type: ignore[assignment]
    policy, tokenizer = load_policy(model)
    trainer = trl_trainers.make_trainer(
        settings, RobustReward.of(scorer, "mean"), policy, tokenizer, ASKED, folder / "trainer"
    )
    trainer._save_checkpoint = lambda *_: None
    trainer.remove_callback(transformers.PrinterCallback)
    return max(len(encode_prompt(tokenizer, prompt)) for prompt in ASKED), [trainer.model, classifier], trainer.train


def _reward(case: str, model: str, folder: Path) -> Prepared:
    """Two steps of training a trunk."""
    classifier, tokenizer = load_trunk(model, 0, dtype=torch.float32)
    trunk.fresh_head(classifier, 0)
    texts = [trunk.Family([0] * 64, [[0] * (LENGTH - 64)] * 2)]
    pairs = [trunk.TokenPair(texts, 0.0) for _ in range(8)]
    how = trunk.TrunkTraining(case.removeprefix("reward-"), 1.0, 0.0, PAIRS, PAIRS, RANK, False, 1000, 0)
    args = trunk.training_arguments(how, folder)
    if how.kind == "lora":
        import peft

        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=RANK, target_modules=trunk.linear_maps(classifier), modules_to_save=["score"]
        )
        peft.get_peft_model(classifier, config)
    model_ = trunk.PairModel(classifier, packed=True)
    trainer = trunk.PairTrainer(model_, args, pairs, tokenizer.pad_token_id, trunk.preference_loss())
    trainer.remove_callback(transformers.PrinterCallback)
    return 64, [model_], trainer.train


def _plan(case: str, model: str, tokens: int) -> Memory:
    """The same setting as planned."""
    config = sizing.config_of(resolve_model(model))
    shape = sizing.shape_of(config)
    tune = "full" if case.endswith("full") else "lora"
    if case.startswith("reward"):
        found = sizing.reward_measured(
            config, tune=tune, rank=RANK, pairs=PAIRS, prompt_tokens=tokens, tokens=LENGTH, dtype=torch.float32,
            checkpointing=False,
        )  # fmt: skip
        return reward_memory(RewardRun(shape, tune, RANK, autocast=False), found)
    if not case.startswith("ppo"):
        trl = TrlRun(shape, shape, LAYERS, RANK, PROMPTS, COMPLETIONS, MINIBATCHES, tokens, TOKENS, frozen_bytes=4)
        found = sizing.trl_measured(
            config, layers=shape.upper(LAYERS), rank=RANK, part=trl.part, sampled=trl.turn, prompt_tokens=tokens,
            max_tokens=TOKENS, dtype=torch.float32, checkpointing=False,
        )  # fmt: skip
        return trl_memory(trl, found)
    part = PROMPTS // MINIBATCHES // PARTS
    found = sizing.policy_measured(
        config, tune=tune, layers=shape.upper(LAYERS), rank=RANK, part=part, reading=PROMPTS, prompts=PROMPTS,
        completions=COMPLETIONS, prompt_tokens=tokens, max_tokens=TOKENS, dtype=torch.float32, checkpointing=False,
    )  # fmt: skip
    run = PolicyRun(
        shape, shape, tune, case == "ppo-own-values", LAYERS, RANK, PROMPTS, COMPLETIONS, tokens, TOKENS,
        frozen_bytes=4,
    )  # fmt: skip
    return policy_memory(run, found)


if __name__ == "__main__":
    main()
