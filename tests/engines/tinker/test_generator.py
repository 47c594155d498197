"""SkyRL's own generator of episodes with Poise's environment. A stand-in for vLLM gives the answers."""

import asyncio
import sys
from typing import Any

import pytest

from engines_kit import BROKEN, CONVERSATIONS, Reference, Wire
from poise.errors import PoiseError

pytestmark = pytest.mark.skipif(sys.version_info < (3, 12), reason="skyrl 0.4.0 needs Python 3.12")


class Answers:
    """In the place of vLLM: each conversation's own answer to its prompt, as tokens and as text."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.left = {self.key(prompt): [] for prompt, _ in CONVERSATIONS}
        for prompt, answer in CONVERSATIONS:
            self.left[self.key(prompt)].append(answer)

    def key(self, prompt: Any) -> tuple[int, ...]:
        return tuple(self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))

    async def generate(self, asked: Any, **_: Any) -> dict[str, Any]:
        [ids] = asked["prompt_token_ids"]
        text = self.left[tuple(ids)].pop(0)
        written = self.tokenizer(f"{text}<|im_end|>", add_special_tokens=False).input_ids
        return {"responses": [text], "response_ids": [written], "stop_reasons": ["stop"], "response_logprobs": None}

    async def finish_session(self, session: str) -> None:
        pass


def generated(model: str) -> dict[str, Any]:
    """Every conversation as an episode, through the generator with its default settings."""
    import skyrl_gym
    from skyrl.train.config import SkyRLTrainConfig
    from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
    from transformers import AutoTokenizer

    if "poise" not in skyrl_gym.registry:
        skyrl_gym.register(id="poise", entry_point="poise.integrations.skyrl_env:PoiseEnv")
    config = SkyRLTrainConfig.from_cli_overrides(["environment.env_class=poise", "generator.max_input_length=4096"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    generator = SkyRLGymGenerator(config.generator, config.environment.skyrl_gym, Answers(tokenizer), tokenizer)
    count = len(CONVERSATIONS)
    batch = {
        "prompts": [prompt for prompt, _ in CONVERSATIONS], "env_classes": ["poise"] * count,
        "env_extras": [{} for _ in range(count)], "trajectory_ids": None, "sampling_params": None,
    }  # fmt: skip
    return dict(asyncio.run(generator.generate(batch, disable_tqdm=True)))


def test_episodes_of_its_generator_have_the_servers_rewards(tiny_model: str, reference: Reference, wire: Wire) -> None:
    found = generated(tiny_model)
    rewards = [sum(reward) if isinstance(reward, list) else reward for reward in found["rewards"]]
    # Two answers to one prompt may come in any order.
    assert sorted(rewards) == pytest.approx(sorted(reference.rewards), abs=1e-5)
    mean = sum(reference.rewards) / len(reference.rewards)
    assert found["rollout_metrics"]["environment/reward"] == pytest.approx(mean, abs=1e-5)
    assert len(wire.calls) == len(CONVERSATIONS)


def test_an_episode_without_a_reward_ends_the_step(tiny_model: str, wire: Wire) -> None:
    wire.fault = lambda _: BROKEN
    with pytest.raises(PoiseError, match="500 a reward is not finite"):
        generated(tiny_model)
