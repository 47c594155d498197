"""This version against another checkout of Poise: scoring 64 completions, a PPO step, a step of stage 1, in one run.

    git worktree add ../other b6fbbb3
    OMP_NUM_THREADS=2 python benchmarks/against.py --other ../other --preferences hh_rlhf.jsonl.gz [--rounds 3]

Each checkout runs its own benchmark scripts in processes of its own, in turn; medians over rounds. Both must read the
model and the preferences with the libraries that are installed. Prints JSON. `cpu_s` well below the seconds times the
threads means that something else had the machine.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]


def measured(checkout: Path, preferences: str) -> dict[str, float]:
    """Seconds of one round."""

    def run(script: str, *options: str) -> dict:
        done = subprocess.run(
            [sys.executable, str(checkout / "benchmarks" / script), *options],
            env=os.environ | {"PYTHONPATH": str(checkout / "src")}, check=True, capture_output=True, text=True,
        )  # fmt: skip
        found = done.stdout
        return json.loads(found[found.index("{") :])

    prompt = run("shared_prompt.py", "--prompt", "256", "--completion", "32")["rows"][0]
    step = run("ppo_step.py", "--layers", "10", "--repeats", "1")
    stage = run("train_trunk.py", "--preferences", preferences, "--steps", "14", "--child", "poise")
    return {
        "scoring 64 completions, 256 + 32 tokens": prompt["shared_s"],
        "scoring them one by one": prompt["naive_s"],
        "PPO step, upper ten layers": step["step"]["shared_s"],
        "stage 1, step of 8 pairs": statistics.median(stage["seconds"][2:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--preferences", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {"other": [], "this": []}
    for number in range(options.rounds):
        for name in rounds if number % 2 else reversed(rounds):
            checkout = HERE if name == "this" else options.other
            rounds[name].append(measured(checkout.resolve(), options.preferences))
    seconds = {
        name: {what: statistics.median(one[what] for one in found) for what in found[0]}
        for name, found in rounds.items()
    }
    commit = subprocess.run(
        ["git", "-C", str(options.other), "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        json.dumps(
            {
                "other": commit, "rounds": options.rounds, "seconds": seconds,
                "this / other": {
                    what: round(seconds["this"][what] / value, 3) for what, value in seconds["other"].items()
                },
                "each": rounds, "cpu_s": round(used.ru_utime + used.ru_stime),
                "threads": os.environ.get("OMP_NUM_THREADS", "all"), "command": "python benchmarks/against.py",
            },
            indent=1,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
