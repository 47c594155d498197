"""What is told of scored completions, by name: the same columns from `poise score`, `poise serve` and Ray Data."""

from torch import Tensor

from poise.functional.objectives import (
    HeadRewards,
    disagreement,
    nominal,
    nominal_head,
    routing_std,
    total_std,
    worst_case,
)
from poise.models.reward_model import HeadLayout

PER_HEAD = ("mean", "std")


def score_columns(heads: HeadRewards, layout: HeadLayout, reward: Tensor) -> dict[str, Tensor]:
    """Columns of N completions, (N,) each; `mean` and `std` are (N, K).

    heads: (N, K), in reward units.   layout: of the reward model, whose `std_scale` makes `total_std` an error bar.
    reward: (N,), what an objective made of the heads.

    reward         the objective's
    nominal        mean of the head with the lowest std, `nominal_head`
    worst_case     lowest mean;   gap = nominal - worst_case
    disagreement   std of the means over heads;   routing_std: lowest std;   total_std: both, calibrated
    distance       from the reference texts, where the checkpoint has some
    """
    columns = {
        "reward": reward,
        "nominal": nominal(heads),
        "worst_case": worst_case(heads),
        "gap": nominal(heads) - worst_case(heads),
        "nominal_head": nominal_head(heads),
        "disagreement": disagreement(heads),
        "routing_std": routing_std(heads),
        "total_std": total_std(layout.calibrated(heads)),
    }
    far = {} if heads.distance is None else {"distance": heads.distance.squeeze(-1)}
    return columns | far | {"mean": heads.mean, "std": heads.std}
