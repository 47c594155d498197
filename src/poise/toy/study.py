"""`poise toy`: the study where everything is known.

A prompt has eight responses of one token, so the optimum of the RLHF objective, pi* ~ pi_ref exp(r / beta), is a table.
What PPO reaches, by the equations that train language models, is held against it: with a known reward, with noise on
it, with one response scored wrongly, and with the heads of a reward model that has never seen some of the responses.

    RUN/results.json   every table: exactness, constant, statements, heads, objectives
    RUN/toy.png        wrong scores and unseen responses as a picture (cli/toy.py)

Shapes: _W worlds (one per seed), _P prompts, _A responses.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from poise.functional.objectives import (
    HeadRewards,
    Objective,
    disagreement,
    nominal,
    parse_objective,
    routing_std,
    total_std,
)
from poise.functional.statistics import auroc, mean_interval
from poise.runtime.progress import progress
from poise.runtime.run_folder import Json, Run
from poise.toy import bandit
from poise.toy import unseen_responses as blind_spots
from poise.toy.bandit import (
    Responses,
    ToyPolicy,
    exact_kl,
    exact_optimum,
    expected,
    log_probabilities,
    new_policy,
    stack,
    total_variation,
)
from poise.toy.config import Config
from poise.toy.unseen_responses import PROMPTS, RESPONSES, Worlds

TABLE, NETWORK = (PROMPTS, RESPONSES), (PROMPTS, 32, 32, RESPONSES)
GRADIENT_BATCHES, GRADIENT_SAMPLES, NOISE_STD, ERRORS = 400, 16, 1.0, (0.5, 1.0, 2.0, 4.0)
KL_COEFS, SCALE_SAMPLES = (1.0, 0.5, 0.25, 0.1), 512
OBJECTIVES = (
    "mean", "worst_case", "tradeoff(0.2)", "tradeoff(0.4)", "tradeoff(0.6)", "tradeoff(0.8)", "nominal",
    "uncertainty_weighted(0.5)", "lower_confidence(1)", "soft_min(0.5)",
)  # fmt: skip


Train = Callable[[ToyPolicy, Responses, Callable[[Tensor, Tensor], Tensor], float], Responses]
Seeds = Float[Tensor, " worlds"]


def run(config: Config) -> Run:
    """All studies; a finished run is returned as it is."""
    config.check()
    out = Run.open(config.output, config)
    if out.results is not None:
        return out
    started = time.monotonic()
    with progress("toy", 5 * config.num_steps) as advance:
        train = trainer(config, advance)
        results = {
            **known_reward(config, train),
            "statements": wrong_rewards(config, train),
            **unseen_responses(config, train),
        }
    out.finish({**results, "seconds": round(time.monotonic() - started, 1)})
    return out


def trainer(config: Config, advance: Callable[..., None]) -> Train:
    """`bandit.train` with the config's settings."""
    return partial(
        bandit.train, num_steps=config.num_steps, num_samples=config.samples_per_prompt, seed=config.first_seed,
        advance=advance,
    )  # fmt: skip


def generators(config: Config) -> list[torch.Generator]:
    """One for each world: a seed gives the same world whatever other seeds are run."""
    return [torch.Generator().manual_seed(config.first_seed + i) for i in range(config.num_seeds)]


def interval(values: Seeds | ndarray) -> Json:
    """Mean over seeds with its 95 % interval: Student's of few, a bootstrap of many; of one seed it has no width."""
    values = np.asarray(values, dtype=float)
    low, high = mean_interval(values) if len(values) > 1 else (values.mean(), values.mean())
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


# ---- a known reward ----


def known_reward(config: Config, train: Train) -> Json:
    """How far PPO ends from the optimum; and from the reference policy if the reward is 1 for everything."""
    found = {name: _known_reward(sizes, config, train) for name, sizes in (("table", TABLE), ("network", NETWORK))}
    return {part: {name: parts[part] for name, parts in found.items()} for part in ("exactness", "constant")}


def _known_reward(sizes: tuple[int, ...], config: Config, train: Train) -> dict[str, Json]:
    """Three trainings of every world, side by side: to the true reward, to a constant one, to that from elsewhere."""
    worlds = generators(config)
    start, elsewhere = (stack([new_policy(sizes, world) for world in worlds]) for _ in range(2))
    gold = torch.stack([torch.randn(TABLE, generator=world) for world in worlds])
    reference = log_probabilities(start)
    reward = torch.cat([gold, torch.ones_like(gold), torch.ones_like(gold)])
    kl_on_the_way = []

    def score(logprob: Tensor, drawn: Tensor) -> Tensor:
        kl_on_the_way.append(exact_kl(logprob.chunk(3)[1], reference).mean(-1).max().item())
        return reward.gather(-1, drawn)

    policies = train(stack([start, start, elsewhere]), reference.repeat(3, 1, 1), score, config.kl_coef)
    learned, stayed, back = policies.chunk(3)
    optimum = exact_optimum(reference, gold, config.kl_coef)
    distance = total_variation(learned, optimum)
    kl = exact_kl(stayed, reference).mean(-1)
    return {
        "exactness": {
            "total_variation": interval(distance.mean(-1)),
            "worst_seed": distance.mean(-1).max().item(),
            "worst_prompt": distance.max().item(),
            "of_the_reference": total_variation(reference, optimum).mean().item(),
        },
        "constant": {
            "kl": interval(kl),
            "worst_seed": kl.max().item(),
            "worst_on_the_way": max(kl_on_the_way),
            "begun_elsewhere": exact_kl(log_probabilities(elsewhere), reference).mean().item(),
            "begun_elsewhere_worst_seed": exact_kl(back, reference).mean(-1).max().item(),
        },
    }


