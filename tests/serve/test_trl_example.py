"""The example in two terminals: a server, and GRPO by TRL that asks it."""

import json
import os
import re
import runpy
import signal
import socket
import sys
from pathlib import Path

import pytest

import forked
from poise.cli.main import main
from poise.serve.client import Client

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_grpo_served.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_grpo_trains_on_the_reward_of_another_process(
    brme: str, tiny_model: str, prompts_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    log = tmp_path / "rewards.jsonl"
    server = forked.started(lambda: main(["serve", brme, "--port", port, "--log", str(log)]))
    monkeypatch.setenv("POISE_URL", f"http://127.0.0.1:{port}")
    Client(patience=100.0).score("Hi.", ["Good."])  # it is there
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), tiny_model, str(prompts_file), str(tmp_path / "grpo"), "2"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    os.kill(server.pid, signal.SIGTERM)
    assert server.ended() == 0
    served = [json.loads(line)["reward"] for line in log.read_text().splitlines()][1:]
    assert len(served) == 2 * 8
    said = re.findall(r"step (\d): reward (\S+), gap", capsys.readouterr().out)
    assert [step for step, _ in said] == ["1", "2"]
    for i, (_, reward) in enumerate(said):
        assert float(reward) == pytest.approx(sum(served[8 * i : 8 * i + 8]) / 8, abs=6e-4)
    assert (tmp_path / "grpo" / "model.safetensors").is_file()
