"""The page of `poise study`: one self-contained HTML file from the study's JSON alone. No model, no torch, no network.

    RUN/results.json     what the study found; must be there
    RUN/page-pool.json   heads' rewards and gold of a pool of completions: what the page recomputes as its reader asks
    RUN/…/comparison/results.json   the comparisons of trained policies that results.json names
    RUN/environment.json, RUN/config.yaml

Whatever else is missing leaves its section out and is said. The page's script (study.js) draws the charts, in the
reader's colors, and recomputes objectives over the pool. Text reaches the page escaped, or as JSON that the script
sets as text; the page's policy runs this one script, by its hash, and fetches nothing.
"""

import base64
import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from poise.errors import PoiseError
from poise.functional.best_of_n import KL_COEFS, MIN_SAMPLES, best_of_n_terms, rl_terms, sizes
from poise.functional.statistics import smoothed, t_interval
from poise.reports.quickstart_page import REWARD_MODELS, one_line_if_damaged, page_template, read_json
from poise.reports.summary import noise_label, over_policies
from poise.reports.verdicts import caveats, compared_arms, findings, headlines, published
from poise.runtime.run_folder import Json, write_atomic

VERSION = 2  # of results.json
NUM_COMPLETIONS = 10
MAX_STEPS = 200  # of a run's steps that the page has
DIGITS = 4  # significant, of what charts show
_COLUMNS = ("step", "kl", "proxy", "gold", "disagreement", "gap", "routing_std")


@one_line_if_damaged
def build(folder: str | Path) -> Path:
    """Write RUN/report.html and return its path. PoiseError, one line, if RUN is not a finished study."""
    folder = Path(folder)
    results = read_json(folder / "results.json")
    again = f"run poise study --output {folder}"
    if results is None:
        raise PoiseError(f"{folder} has no results.json: not a finished study; {again}")
    if not {"cells", "summary", "best_of_n"} & results.keys():
        raise PoiseError(f"{folder}/results.json is not of a study; give the folder that poise study wrote")
    if results.get("version") != VERSION or "settings" not in results:
        raise PoiseError(f"{folder} was judged by another version of poise; {again} again, finished cells are kept")
    comparisons = []
    for name in results.get("comparisons") or []:
        if (comparison := read_json(folder / name / "results.json")) is not None:
            comparisons.append(comparison | _place(name))
    pool = read_json(folder / "page-pool.json")
    if pool is not None and not _is_whole(pool):
        raise PoiseError(f"{folder}/page-pool.json is damaged; delete it and {again} again")
    environment = read_json(folder / "environment.json") or {}
    config = folder / "config.yaml"
    page = render(
        results, comparisons, pool, environment, shlex.join(environment.get("command") or []),
        config.read_text(encoding="utf-8") if config.exists() else None,
    )  # fmt: skip
    path = folder / "report.html"
    write_atomic(path, page)
    return path


