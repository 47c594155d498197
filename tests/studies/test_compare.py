"""Comparing finished policies: peak, end, fall and differences, by hand; gold is what each completion says it is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from poise.cli.main import main
from poise.errors import PoiseError
from poise.reports import run_pages
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Json
from poise.studies import compare, gold
from poise.studies.pool import prompt_label

PROMPTS = ("a film", "a phone")


def write_rows(path: Path, rows: list[Json]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_arm(folder: Path, steps: list[tuple[float, float]], final: dict[str, float], prompts: Any = PROMPTS) -> str:
    """A finished policy run. steps: gold of the two completions of each; final: gold and proxy, on every prompt."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("objective: nominal\nreward: rm/single\nkl_coef: 0.01\n")
    same = dict.fromkeys(("kl", "reward", "disagreement", "gap", "routing_std", "monitor_score"), 0.5)
    laps = {f"{lap}_seconds": 0.25 for lap in ("sample", "score", "reference", "update")}
    metrics = [{"step": i, "heads": [0.5], "alarm": i == 2, **same, **laps} for i in range(len(steps))]
    write_rows(folder / "metrics.jsonl", metrics)
    samples = [{"step": i, "prompt": "x", "completion": str(gold)} for i, both in enumerate(steps) for gold in both]
    write_rows(folder / "samples.jsonl", samples)
    last = {"reward": final["proxy"], "kl": 4.0, "mean": [1.0]}
    write_rows(
        folder / "final.jsonl",
        [{"prompt": p, "completion": str(final["gold"] + shift), **last} for p in prompts for shift in (0.0, 0.5)],
    )
    return str(folder)


def with_gold(**settings: Any) -> compare.Config:
    return compare.Config(gold="reviews", **settings)


@pytest.fixture(autouse=True)
def gold_is_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (compare, gold):
        monkeypatch.setattr(module, "gold_of", lambda rows, _: np.array([float(row["completion"]) for row in rows]))


def test_peak_end_and_fall_equal_values_worked_out_by_hand(tmp_path: Path) -> None:
    rising = [(0.0, 0.5), (0.5, 0.5), (1.0, 1.0), (1.5, 1.5), (0.5, 0.5), (0.0, 0.0)]
    first = make_arm(tmp_path / "policy-single", rising, {"gold": 0.0, "proxy": 2.0})
    other = make_arm(tmp_path / "policy-brme", rising[:2], {"gold": 1.0, "proxy": 1.0})
    found = compare.run(with_gold(arms=(first, other), output=str(tmp_path / "out"))).results or {}
    single, brme = found["arms"]
    assert (single["name"], single["objective"], single["reward"]) == ("single", "nominal", "single")
    assert single["final"]["gold"] == 0.25
    assert single["peak_gold"] == 1.0  # of three steps, and not the single step that reached 1.5
    assert single["drawdown"] == 0.75
    assert (brme["peak_gold"], brme["drawdown"]) == (1.25, 0.0)  # it ended at its peak
    assert (single["initial_gold"], single["initial_gold_std"]) == (0.25, pytest.approx(0.5 / 2**0.5))
    assert [alarm["step"] for alarm in single["alarms"]] == [2]
    assert (single["seconds"], single["step_seconds"]["score"]) == (6.0, 0.25)
    [difference] = found["differences"]
    assert (difference["arm"], difference["gold"], difference["interval"]) == ("brme", 1.0, [1.0, 1.0])
    assert [row["prompt"] for row in found["completions"]] == list(PROMPTS)
    assert found["completions"][0]["arms"]["brme"]["proxy"] == 1.0


def test_one_prompt_has_no_interval(tmp_path: Path) -> None:
    arms = []
    for name, text in (("a", "0"), ("b", "1")):
        arms.append(make_arm(tmp_path / name, [(9.0, 9.0)], {"gold": 0.0, "proxy": 2.0}))
        path = Path(arms[-1]) / "final.jsonl"
        [row, *_] = read_rows(path)
        write_rows(path, [{**row, "completion": text}] * 3)
    found = compare.run(with_gold(arms=tuple(arms), output=str(tmp_path / "out"))).results or {}
    assert [arm["final"]["interval"] for arm in found["arms"]] == [None, None]
    assert [(one["gold"], one["interval"]) for one in found["differences"]] == [(1.0, None)]
    assert "a" in run_pages.html([tmp_path / "out"])


