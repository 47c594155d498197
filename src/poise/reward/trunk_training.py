"""Training with the trunk, of all weights or of LoRA adapters, by `transformers.Trainer`: stage 1 and stage 2.

The Trainer provides accelerate's parallel runs. This file adds the rows (a pair's prompt is encoded once,
`models/shared_prompt.py`), the loss, and checkpoints without pickle. A run that is killed resumes from its last
checkpoint and ends in the same weights, bit for bit on a CPU.

Shapes: _N pairs, _L labels.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import peft
import torch
import transformers
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from poise.data.types import Preference, Sample
from poise.errors import PoiseError
from poise.functional.reward_losses import CENTERING, adapter_diversity, bradley_terry, bradley_terry_heads
from poise.models.adapted_maps import decoder_layers, lora_config
from poise.models.families import without_noise
from poise.models.head_adapters import HeadLinear, add_head_adapters, logits_of
from poise.models.loading import HfModel, frozen_dtype
from poise.models.reward_model import HeadLayout
from poise.models.scorer import FeatureExtractor
from poise.models.shared_prompt import Family, PackedRows, pack, packed_hidden, separate_hidden
from poise.models.trained_on import remember, write_base
from poise.reward.heads import HeadLossName, head_loss
from poise.runtime.checkpoints import SafeCheckpoints, latest_checkpoint
from poise.runtime.distributed import launched_processes
from poise.runtime.progress import progress
from poise.runtime.quiet import quiet_loading
from poise.runtime.run_folder import Json, append_jsonl, is_main_process, keep_rows_before
from poise.runtime.sharding import is_part, shard, spread_as, whole, whole_on_main, without_weights

LEARNING_RATES = {"lora": 2e-4, "lora_per_head": 2e-4, "full": 1e-5}


@dataclass(frozen=True)
class TrunkTraining:
    """How the trunk is trained."""

    kind: str  # "lora", "full" or "lora_per_head"
    epochs: float
    learning_rate: float  # 0: LEARNING_RATES
    batch_size: int  # pairs per optimizer step, over all processes
    device_batch_size: int  # pairs per forward pass
    lora_rank: int
    gradient_checkpointing: bool
    save_steps: int
    seed: int
    shard: bool = False  # spread weights, gradients and optimizer states over the processes
    num_heads: int = 0  # "lora_per_head": heads
    head_layers: int = 0  # "lora_per_head": upper layers that carry adapters; 0: all
    adapter_diversity: float = 0.0  # "lora_per_head": weight of the term that keeps adapters apart


# A function of the logits (N, 2, L) of chosen and rejected texts, and of the other tensors of the batch.
Loss = Callable[[Tensor, dict[str, Tensor]], Tensor]


def preference_loss(label_smoothing: float = 0.0, centering: float = CENTERING) -> Loss:
    """Stage 1: Bradley-Terry on the one label, with the pairs' margins."""

    def loss(logits_N2L: Tensor, batch: dict[str, Tensor]) -> Tensor:
        chosen, rejected = logits_N2L.squeeze(-1).unbind(-1)
        return bradley_terry(chosen, rejected, batch["margin"], centering=centering, label_smoothing=label_smoothing)

    return loss


def heads_loss(layout: HeadLayout, label_smoothing: float = 0.0) -> Loss:
    """Stage 2: Bradley-Terry of point heads, with the pairs' margins, each head on its own pairs."""

    def loss(logits_N2L: Tensor, batch: dict[str, Tensor]) -> Tensor:
        chosen, rejected = layout.decode(logits_N2L).mean.unbind(1)
        return bradley_terry_heads(chosen, rejected, batch["margin"], batch["mask"], label_smoothing=label_smoothing)

    return loss


def gaussian_loss(layout: HeadLayout, name: HeadLossName) -> Loss:
    """Stage 2: a loss of Gaussian heads, toward the pairs' targets, each head on its own pairs."""

    def loss(logits_N2L: Tensor, batch: dict[str, Tensor]) -> Tensor:
        heads = layout.decode(logits_N2L.transpose(0, 1).flatten(0, 1))  # first all chosen texts, then all rejected
        noise = torch.randn_like(heads.mean)
        return head_loss(name)(heads.mean, heads.std, noise, batch["target"].T.flatten(), batch["mask"].repeat(2, 1))

    return loss


