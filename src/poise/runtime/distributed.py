"""Several processes of one run, as `accelerate launch` or `torchrun` start them. With one process, all is the identity.

Every process takes an equal share of each batch and computes the same as all others from what was summed or gathered.

Every collective operation of the package is called here. A tensor is moved to a device that the group's backend knows
(NCCL knows CUDA alone) and the result is moved back, so callers may pass tensors of any device.
"""

import os
from typing import Any, TypeVar

import torch
from torch import Tensor

from poise.errors import PoiseError, first_line
from poise.runtime.processes import num_processes, process_index, several

__all__ = [
    "add_up_gradients", "gathered", "gathered_rows", "group_devices", "join", "launched_processes", "leave",
    "num_processes", "process_index", "refuse_sharding", "share", "spread_by_launcher", "total", "wait",
]  # fmt: skip

Row = TypeVar("Row")


_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LAUNCH = "start the processes by `torchrun` or `accelerate launch`"


def join() -> None:
    """Meet the other processes, if this run has several; a GPU each, or gloo on the CPU.

    Raises PoiseError if the environment names several processes that cannot meet, or a process that does not exist.
    """
    world = launched_processes()
    if world == 1 or several():
        return
    from accelerate import PartialState

    try:
        PartialState(cpu=not torch.cuda.is_available())
    except (ValueError, RuntimeError, OSError) as error:
        raise PoiseError(f"the {world} processes of WORLD_SIZE cannot meet: {first_line(error)}; {_LAUNCH}") from None
    if num_processes() != world:
        raise PoiseError(
            f"WORLD_SIZE is {world}, but the processes did not form a group of {world}: {_LAUNCH}, or unset WORLD_SIZE"
        )


def launched_processes() -> int:
    """How many processes the environment says were started; 1 without a launcher.

    Raises PoiseError for an environment in which no process, or every one, would take itself for the one that saves.
    """
    found = {name: _integer(name) for name in ("WORLD_SIZE", "RANK", *_MPI_SIZES)}
    world, rank = found["WORLD_SIZE"], found["RANK"]
    for name in _MPI_SIZES:
        if world is None and (found[name] or 1) > 1:
            raise PoiseError(f"{name} is {found[name]}, but MPI's launchers are not supported: {_LAUNCH}")
    if world is not None and world < 1:
        raise PoiseError(f"WORLD_SIZE must be at least 1, got {world}")
    if rank is not None and not 0 <= rank < (world or 1):
        size = "is not set" if world is None else f"is {world}"
        raise PoiseError(f"RANK is {rank}, but WORLD_SIZE {size}: unset RANK, or {_LAUNCH}")
    if (world or 1) > 1 and rank is None:
        raise PoiseError(f"WORLD_SIZE is {world}, but RANK is not set: unset WORLD_SIZE, or {_LAUNCH}")
    return world or 1


def _integer(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None or not value.strip():
        return None
    try:
        return int(value)
    except ValueError:
        raise PoiseError(f"{name} in the environment must be a whole number, got {value!r}") from None


def leave() -> None:
    """Part from the other processes, if there are any; a process that ends without it can abort in gloo's threads."""
    if several():
        torch.distributed.destroy_process_group()


def refuse_sharding(instead: str) -> None:
    """Raise PoiseError if `accelerate launch` was asked for FSDP or DeepSpeed, for what does not take accelerate's.

    instead: what to do. Reads the environment only: to be called first, before `join` and before a model is loaded.
    """
    if name := spread_by_launcher():
        raise PoiseError(f"{name} was asked for in accelerate's settings: {instead}")


def spread_by_launcher() -> str:
    """What `accelerate launch` was asked to spread weights over processes with, FSDP or DeepSpeed; "" if neither."""
    asked = (
        name for name in ("FSDP", "DeepSpeed") if os.environ.get(f"ACCELERATE_USE_{name.upper()}", "").lower() == "true"
    )
    return next(asked, "")


def share(count: int) -> slice:
    """This process's part of `count` things, which the number of processes divides."""
    each = count // num_processes()
    return slice(process_index() * each, (process_index() + 1) * each)


def total(part: Tensor) -> Tensor:
    """Sum over processes."""
    if not several():
        return part
    whole = _sendable(part).clone()
    torch.distributed.all_reduce(whole)
    return whole.to(part.device)


def add_up_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Sum gradients over processes, in place, in one message. A parameter without one counts as zeros."""
    if not several():
        return
    gradients: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = total(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, summed in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def gathered(part: Tensor) -> Tensor:
    """Parts of equal shape, one after the other along the first axis, in the order of the processes."""
    if not several():
        return part
    mine = _sendable(part).contiguous()
    parts = [torch.empty_like(mine) for _ in range(num_processes())]
    torch.distributed.all_gather(parts, mine)
    return torch.cat(parts).to(part.device)


def gathered_rows(rows: list[Row]) -> list[Row]:
    """Lists of anything, one after the other in the order of the processes. PyTorch sends them from a fit device."""
    if not several():
        return rows
    parts: list[Any] = [None] * num_processes()
    torch.distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def wait() -> None:
    """Until all processes have come here."""
    if several():
        torch.distributed.barrier()


def _sendable(part: Tensor) -> Tensor:
    """The tensor on a device that the group's backend knows: its own one if possible."""
    known = group_devices()
    return part if part.device.type in known else _moved(part, known[0])


def _moved(part: Tensor, device: str) -> Tensor:
    return part.to(device)


def group_devices() -> list[str]:
    """Types of the devices whose tensors the group's backends take: of "cpu:gloo,cuda:nccl" both."""
    return [pair.partition(":")[0] for pair in torch.distributed.get_backend_config().split(",")]
