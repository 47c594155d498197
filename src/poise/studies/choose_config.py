"""The settings of `poise choose`; torch is not imported to read them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from poise.data.files import no_such_file
from poise.errors import PoiseError
from poise.runtime.folders import MARK, is_leftover
from poise.runtime.records import Json, read_object
from poise.runtime.run_kinds import told_of
from poise.runtime.settings import Count, Positive, Seed, between, same_value, shown, sized
from poise.studies.comparisons import draw, read_ladder
from poise.studies.judge_settings import JudgeSettings


@dataclass(frozen=True)
class Config(JudgeSettings):
    """How far to train, from few labels: blind side-by-side comparisons along a ladder of KL.

    Each rung's completions stand beside those of the rung below for the same prompts, the first beside the start's.

    The first call writes OUTPUT/comparisons.jsonl (`id`, `prompt`, `a`, `b`). Judge them into OUTPUT/judgments.jsonl, a
    row each of `id` and `better` (a, b or tie); which side is which is in OUTPUT/key.json, for no judge to see.
    The same command then says which rung to take, and how many labels more would decide.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Source of the completions: a `poise train-policy` run; or a file with `prompt`, `completion` and
    `kl` in each row, kl 0 for the start's."""
    output: str = "runs/choose"
    """Folder to write."""
    rungs: Annotated[tuple[Positive, ...], sized(1)] = (5.0, 10.0, 20.0, 40.0)
    """KL to the start of each rung, in nats, that a run is asked at; those it did not reach are left out. Policies that
    the run kept near a rung (--keep-at-kl) are sampled anew. A file has its own."""
    per_rung: Count = 40
    """Comparisons of each rung."""
    delta: Annotated[float, between(0, 0.5, open_low=True, open_high=True)] = 0.05
    """How far above one half the best rung may win against the one that is taken: of those it is the largest KL."""
    seed: Seed = 0
    """Of the comparisons that are drawn, their order and their sides."""

    def how_drawn(self) -> Json:
        """The settings that the comparisons in a folder are of."""
        return {"rungs": list(self.rungs), "per_rung": self.per_rung, "seed": self.seed}

    def for_command(self) -> "Config":
        """As `Settings.for_command`: before the comparisons are drawn, the source is a run or a file of completions."""
        source = Path(self.source)
        if (Path(self.output) / "key.json").exists():
            read_key(self)
            return self
        if not source.exists():
            raise PoiseError(no_such_file(source))
        if source.is_dir():
            refuse_other_run(source)
        elif self.rungs != Config.rungs:
            raise PoiseError(f"--rungs is only read with a run; {source} is a file, which has its own")
        refuse_other_files(Path(self.output))
        if not source.is_dir():
            draw(read_ladder(self.source), self.per_rung, self.seed)
        return self


def read_key(config: Config) -> Json:
    """OUTPUT/key.json. Raises PoiseError for comparisons of another source, or that were drawn in another way."""
    out = Path(config.output)
    key = read_object(out / "key.json")
    if not same_value(key.get("source"), config.source):
        raise PoiseError(f"--output {out} holds comparisons of {key.get('source')}; choose another folder")
    for name, value in config.how_drawn().items():
        if key.get(name, value) != value:  # earlier versions did not write it down
            raise PoiseError(
                f"--output {out} holds comparisons that were drawn with another --{name.replace('_', '-')} "
                f"({shown(key[name])}); choose another folder"
            )
    return key


def refuse_other_files(out: Path) -> None:
    """Raise PoiseError for a folder that holds something else than comparisons that are not drawn to the end."""
    mine = {MARK, "ladder.jsonl", "comparisons.jsonl"}  # a killed process may have left them
    if out.is_dir() and any(path.name not in mine and not is_leftover(path.name) for path in out.iterdir()):
        raise PoiseError(f"--output {out} holds other files; choose another folder or delete it")


def refuse_other_run(run: Path) -> None:
    """Raise PoiseError for a folder that is no policy run."""
    if not all((run / name).exists() for name in ("samples.jsonl", "config.yaml")):
        why = told_of(run) if told_of(run) != "a run of `poise train-policy`" else ""
        why = f"it is {why}" if why else "it has no samples.jsonl"
        raise PoiseError(f"{run} is no `poise train-policy` run: {why}")