def diverse(loss: Loss, classifier: HfModel, weight: float) -> Loss:
    """A loss less weight times the mean of `adapter_diversity` over the maps with an adapter for each head."""
    maps = [module for module in classifier.modules() if isinstance(module, HeadLinear)]

    def with_term(logits_N2L: Tensor, batch: dict[str, Tensor]) -> Tensor:
        diversity = torch.stack([adapter_diversity(one.down_KRI) for one in maps]).mean()
        return loss(logits_N2L, batch) - weight * diversity

    return with_term


class TokenPair(NamedTuple):
    """A preference as token ids, in one family where the two share their prompt; target and mask for stage 2."""

    families: list[Family]
    margin: float
    target: tuple[float, ...] = ()  # of the chosen text and of the rejected one
    mask: tuple[float, ...] = ()  # 1 for each head that is trained on the pair


def token_pairs(
    extract: FeatureExtractor,
    preferences: Sequence[Preference],
    *,
    share: bool = True,
    targets_N2: Float[Tensor, "pairs 2"] | None = None,
    mask_NK: Bool[Tensor, "pairs heads"] | None = None,
) -> list[TokenPair]:
    """Preferences as token ids, encoded and truncated as for scoring.

    A pair whose two prompts are truncated differently does not share its prompt.
    share: False encodes the prompt twice, for a trunk that cannot take packed rows.
    """
    pairs = []
    tokens = extract.encode_all([Sample(p.prompt, text) for p in preferences for text in (p.chosen, p.rejected)])
    for i, (p, chosen, rejected) in enumerate(zip(preferences, tokens[::2], tokens[1::2], strict=True)):
        texts = [list(chosen.completion), list(rejected.completion)]
        if share and chosen.prompt == rejected.prompt:
            families = [Family(list(chosen.prompt), texts)]
        else:
            families = [Family(list(chosen.prompt), texts[:1]), Family(list(rejected.prompt), texts[1:])]
        target = () if targets_N2 is None else tuple(targets_N2[i].tolist())
        mask = () if mask_NK is None else tuple(mask_NK[i].float().tolist())
        pairs.append(TokenPair(families, p.margin, target, mask))
    return pairs


class PairModel(nn.Module):
    """Rewards of packed rows, as the module that the Trainer calls and wraps."""

    def __init__(self, classifier: HfModel, *, packed: bool):
        super().__init__()
        self.classifier = classifier
        self.packed = packed
        self._no_split_modules = classifier._no_split_modules  # the layers, for FSDP

    def forward(
        self, ids_BL: Tensor, position_BL: Tensor, group_BL: Tensor, part_BL: Tensor, last_C2: Tensor
    ) -> Float[Tensor, "completions labels"]:
        rows = PackedRows(ids_BL, position_BL, group_BL, part_BL, last_C2)
        hidden = (packed_hidden if self.packed else separate_hidden)(self.classifier, rows)
        return logits_of(self.classifier, hidden)


