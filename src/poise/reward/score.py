"""`poise score`: every head's reward of given completions, their uncertainties, and one objective."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

from poise.data.files import can_be_read_twice
from poise.data.preferences import iter_samples
from poise.data.rows import Understood
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import Objective, disagreement, nominal_head, parse_objective, routing_std, total_std
from poise.models.reward_model import heads_fingerprint, members_of
from poise.models.row_check import row_check_of_rewards
from poise.models.scorer import Scorer
from poise.reward.config import ScoreConfig as Config
from poise.runtime.progress import console, progress
from poise.runtime.records import read_object
from poise.runtime.run_folder import Json, config_dict, write_json
from poise.runtime.settings import finite_or_raise

ROWS_PER_PART = 1024


def run(config: Config) -> Path:
    """Write one row per completion, in order; returns the file.

    Rows are read, scored and written in parts, so that memory does not grow with the file. A part that is done stays in
    FILE.partial: the same command goes on after it. A file that can be read twice is checked whole before it is scored.
    """
    objective = parse_objective(config.objective)
    path = _output(config)
    scorer = Scorer.load(config.reward, config.max_length)
    scorer.layout.check_objective(config.objective)
    check = row_check_of_rewards([config.reward])
    twice = can_be_read_twice(config.file)
    total = sum(1 for _ in iter_samples(config.file, config.on_bad_row, check)) if twice else 0
    partial = path.with_name(f"{path.name}.partial")
    done = _resumed(partial, config) if twice else 0
    checked = twice and config.on_bad_row == "error"  # by the first reading: no row is left to refuse
    understood = Understood(config.file, silent=twice)
    samples = iter_samples(config.file, config.on_bad_row, None if checked else check, understood)
    count = len(list(itertools.islice(samples, done)))
    with progress("scoring", total, done) as advance, partial.open("a" if done else "w", encoding="utf-8") as file:
        while part := list(itertools.islice(samples, ROWS_PER_PART)):
            file.writelines(
                json.dumps(row) + "\n" for row in _scored(scorer, part, config.objective, objective, advance)
            )
            file.flush()
            count += len(part)
        os.fsync(file.fileno())
    partial.replace(path)
    _settings_of(partial).unlink(missing_ok=True)
    if scorer.num_truncated:
        console.print(
            f"{scorer.num_truncated} of {count} samples lost their oldest tokens "
            f"(longer than {scorer.extract.max_length})"
        )
    console.print(f"{count} completions scored by {scorer.layout.num_heads} heads: {path}", markup=False)
    return path


def _output(config: Config) -> Path:
    if not config.output and not can_be_read_twice(config.file):
        raise PoiseError(f"--output is needed: {config.file} is no file to name the scores after")
    path = Path(config.output) if config.output else Path(config.file).with_suffix(".scored.jsonl")
    if path.is_dir():
        raise PoiseError(f"--output {path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _scored(
    scorer: Scorer, samples: list[Sample], name: str, objective: Objective, advance: Callable[[int], None]
) -> list[Json]:
    """Rows of the output. PoiseError for a number that is not finite."""
    heads = scorer(samples, advance)
    columns = {
        name: objective(heads),
        "nominal_head": nominal_head(heads),
        "disagreement": disagreement(heads),
        "routing_std": routing_std(heads),
        "total_std": total_std(scorer.layout.calibrated(heads)),
        "mean": heads.mean,
        "std": heads.std,
    } | ({} if heads.distance is None else {"distance": heads.distance.squeeze(-1)})
    listed = finite_or_raise({name: column.tolist() for name, column in columns.items()}, "the score")
    return [
        {"prompt": sample.prompt, "completion": sample.completion, **{name: col[i] for name, col in listed.items()}}
        for i, sample in enumerate(samples)
    ]


def _settings_of(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _resumed(partial: Path, config: Config) -> int:
    """How many rows a stopped command of the same settings, model and file left done; the rest of them is cut off."""
    about = Path(config.file).stat()
    settings = {
        **config_dict(config), "file": [config.file, about.st_size, about.st_mtime_ns],
        "heads": [heads_fingerprint(member) for member in members_of(config.reward)],
    }  # fmt: skip
    record = _settings_of(partial)
    try:
        same = read_object(record) == settings
    except PoiseError:
        same = False
    if not same:
        partial.unlink(missing_ok=True)
        write_json(record, settings)
        return 0
    if not partial.exists():
        return 0
    whole = kept = end = 0
    with partial.open("rb+") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            if number % ROWS_PER_PART == 0 and line.endswith(b"\n"):
                whole, kept = number, end
        file.truncate(kept)
    return whole
