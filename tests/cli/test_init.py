"""`poise init`: its file says every setting and changes none."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from poise.cli import init
from poise.cli.main import main, parse_config, settings_of
from poise.runtime.run_folder import config_dict
from poise.studies.config import SET_BY_STUDY


@pytest.mark.parametrize("command", list(init.COMMANDS))
def test_its_file_is_the_defaults(command: str, tmp_path: Path) -> None:
    path = init.run(init.Config(command, str(tmp_path / "x.yaml")))  # type: ignore[arg-type]
    settings, renamed = settings_of(command)
    assert parse_config(settings, command, ["--config", str(path)], renamed) == settings()
    written, default = yaml.safe_load(path.read_text()), config_dict(settings())

    def names(values: dict[str, Any], group: str = "") -> set[str]:
        found = {f"{group}{name}" for name in values}
        return found.union(*(names(inner, f"{name}.") for name, inner in values.items() if isinstance(inner, dict)))

    assert names(written) == names(default) - (SET_BY_STUDY.keys() if command == "study" else set())


def test_every_setting_follows_its_help() -> None:
    lines = init.text_of("train-policy").splitlines()
    at = lines.index("kl_target: 10.0")
    assert lines[at - 1].startswith("# Adapt β to hold the KL of a completion")
    assert "# Clip range of the probability ratio." in lines  # of a class that it derives from
    study = init.text_of("study").splitlines()
    assert "  # Longest completion, in tokens." in study
    assert "  max_tokens: 20" in study
    for command in init.COMMANDS:
        blocks = init.text_of(command).split("\n\n")
        assert all(block.lstrip().startswith("#") for block in blocks), command


def test_a_file_that_exists_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "train-reward"]) == 0
    assert "poise train-reward --config train-reward.yaml" in " ".join(capsys.readouterr().err.split())
    before = (tmp_path / "train-reward.yaml").read_text()
    assert main(["init", "train-reward"]) == 2
    assert (tmp_path / "train-reward.yaml").read_text() == before
