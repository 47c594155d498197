"""`poise evaluate-reward`: accuracy and calibration of reward models, and how well their uncertainties predict errors.

The rows of the file decide which evaluation runs (data/evaluation_sets.py):

    pairs               accuracy beside that of picking the longer text, calibration, and how well each uncertainty
                        predicts the errors; by subset if there are subsets, as in RewardBench
    RM-Bench rows       every style of the chosen text against every style of the rejected one
    best-of-n sets      how often the text of highest reward is a chosen one

    RUN/results.json      everything the page shows
    RUN/reward-1.jsonl    of the first reward model: a line per pair (margin, probabilities, uncertainties) or per set
                          (rewards)
    RUN/reward-1.json     its results; a run that was stopped goes on after the last of these files

Only human labels are used. Nothing is trained or chosen here.
"""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from poise.data.evaluation_sets import Questions, read_questions
from poise.data.rows import TEXTS_PER_PART, in_parts
from poise.errors import PoiseError
from poise.functional.objectives import Objective, RewardScale, mean, parse_objective
from poise.models.formats import checkpoint_folder
from poise.models.reward_model import HeadLayout, files_of
from poise.models.row_check import row_check_of_rewards
from poise.models.run_heads import made_for, taken_heads
from poise.models.scorer import Scorer
from poise.reward.config import EvaluateConfig as Config
from poise.reward.formats import Evaluated, Learning
from poise.reward.model_comparison import differences, over_rewards
from poise.reward.quality import (
    TextScores,
    judge_pairs,
    judge_sets,
    judge_styles,
    pairs_of,
    rows_of,
    tells_apart,
    text_uncertainties,
)
from poise.runtime.progress import console, progress
from poise.runtime.records import read_object, read_rows
from poise.runtime.run_folder import Inputs, Json, Run, write_json, write_jsonl


def run(config: Config) -> Run:
    """Score, judge; a finished run is returned as it is, and a model that was judged is not judged again."""
    config.check()
    objective = parse_objective(config.objective)
    check = row_check_of_rewards(config.rewards)
    questions = read_questions(config.file, config.on_bad_row, check)
    ood = read_questions(config.ood, config.on_bad_row, check) if config.ood else None
    if ood and (questions.kind != "pairs" or ood.kind != "pairs"):
        raise PoiseError("--ood compares pairs with pairs; a file holds lists of texts")
    out = Run.open(config.output, config, lambda: _inputs(config))
    if out.results is not None:
        out.refuse_edited(lambda: _inputs(config))
        return out
    for path, asked in ((config.file, questions), (config.ood, ood)):
        if asked and asked.linked:
            console.print(
                f"{path}: nearly all of it is linked by texts that it has several times; intervals take such pairs as "
                f"independent and are too narrow",
                markup=False, soft_wrap=True,
            )  # fmt: skip
    rewards = []
    for number, path in enumerate(config.rewards, 1):
        done = out.folder / f"reward-{number}.json"
        if not done.exists():
            results, rows = _evaluate(path, config, objective, questions, ood, config.seed + number)
            write_jsonl(done.with_suffix(".jsonl"), rows)
            write_json(done, results)
        rewards.append(read_object(done, Evaluated))
        console.print(f"{path}: {in_short(rewards[-1])}")
    units = {"file": questions.unit, **({"ood": ood.unit} if ood else {})}
    kept = (list(read_rows(out.folder / f"reward-{number}.jsonl")) for number in range(1, len(rewards) + 1))
    out.finish(
        {
            "kind": questions.kind, "rewards": rewards, "over_rewards": over_rewards(rewards),
            "differences": differences(rewards, kept, questions.kind, units, config.seed),
        }
    )  # fmt: skip
    return out


def _inputs(config: Config) -> Inputs:
    """What the run reads, by the setting that names it; reward models are counted from 1."""
    files = {"--file": config.file, "--ood": config.ood}
    rewards = {
        f"--rewards {number}": files_of(made_for(path, config.objective))
        for number, path in enumerate(config.rewards, 1)
    }
    return {name: [Path(path)] for name, path in files.items() if path} | rewards


