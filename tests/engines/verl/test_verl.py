"""verl's reward loop on Ray with Poise's reward manager and reward function.

Real: Hydra's config with the options of docs/serving.md, RewardLoopManager with its Ray workers, RewardLoopWorker, the
agent loop's call for a reward, and what it tells the trainer of a sample without one. There is no language model and no
training.
"""

import asyncio
import importlib
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import ray
import torch
import verl.trainer.ppo
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from transformers import AutoTokenizer
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput, AgentLoopWorker
from verl.experimental.reward_loop import RewardLoopManager, RewardLoopWorker, migrate_legacy_reward_impl
from verl.utils.config import validate_config

from documented_commands import documented
from engines_kit import BROKEN, CONVERSATIONS, ROOT, Reference, Server, Wire, answering, remember
from poise.errors import PoiseError
from poise.serve.client import own_client

MANAGER = [
    "reward.reward_manager.source=importlib",
    "reward.reward_manager.name=PoiseRewardManager",
    "reward.reward_manager.module.path=pkg://poise.integrations.verl_manager",
]
FUNCTION = ["reward.custom_reward_function.path=pkg://poise.integrations.verl_reward"]
SYNC = [*FUNCTION, "reward.custom_reward_function.name=compute_score_sync"]


def configured(model: str, *options: str) -> Any:
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", [*options, f"actor_rollout_ref.model.path={model}"])
    return migrate_legacy_reward_impl(config)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def wire(server: Server) -> Iterator[Wire]:
    """One for all tests, since Ray's workers take over the environment when they start."""
    wire = Wire(server)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POISE_URL", wire.url)
        own_client.cache_clear()
        yield wire
    own_client.cache_clear()
    wire.close()


@pytest.fixture(autouse=True)
def whole(wire: Wire) -> Iterator[None]:
    os.environ["POISE_URL"] = wire.url
    yield
    wire.fault = None


