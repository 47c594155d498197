"""Every command that the documentation shows is one that this version has, with options that it takes.

The commands of docs/start/own.md are run from the first to the last, on a tiny model.
"""

import io
import json
import re
import shlex
from pathlib import Path

import pytest

from poise.cli.main import COMMANDS, main, parse_config, settings_of

pytestmark = pytest.mark.usefixtures("undrawn")
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands_of(page: Path) -> list[list[str]]:
    """The arguments after `poise` of every command in a page's shell blocks, comments left out."""
    found = []
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]  # settings of the environment
            if "poise.cli.main" in words:
                words = words[words.index("poise.cli.main") :]
            elif not words or Path(words[0]).name != "poise":
                continue
            found.append([word for word in words[1:] if word != "&"])
    return found


SHOWN = [(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands_of(page)]


def test_pages_show_commands() -> None:
    assert len(SHOWN) > 30
    assert {command[0] for _, command in SHOWN} <= {*COMMANDS, "COMMAND"}


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=lambda value: value if isinstance(value, str) else value[0])
def test_every_shown_command_takes_its_options(page: str, command: list[str]) -> None:
    name, *options = command
    assert page
    if name == "COMMAND" or "--tyro-print-completion" in options:
        return
    if "--config" in options:  # the file is the user's
        at = options.index("--config")
        options = options[:at] + options[at + 2 :]
        settings, _ = settings_of(name)
        required = [
            f"--{field.replace('_', '-')}=x"
            for field in ("prompts", "reward", "preferences")
            if field in settings.__dataclass_fields__
        ]
        options += [one for one in required if one.split("=")[0] not in options]
    settings, renamed = settings_of(name)
    parse_config(settings, f"poise {name}", options, renamed)


# What makes the journey short: everything else is as the page has it.
SHORT = {
    "train-reward": ["--head-steps", "5", "--no-feature-cache"],
    "evaluate-reward": ["--no-feature-cache"],
    "train-policy": [
        "--num-steps", "1", "--max-tokens", "4", "--prompts-per-step", "2", "--completions-per-prompt", "2",
        "--baseline-completions", "4", "--eval-completions", "1",
    ],
}  # fmt: skip
WORDS = ("warm", "cold", "dry", "sweet", "plain", "loud", "soft", "quick", "dull", "bright")


def own_files(folder: Path) -> None:
    """The user's files: conversations with system turns, as JSON lines."""
    rows, held_out, prompts, completions = [], [], [], []
    for number in range(40):
        word, other = WORDS[number % 10], WORDS[(number + 3) % 10]
        turns = [
            {"role": "system", "content": f"Answer in {1 + number % 3} words."},
            {"role": "user", "content": f"Is tea {word} number {number}?"},
        ]
        row = {
            "prompt": turns,
            "chosen": [{"role": "assistant", "content": f"{word} enough"}],
            "rejected": [{"role": "assistant", "content": other}],
        }
        (held_out if number >= 32 else rows).append(row)
        prompts.append({"messages": turns})
        completions.append({"prompt": turns, "completion": f"It is {word}."})
    for name, lines in (
        ("mine", rows), ("held_out", held_out), ("prompts", prompts[:4]), ("completions", completions[:6]),
    ):  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_journey_with_own_data_ends_in_a_model(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("Is tea warm?\n"))
    own_files(tmp_path)
    journey = commands_of(ROOT / "docs" / "start" / "own.md")
    assert len(journey) <= 8
    for name, *options in journey:
        words = [tiny_model if option == "MODEL" else option for option in options]
        assert main([name, *words, *SHORT.get(name, [])]) == 0, f"{name}: {capsys.readouterr().err}"
    assert (tmp_path / "my-model" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_python_of_the_readme_runs(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own_files(tmp_path)
    [block] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    shorter = {
        '"MODEL"': repr(tiny_model),
        "RewardConfig(": "RewardConfig(head_steps=5, feature_cache=False, ",
        "num_steps=40": "num_steps=1, max_tokens=4, prompts_per_step=2, completions_per_prompt=2, eval_completions=1",
    }
    for shown, short in shorter.items():
        assert shown in block
        block = block.replace(shown, short)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "my-policy" / "adapter_config.json").is_file()
    assert (tmp_path / "my-reward-model" / "config.json").is_file()
