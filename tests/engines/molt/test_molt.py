"""Molt's loader of agents and its runner of episodes with Poise's environment. A stand-in for vLLM gives answers."""

import argparse
import asyncio
import copy
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import molt
import pytest
from molt.agents.base import load_agent_runner
from transformers import AutoTokenizer

from documented_commands import documented, run_main
from engines_kit import BROKEN, CONVERSATIONS, Reference, Wire, answering, remember
from poise.errors import PoiseError


@pytest.fixture
def runner(wire: Wire, tmp_path: Path) -> Any:
    assert wire.url
    (tmp_path / "agent.py").write_text("from poise.integrations.molt_env import AgentRunner\n")
    return load_agent_runner(str(tmp_path / "agent.py"))


def trajectories(runner: Any, model: str, pairs: list[Any], length: int = 2048) -> list[Any]:
    tokenizer = AutoTokenizer.from_pretrained(model)

    async def one(prompt: Any, answer: str) -> Any:
        class Engine:
            async def generate(self, *_: Any, **__: Any) -> Any:
                ids = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False).input_ids
                output = SimpleNamespace(token_ids=ids, text="", finish_reason="stop", logprobs=None)
                return SimpleNamespace(outputs=[output]), 0

        rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        params = SimpleNamespace(max_tokens=64, logprobs=None, min_tokens=1)
        return await runner.execute(rendered, "label", params, length, tokenizer, Engine())

    async def together() -> list[Any]:
        return await asyncio.gather(*(one(*pair) for pair in pairs))

    return asyncio.run(together())


def test_episodes_have_the_servers_rewards(runner: Any, tiny_model: str, reference: Reference, wire: Wire) -> None:
    found = trajectories(runner, tiny_model, CONVERSATIONS)
    difference = reference.difference_to([one.reward for one in found])
    assert [one.scores for one in found] == [one.reward for one in found]
    assert len({frozenset(one.extra_logs) for one in found}) == 1
    assert found[0].extra_logs.keys() >= {"head_0", "head_std_0", "gap"}
    cut = trajectories(runner, tiny_model, CONVERSATIONS[-1:], length=200)  # the policy saw the end of the prompt only
    assert cut[0].reward == pytest.approx(reference.rewards[-1], abs=1e-5)
    remember("molt-rl", wire.calls, largest_difference=difference)


def test_what_is_no_number_ends_the_episode(runner: Any, tiny_model: str, wire: Wire) -> None:
    for fault in (answering("NaN", reward=0.5), lambda _: BROKEN):
        wire.fault = fault
        with pytest.raises(PoiseError, match=r"gave no reward|not finite"):
            trajectories(runner, tiny_model, CONVERSATIONS[:1])


def test_the_documented_command_is_read_by_its_parser_and_passes_its_checks() -> None:
    source = Path(str(molt.__file__)).parent / "cli" / "train_rl_ray.py"
    names = {"argparse": argparse, "os": os, "math": math, "copy": copy}
    alone = {"get_model_parallel_size": lambda args: args.fsdp.tp_size * args.fsdp.cp_size}  # Molt's own imports Ray
    args = run_main(source, documented("Molt")[3:], "train", **names, **alone)
    assert args.train.agent_path == "agent.py"
    assert args.algo.kl.ref == "model"  # not the policy that sampled
