"""Stage 1 with the trunk: the same loss as separate rows, LoRA in PEFT's format, and runs that survive a kill."""

import json
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file, save_file
from torch.utils.data import BatchSampler

from conftest import make_model, rest_slow
from forked import launched, started
from poise.cli.main import main
from poise.data.preferences import read_preferences
from poise.data.types import Preference, Sample
from poise.errors import PoiseError
from poise.models.reward_model import load_trunk
from poise.models.scorer import FeatureExtractor, Scorer
from poise.reward import train as train_reward
from poise.reward import trunk_training
from poise.reward.train import Config
from poise.reward.trunk_training import (
    PairModel,
    PairTrainer,
    TrunkTraining,
    latest_checkpoint,
    preference_loss,
    token_pairs,
    training_arguments,
)


def settings(**changes: object) -> TrunkTraining:
    values = {
        "kind": "full", "epochs": 1.0, "learning_rate": 1e-3, "batch_size": 8, "device_batch_size": 4, "lora_rank": 4,
        "gradient_checkpointing": False, "save_steps": 2, "seed": 0,
    }  # fmt: skip
    return TrunkTraining(**{**values, **changes})  # type: ignore[arg-type]


def trainer_of(model: str, preferences: list[Preference], folder: Path, *, packed: bool, **how: object) -> PairTrainer:
    torch.manual_seed(0)
    classifier, tokenizer = load_trunk(model, 0)
    for module in classifier.modules():  # GPT-2's dropout falls differently on rows of another shape
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    pairs = token_pairs(FeatureExtractor(classifier, tokenizer), preferences, share=packed)
    model, args = PairModel(classifier, packed=packed), training_arguments(settings(**how), folder)
    trainer = PairTrainer(model, args, pairs, tokenizer.pad_token_id, preference_loss())
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@pytest.mark.slow
def test_sharing_the_prompt_changes_neither_loss_nor_weights(
    any_model: str, preferences_file: Path, tmp_path: Path
) -> None:
    preferences = read_preferences(preferences_file)
    losses, weights = [], []
    for packed in (True, False):
        trainer = trainer_of(any_model, preferences, tmp_path / str(packed), packed=packed)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert len(losses[0]) == 5
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)  # the Trainer rounds losses to four digits
    start = torch.cat(
        [p.detach().flatten() for p in trainer_of(any_model, preferences, tmp_path, packed=True).model.parameters()]
    )
    assert (weights[0] - weights[1]).norm() < 0.02 * (weights[0] - start).norm()


def test_loss_equals_the_one_worked_out_by_hand(tiny_model: str, tmp_path: Path) -> None:
    """Margins and label smoothing arrive where they should, whatever the order of the packed rows."""
    preferences = [
        Preference("Review a film.", "good", "bad", margin=0.5),
        Preference("Review a phone that is long.", "fine", "awful, really"),
    ]
    classifier, tokenizer = load_trunk(tiny_model, 0)
    extract = FeatureExtractor(classifier, tokenizer)
    model = PairModel(classifier, packed=True)
    trainer = PairTrainer(
        model, training_arguments(settings(), tmp_path), token_pairs(extract, preferences), tokenizer.pad_token_id,
        preference_loss(label_smoothing=0.1, centering=0.0),
    )  # fmt: skip
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(model.eval(), batch)
    expected = 0.0
    for p in preferences:
        chosen, rejected = (extract([Sample(p.prompt, t)]) @ classifier.score.weight.T for t in (p.chosen, p.rejected))
        lead = (chosen - rejected).squeeze() - p.margin
        expected -= (0.9 * torch.sigmoid(lead).log() + 0.1 * torch.sigmoid(-lead).log()) / 2
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("again", [False, True])
def test_what_is_trained_is_what_is_scored(tmp_path: Path, preferences_file: Path, again: bool) -> None:
    """GPT-2 has dropout; the loss of the first step is that of the features that scoring reads."""
    classifier, tokenizer = load_trunk(make_model(tmp_path / "model", "gpt2"), 0)
    pairs = read_preferences(preferences_file)[:8]
    extract = FeatureExtractor(classifier, tokenizer)
    chosen, rejected = (
        extract([Sample(p.prompt, text) for p, text in zip(pairs, texts, strict=True)]) @ classifier.score.weight.T
        for texts in ([p.chosen for p in pairs], [p.rejected for p in pairs])
    )
    expected = -torch.nn.functional.logsigmoid(chosen - rejected).mean().item()
    how = settings(device_batch_size=8, learning_rate=1e-9, gradient_checkpointing=again)
    trunk_training.fine_tune(
        classifier, tokenizer.pad_token_id, token_pairs(extract, pairs), preference_loss(centering=0.0), how,
        tmp_path / "run", packed=True,
    )  # fmt: skip
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(expected, abs=2e-4)  # the Trainer rounds to four digits


