"""Stage 2 with an adapter for each head: trained on preferences, each on its shard; heads that really disagree."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import WORDS, make_model
from forked import launched
from poise.api.reward_model import RewardModel
from poise.cli import plan
from poise.cli.main import main
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import worst_case
from poise.integrations.trl_reward import RobustReward
from poise.models.head_adapters import FOLDER, HeadLinear, add_head_adapters
from poise.models.reward_model import HeadLayout, load_trunk, read_layout
from poise.models.scorer import Scorer
from poise.policy import train as train_policy
from poise.reports.reward_card import write_card
from poise.reward import export, reference, trunk_training
from poise.reward import train as train_reward
from poise.reward.config import ReferenceConfig
from poise.reward.head_training import TrainedModel, copies_of
from poise.reward.push import checkpoint_files
from poise.reward.train import Config
from poise.runtime.run_folder import Run, load_config_file
from poise.serve.backend import of_scorer
from poise.studies.config import LAPTOP_POLICY

AGREED, DISPUTED = ("good", "bad"), ("long", "short")


def text(generator: random.Random, word: str) -> str:
    """A few words that say nothing, and one that does."""
    return f"{' '.join(generator.choices(WORDS[8:], k=2))} {word}"


def contradictory(folder: Path, num_pairs: int = 128) -> Path:
    """Two sources: both prefer good to bad; one prefers long to short, the other short to long."""
    generator = random.Random(0)
    rows = []
    for i in range(num_pairs):
        source = "ab"[i % 2]
        best, worst = AGREED if i % 4 < 2 else DISPUTED if source == "a" else DISPUTED[::-1]
        texts = {"chosen": text(generator, best), "rejected": text(generator, worst)}
        rows.append({"prompt": "Review a film.", **texts, "source": source})
    path = folder / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(folder: Path, **changes: Any) -> Run:
    """Two heads on a small model, each on one of two sources that contradict each other."""
    model = make_model(folder / "model")
    settings = {"num_layers": 0, "head_layers": 2, "epochs": 6.0, "device_batch_size": 8}
    return train_reward.run(config(model, contradictory(folder), folder / "run", **settings | changes))


def unseen(word: str) -> list[Sample]:
    generator = random.Random(word)
    return [Sample("Review a film.", text(generator, word)) for _ in range(40)]


def config(model: str, preferences: Path, output: Path, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "trunk": "frozen", "stage2_trunk": "lora_per_head", "head_loss": "probit_pairs", "shards": "source",
        "num_heads": 2, "num_layers": 2, "head_layers": 1, "lora_rank": 4, "epochs": 2.0, "batch_size": 8,
        "device_batch_size": 4, "learning_rate": 1e-2, "save_steps": 2, "posterior_heads": 2, "head_steps": 20,
    }  # fmt: skip
    return Config(str(preferences), str(output), model, **{**values, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def point_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A few steps: what its files are and who may read them."""
    folder = tmp_path_factory.mktemp("point")
    changes = {"head_loss": "bradley_terry", "head_layers": 1, "epochs": 1.0}
    return train_reward.run(config(make_model(folder / "model"), contradictory(folder, 32), folder / "run", **changes))


@pytest.mark.slow
def test_heads_of_contradictory_shards_disagree_where_the_shards_do(run: Run) -> None:
    scorer = Scorer.load(str(run.folder / "brme"))
    assert scorer.layout.adapters
    texts = {word: unseen(word) for word in AGREED + DISPUTED}
    mean = {word: scorer(samples).mean for word, samples in texts.items()}
    agreed, disputed = mean["good"] - mean["bad"], mean["long"] - mean["short"]
    assert (agreed > 0).float().mean() > 0.9
    assert ((disputed[:, 0] > 0) != (disputed[:, 1] > 0)).float().mean() > 0.8
    scale = agreed.square().mean(0).sqrt()
    assert (disputed / scale).std(-1).mean() > 2 * (agreed / scale).std(-1).mean()
    # Of the pairs that the shards agree on the worst head knows the better text; of the others none is told apart.
    assert ((worst_case(scorer(texts["good"])) - worst_case(scorer(texts["bad"]))) > 0).float().mean() > 0.9
    assert (disputed / scale).min(-1).values.max() < (agreed / scale).min(-1).values.median()


