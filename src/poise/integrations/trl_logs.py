"""The metrics of a policy run in TRL's logs: what a reward adds to them, and how they are read back."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from poise.data.types import Prompt, Sample
from poise.functional.monitor import text_signs
from poise.functional.objectives import HeadRewards, disagreement, nominal, nominal_head, routing_std, worst_case
from poise.runtime.run_folder import Json

_PLAIN = {
    "reward": "reward", "reward_std": "reward_std", "entropy": "entropy", "tokens": "completions/mean_length",
    "policy_loss": "loss", "grad_norm": "grad_norm", "clipped": "clip_ratio/region_mean",
    **{
        name: f"poise/{name}"
        for name in (
            "nominal", "worst_case", "gap", "disagreement", "routing_std", "switches", "repetition", "variety",
            "truncated", "distance", "validator", "transfer", "kl", "kl_k3",
        )
    },
}  # fmt: skip


def policy_metrics(logs: Mapping[str, Any]) -> Json:
    """What TRL logged, under the names of a policy run's metrics; what it did not log is left out.

    kl: nats per completion, as in PPO, where a `KLBudgetCallback` measures it. Without one: TRL's mean per token times
    the mean length. RLOO estimates that when it samples, by log π − log π_ref; GRPO over its updates, by the estimator
    that is never negative.
    """
    found: Json = {ours: logs[theirs] for ours, theirs in _PLAIN.items() if logs.get(theirs) is not None}
    if "kl" not in found and logs.get("kl") is not None and "tokens" in found:
        found["kl"] = logs["kl"] * found["tokens"]
    if logs.get("completions/clipped_ratio") is not None:
        found["ended"] = 1 - logs["completions/clipped_ratio"]
    num_heads = sum(name.startswith("poise/head_") for name in logs)
    return found | ({"heads": [logs[f"poise/head_{k}"] for k in range(num_heads)]} if num_heads else {})


def statistics(samples: Sequence[Sample], centered: HeadRewards) -> dict[str, float]:
    """Means over a batch of centered heads (N, K), under the names of a policy run's metrics."""
    signals = {
        "nominal": nominal(centered),
        "worst_case": worst_case(centered),
        "gap": nominal(centered) - worst_case(centered),
        "disagreement": disagreement(centered),
        "routing_std": routing_std(centered),
    } | ({} if centered.distance is None else {"distance": centered.distance})
    return {
        **{name: signal.mean().item() for name, signal in signals.items()},
        "switches": switches([sample.prompt for sample in samples], nominal_head(centered).tolist()),
        **text_signs([sample.completion for sample in samples]),
        **{f"head_{k}": value for k, value in enumerate(centered.mean.mean(0).tolist())},
    }


def switches(prompts: Sequence[Prompt], heads: Sequence[int]) -> float:
    """Share of completions whose nominal head is not the most frequent one among their prompt's completions.

    RLOO and GRPO compare a prompt's completions with one another; where the nominal head switches among them, part of
    the difference is that of two heads.

    >>> switches(["a", "a", "a", "b", "b"], [0, 0, 1, 2, 2])
    0.2
    """
    groups: dict[str, Counter[int]] = {}
    for prompt, head in zip(prompts, heads, strict=True):
        groups.setdefault(json.dumps(prompt), Counter())[head] += 1
    return (len(heads) - sum(max(counts.values()) for counts in groups.values())) / len(heads)
