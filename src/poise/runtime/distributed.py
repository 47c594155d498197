"""Several processes of one run, as `accelerate launch` or `torchrun` start them. With one process, all is the identity.

Every process takes an equal share of each batch and computes the same as all others from what was summed or gathered.
"""

import os
from typing import Any, TypeVar

import torch
from torch import Tensor

from poise.errors import PoiseError
from poise.runtime.processes import num_processes, process_index, several

__all__ = [
    "add_up_gradients", "gathered", "gathered_rows", "join", "leave", "num_processes", "process_index",
    "refuse_sharding", "share", "total", "wait",
]  # fmt: skip

Row = TypeVar("Row")


def join() -> None:
    """Meet the other processes, if this run has several; a GPU each, or gloo on the CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not several():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def leave() -> None:
    """Part from the other processes, if there are any; a process that ends without it can abort in gloo's threads."""
    if several():
        torch.distributed.destroy_process_group()


def refuse_sharding() -> None:
    """Raise PoiseError if `accelerate launch` was asked for FSDP or DeepSpeed, for what must have its weights whole.

    Reads the environment only: to be called first, before `join` and before a model is loaded.
    """
    for name in ("FSDP", "DeepSpeed"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() == "true":
            raise PoiseError(
                f"{name} was asked for, but PPO, RLOO and GRPO are data-parallel here: launch with "
                f"accelerate_configs/ddp.yaml, or give RobustReward (poise.integrations.trl_reward) to a TRL script of "
                f"your own"
            )


def share(count: int) -> slice:
    """This process's part of `count` things, which the number of processes divides."""
    each = count // num_processes()
    return slice(process_index() * each, (process_index() + 1) * each)


def total(part: Tensor) -> Tensor:
    """Sum over processes."""
    if not several():
        return part
    whole = part.clone()
    torch.distributed.all_reduce(whole)
    return whole


def add_up_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Sum gradients over processes, in place, in one message. A parameter without one counts as zeros."""
    if not several():
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    torch.distributed.all_reduce(flat)
    start = 0
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.copy_(flat[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()


def gathered(part: Tensor) -> Tensor:
    """Parts of equal shape, one after the other along the first axis, in the order of the processes."""
    if not several():
        return part
    parts = [torch.empty_like(part) for _ in range(num_processes())]
    torch.distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def gathered_rows(rows: list[Row]) -> list[Row]:
    """Lists of anything, one after the other in the order of the processes."""
    if not several():
        return rows
    parts: list[Any] = [None] * num_processes()
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def wait() -> None:
    """Until all processes have come here."""
    if several():
        torch.distributed.barrier()