class PairTrainer(SafeCheckpoints, transformers.Trainer):
    """A Trainer of `PairModel` on `TokenPair`s."""

    optimizer: Any
    lr_scheduler: Any
    args: Any

    def __init__(self, model: PairModel, args: Any, pairs: Sequence[TokenPair], pad_id: int, loss: Loss, **kwargs: Any):
        self._loss = loss
        self._batches_read = self._batches = 0  # of the present step, on this process
        self._spread = any(map(is_part, model.parameters()))
        collate = _Collate(pad_id, packed=model.packed)
        super().__init__(model=model, args=args, train_dataset=list(pairs), data_collator=collate, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = model(**{name: inputs[name] for name in PackedRows._fields}).float().unflatten(0, (-1, 2))
        counted, share = self._counted(len(logits))
        self._batches_read += 1
        if not counted:  # none of the step's own pairs is left for this process
            return (0.0 * logits.sum(), {}) if return_outputs else 0.0 * logits.sum()
        loss = self._loss(logits[:counted], inputs | {name: inputs[name][:counted] for name in _Collate.BESIDE})
        loss = loss if share == 1.0 else share * loss
        return (loss, {"loss": loss}) if return_outputs else loss

    # ---- the last step of an epoch, which may have fewer pairs than the others ----

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[Any, Any]:
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches_read, self._batches = 0, len(found[0])
        return found

    def _counted(self, size: int) -> tuple[int, float]:
        """(pairs of a forward pass that count, what their mean loss counts for): all pairs of a step count once.

        accelerate gives process p of P the batches p, p + P, … of an epoch, and fills up the last ones with pairs that
        were there before. The Trainer takes the mean over the B batches of a step and over P: each counts for its share
        of the step's pairs, times B P.
        """
        if not self._batches:  # outside of training
            return size, 1.0
        pairs, each = len(cast(Any, self.train_dataset)), self.args.per_device_train_batch_size
        processes, per_step = self.accelerator.num_processes, self.args.gradient_accumulation_steps
        steps = math.ceil(math.ceil(math.ceil(pairs / each) / processes) / per_step)
        first = self.state.global_step % steps * per_step * processes
        batch = first + self._batches_read * processes + self.accelerator.process_index
        counted = min(max(pairs - batch * each, 0), size)
        together = self._batches * processes
        return counted, counted * together / min(pairs - first * each, together * each)

    # ---- checkpoints: trained weights, optimizer, schedule and random states, in safetensors and JSON ----

    def create_accelerator_and_postprocess(self) -> None:
        """Of a model whose weights are spread already, accelerate makes no second copy of a kind of its own."""
        super().create_accelerator_and_postprocess()
        if self._spread:
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; weights that are spread are gathered first, one after the other."""
        if not self._spread:
            super().save_model(output_dir, _internal_call)
            return
        model = self.accelerator.unwrap_model(self.model)
        state = {name: whole_on_main(p) for name, p in model.named_parameters() if p.requires_grad}
        if self.args.should_save:
            self._save(output_dir, state)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        tensors = {n: t.contiguous() for n, t in (state_dict or model.state_dict()).items() if n in trained}
        save_file(tensors, folder / "model.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        unwrapped = self.accelerator.unwrap_model(model or self.model)
        _load_trained(unwrapped, load_file(Path(resume_from_checkpoint) / "model.safetensors"), resume_from_checkpoint)


def _load_trained(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load some of a model's weights; PoiseError for a weight that the model does not have."""
    parameters = dict(model.named_parameters())
    parts = {name: spread_as(tensor, parameters.get(name, tensor)) for name, tensor in tensors.items()}
    found = model.load_state_dict(parts, strict=False)
    if found.unexpected_keys:
        raise PoiseError(f"{source} is of another model: it holds {found.unexpected_keys[0]}")


class _Collate:
    """Pairs as one batch of packed rows."""

    BESIDE = ("margin", "target", "mask")

    def __init__(self, pad_id: int, *, packed: bool):
        self.pad_id, self.packed = pad_id, packed

    def __call__(self, pairs: list[TokenPair]) -> dict[str, Tensor]:
        rows = pack([family for pair in pairs for family in pair.families], self.pad_id, one_per_row=not self.packed)
        beside = {name: torch.tensor([getattr(pair, name) for pair in pairs]) for name in self.BESIDE}
        return {**rows._asdict(), **beside}


def fresh_head(classifier: HfModel, seed: int) -> None:
    """A random `score` layer, small enough that all texts start nearly alike."""
    generator = torch.Generator().manual_seed(seed)
    weight = classifier.score.weight.data
    weight.copy_(torch.randn(weight.shape, generator=generator) / (weight.shape[1] + 1) ** 0.5)


def fine_tune(
    classifier: HfModel,
    pad_id: int,
    pairs: Sequence[TokenPair],
    loss: Loss,
    how: TrunkTraining,
    folder: Path,
    *,
    packed: bool,
) -> HfModel:
    """Train a classifier, `score` layer included; returns it in eval mode, adapters merged, but for those of heads.

    Writes FOLDER/trainer (checkpoints, while it trains), one line per step to FOLDER/metrics.jsonl and, for LoRA,
    FOLDER/adapter in PEFT's format. Resumes from the last whole checkpoint.
    packed: whether the pairs share their prompts and the trunk takes packed rows.
    """
    torch.manual_seed(how.seed)  # initial adapters, noise
    adapters = None
    if how.kind == "lora_per_head":
        add_head_adapters(classifier, how.num_heads, how.lora_rank, how.head_layers)
        loss = diverse(loss, classifier, how.adapter_diversity) if how.adapter_diversity else loss
    elif how.kind == "lora":
        config = lora_config(classifier, how.lora_rank, "SEQ_CLS", modules_to_save=["score"])
        remember(classifier)
        with quiet_loading():
            adapters = peft.get_peft_model(classifier, config)
    if how.gradient_checkpointing:
        with quiet_loading():
            classifier.gradient_checkpointing_enable({"use_reentrant": False})
    args = training_arguments(how, folder / "trainer")
    metrics = folder / "metrics.jsonl"
    model, empty = PairModel(classifier, packed=packed), None
    if how.shard:
        empty = without_weights([classifier, adapters])
        shard(decoder_layers(classifier)[1], model)
    trainer = PairTrainer(model, args, pairs, pad_id, loss, callbacks=[_Record(metrics, len(pairs))])
    trainer.remove_callback(transformers.PrinterCallback)
    # FSDP shards a model in place; the trained weights are gathered into this copy.
    spare = copy.deepcopy((classifier, adapters)) if trainer.sharded else None
    checkpoint = latest_checkpoint(folder / "trainer")
    if is_main_process():
        keep_rows_before(metrics, 1 + (int(checkpoint.name.split("-")[-1]) if checkpoint else 0), first=1)
    with quiet_loading(), without_noise(classifier):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if spare is not None:
        classifier, adapters = spare
        trained = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # whole, on the main process
        if is_main_process():
            _load_trained(PairModel(classifier, packed=packed), trained, "the gathered model")
    if empty is not None:
        classifier, adapters = empty
        gathered = {name: whole(tensor) for name, tensor in model.named_parameters()}
        PairModel(classifier, packed=packed).load_state_dict(gathered, strict=False, assign=True)
    if adapters is not None:
        if is_main_process():
            adapters.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
            write_base(classifier, folder / "adapter")
        classifier = adapters.merge_and_unload()
    return classifier.eval()


def training_arguments(how: TrunkTraining, folder: Path) -> transformers.TrainingArguments:
    """Our settings as the Trainer's. PoiseError if the batch does not divide over processes."""
    gpu = torch.cuda.is_available()
    processes = launched_processes()
    per_step = how.device_batch_size * processes
    if how.batch_size % per_step:
        raise PoiseError(
            f"--batch-size {how.batch_size} is no multiple of --device-batch-size {how.device_batch_size} "
            f"times {processes} processes"
        )
    return transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=how.epochs,
        learning_rate=how.learning_rate or LEARNING_RATES[how.kind],
        per_device_train_batch_size=how.device_batch_size,
        gradient_accumulation_steps=how.batch_size // per_step,
        warmup_steps=0.05, lr_scheduler_type="linear", weight_decay=0.0, max_grad_norm=1.0,
        logging_steps=1, save_strategy="steps", save_steps=how.save_steps, save_total_limit=2,
        bf16=frozen_dtype() == torch.bfloat16, use_cpu=not gpu, dataloader_pin_memory=gpu,
        remove_unused_columns=False, report_to="none", disable_tqdm=True, seed=how.seed, data_seed=how.seed,
        ddp_find_unused_parameters=False,
    )  # fmt: skip


class _Record(transformers.TrainerCallback):
    """Progress with time left, and a line in metrics.jsonl for each step."""

    def __init__(self, metrics: Path, num_pairs: int):
        self._metrics, self._num_pairs = metrics, num_pairs
        self._stack = contextlib.ExitStack()
        self._advance: Callable[[int], None] = lambda _: None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            bar = progress(f"reward model: training on {self._num_pairs} pairs", state.max_steps, state.global_step)
            self._advance = self._stack.enter_context(bar)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            kept: Json = {key: logs[key] for key in ("loss", "grad_norm", "learning_rate") if key in logs}
            if not all(map(math.isfinite, kept.values())):  # of the loss the Trainer leaves NaN out
                raise PoiseError(
                    f"step {state.global_step}: the loss or its gradient is not finite; lower --learning-rate"
                )
            append_jsonl(self._metrics, [{"step": state.global_step, **kept}])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stack.close()
