"""A function that was edited is told from the one that it was; the same one, made again, is not."""

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from poise.runtime.functions import digest_of

FACTOR = 2.0


def by_global(x: float) -> float:
    return x * FACTOR


def through(x: float) -> float:
    return by_global(x) + 1


def closed(over: Any) -> Callable[[Any], Any]:
    return lambda x: x @ over if hasattr(over, "shape") else x * over


class Called:
    def __init__(self, value: Any):
        self.value = value

    def __call__(self, x: Any) -> Any:
        return x * self.value


def weights(value: float) -> torch.Tensor:
    return torch.full((3,), value, dtype=torch.bfloat16)


def linear(value: float) -> torch.nn.Module:
    made = torch.nn.Sequential(torch.nn.Linear(2, 1))
    torch.nn.init.constant_(made[0].weight, value)
    torch.nn.init.zeros_(made[0].bias)
    return made


@pytest.mark.parametrize(
    "made",
    [closed, Called, linear, lambda v: closed(weights(v)), lambda v: closed(weights(v).float().numpy()),
     lambda v: closed(Called(v)), lambda v: functools.partial(by_global, v), lambda v: Called(v).__call__,
     lambda v: Called({"a": [v, {v}]}), lambda v: Called(linear(v)), lambda v: (lambda x, by=v: x * by)],
)  # fmt: skip
def test_another_value_is_another_function(made: Callable[[float], Any], request: pytest.FixtureRequest) -> None:
    same = digest_of(made(1.0)) == digest_of(made(1.0))
    other = digest_of(made(1.0)) == digest_of(made(2.0))
    assert same
    inside_an_object = request.node.callspec.indices["made"] == 5  # of which only the type counts
    assert other == inside_an_object


def test_another_global_is_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_of(by_global), digest_of(through)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    after = digest_of(by_global), digest_of(through)
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_functions_of_other_packages_are_known_by_name() -> None:
    assert digest_of(torch.amin) != digest_of(torch.amax)
    assert digest_of(lambda x: pytest.approx(x)) != digest_of(lambda x: pytest.raises(x))


def test_what_holds_itself_ends() -> None:
    def itself(x: int) -> int:
        return itself(x - 1) if x else 0

    held: list[Any] = []
    held.append(held)
    assert digest_of(itself) != digest_of(closed(held))


def test_every_process_finds_the_same() -> None:
    code = "from poise.runtime.functions import digest_of; print(digest_of(lambda x: x in {'a', 'b', 'c'}))"
    found = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(3)}
    assert len(found) == 1
