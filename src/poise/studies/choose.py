"""`poise choose`: how far to train, from a few dozen blind comparisons along a ladder of KL.

OUTPUT/ladder.jsonl        prompt, completion, kl: what there is to compare, kl 0 for the start's completions
OUTPUT/comparisons.jsonl   id, prompt, a, b: to be judged
OUTPUT/key.json            which side of each is the policy of the higher KL, of which rung, and beside which lower one
OUTPUT/judgments.jsonl     id, better (a, b or tie): from whoever judges
OUTPUT/choice.json         the rung to take, every rung's win rate with bounds, and how many labels more would decide
"""

import math
import random
from collections import defaultdict
from pathlib import Path

import numpy as np

from poise.data.types import Prompt
from poise.errors import PoiseError
from poise.functional.choice import LEVEL, Decision, Ladder, choose
from poise.models.loading import load_policy
from poise.models.policy import Policy
from poise.runtime import records
from poise.runtime.folders import own
from poise.runtime.ladder import kept_policies
from poise.runtime.progress import console
from poise.runtime.run_folder import Json, load_config_file, write_json, write_jsonl
from poise.studies.choose_config import Config, read_key, refuse_other_files, refuse_other_run
from poise.studies.comparisons import draw, prompt_key, read_ladder
from poise.studies.judgments import judgments_of
from poise.studies.pool import sample

WITHIN = 1.25  # a step is of a rung if its KL is no further from it than this factor
_MISFIT = 0.05


def run(config: Config) -> Json | None:
    """Write the comparisons, or, once they are judged, the choice; returns the choice."""
    config.check()
    out = Path(config.output)
    if not (out / "key.json").exists():
        _prepare(config, out)
    key = read_key(config)
    judged = judgments_of(out, config)
    if judged is None:
        return None
    ladder = count(key, judged)
    found = as_json(ladder, choose(ladder, config.delta))
    write_json(out / "choice.json", found)
    _say(found, config.delta)
    if kept := _near(kept_policies(Path(config.source)), found["chosen_kl"]):
        console.print(f"policy: {kept[1]}", markup=False, soft_wrap=True)
    return found


def _prepare(config: Config, out: Path) -> None:
    refuse_other_files(out)
    rows = from_run(config) if Path(config.source).is_dir() else read_ladder(config.source)
    comparisons, key = draw(rows, config.per_rung, config.seed)
    own(out)
    write_jsonl(out / "ladder.jsonl", rows)
    write_jsonl(out / "comparisons.jsonl", comparisons)
    write_json(out / "key.json", {"source": config.source, **config.how_drawn(), **key})


# ---- what there is to compare ----


def from_run(config: Config) -> list[Json]:
    """Completions of the start and of every rung that the run reached.

    A policy that the run kept near a rung is sampled anew, for the same prompts as the start, and has the KL that was
    measured of it. Of other rungs the run's own completions are taken, of the steps nearest to them.
    """
    run = Path(config.source)
    refuse_other_run(run)
    by_step: dict[int, list[Json]] = {}
    for row in records.read_rows(run / "samples.jsonl"):
        if "kl" not in row:
            raise PoiseError(f"{run} is of an earlier version, whose RLOO and GRPO runs kept no KL; train it anew")
        by_step.setdefault(row["step"], []).append(row)
    of_step = {step: sum(row["kl"] for row in rows) / len(rows) for step, rows in by_step.items()}
    policies, kept = kept_policies(run), dict[float, Path]()
    rows: list[Json] = []
    for rung in sorted(set(config.rungs)):
        if near := _near(policies, rung):
            kept[near[0]] = near[1]
            continue
        steps = sorted((abs(kl - rung), step) for step, kl in of_step.items() if rung / WITHIN <= kl <= rung * WITHIN)
        found = [row for _, step in steps for row in by_step[step]]
        rows += [{"prompt": row["prompt"], "completion": row["completion"], "kl": rung} for row in found]
    if not kept and not rows:
        raise PoiseError(f"{run} has no step whose KL is near {', '.join(f'{rung:g}' for rung in config.rungs)} nats")
    prompts: dict[str, Prompt] = {prompt_key(row["prompt"]): row["prompt"] for row in rows}
    if kept:
        everything = {prompt_key(row["prompt"]): row["prompt"] for own in by_step.values() for row in own}
        for key in random.Random(config.seed).sample(sorted(everything), min(config.per_rung, len(everything))):
            prompts[key] = everything[key]
    return _sampled(run, kept, list(prompts.values()), config) + rows


