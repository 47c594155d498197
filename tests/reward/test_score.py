"""`poise score`: what its columns hold."""

import dataclasses
import errno
import gc
import json
import os
import shutil
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import rest_slow
from forked import launched
from poise.data import files, rows
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import HeadRewards
from poise.integrations.trl_reward import RobustReward
from poise.models.scorer import Scorer
from poise.reward import evaluate, score, score_file
from poise.reward.config import EvaluateConfig
from poise.reward.formats import check_scores
from poise.reward.score_file import ScoreFile
from poise.runtime import distributed
from poise.runtime.inputs import changed, fingerprints
from poise.serve.backend import local
from poise.serve.config import ServeConfig


def test_total_std_is_calibrated_and_routing_is_not(
    tiny_model: str, train_tiny_reward: Callable[[str], Path], tmp_path: Path
) -> None:
    run = train_tiny_reward(tiny_model)
    texts = ["good", "bad", "it was not great"]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "Review a film.", "completion": text}) + "\n" for text in texts))
    found = rows_in(score.run(score.Config(str(run), str(file))))
    scorer = Scorer.load(str(run))
    heads = scorer([Sample("Review a film.", text) for text in texts])
    scale = np.array(scorer.layout.std_scale)
    assert np.abs(scale - 1).max() > 0.1
    np.testing.assert_allclose([row["std"] for row in found], heads.std, rtol=1e-5)
    np.testing.assert_allclose([row["routing_std"] for row in found], heads.std.amin(-1), rtol=1e-5)
    assert [row["nominal_head"] for row in found] == heads.std.argmin(-1).tolist()
    expected = np.sqrt(np.square(heads.std.numpy() * scale).mean(-1) + heads.mean.numpy().var(-1))
    np.testing.assert_allclose([row["total_std"] for row in found], expected, rtol=1e-4)


