"""`poise inspect` and `poise chat`: what is typed or piped in, and what comes back."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from poise.cli import chat, inspect
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.models.loading import load_policy
from poise.models.policy import Policy
from poise.models.scorer import Scorer


@pytest.fixture(scope="module")
def reward(train_tiny_reward: Callable[[str], Path], tiny_model: str) -> Path:
    return train_tiny_reward(tiny_model)


def pipe(text: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "stdin", io.StringIO(text))


def test_inspect_reads_a_pipe_of_text_and_of_rows(
    reward: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe("Review a film.\ngood\nbad\n", monkeypatch)
    inspect.run(inspect.Config(str(reward)))
    plain = capsys.readouterr().out
    pipe(json.dumps({"prompt": "Review a film.", "completions": ["good", "bad"]}) + "\n", monkeypatch)
    inspect.run(inspect.Config(str(reward)))
    assert capsys.readouterr().out == plain
    assert plain.count("nominal: the lowest std") == plain.count("disagreement") == 2
    pipe("Only a prompt\n", monkeypatch)
    with pytest.raises(PoiseError, match="nothing to score"):
        inspect.run(inspect.Config(str(reward)))
    pipe('{"prompt": "x"}\n', monkeypatch)
    with pytest.raises(PoiseError, match="line 1 of the input: no 'completion'"):
        inspect.run(inspect.Config(str(reward)))


def test_inspect_says_what_every_head_says_and_what_was_cut(reward: Path) -> None:
    sample = Sample("Review a film.", "good")
    scorer = Scorer.load(str(reward), 16)
    found = inspect.describe(scorer, sample)
    heads = scorer([sample])
    assert found["mean"] == heads.mean[0].tolist()
    assert found["worst_case"] == pytest.approx(min(found["mean"]))
    assert found["routing_std"] == pytest.approx(found["std"][found["nominal_head"]])
    assert found["lost"] == found["tokens"] - 16 > 0
    text = inspect.as_text(found | {"lost_text": "\x1b[31mold"})
    assert r"\x1b[31mold" in text.replace("\\\\", "\\")
    assert "\x1b" not in text


def test_chat_answers_each_line_of_a_pipe_in_one_conversation(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe("hello\n\nagain\n", monkeypatch)
    chat.run(chat.Config(tiny_model, max_tokens=3, temperature=0.0))
    assert len(capsys.readouterr().out.splitlines()) >= 2
    talker = chat.Talker(chat.Config(tiny_model, max_tokens=3, temperature=0.0, system="Be brief."))
    said = talker.answer("hello")
    assert [turn["role"] for turn in talker.turns] == ["system", "user", "assistant"]
    talker.begin()
    assert talker.answer("hello") == said  # the same conversation from its beginning, greedily
    with pytest.raises(PoiseError, match="longer than the model's context"):
        talker.answer("x" * 300)
    talker.tokenizer.add_tokens(["<x>"])  # which the model does not embed
    with pytest.raises(PoiseError, match="holds the token '<x>' with id"):
        talker.answer("<x>")


def test_chat_samples_as_training_did_whatever_the_generation_config_says(tiny_model: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "x")
    transformers.GenerationConfig(
        repetition_penalty=1.8, no_repeat_ngram_size=1, min_new_tokens=9, suppress_tokens=list(range(40, 200)),
        stop_strings=["."], eos_token_id=2,
    ).save_pretrained(tmp_path / "x")  # fmt: skip
    plain, other = (
        chat.Talker(chat.Config(str(m), max_tokens=12, temperature=0.0)) for m in (tiny_model, tmp_path / "x")
    )
    assert plain.answer("hello") == other.answer("hello")


def test_chat_speaks_with_the_adapters_of_a_run(tiny_model: str, tmp_path: Path) -> None:
    model, tokenizer = load_policy(tiny_model)
    policy = Policy(model, tokenizer, adapted_layers=2, rank=2)
    for name, parameter in policy.trained_parameters().items():
        if "lora" in name:
            parameter.data.normal_(std=1.0)
    policy.save(str(tmp_path / "run" / "policy"))
    adapted = chat.Talker(chat.Config(str(tmp_path / "run"), max_tokens=8, temperature=0.0)).answer("hello")
    plain = chat.Talker(chat.Config(tiny_model, max_tokens=8, temperature=0.0)).answer("hello")
    assert adapted != plain
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").touch()
    with pytest.raises(PoiseError, match="the run is not finished"):
        chat.Talker(chat.Config(str(tmp_path / "new")))


def typed(lines: list[str], patch: pytest.MonkeyPatch) -> list[str]:
    """Stands for a terminal in which the lines are typed, and then Ctrl-D. The prompts that were shown."""
    shown, waiting = [], iter(lines)

    def read(prompt: str) -> str:
        shown.append(prompt)
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    patch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    patch.setattr("builtins.input", read)
    return shown


def test_chat_in_a_terminal_begins_anew_when_asked(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = typed(["hello", "/new", "hello"], monkeypatch)
    chat.run(chat.Config(tiny_model, max_tokens=3, temperature=0.0))
    hint, first, second, *rest = capsys.readouterr().out.splitlines()
    assert hint == "Ctrl-D ends, /new begins anew."
    assert second == first  # as in a new conversation, and nothing was answered to /new
    assert (rest, shown) == ([""], ["> "] * 4)


def test_a_system_turn_needs_a_chat_template(tiny_model: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "plain")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    assert chat.Talker(chat.Config(str(folder), max_tokens=2, temperature=0.0)).tokenizer.chat_template is None
    with pytest.raises(PoiseError, match=r"^--system needs a model with a chat template$"):
        chat.Talker(chat.Config(str(folder), system="Be brief."))


def test_inspect_in_a_terminal_asks_for_prompts_and_completions(
    reward: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = typed(["Review a film.", "good", "", "", "Review a phone.", "bad"], monkeypatch)
    inspect.run(inspect.Config(str(reward)))
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("completion ")] == [
        "completion 'good'", "completion 'bad'",
    ]  # fmt: skip
    prompt, completion = "prompt> ", "completion> "
    assert shown == [prompt, completion, completion, prompt, prompt, completion, completion]


def test_inspect_shows_of_each_kind_of_heads_the_uncertainties_it_has(reward: Path) -> None:
    sample, seen = Sample("Review a film.", "good"), {}
    for kind in ("single", "posterior", "brme"):
        scorer = Scorer.load(str(reward / kind))
        found = inspect.describe(scorer, sample)
        text = inspect.as_text(found)
        seen[kind] = {name for name in ("disagreement", "routing_std", "total_std", "last_layer_std") if name in found}
        assert all(f"  {name:<15} +" in text for name in seen[kind])
        assert ("±" in text) == (kind == "brme")
        if kind == "single":
            assert found["average"] == found["worst_case"] == found["mean"][0]
        if kind == "posterior":
            assert scorer.last_layer is not None
            assert found["last_layer_std"] == scorer.last_layer.std(scorer.extract([sample])).item() > 0
    assert seen == {
        "single": set(), "posterior": {"disagreement", "last_layer_std"},
        "brme": {"disagreement", "routing_std", "total_std"},
    }  # fmt: skip


@pytest.mark.parametrize(("heads", "shown"), [(9, 9), (10, 8), (64, 8)])
def test_of_many_heads_the_first_are_shown(heads: int, shown: int) -> None:
    found = {"completion": "x", "tokens": 3, "lost": 0, "mean": [0.5] * heads, "std": [0.1] * heads}
    text = inspect.as_text(found)
    assert text.count("  head ") == shown
    assert (f"  … {heads - 8} more heads" in text) == (shown < heads)


def test_a_row_that_is_no_object_is_named_by_its_line(reward: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe('{"prompt": "Review.", "completion": "good"}\n[1]\n', monkeypatch)
    with pytest.raises(PoiseError, match=r"^line 2 of the input: a JSON object was expected, not list$"):
        inspect.run(inspect.Config(str(reward)))
