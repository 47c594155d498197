"""Best-of-n of ensembles where gold labels the policy's own pairs: the test of arXiv 2310.02743, smaller.

    python experiments/coste.py --output runs/coste                     # pool, gold, pairs: about an hour on one core
    python experiments/trunk_ensembles.py --study runs/coste --noise 0 --pool 1024 --seeds 0 1 2 --output runs/coste/own

The design is that of experiments/frontier_design.md. G2 (experiments/frontier.py) labels pairs of the initial policy's
samples, some of which are flipped, and reads a pool of its completions for other prompts. What is written has the shape
of a `poise study`: the second command trains reward models with trunks of their own on it, and lets them choose.
"""

import argparse
import json
from pathlib import Path

from frontier import G2, labeled

from poise.data.preferences import write_preferences
from poise.data.types import Prompt
from poise.runtime.run_folder import write_json, write_jsonl
from poise.studies import quickstart as recipes
from poise.studies.config import LAPTOP_POLICY
from poise.studies.gold import label_with_gold
from poise.studies.pool import FILE, kept_pool, sample_pool, samples_of


def prompts_of(path: Path) -> list[Prompt]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def make_pool(output: Path, per_prompt: int) -> None:
    """POOL/pool.jsonl: completions of the evaluation prompts, with gold."""
    pool = output / "pool"
    pool.mkdir(exist_ok=True)
    prompts = prompts_of(output / "eval_prompts.jsonl")
    rows = kept_pool(pool, LAPTOP_POLICY.model, lambda: prompts, per_prompt, LAPTOP_POLICY.max_tokens, seed=0)
    if label_with_gold(rows, str(G2)):
        write_jsonl(pool / FILE, rows)


def make_pairs(output: Path, seed: int, pairs: int, noises: list[float]) -> None:
    """noise-SHARE/reward-SEED/preferences.jsonl: one set of pairs of the policy's samples, by G2, with flips."""
    prompts = prompts_of(output / "prompts.jsonl")
    files = {noise: output / f"noise-{noise:g}" / f"reward-{seed}" / "preferences.jsonl" for noise in noises}
    if all(file.exists() for file in files.values()):
        return
    rows = sample_pool(
        LAPTOP_POLICY.model, prompts, 2 * pairs // len(prompts), LAPTOP_POLICY.max_tokens, seed=1000 + seed
    )
    samples = samples_of(rows)
    two = list(zip(samples[::2], samples[1::2], strict=True))
    for noise, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_preferences(file, labeled(two, seed, flipped=noise))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/coste"))
    parser.add_argument("--completions", type=int, default=1024, help="of each of 40 prompts; 1,024 are 6 nats")
    parser.add_argument("--pairs", type=int, default=400, help="in each set")
    parser.add_argument("--sets", type=int, default=10)
    parser.add_argument("--noises", type=float, nargs="+", default=[0, 0.25], help="shares of labels to flip")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    recipes.write_prompts(options.output)
    make_pool(options.output, options.completions)
    for seed in range(options.sets):
        make_pairs(options.output, seed, options.pairs, options.noises)
    write_json(options.output / "coste.json", {key: str(value) for key, value in vars(options).items()})


if __name__ == "__main__":
    main()