# ---- wrong rewards: predicted against simulated ----


def wrong_rewards(config: Config, train: Train) -> list[Json]:
    """Constant rewards, noise and single errors, a row for each statement."""
    worlds = generators(config)
    start = stack([new_policy(TABLE, world) for world in worlds])
    gold = torch.stack([torch.randn(TABLE, generator=world) for world in worlds])
    return [
        *gradient_rows(log_probabilities(start), gold, worlds),
        *noise_rows(config, train, start, gold),
        *misscoring_rows(config, train, start, gold),
    ]


def row(statement: str, predicted: Seeds, simulated: Seeds, **more: float) -> Json:
    """Both sides as means over seeds, and the interval of their difference."""
    sides = {"predicted": predicted.mean().item(), "simulated": simulated.mean().item()}
    return {"statement": statement, **sides, "difference": interval(simulated - predicted), **more}


def gradient_rows(logprob: Responses, reward: Responses, worlds: list[torch.Generator]) -> list[Json]:
    """Mean and variance of the policy gradient of one batch, for the true reward, a constant, and noise."""
    cases: dict[str, list[Tensor]] = {}
    for world, policy, table in zip(worlds, logprob, reward, strict=True):
        drawn = bandit.draw(policy.expand(GRADIENT_BATCHES, -1, -1), GRADIENT_SAMPLES, world)
        score = table.expand(GRADIENT_BATCHES, -1, -1).gather(-1, drawn)
        shared, own = (torch.randn(*drawn.shape[:2], size, generator=world) for size in (1, GRADIENT_SAMPLES))
        scores = {"constant reward": torch.ones_like(score), "true reward": score}
        scores |= {"noise by prompt": score + NOISE_STD * shared, "noise by call": score + NOISE_STD * own}
        for name, values in scores.items():
            cases.setdefault(name, []).append(bandit.policy_gradients(policy, drawn, values))
    rows = []
    direction, _ = bandit.policy_gradient_moments(logprob, reward, GRADIENT_SAMPLES)
    direction = direction / direction.flatten(1).norm(dim=-1).view(-1, 1, 1)
    for name, gradients in cases.items():
        constant, std = name == "constant reward", NOISE_STD if name.startswith("noise") else 0.0
        means, variance = bandit.policy_gradient_moments(
            logprob, torch.ones_like(reward) if constant else reward, GRADIENT_SAMPLES, std
        )
        found = torch.stack(gradients)
        along = [(gradient * direction).sum((1, 2)) for gradient in (means, found.mean(1))]
        rows.append(row(f"{name}: gradient along the true one", *along))
        rows.append(row(f"{name}: variance of the gradient", variance, found.var(1).sum((1, 2))))
    return rows


def noise_rows(config: Config, train: Train, start: ToyPolicy, gold: Responses) -> list[Json]:
    """Where PPO ends if noise that does not depend on the response is added to the reward: at the same optimum."""
    generator = torch.Generator().manual_seed(config.first_seed)
    reference = log_probabilities(start)

    def score(_logprob: Tensor, drawn: Tensor) -> Tensor:
        none, shared, own = gold.repeat(3, 1, 1).gather(-1, drawn).chunk(3)
        shared = shared + NOISE_STD * torch.randn(*shared.shape[:2], 1, generator=generator)
        return torch.cat([none, shared, own + NOISE_STD * torch.randn(own.shape, generator=generator)])

    policies = train(stack([start] * 3), reference.repeat(3, 1, 1), score, config.kl_coef).chunk(3)
    optimum, best, rows = exact_optimum(reference, gold, config.kl_coef), gold.argmax(-1, keepdim=True), []
    for name, policy in zip(("no noise", "noise by prompt", "noise by call"), policies, strict=True):
        aim, share = (logprob.exp().gather(-1, best).mean((1, 2)) for logprob in (optimum, policy))
        rows.append(row(f"{name}: probability of the best response", aim, share))
        distance = total_variation(policy, optimum).mean(-1)
        rows.append(row(f"{name}: total variation from the optimum", torch.zeros_like(distance), distance))
    return rows