def test_the_pool_says_where_the_policy_began(tmp_path: Path) -> None:
    arms = tuple(make_arm(tmp_path / name, [(9.0, 9.0)], {"gold": 0.0, "proxy": 2.0}) for name in ("a", "b"))
    (tmp_path / "pool").mkdir()
    # What another gold said of them does not count.
    rows = [{"prompt": p, "completion": gold, "gold": 7.0} for p in PROMPTS for gold in ("0.0", "1.0")]
    write_rows(tmp_path / "pool" / "pool.jsonl", rows)
    settings = with_gold(arms=arms, output=str(tmp_path / "out"), pool=str(tmp_path / "pool"))
    found = compare.run(settings).results or {}
    assert {arm["initial_gold"] for arm in found["arms"]} == {0.5}
    assert [arm["initial_gold_std"] for arm in found["arms"]] == [pytest.approx(1 / 3**0.5)] * 2
    alone = compare.run(with_gold(arms=arms, output=str(tmp_path / "alone"))).results or {}
    assert {(arm["initial_gold"], arm["initial_gold_std"]) for arm in alone["arms"]} == {(9.0, 1.0)}  # a constant


def test_a_pool_of_other_prompts_is_refused(tmp_path: Path) -> None:
    arms = tuple(make_arm(tmp_path / name, [(9.0, 9.0)], {"gold": 0.0, "proxy": 2.0}) for name in ("a", "b"))
    (tmp_path / "pool").mkdir()
    for prompts in (PROMPTS[1:], ("x", *PROMPTS)):
        write_rows(tmp_path / "pool" / "pool.jsonl", [{"prompt": p, "completion": "1.0"} for p in prompts])
        for of_gold in ("reviews", ""):
            settings = compare.Config(arms, pool=str(tmp_path / "pool"), gold=of_gold, output=str(tmp_path / "out"))
            with pytest.raises(PoiseError, match="is of other prompts than those that the arms were evaluated on"):
                compare.run(settings)
    assert not (tmp_path / "out").exists()


def test_arms_of_one_name_keep_their_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, path in enumerate(("0/policy-a", "1/policy-a", "policy-b")):
        make_arm(Path(path), [(9.0, 9.0)], {"gold": float(number), "proxy": 2.0})
    found = compare.run(with_gold(arms=("0/policy-a", "1/policy-a", "policy-b"), output="out")).results or {}
    assert [arm["name"] for arm in found["arms"]] == ["0/policy-a", "1/policy-a", "b"]
    assert [arm["label"] for arm in found["arms"]] == ["0/policy-a", "1/policy-a", "policy-b"]
    assert [(one["arm"], one["gold"]) for one in found["differences"]] == [("1/policy-a", 1.0), ("b", 2.0)]
    assert [arm["gold"] for arm in found["completions"][0]["arms"].values()] == [0.0, 1.0, 2.0]


def test_a_run_that_lost_its_first_steps_is_not_compared(tmp_path: Path) -> None:
    arms = tuple(make_arm(tmp_path / name, [(9.0, 9.0)] * 3, {"gold": 0.0, "proxy": 2.0}) for name in ("a", "b"))
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (tmp_path / "b" / name).read_text().splitlines(keepends=True)
        (tmp_path / "b" / name).write_text("".join(line for line in lines if '"step": 0' not in line))
    with pytest.raises(PoiseError, match=r"b: metrics\.jsonl and samples\.jsonl lack the first steps"):
        compare.run(with_gold(arms=arms, output=str(tmp_path / "out")))


def test_a_prompt_without_a_turn_of_the_user_has_a_label() -> None:
    assert prompt_label([{"role": "system", "content": "Be brief."}]) == "Be brief."
    assert prompt_label([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]) == "Hi"


