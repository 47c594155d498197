"""Trouble of the commands that train nothing: data, completion, init, choose, inspect, chat, watch, serve.

docs/robustness.md has a row for each. Commands run in forks of this process."""

import contextlib
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import forked
from poise.cli import main as cli
from poise.runtime.run_folder import append_jsonl, write_jsonl
from poise.studies import choose
from test_trouble import closed_pipes, full_disk, linux_only, no_home, without_rights

Prepare = Callable[[], object]


@pytest.fixture(scope="module")
def reward(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> str:
    return str(train_tiny_reward(tiny_model))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}\n')
    return path


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    path = tmp_path / "ladder.jsonl"
    write_jsonl(path, [{"prompt": "Tea?", "completion": f"{kl} {n}", "kl": kl} for kl in (0, 5) for n in range(40)])
    return path


def run(folder: Path, *arguments: str, prepare: Prepare = lambda: None, stdin: str = "") -> tuple[int, str]:
    """(exit status, what is said on stderr) of a command in a fork that reads `stdin`."""
    (folder / "stdin").write_text(stdin)

    def work() -> int:
        os.dup2(os.open(folder / "stdin", os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0, closefd=False)
        prepare()
        return cli.main([*arguments])

    status = forked.started(work, stderr=folder / "stderr").ended()
    return status, (folder / "stderr").read_text()


def unread_stdout() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.close(writer)
    sys.stdout = os.fdopen(1, "w", closefd=False)


def one_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith("poise: ")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]


@pytest.mark.parametrize("command", ["data", "completion", "inspect", "chat"])
def test_nobody_reads_what_is_printed(command: str, reward: str, tiny_model: str, rows: Path, tmp_path: Path) -> None:
    arguments = {"data": [str(rows)], "completion": [], "inspect": [reward], "chat": [tiny_model, "--max-tokens", "2"]}
    status, said = run(tmp_path, command, *arguments[command], prepare=unread_stdout, stdin="Tea?\nYes.\nNo.\n")
    assert status == 2
    assert "what read this output has ended" in one_line(said)


@pytest.mark.parametrize("command", ["data", "completion", "init", "choose", "inspect"])
def test_no_home_is_needed(command: str, reward: str, rows: Path, ladder: Path, tmp_path: Path) -> None:
    arguments = {
        "data": [str(rows)], "completion": [], "init": ["train-reward", "--output", str(tmp_path / "out.yaml")],
        "choose": [str(ladder), "--output", str(tmp_path / "out")], "inspect": [reward],
    }  # fmt: skip
    status, said = run(tmp_path, command, *arguments[command], prepare=no_home, stdin="Tea?\nYes.\n")
    assert status == 0, said


@linux_only
@pytest.mark.parametrize("trouble", ["read-only", "full"])
@pytest.mark.parametrize("command", ["init", "choose"])
def test_what_cannot_be_written_is_one_line_and_goes_on(
    command: str, trouble: str, ladder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    arguments = {
        "init": ["train-policy", "--output", str(folder / "out.yaml")],
        "choose": [str(ladder), "--output", str(folder / "out")],
    }[command]
    if trouble == "read-only":
        folder.chmod(0o555)
    status, said = run(tmp_path, command, *arguments, prepare=without_rights if trouble == "read-only" else full_disk)
    folder.chmod(0o755)
    assert status == 2, said
    assert str(folder) in one_line(said) or "File too large" in one_line(said)
    assert not [path for path in folder.rglob("*") if path.is_file() and path.name != ".poise" and path.stat().st_size]
    status, said = run(tmp_path, command, *arguments)
    assert status == 0, said


def test_comparisons_that_were_half_prepared_are_prepared_again(
    ladder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert run(tmp_path, "choose", str(ladder), "--output", str(calm))[0] == 0
    write = choose.write_json
    monkeypatch.setattr(choose, "write_json", lambda *_: os._exit(9))
    assert run(tmp_path, "choose", str(ladder), "--output", str(killed))[0] == 9
    monkeypatch.setattr(choose, "write_json", write)
    assert not (killed / "key.json").exists()
    assert run(tmp_path, "choose", str(ladder), "--output", str(killed))[0] == 0
    for name in ("ladder.jsonl", "comparisons.jsonl", "key.json"):
        assert (killed / name).read_bytes() == (calm / name).read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "comparisons.jsonl").write_text("mine")
    status, said = run(tmp_path, "choose", str(ladder), "--output", str(tmp_path / "mine"))
    assert (status, (tmp_path / "mine" / "comparisons.jsonl").read_text()) == (2, "mine")
    assert "holds files that no run of Poise wrote" in one_line(said)


@pytest.mark.parametrize("command", ["inspect", "chat"])
def test_nothing_to_read_and_a_deleted_model_are_one_line(command: str, tmp_path: Path, reward: str) -> None:
    status, said = run(tmp_path, command, str(tmp_path / "gone"))
    assert status == 2
    assert str(tmp_path / "gone") in one_line(said)
    if command == "inspect":
        status, said = run(tmp_path, command, reward)
        assert (status, "nothing to score" in one_line(said)) == (2, True)


# ---- servers ----


def answers(port: int, path: str) -> bool:
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).status == 200
    return False


@contextlib.contextmanager
def serving(folder: Path, path: str, *arguments: str, prepare: Prepare = lambda: None) -> Iterator[forked.Forked]:
    """A server in a fork, once it answers at `path`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work() -> int:
        prepare()
        return cli.main([*arguments, "--port", str(port)])

    process = forked.started(work, stderr=folder / "stderr")
    until = time.monotonic() + 120
    while not answers(port, path):
        assert process.status() is None, (folder / "stderr").read_text()
        assert time.monotonic() < until
        time.sleep(0.02)
    yield process
    assert not answers(port, path)


def no_pipes_no_home() -> None:
    no_home()
    closed_pipes()


@pytest.mark.parametrize(
    ("prepare", "signals"),
    [(no_pipes_no_home, [signal.SIGTERM]), (lambda: None, [signal.SIGINT, signal.SIGINT])],
    ids=["SIGTERM, nobody reads, no home", "SIGINT twice"],
)
def test_a_reward_server_ends_well(prepare: Prepare, signals: list[int], reward: str, tmp_path: Path) -> None:
    with serving(tmp_path, "/healthz", "serve", reward, prepare=prepare) as process:
        for one in signals:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, one)
        assert process.ended() == 0
    assert "Traceback" not in (tmp_path / "stderr").read_text()


@linux_only
@pytest.mark.parametrize("option", ["--scale", "--log"])
def test_a_server_says_at_once_what_it_cannot_write(option: str, reward: str, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    arguments = ["serve", reward, option, str(folder / "file"), "--port", "0"]
    status, said = run(tmp_path, *arguments, prepare=without_rights)
    folder.chmod(0o755)
    assert status == 2
    assert str(folder) in one_line(said)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)])
def test_watching_ends_and_the_run_is_untouched(number: int, expected: int, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    folder.mkdir()
    settings = {"prompts": "p", "reward": "r", "objective": "mean", "kl_coef": 0.01, "num_steps": 9, "max_tokens": 5}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    append_jsonl(folder / "metrics.jsonl", [{"step": 0, "reward": 0.5, "kl": 1.0, "ended": 1.0}])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with serving(tmp_path, "/", "watch", str(folder), prepare=no_pipes_no_home) as process:
        os.kill(process.pid, number)
        assert process.ended() == expected
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
