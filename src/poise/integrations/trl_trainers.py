"""RLOO and GRPO as `poise train-policy` runs them: TRL's trainers on our settings, models and rewards.

A step of ours samples once; TRL counts updates, `updates_per_step` of them to a step. It logs once a step and saves at
the end of one, so that a run that goes on has nothing half done.

With `shard` accelerate spreads the policy's weights over the processes (FSDP2), as it does for any trainer of TRL.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from safetensors.torch import load_file

from poise.data.types import Prompt
from poise.errors import PoiseError
from poise.functional.memory import sampled_at_once
from poise.integrations.trl_kl import KLBudgetCallback
from poise.integrations.trl_logs import policy_metrics
from poise.integrations.trl_needs import check_trl
from poise.integrations.trl_reward import RobustReward, Scored
from poise.models.adapted_maps import linear_maps, lora_config
from poise.models.chat_format import decode_completions, encode_prompt, generation_prompt
from poise.models.context import room_or_raise
from poise.models.drawing import cached_bytes
from poise.models.end_tokens import end_token_ids, plain_generation
from poise.models.families import REFUSALS, alike, positions_without_padding, probe_tokens, without_noise
from poise.models.loading import HfModel, HfTokenizer
from poise.models.rereading import padding_or_raise
from poise.runtime.checkpoints import SafeCheckpoints, latest_checkpoint
from poise.runtime.distributed import num_processes
from poise.runtime.quiet import quiet_loading
from poise.runtime.records import read_object
from poise.runtime.run_folder import Json, is_main_process, write_folder_atomic, write_json
from poise.runtime.settings import NotNegative, WholeNumber
from poise.runtime.sharding import by_accelerate, copy_whole, spread_on_cpu, whole_on_main, whole_weights

# Accelerate's FSDP2: a unit for each layer. Every process loads the whole model, as a reward model must be in any case.
SPREAD: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True,
        "cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT",
    },
}  # fmt: skip


@dataclass(frozen=True)
class TrlSettings:
    """A policy run's settings as far as RLOO and GRPO have them; see `train_policy.Config` for what they mean.

    Raises PoiseError for what cannot be trained, before any model is loaded; the processes must have met
    (`processes.join`).
    """

    algorithm: Literal["rloo", "grpo"]
    kl_coef: float
    num_steps: int
    prompts_per_step: int
    completions_per_prompt: int
    max_tokens: int
    learning_rate: float
    num_epochs: int
    num_minibatches: int
    clip: float
    max_grad_norm: float
    adapted_layers: int
    lora_rank: int
    save_every: int
    seed: int
    shard: bool = False
    max_kl: float | None = None
    keep_at_kl: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_trl(self.algorithm, self.completions_per_prompt)
        rows, processes = self.prompts_per_step * self.completions_per_prompt, num_processes()
        if rows % (self.num_minibatches * processes):
            raise PoiseError(
                f"{self.prompts_per_step} prompts with {self.completions_per_prompt} completions do not divide into "
                f"--num-minibatches {self.num_minibatches} on {processes} processes"
            )

    @property
    def updates_per_step(self) -> int:
        """TRL counts updates; a step of ours samples once and makes this many."""
        return self.num_epochs * self.num_minibatches

    @property
    def device_batch_size(self) -> int:
        return self.prompts_per_step * self.completions_per_prompt // (self.num_minibatches * num_processes())


@dataclass(frozen=True)
class Ended:
    """trainer/ended.json, of a run that --max-kl has ended: updates that the policy it went back to has made."""

    max_kl: NotNegative
    global_step: WholeNumber


def steps_kept(settings: TrlSettings, output: Path) -> int:
    """Steps that the last whole checkpoint of a run knows: where `train` will go on, or has gone back to."""
    if (ended := _ended(output)) is not None:
        return ended // settings.updates_per_step
    checkpoint = latest_checkpoint(output / "trainer")
    return int(checkpoint.name.split("-")[-1]) // settings.updates_per_step if checkpoint else 0


def _ended(output: Path) -> int | None:
    """Updates of the policy that a run went back to which --max-kl has ended; None of any other run."""
    path = output / "trainer" / "ended.json"
    return cast(int, read_object(path, Ended)["global_step"]) if path.exists() else None


def train(
    settings: TrlSettings,
    reward: RobustReward,
    model: HfModel,
    tokenizer: HfTokenizer,
    prompts: list[Prompt],
    output: Path,
    on_step: Callable[[Json], None],
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> bool:
    """Train LoRA adapters of `model` (as `load_policy` gives it; it is changed) by RLOO or GRPO.

    Writes OUTPUT/policy (PEFT format), OUTPUT/ladder, OUTPUT/trainer (checkpoints) and, if `reward` names no file of
    its own, OUTPUT/scale.json. Goes on from the last checkpoint. After each step the main process calls `on_step` with
    its number (from 0), `policy_metrics` and `samples`, rows of prompt, completion, reward, kl, mean, std.

    Returns whether --max-kl has ended it: the policy is then that of the last checkpoint within the budget, and
    `steps_kept` the number of its steps. A run that has ended so does not go on.
    """
    if settings.prompts_per_step > len(prompts):
        raise PoiseError(f"{len(prompts)} prompts are fewer than --prompts-per-step {settings.prompts_per_step}")
    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
    room_or_raise(longest, settings.max_tokens, model.config.get_text_config())
    reward.scale = reward.scale or str(output / "scale.json")
    with quiet_loading(), by_accelerate():
        trainer = make_trainer(settings, reward, model, tokenizer, prompts, output / "trainer")
        trainer.remove_callback(transformers.PrinterCallback)
        budget = KLBudgetCallback(
            trainer, settings.max_kl, settings.keep_at_kl, folder=output, updates_per_step=settings.updates_per_step,
            option="--max-kl",
        )  # fmt: skip
        for callback in (*callbacks, _Report(settings, reward, budget, on_step), budget):
            trainer.add_callback(callback)
        ended, checkpoint = _ended(output), latest_checkpoint(output / "trainer")
        if ended is not None:
            budget.go_back(ended)
        else:
            with without_noise(model):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if budget.ended and is_main_process():
            write_json(output / "trainer" / "ended.json", asdict(Ended(settings.max_kl or 0.0, budget.within)))
        reward.fitted = reward.fitted or reward.saved_scale()  # if there was nothing left to do
        adapters = trainer.adapters()
        if is_main_process():
            with write_folder_atomic(output / "policy") as scratch:
                trainer._save(str(scratch), adapters)
        return budget.ended or ended is not None


def make_trainer(
    settings: TrlSettings,
    reward: RobustReward,
    model: HfModel,
    tokenizer: HfTokenizer,
    prompts: list[Prompt],
    folder: Path,
) -> Any:
    """TRL's trainer for these settings, its checkpoints in `folder`."""
    import datasets
    import trl

    kinds: dict[str, tuple[Any, Any]] = {
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    }
    trainer_class, config_class = kinds[settings.algorithm]
    # GRPO as published (arXiv 2402.03300), where TRL's default is a later form.
    specific = {"loss_type": "grpo", "scale_rewards": "group"} if settings.algorithm == "grpo" else {}
    num_layers = model.config.get_text_config().num_hidden_layers
    first_adapted = num_layers - (settings.adapted_layers or num_layers)
    maps = linear_maps(model, max(first_adapted, 0))
    adapters = lora_config(model, settings.lora_rank, "CAUSAL_LM", maps)
    rows = [
        {"prompt": _as_seen(tokenizer, prompt), "asked": json.dumps(prompt)} for prompt in _drawn(prompts, settings)
    ]
    ends = end_token_ids(model, tokenizer)
    positions_without_padding(model)  # TRL samples with positions, and reads again without
    padding_or_raise(model)
    trainer = type(trainer_class.__name__, (_Ours, trainer_class), {})(
        model=model, args=config_class(**_arguments(settings, folder), **specific), reward_funcs=[reward],
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, peft_config=adapters,
    )  # fmt: skip
    _logprobs_or_raise(model)
    trainer.token_bytes = max(cached_bytes(model), 1)
    # A completion ends where PPO's does. TRL samples to these, and masks what follows them; on its own it would also
    # list the tokenizer's eos where there is none.
    trainer.eos_token_ids = ends
    trainer.generation_config.eos_token_id = trainer.generation_kwargs["eos_token_id"] = ends or None
    model.generation_config = plain_generation(model, tokenizer)
    return trainer