def config(model: str, preferences: Path, output: Path, **changes: object) -> Config:
    values = {
        "trunk": "lora", "epochs": 3.0, "batch_size": 8, "device_batch_size": 4, "learning_rate": 3e-3,
        "posterior_heads": 4, "head_steps": 20, "num_layers": 2, "save_steps": 2,
    }  # fmt: skip
    return Config(str(preferences), str(output), model, **{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("trunk", rest_slow(["lora", "full"]))
def test_the_tuned_trunk_is_part_of_every_checkpoint(
    trunk: str, tiny_model: str, preferences_file: Path, tmp_path: Path
) -> None:
    run = train_reward.run(config(tiny_model, preferences_file, tmp_path / "run", trunk=trunk))
    losses = [row["loss"] for row in run.metrics()]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(run.folder / "trunk")
    fresh, _ = load_trunk(tiny_model, 2)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(tuned.state_dict()[name], fresh.state_dict()[name])
    for head in ("single", "brme", "posterior"):
        saved = load_file(run.folder / head / "model.safetensors")
        assert torch.equal(saved[name], tuned.state_dict()[name])
    assert not (run.folder / "trainer").exists()
    if trunk == "lora":  # PEFT reads the adapter on the model it was trained on, and gives the merged trunk's rewards
        base, tokenizer = load_trunk(tiny_model, 2)
        adapted = peft.PeftModel.from_pretrained(base, str(run.folder / "adapter")).eval()
        ids = torch.tensor([tokenizer("a good film").input_ids])
        with torch.no_grad():
            torch.testing.assert_close(adapted(ids).logits, tuned.eval()(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["lora", "full"])
def test_a_training_killed_at_any_moment_ends_in_the_same_weights(
    trunk: str, tiny_model: str, preferences_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train_reward.run(config(tiny_model, preferences_file, tmp_path / "whole", trunk=trunk))
    again = config(tiny_model, preferences_file, tmp_path / "killed", trunk=trunk)
    said = tmp_path / "stderr.txt"
    generator = random.Random(trunk)
    kills = 0
    for _ in range(3):
        process = started(lambda: train_reward.run(again), stderr=said)
        steps = tmp_path / "killed" / "metrics.jsonl"
        before = steps.read_text().count("\n") if steps.exists() else 0
        target = before + generator.randint(1, 6)
        while process.status() is None and (steps.read_text().count("\n") if steps.exists() else 0) < target:
            time.sleep(0.002)
        if process.status() is not None:
            assert process.ended() == 0, said.read_text()
            break
        time.sleep(generator.random() * 0.05)
        kills += process.killed() == -signal.SIGKILL
    result = train_reward.run(again)
    assert kills >= 1
    for name in ("trunk", "single", "brme", "posterior"):
        one, other = (load_file(run.folder / name / "model.safetensors") for run in (whole, result))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert result.metrics() == whole.metrics()
    assert " lacks " not in capsys.readouterr().err


@pytest.mark.slow
def test_stage_two_trains_a_trunk_of_its_own(tiny_model: str, preferences_file: Path, tmp_path: Path) -> None:
    """The BRME gets a trunk of its own and comes nearer to the stage-1 reward; the others stay on the frozen one."""
    changes = {"trunk": "frozen", "shards": "same", "head_loss": "gaussian_nll", "epochs": 10.0, "head_steps": 40}
    runs = {
        name: train_reward.run(
            config(tiny_model, preferences_file, tmp_path / name, **changes, stage2_trunk=name)  # type: ignore[arg-type]
        )
        for name in ("frozen", "lora", "full")
    }
    name = "model.layers.1.mlp.up_proj.weight"
    trunks = {key: load_file(run.folder / "brme" / "model.safetensors")[name] for key, run in runs.items()}
    single = load_file(runs["full"].folder / "single" / "model.safetensors")[name]
    assert torch.equal(trunks["frozen"], single)
    assert not torch.equal(trunks["lora"], single)
    assert not torch.equal(trunks["full"], single)
    data = [Sample(p.prompt, text) for p in read_preferences(preferences_file) for text in (p.chosen, p.rejected)]
    target = Scorer.load(str(runs["frozen"].folder / "single"))(data).mean
    error = {
        key: (Scorer.load(str(run.folder / "brme"))(data).mean - target).square().mean().item()
        for key, run in runs.items()
    }
    assert error["full"] < error["frozen"]
    assert error["lora"] < error["frozen"]


@pytest.mark.slow
@pytest.mark.parametrize("trunk", ["lora", "full"])
def test_what_a_sharded_run_has_learned_is_put_together(
    trunk: str, tiny_model: str, preferences_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharding itself needs accelerators; here one process plays it, with accelerate's own gathering of the weights."""
    plain = train_reward.run(config(tiny_model, preferences_file, tmp_path / "plain", trunk=trunk))
    monkeypatch.setattr(PairTrainer, "sharded", True)
    sharded = train_reward.run(config(tiny_model, preferences_file, tmp_path / "sharded", trunk=trunk))
    one, other = (load_file(run.folder / "trunk" / "model.safetensors") for run in (plain, sharded))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((2, json.dumps({"global_step": 2})), (4, '{"global_st'), (6, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_a_batch_that_does_not_divide_is_one_line(tiny_model: str, preferences_file: Path, tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match="no multiple of --device-batch-size 3"):
        train_reward.run(config(tiny_model, preferences_file, tmp_path / "x", device_batch_size=3))


def test_the_last_step_of_an_epoch_is_the_mean_of_its_pairs(
    tiny_model: str, preferences_file: Path, tmp_path: Path
) -> None:
    """Of 11 pairs in steps of 8, the second has 3, however few of them go through the model at once."""
    pairs, losses = read_preferences(preferences_file)[:11], []
    for size in (8, 2, 1):
        trainer = trainer_of(tiny_model, pairs, tmp_path / str(size), packed=True, device_batch_size=size)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], abs=1.1e-4)  # the Trainer rounds to four digits
    assert losses[2] == pytest.approx(losses[0], abs=1.1e-4)


def test_pairs_of_other_steps_cost_nothing(tiny_model: str, preferences_file: Path, tmp_path: Path) -> None:
    """What fills up a process's last batch is read, and neither its loss nor its gradient counts."""
    trainer = trainer_of(tiny_model, read_preferences(preferences_file)[:4], tmp_path, packed=True)
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer._batches, trainer._batches_read = 2, 0
    assert trainer.compute_loss(trainer.model, batch).item() > 0
    for asked in (False, True):
        trainer._batches_read = 1  # the second of two batches of four, of four pairs
        found = trainer.compute_loss(trainer.model, batch, return_outputs=asked)
        loss = found[0] if asked else found
        trainer.model.zero_grad()
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_a_checkpoint_of_another_model_is_refused(tiny_model: str, preferences_file: Path, tmp_path: Path) -> None:
    one, other = (trainer_of(tiny_model, read_preferences(preferences_file)[:4], tmp_path, packed=True) for _ in "12")
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter.add_(1.0)
    one.save_model(str(tmp_path / "kept"))
    other._load_from_checkpoint(str(tmp_path / "kept"))
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    save_file({"classifier.more.weight": torch.ones(2)}, tmp_path / "kept" / "model.safetensors")
    with pytest.raises(PoiseError, match=r"kept is of another model: it holds classifier\.more\.weight"):
        other._load_from_checkpoint(str(tmp_path / "kept"))


def test_a_prompt_that_is_cut_differently_for_both_texts_is_not_shared(tiny_model: str) -> None:
    classifier, tokenizer = load_trunk(tiny_model, 1)
    extract = FeatureExtractor(classifier, tokenizer, 30)
    short, long = Preference("Review a film.", "good", "fine"), Preference("Review a film.", "good", "it was fine")
    found = token_pairs(extract, [short, long])
    assert [len(pair.families) for pair in found] == [1, 2]
    for pair, p in zip(found, (short, long), strict=True):
        rows = [[*family.prompt, *text] for family in pair.families for text in family.completions]
        encoded = [extract.encode(Sample(p.prompt, text)) for text in (p.chosen, p.rejected)]
        assert rows == [[*one.prompt, *one.completion] for one in encoded]
    assert max(map(len, rows)) == 30


def test_a_loss_that_is_not_finite_ends_the_training(tiny_model: str, preferences_file: Path, tmp_path: Path) -> None:
    classifier, tokenizer = load_trunk(tiny_model, 1)
    pairs = token_pairs(FeatureExtractor(classifier, tokenizer), read_preferences(preferences_file)[:16])

    def loss(logits: torch.Tensor, _: object) -> torch.Tensor:
        return logits.sum() * float("nan" if (tmp_path / "run" / "metrics.jsonl").exists() else 1)

    with pytest.raises(PoiseError, match=r"^step 2: the loss or its gradient is not finite; lower --learning-rate$"):
        trunk_training.fine_tune(
            classifier, tokenizer.pad_token_id, pairs, loss, settings(), tmp_path / "run", packed=True
        )
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize(("pairs", "each", "per_step"), [(19, 2, 2), (16, 2, 2), (1, 4, 1), (7, 1, 3), (5, 4, 1)])
def test_pairs_that_fill_up_the_last_batches_do_not_count(pairs: int, each: int, per_step: int, processes: int) -> None:
    """As accelerate hands batches to processes: in each step every one of its pairs counts once, and for its share."""
    batches = BatchSampler(range(pairs), each, drop_last=False)
    shards = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
    seen: list[int] = []
    for step in range(-(-len(shards[0]) // per_step)):
        weights: dict[int, float] = {}
        for rank, shard in enumerate(shards):
            own = shard[step * per_step :][:per_step]
            for number, batch in enumerate(own):
                trainer: Any = SimpleNamespace(
                    train_dataset=range(pairs), state=SimpleNamespace(global_step=step), _batches=len(own),
                    args=SimpleNamespace(per_device_train_batch_size=each, gradient_accumulation_steps=per_step),
                    accelerator=SimpleNamespace(num_processes=processes, process_index=rank), _batches_read=number,
                )  # fmt: skip
                counted, share = PairTrainer._counted(trainer, len(batch))
                for pair in batch[:counted]:  # a mean over counted, then over the batches of all processes
                    assert pair not in weights
                    weights[pair] = share / counted / len(own) / processes
        assert list(weights.values()) == pytest.approx([1 / len(weights)] * len(weights))
        seen += sorted(weights)
    assert sorted(seen) == list(range(pairs))


def test_checkpoints_hold_no_pickle(tiny_model: str, preferences_file: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model, read_preferences(preferences_file), tmp_path, packed=True)
    trainer.train()
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json"}


def test_scores_of_a_tuned_run(tiny_model: str, preferences_file: Path, tmp_path: Path) -> None:
    run = train_reward.run(config(tiny_model, preferences_file, tmp_path / "run"))
    heads = Scorer.load(str(run.folder / "single"))(
        [Sample("Review a film.", t) for t in ("a good film", "a bad film")]
    )
    assert heads.mean[0] > heads.mean[1]


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_batch(
    tiny_model: str, preferences_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data parallel, gloo on the CPU: the losses and weights are those of one process with the whole batch."""
    shared = {"trunk": "full", "learning_rate": 1e-3, "epochs": 1.0, "feature_cache": False}
    one = train_reward.run(
        config(tiny_model, preferences_file, tmp_path / "one", **shared, device_batch_size=8)  # type: ignore[arg-type]
    )
    arguments = trunk_training.training_arguments

    def counted(*how: Any) -> Any:
        found = arguments(*how)
        (tmp_path / f"world{os.environ['RANK']}").write_text(str(found.world_size))
        return found

    monkeypatch.setattr(trunk_training, "training_arguments", counted)
    again = ["--config", str(one.folder / "config.yaml"), "--output", str(tmp_path / "two"), "--device-batch-size", "4"]
    launched(2, lambda: main(["train-reward", *again]), tmp_path)
    first, second = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one.folder, tmp_path / "two")
    )
    assert [(tmp_path / f"world{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    assert [row["step"] for row in second] == [1, 2, 3, 4]
    assert [row["loss"] for row in second] == pytest.approx([row["loss"] for row in first], abs=1e-5)
    alone, together = (load_file(folder / "trunk" / "model.safetensors") for folder in (one.folder, tmp_path / "two"))
    fresh, _ = load_trunk(tiny_model, 2)
    name = "model.layers.1.mlp.up_proj.weight"
    moved = (alone[name] - fresh.state_dict()[name]).norm()
    assert (alone[name] - together[name]).norm() < 0.01 * moved
    assert (tmp_path / "two" / "results.json").exists()
