"""What the cards of reward models and policies share: the front matter, and which names may be shown."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData, metadata_load

from poise.models.card_warnings import card_warnings
from poise.runtime.display import on_one_line


def front_matter(
    base_model: str = "",
    *,
    library: str = "transformers",
    task: str = "text-classification",
    tags: Sequence[str] = ("poise", "reward-model", "reward-robust-rlhf"),
    title: str = "",
    results: Sequence[EvalResult] = (),
) -> str:
    """The YAML head of a model card, in the form that the hub and its leaderboards read.

    base_model: hub id of the language model; empty if it has none.
    task: the hub's name of what the model does.
    title, results: the model's name and its evaluations, for the hub's `model-index`.
    """
    known = ModelCardData(
        base_model=base_model or None, library_name=library, pipeline_tag=task, tags=list(tags),
        model_name=title if results else None, eval_results=list(results) or None,
    )  # fmt: skip
    return _fenced(known)


def front_matter_without_results(card: Path) -> str:
    """The front matter of another card, less its evaluations; the plain one where there is no card, or none in it."""
    known = metadata_load(card) if card.exists() else None
    if not known:
        return front_matter()
    return _fenced(ModelCardData(**{key: value for key, value in known.items() if key != "model-index"}))


def _fenced(known: ModelCardData) -> str:
    return f"---\n{known.to_yaml()}\n---\n"


def validation_accuracy(value: float, source: str) -> EvalResult:
    """The share of held-out preferences that a reward model orders as people did, for the hub's leaderboards.

    source: file, folder or hub id of the preferences; only its public name is kept.
    """
    name = on_one_line(public_name(source))
    return EvalResult(
        task_type="text-classification", task_name="preferences between two texts",
        dataset_type=name, dataset_name=name, dataset_split="validation",
        metric_type="accuracy", metric_name="accuracy on held-out pairs", metric_value=value,
    )  # fmt: skip


def is_hub_id(name: str) -> bool:
    """Is this `user/name` on the hub, and no folder of this machine?

    >>> is_hub_id("Qwen/Qwen3-0.6B"), is_hub_id("/models/mine"), is_hub_id("../mine")
    (True, False, False)
    """
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(name).exists()


def public_name(source: str) -> str:
    """A hub id as it is; of a path only the last part, because the rest is about a machine.

    >>> public_name("/home/me/pairs.jsonl"), public_name("data/pairs.jsonl"), public_name("org/pairs")
    ('pairs.jsonl', 'pairs.jsonl', 'org/pairs')
    """
    is_file = Path(source).name.endswith((".jsonl", ".json", ".gz", ".csv", ".parquet"))
    return source if is_hub_id(source) and not is_file else Path(source).name


def judges_warnings(reward: str, validator: str | None) -> list[str]:
    """`card_warnings` of a reward model, and of the validator beside it, if there is one; each says whose it is."""
    found = [f"Reward model {public_name(reward)}: {text}" for text in card_warnings(reward)]
    return found + [f"The validator: {text}" for text in (card_warnings(validator) if validator else [])]
