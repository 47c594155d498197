"""`poise study`: does a robust reward help? Arms x reward-model seeds x policy seeds x label noise.

    RUN/pool/                               best-of-n: one pool, scored by many reward models (studies/pool_study.py)
    RUN/noise-0.25/reward-1/                the preferences, flipped; the run of `poise train-reward` on them
    RUN/noise-0.25/reward-1/policy-0/ARM/   a `poise train-policy` run; error.txt says why it failed
    RUN/benchmarks/                         `poise evaluate-policy` on some of these policies, if it was run
    RUN/results.json                        curves, cells, means over seeds with intervals; what is missing
    RUN/report.html, RUN/study.png          all of it, to explore; the main figure

Each training is a job in a subprocess, `--jobs` of them at a time (runtime/jobs.py). The same command continues a
stopped study. With more arms, seeds or noise it keeps the finished jobs. A cell of results.json is one trained policy.
Gold is read only by `compare` and `best_of_n`: the pool's completions get it before any policy is trained, and the
trained policies get it when all jobs are done.

Intervals are 95 %: of policies Student's, over reward models (reports/summary.py); of best-of-n bootstrap, over reward
models and prompts (functional/overoptimization.py). Differences are paired.
"""

import contextlib
import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from poise.data.preferences import read_preferences, read_prompts, write_preferences
from poise.data.types import Preference, Prompt
from poise.errors import PoiseError
from poise.models.loading import resolve_model
from poise.models.reward_model import files_of
from poise.models.row_check import row_check_of
from poise.policy.evaluate import fluctuation
from poise.policy.formats import BenchmarkRow
from poise.reports import published as claims
from poise.reports import study_page, study_plots
from poise.reports.summary import contrasts, measured, summary
from poise.runtime.folders import lock, own, refuse_foreign
from poise.runtime.jobs import cpu_hours, run_jobs
from poise.runtime.progress import console, progress
from poise.runtime.records import read_object, read_rows
from poise.runtime.run_folder import (
    Inputs,
    Json,
    Run,
    config_dict,
    environment,
    record_inputs,
    write_atomic,
    write_json,
)
from poise.runtime.settings import same_value
from poise.studies import best_of_n, compare
from poise.studies import pool_study as study_pool
from poise.studies import quickstart as recipes
from poise.studies.arms import ARMS
from poise.studies.comparisons import prompt_key
from poise.studies.config import (
    GROWS,
    RENAMED,
    REVIEWS,
    Config,
    check,
    completed,
    is_standard,
    policy_job,
    policy_model,
    reward_config,
    reward_job,
    settings,
    world_folder,
    worlds,
)
from poise.studies.pool import compare_choices, pool_prompts, prompt_label

VERSION = 2  # of results.json


@dataclass(frozen=True)
class _Kept:
    """study.json: the settings that are fixed, and the digests of the files."""

    digests: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Benchmarks:
    """results.json of `poise evaluate-policy`, as far as a study reads it."""

    policies: list[dict[str, Any]]


def run(config: Config) -> Run:
    """Train what is missing, then score everything by gold. A job that fails is named and left out."""
    standard, config = is_standard(config), completed(config)
    check(config)
    refuse_foreign(Path(config.output))
    if not standard and not config.gold:
        console.print("gold is by rules that score short film and product reviews; for other texts give --gold MODEL")
    if standard:
        own(Path(config.output))
        recipes.study_files(Path(config.preferences).parent)
    sources = _read(config)
    out = _open(config)
    _write_preferences(config, sources)
    of_pool = _best_of_n(config, out.folder) if config.pool_size else {}
    failed = _train(config)
    for folder, why in failed.items():
        console.print(f"failed: {folder.relative_to(out.folder)}: {why}", soft_wrap=True)
    comparisons: list[str] = []
    cells = list(_cells(config, comparisons))
    results: Json = {
        "version": VERSION,
        "settings": settings(config),
        "arms": {
            name: {"reward": arm.reward, "objective": arm.objective, "label": arm.label} for name, arm in ARMS.items()
        },
        "missing": {str(folder.relative_to(out.folder)): why for folder, why in failed.items()},
        "cells": cells,
        "summary": summary(cells, config.arms),
        "comparisons": comparisons,
        "benchmarks": _benchmarks(config, out.folder),
        **of_pool,
    }  # fmt: skip
    results.setdefault("instability", {}).update(_unstable_policies(results["summary"]))
    out.finish(results | {"published": claims.published(results)})
    write_atomic(out.folder / "environment.json", json.dumps(environment(), indent=2))
    write_atomic(out.folder / "config.yaml", yaml.safe_dump(config_dict(config), sort_keys=False))
    if cells or of_pool:  # otherwise every job failed and there is nothing to draw
        study_plots.save_study(results, out.folder / "study.png")
    _say(results)
    study_page.build(out.folder)
    return out


