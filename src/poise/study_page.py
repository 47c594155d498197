"""The page of `poise study`: one self-contained HTML file from the study's JSON alone. No model, no torch, no network.

    RUN/results.json     what the study found; must be there
    RUN/page-pool.json   heads' rewards and gold of a pool of completions: what the page recomputes as its reader asks
    RUN/…/comparison/results.json   the comparisons of trained policies that results.json names
    RUN/environment.json, RUN/config.yaml

Whatever else is missing leaves its section out and is said. The page's script (study.js) draws the charts, in the
reader's colours, and recomputes objectives over the pool. Text reaches the page escaped, or as JSON that the script
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
from typing import Any, Literal, NamedTuple

import numpy as np
from markupsafe import Markup

from poise.errors import PoiseError
from poise.metrics import KL_COEFS, sizes
from poise.report import REWARD_MODELS, Verdict, page_template, percent, read_json, signed
from poise.runs import Json, write_atomic

VERSION = 1  # of results.json
NUM_COMPLETIONS = 10
MAX_STEPS = 200  # of a run's steps that the page has
NUM_NAMED = 6  # differences or claims that one sentence names
ENOUGH_SEEDS = 5
DIGITS = 4  # significant, of what charts show
Kind = Literal["worse", "unclear", "better"]
_ORDER: tuple[Kind, ...] = ("worse", "unclear", "better")
_COLUMNS = ("step", "kl", "proxy", "gold", "disagreement", "gap", "routing_std")


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
    script = Path(__file__).with_name("study.js").read_text(encoding="utf-8")
    arms, noises = _arms(results, comparisons), _noises(results, comparisons, pool)
    curves = results.get("best_of_n") or {}
    benchmarks = results.get("benchmarks") or {}
    runs = [_run(comparison) for comparison in comparisons]
    fluctuation = _drawn_fluctuation(benchmarks.get("fluctuation") or {})
    study = {"arms": arms, "noises": noises, "best_of_n": _curves(curves), "runs": runs, "fluctuation": fluctuation}
    return page_template("study.html.j2").render(
        results=results,
        settings=results.get("settings") or {},
        first_trained=_compared(results)[0].first,
        first_selected=_compared(results)[1].first,
        headlines=headlines(results),
        findings=findings(results),
        caveats=_caveats(results),
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
        fluctuation=fluctuation,
        instability=list(_instability_rows(results)),
        instability_keys=_instability_keys(results),
        published=_published(results),
        completions=_completions(comparisons),
        environment=environment,
        command=command,
        config=config,
        study_json=_embedded(study),
        pool_json=_embedded(_pool(pool)) if pool else None,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


# ---- the answer ----


class Difference(NamedTuple):
    """Final gold of one arm less that of the first, under one label noise, over seeds."""

    noise: str
    arm: str
    gold: float
    interval: tuple[float, float] | None
    kind: Kind

    @property
    def text(self) -> str:
        """Where, and unless it may be zero how much, with its interval."""
        if self.interval is None or self.kind == "unclear":  # the interval is in the tables: it holds zero
            return noise_label(self.noise)
        smallest = min(abs(value) for value in (self.gold, *self.interval))
        digits = 3 if smallest < 0.005 else 2  # no "+0.00" that is said not to be zero
        low, high = (signed(bound, digits) for bound in self.interval)
        return f"{signed(self.gold, digits)} with {noise_label(self.noise)} ({low} to {high})"


def headlines(results: Json) -> list[Verdict]:
    """What the differences come to: trained policies first, then best-of-n."""
    found = [_counted(*compared) for compared in _compared(results) if compared.differences]
    return found or [Verdict("unclear", "There is nothing to compare: no arm has a difference.")]


def findings(results: Json) -> list[Verdict]:
    """What is behind them, failures before successes."""
    found = [finding for compared in _compared(results) for finding in _named(*compared)]
    found += [*_of_benchmarks(results), *_of_published(results)]
    return sorted(found, key=lambda verdict: _ORDER.index(verdict.kind))


class Compared(NamedTuple):
    """Differences of one kind of policy, and the arm that they are taken from."""

    what: str
    first: str
    differences: list[Difference]


def _compared(results: Json) -> list[Compared]:
    """Of the study's own arms; best-of-n tries all there are, and the rest are in its table."""
    own = (results.get("settings") or {}).get("arms")
    selected = {noise: _measures(arms) for noise, arms in (results.get("best_of_n") or {}).items()}
    found = []
    for what, summary in (("After PPO", results.get("summary") or {}), ("At best-of-n", selected)):
        differences = [one for one in _differences(summary) if own is None or one.arm in own]
        found.append(Compared(what, _reference(summary), differences))
    return found


