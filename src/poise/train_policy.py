"""`poise train-policy`: PPO against a reward model, conventional or robust.

    RUN/metrics.jsonl     per step: reward, every head, gap, disagreement, KL, lengths, losses
    RUN/samples.jsonl     every completion of every step with what each head said
    RUN/final.jsonl       completions of the trained policy on the evaluation prompts
    RUN/policy/           LoRA adapters (PEFT format)
    RUN/checkpoint.safetensors   everything needed to go on after a kill, to the same result

Rewards: each head is centred on the initial policy's completions, the objective combines the heads, and the combined
reward is divided by its std on those completions. The constants are fixed before step 0 and recorded, so kl_coef
means the same from the first step to the last.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from poise import ppo
from poise.data import OnBadRow, read_prompts
from poise.errors import PoiseError
from poise.models import DEFAULT_MODEL, Prompt, load_policy
from poise.objectives import (
    HeadRewards,
    Objective,
    RewardScale,
    disagreement,
    nominal,
    parse_objective,
    routing_std,
    worst_case,
)
from poise.policy import Policy, Rollout
from poise.progress import console, progress
from poise.runs import Json, Run, append_jsonl, keep_rows_before, write_jsonl
from poise.scorer import Scorer, generated


@dataclass(frozen=True)
class Config:
    """Train a policy by PPO against a reward model, with the objective of your choice."""

    prompts: str
    """JSON lines with `prompt`: text, or a conversation."""
    reward: str
    """Reward model: a checkpoint folder, a hub id of a one-label classifier, or a `poise train-reward` run."""
    output: str = "runs/policy"
    """Run folder to write."""
    model: str = DEFAULT_MODEL
    """Local folder or hub id of the language model to train."""
    objective: str = "tradeoff(0.4)"
    """How the heads become one reward: nominal, worst_case, tradeoff(λ), mean, uncertainty_weighted(c),
    lower_confidence(c), soft_min(t), constant(v)."""
    kl_coef: float = 0.05
    """β: weight of the KL to the initial policy, per nat, against a reward of std 1."""
    num_steps: int = 40
    """PPO steps."""
    prompts_per_step: int = 4
    """Prompts drawn for each step."""
    completions_per_prompt: int = 8
    """Completions sampled of each prompt."""
    max_tokens: int = 20
    """Longest completion, in tokens."""
    learning_rate: float = 1e-3
    """Of the LoRA adapters (Adam)."""
    value_learning_rate: float = 1e-3
    """Of the value head (Adam)."""
    num_epochs: int = 2
    """Passes over each step's completions."""
    num_minibatches: int = 2
    """Minibatches per pass; must divide the prompts per step."""
    clip: float = 0.2
    """Clip range of the probability ratio."""
    value_clip: float = 0.2
    """Clip range of the values."""
    discount: float = 1.0
    """γ of the advantage estimate."""
    trace: float = 0.95
    """λ of the advantage estimate."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    adapted_layers: int = 10
    """Upper layers that get LoRA; 0 adapts all. The frozen ones below are computed once."""
    lora_rank: int = 16
    """Rank of the LoRA, on all linear maps of a layer."""
    baseline_completions: int = 64
    """Completions of the initial policy that fix the reward's zero and scale."""
    eval_prompts: str = ""
    """Prompts for the completions in final.jsonl; default: the training prompts."""
    eval_completions: int = 4
    """Completions of each evaluation prompt."""
    save_every: int = 5
    """Steps between checkpoints."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""
    seed: int = 0
    """Of the prompts drawn, the sampling and the minibatches."""


def run(config: Config) -> Run:
    """Train to the end, from the last checkpoint if there is one; a finished run is returned as it is."""
    objective = _check(config)
    out = Run.open(config.output, config)
    if out.results is not None:
        return out
    prompts = read_prompts(config.prompts, config.on_bad_row)
    eval_prompts = read_prompts(config.eval_prompts, config.on_bad_row) if config.eval_prompts else prompts
    if len(prompts) < config.prompts_per_step:
        raise PoiseError(
            f"{config.prompts} has {len(prompts)} prompts, --prompts-per-step is {config.prompts_per_step}"
        )
    scorer = Scorer.load(config.reward)
    torch.manual_seed(config.seed)  # initial adapters
    model, tokenizer = load_policy(config.model)
    policy = Policy(model, tokenizer, adapted_layers=config.adapted_layers, rank=config.lora_rank)
    if tokenizer.get_vocab() != scorer.extract.tokenizer.get_vocab():
        console.print("policy and reward model have different tokenizers: completions are re-tokenised as text")
    started = time.monotonic()
    state = _start(config, out, policy, scorer, objective, prompts)
    for name in ("metrics.jsonl", "samples.jsonl"):
        keep_rows_before(out.folder / name, state.step)

    with progress(f"PPO on {config.objective}", config.num_steps, state.step) as advance:
        while state.step < config.num_steps:
            metrics = ppo_step(config, state, policy, scorer, objective, prompts, out)
            out.log(step=state.step, **metrics)
            state.step += 1
            if state.step % config.save_every == 0:
                state.save(out.folder / "checkpoint.safetensors", policy)
            advance(1, f"reward {metrics['reward']:+.2f}  KL {metrics['kl']:.1f}")
    state.save(out.folder / "checkpoint.safetensors", policy)

    final = _sample_final(config, state, policy, scorer, objective, eval_prompts)
    write_jsonl(out.folder / "final.jsonl", final)
    policy.model.save_pretrained(str(out.folder / "policy"))
    out.finish(
        {
            "reward": sum(row["reward"] for row in final) / len(final),
            "kl": sum(row["kl"] for row in final) / len(final),
            "num_heads": scorer.layout.num_heads,
            "num_truncated": scorer.extract.num_truncated,
            "scale": vars(state.scale),
            "seconds": round(time.monotonic() - started, 1),
        }
    )
    return out


def _check(config: Config) -> Objective:
    """Everything that can be wrong before a model is loaded."""
    objective = parse_objective(config.objective)
    counts = ("num_steps", "prompts_per_step", "completions_per_prompt", "max_tokens", "num_epochs", "num_minibatches")
    for name in (*counts, "lora_rank", "baseline_completions", "eval_completions", "save_every"):
        if getattr(config, name) < 1:
            raise PoiseError(f"--{name.replace('_', '-')} must be at least 1")
    if config.prompts_per_step % config.num_minibatches:
        raise PoiseError(
            f"--num-minibatches {config.num_minibatches} does not divide --prompts-per-step {config.prompts_per_step}"
        )
    if config.kl_coef < 0:
        raise PoiseError(f"--kl-coef must be at least 0, got {config.kl_coef}")
    return objective


# ---- one step ----


def ppo_step(
    config: Config,
    state: "State",
    policy: Policy,
    scorer: Scorer,
    objective: Objective,
    prompts: list[Prompt],
    out: Run,
) -> Json:
    """Sample, score, improve; logs the completions and returns the step's metrics."""
    clock = _Clock()
    batch = state.draw(prompts, config.prompts_per_step)
    rollout = policy.sample(batch, config.completions_per_prompt, config.max_tokens, state.generator)
    clock.lap("sample")
    heads = score_rollout(policy, scorer, rollout, batch)
    score = state.scale.combine(heads, objective)
    clock.lap("score")
    reference = policy.reference_logprobs(rollout)
    clock.lap("reference")
    losses = improve(config, state, policy, rollout, score, reference)
    clock.lap("update")

    mask, logprob = rollout.mask_PMT.flatten(0, 1), rollout.logprob_PMT.flatten(0, 1)
    kl = ppo.sequence_kl(logprob, reference.flatten(0, 1), mask)
    append_jsonl(out.folder / "samples.jsonl", _rows(state.step, policy, rollout, batch, heads, score, kl))
    centred = state.scale.centred(heads)
    return {
        "reward": score.mean().item(),
        "kl": kl.mean().item(),
        "kl_k3": ppo.sequence_kl_k3(logprob, reference.flatten(0, 1), mask).mean().item(),
        "entropy": -ppo.masked_mean(logprob, mask).item(),  # per token, estimated by the sampled tokens
        "tokens": mask.sum(-1).mean().item(),
        "ended": _ended(policy, rollout).float().mean().item(),
        "heads": centred.mean.mean(0).tolist(),
        "nominal": nominal(centred).mean().item(),
        "worst_case": worst_case(centred).mean().item(),
        "gap": (nominal(centred) - worst_case(centred)).mean().item(),
        "disagreement": disagreement(centred).mean().item(),
        "routing_std": routing_std(centred).mean().item(),
        **losses,
        **clock.seconds,
    }