@torch.no_grad()
def _logprobs_or_raise(model: HfModel) -> None:
    """Raise PoiseError unless TRL's fused output layer gives the log-probabilities of the model's own logits.

    TRL knows the scales and caps of some families, and passes over what others do between decoder and output layer.
    """
    ids = torch.tensor([probe_tokens(model, range(1, 10))], device=model.device)
    own = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    own = own.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    try:
        with without_noise(model):  # and in training mode, in which some families route in another way
            fused = model.train()(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.float()
        fine = alike(model, fused, own, only_way=True)
    except REFUSALS:
        fine = False
    finally:
        model.eval()
    if not fine:
        raise PoiseError(
            f"{model.config.model_type}: TRL computes other log-probabilities than this kind of model has; "
            f"use --algorithm ppo"
        )


def _arguments(settings: TrlSettings, folder: Path) -> Json:
    """What RLOOConfig and GRPOConfig share."""
    gpu = torch.cuda.is_available()
    updates = settings.updates_per_step
    return {
        "output_dir": str(folder), "max_steps": settings.num_steps * updates,
        "per_device_train_batch_size": settings.device_batch_size, "gradient_accumulation_steps": 1,
        "steps_per_generation": settings.num_minibatches, "num_iterations": settings.num_epochs,
        "num_generations": settings.completions_per_prompt, "max_completion_length": settings.max_tokens,
        "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        # At exactly 0 TRL computes no reference, and nobody would see how far the policy has gone.
        "beta": settings.kl_coef or 1e-9,
        "epsilon": settings.clip, "max_grad_norm": settings.max_grad_norm, "disable_dropout": True,
        "learning_rate": settings.learning_rate, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "shuffle_dataset": False,  # `_drawn` has done it
        "logging_steps": updates, "logging_nan_inf_filter": False, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "steps", "save_steps": settings.save_every * updates, "save_total_limit": 2,
        "bf16": gpu, "gradient_checkpointing": gpu, "use_cpu": not gpu, "dataloader_pin_memory": gpu,
        "ddp_find_unused_parameters": False, "seed": settings.seed,
        "router_aux_loss_coef": 0.0,  # PPO has no such loss either
        **(SPREAD if settings.shard and num_processes() > 1 else {}),
    }  # fmt: skip


def _drawn(prompts: list[Prompt], settings: TrlSettings) -> list[Prompt]:
    """The prompts of the whole run, step by step: a run that goes on finds its place in one list."""
    generator = torch.Generator().manual_seed(settings.seed)
    steps = (torch.randperm(len(prompts), generator=generator) for _ in range(settings.num_steps))
    return [prompts[i] for order in steps for i in order[: settings.prompts_per_step].tolist()]


def _as_seen(tokenizer: HfTokenizer, prompt: Prompt) -> Prompt:
    """A prompt that TRL will encode as `generation_prompt` writes it."""
    if tokenizer.chat_template is None:
        return generation_prompt(tokenizer, prompt)
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


class _Ours(SafeCheckpoints):
    """Mixed into a trainer of TRL: checkpoints without pickle, `ended` as in PPO, no model card or message of TRL's."""

    token_bytes = 1  # of a token's keys and values, in all layers
    sharded = False  # what FSDP2 has spread is put together in checkpoints, which are the same for any number

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; on CPUs, too, accelerate spreads the weights if it is asked to."""
        trainer = cast(Any, self)
        cast(Any, super()).create_accelerator_and_postprocess()
        if trainer.args.fsdp_plugin_args is not None:
            spread_on_cpu(trainer.accelerator, trainer.args.fsdp_plugin_args)
            trainer.is_fsdp_enabled = True

    def _generate_single_turn(self, prompt_ids: list[list[int]], *arguments: Any, **named: Any) -> Any:
        """As TRL does it, but in turns whose keys and values are bounded, as PPO samples; layers that are spread are
        gathered once, not for every token."""
        sample = cast(Any, super())._generate_single_turn
        tokens = max(map(len, prompt_ids)) + cast(Any, self).max_completion_length
        some, _ = sampled_at_once(len(prompt_ids), 1, tokens * self.token_bytes)
        turns = [prompt_ids[at : at + some] for at in range(0, len(prompt_ids), some)]
        with whole_weights(cast(Any, self).model):
            found = [sample(turn, *arguments, **named) for turn in turns]
        if len(found) == 1:
            return found[0]
        if isinstance(found[0], tuple):  # GRPO: and log-probabilities, where vLLM samples
            return [ids for some_ids, _ in found for ids in some_ids], None
        return [ids for some_ids in found for ids in some_ids]

    def adapters(self) -> dict[str, torch.Tensor]:
        """What is trained, whole, on the main process; gathered by all together."""
        return {name: whole_on_main(p) for name, p in self._unwrapped().named_parameters() if p.requires_grad}

    def _unwrapped(self) -> Any:
        trainer = cast(Any, self)
        return trainer.accelerator.unwrap_model(trainer.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        adapters = self.adapters()
        if cast(Any, self).args.should_save:
            self._save(output_dir, adapters)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self._unwrapped().save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not cast(Any, self).is_fsdp_enabled:
            cast(Any, super())._load_from_checkpoint(resume_from_checkpoint, model)
            return
        kept = load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors")
        for name, parameter in self._unwrapped().named_parameters():
            if parameter.requires_grad:
                copy_whole(kept[name.replace(".default.", ".")], parameter)

    def _tokenize_prompts(self, prompts: list[Prompt]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """(ids, no images, no more fields of images), as PPO encodes them."""
        tokenizer = cast(Any, self).processing_class
        return [encode_prompt(tokenizer, prompt) for prompt in prompts], None, {}

    def _calculate_rewards(self, inputs: Any, prompts: list[Prompt], completions: Any, ids: list[list[int]]) -> Any:
        """As TRL does it, of what PPO's reward is asked: the prompts as they were given, and what was added to them."""
        encoded, _, _ = self._tokenize_prompts(prompts)
        written = zip(encoded, ids, strict=True)
        texts = [decode_completions(cast(Any, self).processing_class, prompt, [added])[0] for prompt, added in written]
        asked = [json.loads(row["asked"]) for row in inputs]
        return cast(Any, super())._calculate_rewards(inputs, asked, texts, ids)

    def _generate_and_score_completions(self, *arguments: Any) -> Any:
        """As TRL does it, but a completion that was cut at a padding token that the policy sampled has not ended."""
        trainer = cast(Any, self)
        batch = cast(Any, super())._generate_and_score_completions(*arguments)
        mask = batch["completion_mask"].bool()
        ends = torch.tensor(trainer.eos_token_ids, dtype=torch.long, device=mask.device)
        cut = ~(torch.isin(batch["completion_ids"], ends) & mask).any(-1)
        logged = trainer._metrics["train" if trainer.model.training else "eval"]["completions/clipped_ratio"]
        logged[-1] = trainer.accelerator.gather(cut).float().mean().item()
        return batch

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _send_telemetry(self) -> None:
        pass


class _Report(transformers.TrainerCallback):
    """Hands each step on, has the first one saved, and stops a run that has gone astray before it is saved."""

    def __init__(
        self, settings: TrlSettings, reward: RobustReward, budget: KLBudgetCallback, on_step: Callable[[Json], None]
    ):
        self._settings, self._reward, self._budget, self._on_step = settings, reward, budget, on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._settings.updates_per_step:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "reward" not in logs or self._reward.last is None:  # the last line of a run: seconds in all
            return
        step = state.global_step // self._settings.updates_per_step - 1
        for name, what in (("loss", "loss"), ("grad_norm", "gradient")):
            if not math.isfinite(logs.get(name, 0.0)):
                raise PoiseError(f"step {step}: the {what} is not finite; the last checkpoint is kept")
        if state.is_world_process_zero:
            self._on_step({"step": step, **policy_metrics(logs), "samples": _rows(self._reward.last, self._budget.kl)})


def _rows(scored: Scored, kl: torch.Tensor) -> list[Json]:
    return [
        {**asdict(sample), "reward": reward, "kl": nats, "mean": mean, "std": std}
        for sample, reward, nats, mean, std in zip(
            scored.samples, scored.reward.tolist(), kl.tolist(), scored.heads.mean.tolist(), scored.heads.std.tolist(),
            strict=True,
        )
    ]  # fmt: skip
