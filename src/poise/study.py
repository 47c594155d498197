"""`poise study`: arms x reward-model seeds x policy seeds x label noise, each cell a run folder of its own.

    RUN/noise-0.25/reward-1/                the preferences, flipped; what `poise train-reward` makes of them
    RUN/noise-0.25/reward-1/policy-0/ARM/   a `poise train-policy` run; error.txt says why a cell failed
    RUN/results.json                        every cell, and per arm means over seeds with intervals; what is missing

A cell runs in a process of its own, `--jobs` of them at a time. A study stopped at any moment goes on where it was, and
one with more arms or seeds keeps the cells it has. Gold is read when all cells are done, by `compare` alone; it is the
package's own stand-in for a person (gold.py), made for reviews of films and products.

Intervals are 95 % bootstrap intervals over reward-model seeds, policy seeds averaged within each: policies that share a
reward model are not independent. Differences are paired by seeds.
"""

import fcntl
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from poise import compare, train_policy, train_reward
from poise.data import Preference, read_preferences, write_preferences
from poise.errors import PoiseError
from poise.metrics import bootstrap_interval
from poise.models import DEFAULT_MODEL
from poise.progress import console, progress
from poise.runs import Json, Run, config_dict, write_json

MEASURES = ("final_gold", "peak_gold", "drawdown", "mean_gold", "kl", "proxy", "distinct_bigrams")
LARGE_KL = 20.0  # times --kl-coef


class Arm(NamedTuple):
    """What one policy of the study is trained on, and how far from the study's settings."""

    reward: str
    objective: str
    changes: Json = {}  # noqa: RUF012  of the policy's config
    kl_factor: float = 1.0


ARMS: dict[str, Arm] = {
    "single": Arm("single", "nominal"),
    "single_large_kl": Arm("single", "nominal", kl_factor=LARGE_KL),
    "mean": Arm("brme", "mean"),
    "worst_case": Arm("brme", "worst_case"),
    "uncertainty_weighted": Arm("brme", "uncertainty_weighted(0.1)"),
    "soft_min": Arm("brme", "soft_min(0.5)"),
    "contrastive": Arm("single", "nominal", {"shaping": "contrastive"}),
    "par": Arm("single", "nominal", {"shaping": "par"}),
    "lower_confidence": Arm("posterior", "lower_confidence(1)"),
    "settle": Arm("posterior", "lower_confidence(1)", {"reward_ceiling": 2.0, "settle": True}),
    **{f"brme_{weight:g}": Arm("brme", f"tradeoff({weight:g})") for weight in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)},
    "constant": Arm("single", "constant(0)"),
}


@dataclass(frozen=True)
class Config:
    """Arms × seeds × label noise, side by side: does a robust reward help, and by how much?"""

    preferences: str
    """Preferences: a file (JSON lines, Parquet, CSV), a folder saved by `datasets`, or a hub id."""
    prompts: str
    """JSON lines with `prompt`, to train the policies on."""
    eval_prompts: str
    """Other prompts, to judge them on."""
    output: str = "runs/study"
    """Folder to write; start again with the same one to go on, or with more arms, seeds or noise to extend it."""
    model: str = DEFAULT_MODEL
    """Language model: local folder or hub id."""
    arms: tuple[str, ...] = (
        "single", "single_large_kl", "mean", "worst_case", "uncertainty_weighted", "brme_0.4", "brme_1",
    )  # fmt: skip
    """Differences are taken against the first. Also: soft_min, contrastive, par, lower_confidence, settle, brme_0,
    brme_0.2, brme_0.6, brme_0.8, constant."""
    reward_seeds: int = 3
    """Reward models, each of a seed of its own, which also decides whose labels are flipped."""
    policy_seeds: int = 1
    """Policies trained on each."""
    label_noise: tuple[float, ...] = (0.0,)
    """Shares of the preferences to flip, e.g. 0 0.25; 0 leaves them as people gave them."""
    num_layers: int = 8
    """Layers of the model that the reward models read; 0 keeps all."""
    num_steps: int = 40
    """PPO steps of every policy."""
    kl_coef: float = 0.01
    """β; `single_large_kl` has twenty times as much."""
    max_tokens: int = 20
    """Longest completion, in tokens."""
    jobs: int = 1
    """Cells at a time; the processor's cores are shared out among them."""


class Cell(NamedTuple):
    """One training: of a reward model, or of a policy."""

    command: str
    config: Any

    @property
    def folder(self) -> Path:
        return Path(self.config.output)