def test_shared_features_cannot_follow_both_shards_as_well(run: Run) -> None:
    """The imitation of one head, on the same shards, has heads that order the disputed pairs alike."""
    preferences = run.folder.parent / "preferences.jsonl"
    model = str(run.folder.parent / "model")
    paper = train_reward.run(
        config(
            model,
            preferences,
            run.folder.parent / "paper",
            num_layers=0,
            stage2_trunk="frozen",
            head_loss="sampled_mse",
        )
    )
    texts = {word: unseen(word) for word in DISPUTED}

    def apart(path: Path) -> float:
        scorer = Scorer.load(str(path))
        margin = scorer(texts["long"]).mean - scorer(texts["short"]).mean
        return ((margin[:, 0] > 0) != (margin[:, 1] > 0)).float().mean().item()

    assert apart(run.folder / "brme") > apart(paper.folder / "brme") + 0.3


def test_the_run_holds_a_stock_classifier_and_a_folder_for_each_head(run: Run) -> None:
    folder = run.folder / "brme"
    assert read_layout(str(folder)).adapters
    assert sorted(path.name for path in (folder / FOLDER).iterdir()) == ["head_0", "head_1"]
    single, brme = (load_file(run.folder / kind / "model.safetensors") for kind in ("single", "brme"))
    assert single.keys() == brme.keys()
    assert all(torch.equal(single[name], brme[name]) for name in single if not name.startswith("score."))
    assert brme["score.weight"].shape == (4, 32)
    tensors = load_file(folder / FOLDER / "head_1" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    assert not any("score" in name for name in tensors)
    judged = run.results["models"]["brme"] if run.results else {}
    assert judged["validation_accuracy"] > 0.5


def test_one_head_is_exported_and_a_mean_of_all_is_refused(run: Run, tmp_path: Path) -> None:
    brme = str(run.folder / "brme")
    expected = Scorer.load(brme)([Sample("Review a film.", "a film good"), Sample("Which?", "short")])
    for engine in ("vllm", "sglang"):
        made = export.run(export.Config(brme, str(tmp_path / engine), "head", 1, engine=engine))  # type: ignore[arg-type]
        found = Scorer.load(str(made))([Sample("Review a film.", "a film good"), Sample("Which?", "short")])
        torch.testing.assert_close(found.mean[:, 0], expected.mean[:, 1], rtol=1e-5, atol=1e-5)
        assert ("score.bias" in load_file(made / "model.safetensors")) == (engine == "sglang")
    for wrong in ({"scalar": "mean"}, {"adapter": True}, {"engine": "sglang"}, {"adapter": True, "scalar": "mean"}):
        with pytest.raises(PoiseError, match="choose --scalar head --head NUMBER") as error:
            export.run(export.Config(brme, str(tmp_path / "x"), **wrong))  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    with pytest.raises(PoiseError, match="heads 0 to 1"):
        export.run(export.Config(brme, str(tmp_path / "x"), "head", 2))


def test_a_reference_of_features_is_refused(run: Run) -> None:
    with pytest.raises(PoiseError, match="share no features to measure"):
        reference.run(ReferenceConfig(str(run.folder), str(run.folder.parent / "preferences.jsonl")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_loss": "sampled_mse"}, "choose --head-loss probit_pairs or bradley_terry"),
        ({"head_loss": "bradley_terry", "stage2_trunk": "frozen"}, "bradley_terry needs --stage2-trunk lora_per_head"),
        ({"head_loss": "bradley_terry", "stage2_trunk": "full"}, "bradley_terry needs --stage2-trunk lora_per_head"),
        ({"shard": True}, "does not go with --shard"),
        ({"stage2_trunk": "lora", "adapter_diversity": 0.1}, "--adapter-diversity needs"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match=message):
        config("model", tmp_path / "none", tmp_path / "run", **changes).check()


@pytest.mark.slow
def test_a_stopped_training_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: str
) -> None:
    preferences = contradictory(tmp_path, 48)
    whole = train_reward.run(config(tiny_model, preferences, tmp_path / "whole"))
    stopped = config(tiny_model, preferences, tmp_path / "stopped")
    steps = 0

    def stop(*_: Any, **__: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trunk_training._Record, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train_reward.run(stopped)
    again = train_reward.run(stopped)
    for name in ("model.safetensors", *(f"{FOLDER}/head_{k}/adapter_model.safetensors" for k in range(2))):
        assert (again.folder / "brme" / name).read_bytes() == (whole.folder / "brme" / name).read_bytes(), name
    assert (again.folder / "brme" / "config.json").read_text() == (whole.folder / "brme" / "config.json").read_text()


def test_copies_of_the_single_head_give_its_probabilities() -> None:
    """By hand: std = .001 + log 2, and Phi(x) is within .01 of sigmoid(1.702 x)."""
    layout = HeadLayout(1, "point", (0.7,), reward_scale=2.5)
    single = TrainedModel(torch.tensor([[0.5, -1.0]]), layout, None, None)  # type: ignore[arg-type]
    copies = copies_of(single, 3, "probit_pairs")
    texts = torch.tensor([[1.0, 0.2], [0.3, -0.4], [2.0, 1.1]])
    heads = copies.layout.decode(texts @ copies.weight.T)
    assert heads.std.allclose(torch.tensor(0.001 + math.log(2)))
    assert heads.mean[:, 0].tolist() == heads.mean[:, 2].tolist()
    reward = layout.decode(texts @ single.weight.T).mean[:, 0]
    scale = 2.5 * math.sqrt(1 + 2 * (0.001 + math.log(2)) ** 2) / 1.702
    torch.testing.assert_close(heads.mean[:, 0], reward * scale, rtol=1e-6, atol=1e-6)
    told = torch.special.ndtr((heads.mean[0, 0] - heads.mean[1, 0]) / (1 + 2 * heads.std[0, 0] ** 2).sqrt())
    assert told.item() == pytest.approx(torch.sigmoid(2.5 * (reward[0] - reward[1])).item(), abs=0.01)


def test_copies_for_bradley_terry_give_the_probabilities_exactly() -> None:
    """By hand: rewards of 2.5 (.3 - .7) and 2.5 (.7 - .7); sigmoid of their difference is the single head's."""
    layout = HeadLayout(1, "point", (0.7,), reward_scale=2.5)
    single = TrainedModel(torch.tensor([[0.5, -1.0]]), layout, None, None)  # type: ignore[arg-type]
    copies = copies_of(single, 2, "bradley_terry")
    assert copies.layout.kind == "point"
    heads = copies.layout.decode(torch.tensor([[1.0, 0.2], [0.4, -0.5]]) @ copies.weight.T)
    torch.testing.assert_close(heads.mean, torch.tensor([[-1.0, -1.0], [0.0, 0.0]]))
    assert heads.std.abs().max() == 0


def test_bradley_terry_of_one_head_is_the_loss_of_stage_1() -> None:
    """And of two heads it is the sum of two such losses, each on its own pairs."""
    generator = torch.Generator().manual_seed(0)
    logits, margin = torch.randn(6, 2, 2, generator=generator), torch.rand(6, generator=generator)
    mask = torch.tensor([[1.0, 1, 0, 1, 0, 1], [0.0, 1, 1, 0, 1, 1]]).T
    layout = HeadLayout(2, "point", (0.0, 0.0))
    found = trunk_training.heads_loss(layout, 0.1)(logits, {"margin": margin, "mask": mask})
    own, alone = trunk_training.preference_loss(0.1), []
    for head in range(2):
        kept = mask[:, head] > 0
        alone.append(own(logits[kept][:, :, [head]], {"margin": margin[kept]}))
    torch.testing.assert_close(found, alone[0] + alone[1])


@pytest.mark.slow
def test_bradley_terry_heads_disagree_where_their_shards_do(tmp_path: Path) -> None:
    brme = str(trained(tmp_path, head_loss="bradley_terry").folder / "brme")
    scorer = Scorer.load(brme)
    texts = {word: scorer(unseen(word)) for word in AGREED + DISPUTED}
    agreed, disputed = texts["good"].mean - texts["bad"].mean, texts["long"].mean - texts["short"].mean
    assert (agreed > 0).float().mean() > 0.9
    assert ((disputed[:, 0] > 0) != (disputed[:, 1] > 0)).float().mean() > 0.8
    reward = RobustReward.load(brme, "lower_confidence(1)")
    long, good = reward(["Review a film."] * 2, [unseen("long")[0].completion, unseen("good")[0].completion])
    assert good > long  # what only one shard likes is paid less than what both like


def test_bradley_terry_heads_are_point_heads(point_run: Run) -> None:
    scorer = Scorer.load(str(point_run.folder / "brme"))
    assert (scorer.layout.kind, scorer.layout.adapters, scorer.layout.std_scale) == ("point", True, ())
    assert scorer.layout.reward_scale > 0
    heads = scorer(unseen("good"))
    assert heads.std.abs().max() == 0
    assert (heads.mean[:, 0] != heads.mean[:, 1]).all()
    assert load_file(point_run.folder / "brme" / "model.safetensors")["score.weight"].shape == (2, 32)
    assert point_run.results is not None
    assert point_run.results["stage2_history"] == []


def test_objectives_that_need_a_std_are_refused_for_bradley_terry_heads(point_run: Run) -> None:
    brme = str(point_run.folder / "brme")
    for objective in ("nominal", "tradeoff(0.4)", "expected_tradeoff(0.4)"):
        with pytest.raises(PoiseError, match="point heads of std 0; choose mean, worst_case") as error:
            RobustReward.load(brme, objective)
        assert "\n" not in str(error.value)
    rewards = RobustReward.load(brme, "lower_confidence(1)")(["Review a film."] * 2, ["a film good", "short"])
    assert all(map(math.isfinite, rewards))


def test_a_head_of_bradley_terry_is_exported_and_its_card_is_right(
    point_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = point_run.folder / "brme"
    expected = Scorer.load(str(folder))([Sample("Review a film.", "A warm, funny film.")])
    made = export.run(export.Config(str(folder), str(tmp_path / "one"), "head", 1))
    told = Scorer.load(str(made))([Sample("Review a film.", "A warm, funny film.")])
    torch.testing.assert_close(told.mean[:, 0], expected.mean[:, 1], rtol=1e-5, atol=1e-5)
    write_card(point_run, load_config_file(point_run.folder / "config.yaml"), "brme")
    text = (folder / "README.md").read_text()
    assert "2 Bradley–Terry heads with adapters of their own" in text
    assert "A head has no std" in text
    assert "in the unit of the heads' loss" in text
    assert "mean and a std each" not in text
    code = next(part.partition("```")[0] for part in text.split("```python\n")[1:] if "peft" in part)
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(code, found)
    torch.testing.assert_close(found["mean"], expected.mean[0], rtol=1e-4, atol=1e-4)


def test_every_way_to_a_reward_reads_all_heads(run: Run) -> None:
    """Server, TRL and the Python class, each from the run's folder, say what the scorer says."""
    brme = str(run.folder / "brme")
    samples = [*unseen("long")[:3], Sample("Which?", "good")]
    expected = Scorer.load(brme)(samples).mean
    served = of_scorer(Scorer.load(brme), "x")
    torch.testing.assert_close(served([served.encode(one) for one in samples]).mean, expected, rtol=1e-5, atol=1e-5)
    model = RewardModel.from_pretrained(str(run.folder))
    rows = [{"prompt": one.prompt, "completion": one.completion} for one in samples]
    torch.testing.assert_close(model.score(rows).mean, expected, rtol=1e-5, atol=1e-5)
    single = Scorer.load(str(run.folder / "single"))(samples).mean
    torch.testing.assert_close(model.heads("single").score(rows).mean, single, rtol=1e-5, atol=1e-5)
    reward = RobustReward.load(brme, "worst_case")
    told = torch.tensor(reward([one.prompt for one in samples], [one.completion for one in samples]))
    assert reward.last is not None
    torch.testing.assert_close(reward.last.heads.mean, expected, rtol=1e-5, atol=1e-5)
    worst = (expected - expected.mean(0)).min(-1).values
    torch.testing.assert_close(told.diff() / told.std(), worst.diff() / worst.std(), rtol=1e-4, atol=1e-4)


def test_ppo_trains_on_their_worst_case(run: Run, prompts_file: Path, tmp_path: Path) -> None:
    model = str(run.folder.parent / "model")
    policy = train_policy.run(
        replace(
            LAPTOP_POLICY, prompts=str(prompts_file), reward=str(run.folder / "brme"), objective="worst_case",
            output=str(tmp_path / "policy"), model=model, num_steps=1, prompts_per_step=2, completions_per_prompt=2,
            max_tokens=4, adapted_layers=1, lora_rank=2, num_minibatches=1, baseline_completions=4, eval_completions=1,
        )
    )  # fmt: skip
    rows = [json.loads(line) for line in (policy.folder / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert all(len(row["mean"]) == 2 and row["mean"][0] != row["mean"][1] for row in rows)
    assert policy.metrics()[0]["gap"] > 0


def test_a_saved_copy_is_the_same_reward_model(run: Run, tmp_path: Path) -> None:
    RewardModel.from_pretrained(str(run.folder)).save_pretrained(tmp_path / "copy")
    one, other = (Scorer.load(str(path))(unseen("long")) for path in (run.folder / "brme", tmp_path / "copy"))
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-6, atol=1e-6)
    names = checkpoint_files(tmp_path / "copy")
    assert {f"{FOLDER}/head_{k}/adapter_model.safetensors" for k in range(2)} <= set(names)


def test_the_diversity_term_is_part_of_the_loss(tiny_model: str) -> None:
    """By hand for two maps; heads that are all alike are driven apart."""
    classifier, _ = load_trunk(tiny_model, 0)
    add_head_adapters(classifier, 2, 4, 1)
    maps = [module for module in classifier.modules() if isinstance(module, HeadLinear)]
    for module in maps:
        module.down_KRI.data[1] = module.down_KRI.data[0] + 1e-3 * torch.randn_like(module.down_KRI.data[0])
    loss = trunk_training.diverse(lambda logits, _: logits.sum(), classifier, 0.5)
    norms = [torch.linalg.matrix_norm(one.down_KRI.flatten(0, 1), kind) for kind in ("nuc", "fro") for one in maps]
    expected = sum(a / b for a, b in zip(norms[: len(maps)], norms[len(maps) :], strict=True)) / len(maps)
    value = loss(torch.full((1, 2, 4), 0.25), {})
    assert value.item() == pytest.approx(2 - 0.5 * torch.as_tensor(expected).item(), abs=1e-5)
    before = (maps[0].down_KRI[0] - maps[0].down_KRI[1]).norm().item()
    for _ in range(20):
        classifier.zero_grad()
        loss(torch.zeros(1, 2, 4), {}).backward()
        for module in maps:
            module.down_KRI.data -= 0.01 * module.down_KRI.grad.sign()
    assert (maps[0].down_KRI[0] - maps[0].down_KRI[1]).norm().item() > 3 * before


def test_the_card_reads_each_head_with_its_adapter(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code is run as it stands, in the checkpoint's folder."""
    write_card(run, load_config_file(run.folder / "config.yaml"), "brme")
    folder = run.folder / "brme"
    text = (folder / "README.md").read_text()
    assert "Without its adapter a label means nothing" in text
    code = next(part.partition("```")[0] for part in text.split("```python\n")[1:] if "peft" in part)
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(code, found)
    expected = Scorer.load(str(folder))([Sample("Review a film.", "A warm, funny film.")])
    torch.testing.assert_close(found["mean"], expected.mean[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["std"], expected.std[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_heads_as_one_with_the_same_batch(tiny_model: str, tmp_path: Path) -> None:
    """Data parallel, gloo on the CPU. Every head sees every pair; else its mean would be over its pairs in a part."""
    preferences = contradictory(tmp_path, 48)
    one = train_reward.run(config(tiny_model, preferences, tmp_path / "one", shards="same", device_batch_size=8))
    again = ["--config", str(one.folder / "config.yaml"), "--output", str(tmp_path / "two"), "--device-batch-size", "4"]
    launched(2, lambda: main(["train-reward", *again]), tmp_path)
    folders = [folder / "brme" / FOLDER / "head_1" for folder in (one.folder, tmp_path / "two")]
    alone, together = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    name = next(name for name in alone if name.endswith("lora_B.weight"))
    assert alone[name].norm() > 0
    assert (alone[name] - together[name]).norm() < 0.02 * alone[name].norm()


@pytest.mark.slow
def test_heads_are_planned_for_in_bfloat16(tiny_model: str) -> None:
    """More heads and more layers take more; nothing is loaded."""
    base = plan.Config(model=tiny_model, max_length=64, prompt_tokens=8, device_batch_size=2)
    found = [
        plan.plan_of(replace(base, adapter_heads=heads, head_layers=layers)).memory["train-reward"].total
        for heads, layers in ((0, 0), (2, 0), (4, 0), (4, 1))
    ]
    assert found[0] < found[1] < found[2]
    assert found[3] < found[2]
    with pytest.raises(PoiseError, match="does not go with --shard"):
        plan.run(replace(base, adapter_heads=2, shard=True))
