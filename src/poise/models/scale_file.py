"""The file that keeps a reward's zero and unit, so that runs, restarts and replicas have the same reward."""

import contextlib
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from poise.errors import PoiseError
from poise.functional.objectives import RewardScale
from poise.runtime.records import read_object
from poise.runtime.run_folder import write_json


@dataclass(frozen=True)
class _Owner:
    """Whose scale a file holds, beside the fields of a RewardScale."""

    objective: str
    reward: str | None = None


@dataclass(frozen=True)
class ScaleFile:
    """The scale of one reward: an objective over the heads of one reward model.

    reward: a hash of the reward model's heads. floor, ceiling: bounds of the reward, in its stds.
    """

    path: Path
    objective: str
    reward: str
    num_heads: int
    floor: float = -math.inf
    ceiling: float = math.inf

    def read(self) -> RewardScale | None:
        """The constants in the file; None if there is no file. PoiseError for those of another reward."""
        if not self.path.exists():
            return None
        try:
            saved = read_object(self.path, _Owner)
            objective, reward = saved.pop("objective"), saved.pop("reward", None)  # absent in files of earlier versions
            scale = RewardScale.from_json(saved)
        except PoiseError as error:
            raise PoiseError(f"{self.path} does not hold the scale of a reward: {error}") from None
        found = (objective, len(scale.head_baseline), scale.floor, scale.ceiling)
        if found != (self.objective, self.num_heads, self.floor, self.ceiling):
            raise PoiseError(
                f"{self.path} holds the scale of {objective} of {len(scale.head_baseline)} heads from {scale.floor} "
                f"to {scale.ceiling}, not of {self.objective} of {self.num_heads} from {self.floor} to {self.ceiling}"
            )
        if reward is not None and reward != self.reward:
            raise PoiseError(f"{self.path} holds the scale of another reward model: give another file")
        return scale

    def keep(self, scale: RewardScale) -> RewardScale:
        """Write the file, unless another process wrote it first; returns what the file holds then."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.path.parent) as scratch:
            new = Path(scratch) / "scale.json"
            write_json(new, {"objective": self.objective, "reward": self.reward, **scale.to_json()})
            with contextlib.suppress(FileExistsError):
                os.link(new, self.path)
        return self.read() or scale
