"""Any training of Poise on a Ray cluster: Ray Train starts the processes, which share it as those of `torchrun` do.

python examples/ray_train.py WORKERS train-policy --shard --prompts … --reward … --model … --output …

The files and the output folder must be on a disk that all workers see. Each worker takes a GPU where there are any.
"""

import sys

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def train(settings):
    from poise.cli.main import main

    if status := main(settings["command"]):
        raise RuntimeError(f"poise ended with status {status}; its own line is in this worker's output")


if __name__ == "__main__":
    workers, *command = sys.argv[1:]
    ray.init()
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    TorchTrainer(
        train,
        train_loop_config={"command": command},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=int(workers), use_gpu=gpus),
        run_config=RunConfig(name="poise"),
    ).fit()
