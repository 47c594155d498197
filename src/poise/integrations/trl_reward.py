"""A robust reward, and an alarm for over-optimization, for anybody's TRL script (RLOO, GRPO and what is like them).

    from poise.integrations.trl_reward import MonitorCallback, RobustReward

    reward = RobustReward.load("my-brme", objective="tradeoff(0.4)")
    trainer = GRPOTrainer(model, reward_funcs=[reward], …)

Pass this callable, never the reward model itself. Of a classifier with several labels TRL silently reads
`logits[:, 0]`: the first head's uncentered mean, without an objective.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple

import torch
import transformers
from transformers.trainer_callback import ExportableState

from poise.data.types import Prompt, Sample
from poise.errors import PoiseError
from poise.functional.monitor import Monitor, MonitorConfig, Reading
from poise.functional.objectives import (
    HeadRewards,
    Objective,
    RewardScale,
    joined,
    mean,
    nominal_head,
    parse_objective,
)
from poise.functional.reward_scale import said_of_unit, std_interval
from poise.functional.shaping import rows_by_prompt, with_regret_bonus
from poise.integrations.trl_logs import policy_metrics, statistics
from poise.integrations.trl_turns import Completion, as_lists, as_pair, is_finished, lines_to_say
from poise.models.chat_format import decode_completions, encode_prompt
from poise.models.loading import HfTokenizer
from poise.models.reward_model import heads_fingerprint, read_layout
from poise.models.run_heads import taken_heads
from poise.models.scale_file import ScaleFile
from poise.models.scorer import ENSEMBLE_FILE, Scorer, generated
from poise.models.validator import Validator, validator_for
from poise.runtime.distributed import gathered_rows, process_index
from poise.runtime.functions import digest_of
from poise.runtime.progress import console
from poise.runtime.run_folder import Json, is_main_process
from poise.runtime.settings import LengthOrAll, check_value, shown

IN_MEMORY = "in memory"  # what settings call a reward model that no folder holds


# ---- the reward ----


class Scored(NamedTuple):
    """One batch of all processes: the samples, their heads (N, K) and their rewards (N,)."""

    samples: list[Sample]
    heads: HeadRewards
    reward: torch.Tensor


class RobustReward:
    """A multi-head reward model under an objective, as a function that TRL takes in `reward_funcs`.

    Each head is centered, and the combined reward divided by its std, on the completions of the first call: those of
    the initial policy. Preferences identify differences only; without centering a head's constant would decide which
    head is the worst case. Given a file name, `scale` keeps these constants, so that a run that goes on, or another one
    of the same reward, has the same reward.

    Every process must call it at the same time, as TRL does: a batch is that of all of them together. Logged through
    `log_metric`: poise/nominal, worst_case, gap, disagreement, routing_std, switches, repetition, variety, truncated,
    unfinished (of conversations), distance (where the model has reference texts), validator and transfer (with a
    validator), and poise/head_0 … each head's centered mean; through `log_extra` the nominal head of each completion.

    Picklable: the copy carries settings and scale, and loads the model where it is first called. A reward of a model
    that is in memory only (`of` without a path) takes the model along.

    objective: its name; that of a function ends in eight characters of what it computes, so that a file or a run of one
    is never taken for another's. combine: the function of centered heads (N, K) that it names.
    """

    __name__ = "RobustReward"  # what TRL calls it in its logs

    def __init__(
        self,
        path: str,
        objective: str | Objective,
        scale: str | Path,
        max_length: int,
        floor: float | int,
        ceiling: float | int,
        regret_bonus: float | int = 0.0,
        validator: str | None = "",
    ):
        if not isinstance(objective, str) and not callable(objective):
            raise PoiseError(f"an objective is a name or a function of HeadRewards, not {type(objective).__name__}")
        for name, bound in (("floor", floor), ("ceiling", ceiling), ("regret_bonus", regret_bonus)):
            if not isinstance(bound, Real) or isinstance(bound, bool):
                raise PoiseError(f"{name} must be a number, got {shown(bound)}; without a bound leave it out")
        if not floor < ceiling:  # also where one of them is NaN
            raise PoiseError(f"the reward's floor must be below its ceiling, got {floor:g} and {ceiling:g}")
        if not 0.0 <= regret_bonus < math.inf:
            raise PoiseError(f"a regret bonus must be at least 0 and finite, got {regret_bonus:g}")
        self.path, self.scale, self.max_length, self.given = path, str(scale or ""), max_length, objective
        self._objective = objective if isinstance(objective, str) else _told_apart(objective)
        self.combine = parse_objective(objective) if isinstance(objective, str) else objective
        self.floor, self.ceiling, self.regret_bonus = float(floor), float(ceiling), float(regret_bonus)
        self.fitted: RewardScale | None = None
        self.last: Scored | None = None
        self.validator = validator
        self._scorer: Scorer | None = None
        self.watched: RewardScale | None = None  # the validator's scale
        self._watching: Validator | None = None
        self._said: set[str] = set()
        self._by_hand = False  # was the scale fitted by a call that no trainer made?

    @property
    def objective(self) -> str:
        """Its name; that of a function is where it is defined, and what it computed when it was given."""
        return self._objective

    @staticmethod
    def of(
        scorer: Scorer,
        objective: str | Objective,
        *,
        path: str = "",
        scale: str | Path = "",
        floor: float | int = -math.inf,
        ceiling: float | int = math.inf,
        regret_bonus: float | int = 0.0,
        validator: str | None = "",
    ) -> "RobustReward":
        """From a model in memory; the others as of `load`.

        path: where the model came from, if it can be loaded there again. validator: "" is none, too.
        """
        length = scorer.extract.max_length
        reward = RobustReward(path, objective, scale, length, floor, ceiling, regret_bonus, validator)
        if isinstance(objective, str):
            scorer.layout.check_objective(objective)
        reward._scorer = scorer
        return reward

    @staticmethod
    def load(
        path: str | Path,
        objective: str | Objective = "tradeoff(0.4)",
        *,
        scale: str | Path = "",
        max_length: int = 0,
        floor: float | int = -math.inf,
        ceiling: float | int = math.inf,
        regret_bonus: float | int = 0.0,
        validator: str | None = "",
    ) -> "RobustReward":
        """From a checkpoint folder, a hub id, an ensemble, or a `poise train-reward` run.

        Of a run `lower_confidence` reads the posterior heads, as in `poise train-policy`, which a line says. Others and
        a function, read the BRME's.

        objective: a name such as `tradeoff(0.4)`, or a function of HeadRewards (N, K) that returns rewards (N,).
        scale: JSON file with the reward's constants; written on the first call, read where it exists.
        max_length: longest sample in tokens; 0 takes the reward model's context.
        floor, ceiling: bounds of the reward, in stds of the initial policy's.
        regret_bonus: what one completion of each prompt gets on top (`poise.functional.shaping.regret_bonus`), in these
        stds. All completions of a prompt must come in one call, as TRL gives them.
        validator: another reward model, of other pairs or other features, that is only watched: its gain since the
        start, and that gain over the reward's own, are logged. Default: the one that the reward's run trained
        (`poise train-reward --validator-share`), if it did, and a line says so; None: none.
        Raises PoiseError for an unknown objective, one that means nothing for the model's heads, a model of several
        labels without a `poise` block, or a validator that is the reward model. The weights are read on the first call,
        when the process knows its device, those of the validator on the first call that logs.
        """
        path = str(path)
        check_value("max_length", max_length or 0, LengthOrAll)
        place = taken_heads(path, objective) if isinstance(objective, str) else path
        if isinstance(objective, str) and not (Path(place) / ENSEMBLE_FILE).exists():
            read_layout(place).check_objective(objective)
        validator = validator_for(path, validator)
        return RobustReward(place, objective, scale, max_length or 0, floor, ceiling, regret_bonus, validator)

    @property
    def scorer(self) -> Scorer:
        if self._scorer is None:
            self._scorer = Scorer.load(self.path, self.max_length)
        return self._scorer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scorer": None if self.path else self._scorer, "last": None, "_watching": None}

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], **columns: Any
    ) -> list[float | None]:
        """One reward per completion. Text and conversations both; of `columns`, only TRL's own four are used.

        None for a completion that was cut among the calls of tools: there is no answer to score.
        """
        prompts, completions = as_lists(prompts, completions)
        if (ids := columns.get("completion_ids")) is not None and len(ids):
            completions = _as_written(self.scorer.extract.tokenizer, prompts, completions, ids)
        finished = [is_finished(completion) for completion in completions]
        pairs = zip(prompts, completions, finished, strict=True)
        own = [as_sample(prompt, completion) for prompt, completion, whole in pairs if whole]
        before = self.scorer.num_truncated
        part = (own, self.scorer(own), self.saved_scale() if self.fitted is None else None)
        parts = gathered_rows([part])
        samples = [sample for there, _, _ in parts for sample in there]
        for about, line in lines_to_say(completions).items():
            if about not in self._said:
                self._said.add(about)
                console.print(line, markup=False, soft_wrap=True)
        if not samples:
            if finished and self.fitted is None and not any(saved for _, _, saved in parts):
                raise PoiseError("no completion of the first batch ends in text, so the reward has no scale")
            return [None] * len(finished)
        heads = joined([scored for _, scored, _ in parts])
        trainer = columns.get("trainer_state")
        step = getattr(trainer, "global_step", 0)
        if self.fitted is None:  # one process that can read the file is enough: folders may not be shared
            saved = next((saved for _, _, saved in parts if saved), None)
            self.fitted, self._by_hand = saved or self._fit(heads, samples, step), saved is None and trainer is None
        elif self._by_hand and trainer is not None:
            self._by_hand = False
            console.print(
                f"reward: its scale is that of the {self.fitted.count} completions of an earlier call, not of the "
                f"policy that is trained; give the trainer a reward that was not called before", markup=False,
            )  # fmt: skip
        log_metric = columns.get("log_metric")
        watched = self._watch(self.validator, own, heads, samples, step) if self.validator and log_metric else {}
        reward = self.fitted.combine(heads, self.combine)
        if not reward.isfinite().all():
            raise PoiseError(f"the reward of {samples[int((~reward.isfinite()).nonzero()[0])]} is not finite")
        self.last = Scored(samples, heads, reward)
        if log_metric:
            logged = statistics(samples, self.fitted.centered(heads))
            logged |= watched
            logged["truncated"] = (self.scorer.num_truncated - before) / max(len(own), 1)
            if not all(isinstance(completion, str) for completion in completions):
                logged["unfinished"] = 1 - len(own) / len(finished)
            for name, value in logged.items():
                log_metric(f"poise/{name}", value)
        start = sum(len(there) for there, _, _ in parts[: process_index()])
        mine = slice(start, start + len(own))
        if log_extra := columns.get("log_extra"):
            log_extra("nominal_head", nominal_head(heads)[mine].tolist())
        asked, texts = [sample.prompt for sample in samples], [sample.completion for sample in samples]
        rewards = iter(with_regret_bonus(reward, asked, texts, self.regret_bonus)[mine].tolist())
        return [next(rewards) if whole else None for whole in finished]

    def _watch(
        self, validator: str, own: Sequence[Sample], heads: HeadRewards, samples: Sequence[Sample], step: int
    ) -> dict[str, float]:
        """What the validator says of `samples`, those of all processes, and `own`, of this one. heads: the reward's."""
        assert self.fitted is not None
        watching = self._watching = self._watching or Validator(validator, self.combine)
        file = self._file(watching) if self.scale else None
        scored = watching.heads([one.prompt for one in own], [[one.completion] for one in own])
        parts = gathered_rows([(scored, file.read() if file and self.watched is None else None)])
        every = joined([heads for heads, _ in parts])
        if self.watched is None:
            scale = next((saved for _, saved in parts if saved), None) or _at_start(every, mean, step)
            self.watched = file.keep(scale) if file and is_main_process() else scale
        watching.own, watching.proxy = self.watched, replace(self.fitted, floor=-math.inf, ceiling=math.inf)
        return watching.metrics(every, heads, len(rows_by_prompt([sample.prompt for sample in samples])))

    def _fit(self, heads: HeadRewards, samples: Sequence[Sample], step: int) -> RewardScale:
        scale = _at_start(heads, self.combine, step, self.floor, self.ceiling)
        if is_main_process():
            interval = std_interval(scale.combined(heads, self.combine), [sample.prompt for sample in samples])
            console.print(said_of_unit(scale.std, interval), soft_wrap=True)
        return self._file().keep(scale) if self.scale and is_main_process() else scale

    def saved_scale(self) -> RewardScale | None:
        """The constants in the file `scale`, if there are any; PoiseError for those of another reward."""
        return self._file().read() if self.scale else None

    def _file(self, validator: Validator | None = None) -> ScaleFile:
        """Where the constants are kept: of this reward, or beside them of the validator."""
        if validator is not None:
            path, num_heads = Path(f"{self.scale}.validator"), validator.scorer.layout.num_heads
            return ScaleFile(path, "mean", heads_fingerprint(validator.path), num_heads)
        num_heads = self.scorer.layout.num_heads
        return ScaleFile(Path(self.scale), self.objective, self._fingerprint(), num_heads, self.floor, self.ceiling)

    def _fingerprint(self) -> str:
        """A hash of what the heads are; also of the trunk's settings where the model has a folder."""
        if self.path:
            return heads_fingerprint(self.path)
        state = hashlib.blake2b(repr(self.scorer.layout).encode(), digest_size=16)
        state.update(self.scorer.weight.float().cpu().numpy().tobytes())
        return state.hexdigest()


