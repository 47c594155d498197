"""One step of a PPO run (sample, score, improve, log), and the checkpoint from which a stopped run resumes."""

import contextlib
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from poise.data.types import Prompt
from poise.errors import PoiseError
from poise.functional import ppo
from poise.functional.monitor import text_signs
from poise.functional.objectives import (
    HeadRewards,
    Objective,
    RewardScale,
    disagreement,
    joined,
    more_pessimistic,
    nominal,
    nominal_head,
    parameter,
    parse_objective,
    routing_std,
    with_parameter,
    worst_case,
)
from poise.functional.reward_scale import said_of_unit, std_interval
from poise.functional.schedules import adaptive_kl_coef, headroom, linear
from poise.integrations.trl_reward import RobustReward
from poise.models.formats import checkpoint_folder
from poise.models.fused_ops import keep_freed_memory
from poise.models.loading import load_policy
from poise.models.policy import Policy
from poise.models.rollout import Rollout, uniforms
from poise.models.run_heads import reward_folder
from poise.models.scorer import Scorer
from poise.models.validator import Validator
from poise.policy.alarms import Alarms
from poise.policy.config import Config
from poise.policy.formats import Checkpoint
from poise.policy.reward import Baselines, PolicyReward, gather
from poise.policy.sampling import sample_rows
from poise.policy.update import Learner
from poise.runtime import distributed as processes
from poise.runtime.folders import write_file_atomic
from poise.runtime.ladder import Best, Ladder, above_budget
from poise.runtime.progress import Clock, console
from poise.runtime.records import checked, undefined_as_none
from poise.runtime.run_folder import Json, Run, append_jsonl, is_main_process, keep_rows_before
from poise.runtime.settings import bounds


