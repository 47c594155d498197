"""Processes for tests: forks of the test's own process.

A fresh interpreter imports torch, transformers and TRL for seconds before it does anything. A fork has them imported.
It is a real process: it has an id, signal handlers and files of its own, and `kill -9` ends it wherever it is. It does
not take over pytest's capture of its output, a change of Ctrl-C, or what accelerate remembers of other processes.

- `started`: one process, to be killed or waited for. It is killed at the end of the test if it still runs.
- `status_of`: the exit status of one process.
- `launched`: several processes with the environment that `torchrun` gives them.
- `in_processes`: several processes that have formed a group.
"""

import gc
import os
import pickle
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

_running: list["Forked"] = []


class Forked:
    """A child of this process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def status(self) -> int | None:
        """The exit status, or minus the signal that ended it; None while it runs."""
        if self._status is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if found else None
        return self._status

    def ended(self, timeout: float = 200) -> int:
        """Waits for the end. The exit status, or minus the signal that ended it."""
        deadline = time.monotonic() + timeout
        while (status := self.status()) is None:
            assert time.monotonic() < deadline, f"still running after {timeout} s"
            time.sleep(0.002)
        return status

    def killed(self) -> int:
        """Ends it by `kill -9`. Its exit status, which differs from -9 if it had ended before."""
        if self.status() is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.ended()


def started(
    work: Callable[[], object], *, stderr: Path | None = None, environment: Mapping[str, str] | None = None
) -> Forked:
    """A process that does the work. It exits with the number that `work` returns, 0 without one, 1 after an error.

    stderr: the file for what it says there. Nothing else that it says is kept.
    environment: what it finds in `os.environ` besides what is there.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; pytest's hold no lock here
        pid = os.fork()
    if pid == 0:
        _child(work, stderr or Path(os.devnull), environment or {})
    _running.append(Forked(pid))
    return _running[-1]


def stop_all() -> None:
    """Ends what tests have started and left running."""
    while _running:
        _running.pop().killed()


def status_of(work: Callable[[], object]) -> int:
    """The exit status of a process that does the work."""
    return started(work).ended()


def launched(count: int, work: Callable[[], object], said: Path) -> None:
    """`count` processes that do the work, each with the environment that `torchrun` gives it. All must exit with 0.

    said: a folder for what they say on stderr.
    """
    for patience in (80, 200):  # a fork of a process with threads may find a lock taken that nobody will free
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [
            started(work, stderr=said / f"stderr{rank}", environment=environment_of_torchrun(rank, count, port))
            for rank in range(count)
        ]
        try:
            statuses = [process.ended(patience) for process in ranks]
            break
        except AssertionError:
            for process in ranks:
                process.killed()
            if patience == 200:
                raise
    assert statuses == [0] * count, "\n".join((said / f"stderr{rank}").read_text()[-2000:] for rank in range(count))


def environment_of_torchrun(rank: int, count: int, port: int) -> dict[str, str]:
    """What `torchrun` tells process `rank` of `count` on one machine, and that there is no GPU."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}


def in_processes(count: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)` returns in each of `count` processes that form a gloo group; a failed one fails the test."""

    def member(rank: int) -> None:
        store = f"file://{folder / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
        found = work(rank)
        torch.distributed.destroy_process_group()
        (folder / f"rank{rank}").write_bytes(pickle.dumps(found))

    ranks = [
        started(lambda rank=rank: member(rank), stderr=folder / f"stderr{rank}")  # type: ignore[misc]
        for rank in range(count)
    ]
    statuses = [process.ended() for process in ranks]
    assert statuses == [0] * count, "\n".join((folder / f"stderr{rank}").read_text() for rank in range(count))
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(count)]


def _child(work: Callable[[], object], stderr: Path, environment: Mapping[str, str]) -> NoReturn:
    status: object = 1
    try:
        for path, number in ((os.devnull, 1), (stderr, 2)):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, number)
            os.close(file)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False) for fd in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(environment)
        gc.freeze()  # a collection would touch, and so copy, all that is shared with the parent
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        PartialState._reset_state()
        found = work()
        status = found if isinstance(found, int) else 0
    except SystemExit as left:
        status = left.code
    except BaseException:  # noqa: BLE001  the parent reads what happened
        traceback.print_exc()
    finally:
        try:
            sys.stderr.flush()
        finally:  # whatever happens: a child that went on would be a second pytest
            os._exit(status if isinstance(status, int) else int(status is not None))
