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
    """Train a conventional reward model and multi-head ones from preferences."""

    preferences: str
    """Preferences: a file (JSON lines, Parquet, CSV), a folder saved by `datasets`, or a hub id."""
    output: str = "runs/reward"
    """Run folder to write."""
    model: str = DEFAULT_MODEL
    """Local folder or hub id of the language model whose first layers become the trunk."""
    num_layers: int = 8
    """Layers of the model to keep as trunk; 0 keeps all."""
    max_length: int = 1024
    """Longest sample in tokens; longer ones lose their oldest tokens. Their number is reported."""
    validation_share: float = 0.2
    """Share of the preferences held out to choose the prior and to report accuracy: whole prompts, or whole texts where
    there are few prompts."""
    label_smoothing: float = 0.0
    """Assumed share of preferences whose chosen and rejected texts are swapped, in [0, 0.5)."""
    trunk: Trunk = "frozen"
    """Trunk weights that stage 1 trains together with the head: none, LoRA adapters (merged afterwards), or all."""
    stage2_trunk: Trunk = "frozen"
    """The same for stage 2, which starts from the heads on the frozen trunk. The BRME then gets its own trunk."""
    epochs: float = 1.0
    """Passes over the preferences, if the trunk is trained."""
    learning_rate: float = 0.0
    """Learning rate of the trunk; 0 means 2e-4 for LoRA and 1e-5 for all weights."""
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
    """Number of heads of the BRME (Bayesian Reward Model Ensemble) and of the bootstrap ensemble."""
    shards: ShardKind = "cluster"
    """Pairs that each BRME head is trained on: a part of its own (`disjoint`: random, `cluster`: by content, `source`:
    by the rows' `source`), a random 80 % of all pairs (`bootstrap`), or all pairs (`same`)."""
    head_loss: HeadLossName = "sampled_mse"
    """Loss of stage 2. `sampled_mse` is the paper's: its std measures coverage by training data. `gaussian_nll`,
    `beta_nll` and `crps` are proper scores: their std is an error bar, and the lowest-std head has the least label
    noise, not the best coverage. `probit_pairs` fits the preferences themselves."""
    head_steps: int = 600
    """Maximum number of optimizer steps of stage 2; it stops early when validation error rises."""
    head_lr: float = 3e-3
    """Learning rate of stage 2 (Adam)."""
    posterior_heads: int = 64
    """Heads to draw from the posterior. Too few draws underestimate disagreement; extra draws are cheap."""
    feature_cache: bool = True
    """Keep trunk features in the user's cache folder, for other heads, seeds and losses on the same texts."""
    on_bad_row: OnBadRow = "error"
    """`skip` sets bad rows aside in a file beside the data."""
    seed: int = 0
    """Seed of the validation split, the training of the trunk, the shards and the heads."""


def check(config: Config) -> None:
    if config.num_heads < 1 or config.posterior_heads < 2:
        raise PoiseError("--num-heads must be at least 1 and --posterior-heads at least 2")
    if not 0.0 < config.validation_share < 1.0:
        raise PoiseError("--validation-share must be between 0 and 1")
    if not 0.0 <= config.label_smoothing < 0.5:
        raise PoiseError("--label-smoothing must be at least 0 and less than 0.5")
