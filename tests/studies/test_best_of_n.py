"""`poise best-of-n` on tiny models: several reward models, a gold of one's own, what is kept, what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from poise.errors import PoiseError
from poise.models.scorer import Scorer
from poise.runtime.records import read_rows
from poise.runtime.run_folder import config_dict, write_json, write_jsonl
from poise.studies import best_of_n, pool
from poise.studies.best_of_n import Config

CHOICES = ("single:nominal", "ensemble:worst_case", "brme:tradeoff(0.4)")


@pytest.fixture(scope="module")
def reward(train_tiny_reward: Callable[[str], Path], tiny_model: str) -> Path:
    return train_tiny_reward(tiny_model)


@pytest.fixture(scope="module")
def settings(reward: Path, tiny_model: str, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    twin = tmp_path_factory.mktemp("twin") / "reward"  # stands for a run of another seed
    shutil.copytree(reward, twin)
    return Config(
        prompts=str(prompts_file), reward=(str(reward), str(twin)), model=tiny_model, objectives=CHOICES,
        per_prompt=6, max_tokens=4, output=str(tmp_path_factory.mktemp("run") / "pool"),
        gold=str(reward / "posterior"),  # a reward model as gold: it says different things of different texts
    )  # fmt: skip


def test_curves_obey_laws_and_have_differences(settings: Config) -> None:
    results = best_of_n.run(settings).results
    assert results is not None
    assert [curve["name"] for curve in results["curves"]] == list(CHOICES)
    assert results["num_rewards"] == 2
    first, _, brme = results["curves"]
    assert [point["n"] for point in first["best_of_n"]] == [1, 2, 3, 4, 5, 6]
    assert first["best_of_n"][0]["gold"] == pytest.approx(results["initial_gold"])
    proxies = [point["proxy"] for point in first["best_of_n"]]
    assert proxies == sorted(proxies)
    assert "vs_baseline" not in first["measures"]["gain"]
    assert brme["measures"]["gain"]["vs_baseline"] == pytest.approx(
        brme["measures"]["gain"]["mean"] - first["measures"]["gain"]["mean"]
    )
    assert {"alpha", "beta", "r2"} == set(first["fits"]["best_of_n"])


def test_gold_of_ones_own_is_the_mean_of_its_heads(settings: Config, reward: Path) -> None:
    best_of_n.run(settings)
    rows = list(read_rows(Path(settings.output) / "pool.jsonl"))
    heads = pool.score_pool(Path(settings.output), rows, {"0-posterior": str(reward / "posterior")})[
        "0-posterior"
    ].heads
    np.testing.assert_allclose([row["gold"] for row in rows], heads.mean.mean(-1).numpy(), atol=1e-5)


def test_an_ensemble_scores_a_pool_by_all_of_its_members(settings: Config, reward: Path, tmp_path: Path) -> None:
    best_of_n.run(settings)
    rows = list(read_rows(Path(settings.output) / "pool.jsonl"))
    members = [os.path.relpath(reward / kind, tmp_path / "both") for kind in ("single", "posterior")]
    write_json(tmp_path / "both" / "ensemble.json", {"members": members, "means": [0.0, 1.0], "stds": [1.0, 2.0]})
    found = pool.score_pool(tmp_path, rows, {"both": str(tmp_path / "both")})["both"].heads
    expected = Scorer.load(str(tmp_path / "both"))(pool.samples_of(rows))
    assert found.mean.shape == (len(rows), 1 + 6)
    torch.testing.assert_close(found.mean, expected.mean)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("tradeoff(0.4)", "REWARD:OBJECTIVE was expected, e.g. brme:tradeoff"),
        (":mean", "'' is not a folder of a reward run"),
        ("../brme:mean", "'../brme' is not a folder of a reward run"),
        ("..:mean", r"'\.\.' is not a folder of a reward run"),
        ("brme:nothing", "nothing"),
    ],
)
def test_objectives_name_a_folder_of_the_run(settings: Config, objective: str, said: str) -> None:
    with pytest.raises(PoiseError, match=said):
        replace(settings, objectives=("brme:mean", objective)).check()


def test_nothing_is_sampled_or_scored_twice(settings: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = best_of_n.run(settings).results
    monkeypatch.setattr(pool, "load_policy", None)
    monkeypatch.setattr(pool.Scorer, "load", None)
    (Path(settings.output) / "results.json").unlink()
    assert best_of_n.run(settings).results == before


def test_a_pool_is_judged_anew_by_another_gold(settings: Config, reward: Path, tmp_path: Path) -> None:
    best_of_n.run(settings)
    shutil.copy(Path(settings.output) / "pool.jsonl", tmp_path)
    kept = list(read_rows(tmp_path / "pool.jsonl"))
    assert best_of_n.make_pool(tmp_path, settings) == kept
    other = best_of_n.make_pool(tmp_path, replace(settings, gold=str(reward / "ensemble")))
    assert [row["completion"] for row in other] == [row["completion"] for row in kept]
    assert all(one["gold"] != two["gold"] for one, two in zip(other, kept, strict=True))
    assert list(read_rows(tmp_path / "pool.jsonl")) == other
    by_rules = best_of_n.make_pool(tmp_path, replace(settings, gold="reviews"))
    assert {row["gold"] for row in by_rules} <= {-1.0, 0.0}  # of a random model's text
    # Folders of a time before `judge`: whose gold it is, nobody knows.
    old = [{"prompt": row["prompt"], "completion": row["completion"], "gold": 7.0} for row in kept]
    write_jsonl(tmp_path / "pool.jsonl", old)
    assert best_of_n.make_pool(tmp_path, settings) == kept


def with_nan(checkpoint: Path, copy: Path) -> str:
    """A copy of a reward model, one of whose heads overflows; one that is not finite itself would not be loaded."""
    shutil.copytree(checkpoint, copy)
    [file] = [file for file in copy.glob("*.safetensors") if "score.weight" in load_file(file)]
    tensors = load_file(file)
    tensors["score.weight"][-1] = 3e38
    save_file(tensors, file, {"format": "pt"})
    return str(copy)


def test_nan_is_one_line_where_it_comes_in(settings: Config, reward: Path, tmp_path: Path) -> None:
    own = replace(settings, output=str(tmp_path / "gold"), gold=with_nan(reward / "posterior", tmp_path / "bad-gold"))
    with pytest.raises(PoiseError, match="bad-gold says NaN or infinity of some completions"):
        best_of_n.run(own)
    with_nan(reward / "ensemble", tmp_path / "bad" / "ensemble")
    for name in ("single", "brme"):
        shutil.copytree(reward / name, tmp_path / "bad" / name)
    own = replace(settings, output=str(tmp_path / "run"), reward=(str(reward), str(tmp_path / "bad")))
    for _ in range(2):  # nothing of it is kept
        with pytest.raises(PoiseError, match=r"heads/1-ensemble says NaN or infinity of some completions"):
            best_of_n.run(own)


def test_a_pool_of_conversations_that_share_their_last_turn(settings: Config, tmp_path: Path) -> None:
    prompts = [
        [{"role": "system", "content": who}, {"role": "user", "content": "Go on."}] for who in ("Be kind.", "No.")
    ]
    assert pool.pool_prompts(str(write_prompts(tmp_path / "two.jsonl", prompts))) == prompts
    twice = write_prompts(tmp_path / "twice.jsonl", [*prompts, prompts[0]])
    with pytest.raises(PoiseError, match=r"twice\.jsonl has a prompt twice: 'Go on\.'; leave each in once"):
        best_of_n.run(replace(settings, prompts=str(twice), output=str(tmp_path / "pool")))


def write_prompts(path: Path, prompts: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


def test_heads_of_another_checkpoint_are_refused(settings: Config, tmp_path: Path) -> None:
    own = replace(settings, output=str(tmp_path / "pool"))
    best_of_n.run(own)
    (tmp_path / "pool" / "results.json").unlink()
    file = tmp_path / "pool" / "heads" / "0-single.safetensors"
    file.write_bytes((tmp_path / "pool" / "heads" / "0-brme.safetensors").read_bytes())
    with pytest.raises(PoiseError, match="holds rewards of another reward model; delete it to score again"):
        best_of_n.run(own)


def test_bad_settings_are_one_line(settings: Config, tmp_path: Path) -> None:
    own = replace(settings, output=str(tmp_path / "pool"))
    with pytest.raises(PoiseError, match="unknown objective 'nonsense'"):
        best_of_n.run(replace(own, objectives=("brme:nonsense",)))
    with pytest.raises(PoiseError, match="--per-prompt must be at least 2"):
        best_of_n.run(replace(own, per_prompt=1))
    alone = tmp_path / "one.jsonl"
    alone.write_text(json.dumps({"prompt": "Review a film."}) + "\n")
    with pytest.raises(PoiseError, match=r"one\.jsonl has one prompt"):
        best_of_n.run(replace(own, prompts=str(alone)))


def test_an_unfinished_run_does_not_go_on_with_other_inputs(settings: Config, reward: Path, tmp_path: Path) -> None:
    own = tmp_path / "reward"
    shutil.copytree(reward, own)
    prompts = tmp_path / "prompts.jsonl"
    shutil.copy(settings.prompts, prompts)
    run = replace(settings, output=str(tmp_path / "run"), reward=(str(reward), str(own)), prompts=str(prompts))
    best_of_n.run(run)
    assert set(json.loads((tmp_path / "run" / "inputs.json").read_text())) == {
        "--prompts", "--model", "--reward 1", "--reward 2", "--gold",
    }  # fmt: skip
    copied = shutil.copy(prompts, tmp_path / "copied.jsonl")
    assert best_of_n.run(replace(run, prompts=str(copied))).results  # the same prompts, in another place
    results = (tmp_path / "run" / "results.json").read_text()
    (tmp_path / "run" / "results.json").unlink()
    [file] = [file for file in (own / "brme").glob("*.safetensors") if "score.weight" in load_file(file)]
    before = file.read_bytes()
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(PoiseError, match=r"begun with other inputs: --reward 2 changed since"):
        best_of_n.run(run)
    (tmp_path / "run" / "results.json").write_text(results)
    with pytest.raises(PoiseError, match=r"is finished, and of its inputs --reward 2 changed since"):
        best_of_n.run(run)
    (tmp_path / "run" / "results.json").unlink()
    file.write_bytes(before)
    prompts.write_text(prompts.read_text() + '{"prompt": "One more."}\n')
    with pytest.raises(PoiseError, match=r"begun with other inputs: --prompts changed since"):
        best_of_n.run(run)


def test_without_gold_the_proxy_alone_and_what_was_selected(settings: Config, tmp_path: Path) -> None:
    best_of_n.run(settings)
    for name in ("pool.jsonl", "heads"):
        source = Path(settings.output) / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    rows = [{key: row[key] for key in ("prompt", "completion")} for row in read_rows(tmp_path / "pool.jsonl")]
    write_jsonl(tmp_path / "pool.jsonl", rows)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_dict(replace(settings, gold=""))))
    found = best_of_n.run(replace(settings, gold="", output=str(tmp_path))).results
    assert found
    assert "gold" not in json.dumps(found)
    with_gold = best_of_n.run(settings).results
    assert with_gold
    for one, other in zip(found["curves"], with_gold["curves"], strict=True):
        assert [point["proxy"] for point in one["best_of_n"]] == [point["proxy"] for point in other["best_of_n"]]
    selected = list(read_rows(tmp_path / "selected.jsonl"))
    assert [row["objective"] for row in selected] == [name for name in CHOICES for _ in range(4)]
    for row, curve in zip(selected[::4], found["curves"], strict=True):
        of_objective = [one["reward"] for one in selected if one["objective"] == row["objective"]]
        assert np.mean(of_objective) == pytest.approx(curve["best_of_n"][-1]["proxy"], abs=1e-6)
        assert row["reward"] >= row["runner_up_reward"]
        texts = [one["completion"] for one in rows if one["prompt"] == row["prompt"]]
        assert {row["best"], row["runner_up"]} <= set(texts)
