"""Processes that begin with Poise imported: forks of a server that has imported it and done nothing else.

A fresh interpreter imports torch, transformers and TRL for seconds before it does anything. The server only imports.
No pool of torch's threads exists in it, so a fork of it behaves as a fresh interpreter does: it is a real process with
a process id, signal handlers and open files of its own, and `kill -9` ends it wherever it is.
"""

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

WarmProcess = ForkServerProcess
POISE = "import sys; from poise.cli.main import main; sys.exit(main(sys.argv[1:]))"  # the command line
IMPORTED = ["poise.cli.train_policy", "poise.cli.train_reward"]


class WarmProcesses:
    """Starts processes and ends those that a test has left running."""

    def __init__(self) -> None:
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(IMPORTED)
        self.started: list[WarmProcess] = []

    def start(self, program: str, *arguments: str, stderr: Path | None = None) -> WarmProcess:
        """What `python -c program *arguments` does, with one thread. Only stderr is kept, in the file of that name."""
        process = self.context.Process(target=_run, args=(program, arguments, os.fspath(stderr or os.devnull)))
        process.start()
        self.started.append(process)
        return process

    def stop_all(self) -> None:
        for process in self.started:
            process.kill()
            process.join()
        self.started.clear()


def ended(process: WarmProcess, timeout: float = 200) -> int:
    """Waits for the end. Its exit status, or minus the signal that ended it."""
    process.join(timeout)
    assert process.exitcode is not None, f"still running after {timeout} s"
    return process.exitcode


def _run(program: str, arguments: tuple[str, ...], stderr: str) -> None:
    import torch

    for path, number in ((os.devnull, 1), (stderr, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    torch.set_num_threads(1)
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
