"""A whole foreign loop: SkyRL's Tinker server (JAX, CPU) samples and trains at tinker's client's word, Poise scores."""

import importlib
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from documented_commands import documented
from engines_kit import ROOT, Wire

pytestmark = [
    pytest.mark.skipif(sys.version_info < (3, 12), reason="skyrl 0.4.0 needs Python 3.12"),
    pytest.mark.timeout(1800),  # the first step compiles
]
PROMPTS = ["Review the film.", "Review the phone."]
GROUP, TOKENS = 8, 16


@contextmanager
def tinker_server(model: str, folder: Path) -> Iterator[str]:
    """The url of a Tinker server of a model: uv starts its process, and that one the engine's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        "uv", "run", "--no-project", "-m", "skyrl.tinker.api", "--host", "127.0.0.1", "--port", str(port),
        "--backend", "jax", "--base-model", model,
        "--backend-config", json.dumps({"max_lora_adapters": 4, "max_lora_rank": 8}),
        "--database-url", f"sqlite:///{folder}/tinker.db", "--checkpoints-base", str(folder / "checkpoints"),
    ]  # fmt: skip
    environment = {
        **os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "UV_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    }  # fmt: skip
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=file, stderr=file, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    while True:
        try:
            with urllib.request.urlopen(url + "/api/v1/healthz"):
                break
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
    yield url
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def engine(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tinker_server(tiny_model, tmp_path_factory.mktemp("tinker")) as url:
        yield url


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    return importlib.import_module("tinker_ppo")


def lora_of(model: str, url: str) -> Any:
    import tinker

    return tinker.ServiceClient(base_url=url, api_key="tml-none").create_lora_training_client(model, rank=8, seed=1)


@pytest.fixture
def policy(engine: str, tiny_model: str) -> Any:
    return lora_of(tiny_model, engine)


def tokenizer_of(model: str) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(model)


@pytest.fixture
def tokenizer(tiny_model: str) -> Any:
    return tokenizer_of(tiny_model)


def check_three_steps(loop: Any, policy: Any, tokenizer: Any, model: str, brme: str, wire: Wire, rate: float) -> None:
    """Rewards are the scorer's, and weights move; what was measured goes into the result, under the model's name."""
    from poise.data.types import Sample
    from poise.functional.objectives import tradeoff
    from poise.models.scorer import Scorer

    steps = list(loop.train(policy, tokenizer, PROMPTS, 3, group=GROUP, max_tokens=TOKENS, learning_rate=rate))
    texts = [text for step in steps for text in step.texts]
    rewards = [reward for step in steps for reward in step.rewards]
    assert len(texts) == len(rewards) == 3 * len(PROMPTS) * GROUP == GROUP * len(wire.calls)
    expected = tradeoff(Scorer.load(brme)([Sample(*text) for text in texts]), 0.4).tolist()
    difference = max(abs(one - other) for one, other in zip(rewards, expected, strict=True))
    assert difference < 1e-5
    assert max(expected) - min(expected) > 0.01  # equal rewards would show nothing
    assert all(math.isfinite(value) for step in steps for value in step.metrics.values())
    assert all(step.metrics["skyrl.ai/grad_norm"] > 0 for step in steps)
    # The seed of a step is its number: the same weights would sample the same.
    (again,) = loop.train(policy, tokenizer, PROMPTS, 1, group=GROUP, max_tokens=TOKENS, learning_rate=0.0)
    assert again.texts != steps[0].texts
    if path := os.environ.get("ENGINE_RESULT"):
        versions = {name: metadata.version(name) for name in ("skyrl", "tinker", "jax", "flax", "transformers")}
        content = {
            "engine": "skyrl's Tinker server, JAX", "date": time.strftime("%Y-%m-%d"), "versions": versions,
            "python": ".".join(map(str, sys.version_info[:3])), "steps": len(steps), "prompts": len(PROMPTS),
            "completions of a prompt": GROUP, "tokens of a completion": TOKENS, "largest_difference": difference,
            "seconds of each step": [round(step.seconds, 1) for step in steps],
            "metrics": [step.metrics for step in steps],
        }  # fmt: skip
        results = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        Path(path).write_text(json.dumps(results | {model: content}, indent=1) + "\n")


def test_three_steps_have_the_scorers_rewards(loop: Any, policy: Any, tokenizer: Any, brme: str, wire: Wire) -> None:
    check_three_steps(loop, policy, tokenizer, "tiny model", brme, wire, rate=0.01)


def test_three_steps_of_the_default_model(loop: Any, brme: str, wire: Wire, tmp_path: Path) -> None:
    from poise.models.loading import DEFAULT_MODEL, resolve_model

    model = resolve_model(DEFAULT_MODEL)
    with tinker_server(model, tmp_path) as url:
        check_three_steps(loop, lora_of(model, url), tokenizer_of(model), DEFAULT_MODEL, brme, wire, rate=1e-4)


def test_steps_raise_a_known_reward(loop: Any, policy: Any, tokenizer: Any) -> None:
    """Of plain characters: twelve steps must raise their share by more than five standard errors of its first mean."""

    def plain(_: str, completions: list[str]) -> list[float]:
        return [sum(map(str.isascii, text)) / max(len(text), 1) for text in completions]

    options = {"score": plain, "group": 4 * GROUP, "max_tokens": TOKENS, "learning_rate": 0.01}
    steps = list(loop.train(policy, tokenizer, PROMPTS, 12, **options))
    first, last = ([reward for step in part for reward in step.rewards] for part in (steps[:3], steps[-3:]))
    mean = sum(first) / len(first)
    error = math.sqrt(sum((reward - mean) ** 2 for reward in first)) / len(first)
    assert sum(last) / len(last) > mean + 5 * error


def test_the_documented_command_is_read_by_skyrls_parser_and_passes_its_checks() -> None:
    from skyrl.train.config import SkyRLTrainConfig
    from skyrl.train.utils import validate_cfg

    words = documented("SkyRL")
    assert words[0] == "python"
    runpy.run_path(str(ROOT / words[1]), run_name="imported")
    config = SkyRLTrainConfig.from_cli_overrides(words[2:])
    validate_cfg(config)
    assert config.environment.env_class == "poise"
    engines = config.generator.inference_engine
    assert engines.num_engines * engines.tensor_parallel_size == config.trainer.placement.policy_num_gpus_per_node == 8