def _at_start(
    heads: HeadRewards, objective: Objective, step: int, floor: float = -math.inf, ceiling: float = math.inf
) -> RewardScale:
    """The scale of the first completions; PoiseError where they are those of a policy that was trained already."""
    if step > 0:
        raise PoiseError(
            f"training goes on from step {step}, but the reward's scale of step 0 was not kept; "
            f'start with RobustReward.load(…, scale="scale.json")'
        )
    return RewardScale.fit(heads, objective, floor, ceiling)


def name_of(objective: Objective) -> str:
    """What logs and files call a function of HeadRewards.

    >>> name_of(mean)
    'poise.functional.objectives.mean'
    """
    kind = objective if hasattr(objective, "__qualname__") else type(objective)
    return f"{kind.__module__}.{kind.__qualname__}"


def _told_apart(objective: Objective) -> str:
    """The name of a function, and what it computes: an edited cell's has the same name. Poise's own are their names."""
    name = name_of(objective)
    return name if name.startswith("poise.") else f"{name}#{digest_of(objective)}"


def _as_written(
    tokenizer: HfTokenizer, prompts: Sequence[Prompt], completions: Sequence[Completion], ids: Sequence[list[int]]
) -> Sequence[Completion]:
    """Completions with the spaces that they begin with, of which TRL, decoding each alone, loses some (sentencepiece).

    tokenizer: the reward model's. With a chat template it reads no such space. Else it is used if it is the policy's,
    which it is if it decodes the ids to the very completions.
    """
    if tokenizer.chat_template is not None or tokenizer.batch_decode(ids, skip_special_tokens=True) != list(
        completions
    ):
        return completions
    pairs = zip(prompts, ids, strict=True)
    return [decode_completions(tokenizer, encode_prompt(tokenizer, prompt), [one])[0] for prompt, one in pairs]


