"""One whole PPO step with every option on, against a reference that is written token by token without Poise.

The policy is a table: the logits of a token are a function of the token before it. Padded positions hold large numbers,
so that anything read through a wrong mask changes the result.
"""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forked import in_processes
from poise.errors import PoiseError
from poise.functional.objectives import HeadRewards, RewardScale, parse_objective
from poise.models.policy import Evaluation, Policy
from poise.models.rollout import Part, Rollout
from poise.models.scorer import Scorer
from poise.policy import update
from poise.policy.config import PpoConfig
from poise.policy.loop import Training
from poise.policy.reward import PolicyReward
from poise.runtime import distributed as processes

PROMPTS, COMPLETIONS, TOKENS, VOCABULARY = 4, 3, 5, 6
KL_COEF, PACE, SEED = 0.3, 0.6, 11

# Every option away from its default and from the value that would turn it off.
EVERYTHING = PpoConfig(
    learning_rate=0.05, value_learning_rate=0.08, num_epochs=2, num_minibatches=2, accumulation=2, clip=0.15,
    value_clip=0.1, discount=0.9, trace=0.7, whiten_advantages=True, entropy_coef=0.2, max_grad_norm=0.05,
)  # fmt: skip


class Table(Policy):
    """A policy of VOCABULARY tokens: logits and value of a token are rows of two tables, chosen by the token before."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # no language model
        generator = torch.Generator().manual_seed(1)
        self.logits = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64))
        self.value_table = nn.Parameter(torch.randn(VOCABULARY, generator=generator, dtype=torch.float64))

    def evaluate(self, rollout: Rollout, *, entropy: bool = False) -> Evaluation:
        before, ids = preceding(rollout), rollout.completion_ids_PMT
        logprobs = self.logits[before].log_softmax(-1)
        spread = -(logprobs.exp() * logprobs).sum(-1) if entropy else None
        return Evaluation(logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), self.value_table[before], spread)


def preceding(rollout: Rollout) -> Tensor:
    first = rollout.prompt_ids_PL[:, -1:].unsqueeze(1).expand(-1, rollout.mask_PMT.shape[1], -1)
    return torch.cat([first, rollout.completion_ids_PMT[..., :-1]], -1)


class Case(SimpleNamespace):
    policy: Table
    rollout: Rollout
    score: Tensor
    reference: Tensor


def case() -> Case:
    """A rollout of a policy that has moved a little since: ratios and values lie on both sides of their clip ranges."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (PROMPTS, COMPLETIONS, TOKENS)
    lengths = torch.randint(1, TOKENS + 1, shape[:2], generator=generator)
    mask = (torch.arange(TOKENS) < lengths.unsqueeze(-1)).double()
    assert 0 < mask.sum() < mask.numel()
    ids = torch.randint(0, VOCABULARY, shape, generator=generator)
    prompts = torch.randint(0, VOCABULARY, (PROMPTS, 2), generator=generator)
    policy = Table()
    rollout = Rollout(prompts, torch.ones_like(prompts), ids, mask, torch.zeros(shape), torch.zeros(shape), None)
    now = policy.evaluate(rollout)
    junk = 50 * normal(*shape) * (1 - mask)
    rollout.logprob_PMT = (now.logprob.detach() + 0.2 * normal(*shape)) * mask + junk
    rollout.value_PMT = (now.value.detach() + 0.3 * normal(*shape)) * mask + junk
    reference = (rollout.logprob_PMT + 0.5 * normal(*shape)) * mask - junk
    reference[0, 0, 0] = rollout.logprob_PMT[0, 0, 0] + 4e-5  # rounding, which is no KL
    reference[1, 0, 0] = rollout.logprob_PMT[1, 0, 0] + 9e-3  # no rounding
    return Case(policy=policy, rollout=rollout, score=normal(PROMPTS * COMPLETIONS), reference=reference)


def learner(policy: Any, **changes: Any) -> update.Learner:
    return update.Learner(policy, dataclasses.replace(EVERYTHING, **changes), SEED)


# ---- the reference: loops over tokens, PyTorch's autograd for derivatives, Adam written out ----


