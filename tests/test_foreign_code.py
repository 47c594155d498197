"""Code that a model folder brings is never run, and nobody is asked whether it may."""

import ast
import builtins
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from poise.cli import main as cli
from poise.errors import PoiseError
from poise.models.loading import load_adapters, load_policy
from poise.models.model_config import load_config
from poise.models.policy import Policy

SOURCES = Path(__file__).parents[1] / "src" / "poise"


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A file that the code of `with_code` writes when it is imported."""
    return tmp_path / "ran"


def with_code(folder: Path, ran: Path, *, known: bool = False) -> Path:
    """The model folder with code of its own at every place where transformers looks for some.

    known: of a type that transformers has classes for, so that the code is not needed.
    """
    code = f"open({str(ran)!r}, 'w').write('run')\n"
    for name in ("evil.py", "custom_generate/generate.py", "tokenization.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    classes = ("Config", "Model", "ModelForCausalLM", "ModelForSequenceClassification", "Tokenizer")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {f"Auto{name}": f"evil.{name}" for name in classes}
    if not known:
        config["model_type"] = "of_its_own"
    (folder / "config.json").write_text(json.dumps(config))
    if (path := folder / "tokenizer_config.json").exists():
        settings = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["tokenization.T", None]}}
        path.write_text(json.dumps(settings))
    return folder


@pytest.fixture
def answers_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input that agrees to everything, and a failure of the test if anything asks."""

    def asked(prompt: str = "") -> str:
        raise AssertionError(f"a library asks: {prompt}")

    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 20))
    monkeypatch.setattr(builtins, "input", asked)


@pytest.fixture(scope="module")
def reward(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> Path:
    return train_tiny_reward(tiny_model)


@pytest.mark.usefixtures("answers_yes")
@pytest.mark.parametrize(
    "command",
    ["train-reward", "score", "train-policy", "train-policy against", "evaluate-policy", "export", "merge", "ensemble"],
)
def test_no_command_runs_it(
    command: str, reward: Path, tiny_model: str, preferences_file: Path, prompts_file: Path, ran: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = str(with_code(Path(shutil.copytree(tiny_model, tmp_path / "model")), ran))
    judge = str(with_code(Path(shutil.copytree(reward / "brme", tmp_path / "judge")), ran))
    adapters = tmp_path / "run" / "policy"
    if command == "merge":
        Policy(*load_policy(tiny_model), adapted_layers=1, rank=2).save(str(adapters))
        settings = json.loads((adapters / "adapter_config.json").read_text()) | {"base_model_name_or_path": model}
        (adapters / "adapter_config.json").write_text(json.dumps(settings))
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"prompt": "a", "completion": "b"}\n')
    policy = ["--prompts", str(prompts_file), "--prompts-per-step", "2"]
    rest = {
        "train-reward": ["--preferences", str(preferences_file), "--model", model],
        "score": [judge, str(samples)],
        "train-policy": [*policy, "--model", model, "--reward", str(reward)],
        "train-policy against": [*policy, "--model", tiny_model, "--reward", judge],
        "evaluate-policy": ["--model", model, "--policies", model, "--data", str(tmp_path), "--tasks", "race"],
        "export": [judge, "--scalar", "mean"],
        "merge": [str(adapters)],
        "ensemble": [judge, str(reward / "single"), "--reference", str(preferences_file)],
    }[command]
    (tmp_path / "race.jsonl").write_text("{}\n")
    assert cli.main([command.split()[0], *rest, "--output", str(tmp_path / "output")]) == 2
    said = capsys.readouterr().err
    assert [line[:7] for line in said.splitlines() if " left" not in line] == ["poise: "], said  # and progress bars
    assert "trust_remote_code" not in said  # advice that nobody can follow here
    assert not ran.exists()


@pytest.mark.usefixtures("answers_yes")
def test_a_known_model_is_read_without_the_code_beside_it(tiny_model: str, ran: Path, tmp_path: Path) -> None:
    model = with_code(Path(shutil.copytree(tiny_model, tmp_path / "model")), ran, known=True)
    policy, _ = load_policy(str(model))
    policy.generate(max_new_tokens=1, do_sample=False)
    assert type(policy).__module__.startswith("transformers.")
    assert not ran.exists()


def test_kernels_named_by_a_model_are_not_fetched(tiny_model: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text()) | {"attn_implementation": "someone/kernels"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(PoiseError, match="attention code from someone/kernels"):
        load_config(str(model))


@pytest.mark.parametrize(
    "other",
    [
        {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}},
        {"peft_type": "XLORA", "adapters": {"0": "elsewhere"}},
        {"megatron_config": {"a": 1}, "megatron_core": "evil"},
    ],
)
def test_adapters_of_other_kinds_are_refused_before_peft_reads_them(
    tiny_model: str, tmp_path: Path, other: dict[str, object]
) -> None:
    model, tokenizer = load_policy(tiny_model)
    Policy(model, tokenizer, adapted_layers=1, rank=2).save(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    with pytest.raises(PoiseError, match="not of plain LoRA adapters"):
        load_adapters(load_policy(tiny_model)[0], str(tmp_path))


def test_every_load_says_that_no_code_is_trusted() -> None:
    """Each `from_pretrained` in the sources passes trust_remote_code=False, but PEFT's (a model, or JSON) and ours."""
    found = 0
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            trust = options.get("trust_remote_code")
            assert trust is None or (isinstance(trust, ast.Constant) and trust.value is False), f"{path}:{node.lineno}"
            if name == "from_pretrained" and not ast.unparse(node.func).startswith(("peft.Peft", "RewardModel.")):
                assert trust is not None, f"{path}:{node.lineno} may ask or run code of a model folder"
                found += 1
            if name in ("pipeline", "load_dataset_builder"):
                raise AssertionError(f"{path}:{node.lineno} may run code of a repository")
    assert found >= 4
