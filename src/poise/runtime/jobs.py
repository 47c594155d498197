"""Runs each job in a subprocess, several at a time. A job goes on where it was stopped; jobs fail independently.

A job whose parent is killed is asked to stop: a training saves its step and ends.

FOLDER/error.txt        why the last try failed
FOLDER/error.txt.part   what a try says on stderr; there while it goes on, and after one that was killed
FOLDER/cost.json        processor time of all tries together
"""

import ctypes
import fcntl
import math
import os
import queue
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from poise.errors import PoiseError
from poise.runtime.folders import clear_leftovers, is_ours, own
from poise.runtime.progress import progress
from poise.runtime.records import read_object
from poise.runtime.run_folder import Run, write_json
from poise.runtime.settings import NotNegative

_SAID = "error.txt.part"
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class _Cost:
    """cost.json."""

    cpu_hours: NotNegative


class Job(NamedTuple):
    """One `poise` command and its config, for example the training of one policy."""

    command: str
    config: Any

    @property
    def folder(self) -> Path:
        """The run folder that the job writes."""
        return Path(self.config.output)


def run_jobs(jobs: list[Job], at_a_time: int, label: str) -> dict[Path, str]:
    """Run the jobs that are not finished, `at_a_time` of them at a time.

    label: title of the progress bar.
    Returns the folders of the jobs that failed, each with the reason. Where several GPUs are visible each job sees one
    of its own, or, if the jobs at a time are more, as few others with it as can be.
    """
    free = _gpus_for(at_a_time)

    def run_one(job: Job) -> str:
        gpu = free.get() if free else None
        try:
            return run_job(job, at_a_time, gpu)
        finally:
            if free:
                free.put(gpu)

    todo: list[Job] = []
    for job in jobs:
        if not _has_ended(job.folder):
            todo.append(job)
        else:  # what a killed study was writing of a job that had finished
            clear_leftovers(job.folder / "cost.json")
    failed: dict[Path, str] = {}
    with progress(label, len(jobs), len(jobs) - len(todo)) as advance, ThreadPoolExecutor(at_a_time) as pool:
        running = {pool.submit(run_one, job): job for job in todo}
        try:
            for done in as_completed(running):
                if why := done.result():
                    failed[running[done].folder] = why
                advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def _gpus_for(at_a_time: int) -> queue.SimpleQueue[str | None] | None:
    """The GPUs that jobs take turns on, each as often as jobs may share it; None where there is nothing to choose."""
    gpus = visible_gpus()
    if len(gpus) < 2 or at_a_time < 2:
        return None
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for _ in range(math.ceil(at_a_time / len(gpus))):
        for gpu in gpus:
            free.put(gpu)
    return free


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them; none if torch is not imported yet."""
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return [name for name in map(str.strip, named.split(",")) if name and name != "-1"]
    torch = sys.modules.get("torch")
    return [str(number) for number in range(torch.cuda.device_count())] if torch else []


def run_job(job: Job, at_a_time: int = 1, gpu: str | None = None) -> str:
    """Run one job in a subprocess, on its share of the processor's cores, and on one GPU alone if one is named.

    Returns the reason if it failed, otherwise an empty string.
    """
    error = job.folder / "error.txt"
    try:
        run = Run(job.folder)
        run.check_config(job.config)
        own(job.folder)
        if run.results is None:
            run.write_config(job.config)
    except PoiseError as other:  # the folder was begun with other settings: only this job cannot go on
        if is_ours(job.folder):
            error.write_text(str(other))
        return str(other)
    with (job.folder / ".lock").open("w") as lock, (job.folder / "log.txt").open("a") as log:
        # The subprocess inherits the lock. If it outlives a killed parent, the next start waits for it here.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _has_ended(job.folder):
            return ""
        environment = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // at_a_time, 1)), **os.environ}
        environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        with (job.folder / _SAID).open("w+") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "poise.cli", job.command, "--config", str(job.folder / "config.yaml")],
                stdout=log, stderr=stderr, pass_fds=[lock.fileno()], env=environment,
                preexec_fn=_ends_with_parent,  # one system call; its library is loaded before the fork
            )  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)  # `Popen.wait` does not report the subprocess's processor time
            process.returncode = os.waitstatus_to_exitcode(status)
            write_json(job.folder / "cost.json", {"cpu_hours": cpu_hours(job.folder) + _hours(usage)})
            stderr.seek(0)
            said = stderr.read()
        (job.folder / _SAID).unlink()
    if process.returncode == 0 and run.results is not None:
        error.unlink(missing_ok=True)
        return ""
    why = (said.strip().splitlines() or [f"exit status {process.returncode}"])[-1].removeprefix("poise: ")
    error.write_text(said or why)
    return why


def _has_ended(folder: Path) -> bool:
    """Has the job done all its work? A command writes model cards after its results, and may be killed in between."""
    return Run(folder).results is not None and not (folder / _SAID).exists()


def _ends_with_parent() -> None:
    """Have the system send this process SIGTERM when the thread that started it ends, also if by kill -9 (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def cpu_hours(folder: Path) -> float:
    """Processor hours of all tries of a job so far, failed ones included; 0 if none is recorded.

    The time of a try is recorded when the try ends. If the parent process is killed first, that try is not counted.
    """
    path = folder / "cost.json"
    return float(read_object(path, _Cost)["cpu_hours"]) if path.exists() else 0.0


def _hours(usage: Any) -> float:
    return (usage.ru_utime + usage.ru_stime) / 3600
