"""The Python API: the commands' numbers without a folder, rows in memory, rewards for TRL and PPO, nothing lost."""

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import yaml

import poise
from poise import HeadRewards, PolicyConfig, PolicyTrainer, RewardConfig, RewardModel, RewardTrainer, Sample, Scorer
from poise.api.trainers import TrainedPolicy
from poise.errors import PoiseError
from poise.functional.objectives import mean
from poise.integrations.trl_reward import RobustReward, name_of
from poise.policy import train as train_policy
from poise.reward import push
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Run

SMALL = RewardConfig(
    num_layers=2, trunk="frozen", posterior_heads=6, head_steps=60, feature_cache=False, max_length=1024
)
POLICY = PolicyConfig(
    num_steps=2, prompts_per_step=2, completions_per_prompt=4, max_tokens=8, adapted_layers=2, lora_rank=4,
    baseline_completions=16, save_every=2, eval_completions=2, learning_rate=1e-2,
)  # fmt: skip
KINDS = ("single", "ensemble", "posterior", "brme")
TEXTS = [Sample("Review a film.", "a good film"), Sample("Review a film.", "awful"), Sample("Say.", "fine it is")]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run_folder(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> Path:
    return train_tiny_reward(tiny_model)


@pytest.fixture(scope="module")
def rm(run_folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(run_folder)


def equal(one: HeadRewards, other: HeadRewards) -> bool:
    return torch.equal(one.mean, other.mean) and torch.equal(one.std, other.std)


# ---- reward models ----


def test_every_public_name_imports() -> None:
    assert all(getattr(poise, name) is not None for name in poise.__all__)


def test_a_run_is_one_model_of_every_kind_on_one_trunk(rm: RewardModel, run_folder: Path) -> None:
    assert rm.kinds == KINDS
    assert rm.kind == "brme"
    for kind in KINDS:
        assert equal(rm.heads(kind).scorer(TEXTS), Scorer.load(str(run_folder / kind))(TEXTS)), kind
    assert len({id(rm.heads(kind).scorer.extract) for kind in KINDS}) == 1
    assert rm.heads("posterior").scorer.last_layer is not None
    assert rm.results["brme"]["num_heads"] == 5
    with pytest.raises(PoiseError, match="no heads 'mean' in this reward model; it has single, ensemble"):
        rm.heads("mean")


def test_a_notebook_shows_a_model_in_one_line(rm: RewardModel, run_folder: Path) -> None:
    known = json.loads((run_folder / "results.json").read_text())["models"]["single"]["validation_accuracy"]
    assert f"single (1 heads, {known:.1%} of validation pairs)" in repr(rm)
    trained = TrainedPolicy(torch.nn.Linear(2, 2), None, [{}] * 3, {"reward": 0.5, "kl": 2.0}, [])  # type: ignore[arg-type]
    assert repr(trained) == "TrainedPolicy: Linear, 3 steps, reward +0.50, KL 2.0"


def test_kinds_with_other_trunks_keep_them(run_folder: Path, tmp_path: Path) -> None:
    """Equal heads say nothing of the trunk beneath: each file of weights is compared."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(run_folder, tmp_path / "run")
    weights = tmp_path / "run" / "single" / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight"))
    save_file(tensors | {name: tensors[name] * 1.5}, weights, metadata={"format": "pt"})
    moved = RewardModel.from_pretrained(tmp_path / "run")
    assert moved.heads("single").scorer.extract is not moved.scorer.extract
    assert not equal(moved.heads("single").scorer(TEXTS), Scorer.load(str(run_folder / "single"))(TEXTS))


def test_score_takes_prompts_rows_data_sets_and_files(rm: RewardModel, tmp_path: Path) -> None:
    expected = rm.scorer(TEXTS)
    assert equal(rm.score("Review a film.", ["a good film", "awful"]), HeadRewards(*(p[:2] for p in expected)))
    assert rm.score("Say.", "fine it is").mean.shape == (1, 5)
    rows = [{"prompt": text.prompt, "completion": text.completion} for text in TEXTS]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for given in (rows, datasets.Dataset.from_list(rows), file, str(file)):
        assert equal(rm.score(given), expected)
    turns = [{"role": "user", "content": "Review a film."}]
    answer = [{"role": "assistant", "content": "awful"}]
    assert equal(rm.score(turns, [answer]), rm.score(turns, "awful"))
    assert equal(rm.score(turns, answer), rm.score(turns, "awful"))
    with pytest.raises(PoiseError, match=r"^samples, row 2: 'completion' is empty$"):
        rm.score("Say.", ["a", " "])
    with pytest.raises(PoiseError, match="row 1 of samples is of type int"):
        rm.score([3])


def test_a_saved_model_comes_back_with_all_its_heads(rm: RewardModel, tmp_path: Path) -> None:
    rm.heads("posterior").save_pretrained(tmp_path / "rm")
    again = RewardModel.from_pretrained(tmp_path / "rm")
    assert again.kind == "posterior"
    assert set(again.kinds) == set(KINDS)
    for kind in KINDS:
        assert equal(again.heads(kind).scorer(TEXTS), rm.heads(kind).scorer(TEXTS)), kind
        assert (again.heads(kind).scorer.last_layer is None) == (kind != "posterior")
    assert equal(Scorer.load(str(tmp_path / "rm"))(TEXTS), rm.heads("posterior").scorer(TEXTS))  # plain, to all others
    with pytest.raises(PoiseError, match="exists; choose another folder"):
        rm.save_pretrained(tmp_path / "rm")
    heads = tmp_path / "rm" / "poise" / "heads.json"
    heads.write_text(heads.read_text().replace('"num_heads": 5', '"num_heads": 4'))
    with pytest.raises(PoiseError, match="poise block says 4"):
        RewardModel.from_pretrained(tmp_path / "rm")


def test_push_to_hub_uploads_all_heads(rm: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[str] = []

    class Hub:
        def create_repo(self, repo: str, **_: Any) -> str:
            return f"https://hub/{repo}"

        def upload_folder(self, *, allow_patterns: list[str], **_: Any) -> None:
            uploaded.extend(allow_patterns)

    monkeypatch.setattr(push, "HfApi", Hub)
    monkeypatch.setattr(push, "get_token", lambda: "token")
    assert rm.push_to_hub("me/rm") == "https://hub/me/rm"
    assert {"config.json", "model.safetensors", "poise/heads.json", "poise/heads.safetensors"} <= set(uploaded)


# ---- rewards ----


def test_an_objective_reads_the_heads_it_was_made_for(
    rm: RewardModel, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for objective, kind in (("lower_confidence(1)", "posterior"), ("tradeoff(0.4)", "brme"), ("mean", "brme")):
        assert rm.reward(objective).path == str(run_folder / kind)
        assert f"of the {kind} heads" in " ".join(capsys.readouterr().err.split())
    assert rm.heads("single").reward("nominal").path == str(run_folder / "single")
    assert rm.heads("brme").reward("lower_confidence(1)").path == str(run_folder / "brme")
    assert not capsys.readouterr().err
    with pytest.raises(PoiseError, match="reads the head with the lowest std"):
        rm.heads("posterior").reward("tradeoff(0.4)")


def test_a_reward_is_the_one_that_trl_gets_from_the_folder(rm: RewardModel, run_folder: Path) -> None:
    prompts = ["Review a film."] * 3
    texts = ["a good film", "awful", "it is fine"]
    loaded = RobustReward.load(str(run_folder / "posterior"), "lower_confidence(1)", ceiling=0.5)
    made = rm.reward("lower_confidence(1)", ceiling=0.5)
    assert made(prompts, texts) == loaded(prompts, texts)
    assert max(made(prompts, texts)) <= 0.5


def test_an_objective_may_be_a_function(rm: RewardModel) -> None:
    prompts, texts = ["Say."] * 2, ["good", "awful"]
    by_name, by_function = rm.heads("brme").reward("mean"), rm.heads("brme").reward(mean)
    assert by_function(prompts, texts) == by_name(prompts, texts)
    assert by_function.objective == name_of(mean) == "poise.functional.objectives.mean"
    first = rm.reward(lambda heads: heads.mean[..., 0])
    assert "<lambda>" in first.objective
    assert first(prompts, texts)[0] == pytest.approx(-first(prompts, texts)[1])


def test_a_reward_in_memory_takes_its_model_along(rm: RewardModel, tmp_path: Path) -> None:
    """A copy of a model whose folder is gone must not look for it."""
    reward = rm.in_memory().reward("mean", scale=str(tmp_path / "scale.json"))
    copy = pickle.loads(pickle.dumps(reward))
    prompts, texts = ["Say."] * 2, ["good", "awful"]
    assert copy(prompts, texts) == reward(prompts, texts)
    other = rm.heads("ensemble").in_memory().reward("mean", scale=str(tmp_path / "scale.json"))
    with pytest.raises(PoiseError, match="scale of another reward model"):
        other(prompts, texts)


# ---- training reward models ----


def test_a_trainer_gives_the_command_s_model(
    preferences_file: Path, tiny_model: str, rm: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(preferences_file)
    for row in rows:  # columns of a data set have one type
        row["prompt"] = (
            row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        )
    monkeypatch.chdir(tmp_path)
    trainer = RewardTrainer(tiny_model, train_dataset=datasets.Dataset.from_list(rows), args=SMALL)
    trained = trainer.train()
    assert not list(tmp_path.iterdir())  # no folder was asked for
    assert trainer.results["num_preferences"] == len(rows)
    assert trained.path == ""
    for kind in KINDS:
        assert equal(trained.heads(kind).scorer(TEXTS), rm.heads(kind).scorer(TEXTS)), kind
    assert trained.results["single"] == rm.results["single"]


@pytest.mark.slow
def test_a_kept_run_is_the_command_s(preferences_file: Path, tiny_model: str, tmp_path: Path) -> None:
    rows = rows_of(preferences_file)
    args = dataclasses.replace(SMALL, output=str(tmp_path / "rm"))
    trained = RewardTrainer(tiny_model, rows, args).train()
    assert trained.path == str(tmp_path / "rm" / "brme")
    kept = yaml.safe_load((tmp_path / "rm" / "config.yaml").read_text())
    assert kept["preferences"] == str(tmp_path / "rm" / "train_dataset.jsonl")
    assert (tmp_path / "rm" / "brme" / "README.md").exists()
    RewardTrainer(tiny_model, rows, args).train()  # a finished run is returned
    with pytest.raises(PoiseError, match="was begun with another train_dataset; choose another output"):
        RewardTrainer(tiny_model, rows[1:], args).train()


def test_a_bad_row_is_named_by_its_number(preferences_file: Path, tiny_model: str) -> None:
    rows = rows_of(preferences_file)
    rows[2] = {"prompt": "Say.", "chosen": "", "rejected": "a"}
    with pytest.raises(PoiseError, match=r"^train_dataset, row 3: 'chosen' is empty"):
        RewardTrainer(tiny_model, rows, SMALL).train()


@pytest.mark.slow
def test_rows_set_aside_are_kept(preferences_file: Path, tiny_model: str) -> None:
    rows = rows_of(preferences_file)
    rows[2] = {"prompt": "Say.", "chosen": "", "rejected": "a"}
    trainer = RewardTrainer(tiny_model, rows, dataclasses.replace(SMALL, on_bad_row="skip"))
    trainer.train()
    assert [row["line"] for row in trainer.bad_rows] == [3]
    assert trainer.results["num_preferences"] == len(rows) - 1


def test_what_a_trainer_lacks_is_said(tiny_model: str) -> None:
    with pytest.raises(PoiseError, match=r"^train_dataset is missing"):
        RewardTrainer(tiny_model).train()
    with pytest.raises(PoiseError, match=r"^reward is missing"):
        PolicyTrainer(tiny_model, prompts=["Say."]).train()
    with pytest.raises(PoiseError, match=r"^args\.batch_size 3 is no multiple of args\.device_batch_size"):
        RewardTrainer(tiny_model, [], RewardConfig(trunk="lora", batch_size=3)).train()
    with pytest.raises(PoiseError, match=r"two models: a and args\.model b"):
        RewardTrainer("a", [], RewardConfig(model="b"))


# ---- training policies ----


def test_a_policy_trained_in_memory_is_the_command_s(
    rm: RewardModel,
    run_folder: Path,
    prompts_file: Path,
    tiny_model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    bounds = {"reward_ceiling": 2.0, "objective": "lower_confidence(1)"}
    prompts = [row["prompt"] for row in rows_of(prompts_file)]
    trained = PolicyTrainer(
        tiny_model, rm.in_memory().reward("lower_confidence(1)", ceiling=2), prompts, POLICY
    ).train()
    assert not list(tmp_path.iterdir())
    command = dataclasses.replace(
        POLICY, model=tiny_model, prompts=str(prompts_file), reward=str(run_folder / "posterior"),
        output=str(tmp_path / "policy"), **bounds,
    )  # fmt: skip
    out = train_policy.run(command)
    losses = ("reward", "kl", "policy_loss", "heads")
    assert [[row[name] for name in losses] for row in trained.metrics] == [
        [row[name] for name in losses] for row in out.metrics()
    ]
    assert trained.completions == list(read_rows(out.folder / "final.jsonl"))
    # Plain transformers and PEFT: the same weights, and generation.
    ids = trained.tokenizer("Review", return_tensors="pt")
    written = trained.model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert written.shape[1] > ids["input_ids"].shape[1]
    trained.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "base.json").read_text() == (out.folder / "policy" / "base.json").read_text()
    trained.save_pretrained(tmp_path / "mine")  # a cell that is run again
    for other in (run_folder / "brme", run_folder, tiny_model, run_folder / "config.yaml"):
        before = sorted(Path(other).glob("*"))
        with pytest.raises(PoiseError, match=r"(reward|one) model|a file|train-reward.*choose another folder"):
            trained.save_pretrained(other)
        assert sorted(Path(other).glob("*")) == before
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    loaded.load_adapter(str(tmp_path / "mine"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**ids).logits, trained.model(**ids).logits, rtol=0, atol=1e-4)


def test_a_kept_policy_run_keeps_its_reward_model(
    rm: RewardModel, tiny_model: str, prompts_file: Path, tmp_path: Path
) -> None:
    args = dataclasses.replace(POLICY, output=str(tmp_path / "run"))
    PolicyTrainer(tiny_model, rm.in_memory().heads("brme").reward("tradeoff(0.4)"), str(prompts_file), args).train()
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["objective"] == "tradeoff(0.4)"
    assert equal(Scorer.load(kept["reward"])(TEXTS), rm.heads("brme").scorer(TEXTS))
    assert Run(tmp_path / "run").results is not None
    again = PolicyTrainer(tiny_model, rm.in_memory().heads("brme").reward("tradeoff(0.4)"), str(prompts_file), args)
    assert again.train().results == Run(tmp_path / "run").results


def test_a_kept_policy_run_does_not_go_on_with_another_reward_model(
    rm: RewardModel, tiny_model: str, prompts_file: Path, tmp_path: Path
) -> None:
    """The cell of the reward model was run again with other pairs: its policy was the earlier one's, without a word."""
    args = dataclasses.replace(POLICY, output=str(tmp_path / "run"))
    PolicyTrainer(tiny_model, rm.in_memory().heads("brme").reward("tradeoff(0.4)"), str(prompts_file), args).train()
    other = rm.in_memory().heads("brme")
    weight = other.scorer.weight.clone()
    weight[0, 0] += 0.1
    changed = Scorer(other.scorer.extract, weight, other.layout, other.scorer.last_layer, other.scorer.reference)
    with pytest.raises(PoiseError, match="run was begun with another reward model; choose another output"):
        PolicyTrainer(tiny_model, RobustReward.of(changed, "tradeoff(0.4)"), str(prompts_file), args).train()


def test_a_kept_run_and_a_scale_are_of_one_function(
    rm: RewardModel, tiny_model: str, prompts_file: Path, tmp_path: Path
) -> None:
    """A lambda that is edited has the name it had."""
    args = dataclasses.replace(POLICY, output=str(tmp_path / "run"))
    PolicyTrainer(tiny_model, rm.reward(lambda heads: heads.mean.min(-1).values), str(prompts_file), args).train()
    edited = rm.reward(lambda heads: heads.mean.max(-1).values)
    with pytest.raises(PoiseError, match=r"another config \(differs in objective\)"):
        PolicyTrainer(tiny_model, edited, str(prompts_file), args).train()
    texts = (["Review a film."] * 2, ["a good film", "awful"])
    scale = tmp_path / "scale.json"
    RobustReward.of(rm.scorer, first_head, scale=scale)(*texts)
    RobustReward.of(rm.scorer, first_head, scale=scale)(*texts)
    with pytest.raises(PoiseError, match=r"holds the scale of .*first_head#"):
        RobustReward.of(rm.scorer, lambda heads: -first_head(heads), scale=scale)(*texts)


def first_head(heads: HeadRewards) -> torch.Tensor:
    return heads.mean[..., 0]


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_policy_may_be_trained_on_a_function_of_heads(
    algorithm: Any, rm: RewardModel, tiny_model: str, prompts_file: Path
) -> None:
    args = dataclasses.replace(POLICY, algorithm=algorithm)
    trained = PolicyTrainer(tiny_model, rm.reward(first_head), prompts_file, args).train()
    scale = trained.results["scale"]
    row = trained.completions[0]
    wanted = (row["mean"][0] - scale["head_baseline"][0] - scale["mean"]) / scale["std"]
    assert row["reward"] == pytest.approx(min(wanted, scale.get("ceiling", wanted)), abs=1e-4)


def test_a_function_of_heads_may_have_weights_of_its_own(rm: RewardModel, tiny_model: str, prompts_file: Path) -> None:
    """Its gradients are nobody's business here: they would be asked for in every update of a step again."""
    weight = torch.ones(1, requires_grad=True)

    def weighed(heads: HeadRewards) -> torch.Tensor:
        return first_head(heads) * weight

    plain, found = (
        PolicyTrainer(tiny_model, rm.reward(how), prompts_file, POLICY).train() for how in (first_head, weighed)
    )
    rewards = [[row["reward"] for row in trained.completions] for trained in (plain, found)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-4)
    assert weight.grad is None


def test_an_ensemble_is_one_model_that_is_not_saved(run_folder: Path, tmp_path: Path) -> None:
    members = [os.path.relpath(run_folder / kind, tmp_path / "both") for kind in ("single", "posterior")]
    (tmp_path / "both").mkdir()
    both = {"members": members, "means": [0.0, 0.0], "stds": [1.0, 1.0]}
    (tmp_path / "both" / "ensemble.json").write_text(json.dumps(both))
    model = RewardModel.from_pretrained(tmp_path / "both")
    assert model.kinds == ("",)
    assert equal(model.scorer(TEXTS), Scorer.load(str(tmp_path / "both"))(TEXTS))
    with pytest.raises(PoiseError, match="an ensemble has no checkpoint of its own; its folder names its members"):
        model.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_card_is_saved_beside_the_heads_that_it_speaks_of(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "brme", tmp_path / "rm")
    (tmp_path / "rm" / "README.md").write_text("# A card\n")
    RewardModel.from_pretrained(tmp_path / "rm").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").read_text() == "# A card\n"


def test_several_processes_need_one_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(PoiseError, match=r"^several processes need one run folder: give args an output$"):
        PolicyTrainer("m", "rm", ["Hi"], POLICY).train()


def test_bounds_of_a_reward_are_those_of_the_run(rm: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PolicyConfig] = []

    def run(config: PolicyConfig, _: Any) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_policy, "run", run)
    both = rm.heads("single").reward("mean", floor=-1, ceiling=2.5)
    for reward in (both, rm.heads("single").reward("mean")):
        with pytest.raises(KeyboardInterrupt):
            PolicyTrainer("m", reward, ["Hi"], dataclasses.replace(POLICY, reward_floor=-7.0)).train()
    assert [(one.reward_floor, one.reward_ceiling, one.objective) for one in seen] == [
        (-1.0, 2.5, "mean"), (-7.0, POLICY.reward_ceiling, "mean"),
    ]  # fmt: skip


# ---- validators ----


def test_a_policy_watches_the_validator_of_its_reward_s_run(
    watched_reward: Path, prompts_file: Path, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the trainer is given the model, a reward of it, or its folder; None is none, for each of them."""
    own = f"{watched_reward}/validator"
    watched = RewardModel.from_pretrained(watched_reward)
    assert watched.kinds == KINDS
    reward = watched.reward("lower_confidence(1)")
    assert f"validator: {own}, trained with" in capsys.readouterr().err
    assert reward.validator == own
    assert watched.in_memory().reward("mean").validator == ""
    small = dataclasses.replace(POLICY, num_steps=1)
    logged = [
        "validator" in PolicyTrainer(tiny_model, given, prompts_file, args).train().metrics[0]
        for args in (small, dataclasses.replace(small, validator=None))
        for given in (watched, reward, str(watched_reward), watched.reward("mean", validator=None))
    ]
    assert logged == [True, True, True, False] + [False] * 4


@pytest.mark.parametrize("other", [None, "elsewhere"])
def test_the_validator_of_the_settings_is_the_one_that_a_reward_model_is_read_with(
    other: str | None, watched_reward: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that no line says that the one of the model's own run is watched."""
    seen: list[tuple[str | None, str | None]] = []

    def run(config: PolicyConfig, given: Any) -> None:
        seen.append((config.validator, given.validator))
        raise KeyboardInterrupt

    monkeypatch.setattr(train_policy, "run", run)
    args = dataclasses.replace(POLICY, validator=other)
    with pytest.raises(KeyboardInterrupt):
        PolicyTrainer("m", RewardModel.from_pretrained(watched_reward), ["Hi"], args).train()
    assert seen == [(other, other)]
    assert "is watched" not in capsys.readouterr().err


def test_a_validator_needs_a_folder_that_is_kept(preferences_file: Path, tiny_model: str, tmp_path: Path) -> None:
    args = dataclasses.replace(SMALL, validator_share=0.4)
    with pytest.raises(PoiseError, match=r"^a validator is kept in the run folder: give args an output"):
        RewardTrainer(tiny_model, preferences_file, args).train()
    trainer = RewardTrainer(tiny_model, preferences_file, dataclasses.replace(args, output=str(tmp_path / "rm")))
    reward = trainer.train().reward("mean")
    assert reward.validator == str(tmp_path / "rm" / "validator")
    assert (tmp_path / "rm" / "validator" / "README.md").exists()
    assert trainer.results["validator"]["num_preferences"] == 16
