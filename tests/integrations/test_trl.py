"""Contracts with real TRL trainers: rewards as scored by hand, logs that average right, runs that survive a kill."""

import dataclasses
import json
import math
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
import trl
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts import grpo

from conftest import WORDS, rest_slow
from documented_commands import documented
from forked import launched
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional import memory
from poise.functional.monitor import Monitor, MonitorConfig
from poise.functional.objectives import HeadRewards, RewardScale
from poise.integrations import trl_http
from poise.integrations import trl_reward as adapter
from poise.integrations.trl_http import ServedReward, served_reward
from poise.integrations.trl_logs import policy_metrics
from poise.integrations.trl_reward import MonitorCallback, RobustReward, as_sample
from poise.integrations.trl_trainers import TrlSettings, make_trainer, steps_kept, train
from poise.models.chat_format import encode_prompt
from poise.models.loading import load_policy
from poise.models.scorer import Scorer
from poise.policy import train as train_policy
from poise.policy.config import Config as PolicyConfig
from poise.runtime.checkpoints import latest_checkpoint
from trl_runs import PROMPTS, TRL_SETS_A_DEPRECATED_DEFAULT, own_script, settings

TEXTS = ["a good film", "bad", "it is fine , really", "awful awful"]


@pytest.fixture(scope="session")
def reward_run(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> str:
    return str(train_tiny_reward(tiny_model))


def heads_of(folder: str, prompts: list[Any], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(means, stds), (N, K)."""
    heads = Scorer.load(folder)([Sample(prompt, text) for prompt, text in zip(prompts, texts, strict=True)])
    return heads.mean.double().numpy(), heads.std.double().numpy()


def tradeoff(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """0.4 * nominal + 0.6 * worst case."""
    return 0.4 * mean[np.arange(len(mean)), std.argmin(1)] + 0.6 * mean.min(1)


def by_hand(mean: np.ndarray, std: np.ndarray, first: slice = slice(None)) -> np.ndarray:
    """Rewards, standardized on the rows `first`."""
    combined = tradeoff(mean - mean[first].mean(0), std)
    return (combined - combined[first].mean()) / combined[first].std(ddof=1)


def text_of(completion: Any) -> str:
    return (completion if isinstance(completion, str) else completion[0]["content"]) or "."


# ---- the reward alone ----


def test_rewards_equal_those_worked_out_by_hand(reward_run: str) -> None:
    reward = RobustReward.load(reward_run, "tradeoff(0.4)")
    first = reward(prompts=PROMPTS, completions=TEXTS)
    other = reward(prompts=PROMPTS, completions=TEXTS[::-1])  # the scale is that of the first call
    expected = by_hand(*heads_of(reward_run, PROMPTS * 2, TEXTS + TEXTS[::-1]), slice(0, 4))
    np.testing.assert_allclose(first + other, expected, atol=1e-5)
    assert np.std(first, ddof=1) == pytest.approx(1, abs=1e-5)


def test_how_well_the_unit_is_known_is_said_once(reward_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is that of the first call's completions: of two prompts nothing is known of it, of many a fair amount."""
    few, many = RobustReward.load(reward_run), RobustReward.load(reward_run)
    for _ in range(2):
        few([PROMPTS[0]] * 4, TEXTS)
    assert capsys.readouterr().err.count("of too few prompts for an interval") == 1
    many([f"{prompt} {number}" for number in range(16) for prompt in PROMPTS], TEXTS * 16)
    said = capsys.readouterr().err
    assert "unit of the reward" in said
    assert "as little" not in said


def test_the_regret_bonus_goes_to_one_completion_of_each_prompt(reward_run: str) -> None:
    plain, paying = RobustReward.load(reward_run), RobustReward.load(reward_run, regret_bonus=0.25)
    prompts, texts = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, TEXTS[:4]
    before, after = np.array(plain(prompts, texts)), np.array(paying(prompts, texts))
    best = [int(before[:2].argmax()), 2 + int(before[2:].argmax())]  # all texts differ: every share is a half
    np.testing.assert_allclose(after - before, [0.25 * (row in best) for row in range(4)], atol=1e-6)
    assert paying.last is not None
    assert plain.last is not None
    assert torch.equal(paying.last.reward, plain.last.reward)  # what is logged is without it
    with pytest.raises(PoiseError, match=r"^a regret bonus must be at least 0 and finite, got nan$"):
        RobustReward.load(reward_run, regret_bonus=float("nan"))


def test_a_validator_is_watched_and_changes_nothing(reward_run: str, tmp_path: Path) -> None:
    """By hand: gains of means, in stds of the first call's; the ratio to the reward's own gain without its bounds."""
    single = f"{reward_run}/single"
    scale = str(tmp_path / "scale.json")
    plain = RobustReward.load(reward_run, "worst_case", ceiling=0.1)
    reward = RobustReward.load(reward_run, "worst_case", ceiling=0.1, scale=scale, validator=single)
    logged: dict[str, float] = {}

    def log(name: str, value: float) -> None:
        logged[name] = value

    zero, _ = heads_of(reward_run, PROMPTS, TEXTS)
    many = [f"{one} {other}" for one in WORDS for other in WORDS]
    every, _ = heads_of(reward_run, [prompt for prompt in PROMPTS for _ in many], many * 4)
    best = [many[row] for row in (every - zero.mean(0)).min(1).reshape(4, -1).argmax(1)]
    for texts in (TEXTS, best):
        assert reward(PROMPTS, texts, log_metric=log) == plain(PROMPTS, texts)
    first, _ = heads_of(single, PROMPTS, TEXTS)
    then, _ = heads_of(single, PROMPTS, best)
    gain = (then.mean() - first.mean()) / first.std(ddof=1)
    assert logged["poise/validator"] == pytest.approx(gain, abs=1e-5)
    own = (zero - zero.mean(0)).min(1)
    now, _ = heads_of(reward_run, PROMPTS, best)
    proxy = ((now - zero.mean(0)).min(1).mean() - own.mean()) / own.std(ddof=1)
    assert proxy > 1  # below 2 / sqrt(4) there is no ratio
    assert logged["poise/transfer"] == pytest.approx(gain / proxy, abs=1e-4)

    again = RobustReward.load(reward_run, "worst_case", ceiling=0.1, scale=scale, validator=single)
    late = SimpleNamespace(global_step=7)
    for other in (pickle.loads(pickle.dumps(reward)), again):  # a run that goes on has the units of its start
        before = logged.pop("poise/validator")
        other(PROMPTS, best, log_metric=log, trainer_state=late)
        assert logged["poise/validator"] == pytest.approx(before, abs=1e-6)
    Path(f"{scale}.validator").unlink()
    added = RobustReward.load(reward_run, "worst_case", ceiling=0.1, scale=scale, validator=single)
    with pytest.raises(PoiseError, match="scale of step 0 was not kept"):
        added(PROMPTS, TEXTS, trainer_state=late, log_metric=log)


def test_the_validator_of_the_reward_s_run_is_watched(watched_reward: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said in one line, loaded by the first call that logs, and left alone by `validator=None`."""
    own = f"{watched_reward}/validator"
    for place in (str(watched_reward), f"{watched_reward}/single"):
        found = RobustReward.load(place, "mean")
        said = (
            f"validator: {own}, trained with the reward model on other pairs, is watched; validator=None turns it off"
        )
        assert capsys.readouterr().err == f"{said}\n"
        assert found.validator == own
    logged: dict[str, float] = {}
    found(PROMPTS, TEXTS)
    assert (found._watching, logged) == (None, {})
    for texts in (TEXTS, TEXTS[::-1]):
        found(PROMPTS, texts, log_metric=logged.__setitem__)
    means, _ = heads_of(own, PROMPTS * 2, TEXTS + TEXTS[::-1])
    gain = (means[4:].mean() - means[:4].mean()) / means[:4].std(ddof=1)
    assert logged["poise/validator"] == pytest.approx(gain, abs=1e-5)
    off = RobustReward.load(str(watched_reward), "mean", validator=None)
    other = RobustReward.load(str(watched_reward), "mean", validator=f"{watched_reward}/single")
    assert (off.validator, other.validator) == (None, f"{watched_reward}/single")
    assert "validator" not in capsys.readouterr().err
    logged.clear()
    off(PROMPTS, TEXTS, log_metric=logged.__setitem__)
    assert "poise/nominal" in logged
    assert "poise/validator" not in logged
    with pytest.raises(PoiseError, match="is the reward model itself"):
        RobustReward.load(str(watched_reward), validator=f"{watched_reward}/brme")


@TRL_SETS_A_DEPRECATED_DEFAULT
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_train_policy_logs_what_the_validator_says(
    algorithm: str, tiny_model: str, reward_run: str, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    config = PolicyConfig(
        prompts=str(prompts), reward=reward_run, objective="worst_case", validator=f"{reward_run}/single",
        output=str(tmp_path / "run"), model=tiny_model, algorithm=algorithm, num_steps=2, prompts_per_step=2,  # type: ignore[arg-type]
        completions_per_prompt=4, max_tokens=6, adapted_layers=2, lora_rank=4, num_minibatches=1, eval_completions=1,
        learning_rate=3e-2,
    )  # fmt: skip
    out = train_policy.run(config)
    first, then = (row["validator"] for row in out.metrics())
    assert first == pytest.approx(0, abs=1e-6)
    rows = [json.loads(line) for line in (out.folder / "samples.jsonl").read_text().splitlines()]
    means = [
        heads_of(
            f"{reward_run}/single",
            *([row[key] for row in rows if row["step"] == step] for key in ("prompt", "completion")),
        )[0]
        for step in (0, 1)
    ]
    assert then == pytest.approx((means[1].mean() - means[0].mean()) / means[0].std(ddof=1), abs=1e-4)


def test_conversations_count_as_the_text_they_hold(reward_run: str) -> None:
    asked = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    told = [[{"role": "assistant", "content": text}] for text in TEXTS]
    one, other = (RobustReward.load(reward_run)(p, c) for p, c in ((PROMPTS, TEXTS), (asked, told)))
    assert one == pytest.approx(other, abs=1e-5)


def test_completions_of_several_turns_end_in_text() -> None:
    asked = [{"role": "user", "content": "2 + 2?"}]
    called = [{"role": "assistant", "content": "adding"}, {"role": "tool", "content": "4"}]
    answer = {"role": "assistant", "content": "four"}
    assert as_sample(asked, [*called, answer]) == Sample([*asked, *called], "four")
    assert as_sample("2 + 2?", [answer]) == Sample("2 + 2?", "four")
    assert as_sample([{"role": "Human", "content": "2 + 2?"}], [answer | {"role": "gpt"}]) == Sample(asked, "four")
    assert as_sample("2 + 2?", "  ") == Sample("2 + 2?", ".")
    with pytest.raises(PoiseError, match="must end in text by the assistant"):
        as_sample(asked, [answer, asked[0]])


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}


def test_answers_cut_among_the_calls_of_tools_have_no_reward(
    reward_run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reward, logged = RobustReward.load(reward_run), dict[str, float]()
    told = [[{"role": "assistant", "content": text}] for text in TEXTS]
    plain = RobustReward.load(reward_run)(PROMPTS, told)
    cut = [[CALL], [CALL, {"role": "tool", "content": "4"}]]
    found = reward([*PROMPTS[:1], *PROMPTS], [cut[0], *told], log_metric=logged.__setitem__)
    assert found[0] is None
    assert found[1:] == pytest.approx(plain, abs=1e-5)  # they have no part in the scale
    assert logged["poise/unfinished"] == pytest.approx(1 / (len(told) + 1))
    assert reward(PROMPTS[:2], cut) == [None, None]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("end in a tool's call or result, not in text; they get no reward") == 1
    with pytest.raises(PoiseError, match="no completion of the first batch ends in text"):
        RobustReward.load(reward_run)(PROMPTS[:2], cut)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_an_answer_is_said_not_to_be_read(
    name: str, reward_run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL takes it out of what a thinking model wrote; a run must not stop at it."""
    plain = [[{"role": "assistant", "content": text}] for text in TEXTS]
    told = [[turns[0] | {name: "2 and 2"}] for turns in plain]
    reward = RobustReward.load(reward_run)
    found = [reward(PROMPTS, told), reward(PROMPTS, told)]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(f"{len(told)} of {len(told)} completions have reasoning beside their text") == 1
    assert found[0] == RobustReward.load(reward_run)(PROMPTS, plain)
    assert "reasoning" not in capsys.readouterr().err


def test_a_batch_of_no_completion_has_no_reward(reward_run: str) -> None:
    reward, logged = RobustReward.load(reward_run), dict[str, float]()
    for _ in range(2):  # before the scale is known, and after
        assert reward([], [], log_metric=logged.__setitem__) == []
        reward(PROMPTS[:4], TEXTS)
    assert logged == {}


def test_a_pickled_copy_gives_the_same_rewards(reward_run: str) -> None:
    reward = RobustReward.load(reward_run, "lower_confidence(1)")
    expected = reward(PROMPTS, TEXTS)
    kept = pickle.dumps(reward)
    assert len(kept) < 2000  # settings and scale, no weights
    copy = pickle.loads(kept)
    assert copy(PROMPTS[:2], TEXTS[:2]) == pytest.approx(expected[:2], abs=1e-5)
    fresh = pickle.loads(pickle.dumps(RobustReward.load(reward_run, "lower_confidence(1)")))
    assert fresh(PROMPTS, TEXTS) == pytest.approx(expected, abs=1e-5)


def test_the_scale_is_kept_in_its_file(reward_run: str, tmp_path: Path) -> None:
    file = str(tmp_path / "scale.json")
    later = SimpleNamespace(global_step=7)
    with pytest.raises(PoiseError, match=r"from step 7.*scale="):
        RobustReward.load(reward_run)(PROMPTS, TEXTS, trainer_state=later)
    with pytest.raises(PoiseError, match="from step 7"):
        RobustReward.load(reward_run, scale=file)(PROMPTS, TEXTS, trainer_state=later)
    first = RobustReward.load(reward_run, scale=file, ceiling=0.5)
    expected = first(PROMPTS, TEXTS)
    assert max(expected) == 0.5
    again = RobustReward.load(reward_run, scale=file, ceiling=0.5)
    assert again(PROMPTS[2:], TEXTS[2:], trainer_state=later) == pytest.approx(expected[2:], abs=1e-5)
    assert again.fitted == first.fitted
    with pytest.raises(PoiseError, match=r"tradeoff\(0.4\) of 5 heads from -inf to 0.5, not of worst_case"):
        RobustReward.load(reward_run, "worst_case", scale=file)(PROMPTS, TEXTS)
    saved = json.loads(Path(file).read_text())
    Path(file).write_text(json.dumps(saved | {"reward": "0" * 32}))
    with pytest.raises(PoiseError, match="the scale of another reward model") as caught:
        RobustReward.load(reward_run, scale=file, ceiling=0.5)(PROMPTS, TEXTS)
    assert "\n" not in str(caught.value)
    Path(file).write_text(json.dumps({name: value for name, value in saved.items() if name != "reward"}))
    assert RobustReward.load(reward_run, scale=file, ceiling=0.5).saved_scale() == first.fitted  # of an earlier version
    Path(file).write_text("[1]")
    with pytest.raises(PoiseError, match="does not hold the scale"):
        RobustReward.load(reward_run, scale=file)(PROMPTS, TEXTS)


def test_what_is_no_reward_model_of_ours_is_refused(tiny_model: str, reward_run: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_model, num_labels=3)
    config.save_pretrained(tmp_path)
    with pytest.raises(PoiseError, match="3 labels and no `poise` block"):
        RobustReward.load(str(tmp_path))
    with pytest.raises(PoiseError, match="unknown objective"):
        RobustReward.load(reward_run, "best")


# ---- in a script of TRL's own ----


@TRL_SETS_A_DEPRECATED_DEFAULT
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
@pytest.mark.parametrize("kind", rest_slow(["standard", "conversational"]))
def test_trl_trains_on_the_rewards_scored_by_hand(
    algorithm: str, kind: str, tiny_model: str, reward_run: str, tmp_path: Path
) -> None:
    reward = RobustReward.load(reward_run)
    rows = PROMPTS if kind == "standard" else [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    trainer = own_script(algorithm, reward, tiny_model, tmp_path, rows, beta=0.0)
    batches = []

    class Keep(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            logs = trainer._logs  # what TRL gathered from all processes: the last batch
            columns = (logs["prompt"], logs["completion"], logs["rewards"]["RobustReward"])
            batches.append([list(column) for column in (*columns, logs["extra"]["nominal_head"])])

    trainer.add_callback(Keep())
    trainer.train()
    assert [len(batch[0]) for batch in batches] == [8, 8]
    prompts, completions, rewards, routed = ([*one, *two] for one, two in zip(*batches, strict=True))
    mean, std = heads_of(reward_run, prompts, [text_of(completion) for completion in completions])
    np.testing.assert_allclose(rewards, by_hand(mean, std, slice(0, 8)), atol=1e-5)
    assert routed == std.argmin(1).tolist()

    centered = mean - mean[:8].mean(0)
    second = [row for row in trainer.state.log_history if "reward" in row][1]
    nominal = centered[np.arange(16), std.argmin(1)]
    assert second["reward"] == pytest.approx(np.mean(rewards[8:]), abs=1e-5)
    assert second["rewards/RobustReward/mean"] == second["reward"]
    for name, values in {
        "nominal": nominal, "worst_case": centered.min(1), "gap": nominal - centered.min(1), "routing_std": std.min(1),
        "disagreement": centered.std(1), "head_3": centered[:, 3],
    }.items():  # fmt: skip
        assert second[f"poise/{name}"] == pytest.approx(values[8:].mean(), abs=1e-5), name
    halves = [np.bincount(std[part].argmin(1)).max() for part in (slice(8, 12), slice(12, 16))]  # two prompts of four
    assert second["poise/switches"] == pytest.approx(1 - sum(halves) / 8)


@TRL_SETS_A_DEPRECATED_DEFAULT
def test_logs_average_over_accumulation_and_generation_batches(
    tiny_model: str, reward_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates of two accumulated batches a generation, two generations a log line: a plain mean of both."""
    said: list[dict[str, float]] = []

    def recorded(*arguments: Any) -> dict[str, float]:
        said.append(original(*arguments))
        return said[-1]

    original = adapter.statistics
    monkeypatch.setattr(adapter, "statistics", recorded)
    trainer = own_script(
        "grpo", RobustReward.load(reward_run), tiny_model, tmp_path, PROMPTS, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, steps_per_generation=4, max_steps=4, logging_steps=4,
    )  # fmt: skip
    trainer.train()
    assert len(said) == 2
    assert said[0]["gap"] != said[1]["gap"]
    (row,) = (row for row in trainer.state.log_history if "reward" in row)
    for name in ("nominal", "gap", "disagreement", "switches", "variety", "head_0"):
        assert row[f"poise/{name}"] == pytest.approx((said[0][name] + said[1][name]) / 2, abs=1e-6), name


def script_of_two(model: str, reward_model: str, folder: Path) -> None:
    """What a user of TRL would start by `torchrun`; it writes down what it was asked and what TRL logged."""
    reward = RobustReward.load(reward_model, scale=str(folder / "scale.json"))
    coupled = RobustReward.load(reward_model, "expected_tradeoff(0.4)", scale=str(folder / "coupled.json"))
    calls = []

    def recorded(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        rewards = reward(prompts, completions, **columns)
        calls.append((prompts, completions, rewards, coupled(prompts, completions)))
        return rewards

    policy, tokenizer = load_policy(model)
    arguments = trl.GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=8, max_completion_length=6, max_steps=2,
        logging_steps=1, learning_rate=1e-3, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[:2]])
    trainer = trl.GRPOTrainer(policy, recorded, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps([calls, logged]))
    assert torch.distributed.get_world_size() == 2
    torch.distributed.destroy_process_group()


@TRL_SETS_A_DEPRECATED_DEFAULT
@pytest.mark.slow
def test_two_processes_give_the_rewards_of_one(tiny_model: str, reward_run: str, tmp_path: Path) -> None:
    """Each prompt's completions lie on both processes, and one of the objectives couples all of a batch."""
    coupled = RobustReward.load(reward_run, "expected_tradeoff(0.4)", scale=str(tmp_path / "coupled.json"))
    coupled(PROMPTS, TEXTS)
    launched(2, lambda: script_of_two(tiny_model, reward_run, tmp_path), tmp_path)
    (first, logged), (second, _) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert len(first) == len(second) == len(logged) == 2
    one = RobustReward.load(reward_run)
    for row, here, there in zip(logged, first, second, strict=True):
        prompts, completions, rewards, in_batch = ([*a, *b] for a, b in zip(here, there, strict=True))
        assert len(set(prompts)) == 1
        assert rewards == pytest.approx(one(prompts, completions), abs=1e-5)
        assert in_batch == pytest.approx(coupled(prompts, completions), abs=1e-5)
        assert row["reward"] == pytest.approx(np.mean(rewards), abs=1e-5)
        assert one.last is not None
        routed = one.last.heads.std.argmin(1).tolist()
        assert row["poise/switches"] == pytest.approx(1 - max(map(routed.count, routed)) / 8)
    saved = json.loads((tmp_path / "scale.json").read_text())
    assert one.fitted is not None
    assert saved["head_baseline"] == pytest.approx(one.fitted.head_baseline, abs=1e-5)


# ---- as poise train-policy runs it ----


def run(
    how: TrlSettings, model: str, reward: str, folder: Path, stop_at: int = -1, **more: Any
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def on_step(row: dict[str, Any]) -> None:
        if row["step"] == stop_at:
            raise KeyboardInterrupt
        rows.append(row)

    train(how, RobustReward.load(reward), *load_policy(model), PROMPTS, folder, on_step, **more)
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_an_interrupted_run_ends_as_a_whole_one(
    algorithm: str, tiny_model: str, reward_run: str, tmp_path: Path
) -> None:
    how = settings(algorithm)
    whole = run(how, tiny_model, reward_run, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(how, tiny_model, reward_run, tmp_path / "again", stop_at=2)
    assert steps_kept(how, tmp_path / "again") == 2
    after = run(how, tiny_model, reward_run, tmp_path / "again")
    assert after == whole[2:]
    reward = RobustReward.load(reward_run)
    train(how, reward, *load_policy(tiny_model), PROMPTS, tmp_path / "again", pytest.fail)  # nothing left to do
    assert reward.fitted is not None
    one, other = (load_file(tmp_path / name / "policy" / "adapter_model.safetensors") for name in ("whole", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    checkpoint = latest_checkpoint(tmp_path / "whole" / "trainer")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-12"  # 3 steps of 2 epochs of 2 minibatches
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json", ".md"}  # nothing pickled

    assert [row["step"] for row in whole] == [0, 1, 2]
    expected = {
        "step", "reward", "reward_std", "kl", "entropy", "tokens", "ended", "heads", "nominal", "worst_case", "gap",
        "disagreement", "routing_std", "switches", "repetition", "variety", "truncated", "policy_loss", "grad_norm",
        "clipped", "samples", "distance", "kl_k3",
    }  # fmt: skip
    assert all(row.keys() == expected for row in whole)
    for row in whole:
        assert len(row["samples"]) == 8
        assert len({json.dumps(sample["prompt"]) for sample in row["samples"]}) == 2
        assert np.mean([sample["reward"] for sample in row["samples"]]) == pytest.approx(row["reward"], abs=1e-6)
        assert row["gap"] == pytest.approx(row["nominal"] - row["worst_case"], abs=1e-5)
    assert whole[0]["kl"] == whole[0]["kl_k3"] == 0  # of the policy that sampled, before any update
    assert whole[2]["kl_k3"] > 0
    policy, _ = load_policy(tiny_model)
    adapted = peft.PeftModel.from_pretrained(policy, str(tmp_path / "whole" / "policy"))
    names = {name.split(".")[4] for name in adapted.state_dict() if "lora_B" in name}
    assert names == {"1", "2"}  # the upper two of three layers


@pytest.mark.slow
def test_the_kl_coefficient_holds_the_policy(tiny_model: str, reward_run: str, tmp_path: Path) -> None:
    """And the KL is known where it is not penalized."""
    far, near = (
        run(settings("grpo", kl_coef=kl_coef), tiny_model, reward_run, tmp_path / str(kl_coef))[-1]["kl"]
        for kl_coef in (0.0, 10.0)
    )
    assert far > 0.3
    assert near < far / 3


def test_what_cannot_be_trained_is_one_line(tiny_model: str, reward_run: str, tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match="must be at least 2"):
        settings(completions_per_prompt=1)
    with pytest.raises(PoiseError, match="2 prompts with 4 completions do not divide into --num-minibatches 3"):
        settings(num_minibatches=3)
    with pytest.raises(PoiseError, match="4 prompts are fewer"):
        run(settings(prompts_per_step=5, num_minibatches=1), tiny_model, reward_run, tmp_path)
    with pytest.raises(PoiseError, match="exceed the model's context of 256"):
        run(settings(max_tokens=250), tiny_model, reward_run, tmp_path)


@TRL_SETS_A_DEPRECATED_DEFAULT
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
@pytest.mark.parametrize("ends", rest_slow([(2, 20, 30, 40), ()]))
def test_completions_end_where_ppos_end(
    algorithm: str, ends: tuple[int, ...], tiny_model: str, reward_run: str, tmp_path: Path
) -> None:
    """Sampled, scored, trained on: up to the first end token of several, or to the longest length without any."""
    model, tokenizer = load_policy(tiny_model)
    model.generation_config.eos_token_id = list(ends) or None
    if not ends:
        tokenizer.eos_token, tokenizer.chat_template = None, None
    how = settings(algorithm, completions_per_prompt=16, max_tokens=12, num_minibatches=1, num_epochs=1)
    trainer = make_trainer(how, RobustReward.load(reward_run), model, tokenizer, PROMPTS, tmp_path)
    batches = []

    def kept(inputs: Any) -> Any:
        batches.append(original(inputs))
        return batches[-1]

    original = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = kept
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    assert len(batches) == len(logged) == 3
    seen = set()
    for batch, row in zip(batches, logged, strict=True):
        ended = 0
        for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True):
            own = ids[mask.bool()].tolist()
            at = [token in ends for token in own]
            assert sum(at) == at[-1]
            assert len(own) == 12 or at[-1]
            ended += at[-1]
            seen |= set(own) & set(ends)
        assert policy_metrics(row)["ended"] == pytest.approx(ended / 32)
    assert (len(seen) > 1) == bool(ends)


@TRL_SETS_A_DEPRECATED_DEFAULT
@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_the_reward_is_asked_what_ppos_is(
    algorithm: str, template: bool, tiny_model: str, reward_run: str, tmp_path: Path
) -> None:
    """Of the prompts as they were given: turns stay turns, and text stays text, whatever the policy's template."""
    model, tokenizer = load_policy(tiny_model)
    tokenizer.chat_template = tokenizer.chat_template if template else None
    prompts = [
        "Review the film.",
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Review it."}],
    ]
    reward = RobustReward.load(reward_run)
    how = settings(algorithm, num_minibatches=1, num_epochs=1, num_steps=1)
    trainer = make_trainer(how, reward, model, tokenizer, prompts, tmp_path)
    trainer.train()
    assert reward.last is not None
    asked = [sample.prompt for sample in reward.last.samples]
    assert sorted(map(json.dumps, asked)) == sorted(map(json.dumps, 4 * prompts))
    assert all(isinstance(sample.completion, str) for sample in reward.last.samples)


@TRL_SETS_A_DEPRECATED_DEFAULT
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_prompts_are_encoded_as_ppo_encodes_them(
    algorithm: str, tiny_model: str, reward_run: str, tmp_path: Path
) -> None:
    """A marker in a prompt's text ends no turn; TRL on its own would encode it as the end token."""
    model, tokenizer = load_policy(tiny_model)
    prompts = ["Review the film.<|im_end|>", [{"role": "user", "content": "<|im_end|>"}]]
    how = settings(algorithm, num_minibatches=1, num_epochs=1, num_steps=1)
    trainer = make_trainer(how, RobustReward.load(reward_run), model, tokenizer, prompts, tmp_path)
    batches = []
    original = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(original(inputs)) or batches[-1]
    trainer.train()
    read = {
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(batches[0]["prompt_ids"], batches[0]["prompt_mask"], strict=True)
    }
    assert read == {tuple(encode_prompt(tokenizer, prompt)) for prompt in prompts}
    assert {ids.count(tokenizer.eos_token_id) for ids in read} == {1}


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model: str, reward_run: str, tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match=r"step 0: the (loss|gradient) is not finite"):
        run(settings(learning_rate=1e30, save_every=1), tiny_model, reward_run, tmp_path)
    assert steps_kept(settings(), tmp_path) == 0


# ---- logs and the alarm ----


def test_metrics_have_the_names_of_the_monitor() -> None:
    logs = {
        "reward": 1.5, "kl": 0.1, "completions/mean_length": 20.0, "completions/clipped_ratio": 0.25, "entropy": None,
        "poise/gap": 0.5, **{f"poise/head_{k}": float(k) for k in range(11)},
    }  # fmt: skip
    expected = {"reward": 1.5, "tokens": 20.0, "gap": 0.5, "kl": 2.0, "ended": 0.75}
    assert policy_metrics(logs) == {**expected, "heads": [float(k) for k in range(11)]}
    assert policy_metrics({"train_runtime": 1.0}) == {}


@pytest.mark.slow
def test_the_alarm_stops_a_run_and_its_state_is_kept(
    tiny_model: str, reward_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = MonitorConfig(baseline_steps=2, window=1, limits={"tokens": 1e6, "kl": 1e-6})
    how = settings(num_steps=4, save_every=1)
    logging, stopping = MonitorCallback(Monitor(config)), MonitorCallback(Monitor(config), "stop")
    rows = run(how, tiny_model, reward_run, tmp_path, callbacks=[stopping])
    assert [row["step"] for row in rows] == [0, 1, 2]  # two steps say what is normal, the third is beyond it
    assert stopping.reading.score == pytest.approx((2 * rows[2]["kl"]) ** 0.5 * 1e6)
    assert capsys.readouterr().err.count("signs of over-optimization") == 1

    checkpoint = latest_checkpoint(tmp_path / "trainer")
    assert checkpoint is not None
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["MonitorCallback"]
    assert saved["attributes"]["monitor"] == stopping.monitor.state()
    assert MonitorCallback.from_state(saved).state() == stopping.state()
    run(how, tiny_model, reward_run, tmp_path, callbacks=[logging])  # goes on where the other stopped
    assert logging.monitor.state()["steps"] == 4


def alarmed(action: Any, rewards: list[float]) -> tuple[MonitorCallback, list[bool]]:
    """A callback after these steps, whose KL is 0 at first, and very large after the sixth; did it ask to stop?"""
    callback, stops = MonitorCallback(Monitor(MonitorConfig(threshold=1.0)), action), []
    for step, reward in enumerate(rewards):
        control = SimpleNamespace(should_training_stop=False)
        logs = {"reward": reward, "kl": 1e6 if step > 5 else 0.0, "completions/mean_length": 10.0}
        callback.on_log(None, SimpleNamespace(global_step=step, is_world_process_zero=True), control, logs)
        stops.append(control.should_training_stop)
    return callback, stops


@pytest.mark.parametrize("action", ["log", "stop"])
def test_an_alarm_is_said_once_and_stops_if_it_should(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    callback, stops = alarmed(action, [0.0] * 8)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("signs of over-optimization") == 1
    assert "step 6: signs of over-optimization, score" in said
    assert callback.reading.alarm
    assert stops == [False] * 6 + [action == "stop"] * 2
    callback.on_log(None, SimpleNamespace(global_step=9), None, {"eval_loss": 1.0})  # no step of training


def test_a_callback_goes_on_with_the_monitor_of_its_checkpoint() -> None:
    whole, _ = alarmed("log", [0.0] * 8)
    kept = {"MonitorCallback": json.loads(json.dumps(whole.state()))}
    later, fresh = (MonitorCallback(Monitor(MonitorConfig(threshold=1.0))) for _ in range(2))
    later.on_train_begin(None, SimpleNamespace(stateful_callbacks=kept, global_step=8), None)
    fresh.on_train_begin(None, SimpleNamespace(stateful_callbacks=kept, global_step=0), None)
    assert later.monitor.state() == whole.monitor.state()
    assert fresh.monitor.state() == Monitor(MonitorConfig(threshold=1.0)).state()


def test_a_reward_that_is_not_finite_names_its_text() -> None:
    scorer: Any = Scorer.__new__(Scorer)
    heads = HeadRewards(torch.tensor([[1.0], [math.nan]]), torch.zeros(2, 1))
    reward = RobustReward("rm", "mean", "", 0, -math.inf, math.inf)
    reward._scorer = scorer
    scorer.extract = SimpleNamespace(num_truncated=0)
    reward.fitted = RewardScale((0.0,), 0.0, 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "__call__", lambda *_: heads)
        with pytest.raises(PoiseError, match=r"the reward of .*'an odd text'.* is not finite"):
            reward(["p", "p"], ["fine", "an odd text"])


def test_without_trl_its_algorithms_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    grpo = PolicyConfig(algorithm="grpo")
    known = {field.name: getattr(grpo, field.name) for field in dataclasses.fields(TrlSettings)}
    with pytest.raises(PoiseError, match=r"^--algorithm grpo needs TRL: pip install 'poise-rlhf\[trl\]'$"):
        TrlSettings(**known)


@pytest.mark.parametrize(
    ("prompt", "completion", "turns", "text"),
    [
        ("p", "c", "p", "c"),
        ("p", [{"role": "assistant", "content": "c"}], "p", "c"),
        (
            "p", [{"role": "assistant", "content": "call"}, {"role": "tool", "content": "4"},
                  {"role": "assistant", "content": "c"}],
            [{"role": "user", "content": "p"}, {"role": "assistant", "content": "call"},
             {"role": "tool", "content": "4"}], "c",
        ),
    ],
)  # fmt: skip
def test_a_served_reward_is_asked_for_the_last_turn(prompt: Any, completion: Any, turns: Any, text: str) -> None:
    reward, asked, logged = ServedReward("http://127.0.0.1:9"), [], {}
    reward.client.score = lambda *given: asked.append(given) or [{"reward": 0.5, "mean": [0.75], "std": [0.25]}]  # type: ignore[method-assign]
    assert reward([prompt], [completion]) == [0.5]
    assert asked == [(turns, [text])]
    assert reward([prompt], [completion], log_metric=logged.__setitem__) == [0.5]
    unfinished = {} if isinstance(completion, str) else {"poise/unfinished": 0.0}
    assert logged == {"poise/reward": 0.5, "poise/head_0": 0.75, "poise/head_std_0": 0.25} | unfinished


def test_groups_of_a_served_reward_are_asked_for_together() -> None:
    """A server that fits its scale to 64 texts had eight of them, and the other groups waited for its answer."""
    reward, all_there = ServedReward("http://127.0.0.1:9"), threading.Barrier(3)

    def score(prompt: str, texts: list[str]) -> list[dict[str, Any]]:
        all_there.wait(10)
        return [{"reward": float(prompt + text), "mean": [], "std": []} for text in texts]

    reward.client.score = score  # type: ignore[method-assign]
    assert reward(["1", "1", "2", "3"], ["1", "2", "1", "1"]) == [11.0, 12.0, 21.0, 31.0]


def test_the_documented_command_is_read_by_trls_and_accelerates_parsers() -> None:
    words = documented("TRL")
    assert words[:2] == ["trl", "grpo"]
    given, of_launcher = grpo.make_parser().parse_known_args(words[2:])
    launch = launch_command_parser().parse_args([*resolve_accelerate_config_argument(of_launcher), "grpo.py"])
    assert (given.vllm_mode, launch.num_processes, Path(launch.config_file).name) == ("colocate", 8, "fsdp2.yaml")
    [path] = given.reward_funcs
    assert path == f"{served_reward.__module__}.{served_reward.__name__}"


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({"role": "user", "content": "4"}, "a completion must end in text by the assistant, not in a turn of user"),
        ({"role": "assistant", "content": [{"type": "x"}]}, "turn 2 of 'completion' holds something other than text"),
    ],
)
def test_a_served_reward_takes_text_of_the_assistant_alone(last: dict[str, Any], said: str) -> None:
    with pytest.raises(PoiseError, match=f"^{said}$"):
        ServedReward("http://127.0.0.1:9")(["p"], [[{"role": "assistant", "content": "call"}, last]])


def test_a_served_reward_is_not_asked_for_answers_without_an_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trl_http, "_said", set())
    reward, asked, logged = ServedReward("http://127.0.0.1:9"), [], {}
    reward.client.score = lambda *given: asked.append(given) or [{"reward": 0.5, "mean": [0.75], "std": [0.25]}]  # type: ignore[method-assign]
    batch = [[CALL], [{"role": "assistant", "content": "c"}], [CALL, {"role": "tool", "content": "4"}]]
    for _ in range(2):
        assert reward(["p"] * 3, batch, log_metric=logged.__setitem__) == [None, 0.5, None]
    assert asked == [("p", ["c"])] * 2
    assert logged["poise/unfinished"] == pytest.approx(2 / 3)
    assert [line for line in caplog.messages if "2 of 3 completions end in a tool's call" in line] == caplog.messages
    assert len(caplog.messages) == 1


@TRL_SETS_A_DEPRECATED_DEFAULT
@pytest.mark.parametrize("algorithm", rest_slow(["grpo", "rloo"]))
def test_completions_are_sampled_in_turns_that_fit(
    algorithm: str, tiny_model: str, reward_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bound of three completions eight are sampled in three turns; each stays with its prompt."""
    how, (model, tokenizer) = settings(algorithm, num_steps=1), load_policy(tiny_model)
    trainer = make_trainer(how, RobustReward.load(reward_run), model, tokenizer, PROMPTS, tmp_path)
    cache = model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    assert 5 * trainer.token_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    row = (max(len(encode_prompt(tokenizer, prompt)) for prompt in PROMPTS) + how.max_tokens) * trainer.token_bytes
    monkeypatch.setattr(memory, "SAMPLED_AT_ONCE", 3 * row + 1)
    seen, batches = [], []
    generate, score = trainer.model.generate, trainer._generate_and_score_completions

    def counted(**named: Any) -> Any:
        seen.append(generate(**named))
        return seen[-1]

    trainer.model.generate = counted
    trainer._generate_and_score_completions = lambda inputs: batches.append(score(inputs)) or batches[-1]
    trainer.train()
    assert [len(turn) for turn in seen] == [3, 3, 2]
    batch, generated = batches[0], [row.tolist() for turn in seen for row in turn]
    for i, row in enumerate(generated):
        written = [
            batch[f"{part}_ids"][i][batch[f"{part}_mask"][i].bool()].tolist() for part in ("prompt", "completion")
        ]
        assert len(written[1]) > 0
        assert str(written[0] + written[1])[1:-1] in str(row)
