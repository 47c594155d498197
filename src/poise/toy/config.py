"""The settings of `poise toy`."""

from dataclasses import dataclass
from typing import Annotated

from poise.errors import PoiseError
from poise.runtime.settings import Count, NotNegative, Seed, Settings, between


@dataclass(frozen=True)
class Config(Settings):
    """PPO and robust objectives where the optimum is known: eight prompts, eight one-token responses."""

    RUN_FOLDER = True

    output: str = "runs/toy"
    """Run folder to write."""
    num_seeds: Count = 20
    """Worlds, each with a reference policy, a true reward, preferences and heads of its own."""
    first_seed: Seed = 0
    """The worlds are those of first_seed, first_seed + 1, and so on."""
    num_steps: Count = 200
    """PPO steps."""
    samples_per_prompt: Count = 64
    """Responses sampled of every prompt in a step."""
    kl_coef: NotNegative = 0.5
    """β where the reward is known; its std is 1."""
    heads_kl_coef: NotNegative = 0.25
    """β where heads give the reward: lower, so that their errors are pressed on."""
    num_heads: Count = 5
    """Gaussian heads of a reward model."""
    pairs_per_prompt: Count = 32
    """Preference pairs, among the responses that were seen."""
    label_noise: Annotated[float, between(0, 0.5)] = 0.0
    """Share of the preferences that are flipped."""

    def check(self) -> None:
        """As `Settings.check`, and that there is a KL penalty."""
        super().check()
        for name in ("kl_coef", "heads_kl_coef"):
            if getattr(self, name) <= 0:
                raise PoiseError(
                    f"--{name.replace('_', '-')} must be > 0: without KL there is no optimum to compare with"
                )
