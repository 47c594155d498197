"""From a policy's completions to the rewards PPO maximizes: scoring, comparison with baselines, objective, scale.

    heads of each completion  ->  shaped against baseline completions of its prompt (or not)
                              ->  centered on the initial policy, combined by the objective, scaled, bounded
                              ->  minus a penalty for completions that never ended

Heads are gathered from all processes before they are combined: objectives that couple a batch see the whole of it.
"""

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from poise.data.preferences import read_samples
from poise.data.types import Prompt, Sample
from poise.errors import PoiseError
from poise.functional.objectives import HeadRewards, Objective, RewardScale
from poise.functional.shaping import SHAPINGS, Shaping, with_regret_bonus
from poise.models.policy import Policy
from poise.models.rollout import uniforms
from poise.models.scorer import Scorer, generated
from poise.policy.formats import BaselineRow
from poise.runtime import distributed as processes
from poise.runtime.records import read_rows
from poise.runtime.run_folder import append_jsonl, keep_rows_before


class Baselines:
    """Baseline completions of each prompt for --shaping: read from a file, or sampled from the initial policy.

    Sampling happens when a prompt is first drawn. Its random numbers depend only on the prompt and the seed. The
    completions are kept in RUN/baselines.jsonl; each process has a file of its own, for the prompts it draws.
    """

    def __init__(self, scorer: Scorer, per_prompt: int, max_tokens: int, seed: int, folder: Path):
        self.scorer, self.per_prompt, self.max_tokens, self.seed = scorer, per_prompt, max_tokens, seed
        number = f"-{processes.process_index()}" if processes.process_index() else ""
        self.path = folder / f"baselines{number}.jsonl"
        self._heads: dict[str, HeadRewards] = {}

    def read(self, file: str, prompts: list[Prompt]) -> None:
        """Use the completions of a file (rows of prompt, completion); raises PoiseError if a prompt has none."""
        texts: dict[str, list[Sample]] = {}
        for sample in read_samples(file):
            texts.setdefault(_key(sample.prompt), []).append(sample)
        for prompt in prompts:
            if _key(prompt) not in texts:
                raise PoiseError(f"{file} has no completion of the prompt {str(prompt)[:80]!r}; --baselines needs all")
            if _key(prompt) not in self._heads:
                self._heads[_key(prompt)] = self.scorer(texts[_key(prompt)])

    def resume(self, step: int) -> None:
        """Read the baselines that the run sampled before `step`, and drop later ones."""
        keep_rows_before(self.path, step)
        for row in read_rows(self.path, BaselineRow) if self.path.exists() else ():
            self._heads[row["key"]] = HeadRewards(torch.tensor(row["mean"]), torch.tensor(row["std"]))

    def of(self, prompts: list[Prompt], step: int, policy: Policy) -> HeadRewards:
        """Heads (P, m, K) of each prompt's baselines; m is the smallest number of baselines among the prompts."""
        new = [prompt for prompt in prompts if _key(prompt) not in self._heads]
        # Another process may have new prompts, or other numbers of them.
        together = policy.is_spread and processes.total(torch.tensor(len(new))) > 0
        with policy.whole() if together else contextlib.nullcontext():
            self._sample(new, step, policy)
        found = [self._heads[_key(prompt)] for prompt in prompts]
        count = min(len(heads.mean) for heads in found)
        return HeadRewards(
            torch.stack([heads.mean[:count] for heads in found]), torch.stack([heads.std[:count] for heads in found])
        )

    def _sample(self, new: list[Prompt], step: int, policy: Policy) -> None:
        """Sample and score the baselines of some prompts, of which there may be none in this process."""
        if new:
            with policy.as_reference():
                numbers = torch.cat([self._uniforms(prompt) for prompt in new])
                rollout = policy.sample(new, numbers, read_again=False)
            rows = []
            for prompt, texts in zip(new, policy.texts(rollout), strict=True):
                heads = self.scorer([generated(prompt, text) for text in texts])
                self._heads[_key(prompt)] = heads
                scores = {"mean": heads.mean.tolist(), "std": heads.std.tolist()}
                rows.append({"step": step, "key": _key(prompt), "completions": texts, **scores})
            append_jsonl(self.path, rows)

    def _uniforms(self, prompt: Prompt) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed} {_key(prompt)}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return uniforms(1, self.per_prompt, self.max_tokens, generator)


@dataclass
class PolicyReward:
    """A reward model, an objective, and the constants that make a reward of them."""

    scorer: Scorer
    objective: Objective
    shaping: Shaping = "none"
    baselines: Baselines | None = None
    scale: RewardScale = field(default_factory=lambda: RewardScale((), 0.0, 1.0))
    truncated_before: int = 0
    regret_bonus: float = 0.0

    @property
    def num_truncated(self) -> int:
        """Truncated texts that the run has scored so far, those before a resume (`truncated_before`) included."""
        return self.truncated_before + self.scorer.num_truncated

    def heads(self, policy: Policy, prompts: list[Prompt], texts: list[list[str]], step: int) -> HeadRewards:
        """Heads (P * M, K) of this process's completions, on the CPU; M texts of each prompt.

        Raises PoiseError if a head is not finite.
        """
        samples = [generated(prompt, text) for prompt, row in zip(prompts, texts, strict=True) for text in row]
        heads = self.scorer(samples)
        parts = [part for part in heads if part is not None]
        bad = (~torch.cat(parts, -1).isfinite().all(-1)).nonzero()
        if len(bad):
            raise PoiseError(f"the reward of {samples[int(bad[0, 0])].completion[:60]!r} is not finite")
        if self.shaping == "none" or self.baselines is None:
            return heads
        baseline = self.baselines.of(prompts, step, policy)
        unit = self.scorer.layout.reward_scale  # in which a difference of rewards is the log odds of a preference
        by_prompt = heads.in_unit(unit).each(lambda part: part.view(len(prompts), -1, part.shape[-1]))
        others = baseline.in_unit(unit).each(lambda part: part.unsqueeze(1))
        return SHAPINGS[self.shaping](by_prompt, others).each(lambda part: part.flatten(0, 1))

    def combine(self, heads: HeadRewards) -> Tensor:
        """Rewards of whole batches of heads (…, K), constants to what is trained; an objective may have weights."""
        return self.scale.combine(heads, self.objective).detach()

    def with_bonus(self, score: Tensor, prompts: list[Prompt], texts: list[list[str]]) -> Tensor:
        """Rewards (P * M,) of this process's completions as the policy is paid them, with --regret-bonus."""
        each = [prompt for prompt, row in zip(prompts, texts, strict=True) for _ in row]
        return with_regret_bonus(score, each, [text for row in texts for text in row], self.regret_bonus)


def gather(heads: HeadRewards) -> HeadRewards:
    """Heads (N, K) of all processes, in their order."""
    return heads.each(processes.gathered)


def _key(prompt: Prompt) -> str:
    return json.dumps(prompt)
