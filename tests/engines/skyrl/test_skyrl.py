"""skyrl-gym's own registry, `make` and metrics with Poise's environment: rewards equal to the server's."""

from pathlib import Path
from typing import Any

import pytest
import skyrl_gym
from skyrl_gym.metrics import aggregate_for_environment

from engines_kit import BROKEN, CONVERSATIONS, Reference, Wire, answering, remember
from poise.errors import PoiseError


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    skyrl_gym.register(id="poise", entry_point="poise.integrations.skyrl_env:PoiseEnv")


def step(prompt: list[dict[str, str]], answer: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """As SkyRL's generator does it: the step, and the episode's metrics."""
    env = skyrl_gym.make("poise", env_config={}, extras={"reward_spec": {"ground_truth": ""}, "max_turns": 1})
    assert env.init(prompt) == (prompt, {})
    step = env.step(answer)
    metrics = env.get_metrics()
    env.close()
    return step, metrics


def test_the_environment_has_the_servers_rewards(reference: Reference, wire: Wire) -> None:
    episodes = [step(prompt, f"{answer}<|im_end|>") for prompt, answer in CONVERSATIONS]
    steps, metrics = zip(*episodes, strict=True)
    difference = reference.difference_to([step["reward"] for step in steps])
    assert all(step["done"] and step["observations"] == [] for step in steps)
    assert len({frozenset(step["metadata"]) for step in steps}) == 1
    means = aggregate_for_environment("poise", list(metrics))
    assert means["reward"] == pytest.approx(sum(reference.rewards) / len(reference.rewards), abs=1e-5)
    assert means.keys() == metrics[0].keys() >= {"head_0", "head_std_0", "gap"}
    remember("skyrl-gym", wire.calls, largest_difference=difference, metrics=sorted(means))


@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_what_is_no_number_ends_the_episode(wire: Wire, number: str) -> None:
    wire.fault = answering(number, reward=0.5, head_0=0.1)
    with pytest.raises(PoiseError, match="gave no reward"):
        step(*CONVERSATIONS[0])


def test_a_server_error_ends_the_episode(wire: Wire) -> None:
    wire.fault = lambda _: BROKEN
    with pytest.raises(PoiseError, match="500 a reward is not finite"):
        step(*CONVERSATIONS[0])
    assert Path(skyrl_gym.__file__).parts[-3] == "site-packages"  # SkyRL's own code
