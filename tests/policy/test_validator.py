"""A validator watches: what it logs is recomputed from the samples, and the run is the same without it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import rest_slow
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.monitor import LIMITS, Monitor, transfer_ratio
from poise.functional.objectives import HeadRewards, mean, worst_case
from poise.models.run_heads import validator_of
from poise.models.scorer import Scorer, generated
from poise.models.validator import Validator
from poise.policy import train as train_policy
from poise.policy.config import Config
from poise.runtime.ladder import best_of
from poise.runtime.records import read_rows
from poise.runtime.run_folder import load_config_file
from validated_runs import validated_run


@pytest.fixture(scope="module")
def reward_run(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> Path:
    return train_tiny_reward(tiny_model)


def test_transfer_equals_values_worked_out_by_hand() -> None:
    assert transfer_ratio(2.0, 1.0, 32) == 0.5
    assert transfer_ratio(2.0, -1.0, 32) == -0.5
    assert transfer_ratio(0.36, 1.0, 32) == pytest.approx(1 / 0.36)
    assert transfer_ratio(0.35, 1.0, 32) is None  # 2 / sqrt(32) = .3536
    assert transfer_ratio(-2.0, -1.0, 32) is None
    assert transfer_ratio(float("nan"), 1.0, 32) is None
    assert transfer_ratio(2.0, float("inf"), 32) is None


@given(st.floats(0.5, 50), st.floats(-50, 50), st.integers(16, 1000))
def test_transfer_obeys_its_laws(proxy: float, gain: float, count: int) -> None:
    assert transfer_ratio(proxy, proxy, count) == 1.0  # a validator that is the reward itself
    assert transfer_ratio(proxy, gain, count) == pytest.approx(gain / proxy)
    assert transfer_ratio(2 * proxy, 2 * gain, count) == pytest.approx(gain / proxy)  # no unit


def test_units_are_those_of_the_start() -> None:
    """By hand: gains of 3 and 1.5 stds, whatever each reward's own zero and unit."""
    watching = Validator.__new__(Validator)
    watching.objective = worst_case
    start = torch.tensor([[1.0], [3.0], [5.0]])
    zeros = torch.zeros(3, 1)
    watching.fit(HeadRewards(10 + 4 * start, zeros), HeadRewards(start, zeros))
    kept = json.loads(json.dumps(watching.state()))
    again = Validator.__new__(Validator)
    again.objective = worst_case
    again.restore(kept)
    step = torch.full((40, 1), 9.0)
    for one in (watching, again):
        found = one.metrics(HeadRewards(10 + 4 * torch.full((40, 1), 6.0), step * 0), HeadRewards(step, step * 0), 40)
        assert found == pytest.approx({"validator": 1.5, "transfer": 0.5})
    assert "transfer" not in watching.metrics(HeadRewards(10 + 4 * start, zeros), HeadRewards(start, zeros), 3)


def test_a_reward_that_gains_nothing_has_seldom_a_ratio_also_where_completions_of_a_prompt_are_alike() -> None:
    """16 prompts, 8 completions of each, half of their variance the prompt's: counted as 128, a quarter had one."""
    generator, found = torch.Generator().manual_seed(0), []

    def completions() -> HeadRewards:
        prompt, own = (torch.randn(16, size, generator=generator) for size in (1, 8))
        mean = (0.5**0.5 * (prompt + own)).reshape(-1, 1)
        return HeadRewards(mean, torch.zeros_like(mean))

    for _ in range(300):
        watching = Validator.__new__(Validator)
        watching.objective = worst_case
        watching.fit(completions(), completions())
        found.append("transfer" in watching.metrics(completions(), completions(), 16))
    assert sum(found) / 300 <= 0.08


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_refused_with_the_validator_s_name(value: float) -> None:
    watching = Validator.__new__(Validator)
    watching.path, watching.objective = "their/rm", mean
    numbers = torch.tensor([[1.0], [2.0], [3.0]])
    watching.scorer = lambda samples: HeadRewards(numbers[: len(samples)], torch.zeros(len(samples), 1))  # type: ignore[assignment]
    assert torch.equal(watching.heads(["a", "b"], [["x", "y"], ["z"]]).mean, numbers)
    numbers[1] = value
    with pytest.raises(PoiseError, match=r"^the validator their/rm gives a completion a reward that is not finite$"):
        watching.heads(["a", "b"], [["x", "y"], ["z"]])


