"""docs/data.md: every example row is read as the table says."""

import json
import re
from pathlib import Path

import pytest

from poise.data.evaluation_sets import read_questions
from poise.data.examples import EXAMPLES as shown  # noqa: N811
from poise.data.preferences import preferences_of, prompt_of, sample_of

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^\| (preferences|prompts|samples|questions) \| ([^|]+) \| `(.*)` \|$", PAGE, re.MULTILINE)


def test_every_form_has_an_example() -> None:
    assert len(EXAMPLES) == 43


def test_the_rows_that_help_shows_are_in_the_table() -> None:
    assert {kind for kind, _, _ in EXAMPLES} == shown.keys()
    for kind, row in shown.items():
        assert (kind, row) in {(kind, text) for kind, _, text in EXAMPLES}


@pytest.mark.parametrize(("kind", "form", "text"), EXAMPLES, ids=[f"{kind}, {form}" for kind, form, _ in EXAMPLES])
def test_the_example_is_read(tmp_path: Path, kind: str, form: str, text: str) -> None:
    row = json.loads(text)
    if kind == "prompts":
        assert prompt_of(row) in ("Is tea hot?", [{"role": "user", "content": "Is tea hot?"}])
    elif kind == "samples":
        sample = sample_of(row)
        assert sample.prompt in ("Is tea hot?", [{"role": "user", "content": "Is tea hot?"}])
        assert sample.completion == "Mostly."
    elif kind == "questions":
        path = tmp_path / "x.jsonl"
        path.write_text(text)
        asked = read_questions(str(path), "error")
        assert asked.kind == {"pairs by subset": "pairs", "RM-Bench": "rm_bench", "best-of-n sets": "best_of_n"}[form]
    else:
        found = preferences_of(row)
        pairs = found if isinstance(found, list) else []
        for pair in pairs:
            prompt = pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1]["content"]
            assert prompt in ("Is tea hot?", "The film was ", "TITLE: Tea\n\nPOST: Is tea hot?\n\nTL;DR:")
            assert (pair.chosen, pair.rejected) in {("Mostly.", "Blue."), ("good.", "gory.")} or form == "votes"
        assert len(pairs) == {"votes": 3}.get(form, 0 if "one response a row" in form else 1)
