"""A validator: another reward model that watches a run (--validator). Nothing is trained on what it says."""

from collections.abc import Sequence
from pathlib import Path

from poise.data.types import Prompt
from poise.errors import PoiseError
from poise.functional.monitor import transfer_ratio
from poise.functional.objectives import HeadRewards, Objective, RewardScale, mean
from poise.models.run_heads import refuse_itself, validator_of
from poise.models.scorer import Scorer, generated
from poise.runtime.progress import console
from poise.runtime.run_folder import Json, is_main_process


def say_validator(path: str, off: str) -> None:
    """Say that the validator of the reward's own run is watched. off: what turns it off."""
    console.print(
        f"validator: {path}, trained with the reward model on other pairs, is watched; {off} turns it off",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def validator_for(path: str, validator: str | Path | None) -> str | None:
    """The validator of the reward at `path`: the one that is given, or where that is "" the run's own, said in a line.

    Raises PoiseError for the reward model itself, and for what is no name.
    """
    if validator is not None and not isinstance(validator, (str, Path)):
        raise PoiseError(f"a validator is the name of a reward model, not {type(validator).__name__}")
    if validator is None:
        return None
    if validator:
        refuse_itself(str(validator), path)
    elif found := validator_of(path):
        if is_main_process():
            say_validator(found, "validator=None")
        return found
    return str(validator)


class Validator:
    """Scores the run's completions, on the scale of the initial policy's. Of several heads it takes the mean.

    objective: of the reward that is trained on, at the start of the run.
    """

    def __init__(self, path: str, objective: Objective):
        self.path, self.scorer, self.objective = path, Scorer.load(path), objective
        self.own = self.proxy = RewardScale((), 0.0, 1.0)

    def heads(self, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]) -> HeadRewards:
        """Heads (N, K) of each prompt's completions. Raises PoiseError for one that is not finite."""
        heads = self.scorer([generated(p, text) for p, row in zip(prompts, texts, strict=True) for text in row])
        if not heads.mean.isfinite().all():
            raise PoiseError(f"the validator {self.path} gives a completion a reward that is not finite")
        return heads

    def fit(self, own: HeadRewards, proxy: HeadRewards) -> None:
        """Take the units of both rewards from the initial policy's completions."""
        self.own, self.proxy = RewardScale.fit(own, mean), RewardScale.fit(proxy, self.objective)

    def metrics(self, own: HeadRewards, proxy: HeadRewards, num_prompts: int) -> Json:
        """Of one step: the validator's gain since the start, in stds, and the transfer ratio where it is defined.

        num_prompts: whose completions they are. Those of one prompt are alike: not they, prompts are independent.
        """
        gain = self.own.combine(own, mean).mean().item()
        ratio = transfer_ratio(self.proxy.combine(proxy, self.objective).mean().item(), gain, num_prompts)
        return {"validator": gain} | ({} if ratio is None else {"transfer": ratio})

    def state(self) -> Json:
        """For a checkpoint."""
        return {"own": self.own.to_json(), "proxy": self.proxy.to_json()}

    def restore(self, state: Json) -> None:
        """Inverse of `state`."""
        self.own, self.proxy = RewardScale.from_json(state["own"]), RewardScale.from_json(state["proxy"])
