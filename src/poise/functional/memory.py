"""How much memory of a GPU a training takes, part by part: sums over a model's shape and the settings.

Weights, gradients, optimizer states, messages, caches and tables of logits follow from counts. What the layers of an
update keep is measured elsewhere (`poise.models.sizing`) and is a number here.

A run holds some parts all the time. Others come and go by phase: what is needed is what is held, and the largest phase.
Sizes are bytes; b is bytes per frozen weight: 2 for bfloat16, 4 for float32. What is trained is float32 (`FULL`), with
one gradient and two states of Adam (arXiv 1412.6980).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from poise.functional.shapes import checked
from poise.runtime.settings import Count

FULL = 4  # bytes of float32
GIB = 2**30
SAMPLED_AT_ONCE = 8 * GIB  # bytes of keys and values: completions that would have more are sampled in turns
SCORED_AT_ONCE = 4096  # tokens that go through a reward model's trunk at once; eight times as many are attended to
TILE = (4096, 32768)  # tokens and words of the vocabulary that TRL projects at once
TILE_TABLES = (12, 29)  # bytes of an entry on a CPU, forward and backward: float32 tables beside the tile's own
Tune = Literal["lora", "full"]


@dataclass(frozen=True)
class ModelShape:
    """Counts of a language model or a trunk."""

    num_layers: int
    layer: int  # weights of a decoder layer
    outside: int  # weights outside of the layers: embeddings, last norm, output layer; a tied one counts once
    linear_sizes: int  # in + out, summed over the linear maps of a layer: adapter weights of a layer per rank
    linear: int  # weights of those maps
    hidden: int
    vocabulary: int
    cached: int  # keys and values of a token in all layers

    @property
    def weights(self) -> int:
        return self.num_layers * self.layer + self.outside

    def upper(self, adapted_layers: int) -> int:
        """How many layers are trained: 0 stands for all."""
        return min(adapted_layers or self.num_layers, self.num_layers)


class Memory(NamedTuple):
    """Bytes on one GPU, by part."""

    held: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]  # of each phase, what it adds

    @property
    def peak_phase(self) -> str:
        """The phase that adds most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> dict[str, int]:
        """The parts that exist in that phase."""
        return {**self.held, **self.phases[self.peak_phase]}

    @property
    def total(self) -> int:
        return sum(self.peak.values())

    @property
    def bottleneck(self) -> str:
        """The largest part."""
        return max(self.peak, key=lambda name: self.peak[name])


@dataclass(frozen=True)
class Measured:
    """Bytes that layers keep and free, each as the largest sum at one time, beyond weights and gradients."""

    update: int  # of one part of a minibatch, forward and backward, without the output layer
    update_logits: int = 0  # what the output layer adds to it
    reading: int = 0  # a rollout, or a part of it, read without gradients
    prefill: int = 0  # all prompts that are sampled in one turn, read without gradients


class _Rollout:
    """What is sampled in a step on one GPU."""

    shape: ModelShape
    reward: ModelShape
    prompts: int
    completions: int
    prompt_tokens: int
    max_tokens: int
    frozen_bytes: int
    validator: ModelShape | None

    @property
    def rows(self) -> int:
        """Completions of a step on this GPU."""
        return self.prompts * self.completions

    @property
    def row(self) -> int:
        """Bytes of the keys and values of a completion and its prompt."""
        return (self.prompt_tokens + self.max_tokens) * self.shape.cached * self.frozen_bytes


@dataclass(frozen=True)
class PolicyRun(_Rollout):
    """What the memory of PPO depends on."""

    shape: ModelShape
    reward: ModelShape
    tune: Tune
    own_values: bool
    adapted_layers: int
    lora_rank: int
    prompts: int  # of a step on this GPU
    completions: int
    prompt_tokens: int
    max_tokens: int
    gpus: int = 1
    shard: bool = False
    frozen_bytes: int = 2
    validator: ModelShape | None = None

    @property
    def turn(self) -> tuple[int, int]:
        """Prompts, and completions of each, that are sampled in one turn."""
        return sampled_at_once(self.prompts, self.completions, self.row)


