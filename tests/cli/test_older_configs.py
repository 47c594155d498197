"""config.yaml of a run before the defaults changed (version 0.1.0, November 2026): the same run today.

older/*.yaml hold every setting of that version at its default then, but for names of files and the objective.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from poise.cli.main import parse_config, settings_of
from poise.errors import PoiseError
from poise.models import run_heads
from poise.runtime.run_folder import Run, config_dict, write_atomic

OLDER = Path(__file__).parent / "older"
# What settings that came later are in such a run: without them a run folder's reward was its BRME.
LATER = {
    "train-reward": {"shard": False, "head_layers": 0, "adapter_diversity": 0.0, "validator_share": 0.0},
    "train-policy": {
        "heads": "brme",
        "max_kl": None,
        "validator": "",
        "keep_at_kl": [],
        "shard": False,
        "gradient_checkpointing": False,
        "gradient_regularization": 0.0,
        "regret_bonus": 0.0,
    },
}


@pytest.mark.parametrize("command", list(LATER))
def test_it_is_read_as_it_was_meant(command: str, tmp_path: Path) -> None:
    before = yaml.safe_load((OLDER / f"{command}.yaml").read_text())
    settings, renamed = settings_of(command)
    config = parse_config(settings, command, ["--config", str(OLDER / f"{command}.yaml")], renamed)
    assert config_dict(config) == before | LATER[command]
    config.check()
    # The run's own folder takes it, and goes on.
    write_atomic(tmp_path / "config.yaml", yaml.safe_dump(before))
    (tmp_path / "results.json").write_text("{}")  # without any work a folder is taken over
    Run(tmp_path).check_config(config)
    with pytest.raises(PoiseError, match="differs in seed"):
        Run(tmp_path).check_config(replace(config, seed=5))


def test_a_part_of_a_config_gets_the_present_defaults(tmp_path: Path) -> None:
    """Only the whole config of an older run speaks of then; a few lines of one's own do not."""
    path = tmp_path / "mine.yaml"
    path.write_text("reward: runs/reward\nprompts: p.jsonl\n")
    settings, renamed = settings_of("train-policy")
    config = parse_config(settings, "train-policy", ["--config", str(path)], renamed)
    assert config.heads is None
    assert config == settings(reward="runs/reward", prompts="p.jsonl")


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_older_runs_of_trl_pass_the_checks(algorithm: str) -> None:
    """Their files name PPO's settings at the defaults of then, which neither trainer reads."""
    settings, renamed = settings_of("train-policy")
    path = ["--config", str(OLDER / "train-policy.yaml"), "--algorithm", algorithm]
    config = parse_config(settings, "train-policy", path, renamed)
    config.check()
    with pytest.raises(PoiseError, match="--kl-target is for --algorithm ppo"):
        replace(config, kl_target=3.0).check()


def test_heads_of_a_run(tmp_path: Path) -> None:
    for kind in ("brme", "posterior"):
        (tmp_path / "run" / kind).mkdir(parents=True)
        (tmp_path / "run" / kind / "config.json").write_text("{}")
    run = str(tmp_path / "run")
    assert run_heads.reward_folder(run, "lower_confidence(1)") == f"{run}/posterior"
    assert run_heads.reward_folder(run, "lower_confidence(1)", "brme") == f"{run}/brme"
    assert run_heads.reward_folder(run, "tradeoff(0.4)") == f"{run}/brme"
    assert run_heads.reward_folder(f"{run}/posterior", "tradeoff(0.4)") == f"{run}/posterior"
    with pytest.raises(PoiseError, match="has no single heads; --heads takes one of posterior, brme"):
        run_heads.reward_folder(run, "nominal", "single")
    with pytest.raises(PoiseError, match="is no `poise train-reward` run"):
        run_heads.reward_folder("me/rm", "nominal", "single")
