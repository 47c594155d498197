"""A PPO run between two steps: sampling, scoring, improving, watching, and what must be remembered to go on."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poise.data.types import Prompt
from poise.errors import PoiseError
from poise.functional import ppo
from poise.functional.monitor import Monitor, MonitorConfig, text_signs
from poise.functional.objectives import (
    HeadRewards,
    Objective,
    RewardScale,
    disagreement,
    more_pessimistic,
    nominal,
    nominal_head,
    parameter,
    parse_objective,
    routing_std,
    with_parameter,
    worst_case,
)
from poise.functional.schedules import adaptive_kl_coef, headroom, linear
from poise.models.fused_ops import keep_freed_memory
from poise.models.loading import load_policy
from poise.models.policy import Policy, Rollout, uniforms
from poise.models.scorer import Scorer
from poise.policy.config import Config
from poise.policy.reward import Baselines, PolicyReward, gather
from poise.policy.update import Learner
from poise.runtime import distributed as processes
from poise.runtime.progress import console, progress
from poise.runtime.run_folder import Json, Run, append_jsonl, is_main_process, keep_rows_before

ALARM_PAUSE = 5  # steps between two raises of pessimism


class Training:
    """A run between two steps: what it has, and what it must remember to go on."""

    def __init__(self, config: Config, out: Run, prompts: list[Prompt]):
        keep_freed_memory()
        self.config, self.out, self.prompts = config, out, prompts
        scorer = Scorer.load(config.reward)
        scorer.layout.check_objective(config.objective)
        torch.manual_seed(config.seed)  # initial adapters
        model, tokenizer = load_policy(config.model)
        self.policy = Policy(
            model, tokenizer, adapted_layers=config.adapted_layers, rank=config.lora_rank, tune=config.tune,
            value_trunk=config.value_trunk,
        )  # fmt: skip
        if tokenizer.get_vocab() != scorer.extract.tokenizer.get_vocab():
            console.print("policy and reward model have different tokenizers: completions are re-tokenized as text")
        self.learner = Learner(self.policy, config, config.seed)
        self.reward = PolicyReward(scorer, parse_objective(config.objective), config.shaping)
        if config.shaping != "none":
            self.reward.baselines = Baselines(
                scorer, config.baselines_per_prompt, config.max_tokens, config.seed, out.folder
            )
            if config.baselines:
                self.reward.baselines.read(config.baselines, prompts)
        self.step, self.kl_coef, self.pessimism = 0, config.kl_coef, 0
        self.alarms: list[Json] = []
        self.ended, self.last_score = "", 0.0
        self._resume_or_start()

    # ---- one step ----

    def one_step(self) -> Json:
        """Sample, score, improve; logs the step and its completions, and acts on an alarm. Returns the metrics."""
        config, clock = self.config, _Clock()
        batch = self._batch()[processes.share(config.prompts_per_step)]
        rollout = self.policy.sample(batch, self._uniforms())
        texts = self.policy.texts(rollout)
        clock.lap("sample")
        reference = self.policy.reference_logprobs(rollout)
        clock.lap("reference")
        with self._naming_the_step():
            heads = gather(self.reward.heads(self.policy, batch, texts, self.step))
        facts = processes.gathered(_facts(rollout, reference, self.policy.tokenizer.eos_token_id))
        score = self._score(heads, ended=facts[:, _FACTS.index("ended")])
        clock.lap("score")
        mine = processes.share(len(score))
        with self._naming_the_step():
            losses = self.learner.improve(rollout, score[mine], reference, self.kl_coef, self._pace(score))
        clock.lap("update")

        part = HeadRewards(heads.mean[mine], heads.std[mine])
        rows = processes.gathered_rows(_rows(self.step, batch, texts, part, score[mine], facts[mine, 0]))
        metrics = self._metrics(heads, score, facts) | losses | text_signs([row["completion"] for row in rows])
        metrics |= self._watch(metrics) | clock.seconds
        if is_main_process():
            append_jsonl(self.out.folder / "samples.jsonl", rows)
            self.out.log(step=self.step, **metrics)
        self._adapt(metrics)
        self.step += 1
        if self.step % config.save_every == 0:
            self.save()
        return metrics

    def _batch(self) -> list[Prompt]:
        """This step's prompts: all of them once, in random order, then all again in another."""
        per_epoch, count = len(self.prompts) // self.config.prompts_per_step, self.config.prompts_per_step
        epoch, at = divmod(self.step, per_epoch)
        order = torch.randperm(
            len(self.prompts), generator=torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        )
        return [self.prompts[i] for i in order[at * count : (at + 1) * count]]

    def _uniforms(self) -> Tensor:
        """Random numbers of this process's completions, of those drawn for all."""
        config = self.config
        drawn = uniforms(
            config.prompts_per_step, config.completions_per_prompt, config.max_tokens, self.learner.generator
        )
        return drawn[processes.share(config.prompts_per_step)]

    def _score(self, heads: HeadRewards, ended: Tensor) -> Tensor:
        """Rewards (N,) of the step's completions, the constants of their scale brought up to date if asked for."""
        norm, scale, objective = self.config.reward_norm, self.reward.scale, self._objective()
        self.reward.objective = objective
        if norm == "running":
            self.reward.scale = scale.updated(heads, objective)
        elif norm == "batch":
            self.reward.scale = scale.refitted(heads, objective)
        return self.reward.combine(heads) - self.config.missing_eos_penalty * (1 - ended.to(heads.mean))

    def _objective(self) -> Objective:
        """The objective with the parameter that this step has."""
        objective = parse_objective(self.config.objective)
        if self.config.final_parameter is not None:
            start = parameter(objective) or 0.0
            objective = with_parameter(
                objective, linear(start, self.config.final_parameter, self.step / max(self.config.num_steps - 1, 1))
            )
        for _ in range(self.pessimism):
            objective = more_pessimistic(objective)
        return objective

    def _pace(self, score: Tensor) -> float:
        """Share of the learning rate to use in this step."""
        if not self.config.settle or self.config.reward_ceiling is None:
            return 1.0
        return headroom(score.mean().item(), self.config.reward_ceiling)

    def _metrics(self, heads: HeadRewards, score: Tensor, facts: Tensor) -> Json:
        centered, means = self.reward.scale.centered(heads), dict(zip(_FACTS, facts.mean(0).tolist(), strict=True))
        chosen = nominal_head(centered).view(self.config.prompts_per_step, -1)
        return {
            "reward": score.mean().item(),
            "reward_std": score.std().item(),
            **means,
            "entropy": -(facts[:, 2].sum() / facts[:, 3].sum()).item(),  # per token, from the sampled ones
            "heads": centered.mean.mean(0).tolist(),
            "nominal": nominal(centered).mean().item(),
            "worst_case": worst_case(centered).mean().item(),
            "gap": (nominal(centered) - worst_case(centered)).mean().item(),
            "disagreement": disagreement(centered).mean().item(),
            "routing_std": routing_std(centered).mean().item(),
            # completions whose nominal head is not the most frequent one among their prompt's
            "switches": (chosen != chosen.mode(-1, keepdim=True).values).float().mean().item(),
            "kl_coef": self.kl_coef,
            "parameter": parameter(self.reward.objective),
            "pace": self._pace(score),
            "scale_mean": self.reward.scale.mean,
            "scale_std": self.reward.scale.std,
        }

    # ---- what reacts to a step ----

    def _watch(self, metrics: Json) -> Json:
        """The monitor's reading."""
        reading = self.monitor.update(metrics)
        self.last_score = reading.score
        if reading.alarm:
            self._act(reading.score)
        return {"monitor_score": reading.score, "alarm": reading.alarm, "signs": reading.signs}

    def _act(self, score: float) -> None:
        action, last = self.config.on_alarm, self.alarms[-1]["step"] if self.alarms else -ALARM_PAUSE
        if action != "stop" and action != "rollback" and self.step - last < ALARM_PAUSE:
            return
        self.alarms.append({"step": self.step, "score": score, "action": action})
        said = f"step {self.step}: signs of over-optimization (score {score:.2f})"
        if action == "pessimism":
            self.pessimism += 1
            self.kl_coef *= 2
            said += f"; β is now {self.kl_coef:g}"
        elif action in ("stop", "rollback"):
            self.ended = action
            said += "; stopping" if action == "stop" else "; going back to the last policy that looked safe"
        if is_main_process():
            console.print(said)

    def _adapt(self, metrics: Json) -> None:
        config = self.config
        if config.kl_target is not None:
            num = config.prompts_per_step * config.completions_per_prompt
            self.kl_coef = adaptive_kl_coef(self.kl_coef, metrics["kl"], config.kl_target, config.kl_horizon, num)

    @contextlib.contextmanager
    def _naming_the_step(self) -> Iterator[None]:
        try:
            yield
        except PoiseError as error:
            raise PoiseError(f"step {self.step}: {error}; the last checkpoint is kept") from None

    # ---- checkpoints ----

    @property
    def checkpoint(self) -> Path:
        return self.out.folder / "checkpoint.safetensors"

    @property
    def safe(self) -> Path:
        """The last checkpoint that looked safe, with --on-alarm rollback."""
        return self.out.folder / "safe.safetensors"

    def save(self) -> None:
        """Write the checkpoint; with it, if an alarm can lead back there, the one that looks safe."""
        if self.ended == "rollback" and self.safe.exists():
            self.step = self.learner.load(self.safe)["step"]
        if is_main_process():
            self.learner.save(self.checkpoint, self._remembered())
            if self.config.on_alarm == "rollback" and not self.ended and self._looks_safe():
                self.learner.save(self.safe, self._remembered())
        processes.wait()

    def _looks_safe(self) -> bool:
        return not self.alarms and self.last_score < self.config.alarm_threshold / 2

    def _remembered(self) -> Json:
        return {
            "step": self.step, "kl_coef": self.kl_coef, "pessimism": self.pessimism, "alarms": self.alarms,
            "ended": self.ended, "scale": self.reward.scale.to_json(), "monitor": self.monitor.state(),
            "last_score": self.last_score,
        }  # fmt: skip

    def _resume_or_start(self) -> None:
        monitoring = MonitorConfig(threshold=self.config.alarm_threshold)
        if not self.checkpoint.exists():
            self.monitor = Monitor(monitoring)
            self._fit_scale()
            self.save()
            return
        saved = self.learner.load(self.checkpoint)
        for name in ("step", "kl_coef", "pessimism", "alarms", "ended", "last_score"):
            setattr(self, name, saved[name])
        self.reward.scale = RewardScale.from_json(saved["scale"])
        self.monitor = Monitor.restore(saved["monitor"], monitoring)
        if is_main_process():
            console.print(f"going on from step {self.step} of {self.out.folder}")
            for name in ("metrics.jsonl", "samples.jsonl", "benchmarks.jsonl"):
                keep_rows_before(self.out.folder / name, self.step)
        if self.reward.baselines:
            self.reward.baselines.resume(self.step)

    def _fit_scale(self) -> None:
        """The reward's zero and scale, from completions of the initial policy."""
        config = self.config
        mine = processes.share(config.prompts_per_step)
        found: list[HeadRewards] = []
        batches = max(1, config.baseline_completions // (config.prompts_per_step * config.completions_per_prompt))
        for number in range(batches):
            self.step = -1 - number  # its prompts come from an order of their own
            batch = self._batch()[mine]
            texts = self.policy.texts(self.policy.sample(batch, self._uniforms()))
            found.append(gather(self.reward.heads(self.policy, batch, texts, -1)))
        self.step = 0
        heads = HeadRewards(*(torch.cat(part) for part in zip(*found, strict=True)))
        bounds = (config.reward_floor, config.reward_ceiling)
        floor, ceiling = (
            limit if bound is None else bound for bound, limit in zip(bounds, (-math.inf, math.inf), strict=True)
        )
        self.reward.scale = RewardScale.fit(heads, self._objective(), floor, ceiling)


def sample_policy(
    policy: Policy, reward: PolicyReward, prompts: list[Prompt], per_prompt: int, max_tokens: int, seed: int, step: int
) -> list[Json]:
    """Completions of a policy, with rewards and KL; policies sampled with one seed share their random numbers.

    Every process takes its share of the prompts and returns all rows.
    """
    numbers = uniforms(len(prompts), per_prompt, max_tokens, torch.Generator().manual_seed(seed))
    rows: list[Json] = []
    mine = range(0, len(prompts), 16)[processes.process_index() :: processes.num_processes()]
    with progress("sampling the trained policy", len(mine)) as advance:
        for start in mine:
            batch = prompts[start : start + 16]
            rollout = policy.sample(batch, numbers[start : start + 16])
            texts = policy.texts(rollout)
            heads = reward.heads(policy, batch, texts, step)
            kl = ppo.sequence_kl(
                rollout.logprob_PMT.flatten(0, 1), policy.reference_logprobs(rollout).flatten(0, 1),
                rollout.mask_PMT.flatten(0, 1),
            )  # fmt: skip
            rows += _rows(start, batch, texts, heads, reward.combine(heads), kl)
            advance()
    rows = sorted(processes.gathered_rows(rows), key=lambda row: row["step"])
    return [row | {"step": step} for row in rows]


_FACTS = ("kl", "kl_k3", "logprob", "tokens", "ended")


def _facts(rollout: Rollout, reference: Tensor, end: int) -> Tensor:
    """Per completion (N, 5), on the CPU: see _FACTS."""
    mask, logprob = rollout.mask_PMT.flatten(0, 1), rollout.logprob_PMT.flatten(0, 1)
    reference = reference.flatten(0, 1)
    ended = (rollout.completion_ids_PMT.flatten(0, 1) == end).any(-1).float()
    columns = (
        ppo.sequence_kl(logprob, reference, mask), ppo.sequence_kl_k3(logprob, reference, mask),
        (logprob * mask).sum(-1), mask.sum(-1), ended,
    )  # fmt: skip
    return torch.stack(columns, -1).cpu()


def _rows(
    step: int, prompts: list[Prompt], texts: list[list[str]], heads: HeadRewards, score: Tensor, kl: Tensor
) -> list[Json]:
    pairs = [(prompt, text) for prompt, row in zip(prompts, texts, strict=True) for text in row]
    return [
        {
            "step": step, "prompt": prompt, "completion": text, "reward": score[i].item(), "kl": kl[i].item(),
            "mean": heads.mean[i].tolist(), "std": heads.std[i].tolist(),
        }
        for i, (prompt, text) in enumerate(pairs)
    ]  # fmt: skip


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, Any] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[f"{name}_seconds"] = round(now - self._last, 3)
        self._last = now
