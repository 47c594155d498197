"""`poise plan`: does a training fit the GPUs there are, and if not, what is in the way? From config.json alone."""

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from poise.errors import PoiseError
from poise.functional.memory import (
    GIB,
    Measured,
    Memory,
    PolicyRun,
    RewardRun,
    TrlRun,
    policy_memory,
    reward_memory,
    trl_memory,
)
from poise.integrations.trl_needs import check_group
from poise.models.choices import DEFAULT_MODEL, Tune, ValueTrunk
from poise.models.model_folder import check_layers, check_shape
from poise.policy.config import Config as Policy
from poise.reward.config import Config as Reward
from poise.runtime.display import on_one_line
from poise.runtime.settings import Count, Length, Positive, Settings, WholeNumber, between

MOST_TOKENS_OF_A_STEP = 1 << 32
MOST_TOKENS = 1 << 26  # in one update; they are listed one by one
USABLE = 0.9  # share of a GPU that tensors get; the rest is the driver's, the kernels' and lost between tensors


@dataclass(frozen=True)
class Config(Settings):
    """Compute the memory of each GPU in train-reward and in train-policy, part by part. Reads config.json alone.

    Exit status: 0 if both fit, 1 if one does not.
    """

    model: str = DEFAULT_MODEL
    """Folder or hub id of the language model."""
    reward: str = ""
    """Folder or hub id of the reward model's trunk; default: the same as --model."""
    validator: str = ""
    """train-policy: folder or hub id of a validator's trunk, such as RUN/validator; default: none."""
    algorithm: Literal["ppo", "rloo", "grpo"] = Policy.algorithm
    """train-policy: its algorithm. RLOO and GRPO train adapters, a minibatch as one part, on GPUs always with gradient
    checkpointing."""
    gpus: Count = 1
    """GPUs, one process each."""
    memory: Positive = 80.0
    """Memory of a GPU, in GiB; a tenth of it is left for what is not tensors."""
    tune: Tune = "lora"
    """`lora` adapters, or all weights (`full`), in both trainings."""
    shard: bool = False
    """Spread weights, gradients and optimizer states over the GPUs, in both trainings."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, in both trainings."""
    prompt_tokens: Count = 256
    """Tokens of the longest prompt."""
    max_tokens: Count = Policy.max_tokens
    """train-policy: longest completion, in tokens."""
    prompts_per_step: Count = Policy.prompts_per_step
    """train-policy: prompts of each step, over all GPUs."""
    completions_per_prompt: Count = Policy.completions_per_prompt
    """train-policy: completions of each prompt."""
    num_minibatches: Count = Policy.num_minibatches
    """train-policy: minibatches per pass."""
    accumulation: Count = Policy.accumulation
    """train-policy: parts in which a minibatch is computed."""
    adapted_layers: WholeNumber = Policy.adapted_layers
    """train-policy: upper layers that are trained; 0 trains all."""
    lora_rank: Count = Policy.lora_rank
    """Rank of the adapters, in both trainings."""
    value_trunk: ValueTrunk = Policy.value_trunk
    """train-policy: values from the policy's hidden states, or from layers of their `own`."""
    max_length: Length = Reward.max_length
    """train-reward: longest sample, in tokens."""
    device_batch_size: Count = Reward.device_batch_size
    """train-reward: preferences per forward pass and GPU."""
    adapter_heads: Annotated[int, between(0, 1024)] = 0
    """train-reward: heads with adapters of their own, as `--stage2-trunk lora_per_head` trains them; 0: none."""
    head_layers: WholeNumber = Reward.head_layers
    """train-reward: upper layers that these adapters lie on; 0: all."""

    READ_WITH = MappingProxyType({"lora_rank": (lambda one: one.tune == "lora", "--tune lora")})

    def check(self) -> None:
        """As `Settings.check`, and what train-reward and train-policy refuse."""
        super().check()
        if self.adapter_heads and self.shard:
            raise PoiseError("--adapter-heads does not go with --shard: leave one of them out")
        for name in ("tune", "value_trunk", "accumulation"):
            if self.algorithm != "ppo" and getattr(self, name) != getattr(Config, name):
                raise PoiseError(f"--{name.replace('_', '-')} is for --algorithm ppo, not {self.algorithm}")
        if self.head_layers and not self.adapter_heads:
            raise PoiseError("--head-layers needs --adapter-heads, whose adapters lie there")
        shares = self.num_minibatches * self.gpus
        if self.prompts_per_step % shares:
            over = f" × {self.gpus} GPUs" if self.gpus > 1 else ""
            raise PoiseError(
                f"--num-minibatches {self.num_minibatches}{over} does not divide --prompts-per-step "
                f"{self.prompts_per_step}, which train-policy refuses; "
                f"--prompts-per-step {-(-self.prompts_per_step // shares) * shares} would do"
            )
        if self.algorithm != "ppo":
            check_group(self.algorithm, self.completions_per_prompt)
        for name in dict.fromkeys((self.model, self.reward or self.model, self.validator or self.model)):
            check_shape(name)
        if self.adapted_layers != Config.adapted_layers:  # more than a small model has are planned for by default
            check_layers(self.model, "--adapted-layers", self.adapted_layers)
        check_layers(self.reward or self.model, "--head-layers", self.head_layers)
        if (tokens := 2 * self.device_batch_size * self.max_length) > MOST_TOKENS:
            raise PoiseError(f"{tokens:,} tokens at once are more than any GPU holds; lower --device-batch-size")
        rows = self.prompts_per_step * self.completions_per_prompt
        if (tokens := (self.prompt_tokens + self.max_tokens) * rows) > MOST_TOKENS_OF_A_STEP:
            raise PoiseError(f"{tokens:,} tokens in a step are more than any run draws; lower --prompts-per-step")


