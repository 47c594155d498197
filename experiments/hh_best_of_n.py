"""Best-of-n on HH-RLHF, where gold is a reward model that no proxy's preferences were used for.

    python experiments/hh_best_of_n.py --preferences hh_rlhf.jsonl.gz --output runs/hh-best-of-n

Short pairs are split by prompt into three: gold is trained on the first part (its own trunk, deeper than the proxies'),
labels the second, on parts of which the proxies are trained (0 % and 25 % of the labels flipped; and, as `raters`, with
the labels people gave), and reads the completions of the third part's prompts. `poise study` does the rest:
RUN/study/report.html and RUN/study/results.json.
"""

import argparse
import dataclasses
import hashlib
import json
from dataclasses import replace
from pathlib import Path

from poise.data.preferences import read_preferences, write_preferences
from poise.data.types import Preference, Sample
from poise.functional.objectives import mean
from poise.models.chat_format import prompt_text
from poise.models.loading import load_tokenizer, resolve_model
from poise.models.scorer import Scorer
from poise.reward import train as train_reward
from poise.runtime.progress import progress
from poise.runtime.run_folder import write_jsonl
from poise.studies import study
from poise.studies.config import LAPTOP_REWARD, POLICY


def part_of(preference: Preference) -> int:
    """0, 1 or 2, by the prompt's hash."""
    return hashlib.sha256(json.dumps(preference.prompt).encode()).digest()[0] % 3


def short(preferences: list[Preference], model: str, max_tokens: int) -> list[Preference]:
    """Those whose prompt and longer completion have at most so many tokens."""
    tokenizer = load_tokenizer(resolve_model(model))

    def length(preference: Preference) -> int:
        texts = (prompt_text(tokenizer, preference.prompt), preference.chosen, preference.rejected)
        prompt, chosen, rejected = (len(tokenizer.encode(text)) for text in texts)
        return prompt + max(chosen, rejected)

    return [preference for preference in preferences if length(preference) <= max_tokens]


def labeled_by(gold: str, preferences: list[Preference]) -> list[Preference]:
    """The pairs with the text chosen that gold prefers."""
    scorer = Scorer.load(gold, cached=True)
    samples = [Sample(p.prompt, text) for p in preferences for text in (p.chosen, p.rejected)]
    with progress("gold labels", len(samples)) as advance:
        rewards = mean(scorer(samples, advance)).view(-1, 2)
    return [
        replace(p, chosen=p.rejected, rejected=p.chosen) if one < other else p
        for p, (one, other) in zip(preferences, rewards.tolist(), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preferences", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/hh-best-of-n"))
    parser.add_argument("--model", default=study.Config.model)
    parser.add_argument("--gold-layers", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=700, help="at most so many pairs for gold, and for the proxies")
    parser.add_argument("--per-reward", type=int, default=400, help="pairs each proxy is trained on")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--pool", type=int, default=64, help="completions of each prompt")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--length", type=int, default=160, help="longest sample, in tokens")
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    data = options.output / "data"
    data.mkdir(parents=True, exist_ok=True)
    files = {name: data / f"{name}.jsonl" for name in ("gold", "preferences", "raters", "prompts")}
    gold = dataclasses.replace(
        LAPTOP_REWARD, preferences=str(files["gold"]), output=str(options.output / "gold"), model=options.model,
        num_layers=options.gold_layers,
    )  # fmt: skip
    if not files["prompts"].exists():
        parts: list[list[Preference]] = [[], [], []]
        for preference in short(
            read_preferences(options.preferences, on_bad_row="skip"), options.model, options.length
        ):
            parts[part_of(preference)].append(preference)
        write_preferences(files["gold"], parts[0][: options.pairs])
        train_reward.run(gold)
        write_preferences(files["raters"], parts[1][: options.pairs])
        write_preferences(
            files["preferences"], labeled_by(str(options.output / "gold" / "single"), parts[1][: options.pairs])
        )
        prompts = {json.dumps(p.prompt): p.prompt for p in parts[2]}
        write_jsonl(files["prompts"], [{"prompt": prompt} for prompt in list(prompts.values())[: options.prompts]])
    study.run(
        study.Config(
            preferences=str(files["preferences"]), raters=str(files["raters"]), prompts=str(files["prompts"]),
            eval_prompts=str(files["prompts"]), output=str(options.output / "study"), model=options.model,
            num_preferences=options.per_reward, gold=str(options.output / "gold" / "single"),
            label_noise=("0", "raters", "0.25"), pool_seeds=options.seeds, pool_size=options.pool, policy_seeds=0,
            policy=dataclasses.replace(POLICY, max_tokens=options.max_tokens),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
