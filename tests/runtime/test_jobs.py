"""Jobs and the GPUs they see."""

import json
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from poise.runtime import jobs


@dataclass(frozen=True)
class Config:
    output: str


def stub(tmp_path: Path) -> str:
    """In place of Python: a program that notes the GPUs it sees, in the run folder of `… --config RUN/config.yaml`."""
    program = tmp_path / "python"
    program.write_text(
        "#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\nrun=$(dirname $1)\n"
        'echo "{\\"gpu\\": \\"${CUDA_VISIBLE_DEVICES-unset}\\"}" > "$run/results.json"\n'
    )
    program.chmod(0o755)
    return str(program)


def seen(tmp_path: Path, count: int, at_a_time: int) -> list[str]:
    todo = [jobs.Job("toy", Config(str(tmp_path / "runs" / str(i)))) for i in range(count)]
    assert jobs.run_jobs(todo, at_a_time, "jobs") == {}
    return [json.loads((job.folder / "results.json").read_text())["gpu"] for job in todo]


def test_each_job_sees_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.sys, "executable", stub(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-7")
    assert set(seen(tmp_path, 6, 2)) <= {"3", "GPU-7"}


@pytest.mark.parametrize(("devices", "at_a_time"), [("5", 2), ("4,5", 1), ("-1", 2)])
def test_with_nothing_to_choose_jobs_see_what_their_parent_does(
    devices: str, at_a_time: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.sys, "executable", stub(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)
    assert set(seen(tmp_path, 2, at_a_time)) == {devices}


@pytest.mark.parametrize("at_a_time", [2, 3, 4])
def test_no_gpu_has_more_jobs_at_a_time_than_it_must(
    at_a_time: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All jobs of a moment wait for each other, so that they are counted while all of them run."""
    together, lock, running, most = threading.Barrier(at_a_time), threading.Lock(), Counter[str](), Counter[str]()

    def run_job(job: jobs.Job, at_a_time: int, gpu: str | None) -> str:  # noqa: ARG001
        assert gpu is not None
        with lock:
            running[gpu] += 1
            most[gpu] = max(most[gpu], running[gpu])
        together.wait(timeout=30)
        with lock:
            running[gpu] -= 1
        return ""

    monkeypatch.setattr(jobs, "run_job", run_job)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    todo = [jobs.Job("toy", Config(str(tmp_path / str(i)))) for i in range(2 * at_a_time)]
    assert jobs.run_jobs(todo, at_a_time, "jobs") == {}
    assert max(most.values()) == (at_a_time + 1) // 2