def _reference(summary: Json) -> str:
    """The arm that has no difference from the first, being it."""
    names = [
        name
        for arms in summary.values()
        for name, arm in arms.items()
        if "less_first" not in (arm.get("final_gold") or {})
    ]
    return names[0] if names else "the first arm"


def _measures(arms: Json) -> Json:
    """A best-of-n study's arms in the form of the summary of trained policies."""
    return {name: {"reward_seeds": arm.get("seeds"), **(arm.get("measures") or {})} for name, arm in arms.items()}


def _differences(summary: Json) -> Iterator[Difference]:
    for noise, arms in summary.items():
        for name, arm in arms.items():
            gold = (arm.get("final_gold") or {}).get("less_first")
            if gold is None:
                continue
            interval = arm["final_gold"].get("less_first_interval")
            # Of a single seed the bootstrap draws that seed again and again: an interval of no width, and no evidence.
            if not interval or None in interval or (arm.get("reward_seeds") or 0) < 2:
                yield Difference(noise, name, gold, None, "unclear")
                continue
            low, high = interval
            kind: Kind = "unclear" if low <= 0 <= high else "better" if gold > 0 else "worse"
            yield Difference(noise, name, gold, (low, high), kind)


def _counted(what: str, first: str, differences: list[Difference]) -> Verdict:
    """How many are what, in one sentence."""
    count = {kind: sum(one.kind == kind for one in differences) for kind in _ORDER}
    says = {"worse": "worse", "unclear": "not distinguishable from it", "better": "better"}
    kind: Kind = "worse" if count["worse"] else "better" if count["better"] else "unclear"
    listed = [f"{number} {'is' if number == 1 else 'are'} {says[kind]}" for kind, number in count.items()]
    number_of = f"{len(differences)} comparison{'s' if len(differences) > 1 else ''}"
    text = f"{what}, of {number_of} of final gold with {first}, {listed[0]}, {listed[1]} and {listed[2]}."
    return Verdict(kind, text)


def _named(what: str, first: str, differences: list[Difference]) -> Iterator[Verdict]:
    """The arms behind the count, one sentence for each kind."""
    says: dict[Kind, str] = {
        "worse": f"{what}, worse than {first}",
        "unclear": f"{what}, not distinguishable from {first}",
        "better": f"{what}, better than {first}",
    }
    for kind, text in says.items():
        found = [one for one in differences if one.kind == kind]
        found.sort(key=lambda one: 0.0 if kind == "unclear" else -abs(one.gold))
        named = found[:NUM_NAMED]
        by_arm = {arm: ", ".join(o.text for o in named if o.arm == arm) for arm in dict.fromkeys(o.arm for o in named)}
        parts = [f"{arm} ({where})" if kind == "unclear" else f"{arm} {where}" for arm, where in by_arm.items()]
        if parts:
            more = f"; and {len(found) - NUM_NAMED} more" if len(found) > NUM_NAMED else ""
            yield Verdict(kind, f"{text}: {'; '.join(parts)}{more}.")


def _of_published(results: Json) -> Iterator[Verdict]:
    claims = _published(results)
    if not claims:
        return
    failed = [claim for claim in claims if claim["replicated"] == "no"]
    if failed:
        listed = "; ".join(f"{c['claim']}: published {c['published']}, here {c['here']}" for c in failed[:NUM_NAMED])
        more = f"; and {len(failed) - NUM_NAMED} more" if len(failed) > NUM_NAMED else ""
        yield Verdict("worse", f"Of {len(claims)} published figures {len(failed)} not found here: {listed}{more}.")
    says: tuple[tuple[Kind, str, str], ...] = (
        ("unclear", "unclear", "undecided here"),
        ("better", "yes", "found here too"),
    )
    for kind, answer, text in says:
        if count := sum(claim["replicated"] == answer for claim in claims):
            yield Verdict(kind, f"Of {len(claims)} published figures {count} {text}.")


def _of_benchmarks(results: Json) -> Iterator[Verdict]:
    policies = (results.get("benchmarks") or {}).get("policies") or []
    averages = [(policy["name"], policy.get("average") or {}) for policy in policies]
    compared = [
        (name, average)
        for name, average in averages
        if average.get("difference") is not None and None not in (average.get("interval") or [None])
    ]
    directions: tuple[tuple[Kind, str], ...] = (("worse", "below"), ("better", "above"))
    for kind, says in directions:
        found = [
            f"{name} {signed(average['difference'], 3)} ({signed(average['interval'][0], 3)} to "
            f"{signed(average['interval'][1], 3)})"
            for name, average in compared
            if (average["interval"][1] < 0 if kind == "worse" else average["interval"][0] > 0)
        ]
        if found:
            yield Verdict(kind, f"On the average of the benchmarks, {says} {policies[0]['name']}: {'; '.join(found)}.")
    unclear = [name for name, average in compared if average["interval"][0] <= 0 <= average["interval"][1]]
    if unclear:
        text = (
            f"On the average of the benchmarks, not distinguishable from {policies[0]['name']}: {', '.join(unclear)}."
        )
        yield Verdict("unclear", text)


