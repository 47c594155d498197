"""A command that is killed at any boundary of its writing ends, when it is run again, as an undisturbed one."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from forked import status_of
from poise.cli import main as cli
from poise.models.loading import load_policy
from poise.models.policy import Policy
from poise.reward import export, heads, push
from poise.runtime import checkpoints

pytestmark = pytest.mark.usefixtures("undrawn")
KILLED = 9
# What differs between two equal runs: times and machine.
NOT_COMPARED = {"environment.json", "inputs.json", ".poise", "report.html"}  # the page says how long steps took


@contextlib.contextmanager
def boundaries(at: int, seen: list[str]) -> Iterator[None]:
    """Around each rename, flush, removal, copy and file of weights: the process ends at call number `at` (from 0)."""

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            for moment in ("before", "after"):
                if moment == "after":
                    result = function(*arguments, **options)
                if len(seen) == at:
                    os._exit(KILLED)  # no handler runs, as with kill -9
                seen.append(f"{moment} {name}")
            return result

        return call

    places: list[tuple[Any, str]] = [
        (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "mkdir"), (shutil, "copyfile"), (shutil, "rmtree"),
        *((module, "save_file") for module in (safetensors.torch, export, heads, checkpoints)
          if hasattr(module, "save_file")),
    ]  # fmt: skip
    before = [getattr(place, name) for place, name in places]
    try:
        for place, name in places:
            setattr(place, name, wrapped(name, getattr(place, name)))
        yield
    finally:
        for (place, name), function in zip(places, before, strict=True):
            setattr(place, name, function)


def contents(folder: Path) -> dict[str, Any]:
    """Every file by its path in the folder; rows without the seconds that they took, and without the folder's name."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in NOT_COMPARED:
            data = path.read_bytes().replace(str(folder).encode(), b"HERE")
            if path.name in ("metrics.jsonl", "results.json"):
                found[str(path.relative_to(folder))] = [_timeless(json.loads(row)) for row in _rows(path, data)]
            else:
                found[str(path.relative_to(folder))] = data
    return found


def _rows(path: Path, data: bytes) -> list[bytes]:
    return data.splitlines() if path.suffix == ".jsonl" else [data]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if "seconds" not in key}
    return value


@pytest.fixture(scope="module")
def reward(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> Path:
    return train_tiny_reward(tiny_model)


@pytest.fixture(scope="module")
def policy(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "policy"
    torch.manual_seed(0)
    Policy(*load_policy(tiny_model), adapted_layers=1, rank=2).save(str(folder))
    return folder


# Boundaries at which each command is killed, at least; docs/robustness.md counts them. All, but of the long ones.
LEAST = {
    "export": 11, "merge": 11, "ensemble": 7, "score": 13, "score as parquet": 13, "train-reward": 8,
    "train-reward with a validator": 16, "train-policy": 6, "export again": 27,
}  # fmt: skip
SOME_ONLY = ("train-reward", "train-reward with a validator", "train-policy", "score as parquet")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "points"), [(name, least if name in SOME_ONLY else 60) for name, least in LEAST.items()],
)  # fmt: skip
def test_a_command_killed_at_every_boundary_ends_as_an_undisturbed_one(
    command: str, points: int, reward: Path, policy: Path, tiny_model: str, preferences_file: Path,
    prompts_file: Path, tmp_path: Path,
) -> None:  # fmt: skip
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")

    def start(base: Path, at: int = -1, counted: Path | None = None) -> int:
        output = str(base / {"score": "out.jsonl", "score as parquet": "out.parquet"}.get(command, "out"))
        (base / "cache").mkdir(exist_ok=True)
        rest = {
            "export": [f"{reward}/brme", "--scalar", "mean"],
            "export again": [f"{reward}/brme", "--scalar", "head", "--head", "1"],
            "merge": [str(policy)],
            "ensemble": [f"{reward}/single", f"{reward}/ensemble", "--reference", str(preferences_file)],
            "score": [f"{reward}/brme", str(samples)],
            "score as parquet": [f"{reward}/brme", str(samples)],
            "train-reward": [
                "--preferences", str(preferences_file), "--model", tiny_model, "--num-layers", "1",
                "--trunk", "frozen", "--head-steps", "5", "--posterior-heads", "2", "--num-heads", "2",
            ],
            "train-reward with a validator": [
                "--preferences", str(preferences_file), "--model", tiny_model, "--num-layers", "1",
                "--validator-share", "0.4", "--save-steps", "1", "--lora-rank", "2", "--epochs", "2",
                "--head-steps", "5", "--posterior-heads", "2", "--num-heads", "2",
            ],
            "train-policy": [
                "--prompts", str(prompts_file), "--model", tiny_model, "--reward", f"{reward}/brme",
                "--prompts-per-step", "2", "--completions-per-prompt", "2", "--max-tokens", "3", "--num-steps", "2",
                "--save-every", "1", "--adapted-layers", "1", "--lora-rank", "2", "--baseline-completions", "4",
                "--eval-completions", "1",
            ],
        }[command]  # fmt: skip

        def work() -> int:
            os.environ["POISE_CACHE"] = str(base / "cache")
            seen: list[str] = []
            with boundaries(at, seen):
                status = cli.main([command.split()[0], *rest, "--output", output])
            if counted:
                counted.write_text("\n".join(seen))
            return status

        return status_of(work)

    if command == "export again":  # something is there that is to be replaced
        assert cli.main(["export", f"{reward}/brme", "--scalar", "mean", "--output", str(tmp_path / "first")]) == 0

    def prepared(name: str) -> Path:
        base = tmp_path / name / "base"
        base.mkdir(parents=True)
        if command == "export again":
            shutil.copytree(tmp_path / "first", base / "out")
        return base

    calm = prepared("calm")
    assert start(calm, counted=tmp_path / "counted") == 0
    shutil.rmtree(calm / "cache")
    expected, total = contents(calm), len((tmp_path / "counted").read_text().splitlines())
    assert expected
    assert total > 2
    numbers = sorted({total * i // min(points, total) for i in range(min(points, total))})
    assert len(numbers) >= LEAST[command]
    for number in numbers:
        base = prepared(str(number))
        assert start(base, number) == KILLED, number
        # `merge` replaces no folder: one that the killed process had just finished is whole, and is refused.
        finished = command == "merge" and contents(base / "out") == contents(calm / "out")
        assert start(base) == (2 if finished else 0), number
        shutil.rmtree(base / "cache")
        assert contents(base) == expected, number
        shutil.rmtree(base)


def test_an_upload_that_is_killed_changes_nothing_here(
    reward: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at = {"moment": ""}

    class Hub:
        def create_repo(self, *_: object, **__: object) -> str:
            if kill_at["moment"] == "create":
                os._exit(KILLED)
            return "hub"

        def upload_folder(self, **_: object) -> None:
            os._exit(KILLED)

    folder = tmp_path / "rm"
    shutil.copytree(reward / "brme", folder)
    before = contents(folder)
    monkeypatch.setattr(push, "HfApi", Hub)
    monkeypatch.setattr(push, "get_token", lambda: "x")
    for moment in ("create", "upload"):
        kill_at["moment"] = moment
        assert status_of(lambda: cli.main(["push", str(folder), "--repo", "a/b"])) == KILLED
        assert contents(folder) == before
