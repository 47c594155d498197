"""The policies that a run keeps as it moves away from its start: one at each rung of KL, and a validator's best.

RUN/ladder/kl-5    the first policy whose completions had a KL of 5 nats or more, as RUN/policy is saved
RUN/ladder.jsonl   rung, step and measured KL of each
RUN/best           the policy that the validator likes best, with its step, KL and mark in best.json
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from poise.runtime.folders import write_folder_atomic
from poise.runtime.records import checked, parse_json, read_rows
from poise.runtime.run_folder import Json, append_jsonl, is_main_process, keep_rows_before, write_json
from poise.runtime.settings import NotNegative, WholeNumber

FILE, FOLDER = "ladder.jsonl", "ladder"
BEST, MARK = "best", "best.json"
Weights = TypeVar("Weights")


@dataclass(frozen=True)
class RungRow:
    """A row of ladder.jsonl: the policy kept at a rung of KL, the step it sampled in, and its measured KL, in nats."""

    step: WholeNumber
    rung: NotNegative
    kl: float


@dataclass(frozen=True)
class BestMark:
    """RUN/best/best.json: of the policy that the validator likes best."""

    step: WholeNumber
    kl: float
    validator: float


class Ladder:
    """rungs: nats of KL, of a whole completion. reached: the highest so far; every process knows it."""

    def __init__(self, folder: Path, rungs: Sequence[float]):
        self.folder, self.rungs, self.reached = folder, sorted(set(rungs)), 0.0

    def keep(self, step: int, kl: float, weights: Callable[[], Weights], save: Callable[[str, Weights], None]) -> None:
        """Save the policy if its KL has passed a rung that no earlier one had; of several rungs, at the highest.

        kl: of the completions that this very policy has sampled at `step`. weights: gives what is to be saved; called
        by all processes together. save: writes it into a folder; called by the main process alone.
        All processes call `keep` together.
        """
        passed = max((rung for rung in self.rungs if rung <= kl), default=0.0)
        if passed <= self.reached:
            return
        self.reached, kept = passed, weights()
        if is_main_process():
            with write_folder_atomic(_place(self.folder, passed)) as scratch:
                save(str(scratch), kept)
            append_jsonl(self.folder / FILE, [{"step": step, "rung": passed, "kl": kl}])

    def drop_from(self, step: int) -> None:
        """Delete the policies kept at `step` or later, as after a return to an earlier one."""
        path = self.folder / FILE
        keep_rows_before(path, step)
        listed = {_place(self.folder, row["rung"]) for row in read_rows(path, RungRow)} if path.exists() else set()
        for place in (self.folder / FOLDER).glob("kl-*"):
            if place not in listed:
                shutil.rmtree(place)


class Best:
    """The policy that a validator likes best. Every process knows the marks; one writes.

    A policy's mark is the validator's gain since the start, mean over its own completions and those of the step before:
    a single step's mean is noisy, and the largest of many is the luckiest. best: the largest so far, at least 0, the
    start's. last: gain of the last step.
    """

    def __init__(self, run: Path):
        self.run, self.best = run, 0.0
        self.last: float | None = None

    def keep(
        self, step: int, kl: float, gain: float, weights: Callable[[], Weights], save: Callable[[str, Weights], None]
    ) -> None:
        """Save the policy, over the one before, if its mark is the largest so far.

        kl: nats of a completion. gain: of the validator, on the completions that this very policy sampled at `step`.
        weights and save: as of `Ladder.keep`. All processes call it together, at every step.
        """
        mark, self.last = None if self.last is None else (self.last + gain) / 2, gain
        if mark is None or mark <= self.best:
            return
        self.best, kept = mark, weights()
        if is_main_process():
            with write_folder_atomic(self.run / BEST) as scratch:
                save(str(scratch), kept)
                write_json(scratch / MARK, {"step": step, "kl": kl, "validator": mark})

    def state(self) -> tuple[float | None, ...]:
        """For a checkpoint. A run that goes on from it writes RUN/best again where it had."""
        return (self.best, self.last)

    def restore(self, state: Sequence[float | None]) -> None:
        """Inverse of `state`; an empty one is of a version that kept no best."""
        if state:
            self.best, self.last = state[0] or 0.0, state[1]


def best_of(run: Path) -> Json | None:
    """Step, KL and mark of the policy in RUN/best; None if there is none."""
    path = run / BEST / MARK
    return checked(parse_json(path.read_text(encoding="utf-8")), BestMark, str(path)) if path.exists() else None


def above_budget(step: int, kl: float, limit: float, option: str = "--max-kl") -> str:
    """What a run says that ends because the KL of a step's completions is above the budget.

    >>> above_budget(7, 21.34, 20.0)
    'step 7: KL 21.3 is above --max-kl 20; going back to a checkpoint below'
    """
    return f"step {step}: KL {kl:.1f} is above {option} {limit:g}; going back to a checkpoint below"


def kept_policies(run: Path) -> dict[float, Path]:
    """The policies that a run kept, by their measured KL in nats, of three digits."""
    return {float(f"{row['kl']:.3g}"): place for place, row in _rungs(run).items()}


def kept_on_the_way(run: Path) -> dict[Path, str]:
    """The folders of the policies that a run kept beside RUN/policy, with what each is, as a sentence."""
    found = {
        place: f"The policy of step {row['step']}, kept as the first whose KL reached {row['rung']:g} nats: it has "
        f"{row['kl']:.1f}."
        for place, row in _rungs(run).items()
    }
    if best := best_of(run):
        found[run / BEST] = (
            f"The policy of step {best['step']}, kept because its validator likes it best: by {best['validator']:+.2f} "
            f"stds more than the start, at KL {best['kl']:.1f} nats."
        )
    return found


def _rungs(run: Path) -> dict[Path, Json]:
    """Folder and row of each policy in RUN/ladder."""
    path = run / FILE
    rows = read_rows(path, RungRow) if path.exists() else ()
    return {place: row for row in rows if (place := _place(run, row["rung"])).is_dir()}


def _place(run: Path, rung: float) -> Path:
    return run / FOLDER / f"kl-{rung:g}"
