"""Stage 2 with all K heads in one product and one optimizer, against one head after another.

    python benchmarks/train_heads.py [--repeats 5]

`poise.reward.heads.train_heads` trains 20 Gaussian heads together on 4,000 pairs of 576 cached features, float64, 200
steps.
The loop does the same work per head: same first weights, masks, loss, noise, steps and evaluations, an Adam for each.
First it is checked that both end in the same weights. Prints JSON; dated results lie in results/.

Two threads need a quiet machine: where another process holds a core, every small operation waits for it, and both ways
take several times as long as on one thread.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from poise.functional.reward_losses import sampled_mse
from poise.models.reward_model import HeadLayout
from poise.reward.heads import Heads, Targets, train_heads
from poise.reward.pairs import FeaturePairs
from poise.reward.shards import Shards, make_shards
from poise.runtime.progress import console
from poise.runtime.run_folder import environment

PAIRS, HELD, HIDDEN, HEADS, STEPS, RATE, INITIAL_STD, EVALUATE = 4000, 1000, 576, 20, 200, 3e-3, 0.1, 20

Noise = Callable[[int, int], Tensor]  # (step, head) -> (texts, 1)


def make_problem() -> tuple[FeaturePairs, FeaturePairs, Targets, Shards]:
    generator = torch.Generator().manual_seed(0)

    def pairs(count: int) -> FeaturePairs:
        chosen, rejected = torch.randn(2, count, HIDDEN, generator=generator, dtype=torch.float64)
        return FeaturePairs(chosen, rejected, torch.zeros(count, dtype=torch.float64))

    fit, held = pairs(PAIRS), pairs(HELD)
    weight = torch.randn(1, HIDDEN, generator=generator, dtype=torch.float64) / HIDDEN**0.5
    targets = Targets.of(Heads(weight, torch.zeros(1, dtype=torch.float64), "point"), fit, held)
    return fit, held, targets, make_shards("bootstrap", fit, held, HEADS, generator)


def one_after_another(
    fit: FeaturePairs, held: FeaturePairs, targets: Targets, shards: Shards, initial: Tensor, noise: Noise
) -> list[Tensor]:
    """Weights (2K, hidden) at each evaluation."""
    layout = HeadLayout(1, "gaussian", (0.0, 0.0))
    texts, held_texts = fit.texts_NH, held.texts_NH
    target, held_target = targets
    snapshots = [torch.empty_like(initial) for _ in range(STEPS // EVALUATE)]
    for head in range(HEADS):
        mask_T1 = shards.fit_NK[:, head : head + 1].repeat(2, 1).double()
        weight = initial[[head, HEADS + head]].clone().requires_grad_()
        bias = torch.zeros(2, dtype=texts.dtype, requires_grad=True)
        optimizer = torch.optim.Adam([weight, bias], lr=RATE)
        for step in range(STEPS):
            heads = layout.decode(texts @ weight.T + bias)
            loss = sampled_mse(heads.mean, heads.std, noise(step, head), target, mask_T1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % EVALUATE == EVALUATE - 1:
                with torch.no_grad():
                    heads = layout.decode(held_texts @ weight.T + bias)
                nothing, everything = torch.zeros_like(heads.mean), torch.ones_like(heads.mean)
                sampled_mse(heads.mean, heads.std, nothing, held_target, everything).item()
                snapshots[step // EVALUATE][[head, HEADS + head]] = weight.detach()
    return snapshots


def largest_difference(fit: FeaturePairs, held: FeaturePairs, targets: Targets, shards: Shards) -> tuple[float, float]:
    """(between the weights of both ways, when fed the same noise; how far training moved them)."""
    heads, history = train(fit, held, targets, shards)
    generator = torch.Generator().manual_seed(1)  # the draws of train_heads, in its order
    initial = first_weights(generator)
    drawn = [torch.randn(2 * PAIRS, HEADS, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    snapshots = one_after_another(fit, held, targets, shards, initial, lambda step, k: drawn[step][:, k : k + 1])
    best = min(range(len(history)), key=lambda i: history[i]["loss"])
    weight = heads.weight_LH
    return (weight - snapshots[best]).abs().max().item(), (weight - initial).abs().max().item()


def train(
    fit: FeaturePairs, held: FeaturePairs, targets: Targets, shards: Shards
) -> tuple[Heads, list[dict[str, float]]]:
    generator = torch.Generator().manual_seed(1)
    return train_heads(
        fit, held, targets, shards, generator, loss_name="sampled_mse", num_steps=STEPS, learning_rate=RATE,
        initial_std=INITIAL_STD,
    )  # fmt: skip


def first_weights(generator: torch.Generator) -> Tensor:
    weight = torch.randn(2 * HEADS, HIDDEN, generator=generator, dtype=torch.float64) * INITIAL_STD
    weight[HEADS:] = 0.0
    return weight


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def products(fit: FeaturePairs, columns: int) -> float:
    """Seconds of the matrix products alone: per step, texts times weights and the gradient of the weights."""
    texts, weight = fit.texts_NH, torch.randn(columns, HIDDEN, dtype=torch.float64)
    return seconds(lambda: [(texts @ weight.T).T @ texts for _ in range(STEPS)])


def measure(fit: FeaturePairs, held: FeaturePairs, targets: Targets, shards: Shards, repeats: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(1)

    def noise(_step: int, _head: int) -> Tensor:
        return torch.randn(2 * PAIRS, 1, generator=generator, dtype=torch.float64)

    together, loop = [], []
    for _ in range(repeats):
        together.append(seconds(lambda: train(fit, held, targets, shards)))
        initial = first_weights(generator)
        loop.append(seconds(lambda first=initial: one_after_another(fit, held, targets, shards, first, noise)))
    ratios = sorted(b / a for a, b in zip(together, loop, strict=True))
    return {
        "together_s": round(statistics.median(together), 2),
        "one_after_another_s": round(statistics.median(loop), 2),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_range": [round(ratios[0], 2), round(ratios[-1], 2)],
        "matrix_products_together_s": round(products(fit, 2 * HEADS), 2),
        "matrix_products_one_after_another_s": round(HEADS * products(fit, 2), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    console.quiet = True
    problem = make_problem()
    difference, moved = largest_difference(*problem)
    assert difference < 1e-8, f"the two ways end in different weights: {difference}"
    report: dict[str, object] = {
        "largest_difference_of_weights": difference,
        "largest_move_of_weights": round(moved, 3),
    }
    for threads in (1, 2):
        torch.set_num_threads(threads)
        train(*problem)  # warm up
        report[f"threads_{threads}"] = measure(*problem, options.repeats)
    report |= {
        "setting": f"{HEADS} Gaussian heads, {PAIRS} pairs x {HIDDEN} features, float64, {STEPS} steps, sampled_mse; "
        f"medians of {options.repeats} runs, in turns",
        "environment": environment() | {"cores": os.cpu_count(), "command": ["train_heads.py"]},
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