def run(config: Config) -> Run:
    """Train what is missing, then judge all that is there; a cell that fails is named and left out."""
    _check(config)
    out = _open(config)
    preferences = read_preferences(config.preferences)
    rewards = [_reward_cell(config, preferences, *at) for at in _worlds(config)]
    failed = run_cells(rewards, config.jobs, "reward models")
    policies = [
        _policy_cell(config, arm, seed, *at)
        for at, reward in zip(_worlds(config), rewards, strict=True)
        for seed in range(config.policy_seeds)
        for arm in config.arms
        if reward.folder not in failed
    ]
    failed |= run_cells(policies, config.jobs, "policies")
    for folder, why in failed.items():
        console.print(f"[bold red]failed:[/] {folder.relative_to(out.folder)}: {why}", soft_wrap=True)
    cells = list(_judged(config))
    missing = {str(folder.relative_to(out.folder)): why for folder, why in failed.items()}
    out.finish({"summary": summary(cells, config.arms), "cells": cells, "missing": missing})
    for noise, arms in (out.results or {})["summary"].items():
        for name, measured in arms.items():
            gold = measured["final_gold"]["mean"]
            low, high = measured["final_gold"]["interval"]
            console.print(f"noise {noise}, {name}: final gold {gold:+.2f} ({low:+.2f} to {high:+.2f})", highlight=False)
    return out


def _check(config: Config) -> None:
    for name in ("reward_seeds", "policy_seeds", "jobs"):
        if getattr(config, name) < 1:
            raise PoiseError(f"--{name.replace('_', '-')} must be at least 1")
    if unknown := [arm for arm in config.arms if arm not in ARMS]:
        raise PoiseError(f"no arm {unknown[0]!r}; choose from {', '.join(ARMS)}")
    if len(set(config.arms)) < max(len(config.arms), 2):
        raise PoiseError("--arms needs at least two, each once")
    if len(set(config.label_noise)) < len(config.label_noise) or not all(0 <= x <= 0.5 for x in config.label_noise):
        raise PoiseError("--label-noise takes shares in [0, 0.5], each once")
    for arm in config.arms:  # what a policy's config refuses is said before anything is trained
        _policy_cell(config, arm, 0, 0.0, 0).config.check()


def _open(config: Config) -> Run:
    """The study's folder. Arms, seeds and noise may grow; all else must be what it was."""
    folder, grows = Path(config.output), ("arms", "reward_seeds", "policy_seeds", "label_noise", "jobs")
    path = folder / "study.json"
    fixed = {key: value for key, value in config_dict(config).items() if key not in (*grows, "output")}
    out = Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        before = json.loads(path.read_text())
        if changed := sorted(key for key in fixed if before.get(key) != fixed[key]):
            raise PoiseError(f"{folder} holds a study of other settings (differs in {', '.join(changed)})")
    write_json(path, fixed)
    return out


# ---- cells ----


def _worlds(config: Config) -> Iterator[tuple[float, int]]:
    """(label noise, reward seed)"""
    return itertools.product(config.label_noise, range(config.reward_seeds))


def _world(config: Config, noise: float, seed: int) -> Path:
    return Path(config.output) / f"noise-{noise:g}" / f"reward-{seed}"


def _reward_cell(config: Config, preferences: list[Preference], noise: float, seed: int) -> Cell:
    world = _world(config, noise, seed)
    file = world / "preferences.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_preferences(file, flipped(preferences, noise, seed))
    return Cell(
        "train-reward",
        train_reward.Config(
            preferences=str(file), output=str(world / "reward"), model=config.model, num_layers=config.num_layers,
            seed=seed,
        ),
    )  # fmt: skip


def flipped(preferences: list[Preference], share: float, seed: int) -> list[Preference]:
    """The preferences with a random share of them, rounded, the wrong way round."""
    wrong = set(random.Random(seed).sample(range(len(preferences)), round(share * len(preferences))))
    return [
        replace(one, chosen=one.rejected, rejected=one.chosen) if i in wrong else one
        for i, one in enumerate(preferences)
    ]


def _policy_cell(config: Config, name: str, policy_seed: int, noise: float, seed: int) -> Cell:
    arm, world = ARMS[name], _world(config, noise, seed)
    return Cell(
        "train-policy",
        train_policy.Config(
            prompts=config.prompts, eval_prompts=config.eval_prompts, reward=str(world / "reward" / arm.reward),
            output=str(world / f"policy-{policy_seed}" / name), model=config.model, objective=arm.objective,
            kl_coef=config.kl_coef * arm.kl_factor, num_steps=config.num_steps, max_tokens=config.max_tokens,
            seed=1000 * seed + policy_seed, **arm.changes,
        ),
    )  # fmt: skip


