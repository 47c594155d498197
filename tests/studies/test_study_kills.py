"""A study that is killed at any moment takes its trainings with it, and the same command ends as an undisturbed one."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import forked
from poise.cli import main as cli
from poise.policy import loop
from poise.reports import plots, policy_card
from poise.reward import train as train_reward
from poise.runtime import jobs
from poise.studies import config as settings
from poise.studies import study
from test_kills import KILLED, boundaries, contents

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux's"),
    pytest.mark.usefixtures("undrawn"),
]

BOUNDARIES = 5  # of the study's own process, spread over all
IN_JOBS = ("heads", "models", "cards", "step 0", "step 1", "checkpoint", "card")
TIMES = {"cost.json", "log.txt", "report.html", ".lock"}


def kept(base: Path) -> dict[str, Any]:
    """What a study leaves, without what times differ in."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(one) for key, one in value.items() if key != "cpu_hours" and "seconds" not in key}
        return [timeless(one) for one in value] if isinstance(value, list) else value

    found = {name: data for name, data in contents(base / "study").items() if Path(name).name not in TIMES}
    return {name: timeless(data) if isinstance(data, list) else data for name, data in found.items()}


class ForkedJob:
    """In place of `subprocess.Popen`: the job runs in a fork, with the same file handles and the same signal."""

    def __init__(self, command: list[str], *, stdout: Any, stderr: Any, preexec_fn: Callable[[], None], **_: Any):
        self.returncode = 0
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                preexec_fn()
                os.dup2(stdout.fileno(), 1)
                os.dup2(stderr.fileno(), 2)
                sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
                SEEN.extend([""] * 1_000_000)  # the boundaries at which the study is killed are not the job's
                with (PIDS / str(os.getpid())).open("w") as file:
                    file.write(command[3])
                status = cli.main(command[3:])
            finally:
                os._exit(status)


SEEN: list[str] = []
PIDS = Path()


def run(
    wanted: study.Config, at: int = -1, counted: Path | None = None, prepare: Callable[[], None] | None = None
) -> int:
    """The study in a fork, its jobs in forks of that; killed at a boundary of its own, or by what `prepare` patches."""

    def work() -> int:
        global PIDS
        SEEN.clear()
        PIDS = Path(wanted.output).parent / "pids"
        PIDS.mkdir(exist_ok=True)
        os.environ["POISE_CACHE"] = str(Path(wanted.output).parent / "cache")
        jobs.subprocess.Popen = ForkedJob  # type: ignore[attr-defined, misc, assignment]
        jobs.progress = silent  # type: ignore[assignment]  # a bar's thread must not hold a lock while a job is forked
        if prepare:
            prepare()
        with boundaries(at, SEEN):
            study.run(wanted)
        if counted:
            counted.write_text(str(len(SEEN)))
        return 0

    return forked.started(work, stderr=Path(wanted.output).parent / "stderr.txt").ended()


@contextlib.contextmanager
def silent(*_: Any) -> Iterator[Callable[..., None]]:
    yield lambda *_: None


def orphans(base: Path) -> list[str]:
    """Jobs of a killed study that are still running a while later."""
    for _ in range(600):
        alive = [path for path in (base / "pids").iterdir() if Path(f"/proc/{path.name}").exists() and not _ended(path)]
        if not alive:
            return []
        time.sleep(0.05)
    return [path.read_text() for path in alive]


def _ended(path: Path) -> bool:
    try:
        return Path(f"/proc/{path.name}/stat").read_text().split(") ")[1].startswith("Z")
    except OSError:
        return True


def killing(base: Path, moment: str) -> Callable[[], None]:
    """A job kills the study that started it, once, at a moment of the job's work."""
    place, name, at = {
        "heads": (train_reward, "train_on_features", 1), "models": (train_reward, "save_reward_model", 2),
        "step 0": (loop.Training, "one_step", 1), "step 1": (loop.Training, "one_step", 2),
        "cards": (plots, "save_reliability", 2), "checkpoint": (loop.Learner, "save", 3),
        "card": (policy_card, "write_card", 1),
    }[moment]  # fmt: skip

    def prepare() -> None:
        function, calls = getattr(place, name), list[int]()

        def kill(*arguments: Any, **options: Any) -> Any:
            calls.append(0)
            if len(calls) == at and not (base / "killed").exists():
                (base / "killed").touch()
                parent = os.getppid()
                os.kill(parent, signal.SIGKILL)
                while os.getppid() == parent:  # a big process ends slowly, and the job is not to go on meanwhile
                    time.sleep(0.001)
            return function(*arguments, **options)

        setattr(place, name, kill)

    return prepare


@pytest.fixture(scope="module")
def settings_of(preferences_file: Path, prompts_file: Path, tiny_model: str) -> Callable[[Path], study.Config]:
    """A study of one reward model and two policies in a folder of its own."""
    policy = replace(
        settings.POLICY, num_steps=2, max_tokens=3, prompts_per_step=2, completions_per_prompt=2, adapted_layers=1,
        lora_rank=2, baseline_completions=4, eval_completions=1, save_every=1,
    )  # fmt: skip
    reward = replace(settings.REWARD, num_layers=1, head_steps=5, posterior_heads=2, num_heads=2)

    def make(base: Path) -> study.Config:
        base.mkdir(parents=True)
        return study.Config(
            output=str(base / "study"), preferences=str(preferences_file), prompts=str(prompts_file),
            eval_prompts=str(prompts_file), num_preferences=0, model=tiny_model, arms=("single", "brme_0.4"),
            label_noise=("0",), pool_size=0, reward_seeds=1, reward=reward, policy=policy,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def undisturbed(
    settings_of: Callable[[Path], study.Config], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], int]:
    """What a study leaves that nobody killed, and the number of its boundaries."""
    base = tmp_path_factory.mktemp("calm") / "base"
    calm = settings_of(base)
    assert run(calm, counted=base.parent / "counted") == 0, (base / "stderr.txt").read_text()
    assert json.loads((base / "study" / "results.json").read_text())["missing"] == {}
    return kept(base), int((base.parent / "counted").read_text())


@pytest.mark.parametrize("moment", [*range(BOUNDARIES), *IN_JOBS])
def test_a_killed_study_leaves_no_orphans_and_goes_on(
    moment: int | str, undisturbed: tuple[dict[str, Any], int], settings_of: Callable[[Path], study.Config],
    tmp_path: Path,
) -> None:  # fmt: skip
    expected, total = undisturbed
    base = tmp_path / "base"
    wanted = settings_of(base)
    if isinstance(moment, int):
        assert run(wanted, total * moment // BOUNDARIES) == KILLED
    else:
        assert run(wanted, prepare=killing(base, moment)) == -signal.SIGKILL
    assert orphans(base) == []
    assert run(wanted) == 0, (base / "stderr.txt").read_text()
    assert kept(base) == expected
