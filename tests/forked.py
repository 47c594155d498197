"""Several processes for a test, forked from this one: no interpreter is started and nothing is imported again."""

import os
import pickle
import sys
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


def started(work: Callable[[], object], stderr: Path | None = None) -> int:
    """The process id of a child that does the work. It exits with the status that the work returns, with 0 for
    anything but a number, and with 70 if something was raised. Only stderr is kept, in the file of that name."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            for path, number in ((os.devnull, 1), (stderr or os.devnull, 2)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
            # pytest has put files of its own in their place
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            status = work()
            code = status if isinstance(status, int) else 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int, *, wait: bool = True) -> int | None:
    """The exit code of a child, negative if a signal killed it; None while it runs, if not waited for."""
    found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None
