"""Gold against KL, a curve for every PPO run: does any reward gain more gold than one head at equal KL?

    python experiments/frontier.py gold                         # G2, once: about an hour on one core
    python experiments/frontier.py train --seeds 200 201 202    # hours; resumable, a folder for each run
    python experiments/frontier.py report --into results/frontier-DATE.json

The design was fixed before the first run: experiments/frontier_design.md. G2, the gold that labels the proxies' pairs,
is kept as LoRA adapters in results/gold-g2-2026-11-28, so that every machine has the same one. Training reads G2
through these labels alone; gold of the policies' completions is read once a run has ended.
"""

import argparse
import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from frontier_report import report
from typicality import altered

from poise.data.human_ratings import Rated, human_ratings, is_held_out
from poise.data.preferences import write_preferences
from poise.data.types import Preference, Sample
from poise.functional.objectives import mean
from poise.models.choices import DEFAULT_MODEL
from poise.models.scorer import Scorer
from poise.policy import train as train_policy
from poise.reward import ensemble, export
from poise.reward import train as train_reward
from poise.reward.config import EnsembleConfig, ExportConfig
from poise.runtime.run_folder import environment, write_json
from poise.studies import quickstart as recipes
from poise.studies.config import LAPTOP_POLICY, LAPTOP_REWARD
from poise.studies.gold import gold_rewards
from poise.studies.pool import kept_pool, samples_of

G2 = Path(__file__).parents[1] / "results" / "gold-g2-2026-11-28"
RATED_PAIRS, SPOILED_PAIRS, OWN_PAIRS, FLIPPED = 1600, 800, 400, 0.25
SPOILS = ("shuffled", "repeated", "cut")
ONLY_SINGLE = {"num_heads": 2, "head_steps": 1, "posterior_heads": 2}  # least work where only `single` is read


class Arm(NamedTuple):
    """reward: folder of the reward model below a seed's. settled: at most +2, settling there."""

    reward: str
    objective: str
    settled: bool = False
    kl_coef: float = 0.01


ARMS = {
    "single": Arm("low/single", "nominal"),
    "brme": Arm("low/brme", "tradeoff(0.4)"),
    "typical": Arm("low/single", "typical(1)"),
    "two_depths": Arm("two-depths", "worst_case"),
    "single_settled": Arm("low/single", "nominal", settled=True),
    "bound_settled": Arm("low/posterior", "lower_confidence(1)", settled=True),
    "brme_lora": Arm("low-adapters/brme", "tradeoff(0.4)"),
    "uwo": Arm("four-trunks", "uncertainty_weighted(0.1)"),
}
VALIDATORS = {"deeper": "held-back/single", "other_pairs": "other/single"}


# ---- texts and G2 ----


def share(text: str, of: str) -> float:
    """A number in [0, 1) of a text: the fixed split of the texts."""
    return int.from_bytes(hashlib.sha256(f"{of} {text}".encode()).digest()[:4], "big") / 2**32


def rated_texts() -> dict[str, list[Rated]]:
    """Rated reviews in three parts: `gold` trains G2 (60 %), `proxies` the reward models, `test` judges G2."""
    parts: dict[str, list[Rated]] = {"gold": [], "proxies": [], "test": []}
    for text in human_ratings():
        if text.domain in recipes.RATED_DOMAINS:
            part = "test" if is_held_out(text.text) else "gold" if share(text.text, "G2") < 0.6 else "proxies"
            parts[part].append(text)
    return parts


def two_texts(texts: list[Rated], number: int, rng: random.Random) -> list[tuple[Rated, Rated]]:
    """Pairs of texts of one domain with other mean ratings, the better rated first."""
    pairs: list[tuple[Rated, Rated]] = []
    while len(pairs) < number:
        one, two = rng.sample(texts, 2)
        if one.domain == two.domain and one.text != two.text and one.mean != two.mean:
            pairs.append((one, two) if one.mean > two.mean else (two, one))
    return pairs


def gold_pairs(texts: list[Rated], rated: int, spoiled: int, seed: int) -> list[Preference]:
    """What G2 learns: of two texts the one that people rated higher; of a text and its spoiled form, the text."""
    rng = random.Random(seed)
    ask = recipes.RATED_DOMAINS
    pairs = [Preference(ask[a.domain], a.text, b.text, a.domain) for a, b in two_texts(texts, rated, rng)]
    long = [text for text in texts if len(text.text.split()) >= 6]
    for number, one in enumerate(rng.sample(long, spoiled)):
        bad = altered(one.text, SPOILS[number % len(SPOILS)], rng)
        if bad != one.text:
            pairs.append(Preference(ask[one.domain], one.text, bad, SPOILS[number % len(SPOILS)]))
    rng.shuffle(pairs)
    return pairs