class Training:
    """A PPO run between two steps."""

    def __init__(self, config: Config, out: Run, prompts: list[Prompt], given: RobustReward | None = None):
        """given: the reward of `config.reward`, if it is in memory already; its objective may be a function."""
        keep_freed_memory()
        self.config, self.out, self.prompts = config, out, prompts
        self._first_objective = given.combine if given else parse_objective(config.objective)
        scorer = given.scorer if given else Scorer.load(reward_folder(config.reward, config.objective, config.heads))
        if given is None:
            scorer.layout.check_objective(config.objective)
        torch.manual_seed(config.seed)  # initial adapters
        # A GPU need not hold all of the weights that will be spread.
        model, tokenizer = load_policy(config.model, torch.device("cpu") if config.shard else None)
        self.policy = Policy(
            model, tokenizer, adapted_layers=config.adapted_layers, rank=config.lora_rank, tune=config.tune,
            value_trunk=config.value_trunk, gradient_checkpointing=config.gradient_checkpointing,
        )  # fmt: skip
        if config.shard:
            self.policy.spread()
        if tokenizer.get_vocab() != scorer.extract.tokenizer.get_vocab():
            console.print("policy and reward model have different tokenizers: completions are re-tokenized as text")
        self.learner = Learner(self.policy, config, config.seed)
        self.reward = PolicyReward(scorer, self._first_objective, config.shaping, regret_bonus=config.regret_bonus)
        if config.shaping != "none":
            self.reward.baselines = Baselines(
                scorer, config.baselines_per_prompt, config.max_tokens, config.seed, out.folder
            )
            if config.baselines:
                self.reward.baselines.read(config.baselines, prompts)
        self.validator = Validator(config.validator, self.reward.objective) if config.validator else None
        self.scale_interval: tuple[float, float] = (math.nan, math.nan)
        self.step, self.kl_coef, self.alarms = 0, config.kl_coef, Alarms(config.on_alarm, config.alarm_threshold)
        self.ladder, self.best = Ladder(out.folder, config.keep_at_kl), Best(out.folder)
        self._rereading_checked = False
        self._resume_or_start()

    # ---- one step ----

    def one_step(self) -> Json:
        """Sample, score, improve, log; an alarm changes or ends what follows. Returns the step's metrics."""
        config, clock = self.config, Clock()
        batch = self._batch()[processes.share(config.prompts_per_step)]
        rollout = self.policy.sample(batch, self._uniforms(), read_again=False)
        texts = self.policy.texts(rollout)
        clock.lap("sample")
        rollout, reference = self.learner.read(rollout)
        if not self._rereading_checked:  # before this process's first update
            self.policy.check_rereading(rollout)
            self._rereading_checked = True
        clock.lap("reference")
        with _naming(self.step):
            heads = gather(self.reward.heads(self.policy, batch, texts, self.step))
            validated = self._validated(batch, texts, heads)
        facts = processes.gathered(_facts(rollout, reference, self.policy.end_ids))
        kl = facts.mean(0)[_FACTS.index("kl")].item()
        self.ladder.keep(self.step, kl, self.policy.weights, self.policy.save)
        if validated and (config.max_kl is None or kl <= config.max_kl):
            self.best.keep(self.step, kl, validated["validator"], self.policy.weights, self.policy.save)
        score = self._score(heads, ended=facts[:, _FACTS.index("ended")])
        clock.lap("score")
        mine = processes.share(len(score))
        with _naming(self.step):
            paid = self.reward.with_bonus(score[mine], batch, texts)
            losses = self.learner.improve(rollout, paid, reference, self.kl_coef, self._pace(score))
        clock.lap("update")

        part = heads.each(lambda whole: whole[mine])
        rows = processes.gathered_rows(sample_rows(self.step, batch, texts, part, score[mine], facts[mine, 0]))
        metrics = (
            self._metrics(heads, score, facts) | validated | losses | text_signs([row["completion"] for row in rows])
        )
        reading, self.kl_coef = self.alarms.watch(metrics, self.step, self.kl_coef)
        metrics |= reading | clock.seconds
        if self.step == 0 and metrics["ended"] == 0.0 and is_main_process():
            console.print(cut_off(config.max_tokens, config.reward))
        if is_main_process():
            append_jsonl(self.out.folder / "samples.jsonl", rows)
            self.out.log(step=self.step, **metrics)
        self._watch_budget(metrics["kl"])
        self._adapt(metrics)
        self.step += 1
        if self.step % config.save_every == 0:
            self.save()
        return metrics

    def _validated(self, batch: list[Prompt], texts: list[list[str]], heads: HeadRewards) -> Json:
        """What the validator says of this process's completions and all others', whose heads these are."""
        if self.validator is None:
            return {}
        own = gather(self.validator.heads(batch, texts))
        return self.validator.metrics(own, heads, self.config.prompts_per_step)

    def _batch(self) -> list[Prompt]:
        """This step's prompts. An epoch uses every prompt at most once, in an order of its own."""
        per_epoch, count = len(self.prompts) // self.config.prompts_per_step, self.config.prompts_per_step
        epoch, at = divmod(self.step, per_epoch)
        order = torch.randperm(
            len(self.prompts), generator=torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        )
        return [self.prompts[i] for i in order[at * count : (at + 1) * count]]

    def _uniforms(self) -> Tensor:
        """This process's share of the step's random numbers; every process draws all of them."""
        config = self.config
        drawn = uniforms(
            config.prompts_per_step, config.completions_per_prompt, config.max_tokens, self.learner.generator
        )
        return drawn[processes.share(config.prompts_per_step)]

    def _score(self, heads: HeadRewards, ended: Tensor) -> Tensor:
        """Rewards (N,) of the step's completions; --reward-norm running and batch update the scale first."""
        norm, scale, objective = self.config.reward_norm, self.reward.scale, self._objective()
        self.reward.objective = objective
        if norm == "running":
            self.reward.scale = scale.updated(heads, objective)
        elif norm == "batch":
            self.reward.scale = scale.refitted(heads, objective)
        return self.reward.combine(heads) - self.config.missing_eos_penalty * (1 - ended.to(heads.mean))

    def _objective(self, step: int | None = None) -> Objective:
        """The objective with the parameter of a step; by default of this one."""
        step, objective = self.step if step is None else step, self._first_objective
        if self.config.final_parameter is not None:
            start = parameter(objective) or 0.0
            objective = with_parameter(
                objective, linear(start, self.config.final_parameter, step / max(self.config.num_steps - 1, 1))
            )
        for _ in range(self.alarms.pessimism):
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
            "reward_std": undefined_as_none(score.std().item()),  # of a single completion
            **means,
            "entropy": -(facts[:, 2].sum() / facts[:, 3].sum()).item(),  # per token, from the sampled ones
            "heads": centered.mean.mean(0).tolist(),
            "nominal": nominal(centered).mean().item(),
            "worst_case": worst_case(centered).mean().item(),
            "gap": (nominal(centered) - worst_case(centered)).mean().item(),
            "disagreement": disagreement(centered).mean().item(),
            "routing_std": routing_std(centered).mean().item(),
            **({} if heads.distance is None else {"distance": heads.distance.mean().item()}),
            # completions whose nominal head is not the most frequent one among their prompt's
            "switches": (chosen != chosen.mode(-1, keepdim=True).values).float().mean().item(),
            "kl_coef": self.kl_coef,
            "parameter": parameter(self.reward.objective),
            "pace": self._pace(score),
            "scale_mean": self.reward.scale.mean,
            "scale_std": self.reward.scale.std,
            "scale_std_interval": undefined_as_none(self.scale_interval),
        }

    # ---- what follows a step ----

    def _adapt(self, metrics: Json) -> None:
        """Move β toward --kl-target."""
        config = self.config
        if config.kl_target is not None:
            num = config.prompts_per_step * config.completions_per_prompt
            self.kl_coef = adaptive_kl_coef(self.kl_coef, metrics["kl"], config.kl_target, config.kl_horizon, num)

    def _watch_budget(self, kl: float) -> None:
        """Keep the checkpoint that this step began with if it is within --max-kl; otherwise end the run."""
        limit = self.config.max_kl
        if limit is None or self.alarms.ended:
            return
        if kl > limit:
            self.alarms.ended = "max_kl"
            if is_main_process():
                console.print(above_budget(self.step, kl, limit))
        elif self.step % self.config.save_every == 0 and is_main_process():
            with write_file_atomic(self.within) as copy:  # not written yet since the step began
                shutil.copyfile(self.checkpoint, copy)

    # ---- checkpoints ----

    @property
    def checkpoint(self) -> Path:
        return self.out.folder / "checkpoint.safetensors"

    @property
    def safe(self) -> Path:
        """The checkpoint that --on-alarm rollback returns to."""
        return self.out.folder / "safe.safetensors"

    @property
    def within(self) -> Path:
        """The last checkpoint whose KL was within --max-kl."""
        return self.out.folder / "within.safetensors"

    def save(self) -> None:
        """Write the checkpoint. With --on-alarm rollback: after an alarm return to `safe`, before one update it. Above
        --max-kl return to `within`.

        `safe` comes first: a run that is killed between the two files must find it no older than its checkpoint.
        """
        back = {"rollback": self.safe, "max_kl": self.within}.get(self.alarms.ended)
        if back and back.exists():
            self._return_to(self._loaded(back))
        if self.config.on_alarm == "rollback" and self.alarms.policy_looks_safe:
            self.learner.save(self.safe, self._state())
        self.learner.save(self.checkpoint, self._state())
        if back and is_main_process():
            self._drop_later_rows()
        processes.wait()

    def _loaded(self, path: Path) -> Json:
        """Load the learner from a checkpoint; what it holds beside tensors, each value of its type and range."""
        return checked(self.learner.load(path), Checkpoint, str(path))

    def _state(self) -> Json:
        """What a checkpoint holds beside the learner's tensors."""
        return {
            "step": self.step, "rung": self.ladder.reached, "kl_coef": self.kl_coef,
            "scale": self.reward.scale.to_json(),
            "objective_parameter": parameter(self.reward.objective), "num_truncated": self.reward.num_truncated,
            "scale_std_interval": undefined_as_none(self.scale_interval),
            **({"validator": self.validator.state(), "best": self.best.state()} if self.validator else {}),
        } | self.alarms.state()  # fmt: skip

    def _return_to(self, saved: Json) -> None:
        """Take a checkpoint's step and the constants of its reward; the learner has been loaded already.

        The objective is the one last used: at the end of a run it scores the final completions. Checkpoints of earlier
        versions do not hold its parameter; it follows from the step.
        """
        self.step, self.kl_coef, self.ladder.reached = saved["step"], saved["kl_coef"], saved.get("rung", 0.0)
        self.reward.scale = RewardScale.from_json(saved["scale"])
        low, high = (math.nan if bound is None else bound for bound in saved.get("scale_std_interval") or (None, None))
        self.scale_interval = (low, high)
        if self.validator:
            self.validator.restore(saved["validator"])
            self.best.restore(saved.get("best", ()))
        value = saved.get("objective_parameter")
        if "objective_parameter" not in saved:
            self.reward.objective = self._objective(max(self.step - 1, 0))
        elif value is not None:
            self.reward.objective = with_parameter(self._first_objective, value)

    def _drop_later_rows(self) -> None:
        for name in ("metrics.jsonl", "samples.jsonl"):
            keep_rows_before(self.out.folder / name, self.step, first=0)
        keep_rows_before(self.out.folder / "benchmarks.jsonl", self.step)
        self.ladder.drop_from(self.step)

    def _resume_or_start(self) -> None:
        if not self.checkpoint.exists():
            self._fit_scale()
            self.save()
            return
        saved = self._loaded(self.checkpoint)
        self.alarms.restore(saved)
        self._return_to(saved)
        # Given baselines were scored again just now; they are counted in the checkpoint already.
        self.reward.truncated_before = saved.get("num_truncated", 0) - self.reward.scorer.num_truncated
        if is_main_process():
            console.print(f"going on from step {self.step} of {self.out.folder}")
            self._drop_later_rows()
        if self.reward.baselines:
            self.reward.baselines.resume(self.step)

    def _fit_scale(self) -> None:
        """Fit the reward's zero and unit on completions of the initial policy."""
        config = self.config
        mine = processes.share(config.prompts_per_step)
        found: list[HeadRewards] = []
        watched: list[HeadRewards] = []
        batches = max(1, config.baseline_completions // (config.prompts_per_step * config.completions_per_prompt))
        for number in range(batches):
            self.step = -1 - number  # its prompts come from an order of their own
            batch = self._batch()[mine]
            texts = self.policy.texts(self.policy.sample(batch, self._uniforms(), read_again=False))
            found.append(gather(self.reward.heads(self.policy, batch, texts, -1)))
            if self.validator:
                watched.append(gather(self.validator.heads(batch, texts)))
        self.step = 0
        heads = joined(found)
        if self.validator:
            self.validator.fit(joined(watched), heads)
        objective, within = self._objective(), bounds(config.reward_floor, config.reward_ceiling)
        self.reward.scale = scale = RewardScale.fit(heads, objective, *within)
        combined = scale.combined(heads, objective)
        prompts = [number // config.completions_per_prompt for number in range(len(combined))]
        self.scale_interval = std_interval(combined, prompts)
        if is_main_process():
            console.print(said_of_unit(scale.std, self.scale_interval), soft_wrap=True)


@contextlib.contextmanager
def _naming(step: int) -> Iterator[None]:
    """An error within says at which step it was."""
    try:
        yield
    except PoiseError as error:
        raise PoiseError(f"step {step}: {error}; the last checkpoint is kept") from None


def note_of(metrics: Json) -> str:
    """A step in a few words, for the bar; where completions are cut, how many."""
    cut = 1 - metrics.get("ended", 1.0)
    note = f"reward {metrics['reward']:+z.2f}  KL {metrics.get('kl', 0.0):z.1f}"
    return f"{note}  {cut:.0%} cut" if cut > 0.5 else note


def cut_off(max_tokens: int, reward: str) -> str:
    """What to say where no completion ends by itself, with a length that the answers people chose would have fit in."""
    text = (
        f"no completion ended within --max-tokens {max_tokens}: the reward model judges texts that break off, and the "
        f"policy cannot learn to end"
    )
    lengths = (Run(Path(checkpoint_folder(reward)).parent).results or {}).get("chosen_tokens")
    if not lengths:
        return f"{text}; give more"
    return f"{text}; of the answers people chose, half have {lengths['median']} tokens and nine in ten {lengths['p90']}"


_FACTS = ("kl", "kl_k3", "logprob", "tokens", "ended")


def _facts(rollout: Rollout, reference: Tensor, end_ids: list[int]) -> Tensor:
    """Per completion (N, 5), on the CPU: see _FACTS."""
    mask, logprob = rollout.mask_PMT.flatten(0, 1), rollout.logprob_PMT.flatten(0, 1)
    reference = reference.flatten(0, 1)
    ended = rollout.ended(end_ids).flatten().float()
    columns = (
        ppo.sequence_kl(logprob, reference, mask), ppo.sequence_kl_k3(logprob, reference, mask),
        (logprob * mask).sum(-1), mask.sum(-1), ended,
    )  # fmt: skip
    return torch.stack(columns, -1).cpu()
