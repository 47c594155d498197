"""Other people's monitors on the same finished policy runs as ours: when does each raise its first alarm?

    pip install rldoctor==0.2.0 rlprobe==0.1.0 rlwatch==0.5.1 diptest    # in an environment of their own, beside Poise
    python experiments/rival_monitors.py RUN_FOLDERS... > results/rival-monitors-DATE.json

Each gets, step by step, what `poise train-policy` logged and sampled, under the names that it reads, with its default
settings, and nothing else. rldoctor and rlprobe diagnose finished runs: they are asked again after every step. Of
alarms that concern something else than the policy (throughput, gradients) none is left out: a user cannot know that.
Gold, the terms (fell, hit, miss, false) and what a stop saves are those of experiments/monitor.py.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
from monitor import Trajectory, read, rounded, score, summary

from poise.functional.monitor import LIMITS
from poise.runtime.records import read_rows
from poise.runtime.run_folder import Json, environment

# Step -> names of what fires at a level; levels are "warning" (and worse) and "critical".
Fired = dict[int, dict[str, list[str]]]


def steps_of(folder: Path) -> list[Json]:
    """Per step what was logged, and `rows`: its completions."""
    rows: dict[int, list[Json]] = {}
    for row in read_rows(folder / "samples.jsonl"):
        rows.setdefault(row["step"], []).append(row)
    return [step | {"rows": rows[step["step"]]} for step in read_rows(folder / "metrics.jsonl")]


def rlwatch(steps: list[Json]) -> Fired:
    from rlwatch.config import RLWatchConfig
    from rlwatch.detectors import DetectorSuite

    suite, found = DetectorSuite(RLWatchConfig()), Fired()
    for step in steps:
        alerts = suite.check_step(
            step["step"], entropy=step["entropy"], kl_divergence=step["kl"], reward_mean=step["reward"],
            reward_std=step["reward_std"], rewards=np.array([row["reward"] for row in step["rows"]]),
            loss=step["policy_loss"], grad_norm=step["grad_norm"], advantage_std=None,
        )  # fmt: skip
        critical = [alert.detector for alert in alerts if alert.severity == "critical"]
        found[step["step"]] = {"critical": critical, "warning": [alert.detector for alert in alerts]}
    return found


def rldoctor(steps: list[Json]) -> Fired:
    from rl_doctor.detectors.base import Severity
    from rl_doctor.diagnosis import diagnose
    from rl_doctor.schema import Run, RunConfig

    names = {
        "reward_mean": "reward", "reward_std": "reward_std", "entropy": "entropy", "kl": "kl", "pg_clipfrac": "clipped",
        "grad_norm": "grad_norm", "policy_loss": "policy_loss", "response_len_mean": "tokens",
    }  # fmt: skip
    series = {theirs: np.array([step[ours] for step in steps], dtype=float) for theirs, ours in names.items()}
    series["response_len_clip_ratio"] = np.array([1 - step["ended"] for step in steps])
    found = Fired()
    for n, step in enumerate(steps, 1):
        run = Run(np.arange(n), {name: values[:n] for name, values in series.items()}, RunConfig(algorithm="ppo"))
        findings = diagnose(run).findings
        found[step["step"]] = {
            "critical": [one.detector for one in findings if one.severity >= Severity.CRITICAL],
            "warning": [one.detector for one in findings if one.severity >= Severity.WARNING],
        }
    return found


def rlprobe(steps: list[Json]) -> Fired:
    from rlprobe.doctor.engine import diagnose_view
    from rlprobe.doctor.runview import RunView
    from rlprobe.schemas import RunManifest, SampleRecord, StepRecord

    records = [
        StepRecord(
            step=step["step"], reward_mean=step["reward"], reward_std=step["reward_std"], kl_mean=step["kl"],
            entropy_mean=step["entropy"], logprob_mean=step["logprob"] / step["tokens"], clip_fraction=step["clipped"],
            value_loss=step["value_loss"], loss=step["policy_loss"], grad_norm=step["grad_norm"],
            completion_len_mean=step["tokens"], eos_rate=step["ended"], max_len_hit_frac=1 - step["ended"],
            truncation_rate=1 - step["ended"], repetition_rate=step["repetition"],
        )
        for step in steps
    ]  # fmt: skip
    samples = [
        [
            SampleRecord(
                step=step["step"], sample_id=f"{step['step']}-{n}", prompt_text=str(row["prompt"]),
                completion_text=row["completion"], reward_total=row["reward"],
            )
            for n, row in enumerate(step["rows"])
        ]
        for step in steps
    ]  # fmt: skip
    manifest = RunManifest(run_id="run", created_at="2026-11-28T00:00:00", algorithm="ppo")
    found = Fired()
    for n, step in enumerate(steps, 1):
        view = RunView(manifest, records[:n], lambda n=n: [one for of_step in samples[:n] for one in of_step])
        findings = diagnose_view(view)
        found[step["step"]] = {
            "critical": [one.signature_id for one in findings if one.severity == "critical"],
            "warning": [one.signature_id for one in findings if one.severity != "info"],
        }
    return found


RIVALS: dict[str, Callable[[list[Json]], Fired]] = {"rldoctor": rldoctor, "rlprobe": rlprobe, "rlwatch": rlwatch}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the rivals' own statistics
    runs: list[Trajectory] = []
    fired: dict[str, dict[str, Fired]] = {name: {} for name in RIVALS}
    for folder in options.folders:
        runs.append(read(folder))
        runs[-1].name = f"{folder.parent.name}, {folder.name}"  # an arm with and without a ceiling has one objective
        steps = steps_of(folder)
        for name, rival in RIVALS.items():
            fired[name][runs[-1].name] = rival(steps)
    table: Json = {"poise (its limits were set on runs of this task)": summary(score(LIMITS), 1.0, runs)}
    for name, of_run in fired.items():
        for level in ("warning", "critical"):

            def rule(run: Trajectory, of_run: dict[str, Fired] = of_run, level: str = level) -> np.ndarray:
                return np.array([float(bool(at[level])) for at in of_run[run.name].values()])

            which: dict[str, int] = {}
            for one in of_run.values():
                first = next((at[level] for at in one.values() if at[level]), [])
                which |= {detector: which.get(detector, 0) + 1 for detector in first}
            table[f"{name}: {level}"] = summary(rule, 0.5, runs) | {"raised first": which}
    versions = {name: metadata.version(name) for name in RIVALS}
    made_by = {key: value for key, value in environment().items() if key != "command"}
    found = {
        "runs": [
            {"name": run.name, "peak": run.peak, "fall": run.fall, "healthy": run.healthy} for run in runs
        ],
        "monitors": table, "rivals": versions, "environment": made_by,
    }  # fmt: skip
    print(json.dumps(rounded(found), indent=1))


if __name__ == "__main__":
    main()
