"""Collective operations: on the device that the group knows, all in one module, and never without a group."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import poise
from forked import environment_of_torchrun, in_processes
from poise.errors import PoiseError
from poise.runtime import distributed as processes

SOURCE = Path(poise.__file__).parent
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "barrier", "broadcast", "gather_object")


def test_every_collective_is_called_in_one_module() -> None:
    pattern = re.compile(r"torch\.distributed|\bdist\.|" + "|".join(rf"\.{name}\(" for name in COLLECTIVES))
    found = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if pattern.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"runtime/distributed.py", "runtime/processes.py", "runtime/sharding.py"}
    # One asks for rank and size; the other has torch's fully_shard gather and spread. Neither sends anything itself.
    for name in ("processes.py", "sharding.py"):
        text = (SOURCE / "runtime" / name).read_text(encoding="utf-8")
        assert not any(f".{collective}(" in text for collective in COLLECTIVES)


def exchange(rank: int) -> dict[str, Any]:
    parameter, other = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.full((2, 2), float(rank + 1)) if rank else None
    other.grad = torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)
    processes.add_up_gradients([parameter, other])
    assert parameter.grad is not None
    return {
        "number": processes.num_processes(),
        "total": processes.total(torch.tensor(float(rank + 1))).item(),
        "gathered": processes.gathered(torch.tensor([[float(rank)]])).tolist(),
        "rows": processes.gathered_rows([{"rank": rank}] * (rank + 1)),
        "gradient": parameter.grad.tolist(),
        "other": other.grad.tolist(),
    }


def test_two_processes_share_sums_and_rows(tmp_path: Path) -> None:
    for found in in_processes(2, exchange, tmp_path):
        assert found == {
            "number": 2, "total": 3.0, "gathered": [[0.0], [1.0]], "rows": [{"rank": 0}, {"rank": 1}, {"rank": 1}],
            "gradient": [[2.0, 2.0], [2.0, 2.0]], "other": [3.0, 6.0, 9.0],
        }  # fmt: skip


MEET = """
import json, os, sys
from pathlib import Path
import torch
from poise.runtime import distributed
environment = dict(os.environ)
distributed.join()
rank = distributed.process_index()
total = distributed.total(torch.tensor(float(rank + 1))).item()
Path(sys.argv[1], str(rank)).write_text(json.dumps([distributed.num_processes(), total, environment]))
distributed.leave()
"""


@pytest.mark.slow
def test_torchrun_gives_the_environment_of_launched_processes(tmp_path: Path) -> None:
    """Two processes of the launcher itself meet; elsewhere `forked.launched` stands for it."""
    (tmp_path / "meet.py").write_text(MEET)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, str(tmp_path / "meet.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(2):
        number, total, found = json.loads((tmp_path / str(rank)).read_text())
        assert (number, total) == (2, 3.0)
        expected = environment_of_torchrun(rank, 2, port=int(found["MASTER_PORT"]))
        assert {name: found.get(name) for name in expected if name != "MASTER_ADDR"} == {
            name: value for name, value in expected.items() if name != "MASTER_ADDR"
        }
        assert found["MASTER_ADDR"]


@pytest.fixture
def cuda_only_group(tmp_path: Path) -> Iterator[None]:
    """A group of one process that knows CUDA tensors alone, as one of NCCL does."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("cuda:gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("cuda_only_group")
def test_a_tensor_goes_to_the_device_that_the_group_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        torch.distributed.all_reduce(torch.ones(1))
    assert processes.group_devices() == ["cuda"]
    asked = []
    monkeypatch.setattr(processes, "_moved", lambda part, device: asked.append(device) or part)
    for send in (processes.total, processes.gathered):
        with pytest.raises(RuntimeError, match="device type cpu"):  # this machine may have no GPU to move it to
            send(torch.ones(1))
    assert asked == ["cuda", "cuda"]
    # Objects are sent from a tensor that PyTorch makes where the group takes it.
    assert torch.distributed.distributed_c10d._get_object_coll_device() == "cuda"


def test_a_group_that_knows_both_takes_a_tensor_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    part = torch.ones(1)
    assert processes._sendable(part) is part


# ---- the environment ----

LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
REFUSED: dict[str, dict[str, str]] = {
    "RANK is 3, but WORLD_SIZE is not set": {"RANK": "3"},
    "RANK is 3, but WORLD_SIZE is 1": {"RANK": "3", "WORLD_SIZE": "1"},
    "WORLD_SIZE is 2, but RANK is not set": {"WORLD_SIZE": "2"},
    "the 2 processes of WORLD_SIZE cannot meet: ": {"WORLD_SIZE": "2", "RANK": "0"},
    "WORLD_SIZE must be at least 1, got 0": {"WORLD_SIZE": "0"},
    "RANK in the environment must be a whole number, got 'x'": {"RANK": "x"},
    "PMI_SIZE is 2, but MPI's launchers": {"PMI_SIZE": "2"},
    "OMPI_COMM_WORLD_SIZE is 4, but": {"OMPI_COMM_WORLD_SIZE": "4"},
    "MV2_COMM_WORLD_SIZE is 2, but": {"MV2_COMM_WORLD_SIZE": "2"},
}


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from accelerate.state import PartialState

    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    before, PartialState._shared_state = PartialState._shared_state, {}
    yield
    PartialState._shared_state = before


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("message", REFUSED)
def test_processes_that_cannot_meet_are_refused(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in REFUSED[message].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PoiseError, match=re.escape(message)) as caught:
        processes.join()
    assert "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize(
    "environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}, {"PMI_SIZE": "1"}, {"RANK": "0"}], ids=str
)
def test_one_process_needs_no_group(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.join()
    assert processes.num_processes() == 1
    assert os.environ.get("RANK", "0") == "0"


@pytest.mark.usefixtures("no_launcher")
def test_processes_that_did_not_form_a_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate leaves it where it takes the run for one of a single process."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("accelerate.PartialState", lambda **_: None)
    with pytest.raises(PoiseError, match=r"WORLD_SIZE is 2, but the processes did not form a group of 2: start"):
        processes.join()


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharding_that_was_asked_of_accelerate_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "True")
    with pytest.raises(PoiseError, match=f"^{name} was asked for in accelerate's settings: launch otherwise$"):
        processes.refuse_sharding("launch otherwise")
