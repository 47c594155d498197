"""A pool: completions of one policy, sampled once, and the scores that reward models give them.

FOLDER/pool.jsonl               prompt, completion; rows grouped by prompt, equally many of each
FOLDER/heads/NAME.safetensors   every head's mean and std of each row, by one reward model
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from numpy import ndarray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from poise.data.preferences import OnBadRow, read_prompts
from poise.data.rows import Check
from poise.data.types import Prompt, Sample
from poise.errors import PoiseError, first_line
from poise.functional.objectives import HeadRewards
from poise.functional.overoptimization import (
    Choice,
    Curves,
    CurveSummary,
    Resamples,
    differences_from,
    stacked,
    summarize,
)
from poise.models.loading import load_policy
from poise.models.policy import Policy
from poise.models.reward_model import heads_fingerprint
from poise.models.rollout import uniforms
from poise.models.scorer import Ensemble, Scorer, generated
from poise.runtime.folders import write_file_atomic
from poise.runtime.progress import progress
from poise.runtime.records import checked, read_rows
from poise.runtime.run_folder import Json, write_jsonl
from poise.studies.comparisons import prompt_key

FILE = "pool.jsonl"
ROWS_PER_BATCH = 256


@dataclass(frozen=True)
class PoolRow:
    """A row of pool.jsonl; judge: the fingerprint of its gold."""

    prompt: str | list[dict[str, Any]]
    completion: str
    gold: float | None = None
    judge: str = ""


@dataclass(frozen=True)
class _About:
    """What a file of scores says beside them."""

    fingerprint: str
    unit: str


@dataclass(frozen=True)
class PoolHeads:
    """The scores of one reward model on a pool.

    heads: (rows, K). unit: Bradley-Terry log odds per unit of its rewards.
    fingerprint: of the reward model.
    """

    heads: HeadRewards
    unit: float
    fingerprint: str

    def save(self, path: Path) -> None:
        """Write the scores; PoiseError, and nothing is written, if any is NaN or infinite."""
        parts = {name: part for name, part in self.heads._asdict().items() if part is not None}
        if not all(part.isfinite().all() for part in parts.values()):
            name = path.with_suffix("")
            raise PoiseError(f"the reward model of {name} says NaN or infinity of some completions; train it anew")
        about = {"unit": repr(self.unit), "fingerprint": self.fingerprint}
        with write_file_atomic(path) as partial:
            save_file({name: part.float().contiguous() for name, part in parts.items()}, partial, about)

    @staticmethod
    def load(path: Path, fingerprint: str, num_rows: int) -> "PoolHeads":
        """Read scores; PoiseError unless they are of this reward model and of a pool with this number of rows."""
        try:
            with safe_open(path, framework="pt") as file:
                about = checked(file.metadata() or {}, _About, f"{path}; delete it to score again: it")
                distance = file.get_tensor("distance") if "distance" in file.keys() else None  # noqa: SIM118
                heads = HeadRewards(file.get_tensor("mean"), file.get_tensor("std"), distance)
        except (SafetensorError, OSError) as error:
            raise PoiseError(f"cannot read {path}: {first_line(error)}; delete it to score again") from None
        if about["fingerprint"] != fingerprint:
            raise PoiseError(f"{path} holds rewards of another reward model; delete it to score again")
        if len(heads.mean) != num_rows:
            raise PoiseError(f"{path} is about {len(heads.mean)} completions, the pool has {num_rows}; delete it")
        return PoolHeads(heads, float(about["unit"]), fingerprint)


def pool_prompts(path: str, on_bad_row: OnBadRow = "error", check: Check | None = None) -> list[Prompt]:
    """Prompts to sample a pool of: at least two, each once. check: as for `read_prompts`."""
    prompts = read_prompts(path, on_bad_row, check)
    if len(prompts) < 2:
        raise PoiseError(f"{path} has one prompt; intervals over prompts need at least two")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt_key(prompt) in seen:
            label = shorten(prompt_label(prompt), 80, placeholder="…")
            raise PoiseError(f"{path} has a prompt twice: {label!r}; leave each in once")
        seen.add(prompt_key(prompt))
    return prompts


def sample_pool(model: str, prompts: Sequence[Prompt], per_prompt: int, max_tokens: int, seed: int) -> list[Json]:
    """`sample` from a language model, folder or hub id."""
    policy = Policy(*load_policy(model), adapted_layers=1, rank=1)
    return sample(policy, prompts, per_prompt, max_tokens, seed, "pool")


def sample(
    policy: Policy, prompts: Sequence[Prompt], per_prompt: int, max_tokens: int, seed: int, label: str
) -> list[Json]:
    """Rows of prompt and completion, `per_prompt` of each prompt, at temperature 1 from the whole distribution."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Json] = []
    size = max(1, ROWS_PER_BATCH // per_prompt)
    with progress(f"{label}: sampling", len(prompts) * per_prompt) as advance:
        for start in range(0, len(prompts), size):
            batch = list(prompts[start : start + size])
            numbers = uniforms(len(batch), per_prompt, max_tokens, generator)
            rollout = policy.sample(batch, numbers, read_again=False)
            for prompt, texts in zip(batch, policy.texts(rollout), strict=True):
                rows += [{"prompt": prompt, "completion": text} for text in texts]
            advance(len(batch) * per_prompt)
    return rows


def kept_pool(
    folder: Path, model: str, prompts: Callable[[], Sequence[Prompt]], per_prompt: int, max_tokens: int, seed: int
) -> list[Json]:
    """Rows of FOLDER/pool.jsonl; sampled if the file is missing. prompts: read only then."""
    path = folder / FILE
    if not path.exists():
        write_jsonl(path, sample_pool(model, prompts(), per_prompt, max_tokens, seed))
    return list(read_rows(path, PoolRow))


def prompt_label(prompt: Prompt) -> str:
    """A prompt as one line for display: its last user turn, which several conversations may share, or its last turn."""
    if isinstance(prompt, str):
        return prompt
    return next((turn["content"] for turn in reversed(prompt) if turn["role"] == "user"), prompt[-1]["content"])


def samples_of(rows: Sequence[Json]) -> list[Sample]:
    """A pool's rows as a reward model reads them."""
    return [generated(row["prompt"], row["completion"]) for row in rows]


def score_pool(folder: Path, rows: Sequence[Json], checkpoints: dict[str, str]) -> dict[str, PoolHeads]:
    """The scores of every checkpoint (name -> folder or hub id) on the rows; computed once and kept.

    Checkpoints with equal trunks read the texts once. Raises PoiseError if kept scores are of another checkpoint.
    """
    found: dict[str, PoolHeads] = {}
    read: list[tuple[Scorer, Tensor]] = []
    for name, path in checkpoints.items():
        file, fingerprint = folder / "heads" / f"{name}.safetensors", heads_fingerprint(path)
        if not file.exists():
            scorer = Scorer.load(path)
            PoolHeads(_heads(scorer, rows, read), scorer.layout.reward_scale, fingerprint).save(file)
        found[name] = PoolHeads.load(file, fingerprint, len(rows))
    return found


def _heads(scorer: Scorer, rows: Sequence[Json], read: list[tuple[Scorer, Tensor]]) -> HeadRewards:
    """The scores of one scorer; `read` keeps each trunk's features."""
    samples = samples_of(rows)
    if isinstance(scorer, Ensemble):
        with progress("pool: scoring", len(samples)) as advance:
            return scorer(samples, advance)
    features = next((features for other, features in read if other.shares_trunk_with(scorer)), None)
    if features is None:
        with progress("pool: scoring", len(samples)) as advance:
            features = scorer.extract(samples, advance)
        read.append((scorer, features))
    return scorer.decode(features)


def proxies(choice: Choice, heads: Sequence[Mapping[str, PoolHeads]], per_prompt: int) -> ndarray:
    """Rewards (S, P, N) of one choice; heads: per run, the scores of each of its reward models."""
    return stacked(choice, [(run[choice.reward].heads, run[choice.reward].unit) for run in heads], per_prompt)


def compare_choices(
    gold_PN: ndarray,
    heads: Sequence[Mapping[str, PoolHeads]],
    choices: Mapping[str, Choice],
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Json]:
    """Curves, laws and measures of every choice over the same runs, with differences from the first choice.

    advance: called after each choice.
    """
    resamples = Resamples.draw(len(gold_PN), len(heads))
    first: CurveSummary | None = None
    found: dict[str, Json] = {}
    for name, choice in choices.items():
        judged = summarize(Curves.of(proxies(choice, heads, gold_PN.shape[1]), gold_PN), resamples)
        found[name] = judged.json | ({"measures": differences_from(judged, first)} if first else {})
        first = first or judged
        advance()
    return found