def as_sample(prompt: Prompt, completion: Completion) -> Sample:
    """What TRL passes, as a sample: of an answer in several turns (tools), its last one is judged after the others."""
    return generated(*as_pair(prompt, completion))


# ---- the alarm ----


class MonitorCallback(transformers.TrainerCallback, ExportableState):
    """The alarm for over-optimization, for a TRL trainer whose reward is a `RobustReward`.

    action: "log" says so, once each time it starts; "stop" also ends the training.
    Its state is kept in the Trainer's checkpoints.
    """

    def __init__(self, monitor: Monitor | None = None, action: Literal["log", "stop"] = "log"):
        if not isinstance(monitor, (Monitor, NoneType)):
            raise PoiseError(f"monitor must be a Monitor, not {type(monitor).__name__}")
        check_value("action", action, Literal["log", "stop"])
        self.monitor, self.action = monitor or Monitor(), action
        self.reading = Reading(0.0, False, {})

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved:
            self.monitor = Monitor.restore(saved["attributes"]["monitor"], self.monitor.config)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "reward" not in logs:  # evaluations, and the last line of a run
            return
        before, self.reading = self.reading, self.monitor.update(policy_metrics(logs))
        if self.reading.alarm and not before.alarm and state.is_world_process_zero:
            signs = ", ".join(f"{name} {value:+.2f}" for name, value in self.reading.signs.items())
            console.print(
                f"step {state.global_step}: signs of over-optimization, score {self.reading.score:.2f} ({signs})"
            )
        if self.reading.alarm and self.action == "stop":
            control.should_training_stop = True

    def state(self) -> Json:
        """For trainer_state.json."""
        return {
            "args": {"config": asdict(self.monitor.config), "action": self.action},
            "attributes": {"monitor": self.monitor.state()},
        }

    @classmethod
    def from_state(cls, state: Json) -> "MonitorCallback":
        """Inverse of `state`."""
        config = MonitorConfig(**state["args"]["config"])
        return cls(Monitor.restore(state["attributes"]["monitor"], config), state["args"]["action"])
