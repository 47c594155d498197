"""What happens to a command in trouble: signals, closed pipes, no home, folders that cannot be written or are deleted,
a full disk. docs/robustness.md has a row for each. Commands run in forks of this process."""

import ctypes
import os
import pwd
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forked
from poise.cli import main as cli
from poise.models import reward_model
from poise.policy import loop
from poise.reward import head_training, score
from poise.reward import train as train_reward
from test_kills import contents

pytestmark = pytest.mark.usefixtures("undrawn")
GOES_ON = "poise: interrupted; the same command goes on from the last checkpoint\n"
Prepare = Callable[[], object]


@pytest.fixture(scope="session")  # `_calm` names it, and pytest-xdist may leave this module and come back
def reward(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> Path:
    return train_tiny_reward(tiny_model)


class Command:
    """One command in a folder of its own, run in forks."""

    def __init__(self, folder: Path, *arguments: str, output: str = "out"):
        self.folder, self.arguments, self.output = folder, arguments, folder / output
        self.said = ""

    def run(self, prepare: Prepare = lambda: None) -> int:
        """Exit status; `prepare` is called in the fork, before the command. What it says is kept in `said`."""
        self.folder.mkdir(parents=True, exist_ok=True)

        def work() -> int:
            os.environ["POISE_CACHE"] = str(self.folder / "cache")
            prepare()
            return cli.main([*self.arguments, "--output", str(self.output)])

        stderr = self.folder.with_name(f"{self.folder.name}.stderr")
        status = forked.started(work, stderr=stderr).ended()
        self.said = stderr.read_text()
        return status

    def left(self) -> dict[str, Any]:
        """What lies in the folder, but for the cache."""
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        return contents(self.folder)


@pytest.fixture
def commands(
    tmp_path: Path, reward: Path, tiny_model: str, preferences_file: Path, prompts_file: Path, monkeypatch: Any
) -> Any:
    """name, folder -> Command. `score` works in parts of two rows, since other parts may round otherwise."""
    monkeypatch.setattr(score, "TEXTS_PER_PART", 2)
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(f'{{"prompt": "Review.", "completion": "good {i}"}}\n' for i in range(40)))
    options: dict[str, list[str]] = {
        "train-reward": [
            "--preferences", str(preferences_file), "--model", tiny_model, "--num-layers", "1", "--head-steps", "5",
            "--posterior-heads", "2", "--num-heads", "2", "--trunk", "frozen",
        ],
        "train-policy": [
            "--prompts", str(prompts_file), "--model", tiny_model, "--reward", f"{reward}/brme",
            "--prompts-per-step", "2", "--completions-per-prompt", "2", "--max-tokens", "3", "--num-steps", "3",
            "--save-every", "3", "--adapted-layers", "1", "--lora-rank", "2", "--baseline-completions", "4",
            "--eval-completions", "1",
        ],
        "score": [f"{reward}/brme", str(samples)],
        "export": [f"{reward}/brme", "--scalar", "mean"],
        "ensemble": [f"{reward}/single", f"{reward}/ensemble", "--reference", str(preferences_file)],
    }  # fmt: skip

    def make(name: str, folder: str) -> Command:
        output = "out.jsonl" if name == "score" else "out"
        return Command(tmp_path / folder / "base", name, *options[name], output=output)

    return make


Commands = Callable[[str, str], Command]
_calm: dict[str, dict[str, Any]] = {}


def undisturbed(commands: Commands, name: str) -> dict[str, Any]:
    """What a command leaves when nothing happens; it is run once."""
    if name not in _calm:
        calm = commands(name, "calm")
        assert calm.run() == 0, calm.said
        _calm[name] = calm.left()
    return _calm[name]


def in_step(number: int, *signals: int) -> Prepare:
    """The process sends itself signals in the middle of a step of PPO, after it has sampled."""

    def prepare() -> None:
        heads = loop.PolicyReward.heads

        def with_signals(self: Any, policy: Any, prompts: Any, texts: Any, step: int) -> Any:
            if step == number:
                for one in signals:
                    os.kill(os.getpid(), one)
            return heads(self, policy, prompts, texts, step)

        loop.PolicyReward.heads = with_signals  # type: ignore[method-assign]

    return prepare


# ---- signals ----


@pytest.mark.slow
@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGINT, signal.SIGINT)])
def test_a_training_that_is_asked_to_stop_goes_on(commands: Commands, signals: tuple[int, ...]) -> None:
    """Asked once, it ends the step and saves it; asked twice, it ends at once."""
    stopped = commands("train-policy", "stopped")
    assert stopped.run(in_step(1, *signals)) == 130
    assert stopped.said.endswith(GOES_ON)
    steps = (stopped.output / "metrics.jsonl").read_text().count("\n")
    assert steps == (2 if len(signals) == 1 else 1)
    assert stopped.run() == 0
    assert f"going on from step {2 if len(signals) == 1 else 0} of" in stopped.said
    assert stopped.left() == undisturbed(commands, "train-policy")


def test_sigterm_ends_other_commands_at_once_and_they_go_on(commands: Commands) -> None:
    whole = undisturbed(commands, "score")
    stopped = commands("score", "stopped")
    calls: list[int] = []
    scored = score._scored

    def prepare() -> None:
        def with_signal(*arguments: Any) -> Any:
            calls.append(0)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return scored(*arguments)

        score._scored = with_signal

    assert stopped.run(prepare) == -signal.SIGTERM
    assert not stopped.output.exists()
    partial = stopped.output.with_name("out.jsonl.partial")
    assert partial.read_bytes() == b"".join(whole["out.jsonl"].splitlines(keepends=True)[:4])
    assert stopped.run() == 0
    assert stopped.left() == whole


