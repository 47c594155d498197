"""Forms in other columns say the same, and what cannot be read says which forms there are."""

import json
from pathlib import Path

import pytest

from poise.data.preferences import preferences_of, read_prompts, read_samples
from poise.data.types import Preference
from poise.errors import PoiseError


@pytest.mark.parametrize(
    ("winner", "chosen"),
    [
        ("a", "Yes."),
        ("model_b", "No."),
        ("response_a", "Yes."),
        (2, "No."),
        ("B", "No."),
        ("tie", ""),
        ("tie (bothbad)", ""),
    ],
)
def test_a_winner_of_two_responses_makes_a_pair(winner: object, chosen: str) -> None:
    row = {"prompt": "Tea?", "response_a": "Yes.", "response_b": "No.", "winner": winner}
    rejected = {"Yes.": "No.", "No.": "Yes."}.get(chosen)
    assert preferences_of(row) == ([Preference("Tea?", chosen, rejected)] if rejected else [])


def test_conversations_with_a_winner_make_pairs() -> None:
    first, second = (
        [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": text}] for text in ("Yes.", "No.")
    )
    [found] = preferences_of({"conversation_a": first, "conversation_b": second, "winner": "model_b"})
    assert (found.prompt, found.chosen, found.rejected) == ([first[0]], "No.", "Yes.")


def test_refusals_say_which_forms_there_are() -> None:
    with pytest.raises(ValueError, match="'winner' is 'me'; response_a, response_b or tie was expected"):
        preferences_of({"prompt": "x", "response_a": "a", "response_b": "b", "winner": "me"})
    with pytest.raises(ValueError, match="no two responses to choose from"):
        preferences_of({"prompt": "x", "winner": "a"})
    with pytest.raises(ValueError, match=r"but 'prompt', 'good', 'bad'; a row of preferences has prompt, chosen"):
        preferences_of({"prompt": "x", "good": "a", "bad": "b"})


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_files_to_train_on_serve_as_prompts(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}
    rows = (
        {"prompt": "Tea?", "chosen": "Yes.", "rejected": "No."},
        {"chosen": [user, answer], "rejected": [user, answer | {"content": "No."}]},
        {"messages": [user, answer]},
        {"conversations": [{"from": "human", "value": "Tea?"}, {"from": "gpt", "value": "Yes."}]},
        {"messages": [user]},
        {"prompt": "Tea?", "response_a": "Yes.", "response_b": "No.", "winner": "a"},
    )
    assert read_prompts(write(tmp_path / "rows.jsonl", *rows)) == ["Tea?", [user], [user], [user], [user], "Tea?"]


def test_several_completions_of_a_row_are_read(tmp_path: Path) -> None:
    rows = ({"prompt": "x", "completions": ["a", "b"]}, {"prompt": "y", "completion": "c"})
    found = read_samples(write(tmp_path / "rows.jsonl", *rows))
    assert [(one.prompt, one.completion) for one in found] == [("x", "a"), ("x", "b"), ("y", "c")]
    with pytest.raises(PoiseError, match=":1: the list of completions is empty"):
        read_samples(write(tmp_path / "empty.jsonl", {"prompt": "x", "completions": []}))
