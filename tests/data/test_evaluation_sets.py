"""What a file asks: told by the shape of its rows."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poise.data.evaluation_sets import Item, Questions, read_questions
from poise.errors import PoiseError
from poise.functional.statistics import intervals_of_means


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(chosen: str, rejected: str, **more: str) -> dict[str, Any]:
    return {"prompt": "Q", "chosen": chosen, "rejected": rejected, **more}


def test_pairs_of_every_form_keep_their_texts_in_order(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hello"}]
    conversation = {side: [*turns, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    asked = read_questions(write(tmp_path / "p.jsonl", pair("a", "b"), conversation), "error")
    assert asked.kind == "pairs"
    assert [(s.prompt, s.completion) for s in asked.samples()] == [
        ("Q", "a"), ("Q", "b"), (turns, "chosen"), (turns, "rejected"),
    ]  # fmt: skip
    assert asked.subset[1] == ""


def test_votes_on_one_pair_are_one_unit_whichever_text_they_chose(tmp_path: Path) -> None:
    votes = {"prompt": "Q", "response_1": "a", "response_2": "b", "annotators": [1, 1, 2, 0]}
    asked = read_questions(write(tmp_path / "p.jsonl", votes, pair("a", "c")), "error")
    assert [item.chosen[0] for item in asked.items] == ["a", "a", "b", "a"]
    units = asked.unit.tolist()
    assert units[0] == units[1] == units[2] != units[3]
    assert sorted(set(units)) == [0, 1]


def test_pairs_of_one_ranking_are_one_unit_unless_all_are_linked() -> None:
    """Seven ranked answers are 21 pairs, and no 21 independent judgments."""

    def ranked(prompt: str, texts: str) -> list[Item]:
        return [Item(prompt, (better,), (worse,)) for better, worse in itertools.combinations(texts, 2)]

    rows = [one for n in range(30) for one in ranked(f"Q{n}", "abcd")]
    asked = Questions.of("pairs", rows)
    assert asked.unit.tolist() == [n // 6 for n in range(180)]
    assert not asked.linked
    sets = Questions.of(None, [Item(f"Q{n // 2}", ("a",), ("b", f"c{n}")) for n in range(60)])
    assert (sets.kind, sets.unit.tolist()) == ("best_of_n", [n // 2 for n in range(60)])
    chain = Questions.of("pairs", [Item("Q", (f"{n}",), (f"{n + 1}",)) for n in range(50)] * 2)
    assert chain.linked  # one unit would have an interval of no width
    assert chain.unit.tolist() == list(range(50)) * 2


def test_pairs_of_one_prompt_are_one_unit_also_where_they_share_no_text() -> None:
    rows = [Item(f"Q{n // 5}", (f"good {n}",), (f"bad {n}",)) for n in range(100)]
    assert Questions.of("pairs", rows).unit.tolist() == [n // 5 for n in range(100)]
    few = Questions.of("pairs", rows[:95])  # 19 prompts
    assert few.unit.tolist() == list(range(95))
    one_has_most = [Item("Q", (f"good {n}",), (f"bad {n}",)) for n in range(500)]
    assert len(set(Questions.of("pairs", rows + one_has_most).unit.tolist())) == 600
    assert not few.linked


def test_intervals_of_pairs_of_forty_prompts_cover_the_accuracy_as_often_as_they_say() -> None:
    """Five pairs of each, on some prompts more often right than on others: as independent pairs they cover in 78 %."""
    rng, covered = np.random.default_rng(0), 0
    asked = Questions.of("pairs", [Item(f"Q{n // 5}", (f"good {n}",), (f"bad {n}",)) for n in range(200)])
    for seed in range(150):
        right = rng.random((40, 5)) < rng.beta(1.4, 0.6, size=(40, 1))  # intraclass correlation 1/3
        [(low, high)] = intervals_of_means(right.reshape(-1, 1).astype(float), asked.unit, seed)
        covered += low <= 0.7 <= high
    assert covered / 150 >= 0.9


def test_subsets_and_their_repeated_rows_are_kept(tmp_path: Path) -> None:
    rows = [pair("a", "b", subset="hep-go"), pair("a", "b", subset="hep-go"), pair("c", "d", subset="math-prm")]
    asked = read_questions(write(tmp_path / "p.jsonl", *rows), "error")
    assert [item.subset for item in asked.items] == ["hep-go", "hep-go", "math-prm"]
    rated = {"prompt": "Q", "completion": "a", "rating": 3, "subset": "x"}
    with pytest.raises(PoiseError, match=r"p\.jsonl:2: 'subset' goes with pairs"):
        read_questions(write(tmp_path / "p.jsonl", rows[0], rated), "error")


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [([(3, 3), (3, 3)], "rm_bench"), ([(3, 3), (1, 3)], "best_of_n"), ([(1, 3)], "best_of_n"), ([(1, 1)], "pairs")],
)
def test_lists_are_told_by_their_lengths(tmp_path: Path, shapes: list[tuple[int, int]], kind: str) -> None:
    rows = [
        {"prompt": "Q", "chosen": [f"c{i}" for i in range(m)], "rejected": [f"r{i}" for i in range(n)], "domain": "d"}
        for m, n in shapes
    ]
    asked = read_questions(write(tmp_path / "p.jsonl", *rows), "error")
    assert asked.kind == kind
    assert [(len(item.chosen), len(item.rejected)) for item in asked.items] == shapes
    assert asked.subset[0] == "d"
    first = shapes[0][0]
    assert [s.completion for s in asked.samples()][: first + 1] == [*(f"c{i}" for i in range(first)), "r0"]


def test_turns_before_the_prompt_are_read_beside_lists_too(tmp_path: Path) -> None:
    row = {"prompt": "And milk?", "history": [["Tea?", "Yes."]], "chosen": ["a"], "rejected": ["b", "c"]}
    [item] = read_questions(write(tmp_path / "p.jsonl", row), "error").items
    assert [turn["content"] for turn in item.prompt] == ["Tea?", "Yes.", "And milk?"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair("a", "b"), "'chosen' must be a list of texts"),
        ({"prompt": "Q", "chosen": ["a"], "rejected": []}, "'rejected' must be a list of texts"),
        ({"prompt": "Q", "chosen": ["a", " "], "rejected": ["b"]}, "'chosen' has an empty text"),
        ({"chosen": ["a"], "rejected": ["b"]}, "no 'prompt'"),
    ],
)
def test_a_bad_list_is_one_line_or_set_aside(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "Q", "chosen": ["a"], "rejected": ["b", "c"]}, row)
    with pytest.raises(PoiseError, match=rf"p\.jsonl:2: {reason}"):
        read_questions(path, "error")
    assert len(read_questions(path, "skip")) == 1
    assert reason in (tmp_path / "p.bad.jsonl").read_text()


def test_a_row_that_is_no_json_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(pair("a", "b", subset="s")) + "\n{\n")
    with pytest.raises(PoiseError, match=r"p\.jsonl:2: not JSON"):
        read_questions(str(path), "error")