def make_gold(root: Path) -> None:
    """Train G2 on all layers of the model, keep its adapters in results/gold-g2, and judge it on held-out texts."""
    parts = rated_texts()
    pairs = root / "gold" / "preferences.jsonl"
    if not pairs.exists():
        pairs.parent.mkdir(parents=True, exist_ok=True)
        write_preferences(pairs, gold_pairs(parts["gold"], RATED_PAIRS, SPOILED_PAIRS, 0))
    train_reward.run(
        train_reward.Config(
            preferences=str(pairs),
            output=str(root / "gold" / "reward"),
            trunk="lora",
            lora_rank=4,
            learning_rate=5e-4,
            validation_share=0.1,
            **ONLY_SINGLE,
            save_steps=10,
        )
    )
    export.run(ExportConfig(str(root / "gold" / "reward" / "single"), str(G2), adapter=True))
    for file, changes in (
        ("adapter_config.json", {"base_model_name_or_path": DEFAULT_MODEL}),  # not a folder of this machine
        ("config.json", {"poise": {"reference_texts": 0, "reference_shrinkage": 0.0}}),
    ):
        kept = json.loads((G2 / file).read_text())
        kept.update({key: kept[key] | value if isinstance(value, dict) else value for key, value in changes.items()})
        write_json(G2 / file, kept)
    shutil.rmtree(G2 / "poise")  # distances to reference texts, which gold does not read
    test = gold_pairs(parts["test"], 400, 300, 1)
    scorer = Scorer.load(str(G2))
    of_text = [
        mean(scorer([Sample(pair.prompt, getattr(pair, which)) for pair in test])).double().numpy()
        for which in ("chosen", "rejected")
    ]
    lexicon = [gold_rewards([getattr(pair, which) for pair in test]) for which in ("chosen", "rejected")]
    kinds = [pair.source if pair.source in SPOILS else "rated" for pair in test]
    found = {
        kind: {
            "pairs": kinds.count(kind),
            **{
                name: float(np.mean([a > b for a, b, own in zip(*golds, kinds, strict=True) if own == kind]))
                for name, golds in (("G2", of_text), ("G1, the lexicon", lexicon))
            },
        }
        for kind in ("rated", *SPOILS)
    }
    write_json(G2 / "judged.json", found)
    write_json(G2 / "environment.json", environment())
    print(json.dumps(found, indent=1))


# ---- the runs of a seed ----


def write_pairs(folder: Path, seed: int) -> None:
    """A seed's prompts, and three files of pairs labeled by G2, a quarter of them flipped: low, other, held-back."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "eval_prompts.jsonl").exists():
        recipes.write_prompts(folder)
    if not (folder / "held-back.jsonl").exists():
        pairs = labeled(unlabeled(folder, seed), seed)
        for number, name in enumerate(("low", "other", "held-back")):
            write_preferences(folder / f"{name}.jsonl", pairs[number::3])


def prepare_low(folder: Path, seed: int) -> None:
    """The reward model of the arms on 8 layers, with all its kinds of heads."""
    train_reward.run(
        replace(LAPTOP_REWARD, preferences=str(folder / "low.jsonl"), seed=seed, output=str(folder / "low"))
    )


def prepare_one_head(folder: Path, seed: int, output: str, pairs: str, layers: int) -> None:
    """A reward model of which only `single` is read."""
    train_reward.run(
        replace(
            LAPTOP_REWARD, preferences=str(folder / f"{pairs}.jsonl"), num_layers=layers, seed=seed,
            output=str(folder / output), **ONLY_SINGLE,
        )
    )  # fmt: skip


def prepare(folder: Path, seed: int) -> None:
    """A seed's pairs, and all reward models of arms and validators, but for those of `prepare_arm`."""
    write_pairs(folder, seed)
    prepare_low(folder, seed)
    for output, pairs, layers in (("high", "low", 16), ("other", "other", 8), ("held-back", "held-back", 16)):
        prepare_one_head(folder, seed, output, pairs, layers)
    if not (folder / "two-depths").exists():
        members = (str(folder / "low" / "single"), str(folder / "high" / "single"))
        ensemble.run(EnsembleConfig(members, str(folder / "low.jsonl"), str(folder / "two-depths")))


def prepare_arm(folder: Path, seed: int, name: str) -> None:
    """Reward models that `prepare` does not train: heads with adapters of their own, four trunks."""
    pairs = str(folder / "low.jsonl")
    if name == "brme_lora":
        train_reward.run(
            replace(
                LAPTOP_REWARD, preferences=pairs, seed=seed, output=str(folder / "low-adapters"),
                stage2_trunk="lora_per_head", head_layers=2, head_loss="probit_pairs",
            )
        )  # fmt: skip
    if name == "uwo" and not (folder / "four-trunks").exists():
        outputs = [folder / f"trunk-{member}" for member in range(4)]
        for member, output in enumerate(outputs):
            train_reward.run(
                replace(
                    LAPTOP_REWARD, preferences=pairs, seed=4 * seed + member, output=str(output),
                    trunk="lora", epochs=2.0, **ONLY_SINGLE,
                )
            )  # fmt: skip
        members = tuple(str(output / "single") for output in outputs)
        ensemble.run(EnsembleConfig(members, pairs, str(folder / "four-trunks")))


