"""The policy's card: its snippet runs and gives the trained policy, its numbers are the run's, it names no machine."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from conftest import rest_slow
from pages import UNSEEN, assert_all_is_seen
from poise.cli import train_policy as command
from poise.cli.train_policy import Config
from poise.policy.config import unread_settings
from poise.reports import policy_card
from poise.runtime.run_folder import Json, Run, config_dict, write_json
from poise.studies.config import LAPTOP_POLICY

TOKENS = torch.tensor([[5, 60, 100, 7, 33, 90, 12]])
SETTINGS = config_dict(
    replace(
        LAPTOP_POLICY,
        prompts="/home/me/prompts.jsonl", reward="/home/me/runs/rm", output="/home/me/run", model="user/model",
        reward_ceiling=2.0, num_steps=40, seed=7,
    )
)  # fmt: skip
RESULTS: Json = {
    "reward": 0.5149, "kl": 7.128, "steps": 40, "num_heads": 3, "alarms": [],
    "scale": {"head_baseline": [0.5, -1.25, 2.0], "mean": 0.125, "std": 0.75, "ceiling": 2.0, "count": 64},
}  # fmt: skip


@pytest.fixture(scope="module", params=["lora", "full"])
def finished(
    request: pytest.FixtureRequest, reward_folder: Path, prompts_file: Path, tiny_model: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Config:  # fmt: skip
    """A run of two steps, carded: its config."""
    config = replace(
        LAPTOP_POLICY,
        prompts=str(prompts_file), reward=str(reward_folder / "brme"), model=tiny_model, tune=request.param,
        output=str(tmp_path_factory.mktemp("policy") / "run"), learning_rate=1e-2,
        num_steps=2, prompts_per_step=2, completions_per_prompt=4, max_tokens=6, adapted_layers=2, lora_rank=4,
        baseline_completions=8, eval_completions=2,
    )  # fmt: skip
    command.run(config)
    return config


def text_of(settings: Json | None = None, results: Json | None = None, **tokenizer: Any) -> str:
    fake = type("Tokenizer", (), {"chat_template": None, **tokenizer})()
    settings = SETTINGS | (settings or {})
    unread = unread_settings(settings["algorithm"])
    return policy_card.card(fake, settings, RESULTS | (results or {}), {"poise-rlhf": "0.1.0"}, unread)


def front(text: str) -> Json:
    return yaml.safe_load(text.split("---\n")[1])


def trained(config: Config) -> transformers.PreTrainedModel:
    """The policy put together by hand: W + 2 B A, or its own weights, as the checkpoint has them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model)
    saved = load_file(Path(config.output) / "checkpoint.safetensors")
    weights = {name.removeprefix("weight.model."): value for name, value in saved.items() if "weight.model." in name}
    state = model.state_dict()
    for name, value in weights.items():
        if name.endswith("lora_A.default.weight"):
            key = name.removeprefix("base_model.model.").replace("lora_A.default.weight", "weight")
            state[key] += 2.0 * weights[name.replace("lora_A", "lora_B")] @ value
        elif "lora" not in name:
            state[name].copy_(value)
    model.load_state_dict(state)
    return model


# ---- the snippet ----


@pytest.mark.parametrize("base", rest_slow(["local", "hub"]))
@pytest.mark.parametrize("template", rest_slow([True, False]))
def test_the_snippet_gives_the_trained_policy(
    finished: Config, template: bool, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(finished.output, folder)
    if not template:
        (folder / "policy" / "chat_template.jinja").unlink()
    config = replace(finished, output=str(folder))
    if base == "hub":  # where "user/model" is found, it is the tiny model
        record = (folder / "config.yaml").read_text().replace(config.model, "user/model")
        (folder / "config.yaml").write_text(record)
        config = replace(config, model="user/model")
    command.run(config)
    monkeypatch.chdir(folder / "policy")
    if base == "hub":
        Path("user").mkdir()
        Path("user/model").symlink_to(finished.model)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "policy" / "README.md").read_text(), re.DOTALL)
    assert ('"user/model"' in code) == (base == "hub" and config.tune == "lora")
    capsys.readouterr()
    read: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(code, read)
    with torch.no_grad():
        says, expected = (model.eval()(TOKENS).logits for model in (read["model"], trained(finished)))
        initial = transformers.AutoModelForCausalLM.from_pretrained(finished.model).eval()(TOKENS).logits
    torch.testing.assert_close(says, expected, rtol=0, atol=1e-5)
    assert (says - initial).abs().max() > 1e-3  # it was trained
    assert (read["tokenizer"].chat_template is not None) == template
    written = read["written"][0, read["ids"].shape[1] :]
    assert 1 <= len(written) <= config.max_tokens
    assert capsys.readouterr().out == read["tokenizer"].decode(written, skip_special_tokens=True) + "\n"
    text = read["tokenizer"].decode(read["ids"][0])
    assert text.endswith("Review a film.<|im_end|>\n<|im_start|>assistant\n" if template else "Review a film.")


