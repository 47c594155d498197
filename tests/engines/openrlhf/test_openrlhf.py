"""OpenRLHF's executor, samples generator and experience code with both forms of Poise's reward.

Real: what sends, retries, parses, batches, clips and shapes rewards. As in OpenRLHF's own tests, there is no vLLM (a
stand-in gives the answers' tokens), no Ray and no DeepSpeed.
"""

import argparse
import asyncio
import importlib
import math
import os
import sys
import time
from datetime import datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from transformers import AutoTokenizer

from documented_commands import documented, run_main
from engines_kit import BROKEN, CONVERSATIONS, Reference, Server, Wire, answering, remember
from poise.integrations import openrlhf_reward

TRIES = 5  # of OpenRLHF, 1 s apart


class OpenRLHF:
    """Its modules, a tokenizer, and its steps from a prompt to advantages."""

    def __init__(self, tokenizer: Any, modules: dict[str, ModuleType]):
        self.tokenizer = tokenizer
        self.modules = modules

    def rendered(self, prompt: list[dict[str, str]]) -> str:
        data = self.modules["datasets.prompts_dataset"]
        text, _ = data.preprocess_data({"input": prompt}, apply_chat_template=self.tokenizer.apply_chat_template)
        return str(text)

    async def response(self, url: str, number: int, truncated: bool = False) -> dict[str, Any]:
        """What the executor of one rollout gives for one conversation."""
        prompt, answer = CONVERSATIONS[number]
        ids = self.tokenizer(answer if truncated else f"{answer}<|im_end|>", add_special_tokens=False).input_ids

        class Engine:
            async def generate(self, *_: Any, **__: Any) -> Any:
                output = SimpleNamespace(
                    token_ids=ids, text=answer, finish_reason="length" if truncated else "stop", logprobs=None
                )
                return SimpleNamespace(outputs=[output])

        executor = self.modules["utils.agent"].SingleTurnAgentExecutor([url])
        params = SimpleNamespace(max_tokens=64, logprobs=None)
        response: dict[str, Any] = await executor.execute(
            self.rendered(prompt), "label", params, 2048, self.tokenizer, Engine()
        )
        return response

    def responses(self, url: str, *numbers: int, **options: Any) -> list[dict[str, Any]]:
        async def together() -> list[dict[str, Any]]:
            return await asyncio.gather(*(self.response(url, number, **options) for number in numbers))

        return asyncio.run(together())

    def experiences(self, responses: list[dict[str, Any]], size: int = 2) -> list[Any]:
        """Samples of a rollout, with rewards, in micro-batches of `size`."""
        generator = object.__new__(self.modules["trainer.ppo_utils.samples_generator"].SamplesGenerator)
        samples = [generator._process_response_into_experience(response, max_len=2048) for response in responses]
        for index, sample in enumerate(samples):
            sample.index = [index]
        concat = self.modules["trainer.ppo_utils.experience"].Experience.concat_experiences
        return [concat(samples[i : i + size], self.tokenizer.pad_token_id) for i in range(0, len(samples), size)]

    def returns(self, experiences: list[Any]) -> list[float]:
        """What REINFORCE trains on: each sample's return, with OpenRLHF's default clip of rewards."""
        maker = object.__new__(self.modules["trainer.ppo_utils.experience_maker"].RemoteExperienceMaker)
        advantage = SimpleNamespace(estimator="reinforce", gamma=1.0, lambd=1.0, no_std_norm=False)
        maker.strategy = SimpleNamespace(
            args=SimpleNamespace(
                reward=SimpleNamespace(clip_range=(-10, 10), overlong_buffer_len=None, stop_properly_penalty_coef=None),
                rollout=SimpleNamespace(n_samples_per_prompt=1),
                algo=SimpleNamespace(advantage=advantage),
            )
        )
        maker.args, maker.advantage_estimator, maker.kl_ctl = maker.strategy.args, "reinforce", SimpleNamespace(value=0)
        for experience in experiences:
            experience.kl = torch.zeros(experience.action_mask.shape)
        shaped = maker.compute_advantages_and_returns(experiences)
        return [value for experience in shaped for value in experience.info["return"].tolist()]


@pytest.fixture(scope="module")
def openrlhf(tiny_model: str) -> OpenRLHF:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ray", "ray.util", "ray.util.placement_group", "ray.util.scheduling_strategies", "vllm",
                     "deepspeed", "openrlhf.trainer.ray.launcher", "openrlhf.trainer.ray.vllm_engine"):  # fmt: skip
            patch.setitem(sys.modules, name, MagicMock(__path__=[], __spec__=None))
        import openrlhf as package

        for name in ("models", "trainer.ray"):  # their __init__ imports every model and actor
            bare = ModuleType(f"openrlhf.{name}")
            bare.__path__ = [str(Path(next(iter(package.__path__)), *name.split(".")))]
            patch.setitem(sys.modules, bare.__name__, bare)
        names = ("utils.agent", "datasets.prompts_dataset", "trainer.ppo_utils.samples_generator",
                 "trainer.ppo_utils.experience", "trainer.ppo_utils.experience_maker")  # fmt: skip
        modules = {name: importlib.import_module(f"openrlhf.{name}") for name in names}
    return OpenRLHF(AutoTokenizer.from_pretrained(tiny_model), modules)


def both(wire: Wire) -> list[str]:
    return [f"{wire.url}/get_reward", openrlhf_reward.__file__]