def misscoring_rows(config: Config, train: Train, start: ToyPolicy, gold: Responses) -> list[Json]:
    """Gold lost where every prompt's worst response is scored too high, or its best too low."""
    reference = log_probabilities(start)
    optimum = exact_optimum(reference, gold, config.kl_coef)
    worst, best = gold.argmin(-1, keepdim=True), gold.argmax(-1, keepdim=True)
    cases = [("worst response scored too high", worst, error) for error in ERRORS]
    cases += [("best response scored too low", best, -error) for error in ERRORS]
    wrong = torch.cat([gold + error * torch.zeros_like(gold).scatter(-1, index, 1.0) for _, index, error in cases])
    policies = train(
        stack([start] * len(cases)), reference.repeat(len(cases), 1, 1), lambda _, drawn: wrong.gather(-1, drawn),
        config.kl_coef,
    ).chunk(len(cases))  # fmt: skip
    rows = []
    for (statement, index, error), policy in zip(cases, policies, strict=True):
        p, own = (table.gather(-1, index).squeeze(-1) for table in (optimum.exp(), gold))
        gap = (expected(optimum, gold) - p * own) / (1 - p) - own  # the others' expected gold, minus its own
        pairs = zip(p.ravel().tolist(), gap.ravel().tolist(), strict=True)
        losses = [bandit.misscoring_loss(*pair, error, config.kl_coef) for pair in pairs]
        predicted = torch.tensor(losses).view_as(p).mean(-1)
        simulated = (expected(optimum, gold) - expected(policy, gold)).mean(-1)
        bound = ((1 - p if error > 0 else p) * gap.abs()).mean().item()
        rows.append(row(f"{statement} by {abs(error)}: gold lost", predicted, simulated, bound=bound))
    return rows


# ---- heads that have not seen every response ----


def unseen_responses(config: Config, train: Train) -> Json:
    """What each objective makes of heads that have not seen every response: exactly tilted policies, and PPO.

    The policies of PPO are tables: at so small a penalty a network sometimes loses a response for good.
    """
    worlds = blind_spots.make_worlds(generators(config), config.pairs_per_prompt, config.num_heads, config.label_noise)
    single = blind_spots.fit_single(worlds)
    heads = blind_spots.fit_heads(worlds, single)
    arms = rewards(config, worlds, single, heads)
    num, reward = len(arms), torch.cat(list(arms.values()))
    start = worlds.reference_WPA.repeat(num, 1, 1)
    ppo = train((start,), start, lambda _, drawn: reward.gather(-1, drawn), config.heads_kl_coef).chunk(num)
    rows: dict[str, Json] = {name: {"name": name, "exact": []} for name in arms}
    for kl_coef in KL_COEFS:
        policies = {name: exact_optimum(worlds.reference_WPA, table, kl_coef) for name, table in arms.items()}
        for name, entry in rows.items():
            entry["exact"].append({"kl_coef": kl_coef, **outcome(worlds, policies[name], policies["single"])})
    found = dict(zip(arms, ppo, strict=True))
    for name, entry in rows.items():
        optimum = exact_optimum(worlds.reference_WPA, arms[name], config.heads_kl_coef)
        distance = total_variation(found[name], optimum).mean().item()
        entry["ppo"] = {**outcome(worlds, found[name], found["single"]), "total_variation": distance}
    return {"heads": what_heads_know(worlds, heads), "objectives": list(rows.values())}


def rewards(config: Config, worlds: Worlds, single: Responses, heads: HeadRewards) -> dict[str, Responses]:
    """Every arm's reward: none, the truth, that of the stage-1 head, and each objective of the K heads."""
    generator = torch.Generator().manual_seed(config.first_seed)
    drawn = bandit.draw(worlds.reference_WPA, SCALE_SAMPLES, generator)
    scalar = {"gold": worlds.gold_WPA, "single": single}
    points = {name: HeadRewards(table.unsqueeze(-1), torch.zeros(*table.shape, 1)) for name, table in scalar.items()}
    arms: list[tuple[str, HeadRewards, Objective]] = [(name, point, nominal) for name, point in points.items()]
    arms += [(name, heads, parse_objective(name)) for name in OBJECTIVES]
    return {"reference": torch.zeros_like(single)} | {
        name: blind_spots.combine(said, blind_spots.fit_scales(said, objective, drawn), objective)
        for name, said, objective in arms
    }


def outcome(worlds: Worlds, policy: Responses, conventional: Responses) -> Json:
    """True reward of a policy, alone and minus that of the conventional arm in the same world."""
    gold, other = (expected(logprob, worlds.gold_WPA).mean(-1) for logprob in (policy, conventional))
    return {
        "gold": interval(gold),
        "against_single": interval(gold - other),
        "unseen": expected(policy, (~worlds.seen_WPA).float()).mean().item(),
        "kl": exact_kl(policy, worlds.reference_WPA).mean().item(),
    }


def what_heads_know(worlds: Worlds, heads: HeadRewards) -> Json:
    """How well each uncertainty finds the responses that no pair showed: AUROC over a world's responses."""
    results: Json = {"unseen_share": (~worlds.seen_WPA).float().mean().item()}
    for uncertainty in (disagreement, routing_std, total_std):
        cases = zip(uncertainty(heads).numpy(), worlds.seen_WPA.numpy(), strict=True)
        results[uncertainty.__name__] = interval(np.array([auroc(std[~seen], std[seen]) for std, seen in cases]))
    return results