class Plan(NamedTuple):
    """Both trainings, and what makes those that do not fit fit."""

    config: Config
    memory: dict[str, Memory]
    changes: dict[str, tuple[str, ...] | None]  # of each that does not fit; None if nothing known helps

    @property
    def fits(self) -> bool:
        return not self.changes


def run(config: Config) -> Plan:
    """Print the plan."""
    config.check()
    plan = plan_of(config)
    print(as_text(plan))
    return plan


def check_outcome(plan: Plan) -> None:
    """Exit status 1 if a training does not fit."""
    if not plan.fits:
        raise SystemExit(1)


def plan_of(config: Config) -> Plan:
    """The memory of both trainings."""
    shapes = _Shapes(config)
    memory = {name: of(config, shapes) for name, of in TRAININGS.items()}
    room = config.memory * GIB * USABLE
    changes = {name: _changes(config, shapes, name, room) for name, found in memory.items() if found.total > room}
    return Plan(config, memory, changes)


class _Shapes:
    """The shapes of the models."""

    def __init__(self, config: Config):
        from poise.models import sizing  # torch takes seconds to import

        self.sizing = sizing
        self.policy_config = sizing.config_of(config.model)
        self.reward_config = sizing.config_of(config.reward) if config.reward else self.policy_config
        self.policy, self.reward = (sizing.shape_of(one) for one in (self.policy_config, self.reward_config))
        self.validator = sizing.shape_of(sizing.config_of(config.validator)) if config.validator else None