# ---- pipes, home, cache ----


def closed_pipes() -> None:
    """stdout and stderr are pipes that nobody reads."""
    for number in (1, 2):
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, number)
        os.close(writer)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["score", "train-policy"])
def test_closed_pipes_do_not_stop_the_work(commands: Commands, command: str) -> None:
    unheard = commands(command, "unheard")
    assert unheard.run(closed_pipes) == 0
    assert unheard.left() == undisturbed(commands, command)


def no_home() -> None:
    """As in a container whose user number has no entry in /etc/passwd."""
    for name in ("HOME", "XDG_CACHE_HOME", "POISE_CACHE"):
        os.environ.pop(name, None)

    def unknown(number: int) -> None:
        raise KeyError(number)

    pwd.getpwuid = unknown  # type: ignore[assignment]


@pytest.mark.slow
def test_without_a_home_the_cache_is_asked_for_and_nothing_else(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert commands("score", "a").run(no_home) == 0  # it needs no cache
    training = commands("train-reward", "b")
    assert training.run(no_home) == 2
    assert training.said.splitlines()[-1] == (
        "poise: this user has no home folder to keep a cache in; set POISE_CACHE to a folder for it"
    )
    assert not (tmp_path / "~").exists()


def without_rights() -> None:
    """Give up root's right to write everywhere; other users have none."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # of linux/capability.h: version 3, this process
        sets = (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None)
        assert libc.capget(header, sets) == 0
        for i in range(3):  # effective, permitted, inheritable: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
            sets[i] &= ~0b110
        assert libc.capset(header, sets) == 0


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")


@pytest.mark.slow
@linux_only
def test_a_cache_that_cannot_be_written_costs_time_only(commands: Commands) -> None:
    uncached = commands("train-reward", "uncached")
    cache = uncached.folder / "cache"
    cache.mkdir(parents=True)
    cache.chmod(0o555)
    assert uncached.run(without_rights) == 0
    said = "80 rows are not kept, the folder cannot be written (Permission denied)"
    assert f"feature cache: {said}" in " ".join(uncached.said.split())
    cache.chmod(0o755)
    assert uncached.left() == undisturbed(commands, "train-reward")


# ---- folders and disks ----


@linux_only
@pytest.mark.parametrize("command", ["train-reward", "train-policy", "score", "export", "ensemble"])
def test_a_read_only_folder_is_one_line(commands: Commands, command: str) -> None:
    made = commands(command, "locked")
    made.folder.mkdir(parents=True)
    made.folder.chmod(0o555)
    try:
        assert made.run(without_rights) == 2
        last = made.said.splitlines()[-1]
        assert last.startswith("poise: ")
        assert "cannot be made: nothing may be written into" in last
        assert str(made.folder) in last
        assert list(made.folder.iterdir()) == []
    finally:
        made.folder.chmod(0o755)


def deleted_in(place: Any, name: str, folder: Path, at: int = 1) -> Prepare:
    """The output folder is deleted before call number `at` of a function."""

    def prepare() -> None:
        function, calls = getattr(place, name), list[int]()

        def deleting(*arguments: Any, **options: Any) -> Any:
            calls.append(0)
            if len(calls) == at:
                shutil.rmtree(folder)
            return function(*arguments, **options)

        setattr(place, name, deleting)

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "place", "name", "at"),
    [
        ("train-reward", head_training, "train_heads", 1),
        ("train-reward", train_reward, "_save", 1),
        ("train-reward", train_reward, "save_reward_model", 3),
        ("train-policy", loop.PolicyReward, "combine", 2),
        ("train-policy", loop.Learner, "save", 2),
        ("train-policy", loop.Policy, "save", 1),
    ],
)
def test_a_deleted_output_ends_the_run_in_one_line(
    commands: Commands, command: str, place: Any, name: str, at: int
) -> None:
    deleted = commands(command, "deleted")
    assert deleted.run(deleted_in(place, name, deleted.output, at)) == 2
    assert deleted.said.splitlines()[-1].startswith("poise: ")
    assert str(deleted.output) in deleted.said.splitlines()[-1]
    assert not (deleted.output / "results.json").exists()


def full_disk() -> None:
    """A limit on the size of files stands in for a full disk: writing fails half-way through a file of weights."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train-reward", "export", "score"])
def test_a_full_disk_leaves_no_part_of_a_file(commands: Commands, command: str) -> None:
    whole = undisturbed(commands, command)
    full = commands(command, "full")
    assert full.run(full_disk) == 2
    assert full.said.splitlines()[-1].startswith("poise: ")
    assert "Traceback" not in full.said
    found = full.left()
    kept = {name: data for name, data in found.items() if not name.startswith("out.jsonl.partial")}
    assert all(whole[name] == data for name, data in kept.items() if name in whole)
    assert "out/results.json" not in kept
    assert full.run() == 0
    assert full.left() == whole


def test_the_names_of_what_is_patched_are_used() -> None:
    """Patches of names that nobody calls would test nothing."""
    assert train_reward.save_reward_model is reward_model.save_reward_model
    assert head_training.train_heads