def score_rollout(policy: Policy, scorer: Scorer, rollout: Rollout, prompts: list[Prompt]) -> HeadRewards:
    """Heads (P * M, K) of a rollout's completions, on the CPU."""
    texts = policy.texts(rollout)
    return scorer([generated(prompt, text) for prompt, row in zip(prompts, texts, strict=True) for text in row])


def improve(
    config: Config, state: "State", policy: Policy, rollout: Rollout, score: Tensor, reference: Tensor
) -> dict[str, float]:
    """PPO epochs over one rollout (score (P * M,), reference log-probabilities (P, M, T)); mean losses."""
    parameters = list(policy.trained_parameters().values())
    device, shape = rollout.mask_PMT.device, rollout.mask_PMT.shape
    mask, old_values = rollout.mask_PMT.flatten(0, 1), rollout.value_PMT.flatten(0, 1)
    rewards = ppo.token_rewards(
        score.to(device), rollout.logprob_PMT.flatten(0, 1), reference.flatten(0, 1), mask, config.kl_coef
    )
    advantages, returns = ppo.gae(rewards, old_values, mask, config.discount, config.trace)
    advantages = ppo.whiten(advantages, mask)
    fixed = [value.view(shape) for value in (advantages, returns, old_values)]

    totals = {"policy_loss": 0.0, "value_loss": 0.0, "clipped": 0.0, "grad_norm": 0.0}
    for _ in range(config.num_epochs):
        order = torch.randperm(shape[0], generator=state.generator).to(device)
        for index in order.chunk(config.num_minibatches):
            part = rollout.rows(index)
            logprob, values = policy.evaluate(part)
            advantage, target, old = (value[index].flatten(0, 1) for value in fixed)
            part_mask, old_logprob = part.mask_PMT.flatten(0, 1), part.logprob_PMT.flatten(0, 1)
            loss, clipped = ppo.policy_loss(logprob.flatten(0, 1), old_logprob, advantage, part_mask, config.clip)
            fit = ppo.value_loss(values.flatten(0, 1), old, target, part_mask, config.value_clip)
            state.optimiser.zero_grad()
            (loss + fit).backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            if not torch.isfinite(norm):
                raise PoiseError(f"step {state.step}: the gradient is not finite; the last checkpoint is kept")
            state.optimiser.step()
            for name, value in zip(totals, (loss, fit, clipped, norm), strict=True):
                totals[name] += value.item() / (config.num_epochs * config.num_minibatches)
    return totals


