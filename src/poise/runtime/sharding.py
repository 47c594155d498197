"""Weights spread over the processes of a run, by torch's own `fully_shard` (FSDP2): gloo on CPUs, NCCL on GPUs.

Each process keeps a part of every weight, gradient and optimizer state. A layer is whole while it computes. Functions
that say so must be called by all processes together.

A trainer of TRL is spread by accelerate, which calls the same `fully_shard`; `by_accelerate` and `spread_on_cpu`.
"""

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from poise.runtime.processes import num_processes, process_index, several

T = TypeVar("T")


def shard(
    layers: Iterable[nn.Module], root: nn.Module, kept_whole: Iterable[nn.Parameter] = (), *, add_up: bool = False
) -> None:
    """Spread the weights of each layer, and of `root` that holds them, but for those to be kept whole.

    root: what is called; it gathers its own weights, and lets each layer gather its own. With one process nothing is
    done. add_up: gradients become the sum over processes, else their mean.
    """
    if not several():
        return
    kept, mesh = set(kept_whole), _mesh()
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(root, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    if add_up:
        for unit in _units(root):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo knows no other way to leave a sum as it is


def _units(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _mesh() -> DeviceMesh:
    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (num_processes(),))


def is_part(tensor: Tensor) -> bool:
    """Does this process hold a part of it only?"""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A spread tensor, put together on the CPU of every process, by all of them together; any other as it is."""
    return tensor.full_tensor().detach().cpu() if isinstance(tensor, DTensor) else tensor


def whole_on_main(tensor: Tensor) -> Tensor:
    """As `whole`; what the other processes get is empty."""
    if not isinstance(tensor, DTensor):
        return tensor
    found = tensor.full_tensor().detach()
    return found.new_empty(0) if process_index() else found.cpu()


def spread_as(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor that all processes have, spread as `like` is; without a message."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def spread_state(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """A state of the optimizer, spread as its weight is; the number of steps stays whole."""
    return spread_as(tensor, parameter) if tensor.shape == parameter.shape else tensor


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale gradients down to a norm of `most`, as torch's clip_grad_norm_; returns the norm before. Called by all."""
    if not any(map(is_part, parameters)):
        return nn.utils.clip_grad_norm_(parameters, most)
    kinds = [[p for p in parameters if is_part(p) is part and p.grad is not None] for part in (False, True)]
    norms = [whole(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds if kind]
    norm = torch.stack([one.to(parameters[0].device) for one in norms]).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, most, norm)
    return norm


def is_spread(model: nn.Module) -> bool:
    """Are its weights spread, and not whole for the moment?"""
    return bool(_units(model)) and not getattr(model, "_poise_whole", False)


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Within it all weights are whole on every process, which may then compute for itself. Entered by all together.

    Within another such it does nothing.
    """
    if not is_spread(model):
        yield
        return
    units = _units(model)
    model._poise_whole = True  # type: ignore[assignment]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)
        model._poise_whole = False  # type: ignore[assignment]


@contextlib.contextmanager
def by_accelerate() -> Iterator[None]:
    """Within it accelerate may be asked to spread weights; what this process trains afterwards knows nothing of it."""
    if not several():
        yield
        return
    from accelerate.state import AcceleratorState, PartialState

    names = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")  # accelerate and transformers set them
    before, kind = {name: os.environ.get(name) for name in names}, PartialState().distributed_type
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if PartialState().distributed_type != kind:
            PartialState().distributed_type = kind
            AcceleratorState._reset_state()


def spread_on_cpu(accelerator: Any, settings: dict[str, Any]) -> None:
    """Have accelerate spread weights on CPUs: asked for FSDP there, it trains whole copies and says nothing.

    settings: of its FullyShardedDataParallelPlugin. With GPUs nothing is done.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if accelerator.distributed_type == DistributedType.FSDP:
        return
    PartialState().distributed_type = DistributedType.FSDP  # every AcceleratorState that is made copies it
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)


def copy_whole(tensor: Tensor, into: nn.Parameter) -> None:
    """Give a weight, spread or not, the values of a whole tensor that all processes have."""
    into.data.copy_(spread_as(tensor, into))


def without_weights(model: T) -> T:
    """A copy of modules whose parameters have shapes and no memory; buffers are copied."""
    modules: Any = model
    parameters = [p for one in modules if one is not None for p in one.parameters()]
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in parameters}
    return copy.deepcopy(model, memo)
