"""A budget of KL for RLOO and GRPO, and a policy kept at each rung of it; measured as PPO measures it.

    from poise.integrations.trl_kl import KLBudgetCallback

    trainer = GRPOTrainer(model, reward_funcs=[reward], …)
    trainer.add_callback(KLBudgetCallback(trainer, max_kl=20, keep_at_kl=(5, 10, 20)))

TRL's own `kl` is another quantity: a mean per token, which GRPO takes over its updates, of policies that have moved on.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.trainer_callback import ExportableState

from poise.errors import PoiseError
from poise.functional import ppo
from poise.models.trained_on import write_base
from poise.runtime.folders import write_folder_atomic
from poise.runtime.ladder import Best, Ladder, above_budget
from poise.runtime.progress import console
from poise.runtime.run_folder import Json, is_main_process
from poise.runtime.settings import Count, check_value, shown

START = "start"  # the policy before training, beside the checkpoints


class KLBudgetCallback(transformers.TrainerCallback, ExportableState):
    """Measures each generation's KL, ends a training above a budget, and keeps policies on the way.

    The KL is that of the policy that sampled, in nats per completion: the mean over completions of the sum over tokens
    of log π − log π_ref. It is logged as poise/kl, and beside it poise/kl_k3, the estimate that is never negative; at
    a sampling temperature other than 1, of the distributions at that temperature. Completions that TRL masks do not
    count.

    max_kl: once a generation's KL exceeds so many nats, training stops after its updates, and the model gets the
    weights of the last checkpoint whose generation did not; without one, those before training (OUTPUT/start).
    keep_at_kl: the first model whose KL reaches each of these is saved in OUTPUT/ladder, and OUTPUT/ladder.jsonl says
    when, as `poise train-policy` does it.
    Where the reward has a validator, the model that it likes best, within the budget, is kept in OUTPUT/best; not where
    FSDP or DeepSpeed has spread the weights.

    kl: of the last generation, (N,), the completions of all processes in their order. ended: has the budget ended the
    training? Every process must have the callback. Raises PoiseError where nothing can be measured or gone back to.
    """

    def __init__(
        self,
        trainer: Any,
        max_kl: float | None = None,
        keep_at_kl: Sequence[float] = (),
        *,
        folder: str | Path | None = None,
        updates_per_step: int = 1,
        option: str = "max_kl",
    ):
        """trainer: an RLOOTrainer or GRPOTrainer.

        folder: where ladder and best are kept; default: the trainer's output. updates_per_step: updates that count as
        one step in what is said and written. option: what the budget is called in what is said.
        """
        args = trainer.args
        if not args.beta:
            raise PoiseError("at beta 0 TRL reads no reference, so that the KL to it is unknown; give beta=1e-9")
        self._spread = getattr(trainer, "sharded", trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        if self._spread and (max_kl is not None or keep_at_kl):
            raise PoiseError(
                "max_kl and keep_at_kl cannot save or load weights that FSDP or DeepSpeed has spread; "
                "`poise train-policy --shard` can"
            )
        check_value("updates_per_step", updates_per_step, Count)
        if isinstance(keep_at_kl, str) or not isinstance(keep_at_kl, Sequence):
            raise PoiseError(f"keep_at_kl must be a list of KLs, got {shown(keep_at_kl)}")
        for nats in (*keep_at_kl, *(() if max_kl is None else (max_kl,))):
            if not isinstance(nats, (int, float)) or isinstance(nats, bool) or not 0 < nats < math.inf:
                raise PoiseError(f"a KL must be above 0 and finite, got {shown(nats)}")
        if max_kl is not None:
            _check_saving(args)
        self.max_kl, self.ended = max_kl, False
        self.kl: Tensor = torch.zeros(0)
        self.ladder = Ladder(Path(folder or args.output_dir), keep_at_kl)
        self.best = Best(self.ladder.folder)
        self._trainer, self._updates, self._option = trainer, updates_per_step, option
        self._within, self._last, self._sampled_at = 0, 0.0, 0
        self._read: list[Tensor] | None = None
        self._generate, self._logprobs = (
            trainer._generate_and_score_completions, trainer._get_per_token_logps_and_entropies,
        )  # fmt: skip
        trainer._generate_and_score_completions = self._measured
        trainer._get_per_token_logps_and_entropies = self._noted

    # ---- measuring ----

    def _measured(self, *arguments: Any) -> Any:
        """What TRL samples and scores, measured on the way."""
        self._read = []
        batch = self._generate(*arguments)
        read, self._read = self._read, None
        if self._trainer.model.training:
            self._measure(batch, read)
        return batch

    def _noted(self, *arguments: Any, **named: Any) -> Any:
        found = self._logprobs(*arguments, **named)
        if self._read is not None:
            self._read.append(found[0])
        return found

    def _measure(self, batch: dict[str, Any], read: list[Tensor]) -> None:
        trainer = self._trainer
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        policy, reference = self._both(batch, read)
        mask = mask.to(policy.dtype)
        own = torch.stack(
            [ppo.sequence_kl(policy, reference, mask), ppo.sequence_kl_k3(policy, reference, mask), mask.amax(-1)], -1
        )
        every = trainer.accelerator.gather(own.float()).cpu()
        self.kl, counted = every[:, 0], every[:, 2] > 0
        if not counted.any():
            return
        step = trainer.state.global_step // self._updates
        kl, k3 = every[counted, :2].mean(0).tolist()
        if not every[counted].isfinite().all():
            raise PoiseError(f"step {step}: the KL of the completions is not finite; the last checkpoint is kept")
        trainer._metrics["train"]["poise/kl"].append(kl)
        trainer._metrics["train"]["poise/kl_k3"].append(k3)
        self.ladder.keep(step, kl, self._weights, self._save)
        within = self.max_kl is None or kl <= self.max_kl
        if within and not self._spread and (gains := trainer._metrics["train"].get("poise/validator")):
            self.best.keep(step, kl, gains[-1], self._weights, self._save)
        self._last, self._sampled_at = kl, step
        if self.max_kl is not None and within and self.place(trainer.state.global_step).exists():
            self._within = trainer.state.global_step

    def _both(self, batch: dict[str, Any], read: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities (N, T) under the policy that sampled, and under the reference.

        TRL reads the policy first and the reference last; GRPO, with one update a generation, the reference alone.
        """
        if len(read) == 2:
            return read[0], read[1]
        if len(read) != 1 or "ref_per_token_logps" not in batch:
            raise PoiseError("this version of TRL reads log-probabilities in a way not known here: no KL is measured")
        ids, seen = (torch.cat([batch[f"prompt_{one}"], batch[f"completion_{one}"]], 1) for one in ("ids", "mask"))
        known = inspect.signature(self._logprobs).parameters
        more = {name: value for name, value in batch.items() if name in known}  # images
        tokens, rows = batch["completion_ids"].shape[1], self._trainer.args.per_device_train_batch_size
        with torch.no_grad():
            return self._logprobs(self._trainer.model, ids, seen, tokens, rows, **more)[0], read[0]

    # ---- the budget ----

    def place(self, global_step: int) -> Path:
        """The folder with the weights of a checkpoint, or of the start."""
        name = f"checkpoint-{global_step}" if global_step else START
        return Path(self._trainer.args.output_dir) / name

    @property
    def within(self) -> int:
        """Updates that the last checkpoint within the budget knows; 0: the start."""
        return self._within

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved:
            self.ladder.reached, self._within = (saved["attributes"][name] for name in ("reached", "within"))
            self.best.restore(saved["attributes"].get("best", ()))
        if is_main_process() and self.ladder.rungs:
            self.ladder.drop_from(state.global_step // self._updates)
        if self.max_kl is None:
            return
        per_generation = args.steps_per_generation * args.num_iterations
        if not self._samples_next(state.save_steps):
            raise PoiseError(
                f"{self._option} goes back to a checkpoint, and the KL of each must be measured: save_steps must be "
                f"a multiple of {-(-per_generation // args.gradient_accumulation_steps)}, the updates of a generation"
            )
        if state.global_step == 0:
            weights = self._weights()
            if is_main_process():
                with write_folder_atomic(self.place(0)) as scratch:
                    self._save(str(scratch), weights)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.max_kl is None or self._last <= self.max_kl or not self._samples_next(state.global_step):
            return
        self.ended = control.should_training_stop = True
        control.should_save = False  # it would push out a checkpoint within the budget
        if is_main_process():
            console.print(above_budget(self._sampled_at, self._last, self.max_kl, self._option))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.ended:
            self.go_back(self._within)

    def go_back(self, global_step: int) -> None:
        """Give the model the weights of a checkpoint, or of the start. PoiseError if they are not there."""
        place = self.place(global_step)
        if not place.exists():
            raise PoiseError(f"{place}, the last checkpoint within {self._option}, is not there")
        self._within = global_step
        self._trainer._load_from_checkpoint(str(place))

    def _samples_next(self, updates: int) -> bool:
        """Is a whole number of generations used up after so many updates?"""
        args = self._trainer.args
        return not updates * args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations)

    # ---- what is saved ----

    def _weights(self) -> dict[str, Tensor]:
        adapters: Callable[[], dict[str, Tensor]] = getattr(self._trainer, "adapters", dict)
        return adapters()

    def _save(self, folder: str, weights: dict[str, Tensor]) -> None:
        model, tokenizer = self._trainer.accelerator.unwrap_model(self._trainer.model), self._trainer.processing_class
        adapted = hasattr(model, "peft_config")
        about: dict[str, Any] = {"save_embedding_layers": False} if adapted else {}
        model.save_pretrained(folder, state_dict=weights or None, **about)
        tokenizer.save_pretrained(folder)
        if adapted:
            write_base(model.get_base_model(), Path(folder))

    def state(self) -> Json:
        """For trainer_state.json."""
        return {
            "args": {"max_kl": self.max_kl, "keep_at_kl": self.ladder.rungs},
            "attributes": {"reached": self.ladder.reached, "within": self._within, "best": self.best.state()},
        }


def _check_saving(args: Any) -> None:
    """Raise PoiseError unless there will be a checkpoint to go back to."""
    if args.save_strategy != "steps":
        raise PoiseError(f"max_kl goes back to a checkpoint: give save_strategy='steps', not '{args.save_strategy}'")
    if args.save_total_limit == 1:
        raise PoiseError("max_kl goes back to a checkpoint before the last: give save_total_limit=2 or more")