@pytest.fixture(scope="module")
def manager(wire: Wire, tiny_model: str) -> Iterator[RewardLoopManager]:
    variables = {"POISE_URL": wire.url, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    yield RewardLoopManager(configured(tiny_model, *MANAGER, "reward.num_workers=2"))
    ray.shutdown()


def batch(tokenizer: Any) -> DataProto:
    """The conversations as verl's rollout leaves them: prompts padded on the left, answers on the right."""
    prompts, answers = [], []
    for prompt, answer in CONVERSATIONS:
        prompts.append(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        answers.append(tokenizer(f"{answer}<|im_end|>", add_special_tokens=False).input_ids)
    left, right = (max(map(len, rows)) for rows in (prompts, answers))
    padded = [
        [[0] * (left - len(prompt)) + prompt for prompt in prompts],
        [answer + [0] * (right - len(answer)) for answer in answers],
        [
            [0] * (left - len(prompt)) + [1] * (len(prompt) + len(answer)) + [0] * (right - len(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ],
    ]
    tensors = dict(zip(("prompts", "responses", "attention_mask"), map(torch.tensor, padded), strict=True))
    columns = {
        "raw_prompt": [prompt for prompt, _ in CONVERSATIONS],
        "extra_info": [{"prompt": np.array(prompt, dtype=object)} for prompt, _ in CONVERSATIONS],
        "data_source": ["films"] * len(CONVERSATIONS),
        "reward_model": [{"ground_truth": ""}] * len(CONVERSATIONS),
        "__num_turns__": [2] * len(CONVERSATIONS),
    }
    others = {}
    for name, values in columns.items():
        others[name] = np.empty(len(values), dtype=object)
        others[name][:] = values
    return DataProto(TensorDict(tensors, batch_size=len(CONVERSATIONS)), others)


def test_the_manager_gives_the_servers_rewards(
    manager: RewardLoopManager, tokenizer: Any, reference: Reference, wire: Wire
) -> None:
    data = batch(tokenizer)
    scored = manager.compute_rm_score(data)  # of six samples on two workers
    rewards = scored.batch["rm_scores"]
    ends = data.batch["attention_mask"][:, data.batch["prompts"].shape[1] :].sum(1) - 1
    assert rewards.count_nonzero() == len(CONVERSATIONS)
    difference = reference.difference_to(rewards[torch.arange(len(CONVERSATIONS)), ends].tolist())
    told = scored.non_tensor_batch
    assert set(scored.meta_info["reward_extra_keys"]) == told.keys() >= {"score", "head_0", "head_std_0", "gap"}
    assert told["truncated"].tolist() == [0.0] * (len(CONVERSATIONS) - 1) + [1.0]
    remember("verl", wire.calls, largest_difference=difference, ray=ray.__version__, keys=sorted(told))


# ---- the agent loop, which asks for the reward of each sample ----


def agent_loop(tokenizer: Any, manager: RewardLoopManager) -> Any:
    """A worker that scores and stores samples, with what it needs for that."""
    bare = ModuleType("verl.trainer.ppo.v1")  # its own __init__ imports the trainers
    bare.__path__ = [f"{verl.trainer.ppo.__path__[0]}/v1"]
    sys.modules.setdefault(bare.__name__, bare)
    module = importlib.import_module("verl.trainer.ppo.v1.agent_loop_tq")
    worker = object.__new__(module.AgentLoopWorkerTQ.__ray_metadata__.modified_class)
    worker.config, worker.reward_loop_worker_handles = manager.config, manager.reward_loop_worker_handles
    worker.tokenizer, worker.processor = tokenizer, None
    worker.mm_processor_kwargs, worker.distillation_enabled, worker.hf_model_type = {}, False, None
    return worker


def sampled(tokenizer: Any, prompt: list[dict[str, str]], answer: str) -> AgentLoopOutput:
    return AgentLoopOutput(
        prompt_ids=tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False),
        response_ids=(ids := tokenizer(f"{answer}<|im_end|>", add_special_tokens=False).input_ids),
        response_mask=[1] * len(ids), num_turns=2, metrics=AgentLoopMetrics(),
    )  # fmt: skip


def test_the_agent_loop_gets_the_servers_rewards(
    manager: RewardLoopManager, tokenizer: Any, reference: Reference
) -> None:
    worker = agent_loop(tokenizer, manager)
    outputs = [sampled(tokenizer, *pair) for pair in CONVERSATIONS]

    async def score() -> None:
        asked = (
            AgentLoopWorker._compute_score(worker, [output], {"raw_prompt": prompt})
            for output, (prompt, _) in zip(outputs, CONVERSATIONS, strict=True)
        )
        await asyncio.gather(*asked)

    asyncio.run(score())
    reference.difference_to([float(output.reward_score or 0.0) for output in outputs])
    assert len({frozenset(output.extra_fields["reward_extra_info"]) for output in outputs}) == 1


@pytest.mark.parametrize("fault", ["500", "NaN"])
def test_a_sample_without_a_reward_fails_its_group_and_gets_no_number(
    manager: RewardLoopManager, tokenizer: Any, wire: Wire, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Four samples of a prompt; the server cannot score one. verl's trainer goes on with the three others, padded."""
    nan = answering("NaN", scores=[{"reward": 0.5, "mean": [], "std": []}])
    worker = agent_loop(tokenizer, manager)
    module = sys.modules["verl.trainer.ppo.v1.agent_loop_tq"]
    stored: dict[str, Any] = {}
    statuses: list[str] = []

    async def put(tag: dict[str, str], **_: Any) -> None:
        statuses.append(tag["status"])

    async def put_batch(keys: list[str], fields: Any, **_: Any) -> None:
        stored[keys[0]] = float(fields["rm_scores"][0].sum())

    async def run_agent_loop(_: Any, trajectory: Any, session_id: int, **columns: Any) -> None:
        output = sampled(tokenizer, CONVERSATIONS[0][0], f"It is good, {session_id}.")
        columns |= {"session_id": session_id, "global_steps": 0}
        columns.pop("trace")
        await worker._agent_loop_postprocess(output, trajectory["validate"], **columns)

    monkeypatch.setattr(module.tq, "async_kv_put", put)
    monkeypatch.setattr(module.tq, "async_kv_batch_put", put_batch)
    worker._run_agent_loop = run_agent_loop
    bad = (lambda _: BROKEN) if fault == "500" else nan
    wire.fault = lambda body: bad(body) if b"good, 2" in body else wire.forward("/score", body)
    prompt = {"uid": "a", "raw_prompt": CONVERSATIONS[0][0], "__rollout_n__": 4}
    asyncio.run(worker._run_prompt(prompt, {}, {"validate": False}))
    assert statuses == ["running", "failure"]
    assert stored.keys() == {"a_0_0", "a_1_0", "a_3_0"}
    assert all(np.isfinite(reward) and reward for reward in stored.values())


def test_errors_reach_the_trainer_in_one_line(manager: RewardLoopManager, tokenizer: Any, wire: Wire) -> None:
    wire.fault = lambda _: BROKEN
    with pytest.raises(PoiseError, match="500 a reward is not finite"):
        manager.compute_rm_score(batch(tokenizer))
    wire.fault = None
    turns = batch(tokenizer)
    turns.non_tensor_batch["__num_turns__"][1] = 4
    with pytest.raises(PoiseError, match="single-turn agent loop"):
        manager.compute_rm_score(turns)


def test_a_restart_is_waited_for(
    manager: RewardLoopManager, tokenizer: Any, reference: Reference, server: Server
) -> None:
    server.stop()
    with ThreadPoolExecutor(1) as pool:
        scored = pool.submit(manager.compute_rm_score, batch(tokenizer))
        time.sleep(1.0)
        assert not scored.done()
        server.start()
        rewards = scored.result().batch["rm_scores"].sum(1).tolist()
    reference.difference_to(rewards)


# ---- workers in this process: reward functions, and what is refused ----


def by_worker(worker: RewardLoopWorker, data: DataProto) -> list[dict[str, Any]]:
    async def score() -> list[dict[str, Any]]:
        worker.reward_manager.loop = asyncio.get_running_loop()
        return list(await worker.compute_score_batch(data))

    return asyncio.run(score())


@pytest.mark.parametrize("options", [FUNCTION, SYNC], ids=["async", "sync"])
def test_the_functions_give_the_servers_rewards(
    tiny_model: str, tokenizer: Any, reference: Reference, options: list[str]
) -> None:
    answers = by_worker(RewardLoopWorker(configured(tiny_model, *options)), batch(tokenizer))
    reference.difference_to([answer["reward_score"] for answer in answers])
    assert len({frozenset(answer["reward_extra_info"]) for answer in answers}) == 1


def test_rate_limited_makes_a_zero_of_an_error(tiny_model: str, tokenizer: Any, wire: Wire) -> None:
    """verl's own, and why docs/serving.md warns of it: it hands the error of a reward function on as a reward."""
    worker = RewardLoopWorker(configured(tiny_model, *FUNCTION, "reward.reward_manager.name=rate_limited"))
    wire.fault = lambda _: BROKEN
    assert by_worker(worker, batch(tokenizer)[:1])[0]["reward_score"] == 0.0


def test_verls_own_reward_model_is_refused(tiny_model: str, tokenizer: Any) -> None:
    """With the manager verl would not even ask it; with the function it would ask both."""
    own = ["reward.reward_model.enable=True", f"reward.reward_model.model_path={tiny_model}"]
    for options in ([], ["reward.reward_model.enable_resource_pool=True"], FUNCTION):
        with pytest.raises(PoiseError, match=r"switch off reward\.reward_model\.enable"):
            RewardLoopWorker(configured(tiny_model, *MANAGER, *own, *options), "127.0.0.1:1")
    worker = RewardLoopWorker(configured(tiny_model, *FUNCTION, *own), "127.0.0.1:1")
    with pytest.raises(PoiseError, match=r"switch off reward\.reward_model\.enable"):
        by_worker(worker, batch(tokenizer)[:1])


def test_the_documented_command_is_read_by_its_parser_and_passes_its_checks() -> None:
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", documented("verl")[3:])
    validate_config(config, use_reference_policy=True, use_critic=False)
    manager = config.reward.reward_manager
    assert [f"reward.reward_manager.{name}" for name in (
        f"source={manager.source}", f"name={manager.name}", f"module.path={manager.module.path}"
    )] == MANAGER  # fmt: skip
    assert not config.reward.reward_model.enable