def run_cells(cells: list[Cell], jobs: int, label: str) -> dict[Path, str]:
    """Run what is not finished, `jobs` at a time; returns the folders of those that failed, and why."""
    todo = [cell for cell in cells if Run(cell.folder).results is None]
    failed: dict[Path, str] = {}
    with progress(label, len(cells), len(cells) - len(todo)) as advance, ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run_cell, cell, jobs): cell for cell in todo}
        try:
            for done in as_completed(running):
                if why := done.result():
                    failed[running[done].folder] = why
                advance()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def run_cell(cell: Cell, jobs: int = 1) -> str:
    """One cell in a process of its own; returns what went wrong, or nothing."""
    run = Run.open(cell.folder, cell.config)
    error = cell.folder / "error.txt"
    with (cell.folder / ".lock").open("w") as lock, (cell.folder / "log.txt").open("a") as log:
        # The process holds the lock, too: one that outlived a killed study is waited for, not doubled.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if run.results is not None:
            return ""
        threads = str(max((os.cpu_count() or 1) // jobs, 1))
        done = subprocess.run(
            [sys.executable, "-m", "poise.cli", cell.command, "--config", str(cell.folder / "config.yaml")],
            stdout=log, stderr=subprocess.PIPE, text=True, pass_fds=[lock.fileno()],
            env={"OMP_NUM_THREADS": threads, **os.environ},
        )  # fmt: skip
    if done.returncode == 0 and run.results is not None:
        error.unlink(missing_ok=True)
        return ""
    why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1].removeprefix("poise: ")
    error.write_text(done.stderr or why)
    return why


# ---- judging ----


def _judged(config: Config) -> Iterator[Json]:
    """Every finished policy, by gold."""
    for noise, seed in _worlds(config):
        for policy_seed in range(config.policy_seeds):
            cells = [_policy_cell(config, arm, policy_seed, noise, seed) for arm in config.arms]
            done = [str(cell.folder) for cell in cells if Run(cell.folder).results is not None]
            if len(done) < 2:
                continue
            output = str(_world(config, noise, seed) / f"policy-{policy_seed}" / "comparison")
            (Path(output) / "config.yaml").unlink(missing_ok=True)  # done anew: there may be more arms than last time
            for arm in (compare.run(compare.Config(arms=tuple(done), output=output)).results or {})["arms"]:
                at = {"noise": noise, "reward_seed": seed, "policy_seed": policy_seed, "arm": arm["name"]}
                yield at | measured(arm) | {"hours": arm["seconds"] / 3600}


def measured(arm: Json) -> Json:
    """MEASURES of one arm of a comparison, and the interval of its final gold over prompts."""
    final = arm["final"]
    return {
        "final_gold": final["gold"], "interval_over_prompts": final["interval"],
        "peak_gold": arm["peak_gold"], "drawdown": arm["drawdown"],
        "mean_gold": float(np.mean([step["gold"] for step in arm["steps"]])),
        "kl": final["kl"], "proxy": final["proxy"], "distinct_bigrams": final["distinct_bigrams"],
    }  # fmt: skip


def summary(cells: Iterable[Json], arms: tuple[str, ...]) -> Json:
    """Per noise and arm: each measure over reward seeds, and less the first arm's where both are there."""
    by_seed: dict[tuple[float, str, int], list[Json]] = {}
    for cell in cells:
        by_seed.setdefault((cell["noise"], cell["arm"], cell["reward_seed"]), []).append(cell)
    found: Json = {}
    for noise in sorted({noise for noise, _, _ in by_seed}):
        seeds = {arm: {s: by_seed[n, a, s] for n, a, s in by_seed if (n, a) == (noise, arm)} for arm in arms}
        found[f"{noise:g}"] = {
            arm: _arm_summary(own, seeds[arms[0]], arm != arms[0]) for arm, own in seeds.items() if own
        }
    return found


def _arm_summary(own: dict[int, list[Json]], first: dict[int, list[Json]], differs: bool) -> Json:
    part: Json = {"reward_seeds": len(own), "policies": sum(map(len, own.values()))}
    for key in MEASURES:
        values = np.array([np.mean([cell[key] for cell in cells]) for cells in own.values()])
        part[key] = {"mean": float(values.mean()), "interval": bootstrap_interval(values)}
        both = [
            [
                one[key] - other[key]
                for one in own[s]
                for other in first[s]
                if one["policy_seed"] == other["policy_seed"]
            ]
            for s in own.keys() & first.keys()
        ]
        paired = np.array([np.mean(differences) for differences in both if differences])
        if differs and len(paired):
            part[key] |= {"less_first": float(paired.mean()), "less_first_interval": bootstrap_interval(paired)}
    part["hours"] = sum(cell["hours"] for cells in own.values() for cell in cells)
    return part