def test_conversations_that_share_their_last_turn_are_prompts_of_their_own(tmp_path: Path) -> None:
    prompts = [[{"role": "user", "content": f"{i}"}, {"role": "user", "content": "Go on."}] for i in range(3)]
    arms = []
    for name, order in (("one", prompts), ("other", prompts[::-1])):
        arms.append(make_arm(tmp_path / name, [(0.0, 0.0)], {"gold": len(arms), "proxy": 0.0}, prompts=order))
        rows = list(read_rows(tmp_path / name / "final.jsonl"))
        write_rows(
            tmp_path / name / "final.jsonl", [row | {"reward": int(row["prompt"][0]["content"])} for row in rows]
        )
    found = compare.run(with_gold(arms=tuple(arms), output=str(tmp_path / "out"))).results or {}
    assert found["differences"][0]["num_prompts"] == 3
    assert [row["prompt"] for row in found["completions"]] == ["Go on."] * 3
    shown = [tuple(opinion["proxy"] for opinion in row["arms"].values()) for row in found["completions"]]
    assert sorted(shown) == [(0, 0), (1, 1), (2, 2)]  # each beside the other's of the same prompt
    fewer = make_arm(tmp_path / "fewer", [(0.0, 0.0)], {"gold": 2.0, "proxy": 0.0}, prompts=prompts[:2])
    with pytest.raises(PoiseError, match="not evaluated on the same prompts"):
        compare.run(with_gold(arms=(arms[0], fewer), output=str(tmp_path / "again")))


def test_arms_of_other_prompts_are_not_compared(tmp_path: Path) -> None:
    one = make_arm(tmp_path / "one", [(0.0, 0.0)], {"gold": 0.0, "proxy": 0.0})
    other = make_arm(tmp_path / "other", [(0.0, 0.0)], {"gold": 0.0, "proxy": 0.0}, prompts=("a film", "a book"))
    with pytest.raises(PoiseError, match="not evaluated on the same prompts"):
        compare.run(with_gold(arms=(one, other), output=str(tmp_path / "out")))
    with pytest.raises(PoiseError, match=r"has no final\.jsonl"):
        compare.run(with_gold(arms=(one, str(tmp_path)), output=str(tmp_path / "again")))


# ---- files that were damaged, edited, or written by another version ----

