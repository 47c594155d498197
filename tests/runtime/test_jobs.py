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


def failing(tmp_path: Path, what: str) -> str:
    """In place of Python: a program that does `what` in the shell."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{what}\n")
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


@pytest.mark.parametrize(
    ("program", "why", "kept"),
    [
        ("echo noise >&2; echo 'poise: the disk is full' >&2; exit 2", "the disk is full", "noise\npoise: the disk"),
        ("exit 3", "exit status 3", "exit status 3"),
        ("true", "exit status 0", "exit status 0"),  # it ended well and left no results
    ],
)
def test_a_job_that_failed_says_why_and_may_be_tried_again(
    program: str, why: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.Job("toy", Config(str(tmp_path / "run")))
    monkeypatch.setattr(jobs.sys, "executable", failing(tmp_path, program))
    assert jobs.run_jobs([job], 1, "jobs") == {job.folder: why}
    assert (job.folder / "error.txt").read_text().startswith(kept)
    monkeypatch.setattr(jobs.sys, "executable", stub(tmp_path))
    assert jobs.run_jobs([job], 1, "jobs") == {}
    assert not (job.folder / "error.txt").exists()
    monkeypatch.setattr(jobs.sys, "executable", failing(tmp_path, "exit 3"))
    assert jobs.run_jobs([job], 1, "jobs") == {}  # it has ended, and is not run again


def test_a_job_killed_after_its_results_is_run_again_with_its_config_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model cards may be missing. What is recorded of the machine stays that of the run which made the results."""
    job = jobs.Job("toy", Config(str(tmp_path / "run")))
    monkeypatch.setattr(jobs.sys, "executable", stub(tmp_path))
    assert jobs.run_job(job) == ""
    (job.folder / "environment.json").write_text("{}")
    (job.folder / "error.txt.part").write_text("half")
    (job.folder / "results.json").write_text("{}")
    assert jobs.run_job(job) == ""
    assert "gpu" in json.loads((job.folder / "results.json").read_text())
    assert (job.folder / "environment.json").read_text() == "{}"
    assert not (job.folder / "error.txt.part").exists()


def test_a_job_that_another_process_finished_meanwhile_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.Job("toy", Config(str(tmp_path / "run")))
    monkeypatch.setattr(jobs.sys, "executable", failing(tmp_path, "exit 3"))

    def flock(_lock: object, _how: int) -> None:  # waits until the other process ends
        (job.folder / "results.json").write_text("{}")

    monkeypatch.setattr(jobs.fcntl, "flock", flock)
    assert jobs.run_job(job) == ""
    assert not (job.folder / "cost.json").exists()