# ---- one reward model ----


def _evaluate(
    path: str, config: Config, objective: Objective, questions: Questions, ood: Questions | None, seed: int
) -> tuple[Json, Iterable[Json]]:
    """(results, rows to keep) of one reward model. seed: its own, so that no two have the same random uncertainty."""
    place = taken_heads(path, config.objective)
    scorer = Scorer.load(place, config.max_length, cached=config.feature_cache)
    layout = scorer.layout
    layout.check_objective(config.objective)
    results: Json = {
        "reward": path, "num_heads": layout.num_heads, "kind": layout.kind, "reward_scale": layout.reward_scale,
        "learning": _learning(place, layout),
    }  # fmt: skip
    scores = _score_texts(scorer, questions, path)
    rows: Iterable[Json]
    if questions.kind == "pairs":
        pairs = pairs_of(scores, questions, objective, seed)
        results["pairs"] = judge_pairs(pairs, questions, seed)
        rows = ({"data": "file", **row} for row in rows_of(pairs, questions.subset))
    else:
        rewards = objective(scores.heads).numpy().astype(float)
        judge = judge_styles if questions.kind == "rm_bench" else judge_sets
        results["sets"], rows = judge(questions, rewards, seed)
    if ood:
        foreign = _score_texts(scorer, ood, f"{path} (--ood)")
        others = pairs_of(foreign, ood, objective, seed)
        results["ood"] = judge_pairs(others, ood, seed)
        baseline = RewardScale.fit(scores.heads, mean)
        inside, outside = (text_uncertainties(own, baseline) for own in (scores, foreign))
        results["ood_auroc"] = tells_apart(inside, outside, questions.unit, ood.unit, seed)
        rows = chain(rows, ({"data": "ood", **row} for row in rows_of(others, ood.subset)))
    num_samples = len(questions.lengths) + (len(ood.lengths) if ood else 0)
    results |= {"num_samples": num_samples, "num_truncated": scorer.num_truncated}
    if scorer.num_truncated:
        console.print(
            f"{scorer.num_truncated} of {num_samples} samples lost their oldest tokens "
            f"(longer than {scorer.extract.max_length})"
        )
    return results, rows


def _score_texts(scorer: Scorer, questions: Questions, label: str) -> TextScores:
    """In parts, as the texts are read again; PoiseError if the file has others now."""
    parts: list[TextScores] = []
    total = len(questions.lengths)
    with progress(f"scoring, {Path(label).name}", total) as advance:
        for part in in_parts(questions.samples(), TEXTS_PER_PART):
            if scorer.last_layer is None or questions.kind != "pairs":
                parts.append(TextScores(scorer(part, advance), scorer.layout))
            else:
                features = scorer.extract(part, advance)
                parts.append(TextScores.of(scorer.decode(features), scorer.layout, scorer.last_layer, features.cpu()))
    scores = TextScores.together(parts)
    if len(scores.heads.mean) != total:
        raise PoiseError("the file changed while it was read; start again")
    return scores


def _learning(path: str, layout: HeadLayout) -> Json | None:
    """Validation error during stage 2, if the checkpoint is the BRME of a `poise train-reward` run."""
    run = Run(Path(checkpoint_folder(path)).parent)
    ours = layout.kind == "gaussian" and (run.folder / "config.yaml").exists()  # else its results.json is not ours
    results = run.finished(Learning) if ours else None
    if not results or not results.get("stage2_history"):
        return None
    return {"stage2_history": results["stage2_history"], "std_collapsed": bool(results.get("std_collapsed"))}


def in_short(results: Json) -> str:
    """One line for the terminal."""
    if pairs := results.get("pairs"):
        return f"{pairs['accuracy']:.1%} of {pairs['num_pairs']} pairs, the longer text {pairs['length_accuracy']:.1%}"
    sets = results["sets"]
    if scores := sets.get("scores"):
        return ", ".join(f"{name} {score['accuracy']:.1%}" for name, score in scores.items())
    return f"{sets['accuracy']:.1%} of {sets['num_sets']} sets, chance {sets['chance']:.1%}"