def advantages_by_hand(now: Case, config: PpoConfig) -> tuple[dict[Any, float], dict[Any, float]]:
    """(advantages, returns) by (prompt, completion, token): rewards, GAE as a sum, whitening."""
    advantage: dict[Any, float] = {}
    returns: dict[Any, float] = {}
    lengths = now.rollout.mask_PMT.sum(-1).long()
    for p in range(PROMPTS):
        for m in range(COMPLETIONS):
            length = int(lengths[p, m])
            value = [*now.rollout.value_PMT[p, m, :length].tolist(), 0.0]
            reward = []
            for t in range(length):
                drift = (now.rollout.logprob_PMT[p, m, t] - now.reference[p, m, t]).item()
                reward.append(-KL_COEF * (0.0 if abs(drift) <= 5e-5 else drift))
            reward[-1] += now.score[p * COMPLETIONS + m].item()
            delta = [reward[t] + config.discount * value[t + 1] - value[t] for t in range(length)]
            for t in range(length):
                decay = config.discount * config.trace
                advantage[p, m, t] = sum(decay ** (later - t) * delta[later] for later in range(t, length))
                returns[p, m, t] = advantage[p, m, t] + value[t]
    if config.whiten_advantages:
        mean = sum(advantage.values()) / len(advantage)
        variance = sum((a - mean) ** 2 for a in advantage.values()) / len(advantage)
        advantage = {key: (a - mean) / math.sqrt(variance + 1e-8) for key, a in advantage.items()}
    return advantage, returns


