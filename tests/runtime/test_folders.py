"""Folders and files that are not ours to touch."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml

from poise.errors import PoiseError
from poise.runtime import folders
from poise.runtime import run_folder as runs
from poise.runtime.folders import inside, is_ours, own, write_folder_atomic
from poise.runtime.jobs import Job, run_job
from poise.runtime.run_folder import Run


@dataclass(frozen=True)
class Config:
    output: str = "x"
    size: int = 3


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- names from files ----


@pytest.mark.parametrize("name", ["../payload.sh", "/etc/passwd", "a/../../b", "", "..", "link/x", "a\0b", 3, None])
def test_a_name_from_a_file_never_leaves_its_folder(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(PoiseError, match="names a file outside itself"):
        inside(folder, name)


def test_a_name_within_the_folder_is_taken(tmp_path: Path) -> None:
    assert inside(tmp_path, "poise/x.safetensors") == tmp_path / "poise" / "x.safetensors"


# ---- whose a folder is ----


@pytest.mark.parametrize("theirs", ["single/notes.txt", "trainer/a", "stage2/trainer/a", "policy/b", "final.jsonl"])
def test_a_run_never_takes_a_folder_of_somebody_else(tmp_path: Path, theirs: str) -> None:
    folder = tmp_path / "mine"
    (folder / theirs).parent.mkdir(parents=True)
    (folder / theirs).write_text("mine")
    before = state(folder)
    with pytest.raises(PoiseError, match="holds files that no run of Poise wrote; choose another folder"):
        Run.open(folder, Config())
    assert state(folder) == before


def test_a_run_takes_an_empty_folder_its_own_and_one_of_an_older_version(tmp_path: Path) -> None:
    Run.open(tmp_path / "new", Config())
    Run.open(tmp_path / "new", Config())
    (tmp_path / "empty").mkdir()
    Run.open(tmp_path / "empty", Config())
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.yaml").write_text("size: 3\n")
    (old / "metrics.jsonl").write_text("{}\n")
    assert is_ours(old)
    Run.open(old, Config())
    (tmp_path / "file").write_text("")
    with pytest.raises(PoiseError, match="is a file"):
        Run.open(tmp_path / "file", Config())


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\0"])
def test_a_config_that_is_not_ours_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(PoiseError):
        Run.open(tmp_path, Config())


# ---- two at once ----

HOLD = """
import sys, time
from dataclasses import dataclass, field, replace
from poise.runtime.run_folder import Run
@dataclass
class Config:
    output: str = "x"
    size: int = 3
Run.open(sys.argv[1], Config())
print("open", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE)
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == b"open\n"
        before = state(folder)
        with pytest.raises(PoiseError, match="another process is writing"):
            Run.open(folder, Config())
        assert state(folder) == before
    finally:
        first.kill()
        first.communicate()
    assert Run.open(folder, Config()).results is None


def test_the_same_process_may_open_a_run_again_and_a_finished_one_is_free(tmp_path: Path) -> None:
    Run.open(tmp_path, Config())
    Run.open(tmp_path, Config()).finish({})
    assert tmp_path.resolve() not in folders._held


def test_other_processes_of_a_run_take_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    Run.open(tmp_path, Config())
    assert tmp_path.resolve() not in folders._held


