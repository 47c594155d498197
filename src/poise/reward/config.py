"""The settings of `poise train-reward`."""

from dataclasses import dataclass
from typing import Literal

from poise.data.preferences import OnBadRow
from poise.errors import PoiseError
from poise.models.loading import DEFAULT_MODEL
from poise.reward.heads import HeadLossName
from poise.reward.shards import ShardKind

Trunk = Literal["frozen", "lora", "full"]


@dataclass(frozen=True)
class Config:
    """Train a conventional reward model and a multi-head one from preferences."""

    preferences: str
    """Preferences: a file (JSON lines, Parquet, CSV), a folder saved by `datasets`, or a hub id."""
    output: str = "runs/reward"
    """Run folder to write."""
    model: str = DEFAULT_MODEL
    """Local folder or hub id of the language model whose first layers become the trunk."""
    num_layers: int = 8
    """Layers of the model to keep as trunk; 0 keeps all."""
    max_length: int = 1024
    """Longest sample in tokens; longer ones lose their oldest tokens, which is reported."""
    validation_share: float = 0.2
    """Share of the preferences held out to choose the prior and to report accuracy."""
    label_smoothing: float = 0.0
    """Share of the preferences taken to be the wrong way round, in [0, 0.5)."""
    trunk: Trunk = "frozen"
    """What stage 1 trains beside the head: nothing, LoRA adapters (merged afterwards), or every weight."""
    stage2_trunk: Trunk = "frozen"
    """The same for stage 2, which starts from the heads on the frozen trunk; the BRME then has a trunk of its own."""
    epochs: float = 1.0
    """Passes over the preferences, if the trunk is trained."""
    learning_rate: float = 0.0
    """Of the trunk; 0 takes 2e-4 for LoRA and 1e-5 for all weights."""
    batch_size: int = 16
    """Preferences per optimizer step, if the trunk is trained."""
    device_batch_size: int = 8
    """Preferences per forward pass and device; memory grows with it."""
    lora_rank: int = 16
    """Rank of the adapters."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more time, much less memory."""
    save_steps: int = 25
    """Optimizer steps between the checkpoints of the trunk."""
    num_heads: int = 5
    """K of the BRME."""
    shards: ShardKind = "cluster"
    """Which pairs each BRME head is trained on: its own part (`disjoint` at random, `cluster` by content, `source` by
    the rows' `source`), a random 80 % of all (`bootstrap`), or all (`same`)."""
    head_loss: HeadLossName = "sampled_mse"
    """Loss of stage 2. `sampled_mse` is the paper's: its std counts coverage. The next three are proper scores: their
    std is an error bar, but the head with the lowest is then the least noisy one, not the most knowing. The last
    fits the preferences themselves."""
    head_steps: int = 600
    """Most optimizer steps of stage 2; it stops early when validation error rises."""
    head_lr: float = 3e-3
    """Learning rate of stage 2 (Adam)."""
    posterior_heads: int = 64
    """Heads to draw from the posterior; few leave directions in which they agree by chance, and many cost little."""
    feature_cache: bool = True
    """Keep trunk features in the user's cache folder, for other heads, seeds and losses on the same texts."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""
    seed: int = 0
    """Of the validation split, the training of the trunk, the shards and the heads."""


def check(config: Config) -> None:
    if config.num_heads < 1 or config.posterior_heads < 2:
        raise PoiseError("--num-heads must be at least 1 and --posterior-heads at least 2")
    if not 0.0 < config.validation_share < 1.0:
        raise PoiseError("--validation-share must be between 0 and 1")
    if not 0.0 <= config.label_smoothing < 0.5:
        raise PoiseError("--label-smoothing must be at least 0 and less than 0.5")