def check_outcome(out: Run) -> None:
    """Raise PoiseError for a study, written with its page, of which jobs failed and no policy was compared."""
    results = out.results or {}
    if (missing := results.get("missing")) and not results.get("cells"):
        folder, why = next(iter(missing.items()))
        raise PoiseError(f"every policy of {out.folder} failed or lacks its reward model; the first, {folder}: {why}")


def _train(config: Config) -> dict[Path, str]:
    """Reward models and policies; returns what failed, and why."""
    if not config.policy_seeds:
        return {}
    rewards = [reward_job(config, *at) for at in worlds(config)]
    failed = run_jobs(rewards, config.jobs, "study: reward models of the policies")
    policies = [
        policy_job(config, arm, seed, *at)
        for at, reward in zip(worlds(config), rewards, strict=True)
        for seed in range(config.policy_seeds)
        for arm in config.arms
        if reward.folder not in failed
    ]
    return failed | run_jobs(policies, config.jobs, "study: policies")


def _best_of_n(config: Config, folder: Path) -> Json:
    """Best-of-n of every arm over many reward models, and how much these reward models differ."""
    sampling = best_of_n.Config(
        prompts=config.eval_prompts, reward=(), model=policy_model(config), per_prompt=config.pool_size,
        max_tokens=config.policy.max_tokens, gold=config.gold or REVIEWS, on_bad_row=config.policy.on_bad_row,
    )  # fmt: skip
    own(folder / "pool")
    rows = best_of_n.make_pool(folder / "pool", sampling)
    labels = [prompt_label(row["prompt"]) for row in rows[:: config.pool_size]]
    if len(rows) != len({prompt_key(row["prompt"]) for row in rows}) * config.pool_size:
        raise PoiseError(f"{folder}/pool is not of {config.pool_size} completions a prompt; delete it to sample again")
    pool = study_pool.Pool(folder / "pool", rows, config.pool_size)
    seeds = range(config.pool_seeds)
    configs = {
        f"noise-{noise}/reward-{s}": reward_config(config, noise, s) for noise in config.label_noise for s in seeds
    }
    # The same preferences, other seeds: the other seeds of the first part of the data.
    again = {
        f"noise-{noise}/reward-0-seed-{s}": replace(reward_config(config, noise, 0), seed=s)
        for noise in config.label_noise
        for s in seeds
    }
    scored = study_pool.score(pool, configs | again)
    of_noise = {noise: [scored[f"noise-{noise}/reward-{s}"] for s in seeds] for noise in config.label_noise}
    choices = {name: arm.choice(config.policy) for name, arm in ARMS.items() if not arm.only_policy}
    study_pool.write_page_pool(folder / "page-pool.json", pool, labels, of_noise)
    unstable: Json = {}
    if config.pool_seeds > 1:
        for noise, heads in of_noise.items():
            same = [scored[f"noise-{noise}/reward-0-seed-{s}"] for s in seeds]
            unstable[f"{noise}, other preferences"] = study_pool.instability(pool, heads)
            unstable[f"{noise}, same preferences, other seeds"] = study_pool.instability(pool, same)
    with progress("study: best-of-n", len(of_noise) * len(choices)) as advance:
        curves = {noise: compare_choices(pool.gold_PN, heads, choices, advance) for noise, heads in of_noise.items()}
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


def _benchmarks(config: Config, folder: Path) -> Json | None:
    """What `poise evaluate-policy --output RUN/benchmarks` found, without single rows; and arms beside the first."""
    found = Run(folder / "benchmarks").finished(_Benchmarks)
    if found:
        found["contrasts"] = contrasts(found["policies"], config.arms)
        for task in (task for policy in found["policies"] for task in policy["tasks"].values()):
            task.pop("outcomes", None)
    return found


def _say(results: Json) -> None:
    for noise, arms in results["summary"].items():
        for name, arm in arms.items():
            gold = arm["final_gold"]["mean"]
            between = arm["final_gold"]["interval"]  # none of a single reward model
            around = f" ({between[0]:+.2f} to {between[1]:+.2f})" if between else ""
            console.print(f"noise {noise}, {name}: final gold {gold:+.2f}{around}", highlight=False)


def _open(config: Config) -> Run:
    """The study's folder. Settings in GROWS may change; all others must be as before, and so must the files' bytes."""
    folder = Path(config.output)
    path = folder / "study.json"
    fixed = {key: value for key, value in settings(config).items() if key not in GROWS}
    digests = _digests(config)
    out = Run(folder)
    own(folder)
    lock(folder)
    if path.exists():
        # An earlier version may have written it: some settings had other names, and a missing one had its default.
        before = settings(Config()) | {RENAMED.get(key, key): value for key, value in _kept(path).items()}
        known = before.get("digests", {})
        same = {key for key in digests if known.get(key) == digests[key]}  # wherever the file lies now
        changed = sorted(key for key in fixed if key not in same and not same_value(before.get(key), fixed[key]))
        changed += [f"what {key} holds" for key in digests if known.get(key, digests[key]) != digests[key]]
        if changed:
            raise PoiseError(
                f"{folder} holds a study of other settings (differs in {', '.join(changed)}); choose another --output"
            )
        digests = known | digests
    record_inputs(folder, lambda: _models(config))
    write_json(path, fixed | {"digests": digests})
    return out


