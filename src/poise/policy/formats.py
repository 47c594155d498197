"""What a policy run's files hold, as its readers need it: comparison, studies, cards, evaluation, and a resume.

A field that is None where it could be a number was undefined: the reason stands beside it. Nothing here imports torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from poise.errors import PoiseError
from poise.models.run_heads import refuse_itself, reward_folder
from poise.runtime.config_files import load_config_file
from poise.runtime.records import checked
from poise.runtime.run_kinds import told_of, why_without
from poise.runtime.settings import Bounded, Count, NotNegative, Share, WholeNumber, at_least

Prompt = str | list[dict[str, Any]]
_OF_A_POLICY = ("adapter_config.json", "config.json")


@dataclass(frozen=True)
class RewardSettings:
    """What config.yaml says of the reward that a policy was trained to."""

    objective: str
    reward: str
    kl_coef: NotNegative


@dataclass(frozen=True)
class ModelSettings:
    """What config.yaml says of the model that a policy is."""

    model: str
    tune: Literal["lora", "full"]
    adapted_layers: WholeNumber
    lora_rank: Count


@dataclass(frozen=True)
class StepRow:
    """A row of metrics.jsonl."""

    step: WholeNumber
    reward: float
    disagreement: float
    gap: float
    heads: tuple[float, ...]
    alarm: bool = False
    monitor_score: float | None = None  # absent without a monitor
    kl: float | None = None  # TRL logs none at beta 0
    routing_std: float | None = None  # absent in runs of earlier versions
    sample_seconds: NotNegative = 0.0
    score_seconds: NotNegative = 0.0
    reference_seconds: NotNegative = 0.0
    update_seconds: NotNegative = 0.0


@dataclass(frozen=True)
class SampleRow:
    """A row of samples.jsonl."""

    step: WholeNumber
    prompt: Prompt
    completion: str


@dataclass(frozen=True)
class FinalRow:
    """A row of final.jsonl; mean: of each head."""

    prompt: Prompt
    completion: str
    reward: float
    kl: float
    mean: tuple[float, ...]


@dataclass(frozen=True)
class BaselineRow:
    """A row of baselines.jsonl: the scores of one prompt's baseline completions, each of every head.

    step: -1 for baselines of the completions on which the scale was fitted.
    """

    step: Annotated[int, at_least(-1)]
    key: str
    mean: tuple[tuple[float, ...], ...]
    std: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class BenchmarkRow:
    """A row of benchmarks.jsonl."""

    step: WholeNumber
    task: str
    mean: Share
    stderr: float | None = None  # undefined for a single row


@dataclass(frozen=True)
class Outcome:
    """results.json."""

    steps: WholeNumber
    alarms: list[dict[str, float | str]]
    reward: float
    kl: float
    num_heads: Count
    scale: dict[str, Any]
    heads: str = ""  # which of a `poise train-reward` run's were the reward
    best: dict[str, float] | None = None  # as best.json


@dataclass(frozen=True)
class MonitorState:
    """What the monitor has read, in a checkpoint."""

    steps: WholeNumber
    first: dict[str, tuple[float, ...]]
    recent: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Checkpoint:
    """What a PPO run's checkpoint holds beside tensors. Those of earlier versions lack the fields with a default."""

    step: WholeNumber
    kl_coef: NotNegative
    scale: dict[str, Any]
    pessimism: WholeNumber
    alarms: list[dict[str, float | str]]
    ended: Literal["", "stop", "rollback", "max_kl"]
    monitor: dict[str, Any]
    last_score: float
    objective_parameter: Bounded | None = None  # the objective has none
    num_truncated: WholeNumber = 0
    rung: NotNegative = 0.0
    scale_std_interval: tuple[float | None, ...] = ()  # undefined for fewer than three prompts
    validator: dict[str, Any] | None = None  # absent without one
    best: tuple[float | None, ...] = ()  # the same


def policy_in(path: str) -> str:
    """What is read of a path that names a policy: the policy in a run, or the path itself."""
    inside = Path(path) / "policy"
    return str(inside) if any((inside / name).exists() for name in _OF_A_POLICY) else path


def policy_folder(path: str) -> Path:
    """The folder of a policy, adapters or a whole model: as given, or in a run. PoiseError if there is none."""
    folder = Path(policy_in(path))
    if any((folder / name).exists() for name in _OF_A_POLICY):
        return folder
    told, place = told_of(path), Path(path)
    why = why_without(place, "policy") if "train-policy" in told else f"it is {told}" if told else ""
    why = f" ({why})" if why else ""
    missing = "" if place.exists() else " (there is no such folder)"
    raise PoiseError(
        f"{path} holds no policy{why}; name a finished `poise train-policy` run, or the policy folder in it{missing}"
    )


def refuse_unfinished(run: Path, gold: str = "") -> None:
    """Raise PoiseError for a folder that is no finished policy run, and for one whose reward is the gold itself."""
    if not (run / "final.jsonl").exists():
        told = told_of(run)
        why = f"it is {told}" if told and "train-policy" not in told else "it has no final.jsonl"
        raise PoiseError(f"{run} is not a finished policy run: {why if run.exists() else 'there is no such folder'}")
    if gold and (run / "config.yaml").exists():
        saved = checked(load_config_file(run / "config.yaml"), RewardSettings, str(run / "config.yaml"))
        try:
            taken = reward_folder(saved["reward"], saved["objective"], saved.get("heads"))
        except PoiseError:
            taken = ""  # it lies elsewhere now
        refuse_itself(gold, saved["reward"], taken, option="--gold")
