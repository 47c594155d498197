"""PPO updates on one rollout, and the learner's checkpoint.

The equations are in functional/ppo.py. This module divides a batch into minibatches, their parts and processes; the
division into parts and processes does not change the result.

Shapes: _P prompts, _M completions per prompt, _T tokens of a completion.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from poise.errors import PoiseError, first_line
from poise.functional import ppo
from poise.models.policy import Policy
from poise.models.rollout import Part, Rollout, parts_of
from poise.policy.config import PpoConfig
from poise.runtime import distributed as processes
from poise.runtime.checkpoints import write_tensors
from poise.runtime.run_folder import Json, is_main_process
from poise.runtime.sharding import clip_gradients, copy_whole, is_part, spread_state, whole_on_main

# Largest rounding difference (nats, float32) between a token's log-probability at sampling and in packed rows. Counted
# as KL, whitened and scaled up by Adam, it would move a policy away from the reference under a constant reward. In
# lower precision the difference would be hundredths of a nat; there `Learner.read` leaves none.
ROUNDING = 5e-5
# How far weights are moved, together, to see how the gradient changes (`Learner._regularize`). On SmolLM2 with adapters
# the change then has a cosine of .998 with the derivative in float32 and of .992 in bfloat16, whose rounding leaves .63
# at a tenth of it.
RADIUS = 0.1


class Losses(NamedTuple):
    """Of a minibatch, or their means over a step."""

    policy_loss: float
    value_loss: float
    clipped: float
    step_kl: float
    grad_norm: float  # of the policy's parameters, before clipping
    value_grad_norm: float  # of the values' parameters, before clipping


class Learner:
    """A policy with its optimizer and its random numbers."""

    def __init__(self, policy: Policy, config: PpoConfig, seed: int):
        self.policy, self.config = policy, config
        self.generator = torch.Generator().manual_seed(seed)
        named = policy.trained_parameters()
        value = [parameter for name, parameter in named.items() if name.startswith("value")]
        own = [parameter for name, parameter in named.items() if not name.startswith("value")]
        rates = ((own, config.learning_rate), (value, config.value_learning_rate))
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if is_part(p) is part], "lr": rate, "of_policy": params is own}
            for params, rate in rates
            for part in (False, True)  # PyTorch's optimizers take weights that are spread by themselves
        ]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]], fused=True)
        self._own, self._value = own, value

    def read(self, rollout: Rollout) -> tuple[Rollout, Tensor]:
        """(the rollout to `improve` on, its log-probabilities (P, M, T) under the initial policy).

        In low precision both are read in the parts, and in the way, in which `improve` will read next: ratios are 1
        before the first update, and KL is 0 before the first step, to the bit.
        """
        if not self.policy.low_precision:
            return rollout, self.policy.reference_logprobs(rollout)
        config = self.config
        ahead = self._minibatches(len(rollout.mask_PMT), self.generator.clone_state())[: config.num_minibatches]
        parts = [part for one in ahead for part in self._parts(rollout, one.to(rollout.mask_PMT.device))]
        entropy = config.entropy_coef > 0
        again = self.policy.read_again(rollout, parts, entropy=entropy)
        return again, self.policy.reference_logprobs(again, parts, entropy=entropy)

    def improve(self, rollout: Rollout, score: Tensor, reference: Tensor, kl_coef: float, pace: float = 1.0) -> Json:
        """PPO epochs over one rollout; returns mean losses.

        rollout: this process's share of the step's prompts; score (P * M,): its rewards; reference (P, M, T): its log
        probabilities under the initial policy; pace: share of the policy's learning rate to use.
        Raises PoiseError for a loss or gradient that is not finite, before any weight is touched by it.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            if group["of_policy"]:
                group["lr"] = pace * config.learning_rate
        mask, shape = rollout.mask_PMT.flatten(0, 1), rollout.mask_PMT.shape
        old_logprob, old_values = rollout.logprob_PMT.flatten(0, 1), rollout.value_PMT.flatten(0, 1)
        reference = reference.flatten(0, 1)
        reference = torch.where((old_logprob - reference).abs() <= ROUNDING, old_logprob, reference)
        rewards = ppo.token_rewards(score.to(mask), old_logprob, reference, mask, kl_coef)
        advantages, returns = ppo.gae(rewards, old_values, mask, config.discount, config.trace)
        if config.whiten_advantages:
            advantages = ppo.whiten(advantages, mask, processes.total)
        targets = (advantages.view(shape), returns.view(shape))

        done: list[Losses] = []
        for minibatch in self._minibatches(shape[0], self.generator):
            done.append(self._update(rollout, *targets, minibatch.to(mask.device)))
            if config.max_step_kl is not None and done[-1].step_kl > config.max_step_kl:
                break
        means = {
            name: sum(values) / len(done) for name, values in zip(Losses._fields, zip(*done, strict=True), strict=True)
        }
        return means | {"updates": len(done)}

    def _minibatches(self, num_prompts: int, generator: torch.Generator) -> list[Tensor]:
        """Indices of this process's prompts in each minibatch of each epoch.

        The step's prompts form blocks of `num_minibatches` consecutive ones. Every minibatch takes one prompt of each
        block, at random. Processes hold whole blocks, so their number does not change the minibatches.
        """
        number = self.config.num_minibatches
        blocks = num_prompts * processes.num_processes() // number
        mine = processes.share(blocks)
        chosen: list[Tensor] = []
        for _ in range(self.config.num_epochs):
            order = torch.stack([torch.randperm(number, generator=generator) for _ in range(blocks)])[mine]
            chosen += list((order + number * torch.arange(len(order)).unsqueeze(-1)).T)
        return chosen

    def _parts(self, rollout: Rollout, minibatch: Tensor) -> list[Part]:
        return parts_of(minibatch, rollout.mask_PMT.shape[1], self.config.accumulation)

    def _update(self, rollout: Rollout, advantages: Tensor, returns: Tensor, minibatch: Tensor) -> Losses:
        """One optimizer step."""
        config = self.config
        count = processes.total(rollout.mask_PMT[minibatch].sum())

        def gradients() -> Tensor:
            return self._gradients(rollout, advantages, returns, minibatch, count)

        sums = gradients()
        if config.gradient_regularization > 0:
            self._regularize(gradients)
        # Each group by itself: under a joint norm, a badly fitted value function would shorten the policy's step.
        norms = [clip_gradients(group, config.max_grad_norm) for group in (self._own, self._value)]
        if not all(norm.isfinite() for norm in norms):
            raise PoiseError("the gradient is not finite")
        self.optimizer.step()
        policy, value, clipped, moved = sums.tolist()
        return Losses(policy, value, clipped, moved, norms[0].item(), norms[1].item())

    def _gradients(
        self, rollout: Rollout, advantages: Tensor, returns: Tensor, minibatch: Tensor, count: Tensor
    ) -> Tensor:
        """Leave the gradients of a minibatch, of all processes, in the parameters.

        Returns policy loss, value loss, clipped share and step KL. Raises PoiseError unless the losses are finite.
        """
        config = self.config
        self.optimizer.zero_grad()
        sums = torch.zeros(4, device=count.device)
        for index in self._parts(rollout, minibatch):
            part = rollout.part(index)
            new = self.policy.evaluate(part, entropy=config.entropy_coef > 0)
            mask, old = part.mask_PMT.flatten(0, 1), part.logprob_PMT.flatten(0, 1)
            logprob = new.logprob.flatten(0, 1)
            loss, clipped = ppo.policy_loss(logprob, old, advantages[index].flatten(0, 1), mask, config.clip, count)
            fit = ppo.value_loss(
                new.value.flatten(0, 1), part.value_PMT.flatten(0, 1), returns[index].flatten(0, 1), mask,
                config.value_clip, count,
            )  # fmt: skip
            whole = loss + fit
            if new.entropy is not None:
                whole = whole - config.entropy_coef * ppo.masked_mean(new.entropy.flatten(0, 1), mask, count)
            whole.backward()
            with torch.no_grad():
                sums += torch.stack([loss, fit, clipped, ppo.step_kl(logprob, old, mask, count)])
        sums = processes.total(sums.detach())
        if not sums.isfinite().all():
            raise PoiseError("the loss is not finite")
        processes.add_up_gradients([p for p in self._own + self._value if not is_part(p)])
        return sums

    @torch.no_grad()
    def _regularize(self, gradients: Callable[[], Tensor]) -> None:
        """Make the policy's gradient g that of loss + γ/2 |g|²: g + γ H g, H being the Hessian (arXiv 2602.18037).

        H g is the change of the gradient over a small step of the weights along g. The values' gradient stays.
        gradients: computes the gradients of the minibatch, as the weights are then.
        """
        norm = clip_gradients(self._own, math.inf)
        if not 0 < norm.item() < math.inf:
            return
        own = [(p, p.grad, p.data.clone()) for p in self._own if p.grad is not None]
        values = [(p, p.grad) for p in self._value]
        for parameter, gradient, _ in own:
            parameter.add_(gradient, alpha=RADIUS / norm.item())
        try:
            with torch.enable_grad():
                gradients()
        finally:
            for parameter, _, weight in own:
                parameter.data.copy_(weight)
        factor = self.config.gradient_regularization * norm.item() / RADIUS
        for parameter, gradient, _ in own:
            assert parameter.grad is not None  # of the second time
            parameter.grad = gradient + factor * (parameter.grad - gradient)
        for parameter, kept in values:
            parameter.grad = kept

    # ---- checkpoints ----

    def save(self, path: Path, extra: Json) -> None:
        """Write weights, optimizer, random numbers and `extra` to one safetensors file. Called by all processes.

        Raises PoiseError if the disk refuses it; a file that was there before stays.
        """
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state()}
        for name, parameter in self.policy.trained_parameters().items():
            tensors[f"weight.{name}"] = whole_on_main(parameter.data)
            state = self.optimizer.state[parameter]
            tensors |= {f"{key}.{name}": whole_on_main(value) for key, value in state.items()}
        if is_main_process():
            write_tensors(path, tensors, {"run": json.dumps(extra)})

    def load(self, path: Path) -> Json:
        """Inverse of `save`; returns `extra`. Raises PoiseError if the file is of another version or policy."""
        try:
            with safe_open(path, "pt") as file:
                extra = json.loads(file.metadata()["run"])
                self.generator.set_state(file.get_tensor("generator"))
                for name, parameter in self.policy.trained_parameters().items():
                    copy_whole(file.get_tensor(f"weight.{name}"), parameter)
                    self.optimizer.state[parameter] = {
                        key: spread_state(
                            file.get_tensor(f"{key}.{name}").to(parameter.device), parameter
                        )  # Adam is fused
                        for key in ("step", "exp_avg", "exp_avg_sq")
                        if f"{key}.{name}" in file.keys()  # noqa: SIM118  not a dict
                    }
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, OSError) as error:
            why = f"it lacks {first_line(error)}" if isinstance(error, KeyError) else first_line(error)
            raise PoiseError(
                f"{path} is not a checkpoint of this run: {why}; bring it back, or delete the folder to begin anew"
            ) from None
        return extra
