"""Weights spread over two processes: sums, norms and whole weights are those of one process."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forked import in_processes
from poise.runtime.processes import process_index
from poise.runtime.sharding import (
    clip_gradients,
    is_part,
    is_spread,
    shard,
    spread_as,
    spread_state,
    whole,
    whole_on_main,
    whole_weights,
    without_weights,
)


class Stack(nn.Module):
    """Two layers, and a scale that is to stay whole on each process."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.scale = nn.Parameter(torch.full((6,), 1.5))
        self.unused = nn.Parameter(torch.ones(6))  # gets no gradient

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = layer(inputs).tanh()
        return inputs * self.scale


INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
MOST = 0.3


def spread(*, add_up: bool) -> Stack:
    model = Stack()
    shard(model.layers, model, [model.scale, model.unused], add_up=add_up)
    return model


def test_gradients_of_two_processes_add_up_and_are_clipped_as_those_of_one(tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, Any]:
        model = spread(add_up=True)
        model(INPUTS[2 * rank : 2 * rank + 2]).square().sum().backward()
        parts = {name: is_part(p) for name, p in model.named_parameters()}
        torch.distributed.all_reduce(model.scale.grad)  # what is whole on each is summed by whoever trains it
        norm = clip_gradients(list(model.parameters()), MOST)
        gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        return {"parts": parts, "norm": norm, "gradients": gradients}

    alone = Stack()
    alone(INPUTS).square().sum().backward()
    expected = nn.utils.clip_grad_norm_(alone.parameters(), MOST)
    assert expected > 2 * MOST  # clipping does something
    for found in in_processes(2, work, tmp_path):
        assert [name for name, part in found["parts"].items() if not part] == ["scale", "unused"]
        torch.testing.assert_close(found["norm"], expected)
        assert found["gradients"].keys() == {name for name, p in alone.named_parameters() if p.grad is not None}
        for name, gradient in found["gradients"].items():
            torch.testing.assert_close(gradient, alone.get_parameter(name).grad)


def test_without_add_up_gradients_are_means(tmp_path: Path) -> None:
    def work(rank: int) -> Tensor:
        model = spread(add_up=False)
        model(INPUTS[2 * rank : 2 * rank + 2]).square().sum().backward()
        return whole(model.layers[0].weight.grad)

    alone = Stack()
    alone(INPUTS).square().sum().backward()
    for gradient in in_processes(2, work, tmp_path):
        torch.testing.assert_close(gradient, alone.layers[0].weight.grad / 2)


def test_whole_weights_let_one_process_compute_alone(tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, Any]:
        model, said = spread(add_up=True), [process_index()]
        found: dict[str, Any] = {"before": is_spread(model)}
        with torch.no_grad(), whole_weights(model), whole_weights(model):
            found["within"] = is_spread(model)
            for _ in range(1 + rank):  # not as often as the other: either would wait for the other in a spread model
                found["out"] = model(INPUTS)
        found["after"] = is_spread(model)
        found["again"] = model(INPUTS).detach()
        weight = model.layers[1].weight  # spread again after the pass
        found["share"] = weight.to_local().numel() / weight.numel()
        return found | {"index": said}

    expected = Stack()(INPUTS).detach()
    found = in_processes(2, work, tmp_path)
    assert [one["index"] for one in found] == [[0], [1]]
    for one in found:
        assert (one["before"], one["within"], one["after"]) == (True, False, True)
        assert one["share"] == 0.5
        assert torch.equal(one["out"], expected)
        assert torch.equal(one["again"], expected)


def test_a_spread_tensor_is_whole_on_the_main_process_and_spread_again(tmp_path: Path) -> None:
    def work(_rank: int) -> dict[str, Any]:
        model = spread(add_up=True)
        weight, scale = model.layers[0].weight, model.scale
        theirs = torch.arange(36.0).view(6, 6)
        again = spread_as(theirs, weight)
        steps = spread_state(torch.tensor(7.0), weight)
        return {
            "main": whole_on_main(weight), "scale": whole_on_main(scale).detach(), "local": again.to_local(),
            "again": whole(again), "steps": steps, "moments": is_part(spread_state(theirs, weight)),
            "plain": torch.equal(spread_as(theirs, scale), theirs),
        }  # fmt: skip

    main, other = in_processes(2, work, tmp_path)
    assert torch.equal(main["main"], Stack().layers[0].weight)
    assert other["main"].numel() == 0
    for rank, one in enumerate((main, other)):
        assert torch.equal(one["scale"], torch.full((6,), 1.5))
        assert torch.equal(one["local"], torch.arange(36.0).view(6, 6)[3 * rank : 3 * rank + 3])
        assert torch.equal(one["again"], torch.arange(36.0).view(6, 6))
        assert one["steps"] == 7
        assert (one["moments"], one["plain"]) == (True, True)


def test_a_copy_without_weights_has_their_shapes_and_no_memory() -> None:
    model = Stack()
    model.scale.requires_grad_(False)
    model.register_buffer("shift", torch.arange(3.0))
    empty, nothing = without_weights([model, None])
    assert nothing is None
    assert torch.equal(empty.shift, torch.arange(3.0))
    for (name, mine), (other, theirs) in zip(model.named_parameters(), empty.named_parameters(), strict=True):
        assert (name, mine.shape, mine.requires_grad) == (other, theirs.shape, theirs.requires_grad)
        assert (mine.device.type, theirs.device.type) == ("cpu", "meta")


def test_one_process_keeps_its_weights_whole() -> None:
    model = spread(add_up=True)
    assert not any(is_part(parameter) for parameter in model.parameters())
    assert not is_spread(model)
    before = copy.deepcopy(model.state_dict())
    with whole_weights(model):
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    weight = model.layers[0].weight
    assert whole(weight) is weight
    assert whole_on_main(weight) is weight
    assert spread_as(INPUTS, weight) is INPUTS