def unlabeled(folder: Path, seed: int) -> list[tuple[Sample, Sample]]:
    """Three times OWN_PAIRS pairs, for a reward model and two validators: half of texts that people wrote and G2 has
    not seen, half of the initial policy's samples."""
    rng = random.Random(seed)
    texts = rated_texts()["proxies"]
    ask = recipes.RATED_DOMAINS
    half = 3 * OWN_PAIRS // 2
    pairs = [
        (Sample(ask[one.domain], one.text), Sample(ask[two.domain], two.text))
        for one, two in two_texts(texts, half, rng)
    ]
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    per_prompt = 2 * half // len(prompts)
    pool = folder / "pool"
    pool.mkdir(exist_ok=True)
    rows = kept_pool(pool, LAPTOP_POLICY.model, lambda: prompts, per_prompt, LAPTOP_POLICY.max_tokens, seed)
    samples = samples_of(rows)
    pairs += [(one, two) for one, two in zip(samples[::2], samples[1::2], strict=True)]
    rng.shuffle(pairs)
    return pairs


def labeled(pairs: list[tuple[Sample, Sample]], seed: int, flipped: float = FLIPPED) -> list[Preference]:
    """Preferences by G2, of which a share is turned round."""
    scorer, rng = Scorer.load(str(G2)), random.Random(seed + 1)
    one, two = (mean(scorer([pair[side] for pair in pairs])) for side in (0, 1))
    found = []
    for (a, b), first in zip(pairs, (one > two).tolist(), strict=True):
        chosen, rejected = (a, b) if first != (rng.random() < flipped) else (b, a)
        if chosen.completion != rejected.completion:
            found.append(Preference(a.prompt, chosen.completion, rejected.completion))
    return found


def train(run: Path, arm: Arm, seed: int) -> Path:
    """PPO against one of the reward models beside the run's folder, which is returned. seed: the policy's."""
    train_policy.run(
        replace(
            LAPTOP_POLICY,
            prompts=str(run.parent / "prompts.jsonl"),
            eval_prompts=str(run.parent / "eval_prompts.jsonl"),
            reward=str(run.parent / arm.reward),
            output=str(run),
            objective=arm.objective,
            reward_ceiling=2.0 if arm.settled else None,
            settle=arm.settled,
            kl_coef=arm.kl_coef,
            num_steps=60,
            max_kl=40.0,
            keep_at_kl=(),
            eval_completions=1,
            save_every=1,
            seed=seed,
        )
    )
    return run


def read_curve(run: Path, validators: dict[str, str] = VALIDATORS) -> None:
    """Write RUN/curve.json: KL, reward, both golds and the validators of every step. Gold is read here first."""
    if (run / "curve.json").exists():
        return
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    texts, steps = samples_of(rows), np.array([row["step"] for row in rows])
    scores = {"g1": gold_rewards([row["completion"] for row in rows])}
    for name, path in {"g2": str(G2), **{k: str(run.parent / v) for k, v in validators.items()}}.items():
        scores[name] = mean(Scorer.load(path)(texts)).double().numpy()
    curve = {
        "step": [step["step"] for step in metrics], "kl": [step["kl"] for step in metrics],
        "reward": [step["reward"] for step in metrics],
        "alarms": [step["step"] for step in metrics if step.get("alarm")],
        **{name: [float(own[steps == step["step"]].mean()) for step in metrics] for name, own in scores.items()},
        "std_at_start": {name: float(own[steps == metrics[0]["step"]].std(ddof=1)) for name, own in scores.items()},
    }  # fmt: skip
    write_json(run / "curve.json", curve)


def parser_of(about: str | None, what: Sequence[str], seeds: Iterable[int], into: str) -> argparse.ArgumentParser:
    """The arguments of every experiment on the frontier's seeds. about: the script's docstring."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("what", choices=what)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--into", type=Path, default=Path(f"results/{into}.json"))
    return parser


def main() -> None:
    parser = parser_of(__doc__, ("gold", "train", "report"), range(200, 212), "frontier")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "gold":
        make_gold(options.output)
        return
    if options.what == "report":
        gold = json.loads((G2 / "judged.json").read_text())
        write_json(options.into, report(options.output, list(ARMS), gold) | {"environment": environment()})
        return
    for seed in options.seeds:
        folder = options.output / f"seed-{seed}"
        prepare(folder, seed)
        for arm in options.arms:
            prepare_arm(folder, seed, arm)
            read_curve(train(folder / arm, ARMS[arm], seed))


if __name__ == "__main__":
    main()