@checked
def sampled_at_once(prompts: Count, completions: Count, row: Count) -> tuple[int, int]:
    """(prompts, completions of each) that are sampled in one turn: of turns about equally large, as few as will do.

    row: bytes of the keys and values of one completion and its prompt. One completion is sampled however large it is.

    >>> sampled_at_once(8, 4, 2 * GIB), sampled_at_once(9, 4, GIB), sampled_at_once(8, 16, GIB)
    ((1, 4), (2, 4), (1, 8))
    """
    fit = SAMPLED_AT_ONCE // row
    if fit >= completions:
        turns = -(-prompts // (fit // completions))
        return -(-prompts // turns), completions
    turns = -(-completions // max(fit, 1))
    return 1, -(-completions // turns)


def adapters(shape: ModelShape, layers: int, rank: int) -> int:
    """Weights of LoRA on all linear maps of some layers: rank (in + out) each (arXiv 2106.09685)."""
    return layers * rank * shape.linear_sizes


def policy_memory(run: PolicyRun, measured: Measured) -> Memory:
    """Of PPO (`poise train-policy`).

    Sharded, the layers are spread over the GPUs; embeddings and output layer stay whole on each, and the layers are
    whole while completions are sampled. Reward model and validator are whole on each GPU.
    """
    shape, b, layers = run.shape, run.frozen_bytes, run.shape.upper(run.adapted_layers)
    over = run.gpus if run.shard else 1
    if run.tune == "lora":
        trained, trained_outside = adapters(shape, layers, run.lora_rank), 0
        in_layers = shape.num_layers * shape.layer * b + trained * FULL
        outside = shape.outside * b
    else:
        trained = layers * shape.layer
        trained_outside = shape.outside if layers == shape.num_layers else 0
        in_layers = (shape.num_layers - layers) * shape.layer * b + trained * FULL
        outside = shape.outside * (FULL if trained_outside else b)
    head = 4 * FULL * (shape.hidden + 1)  # of the values, with gradient and states
    own = 0
    if run.own_values:
        copied = layers * shape.layer * b if run.tune == "lora" else 0
        own = (copied + 4 * trained * FULL) // over + 4 * trained_outside * FULL
    every = (trained // over + trained_outside) * FULL
    held = {
        "weights": in_layers // over + outside,
        "gradients": every,
        "optimizer": 2 * every,
        "reference": every if run.tune == "full" else 0,
        "values": own + head,
        **_judges(run),
    }
    tokens = run.prompts * run.prompt_tokens + run.rows * run.max_tokens
    entering = tokens * shape.hidden * b if layers < shape.num_layers else 0
    whole = in_layers - in_layers // over
    sampled = run.turn[0] * run.turn[1]
    cache = sampled * run.row
    messages = 2 * (trained + trained_outside) * FULL * (2 if run.own_values else 1) if run.gpus > 1 else 0
    if run.shard:
        messages = 2 * trained_outside * FULL
    gathered = 2 * in_layers // shape.num_layers if run.shard and run.gpus > 1 else 0  # a layer, and the next one
    times = 2 if run.own_values else 1
    phases = {
        "sampling": {
            "rollout cache": cache + cache // (2 * shape.num_layers),  # a layer's keys are written anew
            "logits": sampled * shape.vocabulary * (b + 20),
            "rollout": 2 * entering,
            "activations": measured.prefill,
            "folded weights": layers * shape.linear * FULL if b == FULL and run.tune == "lora" else 0,
            "whole layers": whole,
        },
        "reading": {"rollout": entering, "activations": measured.reading, "whole layers": gathered},
        "scoring": {
            "rollout": entering,
            "reward cache": _reward_cache(run),
        },
        "update": {
            "rollout": entering,
            "activations": times * measured.update,
            "logits": measured.update_logits,
            "messages": messages,
            "whole layers": gathered * times,
        },
    }
    return Memory(held, phases)


@dataclass(frozen=True)
class TrlRun(_Rollout):
    """What the memory of RLOO and GRPO depends on, as `poise train-policy` runs TRL's trainers.

    They train adapters, read every completion with a prompt of its own, and compute a minibatch as one part.
    """

    shape: ModelShape
    reward: ModelShape
    adapted_layers: int
    lora_rank: int
    prompts: int  # of a step on this GPU
    completions: int
    minibatches: int
    prompt_tokens: int
    max_tokens: int
    gpus: int = 1
    shard: bool = False
    frozen_bytes: int = 2
    validator: ModelShape | None = None

    @property
    def part(self) -> int:
        """Completions of an update on this GPU."""
        return -(-self.rows // self.minibatches)

    @property
    def turn(self) -> int:
        """Completions that are sampled in one turn."""
        return sampled_at_once(self.rows, 1, self.row)[0]


def trl_memory(run: TrlRun, measured: Measured) -> Memory:
    """Of RLOO and GRPO (`poise train-policy --algorithm`), alike but for tensors of one number a token.

    The reference is the policy without its adapters. TRL projects onto the vocabulary tile by tile; a GPU's kernel
    folds a tile in place, on a CPU it is taken apart. Sharded, accelerate spreads embeddings and output layer, too.
    """
    shape, b = run.shape, run.frozen_bytes
    over = run.gpus if run.shard else 1
    several = run.gpus > 1
    trained = adapters(shape, shape.upper(run.adapted_layers), run.lora_rank) * FULL
    weights = shape.weights * b + trained
    held = {
        "weights": weights // over,
        "optimizer": 2 * trained // over,
        **_judges(run),
    }
    token = run.turn * shape.cached * b  # keys and values of one token of all that are sampled at once
    cache, whole = token * (run.prompt_tokens + run.max_tokens), weights - weights // over
    tokens = run.part * (run.prompt_tokens + run.max_tokens)
    scored = run.part * run.max_tokens if b < FULL else tokens  # a GPU's kernel takes completions alone
    words = min(shape.vocabulary, TILE[1])
    forward, backward = (
        min(scored, TILE[0]) * (TILE[1] * b + words * (more if b == FULL else 0)) for more in TILE_TABLES
    )
    gathered = 2 * shape.layer * b + shape.outside * b if run.shard and several else 0
    phases = {
        "prompts": {
            "rollout cache": token * run.prompt_tokens,
            "activations": measured.prefill,
            "whole layers": whole,
        },
        "sampling": {
            "rollout cache": cache + cache // (2 * shape.num_layers),  # a layer's keys are written anew
            "logits": run.turn * shape.vocabulary * (b + 8),
            "whole layers": whole,
        },
        "reading": {"activations": measured.reading, "logits": forward, "whole layers": gathered},
        "scoring": {"reward cache": _reward_cache(run)},
        "update": {
            "gradients": trained // over,
            "activations": measured.update,
            "logits": backward + scored * shape.hidden * FULL,
            "messages": trained if several and not run.shard else 0,
            "whole layers": gathered,
        },
    }
    return Memory(held, phases)


def _judges(run: _Rollout) -> dict[str, int]:
    """Bytes of the weights of the reward model, and of a validator."""
    judges = {"reward model": run.reward} | ({"validator": run.validator} if run.validator else {})
    return {name: shape.weights * run.frozen_bytes for name, shape in judges.items()}


def _reward_cache(run: _Rollout) -> int:
    """Bytes of the keys and values that are kept while completions are scored: of all prompts, and a copy for each
    completion. Reward model and validator score one after the other."""
    prompts = min(run.prompts * run.prompt_tokens, SCORED_AT_ONCE)
    tokens = prompts + min(run.rows * (run.prompt_tokens + run.max_tokens), 8 * SCORED_AT_ONCE)
    return tokens * max(run.reward.cached, run.validator.cached if run.validator else 0) * run.frozen_bytes


@dataclass(frozen=True)
class RewardRun:
    """What the memory of training a reward model with its trunk depends on.

    autocast: bfloat16 does the arithmetic. adapter_heads: heads with adapters of their own on the upper `head_layers`
    layers (0: all), in a frozen trunk; 0: none, and `tune` says what is trained.
    """

    shape: ModelShape
    tune: Tune
    lora_rank: int
    gpus: int = 1
    shard: bool = False
    autocast: bool = True
    adapter_heads: int = 0
    head_layers: int = 0


def reward_memory(run: RewardRun, measured: Measured) -> Memory:
    """Of `poise train-reward` with a trained trunk. All weights are float32; sharded, all are spread over the GPUs."""
    shape, over = run.shape, run.gpus if run.shard else 1
    added = run.tune == "lora" or run.adapter_heads > 0
    layers = shape.upper(run.head_layers if run.adapter_heads else 0)
    trained = max(run.adapter_heads, 1) * adapters(shape, layers, run.lora_rank) if added else shape.weights
    weights = shape.weights + (trained if added else 0)
    held = {
        "weights": weights * FULL // over,
        "gradients": trained * FULL // over,
        "optimizer": 2 * trained * FULL // over,
    }
    sharded = run.shard and run.gpus > 1
    # Under autocast a trained weight keeps its bfloat16 copy until the update is done; sharded, until its layer is.
    casts = trained * 2 // (shape.num_layers if sharded else 1) if run.autocast else 0
    phases = {
        "update": {
            "activations": measured.update,
            "rounded weights": casts,
            "messages": trained * FULL if run.gpus > 1 and not run.shard else 0,
            "whole layers": (2 * shape.layer + shape.outside) * FULL if sharded else 0,
        }
    }
    return Memory(held, phases)