def minibatches_by_hand(config: PpoConfig) -> list[list[int]]:
    """Of every block of consecutive prompts one, at random, to each minibatch."""
    generator = torch.Generator().manual_seed(SEED)
    number, found = config.num_minibatches, []
    for _ in range(config.num_epochs):
        orders = [torch.randperm(number, generator=generator).tolist() for _ in range(PROMPTS // number)]
        found += [[block * number + order[j] for block, order in enumerate(orders)] for j in range(number)]
    return found


def losses_by_hand(
    now: Case, config: PpoConfig, prompts: list[int], advantage: dict[Any, float], returns: dict[Any, float]
) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """(policy loss, value loss, entropy, clipped share, step KL): means over the minibatch's tokens."""
    before, policy, rollout = preceding(now.rollout), now.policy, now.rollout
    losses, fits, entropies, outside, moved = [], [], [], [], []
    for p, m, t in advantage:
        if p not in prompts:
            continue
        logprobs = torch.log_softmax(policy.logits[before[p, m, t]], -1)
        ratio = (logprobs[rollout.completion_ids_PMT[p, m, t]] - rollout.logprob_PMT[p, m, t]).exp()
        gain, limit = advantage[p, m, t], min(max(ratio.item(), 1 - config.clip), 1 + config.clip)
        # A clipped ratio has no derivative; it counts where it makes the gain smaller.
        losses.append(-(ratio * gain if ratio.item() * gain <= limit * gain else ratio.detach() * 0 + limit * gain))
        outside.append(abs(ratio.item() - 1) > config.clip)
        moved.append(ratio.item() - 1 - math.log(ratio.item()))
        value, old = policy.value_table[before[p, m, t]], rollout.value_PMT[p, m, t].item()
        near = min(max(value.item(), old - config.value_clip), old + config.value_clip)
        far = (value - returns[p, m, t]) ** 2
        clipped = (near - returns[p, m, t]) ** 2
        fits.append(0.5 * (far if far.item() >= clipped else far.detach() * 0 + clipped))
        entropies.append(-(logprobs.exp() * logprobs).sum())
    count = len(losses)
    return (
        torch.stack(losses).mean(), torch.stack(fits).mean(), torch.stack(entropies).mean(),
        sum(outside) / count, sum(moved) / count,
    )  # fmt: skip


def improve_by_hand(now: Case, config: PpoConfig) -> dict[str, float]:
    """The whole step on `now.policy`; returns the means of what is logged."""
    parameters = [now.policy.logits, now.policy.value_table]
    rates = [PACE * config.learning_rate, config.value_learning_rate]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    advantage, returns = advantages_by_hand(now, config)
    rows = []
    for number, prompts in enumerate(minibatches_by_hand(config), start=1):
        loss, fit, entropy, clipped, moved = losses_by_hand(now, config, prompts, advantage, returns)
        gradients = list(torch.autograd.grad(loss + fit - config.entropy_coef * entropy, parameters))
        if config.gradient_regularization:
            # H g, by a step along g that is long enough to cross the edges of the clip range as Poise's step does.
            kept, size = now.policy.logits.data.clone(), gradients[0].norm()
            now.policy.logits.data += 0.1 * gradients[0] / size
            far, _, spread, _, _ = losses_by_hand(now, config, prompts, advantage, returns)
            (after,) = torch.autograd.grad(far - config.entropy_coef * spread, parameters[:1])
            now.policy.logits.data = kept
            bent = (after - gradients[0]) / 0.1 * size
            gradients[0] = gradients[0] + config.gradient_regularization * bent
        norms = [gradient.square().sum().sqrt().item() for gradient in gradients]
        for i, (parameter, gradient, norm) in enumerate(zip(parameters, gradients, norms, strict=True)):
            gradient = gradient * min(1.0, config.max_grad_norm / (norm + 1e-6))
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            size = (second[i] / (1 - 0.999**number)).sqrt() + 1e-8
            parameter.data -= rates[i] * first[i] / (1 - 0.9**number) / size
        rows.append((loss.item(), fit.item(), clipped, moved, *norms))
        if config.max_step_kl is not None and moved > config.max_step_kl:
            break
    names = ("policy_loss", "value_loss", "clipped", "step_kl", "grad_norm", "value_grad_norm")
    means = {name: sum(values) / len(rows) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    return means | {"updates": len(rows)}


OPTIONS: dict[str, dict[str, Any]] = {
    "everything": {},
    "no whitening": {"whiten_advantages": False},
    "no entropy": {"entropy_coef": 0.0},
    "gradients that need no clipping": {"max_grad_norm": 1e3},
    "one part, one minibatch": {"accumulation": 1, "num_minibatches": 1},
    "parts of some completions": {"accumulation": 5},
    "discount and trace 1": {"discount": 1.0, "trace": 1.0},
    "left early": {"max_step_kl": 0.02},
    "flat places": {"gradient_regularization": 3.0, "entropy_coef": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_is_that_of_the_reference(name: str) -> None:
    mine, theirs = case(), case()
    config = dataclasses.replace(EVERYTHING, **OPTIONS[name])
    expected = improve_by_hand(theirs, config)
    found = learner(mine.policy, **OPTIONS[name]).improve(mine.rollout, mine.score, mine.reference, KL_COEF, PACE)
    assert found == pytest.approx(expected, rel=1e-6)
    for parameter, other in zip(mine.policy.parameters(), theirs.policy.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-9)


def test_the_step_exercises_every_option() -> None:
    """Each option changes the result of the step: a reference that ignored it could not agree."""
    whole = case()
    improve_by_hand(whole, EVERYTHING)
    off: dict[str, dict[str, Any]] = {
        "clip": {"clip": 100.0}, "value_clip": {"value_clip": 100.0}, "whitening": {"whiten_advantages": False},
        "entropy": {"entropy_coef": 0.0}, "trace": {"trace": 1.0}, "discount": {"discount": 1.0},
        "gradient clip": {"max_grad_norm": 100.0},
    }  # fmt: skip
    for name, changes in off.items():
        without = case()
        improve_by_hand(without, dataclasses.replace(EVERYTHING, **changes))
        moved = [
            (a - b).abs().max() for a, b in zip(whole.policy.parameters(), without.policy.parameters(), strict=True)
        ]
        assert max(moved) > 1e-4, name


def test_the_regularized_gradient_is_that_of_the_squared_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient that the optimizer takes, against PyTorch's second derivatives; the values' is left as it was."""
    monkeypatch.setattr(update, "RADIUS", 1e-4)
    weight = 2.0
    changes = {"num_minibatches": 1, "num_epochs": 1, "max_grad_norm": 1e6, "clip": 100.0}
    taken: dict[float, list[Tensor]] = {}
    for regularization in (0.0, weight):
        now = case()
        one = learner(now.policy, gradient_regularization=regularization, **changes)
        before = [parameter.detach().clone() for parameter in now.policy.parameters()]
        monkeypatch.setattr(one.optimizer, "step", lambda: None)
        one.improve(now.rollout, now.score, now.reference, KL_COEF, PACE)
        taken[regularization] = [parameter.grad for parameter in now.policy.parameters() if parameter.grad is not None]
        for parameter, was in zip(now.policy.parameters(), before, strict=True):
            assert torch.equal(parameter, was)  # moved and put back
    now, config = case(), dataclasses.replace(EVERYTHING, **changes)
    advantage, returns = advantages_by_hand(now, config)
    loss, _, entropy, _, _ = losses_by_hand(now, config, list(range(PROMPTS)), advantage, returns)
    whole = loss - config.entropy_coef * entropy
    (gradient,) = torch.autograd.grad(whole, now.policy.logits, create_graph=True)
    (exact,) = torch.autograd.grad(whole.detach() * 0 + 0.5 * weight * gradient.square().sum(), now.policy.logits)
    torch.testing.assert_close(taken[0.0][0], gradient.detach(), rtol=0, atol=1e-9)
    found = taken[weight][0] - taken[0.0][0]
    assert (found - exact).norm() < 1e-3 * exact.norm()
    assert exact.norm() > 0.05 * gradient.norm()
    assert torch.equal(taken[weight][1], taken[0.0][1])


def test_an_infinite_gradient_is_refused_and_not_regularized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another reading of the minibatch, with weights moved along it, would say nothing."""
    now = case()
    now.policy.logits.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    one, read = learner(now.policy, gradient_regularization=1.0), []
    monkeypatch.setattr(now.policy, "evaluate", lambda *a, **k: read.append(1) or Table.evaluate(now.policy, *a, **k))
    with pytest.raises(PoiseError, match="gradient is not finite"):
        one.improve(now.rollout, now.score, now.reference, KL_COEF, PACE)
    parts = len(read)
    read.clear()
    plain = learner(now.policy, gradient_regularization=0.0)
    with pytest.raises(PoiseError, match="gradient is not finite"):
        plain.improve(now.rollout, now.score, now.reference, KL_COEF, PACE)
    assert len(read) == parts


def test_a_step_goes_on_as_far_as_its_limit() -> None:
    """`max_step_kl` is what a pass may reach: the one that exceeds it is the last, not the one that meets it."""

    def updates(limit: float | None) -> list[float]:
        now, kls = case(), []
        one = learner(now.policy, max_step_kl=limit)
        inner = one._update

        def noted(*arguments: Any) -> Any:
            kls.append((losses := inner(*arguments)).step_kl)
            return losses

        one._update = noted  # type: ignore[method-assign]
        one.improve(now.rollout, now.score, now.reference, KL_COEF, PACE)
        return kls

    free = updates(None)
    assert len(free) > 1
    assert updates(max(free)) == free
    first = free.index(max(free)) + 1
    assert updates(max(free) * 0.999) == free[:first] != free


def test_a_gradient_of_zero_needs_no_regularization() -> None:
    now = case()
    one = learner(now.policy, gradient_regularization=1.0, entropy_coef=0.0, whiten_advantages=False, value_clip=1e9)
    flat = dataclasses.replace(now.rollout, value_PMT=torch.zeros_like(now.rollout.value_PMT))
    logits = now.policy.logits.detach().clone()
    one.improve(flat, torch.zeros_like(now.score), flat.logprob_PMT, KL_COEF, PACE)
    assert torch.equal(now.policy.logits, logits)


def test_large_errors_of_the_values_do_not_shorten_the_step_of_the_policy() -> None:
    """The values' gradient a million times larger: the policy moves as before."""
    moved = []
    for factor in (1.0, 1e3):
        now = case()
        now.policy.evaluate = scaled_values(now.policy, factor)  # type: ignore[method-assign]
        one = learner(now.policy, num_epochs=1, num_minibatches=1, value_clip=1e9)
        losses = one.improve(now.rollout, now.score, now.reference, KL_COEF)
        moved.append((losses["grad_norm"], now.policy.logits.detach().clone(), losses["value_grad_norm"]))
    assert moved[0][0] == pytest.approx(moved[1][0], rel=1e-12)
    assert torch.equal(moved[0][1], moved[1][1])
    assert moved[1][2] > 100 * moved[0][2]


def scaled_values(policy: Table, factor: float) -> Any:
    def evaluate(rollout: Rollout, *, entropy: bool = False) -> Evaluation:
        found = Table.evaluate(policy, rollout, entropy=entropy)
        return found._replace(value=found.value.detach() + factor * (found.value - found.value.detach()))

    return evaluate


@pytest.mark.parametrize("culprit", ["logits", "value_table"])
def test_a_gradient_that_is_not_finite_touches_no_weight(culprit: str) -> None:
    now = case()
    before = [parameter.detach().clone() for parameter in now.policy.parameters()]
    getattr(now.policy, culprit).register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(PoiseError, match="the gradient is not finite"):
        learner(now.policy).improve(now.rollout, now.score, now.reference, KL_COEF)
    assert all(torch.equal(a, b) for a, b in zip(before, now.policy.parameters(), strict=True))


def test_a_loss_that_is_not_finite_touches_no_weight() -> None:
    now = case()
    before = [parameter.detach().clone() for parameter in now.policy.parameters()]
    now.score[0] = math.nan
    with pytest.raises(PoiseError, match="the loss is not finite"):
        learner(now.policy).improve(now.rollout, now.score, now.reference, KL_COEF)
    assert all(torch.equal(a, b) for a, b in zip(before, now.policy.parameters(), strict=True))


def test_a_difference_of_rounding_is_no_kl_and_a_larger_one_is() -> None:
    """A constant reward under a policy that is the reference: nothing moves it but a difference above the rounding."""
    moved = []
    for off in (4.9e-5, -4.9e-5, 5.2e-5):
        now = case()
        start = now.policy.logits.detach().clone()
        one = learner(now.policy, discount=1.0, trace=1.0, whiten_advantages=False, entropy_coef=0.0)
        now.rollout.value_PMT.zero_()
        one.improve(now.rollout, torch.zeros_like(now.score), now.rollout.logprob_PMT - off, KL_COEF)
        moved.append(not torch.equal(start, now.policy.logits))
    assert moved == [False, False, True]


# ---- reading again in low precision ----


def test_in_float32_a_rollout_is_improved_as_it_was_sampled() -> None:
    now = case()
    now.policy.low_precision = False
    now.policy.reference_logprobs = lambda rollout: rollout.logprob_PMT - 1  # type: ignore[assignment, method-assign]
    again, reference = learner(now.policy).read(now.rollout)
    assert again is now.rollout
    assert torch.equal(reference, now.rollout.logprob_PMT - 1)


@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
def test_in_low_precision_a_rollout_is_read_in_the_parts_that_are_improved_next(entropy_coef: float) -> None:
    """In the parts of the first epoch, and with entropies if the update asks for them: the same bits come out."""
    now, read, improved = case(), [], []
    now.policy.low_precision = True

    def read_again(rollout: Rollout, parts: list[Part], *, entropy: bool) -> Rollout:
        read.append(("policy", [part.prompts.tolist() for part in parts], entropy))
        return dataclasses.replace(rollout, sampled_PMT=rollout.logprob_PMT)

    def reference(rollout: Rollout, parts: list[Part], *, entropy: bool) -> Tensor:
        assert rollout.sampled_PMT is not None  # what was read again, not what was sampled
        read.append(("reference", [part.prompts.tolist() for part in parts], entropy))
        return rollout.logprob_PMT - 1

    def evaluate(rollout: Rollout, *, entropy: bool = False) -> Evaluation:
        improved.append((rollout.prompt_ids_PL[:, 0].tolist(), entropy))
        return Table.evaluate(now.policy, rollout, entropy=entropy)

    now.rollout.prompt_ids_PL[:, 0] = torch.arange(PROMPTS)
    for name, stub in (("read_again", read_again), ("reference_logprobs", reference), ("evaluate", evaluate)):
        setattr(now.policy, name, stub)
    one = learner(now.policy, entropy_coef=entropy_coef)
    again, logprob = one.read(now.rollout)
    assert torch.equal(logprob, now.rollout.logprob_PMT - 1)
    one.improve(again, now.score, logprob, KL_COEF)
    first_epoch = improved[: len(improved) // EVERYTHING.num_epochs]
    assert read == [(who, [prompts for prompts, _ in first_epoch], entropy_coef > 0) for who in ("policy", "reference")]
    assert all(entropy == (entropy_coef > 0) for _, entropy in improved)
    assert sorted(prompt for prompts, _ in first_epoch for prompt in prompts) == list(range(PROMPTS))
    assert len(first_epoch) == EVERYTHING.num_minibatches * EVERYTHING.accumulation


# ---- checkpoints ----


def test_a_learner_that_was_saved_goes_on_bitwise(tmp_path: Path) -> None:
    """Weights, Adam's moments and step, and the random order of prompts."""
    whole = case()
    one = learner(whole.policy)
    one.improve(whole.rollout, whole.score, whole.reference, KL_COEF)
    one.save(tmp_path / "learner.safetensors", {"step": 3, "name": "é"})
    expected = one.improve(whole.rollout, whole.score, whole.reference, KL_COEF)
    later = case()
    with torch.no_grad():
        for parameter in later.policy.parameters():
            parameter.add_(1.0)
    other = update.Learner(later.policy, EVERYTHING, SEED + 1)
    assert other.load(tmp_path / "learner.safetensors") == {"step": 3, "name": "é"}
    assert other.improve(later.rollout, later.score, later.reference, KL_COEF) == expected
    for mine, theirs in zip(later.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_of_several_processes_one_writes_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    learner(case().policy).save(tmp_path / "learner.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_a_learner_saved_before_its_first_step_is_one_that_starts(tmp_path: Path) -> None:
    whole, later = case(), case()
    learner(whole.policy).save(tmp_path / "learner.safetensors", {})
    other = update.Learner(later.policy, EVERYTHING, SEED + 1)
    assert other.load(tmp_path / "learner.safetensors") == {}
    found = other.improve(later.rollout, later.score, later.reference, KL_COEF)
    assert found == learner(whole.policy).improve(whole.rollout, whole.score, whole.reference, KL_COEF)


def test_a_file_that_is_no_checkpoint_of_this_learner_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "learner.safetensors"
    with pytest.raises(PoiseError, match="is not a checkpoint of this run"):
        learner(case().policy).load(path)
    path.write_bytes(b"half a file")
    with pytest.raises(PoiseError, match="is not a checkpoint of this run"):
        learner(case().policy).load(path)
    learner(case().policy).save(path, {})
    larger = case().policy
    larger.logits = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(PoiseError, match="is not a checkpoint of this run") as refused:
        learner(larger).load(path)
    assert "\n" not in str(refused.value)


def test_the_penalty_for_a_completion_that_never_ended_is_subtracted() -> None:
    reward = PolicyReward(object.__new__(Scorer), parse_objective("mean"))
    reward.scale = RewardScale((0.0, 0.0), 0.5, 2.0)
    run: Any = SimpleNamespace(
        config=SimpleNamespace(reward_norm="initial", missing_eos_penalty=3.0), reward=reward,
        _objective=lambda: reward.objective,
    )  # fmt: skip
    heads = HeadRewards(torch.tensor([[1.0, 2.0], [4.0, 5.0]]), torch.zeros(2, 2))
    score = Training._score(run, heads, ended=torch.tensor([1.0, 0.0]))
    assert score.tolist() == pytest.approx([0.5, 2.0 - 3.0])


@pytest.mark.parametrize(
    ("norm", "scale", "scores"),
    [
        ("initial", (0.5, 2.0), [-0.25, 0.25, 0.75]),
        ("batch", (1.0, 1.0), [-1.0, 0.0, 1.0]),  # rewards 0, 1, 2
        ("running", (0.8, 1.3038404), [-0.6135720, 0.1533930, 0.9203580]),  # after -1 and 2: of five, 0.8 and 1.7^½
    ],
)
def test_the_scale_moves_as_the_settings_say(norm: str, scale: tuple[float, float], scores: list[float]) -> None:
    """By hand. At the start there were the rewards -1 and 2, for the first case with another scale."""
    reward = PolicyReward(object.__new__(Scorer), parse_objective("mean"))
    reward.scale = RewardScale((0.0,), 0.5, 2.0 if norm == "initial" else 4.5**0.5, count=2)
    run: Any = SimpleNamespace(
        config=SimpleNamespace(reward_norm=norm, missing_eos_penalty=0.0), reward=reward,
        _objective=lambda: reward.objective,
    )  # fmt: skip
    heads = HeadRewards(torch.tensor([[0.0], [1.0], [2.0]]), torch.zeros(3, 1))
    found = Training._score(run, heads, ended=torch.ones(3))
    assert (reward.scale.mean, reward.scale.std) == pytest.approx(scale)
    assert found.tolist() == pytest.approx(scores)


# ---- several processes ----


def test_two_processes_make_the_step_of_one(tmp_path: Path) -> None:
    """Whitening, means over tokens and gradients over processes: the weights of one process, to 1e-9."""

    def work(rank: int) -> tuple[int, dict[str, float], list[Tensor]]:
        now = case()
        share = slice(rank * PROMPTS // 2, (rank + 1) * PROMPTS // 2)
        rollout = now.rollout.part(Part(torch.arange(PROMPTS)[share]))
        rows = slice(share.start * COMPLETIONS, share.stop * COMPLETIONS)
        losses = learner(now.policy).improve(rollout, now.score[rows], now.reference[share], KL_COEF, PACE)
        return processes.num_processes(), losses, [parameter.detach() for parameter in now.policy.parameters()]

    whole = case()
    expected = improve_by_hand(whole, EVERYTHING)
    for number, losses, parameters in in_processes(2, work, tmp_path):
        assert number == 2
        assert losses == pytest.approx(expected, rel=1e-6)
        for parameter, other in zip(parameters, whole.policy.parameters(), strict=True):
            torch.testing.assert_close(parameter, other.detach(), rtol=0, atol=1e-9)
