"""`poise study`: does a robust reward help? Arms x reward-model seeds x policy seeds x label noise.

    RUN/pool/                               best-of-n: one pool, judged by many reward models (study_pool.py)
    RUN/noise-0.25/reward-1/                the preferences, flipped; what `poise train-reward` makes of them
    RUN/noise-0.25/reward-1/policy-0/ARM/   a `poise train-policy` run; error.txt says why a cell failed
    RUN/benchmarks/                         `poise evaluate-policy` on some of these policies, if it was run
    RUN/results.json                        curves, cells, means over seeds with intervals; what is missing
    RUN/report.html, RUN/study.png          all of it, to explore; the main figure

A cell runs in a process of its own, `--jobs` of them at a time. A study stopped at any moment goes on where it was, and
one with more arms, seeds or noise keeps the cells it has. Gold is read when all cells are done, by `compare` and
`best_of_n` alone.

Intervals are 95 % bootstrap intervals: of policies over reward models (study_summary.py), of best-of-n over reward
models and prompts (curves.py). Differences are paired.
"""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from poise import best_of_n, claims, compare, plots, recipes, study_page, study_pool, train_policy, train_reward
from poise.arms import ARMS
from poise.cells import Cell, cpu_hours, run_cells
from poise.data import Preference, read_preferences, write_preferences
from poise.errors import PoiseError
from poise.evaluate_policy import fluctuation
from poise.models import DEFAULT_MODEL
from poise.pool import judge_choices
from poise.progress import console, progress
from poise.runs import Json, Run, config_dict, environment, read_jsonl, write_atomic, write_json
from poise.study_summary import measured, summary

