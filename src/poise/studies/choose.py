"""`poise choose`: how far to train, from a few dozen blind comparisons with the start.

OUTPUT/ladder.jsonl        prompt, completion, kl: what there is to compare, kl 0 for the start's completions
OUTPUT/comparisons.jsonl   id, prompt, a, b: to be judged
OUTPUT/key.json            which side of each is the policy, and of which rung
OUTPUT/judgments.jsonl     id, better (a, b or tie): from whoever judges
OUTPUT/choice.json         the rung to take, every rung's win rate with bounds, and how many labels more would decide
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poise.data.preferences import sample_of
from poise.data.rows import read_rows
from poise.data.types import Prompt
from poise.errors import PoiseError
from poise.functional.choice import LEVEL, Decision, Ladder, choose
from poise.policy.ladder import kept_policy
from poise.runtime import records
from poise.runtime.folders import MARK, is_leftover, own
from poise.runtime.progress import console
from poise.runtime.run_folder import Json, load_config_file, write_json, write_jsonl
from poise.studies.choose_config import Config, refuse_other_run
from poise.studies.judgments import judgments_of
from poise.studies.pool import prompt_key, sample_pool

WITHIN = 1.25  # a step is of a rung if its KL is no further from it than this factor
_MISFIT = 0.05


def run(config: Config) -> Json | None:
    """Write the comparisons, or, once they are judged, the choice; returns the choice."""
    config.check()
    out = Path(config.output)
    if not (out / "key.json").exists():
        _prepare(config, out)
    key = records.read_object(out / "key.json")
    if key["source"] != config.source:
        raise PoiseError(f"--output {out} holds comparisons of {key['source']}; choose another folder")
    judged = judgments_of(out, config)
    if judged is None:
        return None
    ladder = count(key, judged)
    found = as_json(ladder, choose(ladder, config.delta))
    write_json(out / "choice.json", found)
    _say(found, config.delta)
    if kept := kept_policy(Path(config.source), found["chosen_kl"]):
        console.print(f"policy: {kept}", markup=False, soft_wrap=True)
    return found


def _prepare(config: Config, out: Path) -> None:
    mine = {MARK, "ladder.jsonl", "comparisons.jsonl"}  # a killed process may have left them
    if out.is_dir() and any(path.name not in mine and not is_leftover(path.name) for path in out.iterdir()):
        raise PoiseError(f"--output {out} holds other files; choose another folder or delete it")
    rows = from_run(config) if Path(config.source).is_dir() else read_ladder(config.source)
    comparisons, key = draw(rows, config.per_rung, config.seed)
    own(out)
    write_jsonl(out / "ladder.jsonl", rows)
    write_jsonl(out / "comparisons.jsonl", comparisons)
    write_json(out / "key.json", {"source": config.source, **key})


# ---- what there is to compare ----


def read_ladder(path: str) -> list[Json]:
    """Rows of prompt, completion and kl."""

    def parse(row: dict[str, Any]) -> Json:
        sample, kl = sample_of(row), row.get("kl")
        if not isinstance(kl, (int, float)) or isinstance(kl, bool) or not (math.isfinite(kl) and kl >= 0):
            raise ValueError("'kl' must be the rung's KL to the start in nats, and 0 for the start's own completions")
        return {"prompt": sample.prompt, "completion": sample.completion, "kl": float(kl)}

    return read_rows(path, parse, "error")


def from_run(config: Config) -> list[Json]:
    """The completions of the steps nearest to each rung, and completions of the start for the same prompts."""
    run = Path(config.source)
    refuse_other_run(run)
    by_step: dict[int, list[Json]] = {}
    for row in records.read_rows(run / "samples.jsonl"):
        by_step.setdefault(row["step"], []).append(row)
    kl = {step: sum(row["kl"] for row in rows) / len(rows) for step, rows in by_step.items()}
    rows: list[Json] = []
    for rung in sorted(set(config.rungs)):
        near = sorted((abs(of - rung), step) for step, of in kl.items() if rung / WITHIN <= of <= rung * WITHIN)
        found = [row for _, step in near for row in by_step[step]]
        rows += [{"prompt": row["prompt"], "completion": row["completion"], "kl": rung} for row in found]
    if not rows:
        raise PoiseError(f"{run} has no step whose KL is near {', '.join(f'{rung:g}' for rung in config.rungs)} nats")
    settings = load_config_file(str(run / "config.yaml"))
    prompts: dict[str, Prompt] = {prompt_key(row["prompt"]): row["prompt"] for row in rows}
    per_prompt = math.ceil(config.per_rung / len(prompts))
    start = sample_pool(settings["model"], list(prompts.values()), per_prompt, settings["max_tokens"], config.seed)
    return [{**row, "kl": 0.0} for row in start] + rows


def draw(rows: Sequence[Json], per_rung: int, seed: int) -> tuple[list[Json], Json]:
    """(comparisons, key): of each rung as many completions as asked for, over as many prompts as there are.

    Each stands beside a completion of the start for the same prompt. Sides and order are random.
    """
    rng = random.Random(seed)
    start: dict[str, list[str]] = {}
    for row in rows:
        if row["kl"] == 0:
            start.setdefault(prompt_key(row["prompt"]), []).append(row["completion"])
    rungs = sorted({row["kl"] for row in rows} - {0.0})
    if not rungs or not start:
        raise PoiseError("there must be completions of the start, with kl 0, and of at least one rung, with its kl")
    drawn: list[tuple[Json, Json]] = []
    for number, rung in enumerate(rungs):
        own = [row for row in rows if row["kl"] == rung and prompt_key(row["prompt"]) in start]
        if len(own) < per_rung:
            raise PoiseError(
                f"the rung of KL {rung:g} has {len(own)} completions of prompts that the start answered, too; "
                f"--per-rung is {per_rung}"
            )
        rng.shuffle(own)
        seen: Counter[str] = Counter()
        turn = []  # every prompt's first completion comes before any prompt's second
        for row in own:
            turn.append((seen[prompt_key(row["prompt"])], row))
            seen[prompt_key(row["prompt"])] += 1
        for _, row in sorted(turn, key=lambda pair: pair[0])[:per_rung]:
            texts, side = (row["completion"], rng.choice(start[prompt_key(row["prompt"])])), rng.randrange(2)
            shown = {"prompt": row["prompt"], "a": texts[side], "b": texts[1 - side]}
            drawn.append((shown, {"policy": "ab"[side], "rung": number}))
    rng.shuffle(drawn)
    return (
        [{"id": number, **shown} for number, (shown, _) in enumerate(drawn)],
        {"kl": rungs, "sides": [side for _, side in drawn]},
    )


# ---- what was judged ----


def count(key: Json, judgments: dict[int, str]) -> Ladder:
    """Wins of the policy and labels, by rung; a tie is half a win. Rungs without a label yet are left out."""
    wins, labels = np.zeros(len(key["kl"])), np.zeros(len(key["kl"]))
    for number, better in judgments.items():
        side = key["sides"][number]
        labels[side["rung"]] += 1
        wins[side["rung"]] += 0.5 if better == "tie" else float(better == side["policy"])
    judged = labels > 0
    return Ladder(np.array(key["kl"])[judged], wins[judged], labels[judged])


def as_json(ladder: Ladder, decision: Decision) -> Json:
    """The decision, a row per rung, the start first."""
    kl, wins, labels = ([0.0, *part.tolist()] for part in ladder)
    return {
        "chosen_kl": kl[decision.chosen], "decided": decision.decided, "more_labels": decision.more_labels,
        "misfit": decision.misfit, "level": LEVEL,
        "rungs": [
            {
                "kl": kl[i], "labels": labels[i], "wins": wins[i], "win_rate": float(decision.win_rate[i]),
                "low": float(decision.low[i]), "high": float(decision.high[i]),
                "loss_bound": float(decision.loss_bound[i]),
            }
            for i in range(len(kl))
        ],
    }  # fmt: skip


def _say(found: Json, delta: float) -> None:
    for rung in found["rungs"][1:]:
        console.print(
            f"KL {rung['kl']:>5g}   {rung['wins']:g} of {rung['labels']:g} won   win rate {rung['win_rate']:.2f} "
            f"({rung['low']:.2f} to {rung['high']:.2f})"
        )
    chosen = f"take KL {found['chosen_kl']:g}" if found["chosen_kl"] else "keep the start: no rung is better"
    if found["decided"]:
        console.print(f"{chosen}: with {LEVEL:.0%} probability it is within {delta:g} of the best win rate")
    elif found["more_labels"] is None:
        console.print(f"{chosen}, undecided: the rates are too close for labels to tell them apart")
    else:
        console.print(f"{chosen}, undecided: about {found['more_labels']} labels more would decide")
    if found["misfit"] is not None and found["misfit"] < _MISFIT:
        console.print("the win rates do not rise and fall as the law says; read the rungs' own rates before you choose")