def render(
    results: Json, comparisons: list[Json], pool: Json | None, environment: Json, command: str, config: str | None
) -> str:
    """The page. comparisons: as `poise compare` writes them, and of each its noise, reward_seed and policy_seed."""
    script = (Path(__file__).parent / "static" / "study.js").read_text(encoding="utf-8")
    arms, noises = _arms(results, comparisons), _noises(results, comparisons, pool)
    curves = results.get("best_of_n") or {}
    benchmarks = results.get("benchmarks") or {}
    runs = [_run(comparison) for comparison in comparisons]
    checkpoints = list(_checkpoints(results))
    study = {
        "arms": arms, "noises": noises, "best_of_n": _curves(curves), "runs": runs, "trained": _trained(runs),
        "checkpoints": checkpoints,
    }  # fmt: skip
    trained, selected = compared_arms(results)
    return page_template("study.html.j2").render(
        results=results,
        settings=results.get("settings") or {},
        first_trained=trained.first,
        first_selected=selected.first,
        headlines=headlines(results),
        findings=findings(results),
        caveats=caveats(results),
        absent=_absent(results, comparisons, pool),
        missing=results.get("missing") or {},
        arms={arm["name"]: arm for arm in arms},
        noises={noise["name"]: noise["label"] for noise in noises},
        ppo_arms=[arm["name"] for arm in arms if any(arm["name"] == a["name"] for r in runs for a in r["arms"])],
        curve_arms=[arm["name"] for arm in arms if any(arm["name"] in of_noise for of_noise in curves.values())],
        arm_rows=list(_arm_rows(results)),
        curves=curves,
        runs=runs,
        pool=pool,
        benchmarks=benchmarks,
        p_values=_p_values(benchmarks),
        checkpoints=checkpoints,
        instability=list(_instability_rows(results)),
        instability_keys=_instability_keys(results),
        published=published(results),
        completions=_completions(comparisons),
        environment=environment,
        command=command,
        config=config,
        study_json=_embedded(study),
        pool_json=_embedded(_pool(pool)) if pool else None,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


# ---- the page ----


def _absent(results: Json, comparisons: list[Json], pool: Json | None) -> list[str]:
    """Parts of a study that this one has not."""
    named = len(results.get("comparisons") or [])
    parts = {
        "policies trained by PPO": results.get("cells") or results.get("summary"),
        "best-of-n": results.get("best_of_n"),
        "a pool to explore": pool,
        "benchmarks": results.get("benchmarks"),
        "disagreement between reward models of different seeds": results.get("instability"),
        f"{named - len(comparisons)} of {named} comparisons, whose files are gone": len(comparisons) >= named,
    }
    return [part for part, there in parts.items() if not there]


def _arms(results: Json, comparisons: list[Json]) -> list[Json]:
    """Every arm that there is something of, those of the settings first; its place decides its color and dash.

    extra: only best-of-n has it, and the charts show it only when asked.
    """
    described = results.get("arms") or {}
    trained = [arm for arms in (results.get("summary") or {}).values() for arm in arms]
    trained += [arm["name"] for comparison in comparisons for arm in comparison["arms"]]
    selected = [arm for arms in (results.get("best_of_n") or {}).values() for arm in arms]
    there = {*trained, *selected}
    chosen = [name for name in (results.get("settings") or {}).get("arms") or [] if name in there] + trained
    return [
        {"name": name, "label": "", "reward": None, "objective": None}
        | (described.get(name) or {})
        | {"extra": bool(chosen) and name not in chosen}
        for name in dict.fromkeys([*chosen, *selected])
    ]


def _noises(results: Json, comparisons: list[Json], pool: Json | None) -> list[Json]:
    names = list(map(str, (results.get("settings") or {}).get("label_noise") or []))
    for key in ("summary", "best_of_n"):
        names += list(results.get(key) or {})
    names += [comparison["noise"] for comparison in comparisons] + list((pool or {}).get("rewards") or {})
    return [{"name": name, "label": noise_label(name)} for name in dict.fromkeys(names)]


def _arm_rows(results: Json) -> Iterator[Json]:
    for noise, arms in (results.get("summary") or {}).items():
        for name, measured in arms.items():
            yield {"noise": noise, "noise_label": noise_label(noise), "arm": name, **measured}


def _instability_rows(results: Json) -> Iterator[Json]:
    for where, rewards in (results.get("instability") or {}).items():
        noise, comma, rest = where.partition(", ")
        for reward, values in rewards.items():
            yield {"where": noise_label(noise) + comma + rest, "reward": reward, "values": values}


def _instability_keys(results: Json) -> list[str]:
    return list(dict.fromkeys(key for row in _instability_rows(results) for key in row["values"]))


def _p_values(benchmarks: Json) -> list[float]:
    tasks = [task for policy in benchmarks.get("policies") or [] for task in (policy.get("tasks") or {}).values()]
    return [task["p_value"] for task in tasks if task.get("p_value") is not None]


def _completions(comparisons: list[Json]) -> list[Json]:
    """The most over-scored of all comparisons, one a prompt, each with what every arm of its comparison wrote."""
    found = [(item, comparison) for comparison in comparisons for item in comparison.get("completions") or []]
    found.sort(key=lambda pair: -(pair[0].get("over_scored") or -math.inf))
    worst: dict[str, tuple[Json, Json]] = {}
    for item, comparison in found:
        worst.setdefault(item["prompt"], (item, comparison))
    shown = []
    for item, comparison in list(worst.values())[:NUM_COMPLETIONS]:
        names = [arm["name"] for arm in comparison["arms"]]
        answers = [(name, item["arms"][name]) for name in names if name in item["arms"]]
        about = {"run": _run_label(comparison), "first": names[0], "answers": answers}
        shown.append({"prompt": item["prompt"], "over_scored": item.get("over_scored"), **about})
    return shown


# ---- what the script reads ----


def _place(name: str) -> Json:
    """Which comparison a folder holds.

    >>> _place("noise-0.25/reward-1/policy-0/comparison")
    {'noise': '0.25', 'reward_seed': 1, 'policy_seed': 0}
    """
    parts = {key: re.search(rf"(?:^|/){key}-([^/]+)", name) for key in ("noise", "reward", "policy")}
    noise, reward, policy = (match[1] if match else "" for match in parts.values())
    return {
        "noise": noise or name,
        "reward_seed": int(reward) if reward.isdigit() else 0,
        "policy_seed": int(policy) if policy.isdigit() else 0,
    }


def _run_label(comparison: Json) -> str:
    seeds = f"reward seed {comparison['reward_seed']}, policy seed {comparison['policy_seed']}"
    return f"{noise_label(comparison['noise'])}, {seeds}"


def _run(comparison: Json) -> Json:
    arms = [_steps(arm) for arm in comparison["arms"]]
    place = {key: comparison[key] for key in ("noise", "reward_seed", "policy_seed")}
    return place | {"label": _run_label(comparison), "arms": arms}


def _steps(arm: Json) -> Json:
    """One arm's steps by column, thinned out if there are more than a chart can show."""
    steps = arm.get("steps") or []
    steps = steps[:: max(1, math.ceil(len(steps) / MAX_STEPS))]
    columns = {key: [_short(step.get(key)) for step in steps] for key in _COLUMNS}
    heads = zip(*(step["heads"] for step in steps), strict=True) if all(step.get("heads") for step in steps) else ()
    final = {key: _shortened((arm.get("final") or {}).get(key)) for key in ("gold", "interval", "proxy", "kl")}
    return {
        "name": arm["name"], **columns, "heads": [list(map(_short, head)) for head in heads], "final": final,
        "alarms": [{"step": one["step"], "score": _short(one.get("score"))} for one in arm.get("alarms") or []],
    }  # fmt: skip


def _trained(runs: list[Json]) -> Json:
    """Per noise and arm, its policies at equal steps: means and intervals over reward models, of smoothed steps."""
    policies: dict[tuple[str, str], dict[tuple[int, int], Json]] = {}
    for run in runs:
        for arm in run["arms"]:
            policies.setdefault((run["noise"], arm["name"]), {})[run["reward_seed"], run["policy_seed"]] = arm
    found: Json = {}
    for (noise, name), of_arm in policies.items():
        length = min(len(run["step"]) for run in of_arm.values())
        mean, line = {}, {}
        for key in ("kl", "gold", "proxy"):
            steps = {at: smoothed(np.array(run[key][:length], dtype=float)) for at, run in of_arm.items()}
            by_reward = over_policies(steps)
            mean[key] = by_reward.mean(0)
            line[f"{key}_low"], line[f"{key}_high"] = t_interval(by_reward)
        found.setdefault(noise, {})[name] = {key: _shortened(values.tolist()) for key, values in (mean | line).items()}
    return found


def _curves(by_noise: Json) -> Json:
    kept = ("initial_gold", "best_of_n", "tilted")
    return {
        noise: {
            name: {key: _shortened(arm.get(key)) for key in kept} | {"laws": _shortened(_laws(arm))}
            for name, arm in arms.items()
        }
        for noise, arms in by_noise.items()
    }


def _laws(arm: Json) -> Json:
    """Gold by the fitted laws, at the KL of the points that they were fitted to."""
    found: Json = {}
    for policy, terms in (("best_of_n", best_of_n_terms), ("tilted", rl_terms)):
        if fit := (arm.get("fits") or {}).get(policy):
            root_kl = np.sqrt(np.maximum([point["kl"] for point in arm[policy]], 0.0))
            found[policy] = (arm["initial_gold"] + terms(root_kl) @ [fit["alpha"], fit["beta"]]).tolist()
    return found


def _checkpoints(results: Json) -> Iterator[Json]:
    """What benchmarks said while policies trained: one item a noise and task."""
    for noise, arms in (results.get("summary") or {}).items():
        tasks = dict.fromkeys(task for arm in arms.values() for task in arm.get("checkpoints") or {})
        for task in tasks:
            of_task = {
                name: arm["checkpoints"][task] for name, arm in arms.items() if task in arm.get("checkpoints", {})
            }
            yield {"task": task, "noise_label": noise_label(noise), "arms": _shortened(of_task)}


def _pool(pool: Json) -> Json:
    """The pool, and what does not depend on its rewards."""
    per_prompt = pool["per_prompt"]
    gold = np.frombuffer(base64.b64decode(pool["gold"]), "<f4").astype(float)
    labels = {name: f"{name}: {label}" for name, label in REWARD_MODELS.items()}
    return {
        "num_prompts": len(pool["prompts"]), "per_prompt": per_prompt, "gold": pool["gold"],
        "rewards": pool["rewards"], "reward_labels": labels,
        "sizes": sizes(per_prompt).tolist(), "kl_coefs": KL_COEFS, "min_samples": MIN_SAMPLES,
        "initial_gold": float(gold.mean()),
    }  # fmt: skip


def _is_whole(pool: Json) -> bool:
    """Has every array of the pool the length it should have?"""
    try:
        rows = len(pool["prompts"]) * pool["per_prompt"]
        sizes = [(pool["gold"], rows)]
        for seeds in pool["rewards"].values():
            for reward in (reward for seed in seeds for reward in seed.values()):
                size = rows * (reward["num_heads"] if reward["kind"] == "heads" else 1)
                sizes += [(reward[part], size) for part in ("mean", "std") if reward[part] is not None]
        return rows > 0 and all(len(base64.b64decode(text, validate=True)) == 4 * size for text, size in sizes)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _short(value: Any) -> Any:
    """A number of DIGITS significant digits; None for what JSON has not.

    >>> _short(0.123456), _short(float("nan"))
    (0.1235, None)
    """
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    return [_shortened(item) for item in value] if isinstance(value, list) else _short(value)


def _embedded(value: Any) -> Markup:
    """JSON for a <script> element: no `<` that could end it or begin a comment.

    >>> _embedded({"text": "</script><!--"})
    Markup('{"text":"\\\\u003c/script>\\\\u003c!--"}')
    """
    return Markup(json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
