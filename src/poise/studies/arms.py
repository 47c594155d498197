"""The arms of a study: which reward model, which objective, and how training departs from the study's settings."""

import math
from typing import NamedTuple

from poise.functional.overoptimization import Choice
from poise.runtime.run_folder import Json


class Arm(NamedTuple):
    """What one policy of the study is trained on, and how far from the study's settings."""

    reward: str
    objective: str
    label: str
    changes: Json = {}  # noqa: RUF012  of the policy's config
    kl_factor: float = 1.0
    # Such an arm differs from another in how a policy is trained: best-of-n cannot tell them apart.
    only_policy: bool = False

    def choice(self) -> Choice:
        """The same reward for best-of-n."""
        ceiling = self.changes.get("reward_ceiling", math.inf)
        # arXiv 2310.02743 takes another coefficient where nothing is trained
        objective = "uncertainty_weighted(0.5)" if self.objective.startswith("uncertainty") else self.objective
        return Choice(self.reward, objective, self.changes.get("shaping", "none"), ceiling)


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
    "contrastive": Arm("single", "nominal", "single, less the prompt's baselines", {"shaping": "contrastive"}),
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
