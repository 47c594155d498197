"""`poise score`: every head's reward of given completions, their uncertainties, and one objective.

Rows are read, scored and written in parts, so that memory does not grow with the file. Of several processes each scores
the parts whose turn it is, and the first one writes all of them in the order of the file: the result does not depend on
how many processes there are, and a stopped command may go on with another number of them.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

from poise.data.files import can_be_read_twice
from poise.data.preferences import iter_samples
from poise.data.rows import TEXTS_PER_PART, Understood, in_parts
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import Objective, parse_objective
from poise.models.reward_model import heads_fingerprint, members_of
from poise.models.row_check import row_check_of_rewards
from poise.models.run_heads import taken_heads
from poise.models.score_columns import score_columns
from poise.models.scorer import Scorer
from poise.reward.config import ScoreConfig as Config
from poise.reward.score_file import ScoreFile, append
from poise.runtime import distributed as processes
from poise.runtime.inputs import sizes_and_times
from poise.runtime.progress import console, progress
from poise.runtime.run_folder import Json, config_dict
from poise.runtime.settings import finite_or_raise


def run(config: Config) -> Path:
    """Write one row per completion, in order; returns the file.

    A part that is done stays in FILE.partial: the same command goes on after it. A file that can be read twice is
    checked whole before it is scored.
    """
    objective = parse_objective(config.objective)
    output = ScoreFile(_output(config))
    twice = can_be_read_twice(config.file)
    if processes.launched_processes() > 1 and not twice:
        raise PoiseError(f"several processes cannot share {config.file}, which is no file; start one")
    processes.join()
    first = processes.process_index() == 0
    place = taken_heads(config.reward, config.objective)
    scorer = Scorer.load(place, config.max_length)
    scorer.layout.check_objective(config.objective)
    check = row_check_of_rewards([place])
    total = 0
    if twice:
        understood = Understood(config.file, silent=not first)
        total = sum(1 for _ in iter_samples(config.file, config.on_bad_row, check, understood))
    checked = twice and config.on_bad_row == "error"  # by the first reading: no row is left to refuse
    understood = Understood(config.file, silent=twice)
    samples = iter_samples(config.file, config.on_bad_row, None if checked else check, understood)
    settings = _settings(config, place) if twice else None
    with output.open(settings, TEXTS_PER_PART) if first else nullcontext((0, None)) as (done, file):
        done = max(processes.gathered_rows([done]))
        count = len(list(itertools.islice(samples, done)))
        with progress("scoring", total, done) as advance:
            for part, rows in _scored_parts(scorer, samples, objective, advance):
                count += len(part)
                if file is not None:
                    append(file, [{**_texts(sample), **row} for sample, row in zip(part, rows, strict=True)])
    truncated = sum(processes.gathered_rows([scorer.num_truncated]))
    if first:
        output.finish()
        if truncated:
            console.print(
                f"{truncated} of {count} samples lost their oldest tokens (longer than {scorer.extract.max_length})"
            )
        heads = scorer.layout.num_heads
        console.print(f"{count} completions scored by {heads} head{'s' * (heads > 1)}: {output.path}", markup=False)
    processes.wait()
    return output.path


def _output(config: Config) -> Path:
    if not config.output and not can_be_read_twice(config.file):
        raise PoiseError(f"--output is needed: {config.file} is no file to name the scores after")
    path = Path(config.output) if config.output else Path(config.file).with_suffix(".scored.jsonl")
    if path.is_dir():
        raise PoiseError(f"--output {path} is a folder; name a file")
    if path.exists() and Path(config.file).exists() and path.samefile(config.file):
        raise PoiseError(f"--output {path} is the file to be scored; choose another")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _settings(config: Config, place: str) -> Json:
    """What the rows are made of, by the reward model at `place`. PoiseError if the file is gone."""
    return {
        **config_dict(config), "file": [config.file, *map(list, sizes_and_times(config.file))],
        "heads": [heads_fingerprint(member) for member in members_of(place)],
    }  # fmt: skip


def _scored_parts(
    scorer: Scorer, samples: Iterator[Sample], objective: Objective, advance: Callable[[int], None]
) -> Iterator[tuple[list[Sample], list[Json]]]:
    """Samples with the columns of each; at a time as many parts as there are processes, each scoring its own."""
    mine, count = processes.process_index(), processes.num_processes()
    for several in in_parts(samples, TEXTS_PER_PART * count):
        part = several[mine * TEXTS_PER_PART : (mine + 1) * TEXTS_PER_PART]
        rows = _scored(scorer, part, objective, advance if count == 1 else None) if part else []
        rows = processes.gathered_rows(rows)
        if count > 1:
            advance(len(several))
        yield several, rows


def _scored(
    scorer: Scorer, samples: list[Sample], objective: Objective, advance: Callable[[int], None] | None
) -> list[Json]:
    """Columns of each sample. PoiseError for a number that is not finite."""
    heads = scorer(samples, advance)
    columns = score_columns(heads, scorer.layout, objective(heads))
    listed = finite_or_raise({name: column.tolist() for name, column in columns.items()}, "the score")
    return [{name: column[i] for name, column in listed.items()} for i in range(len(samples))]


def _texts(sample: Sample) -> Json:
    return {"prompt": sample.prompt, "completion": sample.completion}