def test_both_forms_train_on_the_servers_rewards(openrlhf: OpenRLHF, reference: Reference, wire: Wire) -> None:
    numbers = range(len(CONVERSATIONS))
    differences = []
    for url in both(wire):
        responses = openrlhf.responses(url, *numbers)
        logs = [response["extra_logs"].keys() for response in responses]
        assert all(keys == logs[0] >= {"head_0", "head_std_0", "gap", "truncated"} for keys in logs)
        experiences = openrlhf.experiences(responses)
        differences.append(reference.difference_to(openrlhf.returns(experiences)))
        truncated = [value for experience in experiences for value in experience.info["truncated"].flatten().tolist()]
        assert truncated == [0.0] * (len(CONVERSATIONS) - 1) + [1.0]
        cut = openrlhf.responses(url, 0, truncated=True)[0]  # its query has no end of turn
        assert cut["truncated"]
        assert openrlhf.returns(openrlhf.experiences([cut])) == pytest.approx([reference.rewards[0]], abs=1e-5)
    remember("openrlhf", wire.calls, largest_difference=max(differences), forms=["URL", ".py"])


def test_a_query_that_is_decoded_in_other_white_space_has_the_same_reward(
    openrlhf: OpenRLHF, reference: Reference, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Llama 2's decoder writes a space after special tokens."""
    decode = openrlhf.tokenizer.decode

    def otherwise(ids: Any, **options: Any) -> str:
        return str(decode(ids, **options).replace("<|im_start|>", "<|im_start|> "))

    monkeypatch.setattr(openrlhf.tokenizer, "decode", otherwise)
    for url in both(wire):
        responses = openrlhf.responses(url, *range(len(CONVERSATIONS)))
        assert "<|im_start|> " in wire.calls[-1].request["query"][0]
        reference.difference_to(openrlhf.returns(openrlhf.experiences(responses)))


def test_rewards_beyond_ten_are_clipped(openrlhf: OpenRLHF, wire: Wire) -> None:
    wire.fault = answering("25.0", rewards=[0.5], scores=[0.1], extra_logs={})
    for url in both(wire):
        assert openrlhf.returns(openrlhf.experiences(openrlhf.responses(url, 0))) == [10.0]


def test_a_short_absence_is_waited_for_by_both_forms(openrlhf: OpenRLHF, reference: Reference, wire: Wire) -> None:
    for url in both(wire):
        left = iter((None, (503, b'{"error": "come again"}')))

        def fault(_: bytes, left: Any = left) -> tuple[int, bytes] | None:
            answer = next(left, "over")
            if answer == "over":
                wire.fault = None
                return 503, b'{"error": "come again"}'
            return answer

        wire.fault = fault
        rewards = openrlhf.returns(openrlhf.experiences(openrlhf.responses(url, 0)))
        assert rewards == pytest.approx(reference.rewards[:1], abs=1e-5)


@pytest.mark.timeout(400)
def test_a_restart_of_more_than_five_seconds_is_waited_for_by_the_file_form_only(
    openrlhf: OpenRLHF, reference: Reference, server: Server, wire: Wire
) -> None:
    by_url, by_file = both(wire)
    server.stop()

    async def run() -> tuple[Any, float, Any]:
        started = time.monotonic()
        waiting = asyncio.gather(*(openrlhf.response(by_file, number) for number in range(4)))
        gave_up = await openrlhf.response(by_url, 0)
        seconds = time.monotonic() - started
        assert not waiting.done()
        await asyncio.to_thread(server.start)
        return gave_up, seconds, await waiting

    gave_up, seconds, waited = asyncio.run(run())
    assert gave_up["reward"] is None
    assert TRIES <= seconds < 3 * TRIES
    assert openrlhf.returns(openrlhf.experiences(waited)) == pytest.approx(reference.rewards[:4], abs=1e-5)
    # Without its reward a sample ends the training, wherever it is in a batch. None is never a number.
    with pytest.raises(AttributeError):
        openrlhf.experiences([waited[0], gave_up])
    assert openrlhf.experiences([gave_up, waited[0]])[0].rewards is None
    with pytest.raises(AttributeError):
        openrlhf.returns(openrlhf.experiences([waited[0], gave_up], size=1))


def test_no_number_is_made_of_nan(openrlhf: OpenRLHF, wire: Wire) -> None:
    """The server says 500 for it. What another server than ours might say, the file form refuses and OpenRLHF takes."""
    by_url, by_file = both(wire)
    wire.fault = lambda _: BROKEN
    assert openrlhf.responses(by_file, 0)[0]["reward"] is None
    assert openrlhf.responses(by_url, 0)[0]["reward"] is None
    wire.fault = answering("NaN", rewards=[0.5], scores=[0.1], extra_logs={})
    assert openrlhf.responses(by_file, 0)[0]["reward"] is None
    assert math.isnan(openrlhf.responses(by_url, 0)[0]["reward"][0])


def test_the_documented_command_is_read_by_its_parser_and_passes_its_checks(openrlhf: OpenRLHF) -> None:
    source = Path(str(openrlhf.modules["utils.agent"].__file__)).parents[1] / "cli" / "train_ppo_ray.py"
    names = {"argparse": argparse, "os": os, "datetime": datetime}
    options = documented("OpenRLHF")[3:]
    args = run_main(source, options, "train", **names)
    assert args.reward.remote_url == ["inserted.py"]
    assert args.vllm.num_engines * args.vllm.tensor_parallel_size == args.actor.num_gpus_per_node == 8
    with pytest.raises(SystemExit):  # what its own messages call the option
        run_main(source, [*options, "--remote_rm_url", "x"], "train", **names)