def _models(config: Config) -> Inputs:
    """Model folders that the study reads; its files are in `_digests`."""
    gold: Inputs = {"--gold": files_of(config.gold)} if config.gold not in ("", REVIEWS) else {}
    trunk = reward_config(config, config.label_noise[0], 0).model
    models: list[Path] = []
    for name in dict.fromkeys((trunk, policy_model(config))):
        with contextlib.suppress(PoiseError):  # a job says what is wrong with it
            models.append(Path(resolve_model(name)))
    return {"--model": models, **gold}


def _kept(path: Path) -> Json:
    """What study.json holds; PoiseError for a damaged one."""
    try:
        return read_object(path, _Kept)
    except PoiseError:
        raise PoiseError(f"{path} is damaged; choose another --output") from None


def _digests(config: Config) -> dict[str, str]:
    """Of every file the study reads."""
    found = {}
    for name in ("preferences", "prompts", "eval_prompts", *(["raters"] if "raters" in config.label_noise else [])):
        path = Path(getattr(config, name))
        if path.is_file():
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


# ---- preferences ----


def _unwritten(config: Config) -> Iterator[tuple[str, int, Path]]:
    """(label noise, reward seed, file) of the preferences that are not there yet."""
    for noise, seed in itertools.product(config.label_noise, range(max(config.pool_seeds, config.reward_seeds))):
        file = world_folder(config, noise, seed) / "preferences.jsonl"
        if not file.exists():
            yield noise, seed, file


def _read(config: Config) -> dict[str, list[Preference]]:
    """Preferences by file, if some are to be written; a bad file is refused before anything is made of any."""
    if not any(_unwritten(config)):
        return {}
    check = row_check_of(policy_model(config), config.policy.max_tokens)
    read_prompts(config.prompts, config.policy.on_bad_row, check)
    (pool_prompts if config.pool_size else read_prompts)(config.eval_prompts, config.policy.on_bad_row, check)
    pairs = read_preferences(config.preferences, config.reward.on_bad_row)
    part(pairs, config.num_preferences, 0)
    if "raters" not in config.label_noise:
        return {config.preferences: pairs}
    rated = read_preferences(config.raters, config.reward.on_bad_row)
    for number, (one, other) in enumerate(itertools.zip_longest(pairs, rated), 1):
        if not one or not other or _texts(one) != _texts(other):
            raise PoiseError(
                f"pair {number} of {config.raters} is not pair {number} of {config.preferences}; "
                "--raters takes the same pairs in the same order, labeled anew"
            )
    return {config.preferences: pairs, config.raters: rated}


def _texts(one: Preference) -> tuple[Prompt, set[str]]:
    return one.prompt, {one.chosen, one.rejected}


def _write_preferences(config: Config, sources: dict[str, list[Preference]]) -> None:
    """What each reward model is trained on: a seed's part of the pairs is the same at every noise."""
    for noise, seed, file in _unwritten(config):
        source = config.raters if noise == "raters" else config.preferences
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


def flipped(preferences: list[Preference], share: float, seed: int) -> list[Preference]:
    """The preferences with a random share of them, rounded, the wrong way round."""
    wrong = set(random.Random(seed).sample(range(len(preferences)), round(share * len(preferences))))
    return [
        replace(one, chosen=one.rejected, rejected=one.chosen) if i in wrong else one
        for i, one in enumerate(preferences)
    ]


# ---- scores by gold ----


def _cells(config: Config, comparisons: list[str]) -> Iterator[Json]:
    """Every finished policy, scored by gold; appends the folders of the `compare` runs to `comparisons`."""
    for noise, seed in worlds(config):
        for policy_seed in range(config.policy_seeds):
            jobs = [policy_job(config, arm, policy_seed, noise, seed) for arm in config.arms]
            done = [str(job.folder) for job in jobs if Run(job.folder).results is not None]
            if len(done) < 2:
                continue
            output = world_folder(config, noise, seed) / f"policy-{policy_seed}" / "comparison"
            own(output)
            (output / "config.yaml").unlink(missing_ok=True)  # compared again: there may be more arms than last time
            pool = str(Path(config.output) / "pool") if config.pool_size else ""
            gold = config.gold or REVIEWS
            side_by_side = compare.Config(arms=tuple(done), output=str(output), gold=gold, pool=pool)
            comparisons.append(str(output.relative_to(config.output)))
            for arm in (compare.run(side_by_side).results or {})["arms"]:
                at = {"noise": noise, "reward_seed": seed, "policy_seed": policy_seed, "arm": arm["name"]}
                folder = policy_job(config, arm["name"], policy_seed, noise, seed).folder
                cell = at | measured(arm) | {"cpu_hours": cpu_hours(folder)}
                if (folder / "benchmarks.jsonl").exists():
                    cell["checkpoints"] = fluctuation(list(read_rows(folder / "benchmarks.jsonl", BenchmarkRow)))
                yield cell