def test_a_folder_that_was_deleted_and_made_again_is_locked_anew(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    own(folder)
    folders.lock(folder)
    folders.refuse_deleted(folder)
    shutil.rmtree(folder)
    with pytest.raises(PoiseError, match="run was deleted while the run wrote in it; start again"):
        folders.refuse_deleted(folder)
    own(folder)
    folders.lock(folder)
    folders.refuse_deleted(folder)
    assert os.fstat(folders._held[folder.resolve()]).st_ino == (folder / folders.MARK).stat().st_ino
    folders.unlock(folder)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_on_a_file_system_without_locks_nothing_is_checked(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(_file: int, _how: int) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(folders.fcntl, "flock", flock)
    assert Run.open(tmp_path, Config()).results is None
    assert tmp_path.resolve() not in folders._held


def test_a_folder_deleted_while_it_is_opened_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(folders.fcntl, "flock", lambda _file, _how: shutil.rmtree(folder))
    with pytest.raises(PoiseError, match="run was deleted while it was opened; start again"):
        Run.open(folder, Config())
    assert folder.resolve() not in folders._held


# ---- other inputs ----


def test_a_run_does_not_go_on_with_other_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, model = tmp_path / "prompts.jsonl", tmp_path / "model"
    prompts.write_text("one")
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "notes.md").write_text("of no matter")

    def inputs() -> runs.Inputs:
        return {"--prompts": [prompts], "--model": [model]}

    Run.open(tmp_path / "run", Config(), inputs)
    (tmp_path / "run" / "checkpoint.safetensors").touch()
    kept = (tmp_path / "run" / "inputs.json").read_text()
    assert str(tmp_path) not in kept
    assert set(json.loads(kept)) == {"--prompts", "--model"}
    (model / "notes.md").write_text("changed")
    os.utime(prompts)  # copied or touched: other times, the same content
    Run.open(tmp_path / "run", Config(), inputs)
    (model / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(PoiseError, match=r"begun with other inputs: --model changed since"):
        Run.open(tmp_path / "run", Config(), inputs)
    (model / "model.safetensors").write_bytes(b"weights")
    prompts.write_text("two")
    with pytest.raises(PoiseError, match=r"other inputs: --prompts changed"):
        Run.open(tmp_path / "run", Config(), inputs)
    assert not capsys.readouterr().err


def test_a_damaged_record_of_an_input_is_no_record_of_it(tmp_path: Path) -> None:
    """It is as if the input had changed: nothing says that it is the same."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("one")
    Run.open(tmp_path / "run", Config(), lambda: {"--prompts": [prompts]})
    (tmp_path / "run" / "checkpoint.safetensors").touch()
    (tmp_path / "run" / "inputs.json").write_text('{"--prompts": 3}')
    with pytest.raises(PoiseError, match=r"begun with other inputs: --prompts changed since"):
        Run.open(tmp_path / "run", Config(), lambda: {"--prompts": [prompts]})


def test_an_older_run_goes_on_and_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("one")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("size: 3\n")
    (tmp_path / "run" / "checkpoint.safetensors").touch()
    for said in (1, 0):
        Run.open(tmp_path / "run", Config(), lambda: {"--prompts": [prompts]})
        assert capsys.readouterr().err.count("kept no digests") == said


def test_a_finished_run_does_not_need_its_inputs(tmp_path: Path) -> None:
    def gone() -> runs.Inputs:
        raise AssertionError

    Run.open(tmp_path, Config()).finish({})
    Run.open(tmp_path, Config(), gone)


@dataclass
class Reads:
    """Settings that name files."""

    prompts: str = ""
    rewards: list[str] = field(default_factory=list)
    size: int = 3
    output: str = ""

    def inputs(self) -> runs.Inputs:
        return {
            "--prompts": [Path(self.prompts)],
            **{f"--rewards {number}": [Path(name)] for number, name in enumerate(self.rewards, 1)},
        }


def begun(tmp_path: Path) -> tuple[Path, Reads]:
    """A run that has made a checkpoint, and its settings, with two folders in which the same files lie."""
    for place in ("here", "there"):
        for name, text in (("prompts", "one"), ("first", "a"), ("second", "b")):
            (tmp_path / place).mkdir(exist_ok=True)
            (tmp_path / place / name).write_text(text)
    config = Reads(f"{tmp_path}/here/prompts", [f"{tmp_path}/here/first", f"{tmp_path}/here/second"])
    Run.open(tmp_path / "run", config, config.inputs)
    (tmp_path / "run" / "checkpoint.safetensors").touch()
    return tmp_path / "run", config


def test_what_an_input_holds_counts_and_not_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = begun(tmp_path)
    monkeypatch.chdir(tmp_path / "there")
    other = replace(config, prompts="prompts", rewards=["./first", "../there/second"])
    Run.open(folder, other, other.inputs)
    assert yaml.safe_load((folder / "config.yaml").read_text())["prompts"] == "prompts"
    for moved, why in (
        ({"rewards": ["second", "first"]}, "differs in rewards"),
        ({"rewards": ["first"]}, "differs in rewards"),
        ({"prompts": "first"}, "differs in prompts"),
        ({"prompts": "nowhere"}, "differs in prompts"),
        ({"prompts": f"{tmp_path}/here/prompts", "size": 4}, r"\(differs in size\)"),
    ):
        wrong = replace(other, **moved)
        with pytest.raises(PoiseError, match=why):
            Run.open(folder, wrong, wrong.inputs)
    (folder / "inputs.json").unlink()  # of an earlier version: nothing says what the files held
    with pytest.raises(PoiseError, match="differs in prompts, rewards"):
        Run.open(folder, config, config.inputs)


def test_a_finished_run_is_that_of_its_inputs_wherever_they_lie(tmp_path: Path) -> None:
    folder, config = begun(tmp_path)
    Run(folder).finish({"accuracy": 1.0})
    other = replace(config, prompts=f"{tmp_path}/there/prompts")
    Run(folder).check_config(other)  # without the inputs nobody can tell
    assert Run(folder).differs(other) == ["prompts"]
    assert Run.open(folder, other, other.inputs).results == {"accuracy": 1.0}
    assert not Run(folder).differs_beside_inputs(other)
    with pytest.raises(PoiseError, match="differs in prompts, size"):
        Run.open(folder, wrong := replace(other, prompts="x", size=2), wrong.inputs)


def test_a_finished_run_whose_inputs_were_edited_is_not_shown_as_theirs(tmp_path: Path) -> None:
    folder, config = begun(tmp_path)
    Run(folder).finish({})
    os.utime(config.prompts)
    Run(folder).refuse_edited(config.inputs)
    Path(config.rewards[1]).write_text("new")
    with pytest.raises(PoiseError, match=r"is finished, and of its inputs --rewards 2 changed since"):
        Run(folder).refuse_edited(config.inputs)
    Path(config.rewards[1]).unlink()  # gone: nothing to be mistaken for
    Run(folder).refuse_edited(config.inputs)

    def gone() -> runs.Inputs:
        raise PoiseError("a model")

    Run(folder).refuse_edited(gone)


# ---- rights, leftovers, names of this machine ----


@pytest.mark.parametrize("mask", [0o077, 0o022])
def test_folders_and_files_keep_to_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with write_folder_atomic(tmp_path / "new" / "model") as scratch:
            (scratch / "weights").touch(mode=0o600)  # as safetensors does
        assert stat.S_IMODE((tmp_path / "new" / "model").stat().st_mode) == 0o777 & ~mask
        assert stat.S_IMODE((tmp_path / "new" / "model" / "weights").stat().st_mode) == 0o666 & ~mask
    finally:
        os.umask(before)


def dead() -> int:
    """Number of a process that has ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_leftovers_of_killed_processes_are_cleared_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    gone = dead()
    for number in (gone, os.getppid()):
        monkeypatch.setattr(folders.os, "getpid", lambda number=number: number)
        folders.partial_name(path).mkdir()
    monkeypatch.undo()
    (tmp_path / ".model.backup").mkdir()  # the user's
    with write_folder_atomic(path) as scratch:
        (scratch / "a").touch()
    left = {found.name for found in tmp_path.iterdir()}
    assert {"model", ".model.backup"} <= left
    assert [name for name in left if name.endswith(str(os.getppid()))]
    assert not [name for name in left if name.endswith(str(gone))]


def test_a_file_that_a_killed_process_was_writing_is_cleared(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    left = path.with_name(f"{folders._leftover_prefix(path.name)}{dead()}")
    left.write_text("half")
    with folders.write_file_atomic(path) as partial:
        assert not left.exists()
        partial.write_text("whole")
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("results.json", "whole")]


def test_a_folder_that_was_moved_aside_by_a_killed_process_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with write_folder_atomic(path) as scratch:
        (scratch / "a").write_text("old")
    path.rename(path.with_name(f"{folders._leftover_prefix('model')}{dead()}.old"))
    folders.clear_leftovers(path)
    assert (path / "a").read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["model"]


def test_the_record_of_a_command_has_no_paths_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["score", "/home/me/rm", "--output=~/secret/x.jsonl", "runs/a/b", "user/name", "./c", "0.5/1"]
    monkeypatch.setattr(sys, "argv", ["/usr/lib/poise/cli/__main__.py", *arguments])
    expected = ["poise", "score", "rm", "--output=x.jsonl", "runs/a/b", "user/name", "./c", "0.5/1"]
    assert runs.environment()["command"] == expected


# ---- jobs ----


def test_a_job_does_not_take_or_mark_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "final.jsonl").write_text("mine")
    assert "no run of Poise wrote" in run_job(Job("toy", Config(str(tmp_path))))
    assert state(tmp_path) == {"final.jsonl": b"mine"}


PARENT = """
import subprocess, sys
from poise.runtime.jobs import _ends_with_parent
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], preexec_fn=_ends_with_parent)
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux's")
def test_a_killed_parent_takes_its_jobs_with_it() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    for _ in range(100):
        try:
            ended = Path(f"/proc/{child}/stat").read_text().split(") ")[1].startswith("Z")
        except FileNotFoundError:
            ended = True
        if ended:
            break
        time.sleep(0.05)
    assert ended


def test_own_marks_a_folder(tmp_path: Path) -> None:
    own(tmp_path / "a")
    (tmp_path / "a" / "preferences.jsonl").touch()
    own(tmp_path / "a")
    assert is_ours(tmp_path / "a")


# ---- what is no file ----


def test_devices_and_streams_are_never_replaced(tmp_path: Path) -> None:
    # Only asked about, never written to: a version that forgot the question would replace them.
    for name in ("/dev/null", "/dev/full", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/sys/x"):
        with pytest.raises(PoiseError, match="is no place for a file or folder"):
            folders.refuse_device(Path(name))
    for name in (tmp_path / "new" / "x", tmp_path, Path("x"), Path("/dev/shm/x")):
        folders.refuse_device(name)
    with pytest.raises(PoiseError, match="cannot be the name of a file"):
        folders.refuse_device(Path("a\0b"))


def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(os, "access", lambda path, how: Path(path) != tmp_path or how != os.W_OK)
    with pytest.raises(PoiseError, match="new/run cannot be made: nothing may be written into"):
        folders.refuse_device(tmp_path / "new" / "run")
    folders.refuse_device(tmp_path / "there")  # as a finished run that is only shown
    folders.refuse_device(tmp_path / "there" / "new")


def test_whatever_is_written_whole_leaves_a_fifo_alone(tmp_path: Path) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    for path in (fifo, link):
        for write in (folders.write_file_atomic, write_folder_atomic):
            with pytest.raises(PoiseError, match="is no place"), write(path):
                pytest.fail("a FIFO is replaced")
        with pytest.raises(PoiseError, match="is no place"):
            runs.write_atomic(path, "x")
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert link.is_symlink()
    assert len(list(tmp_path.iterdir())) == 2
