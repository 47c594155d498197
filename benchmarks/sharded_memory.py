"""Peak memory of each of two processes, with and without `--shard`, on a CPU in float32.

    python benchmarks/sharded_memory.py [--model MODEL] > results/sharded-memory-DATE.json

Each case runs in two processes of `torchrun`. Weights are copied out of the mapped file, and freed memory goes back to
the system at once, so that resident memory is what lives. After the models are loaded, the peak that the kernel keeps
for a process is reset; then one step of PPO, or four of reward training, runs. `held` are the weights, gradients and
optimizer states that a process has after it, its share of those that are spread.
"""

import argparse
import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from poise.integrations.trl_reward import RobustReward
from poise.models.choices import DEFAULT_MODEL
from poise.models.loading import load_policy
from poise.models.reward_model import HeadLayout, load_trunk
from poise.models.scorer import FeatureExtractor, Scorer
from poise.policy import loop
from poise.policy.config import Config
from poise.policy.loop import Training
from poise.reward import trunk_training as trunk
from poise.runtime import distributed as processes
from poise.runtime.run_folder import Run, environment
from poise.runtime.sharding import shard as spread

AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
CASES = ("ppo-lora", "ppo-full", "reward-full")
Prepared = tuple[Callable[[], object], Callable[[], Iterable[torch.Tensor]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--shard", action="store_true")
    options = parser.parse_args()
    if options.case:
        return child(options)
    found: dict[str, Any] = {}
    for case in CASES:
        for name, more in (("whole", []), ("sharded", ["--shard"])):
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
            command += [__file__, "--model", options.model, "--case", case, *more]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | AT_ONCE)
            rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            assert sorted(row["rank"] for row in rows) == [0, 1]
            found.setdefault(case, {})[name] = {key: max(row[key] for row in rows) for key in ("held_mib", "peak_mib")}
            print(case, name, found[case][name], file=sys.stderr)
    print(json.dumps({"model": options.model, "cases": found, "environment": environment()}, indent=1))
    return None


def child(options: argparse.Namespace) -> None:
    """One process of a case; prints JSON."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    processes.join()
    assert processes.num_processes() == 2
    with tempfile.TemporaryDirectory() as folder:
        prepare = ppo if options.case.startswith("ppo") else reward
        work, tensors = prepare(options.case, options.model, options.shard, Path(folder))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        work()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        local = {id(one): one.to_local() if hasattr(one, "to_local") else one for one in tensors()}
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in local.values()}
    row = {"rank": processes.process_index(), "held_mib": sum(storages.values()) // 2**20}
    print(json.dumps(row | {"peak_mib": int(status["VmHWM"].split()[0]) // 2**10}), flush=True)
    processes.leave()


def _out_of_the_file(module: torch.nn.Module) -> None:
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        tensor.data = tensor.data.clone()


def ppo(case: str, model: str, shard: bool, folder: Path) -> Prepared:
    """A step of PPO, with the first two layers of the model as reward model."""
    classifier, tokenizer = load_trunk(model, 2)
    layout = HeadLayout(1, "point", (0.0,))
    scorer = Scorer(FeatureExtractor(classifier, tokenizer), classifier.score.weight.data, layout)
    prompts = [f"Write about the number {number}." for number in range(4)]
    config = Config(
        prompts="p", reward="r", output=str(folder), model=model, objective="mean", prompts_per_step=4,
        completions_per_prompt=2, max_tokens=8, adapted_layers=0, baseline_completions=1, num_epochs=1, shard=shard,
        tune="full" if case == "ppo-full" else "lora", learning_rate=1e-6,
    )  # fmt: skip

    def load(*args: Any) -> Any:
        loaded = load_policy(*args)
        _out_of_the_file(loaded[0])
        return loaded

    loop.load_policy = load
    loop.keep_freed_memory = lambda: None
    _out_of_the_file(classifier)
    Training.save = lambda _: None  # type: ignore[method-assign]  # a checkpoint is no part of a step
    training = Training(config, Run(folder), prompts, RobustReward.of(scorer, "mean", path=""))

    def held() -> Iterable[torch.Tensor]:
        for module in (training.policy, *training.policy._reference):
            yield from of(module.parameters(), training.learner.optimizer)

    return training.one_step, held


def reward(case: str, model: str, shard: bool, folder: Path) -> Prepared:  # noqa: ARG001
    """Four steps of reward training."""
    classifier, tokenizer = load_trunk(model, 0, dtype=torch.float32)
    _out_of_the_file(classifier)
    pairs = [trunk.TokenPair([trunk.Family([0] * 16, [[0] * 16] * 2)], 0.0) for _ in range(16)]
    how = trunk.TrunkTraining("full", 1.0, 1e-6, 4, 2, 16, False, 1000, 0, shard)
    pair_model = trunk.PairModel(classifier, packed=True)
    if shard:
        spread(classifier.model.layers, pair_model)
    args = trunk.training_arguments(how, folder)
    trainer = trunk.PairTrainer(pair_model, args, pairs, tokenizer.pad_token_id, trunk.preference_loss())
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer.train, lambda: of(pair_model.parameters(), trainer.optimizer)


def of(parameters: Iterable[torch.nn.Parameter], optimizer: Any) -> Iterable[torch.Tensor]:
    """Weights, gradients and states."""
    states = getattr(optimizer, "optimizer", optimizer).state
    for parameter in parameters:
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
        yield from (value for value in states.get(parameter, {}).values() if isinstance(value, torch.Tensor))


if __name__ == "__main__":
    main()
