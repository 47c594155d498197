"""Cells: trainings in processes of their own, several at a time, that outlive a stop and may fail alone.

FOLDER/error.txt   why the last try failed
FOLDER/cost.json   processor time of every try together
"""

import fcntl
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from poise.errors import PoiseError
from poise.runtime.progress import progress
from poise.runtime.run_folder import Run, write_json


class Cell(NamedTuple):
    """One run of a command: of a reward model's training, or a policy's."""

    command: str
    config: Any

    @property
    def folder(self) -> Path:
        return Path(self.config.output)


def run_cells(cells: list[Cell], jobs: int, label: str) -> dict[Path, str]:
    """Run what is not finished, `jobs` at a time; returns the folders of those that failed, and why."""
    todo = [cell for cell in cells if Run(cell.folder).results is None]
    failed: dict[Path, str] = {}
    with progress(label, len(cells), len(cells) - len(todo)) as advance, ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run_cell, cell, jobs): cell for cell in todo}
        try:
            for done in as_completed(running):
                if why := done.result():
                    failed[running[done].folder] = why
                advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def run_cell(cell: Cell, jobs: int = 1) -> str:
    """One cell in a process of its own; returns what went wrong, or nothing."""
    error = cell.folder / "error.txt"
    try:
        run = Run.open(cell.folder, cell.config)
    except PoiseError as other:  # begun with other settings: it alone cannot go on
        error.write_text(str(other))
        return str(other)
    with (
        (cell.folder / ".lock").open("w") as lock,
        (cell.folder / "log.txt").open("a") as log,
        (cell.folder / "error.txt.part").open("w+") as stderr,
    ):
        # The process holds the lock, too: one that outlived a killed study is waited for, not doubled.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if run.results is not None:
            return ""
        threads = str(max((os.cpu_count() or 1) // jobs, 1))
        process = subprocess.Popen(
            [sys.executable, "-m", "poise.cli", cell.command, "--config", str(cell.folder / "config.yaml")],
            stdout=log, stderr=stderr, pass_fds=[lock.fileno()], env={"OMP_NUM_THREADS": threads, **os.environ},
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)  # its own processor time, which `wait` does not tell
        process.returncode = os.waitstatus_to_exitcode(status)
        write_json(cell.folder / "cost.json", {"cpu_hours": cpu_hours(cell.folder) + _hours(usage)})
        stderr.seek(0)
        said = stderr.read()
        Path(stderr.name).unlink()
    if process.returncode == 0 and run.results is not None:
        error.unlink(missing_ok=True)
        return ""
    why = (said.strip().splitlines() or [f"exit status {process.returncode}"])[-1].removeprefix("poise: ")
    error.write_text(said or why)
    return why


def cpu_hours(folder: Path) -> float:
    """Processor hours that a cell took so far, tries that failed included; 0 if nobody counted them.

    The study counts them when a try ends: a try whose study was killed before that is not in it.
    """
    path = folder / "cost.json"
    return float(json.loads(path.read_text())["cpu_hours"]) if path.exists() else 0.0


def _hours(usage: Any) -> float:
    return (usage.ru_utime + usage.ru_stime) / 3600