VERSION = 1  # of results.json
GROWS = {
    "output", "arms", "reward_seeds", "policy_seeds", "pool_seeds", "pool_size", "label_noise", "policy_noise", "jobs",
    "eval_every", "eval_data", "eval_tasks", "eval_rows",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Arms × seeds × label noise, side by side: does a robust reward help, and by how much?"""

    output: str = "runs/study"
    """Folder to write; start again with the same one to go on, or with more arms, seeds or noise to extend it."""
    preferences: str = ""
    """Preferences: a file (JSON lines, Parquet, CSV), a folder saved by `datasets`, or a hub id. Default, for all
    files: the standard study, on 4,000 pairs of reviews that people rated."""
    raters: str = ""
    """The same pairs with the labels of single raters, for the noise level `raters`."""
    prompts: str = ""
    """JSON lines with `prompt`, to train the policies on."""
    eval_prompts: str = ""
    """Other prompts, to judge them on."""
    num_preferences: int = 400
    """Preferences each reward model is trained on, drawn from the file by its seed; 0 takes all."""
    model: str = DEFAULT_MODEL
    """Language model: local folder or hub id."""
    arms: tuple[str, ...] = (
        "single", "single_large_kl", "mean", "worst_case", "uncertainty_weighted", "brme_0.4", "brme_1",
        "brme_large_kl",
    )  # fmt: skip
    """Differences are taken against the first. Also: lower_confidence, soft_min, contrastive, par, bayesian, settle,
    brme_0, brme_0.2, brme_0.6, brme_0.8, brme_mean, brme_random, brme_adaptive, constant."""
    label_noise: tuple[str, ...] = ("0", "0.25")
    """Shares of the preferences to flip; 0 leaves them as they are; `raters` takes those of --raters."""
    pool_seeds: int = 20
    """Reward models of each noise for best-of-n, each of a seed of its own, which also decides whose labels are
    flipped; all objectives are tried on them."""
    pool_size: int = 64
    """Completions of each evaluation prompt to choose from; 0 leaves best-of-n out."""
    policy_noise: tuple[str, ...] = ("0",)
    """Of the label noise, what policies are trained on."""
    reward_seeds: int = 3
    """Reward models, of the first seeds, that policies are trained on."""
    policy_seeds: int = 1
    """Policies of every arm trained on each; 0 trains none."""
    num_layers: int = 8
    """Layers of the model that the reward models read; 0 keeps all."""
    num_steps: int = 40
    """PPO steps of every policy."""
    kl_coef: float = 0.01
    """β; the arms called `large_kl` have twenty times as much."""
    max_tokens: int = 20
    """Longest completion, in tokens."""
    gold: str = ""
    """Reward model that plays the human, trained on data none of these preferences are from; default: a reader of
    short reviews."""
    eval_every: int = 0
    """PPO steps between benchmarks asked during training, for how much they move over checkpoints; 0 asks none."""
    eval_data: str = ""
    """Folder of their rows; default: the harness's own tasks, from the model hub."""
    eval_tasks: tuple[str, ...] = ("lambada",)
    """Which benchmarks."""
    eval_rows: int = train_policy.Config.eval_rows
    """Rows of each, the same ones every time."""
    jobs: int = 1
    """Cells at a time; the processor's cores are shared out among them."""


def run(config: Config) -> Run:
    """Train what is missing, then judge all that is there; a cell that fails is named and left out."""
    standard = not any((config.preferences, config.raters, config.prompts, config.eval_prompts))
    config = _standard(config) if standard else config
    _check(config)
    if standard:
        recipes.study_files(Path(config.preferences).parent)
    out = _open(config)
    _write_preferences(config)
    of_pool = _judge_pool(config, out.folder) if config.pool_size else {}
    failed = _train(config)
    for folder, why in failed.items():
        console.print(f"[bold red]failed:[/] {folder.relative_to(out.folder)}: {why}", soft_wrap=True)
    comparisons: list[str] = []
    cells = list(_judged(config, comparisons))
    results: Json = {
        "version": VERSION,
        "settings": config_dict(config),
        "arms": {
            name: {"reward": arm.reward, "objective": arm.objective, "label": arm.label} for name, arm in ARMS.items()
        },
        "missing": {str(folder.relative_to(out.folder)): why for folder, why in failed.items()},
        "cells": cells,
        "summary": summary(cells, config.arms),
        "comparisons": comparisons,
        "benchmarks": _benchmarks(out.folder),
        **of_pool,
    }  # fmt: skip
    results.setdefault("instability", {}).update(_unstable_policies(results["summary"]))
    out.finish(results | {"published": claims.published(results)})
    write_atomic(out.folder / "environment.json", json.dumps(environment(), indent=2))
    write_atomic(out.folder / "config.yaml", yaml.safe_dump(config_dict(config), sort_keys=False))
    plots.save_study(results, out.folder / "study.png")
    _say(results)
    console.print(f"[bold]Report:[/] {study_page.build(out.folder)}")
    return out


def _train(config: Config) -> dict[Path, str]:
    """Reward models and policies; returns what failed, and why."""
    if not config.policy_seeds:
        return {}
    rewards = [_reward_cell(config, *at) for at in _worlds(config)]
    failed = run_cells(rewards, config.jobs, "study: reward models of the policies")
    policies = [
        _policy_cell(config, arm, seed, *at)
        for at, reward in zip(_worlds(config), rewards, strict=True)
        for seed in range(config.policy_seeds)
        for arm in config.arms
        if reward.folder not in failed
    ]
    return failed | run_cells(policies, config.jobs, "study: policies")


def _judge_pool(config: Config, folder: Path) -> Json:
    """Best-of-n of every arm over many reward models, and how far those are apart."""
    settings = best_of_n.Config(
        prompts=config.eval_prompts, reward=(), model=config.model, per_prompt=config.pool_size,
        max_tokens=config.max_tokens, gold=config.gold,
    )  # fmt: skip
    (folder / "pool").mkdir(exist_ok=True)
    rows = best_of_n.make_pool(folder / "pool", settings)
    labels = list(dict.fromkeys(compare.prompt_label(row["prompt"]) for row in rows))
    if len(rows) != len(labels) * config.pool_size:
        raise PoiseError(f"{folder}/pool is not of {config.pool_size} completions a prompt; delete it to sample again")
    pool = study_pool.Pool(folder / "pool", rows, config.pool_size)
    seeds = range(config.pool_seeds)
    configs = {
        f"noise-{noise}/reward-{s}": _reward_config(config, noise, s) for noise in config.label_noise for s in seeds
    }
    # The same preferences, other seeds: the other seeds of the first part of the data.
    again = {
        f"noise-{noise}/reward-0-seed-{s}": replace(_reward_config(config, noise, 0), seed=s)
        for noise in config.label_noise
        for s in seeds
    }
    scored = study_pool.score(pool, configs | again)
    of_noise = {noise: [scored[f"noise-{noise}/reward-{s}"] for s in seeds] for noise in config.label_noise}
    choices = {name: arm.choice() for name, arm in ARMS.items() if not arm.only_policy}
    study_pool.write_page_pool(folder / "page-pool.json", pool, labels, of_noise)
    unstable: Json = {}
    if config.pool_seeds > 1:
        for noise, heads in of_noise.items():
            same = [scored[f"noise-{noise}/reward-0-seed-{s}"] for s in seeds]
            unstable[f"{noise}, other preferences"] = study_pool.instability(pool, heads)
            unstable[f"{noise}, same preferences, other seeds"] = study_pool.instability(pool, same)
    with progress("study: best-of-n", len(of_noise) * len(choices)) as advance:
        curves = {noise: judge_choices(pool.gold_PN, heads, choices, advance) for noise, heads in of_noise.items()}
    return {"best_of_n": curves, "instability": unstable}


def _unstable_policies(of_noise: Json) -> Json:
    """How far apart policies end that differ in the seed of their reward model."""
    return {
        f"{noise}, policies": {
            name: {"seeds": arm["reward_seeds"], "gold_std": arm["final_gold"]["std"], "kl_std": arm["kl"]["std"]}
            for name, arm in arms.items()
            if arm["reward_seeds"] > 1
        }
        for noise, arms in of_noise.items()
        if any(arm["reward_seeds"] > 1 for arm in arms.values())
    }


def _benchmarks(folder: Path) -> Json | None:
    """What `poise evaluate-policy --output RUN/benchmarks` found, without the single rows."""
    found = Run(folder / "benchmarks").results
    for policy in found["policies"] if found else []:
        for task in policy["tasks"].values():
            task.pop("outcomes", None)
    return found


def _say(results: Json) -> None:
    for noise, arms in results["summary"].items():
        for name, arm in arms.items():
            gold = arm["final_gold"]["mean"]
            low, high = arm["final_gold"]["interval"]
            console.print(f"noise {noise}, {name}: final gold {gold:+.2f} ({low:+.2f} to {high:+.2f})", highlight=False)


def _check(config: Config) -> None:
    if not all((config.preferences, config.prompts, config.eval_prompts)):
        raise PoiseError(
            "--preferences, --prompts and --eval-prompts belong together; leave out all for the standard study"
        )
    for name in ("reward_seeds", "pool_seeds", "jobs"):
        if getattr(config, name) < 1:
            raise PoiseError(f"--{name.replace('_', '-')} must be at least 1")
    if config.pool_size == 1 or min(config.pool_size, config.policy_seeds) < 0:
        raise PoiseError("--pool-size must be at least 2, or 0 for no best-of-n; --policy-seeds at least 0")
    if not config.pool_size and not config.policy_seeds:
        raise PoiseError("--pool-size 0 and --policy-seeds 0 leave nothing to study")
    if unknown := [arm for arm in config.arms if arm not in ARMS]:
        raise PoiseError(f"no arm {unknown[0]!r}; choose from {', '.join(ARMS)}")
    if len(set(config.arms)) < max(len(config.arms), 2):
        raise PoiseError("--arms needs at least two, each once")
    if len(set(config.label_noise)) < len(config.label_noise) or not all(map(_is_noise, config.label_noise)):
        raise PoiseError("--label-noise takes shares in [0, 0.5] or `raters`, each once")
    if unknown := [noise for noise in config.policy_noise if noise not in config.label_noise]:
        raise PoiseError(f"--policy-noise {unknown[0]} is not among --label-noise {' '.join(config.label_noise)}")
    if "raters" in config.label_noise and not config.raters:
        raise PoiseError("--label-noise raters needs --raters: the same pairs with the labels of single raters")
    for arm in config.arms:  # what a policy's config refuses is said before anything is trained
        _policy_cell(config, arm, 0, "0", 0).config.check()


def _is_noise(label: str) -> bool:
    try:
        return label == "raters" or 0 <= float(label) <= 0.5
    except ValueError:
        return False


def _standard(config: Config) -> Config:
    """The config with the files of the standard study."""
    folder = Path(config.output) / "data"
    return replace(
        config, preferences=str(folder / "preferences.jsonl"), raters=str(folder / "raters.jsonl"),
        prompts=str(folder / "prompts.jsonl"), eval_prompts=str(folder / "eval_prompts.jsonl"),
    )  # fmt: skip


def _open(config: Config) -> Run:
    """The study's folder. Arms, seeds and noise may grow; all else must be what it was."""
    folder = Path(config.output)
    path = folder / "study.json"
    fixed = {key: value for key, value in config_dict(config).items() if key not in GROWS}
    out = Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        before = config_dict(Config()) | json.loads(path.read_text())  # it may be of a time with fewer settings
        if changed := sorted(key for key in fixed if before.get(key) != fixed[key]):
            raise PoiseError(f"{folder} holds a study of other settings (differs in {', '.join(changed)})")
    write_json(path, fixed)
    return out


# ---- cells ----


def _worlds(config: Config) -> Iterator[tuple[str, int]]:
    """(label noise, reward seed) that policies are trained on."""
    return itertools.product(config.policy_noise, range(config.reward_seeds))


def _world(config: Config, noise: str, seed: int) -> Path:
    return Path(config.output) / f"noise-{noise}" / f"reward-{seed}"


def _write_preferences(config: Config) -> None:
    """What each reward model is trained on: a seed's part of the pairs is the same at every noise."""
    sources: dict[str, list[Preference]] = {}
    count = max(config.pool_seeds, config.reward_seeds)
    for noise, seed in itertools.product(config.label_noise, range(count)):
        file = _world(config, noise, seed) / "preferences.jsonl"
        if file.exists():
            continue
        source = config.raters if noise == "raters" else config.preferences
        if source not in sources:
            sources[source] = read_preferences(source)
        drawn = part(sources[source], config.num_preferences, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_preferences(file, drawn if noise == "raters" else flipped(drawn, float(noise), seed))


def part(preferences: list[Preference], count: int, seed: int) -> list[Preference]:
    """`count` of the preferences at random, in their order; all if `count` is 0."""
    if not count:
        return preferences
    if count > len(preferences):
        raise PoiseError(f"--num-preferences {count}, but there are {len(preferences)}; 0 takes all for every seed")
    return [preferences[i] for i in sorted(random.Random(seed).sample(range(len(preferences)), count))]


def _reward_cell(config: Config, noise: str, seed: int) -> Cell:
    return Cell("train-reward", _reward_config(config, noise, seed))


def _reward_config(config: Config, noise: str, seed: int) -> train_reward.Config:
    world = _world(config, noise, seed)
    return train_reward.Config(
        preferences=str(world / "preferences.jsonl"), output=str(world / "reward"), model=config.model,
        num_layers=config.num_layers, seed=seed,
    )  # fmt: skip


def flipped(preferences: list[Preference], share: float, seed: int) -> list[Preference]:
    """The preferences with a random share of them, rounded, the wrong way round."""
    wrong = set(random.Random(seed).sample(range(len(preferences)), round(share * len(preferences))))
    return [
        replace(one, chosen=one.rejected, rejected=one.chosen) if i in wrong else one
        for i, one in enumerate(preferences)
    ]


def _policy_cell(config: Config, name: str, policy_seed: int, noise: str, seed: int) -> Cell:
    arm, world = ARMS[name], _world(config, noise, seed)
    return Cell(
        "train-policy",
        train_policy.Config(
            prompts=config.prompts, eval_prompts=config.eval_prompts, reward=str(world / "reward" / arm.reward),
            output=str(world / f"policy-{policy_seed}" / name), model=config.model, objective=arm.objective,
            kl_coef=config.kl_coef * arm.kl_factor, num_steps=config.num_steps, max_tokens=config.max_tokens,
            seed=1000 * seed + policy_seed, eval_every=config.eval_every, eval_data=config.eval_data,
            eval_tasks=config.eval_tasks, eval_rows=config.eval_rows, **arm.changes,
        ),
    )  # fmt: skip


# ---- judging ----


def _judged(config: Config, comparisons: list[str]) -> Iterator[Json]:
    """Every finished policy, by gold; `comparisons` gets the folders of `compare`'s runs."""
    for noise, seed in _worlds(config):
        for policy_seed in range(config.policy_seeds):
            cells = [_policy_cell(config, arm, policy_seed, noise, seed) for arm in config.arms]
            done = [str(cell.folder) for cell in cells if Run(cell.folder).results is not None]
            if len(done) < 2:
                continue
            output = _world(config, noise, seed) / f"policy-{policy_seed}" / "comparison"
            (output / "config.yaml").unlink(missing_ok=True)  # done anew: there may be more arms than last time
            pool = str(Path(config.output) / "pool") if config.pool_size else ""
            settings = compare.Config(arms=tuple(done), output=str(output), gold=config.gold, pool=pool)
            comparisons.append(str(output.relative_to(config.output)))
            for arm in (compare.run(settings).results or {})["arms"]:
                at = {"noise": noise, "reward_seed": seed, "policy_seed": policy_seed, "arm": arm["name"]}
                folder = _policy_cell(config, arm["name"], policy_seed, noise, seed).folder
                cell = at | measured(arm) | {"cpu_hours": cpu_hours(folder)}
                if (folder / "benchmarks.jsonl").exists():
                    cell["checkpoints"] = fluctuation(list(read_jsonl(folder / "benchmarks.jsonl")))
                yield cell