def _near(policies: dict[float, Path], rung: float) -> tuple[float, Path] | None:
    """The KL and the folder of the policy nearest to a rung, if one is within the factor WITHIN of it."""
    near = [(abs(kl - rung), kl) for kl in policies if rung / WITHIN <= kl <= rung * WITHIN]
    return (kl := min(near)[1], policies[kl]) if near else None


def _sampled(run: Path, kept: dict[float, Path], prompts: list[Prompt], config: Config) -> list[Json]:
    """Completions of the start, KL 0, and of the policies that the run kept, for all prompts."""
    settings = load_config_file(str(run / "config.yaml"))
    whole = settings.get("tune") == "full"
    shape = {"adapted_layers": settings.get("adapted_layers", 0), "rank": settings.get("lora_rank", 1)}
    policy = Policy(*load_policy(settings["model"]), **({"adapted_layers": 1, "rank": 1} if whole else shape))
    per_prompt, rows = math.ceil(config.per_rung / len(prompts)), list[Json]()
    for number, (kl, folder) in enumerate([(0.0, None), *sorted(kept.items())]):
        if folder and whole:
            policy = Policy(*load_policy(str(folder)), adapted_layers=1, rank=1)
        elif folder:
            policy.load_adapters(str(folder))
        sampled = sample(policy, prompts, per_prompt, settings["max_tokens"], config.seed + number, f"KL {kl:g}")
        rows += [{**row, "kl": kl} for row in sampled]
    return rows


# ---- what was judged ----


def count(key: Json, judgments: dict[int, str]) -> Ladder:
    """Wins of the policy and labels, by kind of comparison; a tie is half a win. Rungs in no judgment are left out."""
    wins: dict[tuple[int, int], float] = defaultdict(float)
    labels: dict[tuple[int, int], int] = defaultdict(int)
    for number, better in judgments.items():
        side = key["sides"][number]
        kind = (side["rung"] + 1, side.get("beside", 0))  # folders of before 2026-11-29: all beside the start
        labels[kind] += 1
        wins[kind] += 0.5 if better == "tie" else float(better == side["policy"])
    kinds = sorted(labels)
    judged = sorted({0, *(point for kind in kinds for point in kind)})
    return Ladder(
        kl_R=np.array([key["kl"][point - 1] for point in judged[1:]]),
        rung_C=np.array([judged.index(rung) for rung, _ in kinds]),
        beside_C=np.array([judged.index(beside) for _, beside in kinds]),
        wins_C=np.array([wins[kind] for kind in kinds]),
        labels_C=np.array([float(labels[kind]) for kind in kinds]),
    )


def as_json(ladder: Ladder, decision: Decision) -> Json:
    """The decision, a row per rung, the start first, and a row per kind of comparison."""
    kl = [0.0, *ladder.kl_R.tolist()]
    return {
        "chosen_kl": kl[decision.chosen], "decided": decision.decided, "more_labels": decision.more_labels,
        "misfit": decision.misfit, "level": LEVEL,
        "rungs": [
            {
                "kl": kl[i], "win_rate": float(decision.win_rate[i]), "low": float(decision.low[i]),
                "high": float(decision.high[i]), "loss_bound": float(decision.loss_bound[i]),
            }
            for i in range(len(kl))
        ],
        "comparisons": [
            {"kl": kl[rung], "beside": kl[beside], "wins": wins, "labels": labels}
            for rung, beside, wins, labels in zip(*(part.tolist() for part in ladder[1:]), strict=True)
        ],
    }  # fmt: skip


def _say(found: Json, delta: float) -> None:
    for one in found["comparisons"]:
        other = f"KL {one['beside']:g}" if one["beside"] else "the start"
        console.print(f"KL {one['kl']:>5g} beside {other:9}   {one['wins']:g} of {one['labels']:g} won")
    for rung in found["rungs"][1:]:
        console.print(
            f"KL {rung['kl']:>5g}   win rate against the start {rung['win_rate']:.2f} "
            f"({rung['low']:.2f} to {rung['high']:.2f})"
        )
    chosen = f"take KL {found['chosen_kl']:g}" if found["chosen_kl"] else "keep the start: no rung is better"
    if found["decided"]:
        console.print(f"{chosen}: with {LEVEL:.0%} probability no other wins more than {0.5 + delta:g} against it")
    elif found["more_labels"] is None:
        console.print(f"{chosen}, undecided: the rates are too close for labels to tell them apart")
    else:
        console.print(f"{chosen}, undecided: about {found['more_labels']} labels more would decide")
    if found["misfit"] is not None and found["misfit"] < _MISFIT:
        console.print("quality does not rise and fall as the law says; read the rungs' own rates before you choose")
