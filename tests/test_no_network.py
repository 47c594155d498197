"""Commands that are given local folders ask no network, also where the hub client is not told to be offline."""

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import transformers.utils.hub

from poise.cli import main as cli

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was to be connected to or looked up; each try fails as it does without a network."""
    found: list[str] = []

    def refuse(*where: Any, **_: Any) -> None:
        found.append(repr(where))
        raise OSError(101, "Network is unreachable")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return found


def test_the_fixture_sees_a_look_up(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client waits between its tries
    with pytest.raises(Exception):  # noqa: B017, PT011  whatever the client makes of it
        transformers.utils.hub.cached_file("nobody/nothing", "config.json", cache_dir=tmp_path)
    assert asked


@pytest.mark.slow
def test_local_folders_need_no_network(
    tiny_model: str, train_tiny_reward: Callable[[str], Path], preferences_file: Path, prompts_file: Path,
    asked: list[str], tmp_path: Path,
) -> None:  # fmt: skip
    reward, policy = str(tmp_path / "reward"), str(tmp_path / "policy")
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    small = ["--prompts-per-step", "2", "--completions-per-prompt", "2", "--max-tokens", "4", "--num-steps", "1"]
    small += ["--adapted-layers", "1", "--lora-rank", "2", "--baseline-completions", "4", "--eval-completions", "1"]
    frozen = str(train_tiny_reward(tiny_model))
    for command in (
        ["train-reward", "--preferences", str(preferences_file), "--model", tiny_model, "--num-layers", "2",
         "--trunk", "lora", "--head-steps", "20", "--posterior-heads", "4", "--output", reward],
        ["score", f"{reward}/brme", str(samples)],
        ["train-policy", "--prompts", str(prompts_file), "--model", tiny_model, "--reward", f"{frozen}/brme", *small,
         "--output", policy],
        ["export", f"{reward}/brme", "--scalar", "mean", "--output", str(tmp_path / "export")],
        ["export", f"{reward}/brme", "--adapter", "--output", str(tmp_path / "adapter")],
        ["merge", policy, "--output", str(tmp_path / "merged")],
        ["ensemble", f"{reward}/brme", f"{frozen}/brme", "--reference", str(preferences_file),
         "--output", str(tmp_path / "ensemble")],
    ):  # fmt: skip
        assert cli.main(command) == 0
        assert asked == [], command[0]