@pytest.mark.slow
def test_a_run_keeps_the_policy_that_its_validator_likes_best(
    reward_run: Path, prompts_file: Path, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third of five policies, in one run, and in one of three steps that goes on; within --max-kl alone."""
    config = Config(
        prompts=str(prompts_file), reward=str(reward_run / "brme"), output=str(tmp_path / "run"), model=tiny_model,
        validator=str(reward_run / "single"), objective="worst_case", num_steps=5, prompts_per_step=2,
        completions_per_prompt=4, max_tokens=8, adapted_layers=1, lora_rank=2, baseline_completions=16, save_every=1,
        eval_completions=1, learning_rate=3e-2, keep_at_kl=(),
    )  # fmt: skip
    out = validated_run(config, monkeypatch)
    told = {"step": 2, "kl": out.metrics()[2]["kl"], "validator": 2.0}
    assert (out.results or {})["best"] == best_of(out.folder) == told
    short = train_policy.run(replace(config, validator="", num_steps=2, output=str(tmp_path / "short")))
    kept = load_file(out.folder / "best" / "adapter_model.safetensors")
    ended = load_file(short.folder / "policy" / "adapter_model.safetensors")
    assert ended.keys() == kept.keys()
    assert all(torch.equal(ended[name], kept[name]) for name in ended)

    parts = replace(config, output=str(tmp_path / "parts"))
    validated_run(replace(parts, num_steps=2), monkeypatch)
    again = validated_run(parts, monkeypatch, first=2)
    assert best_of(again.folder) == told
    tight = validated_run(replace(config, max_kl=told["kl"] * 0.99, output=str(tmp_path / "tight")), monkeypatch)
    assert ((tight.results or {})["best"] or {"step": 1})["step"] < 2


@pytest.mark.slow
def test_a_run_is_watched_and_not_disturbed(
    reward_run: Path, prompts_file: Path, tiny_model: str, tmp_path: Path
) -> None:
    config = Config(
        prompts=str(prompts_file), reward=str(reward_run / "brme"), output=str(tmp_path / "watched"), model=tiny_model,
        validator=str(reward_run / "single"), objective="worst_case", num_steps=3, prompts_per_step=2,
        completions_per_prompt=4, max_tokens=8, adapted_layers=1, lora_rank=2, baseline_completions=16, save_every=1,
        eval_completions=1, learning_rate=3e-2,
    )  # fmt: skip
    out = train_policy.run(config)
    alone = train_policy.run(replace(config, validator="", output=str(tmp_path / "alone")))
    samples = list(read_rows(out.folder / "samples.jsonl"))
    assert samples == list(read_rows(alone.folder / "samples.jsonl"))
    assert all("validator" not in row for row in alone.metrics())

    scorer = Scorer.load(str(reward_run / "single"))
    logged = [row["validator"] for row in out.metrics()]
    gains = []
    for step in range(3):
        texts: list[Sample] = [generated(row["prompt"], row["completion"]) for row in samples if row["step"] == step]
        gains.append(mean(scorer(texts)).mean().item())
    moved = [gain - gains[0] for gain in gains]
    found = [one - logged[0] for one in logged]
    assert max(map(abs, moved)) > 1e-3
    unit = found[-1] / moved[-1]
    assert unit > 0
    assert found == pytest.approx([unit * one for one in moved], abs=1e-4)  # one unit for the whole run


def test_the_monitor_shows_both_signs_and_its_alarm_stays() -> None:
    plain, told = Monitor(), Monitor()
    for step in range(8):
        stats = {"kl": 3.0 * step, "reward": 0.1 * step, "reward_std": 1.0}
        more = {"distance": 1.0 + step} | ({"transfer": 0.4} if step > 2 else {})
        before, now = plain.update(stats), told.update(stats | more)
        assert (before.score, before.alarm) == (now.score, now.alarm)
        told = Monitor.restore(json.loads(json.dumps(told.state())))
    assert now.signs["transfer"] == pytest.approx(0.6)
    assert now.signs["distance"] > 3
    assert before.signs == {name: now.signs[name] for name in before.signs}
    assert not {"distance", "transfer"} & LIMITS.keys()


# ---- the validator that the reward's own run trained ----


def test_the_run_s_validator_is_found_from_the_run_and_from_its_heads(
    watched_reward: Path, reward_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(watched_reward)
    for reward in (run, f"{run}/", *(f"{run}/{kind}" for kind in ("single", "ensemble", "posterior", "brme"))):
        assert validator_of(reward) == f"{run}/validator", reward
    for reward in (
        str(reward_run),
        f"{reward_run}/brme",
        f"{run}/validator",
        "me/brme",
        "in memory",
        "x" * 5000,
        "a\0",
    ):
        assert validator_of(reward) == "", reward
    monkeypatch.chdir(watched_reward)
    assert validator_of("") == ""  # no reward is not the folder that one is in
    assert validator_of("brme") == "validator"


@pytest.fixture
def plain(prompts_file: Path, tiny_model: str, watched_reward: Path, tmp_path: Path) -> Config:
    return Config(
        prompts=str(prompts_file), reward=str(watched_reward), output=str(tmp_path / "run"), model=tiny_model,
        num_steps=2, prompts_per_step=2, completions_per_prompt=4, max_tokens=8, adapted_layers=1, lora_rank=2,
        baseline_completions=16, save_every=1, eval_completions=1, learning_rate=3e-2,
    )  # fmt: skip


@pytest.mark.parametrize("inner", rest_slow(["", "/brme"]))
def test_it_is_watched_without_being_named(
    inner: str, plain: Config, watched_reward: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is that of the same command with --validator RUN/validator."""
    plain = replace(plain, reward=f"{watched_reward}{inner}")
    out = train_policy.run(plain)
    line = f"validator: {watched_reward}/validator, trained with the reward model on other pairs, is watched; "
    assert f"{line}--validator None turns it off" in capsys.readouterr().err
    assert load_config_file(out.folder / "config.yaml")["validator"] == f"{watched_reward}/validator"
    assert "--validator" in json.loads((out.folder / "inputs.json").read_text())
    named = replace(plain, validator=f"{watched_reward}/validator", output=f"{plain.output}-named")
    gains = [row["validator"] for row in train_policy.run(named).metrics()]
    assert [row["validator"] for row in out.metrics()] == gains
    assert gains[0] != gains[1]


def test_it_is_not_watched_where_it_is_turned_off_or_another_is_named(
    plain: Config, reward_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    off = train_policy.run(replace(plain, validator=None))
    assert "validator" not in capsys.readouterr().err
    assert not any({"validator", "transfer"} & row.keys() for row in off.metrics())
    assert "--validator" not in json.loads((off.folder / "inputs.json").read_text())
    assert replace(plain, validator="their/rm").for_command().validator == "their/rm"
    assert replace(plain, reward=str(reward_run)).for_command().validator == ""


def test_a_run_goes_on_with_the_validator_it_began_with(plain: Config, watched_reward: Path, tmp_path: Path) -> None:
    reward = tmp_path / "rm"
    shutil.copytree(watched_reward, reward)
    plain = replace(plain, reward=str(reward))
    train_policy.run(plain)
    longer = replace(plain, num_steps=3)
    weights = reward / "validator" / "model.safetensors"
    whole = weights.read_bytes()
    shutil.copyfile(reward / "single" / "model.safetensors", weights)
    with pytest.raises(PoiseError, match="was begun with other inputs: --validator changed since"):
        train_policy.run(longer)
    weights.write_bytes(whole)
    shutil.move(reward / "validator", tmp_path / "away")
    with pytest.raises(PoiseError, match=r"differs in num_steps, validator"):
        train_policy.run(longer)
    shutil.move(tmp_path / "away", reward / "validator")
    assert [set(row) >= {"validator"} for row in train_policy.run(longer).metrics()] == [True] * 3


@pytest.mark.parametrize(
    ("reward", "validator"),
    [("", ""), ("", "/posterior"), ("/brme", ""), ("/brme", "/single/../brme"), ("/single", "/single/")],
)
def test_the_reward_model_itself_is_no_validator(
    reward: str, validator: str, plain: Config, watched_reward: Path
) -> None:
    run = str(watched_reward)
    with pytest.raises(PoiseError, match=r"^--validator is the reward model itself, which agrees with itself"):
        replace(plain, reward=run + reward, validator=run + validator).check()
    replace(plain, reward=f"{run}/brme", validator=f"{run}/single").check()
