"""`poise trust`: three questions to a reward model before any RL.

    RUN/pool.jsonl          prompt, completion: of the initial policy
    RUN/comparisons.jsonl   id, prompt, a, b: pairs of the pool, to be judged
    RUN/key.json            by how much the reward, and the validator, prefer each comparison's a
    RUN/judgments.jsonl     id, better (a, b or tie): from whoever judges
    RUN/results.json        room, transfer, labels: each None until it can be said
    RUN/report.html         the same in words

Nothing here is trained to please the validator or the judge.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray

from poise.data.preferences import read_preferences
from poise.data.rows import Check
from poise.data.types import Preference, Prompt
from poise.errors import PoiseError
from poise.functional import trust
from poise.functional.objectives import mean, parse_objective
from poise.models.loading import found_here, resolve_model
from poise.models.reward_model import files_of
from poise.models.row_check import row_check_of, tokenizers_of
from poise.models.run_heads import reward_folder, validator_of
from poise.models.scorer import Ensemble, Scorer
from poise.models.validator import say_validator
from poise.reward.pairs import pair_features, prompt_groups, text_groups
from poise.reward.room import LEAST_GROUPS, room
from poise.runtime import inputs as run_inputs
from poise.runtime import records
from poise.runtime.progress import progress
from poise.runtime.run_folder import Inputs, Json, Run, load_config_file, write_json, write_jsonl
from poise.studies.comparisons import prompt_key
from poise.studies.judge_settings import without_judge
from poise.studies.judgments import judgments_of
from poise.studies.pool import kept_pool, pool_prompts, samples_of
from poise.studies.trust_config import TrustConfig as Config

Grouped = tuple[list[Preference], ndarray]  # pairs, and the number of each one's group


def run(config: Config) -> Run:
    """Measure what can be measured; judgments are read anew by every call, the rest is kept."""
    config = config.for_command()
    config.check()
    out = Run(Path(config.output))
    kept = without_judge(config)
    out.check_config(kept, lambda: _inputs(config, found_here))
    found = out.results
    if found is not None:
        out.refuse_edited(lambda: _inputs(config, found_here))
    if found is None:
        judges = filter(None, [reward_folder(config.reward, config.objective, None), config.validator])
        check = row_check_of(config.model, config.max_tokens, tokenizers_of([*judges]))
        prompts = pool_prompts(config.prompts, config.on_bad_row, check)
        grouped = _groups(config, check) if config.preferences else None
        out = Run.open(config.output, kept, lambda: _inputs(config))
        found = _measure(config, out, prompts, grouped)
    judged = judgments_of(out.folder, config)
    out.finish(found | {"labels": None if judged is None else _labels(out.folder, judged)})
    return out


def _inputs(config: Config, place: Callable[[str], str] = resolve_model) -> Inputs:
    """What the run reads, by the setting that names it. place: where a model is."""
    found = {"--prompts": [Path(config.prompts)], "--model": [Path(place(config.model))]}
    found["--reward"] = files_of(reward_folder(config.reward, config.objective, None), place)
    if config.validator:
        found["--validator"] = files_of(config.validator, place)
    if config.preferences:
        found["--preferences"] = [Path(config.preferences)]
    return found


def _measure(config: Config, out: Run, prompts: Sequence[Prompt], grouped: Grouped | None) -> Json:
    """Everything but the judgments."""
    if config.validator and config.validator == validator_of(config.reward):
        say_validator(config.validator, "--validator None")
    place = reward_folder(config.reward, config.objective, None)
    scorer = Scorer.load(place, cached=True)
    scorer.layout.check_objective(config.objective)
    pool = kept_pool(
        out.folder, config.model, lambda: prompts, config.per_prompt, config.max_tokens, config.seed
    )  # fmt: skip
    with progress("pool: scoring", len(pool)) as advance:
        heads = scorer(samples_of(pool), advance)
    proxy = parse_objective(config.objective)(heads).double().numpy().reshape(-1, config.per_prompt)
    validator = None
    if config.validator:
        with progress("pool: scoring by the validator", len(pool)) as advance:
            other = Scorer.load(config.validator, cached=True)(samples_of(pool), advance)
        validator = mean(other).double().numpy().reshape(-1, config.per_prompt)
    _draw(out.folder, pool, proxy, validator, config)
    return {
        "kl": config.kl,
        "per_prompt": config.per_prompt,
        "num_prompts": len(proxy),
        "reach": trust.reach(config.per_prompt),
        "room": _room(config, scorer, pool, validator, grouped) if grouped else None,
        "transfer": None if validator is None else trust.transfer(proxy, validator),
        **_validation_accuracy(Path(place)),
    }


def _room(config: Config, scorer: Scorer, pool: Sequence[Json], validator: ndarray | None, grouped: Grouped) -> Json:
    """What twice the pairs would bring to the order of held-out pairs, and to best-of-n as the validator sees it."""
    if isinstance(scorer, Ensemble):
        raise PoiseError("--preferences: an ensemble has no one trunk to fit heads on; take one of its members")
    preferences, groups = grouped
    pairs = pair_features(scorer.extract, preferences)
    found = room(pairs, groups, scorer.extract(samples_of(pool)).cpu(), config.seed)
    accuracy, low, high = trust.doubling(found.accuracy_SF[-1] - found.accuracy_SF[-2])
    results: Json = {
        "num_pairs": [round(count, 1) for count in found.num_pairs],
        "accuracy": found.accuracy_SF.mean(-1).tolist(),
        "accuracy_doubled": accuracy, "accuracy_interval": [low, high],
        "held_out": trust.agreement(found.right_N, groups),  # every pair is held out once
        "seen": _has_seen(Path(reward_folder(config.reward, config.objective, None)), config.preferences),
    }  # fmt: skip
    if validator is None:
        return results
    n = np.array([config.per_prompt])
    gain_SFP = np.array(
        [
            [trust.gains(reward.reshape(validator.shape), validator, n)[:, 0] for reward in of_folds]
            for of_folds in found.reward_SFT
        ]
    )
    more_FP = gain_SFP[-1] - gain_SFP[-2]
    more, low, high = trust.doubling(more_FP.mean(1), more_FP.mean(0))
    return results | {
        "selection": gain_SFP.mean((1, 2)).tolist(),
        "selection_doubled": more, "selection_interval": [low, high],
    }  # fmt: skip


def _groups(config: Config, check: Check | None) -> Grouped:
    """The pairs, and which of them stay together: those of a prompt; where prompts are few, those that share a text."""
    preferences = read_preferences(config.preferences, config.on_bad_row, check)
    groups = prompt_groups(preferences)
    if groups.max() + 1 < LEAST_GROUPS:
        groups = text_groups(preferences)
    if groups.max() + 1 < LEAST_GROUPS:
        raise PoiseError(
            f"{config.preferences} has too few prompts, and too few texts, to leave parts of it out: "
            f"{groups.max() + 1} groups, and {LEAST_GROUPS} are needed"
        )
    return preferences, groups


def _has_seen(checkpoint: Path, preferences: str) -> bool:
    """Was the trunk of this checkpoint trained on these very pairs, as far as its run says?"""
    settings = checkpoint.parent / "config.yaml"
    if not settings.exists():
        return False
    of = load_config_file(settings)
    if of.get("trunk", "frozen") == "frozen":
        return False
    before = run_inputs.read_fingerprints(checkpoint.parent / run_inputs.FILE) or {}
    if not before.get("--preferences"):  # an earlier version's, or pairs from the hub
        return Path(str(of.get("preferences", ""))).resolve() == Path(preferences).resolve()
    now = run_inputs.fingerprints({"--preferences": [Path(preferences)]}, before)
    return "preferences" in run_inputs.unchanged({"--preferences": before["--preferences"]}, now)


def _validation_accuracy(checkpoint: Path) -> Json:
    """Of the reward model on the validation pairs of its training, with its interval, if its run is at hand."""
    models = (Run(checkpoint.parent).results or {}).get("models") or {}
    of = models.get(checkpoint.name) or {}
    return {name: of.get(name) for name in ("validation_accuracy", "validation_accuracy_interval")}


# ---- whose labels ----


def _draw(folder: Path, pool: Sequence[Json], proxy: ndarray, validator: ndarray | None, config: Config) -> None:
    """Write pairs of different completions of one prompt, as many of each prompt as of every other, up to one."""
    rng = np.random.default_rng(config.seed)
    comparisons: list[Json] = []
    key: dict[str, list[float]] = {"reward": [], "validator": []}
    orders = [rng.permutation(config.per_prompt) for _ in proxy]
    for turn in range(config.per_prompt // 2):
        for number in rng.permutation(len(proxy)):
            i, j = orders[number][2 * turn : 2 * turn + 2]
            a, b = (pool[number * config.per_prompt + k] for k in (i, j))
            if len(comparisons) < config.judged and a["completion"] != b["completion"]:
                about = {"prompt": a["prompt"], "a": a["completion"], "b": b["completion"]}
                comparisons.append({"id": len(comparisons), **about})
                key["reward"].append(float(proxy[number, i] - proxy[number, j]))
                if validator is not None:
                    key["validator"].append(float(validator[number, i] - validator[number, j]))
    write_jsonl(folder / "comparisons.jsonl", comparisons)
    write_json(folder / "key.json", key)


def _labels(folder: Path, judgments: dict[int, str]) -> Json:
    """How often the reward, and the validator, order the judged pairs as the judge does; ties of the judge are left
    out, and their own count half."""
    key = records.read_object(folder / "key.json")
    prompts = [prompt_key(row["prompt"]) for row in records.read_rows(folder / "comparisons.jsonl")]
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    found: Json = {"ties": sum(better == "tie" for better in judgments.values())}
    for name, differences in key.items():
        decided = [i for i, better in judgments.items() if better != "tie" and differences]
        if decided:
            same = [np.sign(differences[i]) * (1 if judgments[i] == "a" else -1) for i in decided]
            found[name] = trust.agreement((np.array(same) + 1) / 2, np.array([number[prompts[i]] for i in decided]))
    return found