NUMBER = {"null": None, "text": "many", "list": [1], "nan": float("nan"), "inf": float("inf"), "true": True}
TEXT = {"null": None, "number": 3, "object": {}, "nan": float("nan")}
WRONG: dict[tuple[str, str], Json] = {
    ("metrics.jsonl", "step"): NUMBER | {"fraction": 1.5, "negative": -3},
    **{("metrics.jsonl", name): NUMBER for name in ("reward", "disagreement", "gap")},
    **{("metrics.jsonl", name): {"text": "x", "list": [], "nan": float("nan")} for name in ("kl", "routing_std")},
    ("metrics.jsonl", "heads"): {"null": None, "number": 1.0, "texts": ["a"], "nulls": [None], "nan": [float("nan")]},
    ("metrics.jsonl", "alarm"): {"text": "yes", "number": 1, "null": None},
    ("metrics.jsonl", "score_seconds"): {"text": "x", "negative": -1.0, "null": None},
    ("samples.jsonl", "step"): NUMBER | {"another": 99},
    ("samples.jsonl", "completion"): TEXT,
    ("samples.jsonl", "prompt"): TEXT,
    ("final.jsonl", "prompt"): TEXT,
    ("final.jsonl", "completion"): TEXT,
    ("final.jsonl", "reward"): NUMBER,
    ("final.jsonl", "kl"): NUMBER,
    ("final.jsonl", "mean"): {"null": None, "number": 1.0, "texts": ["a"], "nan": [float("nan")]},
    ("config.yaml", "objective"): {"null": None, "number": 3},
    ("config.yaml", "kl_coef"): {"null": None, "text": "many", "negative": -1.0, "nan": float("nan")},
    ("config.yaml", "reward"): {"null": None, "list": ["a"]},
}


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [pytest.param(*at, value, id=f"{'-'.join(at)}-{name}") for at, of in WRONG.items() for name, value in of.items()]
    + [pytest.param(*at, "MISSING", id=f"{'-'.join(at)}-missing") for at in WRONG
       if at[1] not in ("kl", "routing_std", "alarm", "score_seconds") or at[0] == "final.jsonl"],
)  # fmt: skip
def test_a_wrong_value_in_a_run_is_one_line(
    file: str, field: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = [make_arm(tmp_path / name, [(0.0, 0.0)] * 2, {"gold": 0.0, "proxy": 2.0}) for name in ("a", "b")]
    path = tmp_path / "b" / file
    rows = [yaml.safe_load(path.read_text())] if file == "config.yaml" else list(read_rows(path))
    rows[-1] = {name: old for name, old in rows[-1].items() if name != field} | (
        {} if value == "MISSING" else {field: value}
    )
    if file == "config.yaml":
        path.write_text(yaml.safe_dump(rows[0]))
    else:
        write_rows(path, rows)
    assert main(["compare", "--arms", *arms, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("poise: ")
    assert said.count("\n") == 1
    assert str(tmp_path / "b") in said
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl", "final.jsonl"])
def test_a_torn_last_line_is_left_out_and_an_empty_file_is_one_line(file: str, tmp_path: Path) -> None:
    arms = tuple(make_arm(tmp_path / name, [(0.0, 0.0)] * 2, {"gold": 0.0, "proxy": 2.0}) for name in ("a", "b"))
    path = tmp_path / "b" / file
    before = path.read_text()
    path.write_text(before + before.splitlines()[-1][:-5])
    compare.run(compare.Config(arms=arms, output=str(tmp_path / "out")))
    path.write_text("")
    with pytest.raises(PoiseError, match=r"b.* (no|not) "):
        compare.run(compare.Config(arms=arms, output=str(tmp_path / "again")))


ARMS = (("a", 2.0), ("b", 1.0))


def test_without_gold_nothing_is_said_of_it(tmp_path: Path) -> None:
    arms = tuple(make_arm(tmp_path / name, [(0.0, 1.0)], {"gold": 0.0, "proxy": proxy}) for name, proxy in ARMS)
    found = compare.run(compare.Config(arms=arms, output=str(tmp_path / "out"))).results or {}
    assert found["differences"] == []
    assert found["initial"] == {}
    assert [arm["final"]["gold"] for arm in found["arms"]] == [None, None]
    assert [arm["final"]["proxy"] for arm in found["arms"]] == [2.0, 1.0]
    assert all(step["gold"] is None for arm in found["arms"] for step in arm["steps"])
    assert found["completions"][0]["arms"]["a"]["gold"] is None


def test_without_gold_a_pool_says_how_various_the_start_was(tmp_path: Path) -> None:
    arms = tuple(make_arm(tmp_path / name, [(0.0, 1.0)], {"gold": 0.0, "proxy": proxy}) for name, proxy in ARMS)
    (tmp_path / "pool").mkdir()
    texts = ("a b c", "a b d", "e f g", "h i j")  # of a prompt as many count as the arms have: two
    write_rows(tmp_path / "pool" / "pool.jsonl", [{"prompt": p, "completion": t} for p in PROMPTS for t in texts])
    settings = compare.Config(arms=arms, output=str(tmp_path / "out"), pool=str(tmp_path / "pool"))
    found = compare.run(settings).results or {}
    assert found["initial"] == {"distinct_bigrams": 3 / 8}  # ab, bc, bd among eight


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"arms": ("a",)}, "a comparison needs at least two arms"),
        ({"arms": ("a", "b"), "labels": ("x",)}, "1 labels for 2 arms"),
    ],
)
def test_arms_and_labels_are_counted(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(PoiseError, match=f"^{said}$"):
        compare.Config(**settings).check()
    compare.Config(arms=("a", "b"), labels=("x", "y")).check()


def test_runs_of_ppo_and_grpo_are_compared(tmp_path: Path) -> None:
    """TRL's trainers log no seconds, at β 0 no KL, and earlier versions no routing std."""
    arms = [make_arm(tmp_path / name, [(0.0, 1.0)], {"gold": 0.0, "proxy": proxy}) for name, proxy in ARMS]
    path = tmp_path / "b" / "metrics.jsonl"
    dropped = ("kl", "routing_std")
    rows = [
        {key: value for key, value in row.items() if key not in dropped and not key.endswith("_seconds")}
        for row in read_rows(path)
    ]
    write_rows(path, rows)
    for order in (arms, arms[::-1]):
        settings = compare.Config(arms=tuple(order), output=str(tmp_path / order[0][-1] / "with"))
        found = {arm["name"]: arm for arm in (compare.run(settings).results or {})["arms"]}
        assert found["a"]["step_seconds"]["sample"] == 0.25
        assert (found["b"]["step_seconds"], found["b"]["steps"][0]["kl"]) == ({}, None)
