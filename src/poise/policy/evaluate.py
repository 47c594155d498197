"""`poise evaluate-policy`: what training did to what a language model knows, on the 16 benchmarks of the paper.

lm-evaluation-harness evaluates each policy (integrations/lm_eval.py). This module compares the outcomes, row by row,
with those of the model that training started from, on the same rows:

    one benchmark       exact McNemar test; interval of the difference after Agresti and Min
    average of them     benchmarks count equally, rows within them are the random unit; sign-flip test, interval around
                        the average itself

    RUN/results.json    tasks: their names
                        policies, the start first: mean and stderr per task and on average; against the start:
                        difference, interval, p_value; outcomes: one character per row, 1 if right, else 0
                        fluctuation: per policy and task, over the checkpoints that a run evaluated during training
                        (--eval-every)

Outcomes are cached in the user's cache folder by weights, rows and the harness's version: nothing is evaluated twice.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from rich.table import Table
from safetensors import SafetensorError
from scipy.stats import binomtest

from poise.errors import PoiseError, first_line
from poise.functional.statistics import movement
from poise.integrations.lm_eval import Answers, Task, evaluate, read_tasks
from poise.models.loading import (
    HfModel,
    HfTokenizer,
    found_here,
    frozen_dtype,
    load_policy,
    resolve_model,
)
from poise.models.policy import Policy
from poise.policy.config import EvaluateConfig as Config
from poise.policy.formats import BenchmarkRow, ModelSettings
from poise.policy.merge import base_of, unfolded
from poise.runtime.display import short_names
from poise.runtime.downloads import cache_folder
from poise.runtime.progress import console, progress
from poise.runtime.records import checked, read_object, read_rows, undefined_as_none
from poise.runtime.run_folder import Inputs, Json, Run, load_config_file, write_json
from poise.runtime.settings import read_fields

Z = 1.959964  # half-width of a 95 % interval in standard errors
FLIPS = 100_000  # draws of the sign-flip test, so p is known to a step of 1e-5


def run(config: Config) -> Run:
    """Evaluate, compare, show. A finished run is only shown; cached outcomes are not computed again."""
    config.check()
    finished = Run(Path(config.output)).results is not None
    if not finished:  # all that can be wrong comes before a folder is made or a model loaded
        tasks = read_tasks(config.tasks, config.data, config.rows)
        sources = _sources(config)
        logged = {source.path: _logged(Path(source.path)) for source in sources}
    out = Run.open(config.output, config, lambda: _inputs(config, found_here if finished else resolve_model))
    if finished:
        out.refuse_edited(lambda: _inputs(config, found_here))
    else:
        found = [_evaluate_source(source, tasks, config) for source in sources]
        names = short_names([source.path for source in sources])
        policies = [
            {"name": name, "path": source.path, **_compared(answers, found[0] if number else None)}
            for number, (name, source, answers) in enumerate(zip(names, sources, found, strict=True))
        ]
        fluctuations = {
            policy["name"]: fluctuation(logged[policy["path"]]) for policy in policies if logged[policy["path"]]
        }
        out.finish({"tasks": list(config.tasks), "policies": policies, "fluctuation": fluctuations})
    console.print(table(out.results or {}))
    return out


# ---- pure functions of outcomes ----


class Paired(NamedTuple):
    """A difference of two means over the same rows, its 95 % interval, and the p-value of there being none."""

    difference: float
    interval: tuple[float, float]
    p_value: float


def paired_difference(after: Float[ndarray, " rows"], before: Float[ndarray, " rows"]) -> Paired:
    """Of 0/1 outcomes on the same n rows; b of them only `after` has right, c only `before`.

        difference = (b - c) / n
        interval   = d ± 1.96 sqrt(b' + c' - (b' - c')² / n') / n'    with b' = b + 1/2, c' = c + 1/2, n' = n + 2,
                     d = (b' - c') / n'                               (Agresti and Min 2005, doi 10.1002/sim.1781)
        p_value    = P(X as far from (b + c) / 2 as b is), X ~ Binomial(b + c, 1/2)               (exact McNemar test)

    >>> paired_difference(np.array([1.0, 1, 1, 1]), np.array([0.0, 0, 0, 1]))[::2]
    (0.75, 0.25)
    """
    b, c = _discordant(after, before)
    p_value = float(binomtest(b, b + c).pvalue) if b + c else 1.0
    n = len(after)
    interval = _interval((b - c) / (n + 2), float(np.sqrt(_spread(b, c, n))) / (n + 2))
    return Paired((b - c) / n, interval, p_value)


def average_difference(
    after: Sequence[Float[ndarray, " _"]], before: Sequence[Float[ndarray, " _"]], draws: int = FLIPS, seed: int = 0
) -> Paired:
    """Of the means of T tasks' means of 0/1 outcomes; the tasks are given, their rows are the random unit.

        difference = D = (1 / T) Σ_t (b_t - c_t) / n_t
        interval   = D ± 1.96 sqrt(Σ_t (b'_t + c'_t - (b'_t - c'_t)² / n'_t) / n_t²) / T  (b', c', n' as in
                     paired_difference)
        p_value    = (1 + #{|D*| >= |D|}) / (1 + draws)                                   (sign-flip test)

    Under the null hypothesis a row that only one side has right is equally likely to be either side's. D* assigns each
    such row at random: b*_t ~ Binomial(b_t + c_t, 1/2).

    The added rows widen the interval but do not move its center. The shrunken centers d_t = D_t n_t / (n_t + 2) are all
    biased toward 0; this bias does not shrink with T, as the width does.
    """
    counts = [(*_discordant(one, other), len(one)) for one, other in zip(after, before, strict=True)]
    b, c, n = np.array(counts).T
    difference = float(((b - c) / n).mean())
    flipped = np.random.default_rng(seed).binomial(b + c, 0.5, size=(draws, len(n)))
    as_far = np.abs(((2 * flipped - b - c) / n).mean(-1)) >= abs(difference) - 1e-12
    stderr = float(np.sqrt((_spread(b, c, n) / n**2).sum())) / len(n)
    return Paired(difference, _interval(difference, stderr), float((1 + as_far.sum()) / (1 + draws)))


def _discordant(after: ndarray, before: ndarray) -> tuple[int, int]:
    """(rows that only `after` has right, rows that only `before` has)."""
    return int((after > before).sum()), int((after < before).sum())


def _spread(b: ndarray | int, c: ndarray | int, n: ndarray | int) -> ndarray | float:
    """Variance b' + c' - (b' - c')² / n' of the count b - c, by the primed counts of `paired_difference`; per task."""
    return b + c + 1 - (b - c) ** 2 / (n + 2)


def _interval(center: float, stderr: float) -> tuple[float, float]:
    """95 % interval of a difference of means, within [-1, 1]."""
    return max(center - Z * stderr, -1.0), min(center + Z * stderr, 1.0)


def average(answers: Sequence[Answers]) -> tuple[float, float]:
    """(mean over tasks of their means, its standard error sqrt(Σ_t stderr_t²) / T): every task counts the same."""
    stderr = np.sqrt(sum(task.stderr**2 for task in answers)) / len(answers)
    return float(np.mean([task.mean for task in answers])), float(stderr)


def fluctuation(rows: Sequence[Json]) -> Json:
    """How much each task's mean moves over the checkpoints of a run.

    rows: of benchmarks.jsonl. Per task: steps, mean; std over checkpoints (n - 1; None for one); range, highest minus
    lowest; largest_drop, from a checkpoint to any later one, 0 if it never falls.

    >>> rows = [{"step": i, "task": "race", "mean": mean} for i, mean in enumerate([0.25, 0.75, 0.5])]
    >>> fluctuation(rows)["race"]
    {'steps': [0, 1, 2], 'mean': [0.25, 0.75, 0.5], 'std': 0.25, 'range': 0.5, 'largest_drop': 0.25}
    """
    by_task: dict[str, dict[int, float]] = {}
    for row in rows:
        by_task.setdefault(row["task"], {})[row["step"]] = row["mean"]
    found: Json = {}
    for task, at in by_task.items():
        steps = sorted(at)
        means = [at[step] for step in steps]
        found[task] = {"steps": steps, "mean": means} | movement(np.array(means))
        if len(steps) == 1:
            found[task]["std"] = None
    return found


def _compared(answers: dict[str, Answers], start: dict[str, Answers] | None) -> Json:
    """A policy's part of the results; with `start`, its differences to it."""
    tasks: Json = {}
    for name, task in answers.items():
        tasks[name] = {"metric": task.metric, "mean": task.mean, "stderr": undefined_as_none(task.stderr)}
        tasks[name] |= {"rows": len(task.outcomes)}
        tasks[name] |= {"also": task.also, "num_truncated": task.num_truncated, "outcomes": task.outcomes}
        if start:
            tasks[name] |= paired_difference(task.array, start[name].array)._asdict()
    mean, stderr = average(list(answers.values()))
    whole: Json = {"mean": mean, "stderr": undefined_as_none(stderr)}
    if start:
        rows, before = ([task.array for task in side.values()] for side in (answers, start))
        whole |= average_difference(rows, before)._asdict()
    return {"tasks": tasks, "average": whole}


# ---- policies ----


@dataclass(frozen=True)
class _Source:
    """A policy to evaluate: a model, with the adapters and settings of a run folder if it is one."""

    path: str
    model: str
    adapters: Path | None = None
    adapted_layers: int = 0
    rank: int = 0

    def load(self) -> tuple[HfModel, HfTokenizer]:
        """(language model, tokenizer), as in training."""
        if self.adapters and not self.rank:  # of no run's config.yaml
            return unfolded(self.adapters)
        model, tokenizer = load_policy(self.model)
        if self.adapters is None:
            return model, tokenizer
        policy = Policy(model, tokenizer, adapted_layers=self.adapted_layers, rank=self.rank)
        try:
            policy.load_adapters(str(self.adapters))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise PoiseError(f"cannot use the adapters in {self.adapters}: {first_line(error)}") from None
        return policy.model, tokenizer

    def folders(self, place: Callable[[str], str] = resolve_model) -> list[Path]:
        """The folders that determine the outcomes: the model's, and its adapters'. place: where a model is."""
        return [Path(place(self.model)), *filter(None, [self.adapters])]

    def digest(self) -> str:
        """Digest of the files that determine the outcomes, and of the precision of the weights."""
        whole = hashlib.blake2b(str(frozen_dtype()).encode(), digest_size=20)
        for folder in self.folders():
            for path in sorted(folder.iterdir()):
                if path.suffix in {".safetensors", ".json", ".txt", ".model"}:
                    with path.open("rb") as file:
                        whole.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
        return whole.hexdigest()


def _sources(config: Config, place: Callable[[str], str] = resolve_model) -> list[_Source]:
    """The language model, then the policies. place: where a model is."""
    return [_source(path, place) for path in (config.model, *config.policies)]


def _source(path: str, place: Callable[[str], str]) -> _Source:
    """The policy at `path`. Raises PoiseError if it is neither a finished run nor a model."""
    folder = Path(path)
    if (folder / "adapter_config.json").exists():
        return _Source(path, base_of(folder), folder)
    if not (folder / "config.yaml").exists():
        place(path)
        return _Source(path, path)
    settings, policy = load_config_file(folder / "config.yaml"), folder / "policy"
    if "lora_rank" not in settings or Run(folder).results is None or not policy.exists():
        raise PoiseError(f"{path} is not a finished `poise train-policy` run; the same command goes on with it")
    settings = checked(settings, ModelSettings, str(folder / "config.yaml"))
    if settings["tune"] == "full":
        return _Source(path, str(policy))
    place(settings["model"])
    return _Source(path, settings["model"], policy, settings["adapted_layers"], settings["lora_rank"])


def _inputs(config: Config, place: Callable[[str], str] = resolve_model) -> Inputs:
    """What the run reads, by the setting that names it, policies counted from 1. place: where a model is."""
    sources = enumerate(_sources(config, place))
    found = {f"--policies {number}" if number else "--model": one.folders(place) for number, one in sources}
    return {**found, "--data": sorted(Path(config.data).glob("*.jsonl*"))} if config.data else found


def _logged(folder: Path) -> list[Json]:
    """Rows of a run folder's benchmarks.jsonl (--eval-every); none if it has no such file."""
    path = folder / "benchmarks.jsonl"
    return list(read_rows(path, BenchmarkRow)) if path.exists() else []


def _evaluate_source(source: _Source, tasks: Sequence[Task], config: Config) -> dict[str, Answers]:
    """A policy's answers by task: read from the cache, or computed and cached task by task."""
    digest = source.digest()
    kept = {
        task.name: cache_folder() / "benchmarks" / f"{digest}-{task.identity(config.max_tokens)}.json" for task in tasks
    }
    missing = [task for task in tasks if not kept[task.name].exists()]
    if missing:
        model, tokenizer = source.load()
        total = sum(len(task.requests()) for task in missing)
        with progress(f"evaluating {Path(source.path).name}", total) as advance:
            for task in missing:
                advance(0, task.name)
                answers = evaluate(
                    model, tokenizer, task, batch_size=config.batch_size, max_tokens=config.max_tokens, advance=advance
                )
                write_json(kept[task.name], asdict(answers))
    found = {name: read_fields(read_object(path), Answers, f"{path}: delete it; it") for name, path in kept.items()}
    if cut := sum(answers.num_truncated for answers in found.values()):
        console.print(f"{source.path}: {cut} requests are longer than the model's context and lost their beginning")
    return found


# ---- the terminal ----


def table(results: Json) -> Table:
    """Mean of each task and policy, in per cent; of policies after the start, difference and p-value too."""
    shown = Table("benchmark", *(policy["name"] for policy in results["policies"]), title="per cent right")
    for name in results["tasks"]:
        shown.add_row(name, *(_cell(policy["tasks"][name]) for policy in results["policies"]))
    shown.add_section()
    shown.add_row("average", *(_cell(policy["average"]) for policy in results["policies"]))
    return shown


def _cell(result: Json) -> str:
    spread = f" ± {100 * result['stderr']:.1f}" if result["stderr"] is not None else ""
    if "difference" not in result:
        return f"{100 * result['mean']:.1f}{spread}"
    return f"{100 * result['mean']:.1f}{spread} ({100 * result['difference']:+.1f}, p {result['p_value']:.2g})"
