"""Several processes for a test, forked from this one: no interpreter is started and nothing is imported again."""

import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def in_processes(count: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)` returns in each of `count` processes that form a gloo group; a failed one fails the test."""
    children = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os._exit(_child(count, rank, work, folder))
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    results = [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(count)]
    assert codes == [0] * count, results
    return results


def _child(count: int, rank: int, work: Callable[[int], Any], folder: Path) -> int:
    code, result = 1, ""
    try:
        store = f"file://{folder / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
        result = work(rank)
        torch.distributed.destroy_process_group()
        code = 0
    except BaseException:  # noqa: BLE001  the parent reads what happened
        result = traceback.format_exc()
    (folder / f"rank{rank}").write_bytes(pickle.dumps(result))
    return code


def started(work: Callable[[], object]) -> int:
    """The process id of a child that does the work, says nothing, and exits with 0 if nothing was raised."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int, *, wait: bool = True) -> int | None:
    """The exit code of a child, negative if a signal killed it; None while it runs, if not waited for."""
    found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None