def of_policy(config: Config, shapes: Any) -> Memory:
    """Of train-policy. Weights that are not trained are bfloat16."""
    import torch

    prompts = -(-config.prompts_per_step // config.gpus)
    if config.algorithm != "ppo":
        return _by_trl(config, shapes, prompts)
    minibatch = -(-prompts // config.num_minibatches)
    part, of_prompt = -(-minibatch // config.accumulation), -(-config.accumulation // minibatch)
    layers = shapes.policy.upper(config.adapted_layers)
    run = PolicyRun(
        shapes.policy, shapes.reward, config.tune, config.value_trunk == "own", config.adapted_layers,
        config.lora_rank, prompts, config.completions_per_prompt, config.prompt_tokens, config.max_tokens,
        config.gpus, config.shard, validator=shapes.validator,
    )  # fmt: skip
    measured = shapes.sizing.policy_measured(
        shapes.policy_config, tune=config.tune, layers=layers, rank=config.lora_rank, part=part, reading=part,
        prompts=run.turn[0], completions=-(-config.completions_per_prompt // of_prompt),
        prompt_tokens=config.prompt_tokens, max_tokens=config.max_tokens, dtype=torch.bfloat16,
        checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    return policy_memory(run, measured)


def _by_trl(config: Config, shapes: Any, prompts: int) -> Memory:
    import torch

    run = TrlRun(
        shapes.policy, shapes.reward, config.adapted_layers, config.lora_rank, prompts, config.completions_per_prompt,
        config.num_minibatches, config.prompt_tokens, config.max_tokens, config.gpus, config.shard,
        validator=shapes.validator,
    )  # fmt: skip
    measured = shapes.sizing.trl_measured(
        shapes.policy_config, layers=shapes.policy.upper(config.adapted_layers), rank=config.lora_rank, part=run.part,
        sampled=run.turn, prompt_tokens=config.prompt_tokens, max_tokens=config.max_tokens, dtype=torch.bfloat16,
        checkpointing=True,
    )  # fmt: skip
    return trl_memory(run, measured)


def of_reward(config: Config, shapes: Any) -> Memory:
    """Of train-reward, whose trunk is --reward: of the stage that takes more, where heads get adapters of their own."""
    stages = (0, config.adapter_heads) if config.adapter_heads else (0,)
    return max((_of_stage(config, shapes, heads) for heads in stages), key=lambda memory: memory.total)


def _of_stage(config: Config, shapes: Any, heads: int) -> Memory:
    import torch

    measured: Measured = shapes.sizing.reward_measured(
        shapes.reward_config, tune=config.tune, rank=config.lora_rank, pairs=config.device_batch_size,
        prompt_tokens=config.prompt_tokens, tokens=config.max_length, dtype=torch.bfloat16,
        checkpointing=config.gradient_checkpointing, adapter_heads=heads, head_layers=config.head_layers,
    )  # fmt: skip
    run = RewardRun(
        shapes.reward, config.tune, config.lora_rank, config.gpus, config.shard, adapter_heads=heads,
        head_layers=config.head_layers,
    )  # fmt: skip
    return reward_memory(run, measured)


TRAININGS = {"train-reward": of_reward, "train-policy": of_policy}


def _changes(config: Config, shapes: _Shapes, training: str, room: float) -> tuple[str, ...] | None:
    """As few of the known changes as make a training fit, tried one after the other; None if all do not."""

    def fits(made: list[tuple[str, dict[str, Any]]]) -> bool:
        settings = {name: value for _, one in made for name, value in one.items()}
        return TRAININGS[training](replace(config, **settings), shapes).total <= room

    made: list[tuple[str, dict[str, Any]]] = []
    for one in _known_changes(config, training):
        made.append(one)
        if fits(made):
            for other in made[-2::-1]:  # an earlier one may do nothing for what is in the way
                fewer = [change for change in made if change is not other]
                made = fewer if fits(fewer) else made
            return tuple(text for text, _ in made)
    return None


def _known_changes(config: Config, training: str) -> list[tuple[str, dict[str, Any]]]:
    """Cheapest first: those that keep the result, then those that change it."""
    found: list[tuple[str, dict[str, Any]]] = []
    by_trl = training == "train-policy" and config.algorithm != "ppo"
    if training == "train-policy" and not by_trl:
        parts = max(config.prompts_per_step // config.gpus // config.num_minibatches, 1)
        if config.accumulation < parts:
            found.append((f"--accumulation {parts}", {"accumulation": parts}))
    elif config.device_batch_size > 1:
        found.append(("--device-batch-size 1", {"device_batch_size": 1}))
    if config.gpus > 1 and not config.shard and not config.adapter_heads:
        found.append(("--shard", {"shard": True}))
    if not config.gradient_checkpointing and not by_trl:
        found.append(("--gradient-checkpointing", {"gradient_checkpointing": True}))
    if by_trl:
        more = [config.num_minibatches << doubled for doubled in range(1, 17)]
        more = [n for n in more if config.prompts_per_step % (n * config.gpus) == 0]
        found += [(f"--num-minibatches {n}", {"num_minibatches": n}) for n in more]
    elif training == "train-policy" and config.accumulation < parts * config.completions_per_prompt:
        parts *= config.completions_per_prompt  # one completion at a time, each with its prompt
        found.append((f"--accumulation {parts}", {"accumulation": parts}))
    if config.tune == "full":
        option = "--trunk lora" if training == "train-reward" else "--tune lora"
        found.append((option, {"tune": "lora"}))
    if config.adapter_heads:
        if training == "train-reward" and config.head_layers != 1:
            found.append(("--head-layers 1", {"head_layers": 1}))
        return found
    gpus = max(2, 2 * config.gpus)
    # More GPUs than divide the prompts are refused by train-policy.
    while gpus <= 64 and (training == "train-reward" or config.prompts_per_step % (config.num_minibatches * gpus) == 0):
        found.append((f"{gpus} GPUs with --shard", {"gpus": gpus, "shard": True}))
        gpus *= 2
    return found


def as_text(plan: Plan) -> str:
    """The plan for a terminal."""
    config = plan.config
    over = f"{config.gpus} GPU{'s' * (config.gpus > 1)} of {config.memory:g} GiB"
    lines = [f"{on_one_line(config.model)}, {config.tune}, {over}{', sharded' if config.shard else ''}"]
    for name, memory in plan.memory.items():
        lines += ["", f"{name}: {gib(memory.total)} GiB on each GPU, most while {_DOING[memory.peak_phase]}"]
        lines += [f"  {part:<17}{gib(size):>8}" for part, size in memory.peak.items() if size]
        if name not in plan.changes:
            lines.append("  fits")
            continue
        changes = plan.changes[name]
        advice = f"fits with {' '.join(changes)}" if changes else "no setting known here makes it fit: a smaller model"
        lines.append(f"  does not fit: {memory.bottleneck} is the largest part; {advice}")
    return "\n".join(lines)


_DOING = {
    "prompts": "prompts are read", "sampling": "completions are sampled",
    "reading": "completions are read again", "scoring": "completions are scored", "update": "weights are updated",
}  # fmt: skip


def gib(size: int) -> str:
    """Bytes in GiB, to two digits after the point.

    >>> gib(3 * 2**29)
    '1.50'
    """
    return f"{size / GIB:.2f}"
