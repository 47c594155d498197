"""The settings of `poise choose`; torch is not imported to read them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from poise.data.files import no_such_file
from poise.errors import PoiseError
from poise.runtime.settings import Count, Positive, Seed, between
from poise.studies.judge_settings import JudgeSettings


@dataclass(frozen=True)
class Config(JudgeSettings):
    """How far to train, from few labels: blind side-by-side comparisons with the start, at a ladder of KL.

    The first call writes OUTPUT/comparisons.jsonl (`id`, `prompt`, `a`, `b`). Judge them into OUTPUT/judgments.jsonl, a
    row each of `id` and `better` (a, b or tie); which side is the policy is in OUTPUT/key.json, for no judge to see.
    The same command then says which rung to take, and how many labels more would decide.
    """

    source: tyro.conf.Positional[str]
    """Source of the completions: a `poise train-policy` run by PPO; or a file with `prompt`, `completion` and
    `kl` in each row, kl 0 for the start's."""
    output: str = "runs/choose"
    """Folder to write."""
    rungs: tuple[Positive, ...] = (5.0, 10.0, 20.0, 40.0)
    """KL to the start of each rung, in nats, that a run is asked at; those it did not reach are left out. A file has
    its own."""
    per_rung: Count = 40
    """Comparisons of each rung."""
    delta: Annotated[float, between(0, 0.5, open_low=True, open_high=True)] = 0.05
    """How much win rate against the start may be lost to go further: the largest KL within that of the best is
    taken."""
    seed: Seed = 0
    """Of the comparisons that are drawn, their order and their sides."""

    def for_command(self) -> "Config":
        """As `Settings.for_command`: before the comparisons are drawn, the source is a run of PPO or a file."""
        source = Path(self.source)
        if (Path(self.output) / "key.json").exists():
            return self
        if not source.exists():
            raise PoiseError(no_such_file(source))
        if source.is_dir():
            refuse_other_run(source)
        return self


def refuse_other_run(run: Path) -> None:
    """Raise PoiseError for a folder that is no run of PPO."""
    if not all((run / name).exists() for name in ("samples.jsonl", "config.yaml")):
        raise PoiseError(f"{run} is no `poise train-policy` run by PPO: it has no samples.jsonl")
