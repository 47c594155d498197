"""The arms of a study: which reward model, which objective, and what differs from the study's policy settings."""

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from poise.policy.config import Config as PolicySettings
from poise.runtime.run_folder import Json
from poise.runtime.settings import bounds

if TYPE_CHECKING:
    from poise.functional.overoptimization import Choice


class Arm(NamedTuple):
    """One kind of policy in a comparison.

    reward: folder of the reward model in a `poise train-reward` run.
    objective: as `poise train-policy` takes it.
    label: a few words for tables.
    changes: policy settings in which the arm differs.
    kl_factor: multiplies kl_coef.
    only_policy: the arm differs from another only in how a policy is trained, so best-of-n leaves it out.
    """

    reward: str
    objective: str
    label: str
    changes: Json = {}  # noqa: RUF012  no arm modifies it
    kl_factor: float = 1.0
    only_policy: bool = False

    def applied(self, policy: PolicySettings) -> PolicySettings:
        """The study's policy settings with the arm's differences."""
        return replace(policy, objective=self.objective, kl_coef=policy.kl_coef * self.kl_factor, **self.changes)

    def choice(self, policy: PolicySettings) -> "Choice":
        """The arm's reward for best-of-n, with the shaping and ceiling that its policies have."""
        from poise.functional.overoptimization import Choice  # only here: it imports torch

        settings = self.applied(policy)
        _, ceiling = bounds(settings.reward_floor, settings.reward_ceiling)
        # arXiv 2310.02743 uses another coefficient for best-of-n than for PPO.
        objective = "uncertainty_weighted(0.5)" if self.objective.startswith("uncertainty") else self.objective
        return Choice(self.reward, objective, settings.shaping, ceiling)


ARMS: dict[str, Arm] = {
    "single": Arm("single", "nominal", "conventional: one Bradley–Terry head"),
    "single_large_kl": Arm(
        "single", "nominal", "the same with twenty times the KL coefficient", kl_factor=20.0, only_policy=True
    ),
    "mean": Arm("ensemble", "mean", "ensemble of Bradley–Terry heads: mean"),
    "worst_case": Arm("ensemble", "worst_case", "ensemble: worst case (WCO)"),
    "uncertainty_weighted": Arm("ensemble", "uncertainty_weighted(0.1)", "ensemble: mean − c·variance (UWO)"),
    "lower_confidence": Arm("ensemble", "lower_confidence(1)", "ensemble: mean − std"),
    "soft_min": Arm("ensemble", "soft_min(0.5)", "ensemble: soft minimum"),
    "contrastive": Arm("single", "nominal", "single, minus the prompt's baselines", {"shaping": "contrastive"}),
    "par": Arm("single", "nominal", "single: probability of beating the baselines", {"shaping": "par"}),
    "bayesian": Arm("posterior", "lower_confidence(1)", "Bayesian last layer: lower bound of posterior heads"),
    "settle": Arm(
        "posterior", "lower_confidence(1)", "the same, at most +2, settling there",
        {"reward_ceiling": 2.0, "settle": True},
    ),
    **{
        f"brme_{weight:g}": Arm("brme", f"tradeoff({weight:g})", f"BRME, λ = {weight:g}")
        for weight in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    },
    "brme_large_kl": Arm(
        "brme", "tradeoff(0.4)", "BRME, λ = 0.4, with twenty times the KL coefficient", kl_factor=20.0, only_policy=True
    ),
    "brme_mean": Arm("brme", "mean", "BRME heads: mean instead of the lowest std"),
    "brme_random": Arm("brme", "random_head", "BRME heads: a random one instead of the lowest std"),
    "brme_adaptive": Arm(
        "brme", "tradeoff(0.4)", "BRME, λ = 0.4, halved at every alarm", {"on_alarm": "pessimism"}, only_policy=True
    ),
    "constant": Arm("single", "constant(0)", "control: a constant reward"),
}  # fmt: skip