# ---- state that survives a kill ----


class State:
    """What a run needs to go on: step, optimiser, random numbers, the reward's scale. Weights live in the policy."""

    def __init__(self, config: Config, policy: Policy):
        self.step = 0
        self.generator = torch.Generator().manual_seed(config.seed)
        self.scale = RewardScale((), 0.0, 1.0)
        named = policy.trained_parameters()
        value = [parameter for name, parameter in named.items() if name.startswith("value_head")]
        adapters = [parameter for name, parameter in named.items() if not name.startswith("value_head")]
        self.optimiser = torch.optim.Adam(
            [{"params": adapters, "lr": config.learning_rate}, {"params": value, "lr": config.value_learning_rate}]
        )

    def draw(self, prompts: list[Prompt], count: int) -> list[Prompt]:
        """`count` different prompts at random."""
        return [prompts[i] for i in torch.randperm(len(prompts), generator=self.generator)[:count]]

    def save(self, path: Path, policy: Policy) -> None:
        """One safetensors file, replaced atomically."""
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state()}
        for name, parameter in policy.trained_parameters().items():
            tensors[f"weight.{name}"] = parameter.data
            tensors |= {f"{key}.{name}": value for key, value in self.optimiser.state[parameter].items()}
        metadata = {"step": str(self.step), "scale": json.dumps(vars(self.scale))}
        scratch = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, scratch, metadata)
        scratch.replace(path)

    def load(self, path: Path, policy: Policy) -> None:
        """Inverse of `save`."""
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            self.step = int(metadata["step"])
            scale = json.loads(metadata["scale"])
            self.scale = RewardScale(**(scale | {"head_baseline": tuple(scale["head_baseline"])}))
            self.generator.set_state(file.get_tensor("generator"))
            for name, parameter in policy.trained_parameters().items():
                parameter.data.copy_(file.get_tensor(f"weight.{name}"))
                self.optimiser.state[parameter] = {
                    key: file.get_tensor(f"{key}.{name}").to("cpu" if key == "step" else parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }


def _start(
    config: Config, out: Run, policy: Policy, scorer: Scorer, objective: Objective, prompts: list[Prompt]
) -> State:
    state = State(config, policy)
    checkpoint = out.folder / "checkpoint.safetensors"
    if checkpoint.exists():
        state.load(checkpoint, policy)
        console.print(f"going on from step {state.step} of {out.folder}")
        return state
    per_prompt = config.completions_per_prompt
    heads: list[HeadRewards] = []
    for _ in range(max(1, config.baseline_completions // (per_prompt * config.prompts_per_step))):
        batch = state.draw(prompts, config.prompts_per_step)
        rollout = policy.sample(batch, per_prompt, config.max_tokens, state.generator)
        heads.append(score_rollout(policy, scorer, rollout, batch))
    state.scale = RewardScale.fit(HeadRewards(*(torch.cat(part) for part in zip(*heads, strict=True))), objective)
    return state


def _sample_final(
    config: Config, state: State, policy: Policy, scorer: Scorer, objective: Objective, prompts: list[Prompt]
) -> list[Json]:
    rows: list[Json] = []
    generator = torch.Generator().manual_seed(config.seed)  # arms of one seed are compared on the same random numbers
    with progress("sampling the trained policy", len(prompts)) as advance:
        for start in range(0, len(prompts), 16):
            batch = prompts[start : start + 16]
            rollout = policy.sample(batch, config.eval_completions, config.max_tokens, generator)
            heads = score_rollout(policy, scorer, rollout, batch)
            reference = policy.reference_logprobs(rollout)
            kl = ppo.sequence_kl(
                rollout.logprob_PMT.flatten(0, 1), reference.flatten(0, 1), rollout.mask_PMT.flatten(0, 1)
            )
            score = state.scale.combine(heads, objective)
            rows += _rows(config.num_steps, policy, rollout, batch, heads, score, kl)
            advance(len(batch))
    return rows


def _rows(
    step: int, policy: Policy, rollout: Rollout, prompts: list[Prompt], heads: HeadRewards, score: Tensor, kl: Tensor
) -> list[Json]:
    texts = [(prompt, text) for prompt, row in zip(prompts, policy.texts(rollout), strict=True) for text in row]
    return [
        {
            "step": step, "prompt": prompt, "completion": text, "reward": score[i].item(), "kl": kl[i].item(),
            "mean": heads.mean[i].tolist(), "std": heads.std[i].tolist(),
        }
        for i, (prompt, text) in enumerate(texts)
    ]  # fmt: skip


def _ended(policy: Policy, rollout: Rollout) -> Tensor:
    return (rollout.completion_ids_PMT == policy.tokenizer.eos_token_id).any(-1)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, Any] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[f"{name}_seconds"] = round(now - self._last, 3)
        self._last = now
