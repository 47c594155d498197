"""What an update of the policy need not do to memory: operations whose derivative is written out here.

On two cores an update of a small model waits for memory half of the time: for LoRA's sums and products of whole
activations, for the table of all logits, and for fresh pages. Each of these operations writes its result once.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor
from torch.nn import functional


class ChosenLogprob(torch.autograd.Function):
    """log softmax(W h)_y for rows of hidden states h (N, H), a frozen output matrix W (V, H) and token ids y (N,).

    Its gradient to h, W_y - softmax(W h) W, is known as soon as the value is, up to a factor for each row. So both are
    made in one pass over a few rows at a time, and the (N, V) table, by far the largest tensor of an update, never is.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        rows = 128 if hidden.device.type == "cpu" else 2048  # fits a CPU's cache; keeps a GPU busy
        logprob = torch.empty(len(hidden), device=hidden.device)
        pull = torch.empty_like(hidden) if hidden.requires_grad else None
        table = hidden.new_empty(min(rows, len(hidden)), len(weight))  # one for all: fresh memory costs page faults
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = torch.mm(hidden[part], weight.T, out=table[: len(hidden[part])]).float()
            highest = logits.amax(-1, keepdim=True)
            own = logits.gather(-1, chosen[part, None])
            mass = logits.sub_(highest).exp_()
            total = mass.sum(-1, keepdim=True)
            logprob[part] = (own - highest - total.log()).squeeze(-1)
            if pull is not None:
                pull[part] = weight[chosen[part]] - (mass.div_(total).to(weight.dtype) @ weight)
        ctx.save_for_backward(pull)
        return logprob

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (pull,) = ctx.saved_tensors
        return grads[0].unsqueeze(-1).to(pull.dtype) * pull, None, None


class AdaptedMap(torch.autograd.Function):
    """x W' + b + s (x A') B' for rows x (N, in), frozen W (out, in), b (out,) or None, adapters A (r, in), B (out, r).

    Four tables of the output's size become one: the low-rank part is added where the frozen part lies.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        low = x @ down.T
        ctx.save_for_backward(x, low, weight, down, up)
        ctx.scale = scale
        return functional.linear(x, weight, bias).addmm_(low, up.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        (grad,) = grads
        x, low, weight, down, up = ctx.saved_tensors
        to_low = (grad @ up).mul_(ctx.scale)
        to_x = (grad @ weight).addmm_(to_low, down) if ctx.needs_input_grad[0] else None
        return to_x, None, None, to_low.T @ x, (grad.T @ low).mul_(ctx.scale), None


class AdaptedLinear(lora.Linear):
    """peft's adapted linear layer, which it stays in all but this: one plain float32 adapter is run by `AdaptedMap`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base, active = self.get_base_layer(), self.active_adapters
        rounds = not x.is_meta and torch.is_autocast_enabled(x.device.type)  # which the meta device does not have
        plain = (
            not (self.disable_adapters or self.merged or args or kwargs or rounds)
            and len(active) == 1
            and x.dtype == base.weight.dtype == self.lora_A[active[0]].weight.dtype == torch.float32
        )
        if not plain:
            return super().forward(x, *args, **kwargs)
        down, up = self.lora_A[active[0]].weight, self.lora_B[active[0]].weight
        rows = x.flatten(0, -2)
        out: Tensor = AdaptedMap.apply(rows, base.weight, base.bias, down, up, self.scaling[active[0]])
        return out.view(*x.shape[:-1], -1)


@contextlib.contextmanager
def folded_in(model: Any) -> Iterator[None]:
    """Within it the adapters that are on are part of a model's weights, in the weights' dtype.

    Afterwards the weights are bitwise what they were. Of a model with adapters of experts, which are several matrices
    in one parameter, all adapters stay beside the weights: the result is the same, and sampling takes longer.
    """
    layers: list[Any] = [
        module for module in model.modules() if isinstance(module, lora.LoraLayer) and not module.disable_adapters
    ]
    if not all(hasattr(layer.get_base_layer(), "weight") for layer in layers):
        yield
        return
    kept = [layer.get_base_layer().weight.data for layer in layers]
    with model.disable_adapter() if layers else contextlib.nullcontext():
        try:
            for layer, weight in zip(layers, kept, strict=True):
                layer.get_base_layer().weight.data = weight + layer.get_delta_weight("default").to(weight.dtype)
            yield
        finally:
            for layer, weight in zip(layers, kept, strict=True):
                layer.get_base_layer().weight.data = weight


def keep_freed_memory() -> None:
    """Let this process keep what it has freed, up to the peak it has reached; where that cannot be asked for, nothing.

    Every minibatch frees its activations. glibc then gives them back to the system, and the next minibatch pays a page
    fault for every 4 KiB of them.
    """
    top, mapping, most = -1, -3, 2**31 - 1  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h; the options are C ints
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mapping, 32 * 2**20)  # larger blocks still come and go; the most that glibc takes
        mallopt(top, most)