def _caveats(results: Json) -> list[str]:
    """What the intervals do not count."""
    summary, pools = results.get("summary") or {}, results.get("best_of_n") or {}
    seeds = [arm.get("reward_seeds") for arms in summary.values() for arm in arms.values()]
    fewest = min((count for count in seeds if count), default=None)
    pool_seeds = [arm.get("seeds") for arms in pools.values() for arm in arms.values()]
    fewest_of_pool = min((count for count in pool_seeds if count), default=None)
    text = "Intervals are 95\xa0% bootstrap intervals over reward models of different seeds"
    text += " (of best-of-n over prompts too)" if pools else ""
    over = [
        f"{count} {what}"
        for count, what in ((fewest, "after PPO"), (fewest_of_pool, "at best-of-n"))
        if count is not None
    ]
    found = [f"{text}, at fewest {' and '.join(over)}." if over else f"{text}."]
    if fewest == 1:
        found.append("One reward model decides nothing: nothing after PPO is called a difference.")
    elif fewest is not None and fewest < ENOUGH_SEEDS:
        found.append(
            f"{fewest} seeds are few, and such intervals too narrow: where there is no difference at all, {fewest} "
            f"seeds agree on its sign one time in {2 ** (fewest - 1)}."
        )
    own = (results.get("settings") or {}).get("arms") or []
    if others := {arm for arms in pools.values() for arm in arms} - {*own} if own else set():
        found.append(
            f"The sentences above are of the study’s own arms; best-of-n has {len(others)} more, in its table."
        )
    found.append(
        "Each interval stands for itself, with no correction for there being many: one in twenty would leave out a "
        "difference of zero by chance."
    )
    return found


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


# ---- the page ----


def noise_label(noise: str) -> str:
    """Label noise in words.

    >>> noise_label("0"), noise_label("raters"), noise_label("0.25")
    ('no labels flipped', 'single raters’ labels', '25\\xa0% of labels flipped')
    """
    if noise == "raters":
        return "single raters’ labels"
    try:
        share = float(noise)
    except ValueError:
        return noise
    return "no labels flipped" if share == 0 else f"{percent(share, 0)} of labels flipped"


def _arms(results: Json, comparisons: list[Json]) -> list[Json]:
    """Every arm that there is something of, those of the settings first; its place decides its colour and dash.

    extra: only best-of-n has it, and the charts show it only when asked.
    """
    described = results.get("arms") or {}
    trained = [arm for arms in (results.get("summary") or {}).values() for arm in arms]
    trained += [arm["name"] for comparison in comparisons for arm in comparison["arms"]]
    trained += list((results.get("benchmarks") or {}).get("fluctuation") or {})
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


def _published(results: Json) -> list[Json]:
    """Published figures, those that did not replicate first."""
    order = {"no": 0, "unclear": 1, "yes": 2}
    return sorted(results.get("published") or [], key=lambda claim: order.get(claim.get("replicated"), 1))


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
    return {"noise": comparison["noise"], "label": _run_label(comparison), "arms": arms}


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


def _curves(by_noise: Json) -> Json:
    kept = ("initial_gold", "best_of_n", "tilted")
    return {
        noise: {name: {key: _shortened(arm.get(key)) for key in kept} for name, arm in arms.items()}
        for noise, arms in by_noise.items()
    }


def _drawn_fluctuation(fluctuation: Json) -> Json:
    """Policies' scores checkpoint by checkpoint, where they are recorded so."""
    found = {
        policy: {
            task: {"steps": scores["steps"], "mean": _shortened(scores["mean"])}
            for task, scores in tasks.items()
            if isinstance(scores.get("steps"), list) and isinstance(scores.get("mean"), list)
        }
        for policy, tasks in fluctuation.items()
    }
    return {policy: tasks for policy, tasks in found.items() if tasks}


def _pool(pool: Json) -> Json:
    """The pool, and what does not depend on its rewards."""
    per_prompt = pool["per_prompt"]
    gold = np.frombuffer(base64.b64decode(pool["gold"]), "<f4").astype(float)
    labels = {name: f"{name}: {label}" for name, label in REWARD_MODELS.items()}
    return {
        "num_prompts": len(pool["prompts"]), "per_prompt": per_prompt, "gold": pool["gold"],
        "rewards": pool["rewards"], "reward_labels": labels,
        "sizes": sizes(per_prompt).tolist(), "kl_coefs": KL_COEFS,
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
