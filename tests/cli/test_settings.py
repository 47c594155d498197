"""Settings of all commands: one typed place, the same for the command line, config files and the options of a study."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from poise.cli import ending
from poise.cli.main import COMMANDS, main, parse_config, settings_of
from poise.data.examples import EXAMPLES
from poise.policy.config import Config as PolicyConfig
from poise.runtime.settings import Rows, Settings, finite_or_raise, hints, marks, problem, typed_fields, unread

WRONG = {
    "--num-layers": ("-1", "at least 0"),
    "--head-lr": ("inf", "a finite number"),
    "--epochs": ("0", "above 0"),
    "--batch-size": ("-8", "at least 1"),
    "--device-batch-size": ("0", "at least 1"),
    "--seed": ("-1", "at least 0"),
    "--lora-rank": ("0", "at least 1"),
    "--learning-rate": ("nan", "a finite number"),
    "--validation-share": ("1", "in (0, 1)"),
    "--label-smoothing": ("0.5", "in [0, 0.5)"),
    "--posterior-heads": ("1", "at least 2"),
    "--head-steps": ("99999999999", "at most 2147483647"),
    "--max-length": ("7", "at least 8"),
}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("poise: "), err
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("option", WRONG)
def test_one_line_names_option_value_and_range(
    option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, preferences_file: Path
) -> None:
    value, words = WRONG[option]
    number: Any = float(value) if value in ("inf", "nan") else json.loads(value)
    settings = tmp_path / "config.yaml"
    settings.write_text(yaml.safe_dump({option[2:].replace("-", "_"): number, "preferences": str(preferences_file)}))
    output = ["--output", str(tmp_path / "run")]
    said = [
        refused(capsys, ["train-reward", "--preferences", str(preferences_file), option, value, *output]),
        refused(capsys, ["train-reward", "--config", str(settings), *output]),
    ]
    assert said[0] == said[1] == f"poise: {option} must be {words}, got {value}\n"
    nested = f"--reward.{option[2:]}"
    if option != "--seed":  # the study sets the seed
        said += [refused(capsys, ["study", nested, value, *output])]
        assert said[2] == f"poise: {nested} must be {words}, got {value}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("on_alarm: evil", "must be one of log, stop, rollback, pessimism: on_alarm cannot be 'evil'"),
        ("num_steps: 1.5", "must be a whole number: num_steps cannot be 1.5"),
        ("num_steps: true", "must be a whole number: num_steps cannot be True"),
        ("kl_coef: .nan", "--kl-coef must be a finite number, got nan"),
        ("reward_floor: 0.0\nreward_ceiling: -1.0", "--reward-floor must be below --reward-ceiling, got 0 and -1"),
        ("reward_floor: 2\nreward_ceiling: 1", "--reward-floor must be below --reward-ceiling, got 2 and 1"),
        ("objective: tradeoff(nan)", "tradeoff takes no parameter 'nan'"),
        ("objective: lower_confidence(1e400)", "lower_confidence takes no parameter '1e400'"),
        ("objective: lower_confidence(-1)", "lower_confidence's coefficient must be at least 0, got -1"),
        ("eval_tasks: lambada", "must be a list: eval_tasks cannot be 'lambada'"),
    ],
)
def test_a_config_file_is_checked_like_options(
    settings: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"prompts: p.jsonl\nreward: r\n{settings}\n")
    assert words in refused(capsys, ["train-policy", "--config", str(path), "--output", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_floor_of_zero_is_a_floor() -> None:
    with pytest.raises(ValueError, match="--reward-floor must be below"):
        PolicyConfig(prompts="p", reward="r", reward_floor=0.0, reward_ceiling=0.0).check()
    PolicyConfig(prompts="p", reward="r", reward_floor=0.0, reward_ceiling=1.0).check()


def test_options_that_tyro_refuses_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--num-layers" in refused(capsys, ["train-reward", "--preferences", "x", "--num-layers", "[/b]"])
    assert "'half'" in refused(capsys, ["train-reward", "--preferences", "x", "--trunk", "half"])
    assert "--nonsense" in refused(capsys, ["toy", "--nonsense", "1"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range(command: str) -> None:
    """A new setting that counts or scales must say what it may be."""
    config = settings_of(command)[0]
    assert issubclass(config, Settings), command
    required = [f for f in dataclasses.fields(config) if f.default is dataclasses.MISSING]
    values: dict[str, Any] = {field.name: ("a", "b") if "tuple" in str(field.type) else "a" for field in required}
    for name in values:
        inner = get_args(hints(config)[name])
        choices = get_args(inner[0]) if inner else ()  # of a Literal
        values[name] = choices[0] if choices and isinstance(values[name], str) else values[name]
    for name, (kind, value) in typed_fields(config(**values)).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert list(marks(kind)), f"{command} --{name} has no range"
            assert problem(math.nan, kind), name
            assert problem(10**400, kind), name


LATE = {
    "a setting": ["train-reward", "--preferences", "x.jsonl", "--num-layers", "-1"],
    "a policy's setting": ["train-policy", "--prompts", "p", "--reward", "r", "--objective", "best"],
    "a study's setting": ["study", "--policy.kl-coef", "-1"],
    "a missing file": ["train-reward", "--preferences", "/nowhere/x.jsonl"],
    "a missing model": ["score", "/nowhere/reward", __file__],
    "help": ["train-policy", "--help"],
}


@pytest.mark.parametrize("what", LATE)
def test_bad_input_is_refused_before_torch_is_imported(what: str) -> None:
    program = (
        "import sys\nfrom poise.cli.main import main\n"
        "try: code = main(sys.argv[1:])\nexcept SystemExit as stop: code = stop.code\n"
        "print(code, sorted({'torch', 'transformers', 'trl', 'scipy', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program, *LATE[what]], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{0 if what == 'help' else 2} []", done.stderr


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_named_and_not_written(value: float) -> None:
    with pytest.raises(ValueError, match=r"x.jsonl: mean, number 2, number 1 is -?(nan|inf), not a number"):
        finite_or_raise({"std": [1.0], "mean": [[0.0], [value]], "text": "a"}, "x.jsonl")


def test_score_writes_no_null(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from poise.functional.objectives import HeadRewards
    from poise.models.reward_model import HeadLayout
    from poise.reward import score

    class Broken(score.Scorer):
        """A reward model whose trunk overflows."""

        def __init__(self) -> None:
            self.layout = HeadLayout(1, "point", (0.0,))
            self.extract = type("E", (), {"num_truncated": 0, "tokenizer": None, "max_length": 64})  # type: ignore[assignment]

        def __call__(self, samples: list[Any], *_: Any) -> HeadRewards:
            return HeadRewards(torch.full((len(samples), 1), math.nan), torch.zeros(len(samples), 1))

        @staticmethod
        def load(*_: Any, **__: Any) -> "Broken":  # type: ignore[override]
            return Broken()

    monkeypatch.setattr(score, "Scorer", Broken)
    monkeypatch.setattr(score, "row_check_of_rewards", lambda _: None)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Review.", "completion": "good"}\n')
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(tiny_model).iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"id2label": {"0": "LABEL_0"}, "architectures": None}))
    assert main(["score", str(model), str(rows), "--objective", "mean"]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("poise: ")]
    assert "the score: reward, number 1 is nan" in line
    assert not (tmp_path / "rows.scored.jsonl").exists()


SHOWN = {
    "train-reward": ["preferences"], "evaluate-reward": ["questions"], "score": ["samples"],
    "train-policy": ["prompts", "samples"],
    "best-of-n": ["prompts"], "trust": ["prompts", "preferences"], "ensemble": ["preferences"],
    "study": ["preferences", "prompts"],
    "reference": ["preferences", "samples"], "serve": ["preferences"],
}  # fmt: skip


@pytest.mark.parametrize("command", SHOWN)
def test_help_shows_a_row_of_every_kind_of_file(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    said = re.sub(r"[\s│]+", "", re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out))
    for kind in SHOWN[command]:
        assert re.sub(r"\s+", "", EXAMPLES[kind]) in said
    assert "docs/data.md" in said


def test_every_command_that_names_a_file_of_rows_is_among_them() -> None:
    def kinds(command: str) -> list[str]:
        found = (mark for kind in hints(settings_of(command)[0]).values() for mark in marks(kind))
        return list(dict.fromkeys(mark.kind for mark in found if isinstance(mark, Rows)))

    assert {command: of for command in COMMANDS if (of := kinds(command))} == SHOWN


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["quickstart", "--arms", "robust", "robust"], "--arms names robust twice"),
        (["compare", "--arms", "runs/a", "runs/a"], "--arms names runs/a twice"),
        (["best-of-n", "--prompts", "p", "--reward", "r", "--objectives", "a:mean", "a:mean"], "names a:mean twice"),
        (["trust", "runs/rm", "--prompts", "p", "--validator", "runs/../runs/rm"], "agrees with itself"),
    ],
)
def test_the_same_thing_twice_is_refused_before_anything_is_trained(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert reason in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("train-policy", "--tune full --lora-rank 8", ["--lora-rank is not read: it needs --tune lora"]),
        (
            "train-policy",
            "--eval-tasks piqa --eval-rows 3",
            ["--eval-tasks is not", "--eval-rows is not read: it needs"],
        ),
        ("train-policy", "--eval-tasks piqa --eval-every 2", []),
        ("train-policy", "--baselines-per-prompt 9", ["it needs --shaping contrastive or par, and no --baselines"]),
        ("train-policy", "--regret-bonus 1 --completions-per-prompt 1", ["it needs at least two --completions-per"]),
        ("train-policy", "--kl-target None --kl-horizon 9", ["--kl-horizon is not read: it needs a --kl-target"]),
        ("train-reward", "--trunk frozen --epochs 3 --batch-size 32", ["--epochs is not", "--batch-size is not read"]),
        ("train-reward", "--trunk frozen --stage2-trunk lora --epochs 3 --lora-rank 3", []),
        ("train-reward", "--trunk full --lora-rank 3 --head-layers 1", ["--head-layers is not", "--lora-rank is not"]),
        (
            "serve",
            "rm --scale-count 5 --reference p",
            ["--reference is not read: it needs several", "--scale-count is"],
        ),
        ("data", "p --max-length 9", ["--max-length is not read: it needs --model"]),
        (
            "study",
            "--reward.epochs 3 --policy.tune full --policy.lora-rank 3",
            ["--reward.epochs", "--policy.lora-rank"],
        ),
        (
            "study",
            "--raters p --pool-size 0 --pool-seeds 3 --policy-seeds 0 --reward-seeds 2",
            ["--raters is not read: it needs --label-noise raters", "--pool-seeds is not", "--reward-seeds is not"],
        ),
        ("study", "--raters p --label-noise raters --policy-noise raters", []),
        ("study", "", []),
    ],
)
def test_a_setting_that_nothing_reads_is_said(command: str, words: str, said: list[str]) -> None:
    config = parse_config(settings_of(command)[0], f"poise {command}", words.split())
    for line, start in zip(unread(config), said, strict=True):
        assert start in line
    ending.say_unread(config)


def test_what_is_not_read_is_a_warning_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."}\n')
    assert main(["data", str(tmp_path / "pairs.jsonl"), "--max-length", "9"]) == 0
    assert capsys.readouterr().err == "warning: --max-length is not read: it needs --model\n"


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["toy", "--output", ""], "--output"),
        (["best-of-n", "--prompts", "", "--reward", "r"], "--prompts"),
        (["compare", "--arms", "a", ""], "--arms"),
        (["train-policy", "--prompts", "p", "--reward", "r", "--model", " "], "--model"),
        (["study", "--model", ""], "--model"),
        (["watch", ""], "--folders"),
    ],
)
def test_a_name_is_not_empty(arguments: list[str], option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{option} is empty; name something, or leave it out" in refused(capsys, arguments)