@pytest.fixture(scope="module")
def reward(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> str:
    return str(train_tiny_reward(tiny_model))


def rows_in(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts_in(folder: Path, count: int, name: str = "texts.jsonl") -> Path:
    """Samples, one of which has a conversation for its prompt."""
    turns = [{"role": "user", "content": "Review – “it”."}]
    rows = [{"prompt": turns if i == 1 else "Review.", "completion": f"good {i}"} for i in range(count)]
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_stopped_command_goes_on_after_its_last_part(
    form: str, reward: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(score, "TEXTS_PER_PART", 4)
    file = texts_in(tmp_path, 10)
    calm = score.Config(reward, str(file), output=str(tmp_path / f"calm.{form}"))
    whole = score.run(calm).read_bytes()
    assert len(rows_in(tmp_path / f"calm.{form}")) == 10
    assert {path.name for path in tmp_path.iterdir()} == {"texts.jsonl", f"calm.{form}"}

    parts, scored = [], score._scored

    def killed_in_the_third_part(scorer: Scorer, samples: list[Sample], *more: Any) -> list[dict[str, Any]]:
        parts.append(len(samples))
        if parts == [4, 4, 2]:
            raise KeyboardInterrupt
        return scored(scorer, samples, *more)

    monkeypatch.setattr(score, "_scored", killed_in_the_third_part)
    again = score.Config(reward, str(file), output=str(tmp_path / f"again.{form}"))
    with pytest.raises(KeyboardInterrupt):
        score.run(again)
    partial = tmp_path / f"again.{form}.partial"
    assert len(partial.read_text().splitlines()) == 8
    partial.write_bytes(partial.read_bytes() + b'{"prompt": "cut o')
    assert score.run(again).read_bytes() == whole
    assert parts == [4, 4, 2, 2]


def test_of_a_run_an_objective_reads_the_heads_it_was_made_for_whoever_asks(
    reward: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lower bound is of the posterior's heads in training; scores, a server and TRL read the BRME's of that run."""
    objective, texts = "lower_confidence(1)", [f"good {number}" for number in range(6)]
    file = texts_in(tmp_path, len(texts))
    scores: dict[str, Any] = {}
    for place in (reward, f"{reward}/posterior", f"{reward}/brme"):
        found = score.run(score.Config(place, str(file), objective, str(tmp_path / "out.jsonl")))
        scores[place] = [row["reward"] for row in rows_in(found)]
        said = " ".join(capsys.readouterr().err.split())
        line = f"reward: {objective} of the posterior heads of {reward}; name {reward}/KIND for others: single,"
        assert (line in said) == (place == reward)
    assert scores[reward] == scores[f"{reward}/posterior"] != scores[f"{reward}/brme"]
    served, one = (local(ServeConfig((place,), objective=objective)) for place in (reward, f"{reward}/posterior"))
    assert served.fingerprint == one.fingerprint
    prompts = ["Review a film."] * len(texts)
    in_trl, posterior = (RobustReward.load(place, objective) for place in (reward, f"{reward}/posterior"))
    assert in_trl(prompts, texts) == posterior(prompts, texts)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Review a film.", "chosen": "good", "rejected": "bad"}) + "\n")
    for place in (reward, f"{reward}/posterior"):
        asked = EvaluateConfig((place,), str(pairs), objective=objective, output=str(tmp_path / Path(place).name))
        scores[place] = (evaluate.run(asked).results or {})["rewards"][0]["num_heads"]
    assert scores[reward] == scores[f"{reward}/posterior"]
    (tmp_path / "run" / "brme").mkdir(parents=True)
    (tmp_path / "run" / "brme" / "config.json").write_text("{}")
    with pytest.raises(PoiseError, match=r"run has no posterior heads, for which .* was made; name one of .*run/brme"):
        score.run(score.Config(str(tmp_path / "run"), str(file), objective))


def test_parquet_has_the_columns_of_the_lines_and_one_per_head(reward: str, tmp_path: Path) -> None:
    file = texts_in(tmp_path, 3)
    lines, table = (
        rows_in(score.run(score.Config(reward, str(file), output=str(tmp_path / name))))
        for name in ("scores.jsonl", "scores.parquet")
    )
    for line, row in zip(lines, table, strict=True):
        for name in ("mean", "std"):
            line |= {f"{name}_{k}": value for k, value in enumerate(line.pop(name))}
        if not isinstance(line["prompt"], str):
            line["prompt"], row["prompt"] = json.dumps(line["prompt"]), json.dumps(json.loads(row["prompt"]))
        assert line == row
        assert row["reward"] == pytest.approx(0.4 * row["nominal"] + 0.6 * row["worst_case"], rel=1e-6)
        assert row["gap"] == row["nominal"] - row["worst_case"] or abs(row["gap"]) < 10
        assert row["nominal"] == row[f"mean_{row['nominal_head']}"]
    again = score.run(score.Config(reward, str(tmp_path / "scores.parquet"), output=str(tmp_path / "again.parquet")))
    assert again.read_bytes() == (tmp_path / "scores.parquet").read_bytes()


def test_the_reward_does_not_hide_behind_a_column_of_the_heads(reward: str, tmp_path: Path) -> None:
    [row] = rows_in(score.run(score.Config(reward, str(texts_in(tmp_path, 1)), objective="mean")))
    assert row["reward"] == pytest.approx(np.mean(row["mean"]))


def test_several_processes_write_what_one_writes(reward: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after one that was stopped: parts do not depend on the number of processes."""
    monkeypatch.setattr(score, "TEXTS_PER_PART", 4)
    file = texts_in(tmp_path, 22)
    rows = file.read_text().splitlines()
    file.write_text("\n".join([*rows, '{"prompt": "Review.", "completion": ""}']) + "\n")
    config = score.Config(reward, str(file), output=str(tmp_path / "one.parquet"), on_bad_row="skip")
    whole = score.run(config).read_bytes()
    assert len((tmp_path / "texts.bad.jsonl").read_text().splitlines()) == 1
    stopped = dataclasses.replace(config, output=str(tmp_path / "stopped.parquet"))
    parts, scored = [], score._scored

    def stop_after_two(scorer: Scorer, samples: list[Sample], *more: Any) -> list[dict[str, Any]]:
        parts.append(len(samples))
        if len(parts) == 3:
            raise KeyboardInterrupt
        return scored(scorer, samples, *more)

    with monkeypatch.context() as patch:
        patch.setattr(score, "_scored", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            score.run(stopped)
    (tmp_path / "said").mkdir()
    for each in (dataclasses.replace(config, output=str(tmp_path / "two.parquet")), stopped):

        def score_and_leave(each: score.Config = each) -> None:
            score.run(each)
            distributed.leave()

        launched(2, score_and_leave, tmp_path / "said")
        assert Path(each.output).read_bytes() == whole
    assert (tmp_path / "said" / "stderr1").read_text() == ""
    assert "1 bad rows of 23" in " ".join((tmp_path / "said" / "stderr0").read_text().split())
    assert not list(tmp_path.glob("*.partial*"))


def test_two_commands_do_not_write_one_file(reward: str, tmp_path: Path) -> None:
    file = texts_in(tmp_path, 2)
    config = score.Config(reward, str(file))
    with (
        ScoreFile(tmp_path / "texts.scored.jsonl").open({}, 4),
        pytest.raises(PoiseError, match="another process is writing"),
    ):
        score.run(config)
    assert len(rows_in(score.run(config))) == 2


def test_the_file_to_be_scored_is_not_written_over(reward: str, tmp_path: Path) -> None:
    file = texts_in(tmp_path, 2)
    before = file.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(file)
    config = score.Config(reward, str(file), output=str(tmp_path / "link.jsonl"))
    with pytest.raises(PoiseError, match="is the file to be scored"):
        score.run(config)
    assert file.read_bytes() == before
    with pytest.raises(PoiseError, match=r"\.jsonl or \.parquet, not as \.csv"):
        dataclasses.replace(config, output="scores.csv").check()


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A FIFO, through which three samples come once; the second one is long."""
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write() -> None:
        texts = ["good", "x" * 400, "bad"]
        path.write_text("".join(json.dumps({"prompt": "Review.", "completion": text}) + "\n" for text in texts))

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    yield path
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # whoever has not been read need not wait
    writing.join(10)
    os.close(file)


def test_what_comes_once_is_scored_and_cuts_are_said(
    reward: str, pipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows_in(score.run(score.Config(reward, str(pipe), output=str(tmp_path / "out.jsonl"))))
    assert [row["completion"][:4] for row in found] == ["good", "xxxx", "bad"]
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 3 samples lost their oldest tokens (longer than 256)" in said
    assert "3 completions scored by 5 heads" in said
    assert not list(tmp_path.glob("*.partial*"))


def test_of_what_comes_once_a_stopped_command_leaves_nothing(
    reward: str, pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows cannot be gone on after: the input is gone."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "_scored", stopped)
    with pytest.raises(KeyboardInterrupt):
        score.run(score.Config(reward, str(pipe), output=str(tmp_path / "out.jsonl")))
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_places_that_cannot_be_written_to_are_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PoiseError, match=r"--output is needed: .*pipe is no file to name the scores after"):
        score.run(score.Config("no-model", str(tmp_path / "pipe")))
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(PoiseError, match=r"--output .*a\.jsonl is a folder; name a file"):
        score.run(score.Config("no-model", "x", output=str(tmp_path / "a.jsonl")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(PoiseError, match=r"several processes cannot share .*pipe, which is no file; start one"):
        score.run(score.Config("no-model", str(tmp_path / "pipe"), output=str(tmp_path / "out.jsonl")))


def test_a_file_system_without_locks_is_written_to_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_file: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(score_file.fcntl, "flock", flock)
    file = ScoreFile(tmp_path / "out.jsonl")
    with file.open({}, 1) as (done, partial):
        assert done == 0
        score_file.append(partial, [{"a": 1}])
    file.finish()
    assert (tmp_path / "out.jsonl").read_text() == '{"a": 1}\n'


@pytest.mark.parametrize("form", rest_slow(["jsonl", "parquet"]))
def test_memory_does_not_grow_with_rows(
    form: str, reward: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also if every second row is bad. Heads are made up: the trunk's part of the memory is the same for every part."""
    scorer = Scorer.load(reward)
    monkeypatch.setattr(Scorer, "load", lambda *_: scorer)
    monkeypatch.setattr(Scorer, "__call__", lambda _, samples, *__: HeadRewards(*torch.ones(2, len(samples), 5)))
    monkeypatch.setattr(score, "row_check_of_rewards", lambda _: None)
    monkeypatch.setattr(score, "TEXTS_PER_PART", 8)
    monkeypatch.setattr(files, "_ROWS_AT_ONCE", 8)
    monkeypatch.setattr(score_file, "_ROWS_PER_GROUP", 16)
    monkeypatch.setattr(rows, "_BAD_ROWS_IN_MEMORY", 1024)
    peaks = []
    for count in (64, 64, 640, 640):  # the first time imports and fills caches; once, a table of some library grows
        texts = [{"prompt": "Review. " * 40, "completion": "" if i % 2 else f"good {i}"} for i in range(count)]
        file = tmp_path / f"{count}.{form}"
        if form == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in texts))
        del texts
        output = str(tmp_path / f"out.{form}")
        gc.collect()
        tracemalloc.start()
        score.run(score.Config(reward, str(file), output=output, objective="mean", on_bad_row="skip"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(rows_in(Path(output))) == count // 2
    assert min(peaks[2:]) < 1.25 * peaks[1], peaks


def test_parts_of_another_reward_model_are_not_kept(reward: str, tmp_path: Path) -> None:
    """Also of a run folder and of an ensemble, whose own files say nothing of the heads."""
    copy = tmp_path / "rm"
    shutil.copytree(reward, copy)
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"prompt": "Review.", "completion": "good"}) + "\n")
    both = {"members": ["../rm", "../rm/brme"], "means": [0.0, 0.0], "stds": [1.0, 1.0]}
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "ensemble.json").write_text(json.dumps(both))
    configs = [score.Config(str(tmp_path / name), str(file)) for name in ("rm", "both")]
    before = [score._settings(config, config.reward) for config in configs]
    assert before == [score._settings(config, config.reward) for config in configs]
    [weights] = [path for path in (copy / "brme").glob("*.safetensors") if "score.weight" in load_file(path)]
    save_file({key: value + 1 for key, value in load_file(weights).items()}, weights, {"format": "pt"})
    for config, settings in zip(configs, before, strict=True):
        assert score._settings(config, config.reward) != settings
    left = ScoreFile(tmp_path / "out.jsonl")
    for settings, kept in ((before[0], 0), (before[0], 4), (before[1], 0)):
        with left.open(settings, 2) as (done, partial):
            assert done == kept
            partial.write(b"{}\n" * (5 - done))


@pytest.mark.parametrize("splits", [False, True])
def test_parts_of_other_rows_of_a_folder_are_not_kept(reward: str, tmp_path: Path, splits: bool) -> None:
    """The folder itself has the same size and time when `datasets` rewrites a file in it."""
    import datasets

    def save(texts: list[str]) -> list[str]:
        data: Any = datasets.Dataset.from_list([{"prompt": "Review.", "completion": text} for text in texts])
        data = datasets.DatasetDict({"train": data}) if splits else data
        data.save_to_disk(str(tmp_path / "new"))
        files = sorted(file for file in (tmp_path / "new").rglob("*") if file.is_file())
        (tmp_path / "data").mkdir(exist_ok=True)
        for file in files:  # in place, as a sync does
            target = tmp_path / "data" / file.relative_to(tmp_path / "new")
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
        shutil.rmtree(tmp_path / "new")
        return [str(file) for file in files]

    save(["good", "bad", "fine"])
    config = score.Config(reward, str(tmp_path / "data"))
    inputs = {"--file": [tmp_path / "data"]}
    before, known = score._settings(config, config.reward), fingerprints(inputs)
    assert score._settings(config, config.reward) == before
    assert not changed(known, fingerprints(inputs, known))
    save(["good", "poor", "fine"])
    assert score._settings(config, config.reward) != before
    assert changed(known, fingerprints(inputs, known)) == ["--file"]


def test_a_partial_file_of_somebody_else_and_devices_are_left_alone(reward: str, tmp_path: Path) -> None:
    file, notes = texts_in(tmp_path, 2), tmp_path / "scores.jsonl.partial"
    notes.write_text("my own notes\n")
    with pytest.raises(PoiseError, match=r"scores\.jsonl\.partial was not begun by `poise score`"):
        score.run(score.Config(reward, str(file), output=str(tmp_path / "scores.jsonl")))
    assert notes.read_text() == "my own notes\n"
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(PoiseError, match="is no place for a file"):
        score.run(score.Config(reward, str(file), output=str(tmp_path / "fifo")))
    assert {path.name for path in tmp_path.iterdir()} == {"texts.jsonl", notes.name, "fifo"}


def test_earlier_scores_are_known_by_their_content_whatever_the_case_of_their_name(tmp_path: Path) -> None:
    ours = {"prompt": ["p"], "completion": ["c"], "reward": [0.5], "mean_0": [0.5], "std_0": [0.0]}
    pyarrow.parquet.write_table(pyarrow.table(ours), tmp_path / "scores.PARQUET")
    check_scores(tmp_path / "scores.PARQUET")
    (tmp_path / "other.PARQUET").write_bytes(b"PAR1...")
    mine = {"prompt": ["p"], "completion": ["c"], "reward": [0.5]}
    pyarrow.parquet.write_table(pyarrow.table(mine), tmp_path / "mine.parquet")
    for name in ("other.PARQUET", "mine.parquet"):
        with pytest.raises(PoiseError, match="exists and holds no scores"):
            check_scores(tmp_path / name)