# ---- what a run writes ----


def test_a_card_is_written_beside_untouched_weights(
    finished: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.output, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    card = folder / "policy" / "README.md"
    card.unlink()
    # A finished run is not trained again, nor is any model loaded.
    monkeypatch.delattr(transformers.AutoModelForCausalLM, "from_pretrained")
    assert command.run(replace(finished, output=str(folder))).folder == folder
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    card.unlink()
    monkeypatch.setattr("poise.cli.train_policy.is_main_process", lambda: False)  # another process writes nothing
    command.run(replace(finished, output=str(folder)))
    assert not card.exists()


def test_a_card_has_the_runs_numbers_and_names_no_machine(finished: Config) -> None:
    folder = Path(finished.output)
    text, results = ((folder / name).read_text() for name in ("policy/README.md", "results.json"))
    done = json.loads(results)
    for line in (
        f"| reward | {done['reward']:+.2f} |",
        f"| KL to the initial policy, nats per completion | {done['kl']:.2f} |",
        "| steps | 2 of 2 |",
        "| alarms of the monitor | none |",
        f"| std of the objective | {done['scale']['std']:.6g} |",
        "| prompts | `prompts.jsonl` |",
        "| reward | `brme` |",
        "| learning_rate | 0.01 |",
    ):
        assert line in text.splitlines()
    assert "of 8 completions of the initial policy, which so gets 0" in text
    for path in (finished.prompts, finished.model, finished.reward, finished.output):
        assert str(Path(path).parent) not in text
    versions = json.loads((folder / "environment.json").read_text())["versions"]
    assert f"torch {versions['torch']}" in text
    library = {"lora": "peft", "full": "transformers"}[finished.tune]
    assert front(text) == {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["poise", "reward-robust-rlhf", "ppo"],
    }
    assert ("LoRA adapters of rank 4 on the upper 2 layers of `llama`" in text) == (finished.tune == "lora")
    assert ("The whole of `llama` with the upper 2 layers tuned" in text) == (finished.tune == "full")
    assert ("poise merge RUN" in text) == (finished.tune == "lora")


def test_policies_kept_on_the_way_say_which_they_are(finished: Config, tmp_path: Path) -> None:
    """Theirs are not the numbers of the run's last one, also once their adapters are folded in."""
    run, target = tmp_path / "run", tmp_path / "merged"
    shutil.copytree(finished.output, run)
    shutil.rmtree(run / "ladder", ignore_errors=True)
    for kept in ("ladder/kl-5", "best"):
        shutil.copytree(run / "policy", run / kept)
    write_json(run / "best" / "best.json", {"step": 1, "kl": 2.5, "validator": 0.75})
    (run / "ladder.jsonl").write_text('{"step": 0, "rung": 5.0, "kl": 5.25}\n')
    settings = config_dict(replace(finished, output=str(run)))
    policy_card.write_card(Run(run), settings)
    target.mkdir()
    shutil.copytree(run / "policy", target, dirs_exist_ok=True)
    words = {
        "best": "The policy of step 1, kept because its validator likes it best: by +0.75 stds more than the start, at "
        "KL 2.5 nats.",
        "ladder/kl-5": "The policy of step 0, kept as the first whose KL reached 5 nats: it has 5.2.",
        "policy": "",
        ".": "",
    }
    for name, said in words.items():
        policy_card.write_merged_card(run / name, target)
        texts = [(target / "README.md").read_text()]
        texts += [(run / name / "README.md").read_text()] if name != "." else []
        for text in texts:
            assert ("## What came out" in text) == (not said)
            assert said in text
            assert "## Training settings" in text
            assert "trained by PPO" in text
    (target / "README.md").unlink()
    shutil.copytree(run / "policy", run / "mine")  # a copy in the run, of which the run says nothing
    policy_card.write_merged_card(run / "mine", target)
    assert not (target / "README.md").exists()


# ---- what a card says ----


def test_what_it_was_trained_with() -> None:
    text = text_of()
    assert front(text)["base_model"] == "user/model"
    assert "base_model" not in text_of({"model": "/models/mine"}).split("---\n")[1]
    assert (
        "LoRA adapters of rank 16 on the upper 10 layers of `user/model`, trained by PPO to please the reward model "
        "`rm` (3 heads, objective `tradeoff(0.4)`, kl_coef 0.05)." in text
    )
    for line in (
        "| reward | +0.51 |",
        "| KL to the initial policy, nats per completion | 7.13 |",
        "| steps | 40 of 40 |",
        "| subtracted from each head | 0.5, -1.25, 2 |",
        "| mean of the objective | 0.125 |",
        "| std of the objective | 0.75 |",
        "| floor | none |",
        "| ceiling | 2 |",
        "| kl_coef | 0.05 |",
        "| seed | 7 |",
    ):
        assert line in text.splitlines()
    assert "Reward and KL over 4 completions of each prompt of `prompts.jsonl`." in text
    assert "of each prompt of `held.jsonl`." in text_of({"eval_prompts": "/data/held.jsonl"})
    assert "made with poise-rlhf 0.1.0." in text
    assert "/home/me" not in text
    assert "None" not in text
    assert "all layers of `user/model`" in text_of({"adapted_layers": 0})
    assert "(1 head, objective" in text_of(results={"num_heads": 1})
    assert "(2 posterior heads, objective" in text_of(results={"num_heads": 2, "heads": "posterior"})


def test_limits_are_said() -> None:
    text = text_of()
    assert "not a person's judgment" in text
    assert "No gold was seen" in text
    assert "completions of at most 20 tokens" in text


def test_alarms_come_first_and_plainly() -> None:
    assert "raised an alarm" not in text_of()
    assert "| alarms of the monitor | none |" in text_of()
    once = text_of(results={"alarms": [{"step": 12, "score": 1.305, "action": "log"}]})
    lines = [line for line in once.split("---\n", 2)[2].splitlines() if line]
    assert lines[0].startswith("# ")
    assert lines[1].startswith(
        "> **The monitor raised an alarm: signs of over-optimization** at step 12 (score 1.30 at most, threshold 1). "
        "Training went on all the same."
    )
    assert "| alarms of the monitor | 1, the first at step 12 |" in once
    many = {"alarms": [{"step": step, "score": step / 10} for step in range(11, 24)]}  # as RLOO and GRPO log them
    text = text_of({"on_alarm": "stop"}, many)
    assert "at steps 11, 12, 13, 14, 15, 16, 17, 18, 19, 20 and 3 later ones (score 2.30 at most" in text
    assert "Training ended there." in text
    assert "| alarms of the monitor | 13, the first at step 11 |" in text
    assert "the last policy that looked safe, which is this one." in text_of({"on_alarm": "rollback"}, many)
    assert "each time with twice the KL penalty" in text_of({"on_alarm": "pessimism"}, many)


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_other_algorithms_are_not_said_to_be_ppo(algorithm: str) -> None:
    text = text_of({"algorithm": algorithm})
    assert f"# Policy trained by {algorithm.upper()}" in text
    assert "PPO" not in text
    assert front(text)["tags"][-1] == algorithm
    assert "| value_clip |" in text_of()
    assert "| value_clip |" not in text
    assert "| clip | 0.2 |" in text


def test_what_the_scale_was_taken_from() -> None:
    assert "of 64 completions of the initial policy, which so gets 0" in text_of()
    assert "of the 64 completions up to the last step" in text_of({"reward_norm": "running"})
    assert "of the 64 completions of the last step" in text_of({"reward_norm": "batch"})


def test_names_are_text_in_a_card() -> None:
    name = f"/here/<b>[x](y)`|{UNSEEN}.jsonl"
    text = text_of({"prompts": name, "model": f"<i>{UNSEEN}"})
    assert_all_is_seen(text)
    assert r"| prompts | `<b>[x](y)'\|" in text
    for line in text.splitlines():
        assert "<b>" not in re.sub("`[^`]*`", "", line)


def test_a_merged_model_is_read_without_adapters(tmp_path: Path) -> None:
    fake = type("Tokenizer", (), {"chat_template": None})()
    text = policy_card.card(fake, SETTINGS, RESULTS, {}, merged=True)
    assert "LoRA adapters of rank 16" in text
    assert ", folded into it, trained by PPO" in text
    assert "PeftModel" not in text
    assert front(text)["library_name"] == "transformers"
    assert "folded" not in text_of().split("## What it is not")[0]
    policy_card.write_merged_card(tmp_path, tmp_path)  # a policy of no run: what it was trained for is not known
    assert list(tmp_path.iterdir()) == []
