"""The policies that a PPO run keeps as it moves away from its start: one at each rung of KL.

RUN/ladder/kl-5    the first policy whose completions had a KL of 5 nats or more, as RUN/policy is saved
RUN/ladder.jsonl   rung, step and measured KL of each
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from poise.models.policy import Policy
from poise.policy.formats import RungRow
from poise.runtime.folders import write_folder_atomic
from poise.runtime.records import read_rows
from poise.runtime.run_folder import append_jsonl, is_main_process

FILE, FOLDER = "ladder.jsonl", "ladder"


class Ladder:
    """rungs: nats of KL, of a whole completion. reached: the highest so far; every process knows it."""

    def __init__(self, folder: Path, rungs: Sequence[float]):
        self.folder, self.rungs, self.reached = folder, sorted(set(rungs)), 0.0

    def keep(self, policy: Policy, step: int, kl: float) -> None:
        """Save the policy if its KL has passed a rung that no earlier one had; of several rungs, at the highest.

        kl: of the completions that this very policy has sampled at `step`. All processes call it together.
        """
        passed = max((rung for rung in self.rungs if rung <= kl), default=0.0)
        if passed <= self.reached:
            return
        self.reached, weights = passed, policy.weights()
        if is_main_process():
            with write_folder_atomic(_place(self.folder, passed)) as scratch:
                policy.save(str(scratch), weights)
            append_jsonl(self.folder / FILE, [{"step": step, "rung": passed, "kl": kl}])

    def drop_unlisted(self) -> None:
        """Delete the policies whose rows are gone, as after a return to an earlier step."""
        path = self.folder / FILE
        listed = {_place(self.folder, row["rung"]) for row in read_rows(path, RungRow)} if path.exists() else set()
        for place in (self.folder / FOLDER).glob("kl-*"):
            if place not in listed:
                shutil.rmtree(place)


def kept_policies(run: Path) -> dict[float, Path]:
    """The policies that a run kept, by their measured KL in nats, of three digits."""
    path = run / FILE
    rows = read_rows(path, RungRow) if path.exists() else ()
    places = {float(f"{row['kl']:.3g}"): _place(run, row["rung"]) for row in rows}
    return {kl: place for kl, place in places.items() if place.is_dir()}


def _place(run: Path, rung: float) -> Path:
    return run / FOLDER / f"kl-{rung:g}"
