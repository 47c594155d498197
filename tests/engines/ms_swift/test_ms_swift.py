"""ms-swift's GRPO reward code with Poise's plugin: its loader of plugins, its registry, its samples and its scoring."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from swift.arguments import RLHFArguments
from swift.rewards import orms
from swift.rl_core.data import GRPOSample
from swift.rl_core.grpo_algorithm import score_completions
from swift.rlhf_trainers.utils import resolve_reward_funcs
from swift.utils import import_external_file
from transformers import HfArgumentParser

import poise.integrations
from documented_commands import documented
from engines_kit import BROKEN, CONVERSATIONS, Reference, Wire, answering, remember
from poise.errors import PoiseError

MODULE = "poise.integrations.ms_swift_reward"
OWN_FILE = str(Path(poise.integrations.__file__).with_name("ms_swift_reward.py"))


@pytest.fixture(params=["a plugin of one line", "the file itself"])
def rewards(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], list[str]]:
    """As `--external_plugins … --reward_funcs poise`, made while POISE_URL names the wire."""
    request.getfixturevalue("wire")
    monkeypatch.setattr(sys, "path", sys.path[:])
    plugin = tmp_path / "plugin.py"
    plugin.write_text(f"import {MODULE}\n")
    orms.pop("poise", None)
    for name in [name for name in sys.modules if name.startswith("_swift_external_") or name == MODULE]:
        del sys.modules[name]  # as in a new process
    import_external_file(OWN_FILE if request.param == "the file itself" else str(plugin))
    functions, names = resolve_reward_funcs(["poise"], args=object())
    return functions, names


def samples() -> list[GRPOSample]:
    return [
        GRPOSample(messages=[*prompt, {"role": "assistant", "content": answer}], extra={"solution": "x"})
        for prompt, answer in CONVERSATIONS
    ]


def scored(functions: list[Any], of: list[GRPOSample]) -> torch.Tensor:
    return score_completions(of, functions, [None], use_gym_env=False, device=torch.device("cpu"))


def test_grpo_gets_the_servers_rewards(rewards: tuple[list[Any], list[str]], reference: Reference, wire: Wire) -> None:
    functions, names = rewards
    assert names == ["PoiseReward"]
    first = scored(functions, samples())
    assert first.shape == (len(CONVERSATIONS), 1)
    difference = reference.difference_to(first[:, 0].tolist())
    again = scored(functions, samples()[::-1])  # in another event loop, as in every step
    assert torch.allclose(again.flip(0), first, atol=1e-5, rtol=0)
    remember("ms-swift", wire.calls, largest_difference=difference)


def test_what_is_no_number_ends_the_step(rewards: tuple[list[Any], list[str]], wire: Wire) -> None:
    """ms-swift itself only warns of a NaN, and trains on."""
    functions, _ = rewards
    for fault in (answering("NaN", scores=[{"reward": 0.5, "mean": [], "std": []}]), lambda _: BROKEN):
        wire.fault = fault
        with pytest.raises(PoiseError, match=r"gave no reward|not finite"):
            scored(functions, samples()[:1])


def test_the_documented_command_is_read_by_its_parser() -> None:
    """Its own checks load the model: they are not reached."""
    words = documented("ms-swift")
    assert words[:3] == ["NPROC_PER_NODE=8", "swift", "rlhf"]
    given, unknown = HfArgumentParser([RLHFArguments]).parse_known_args(words[3:])
    assert unknown == []
    assert (given.reward_funcs, given.external_plugins, given.beta) == (["poise"], ["plugin.py"], 0.01)
