"""From samples to rewards for concurrent callers: batching, heads, objective, and the scale that all answers share."""

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import HeadRewards, RewardScale, parse_objective
from poise.models.encoding import Tokens
from poise.models.scale_file import ScaleFile
from poise.models.score_columns import score_columns
from poise.runtime.progress import console
from poise.runtime.run_folder import Json
from poise.serve.backend import RewardModels, finite_or_raise
from poise.serve.batching import Batcher

HOLD = 4.0  # seconds that an answer waits for a new scale; OpenRLHF gives up after 5
# Callers that hold a thread for each answer (32 in SkyRL) may never ask for as many texts as a scale is fitted to.
# Where the same ones are asked for again for STALL seconds, and no other, those are all there will be.
STALL, FEWEST = 60.0, 16
_AWAY = 30.0  # seconds without any request: whoever asks then has not waited


class BadSampleError(PoiseError):
    """A sample that cannot be scored: the caller's fault."""


class BrokenRewardError(PoiseError):
    """A reward that is no number: the reward model's fault."""


class NoScaleYetError(PoiseError):
    """Too few completions so far to fit the scale to."""


class Scored(NamedTuple):
    """One sample's heads (K,), whether it lost its oldest tokens, its distance (1,) to the reference texts, and the
    validator's reward."""

    mean: torch.Tensor
    std: torch.Tensor
    truncated: bool
    distance: torch.Tensor | None = None
    validator: float | None = None


class Rewards:
    """The reward that is served: reward models, an objective and a scale.

    Without a scale file, rewards and heads are as `poise score` gives them. With one, every head is less its mean on
    the initial policy, and the reward has mean 0 and std 1 there before the file's bounds apply. A scale that the file
    does not hold yet is fitted to the first `scale_count` different completions, or to those that are there once no
    other has come for `STALL` seconds; answers wait for it, so that all of them are on one scale.
    """

    def __init__(
        self,
        models: RewardModels,
        objective: str,
        scale_file: ScaleFile | None = None,
        scale_count: int = 64,
        max_waiting: int = 8192,
        validator: RewardModels | None = None,
    ):
        """validator: another reward model, whose mean over heads is told of every sample and changes nothing."""
        self.models, self.objective = models, objective
        self.batcher: Batcher[Sample, Scored] = Batcher(self._score, max_waiting)
        self.batch_sizes: list[int] = []
        self._combine = parse_objective(objective)
        self._validator = validator
        self._file, self._count = scale_file, scale_count
        self._scale = scale_file.read() if scale_file else None
        self._first: dict[str, Scored] = {}
        self._grew = self._asked = -math.inf  # when the last new text came, and the last request
        self._fitted = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Is there a scale, or none needed?"""
        return self._file is None or self._scale is not None

    async def __call__(self, samples: Sequence[Sample]) -> list[Json]:
        """One row per sample: reward, what it is made of, and all heads.

        Raises BadSampleError, BrokenRewardError, NoScaleYetError, or the batcher's QueueFullError.
        """
        scored = await self.batcher(samples)
        if not self.ready:
            await self._fit(samples, scored)
        return self._rows(scored)

    def _score(self, samples: list[Sample]) -> list[Scored | Exception]:
        """In the worker thread. A sample that cannot be encoded or scored does not harm the others of its batch."""
        self.batch_sizes.append(len(samples))
        results: list[Scored | Exception] = []
        encoded, kept, cut = [], [], []
        for i, sample in enumerate(samples):
            before = self.models.num_truncated
            try:
                encoded.append(self.models.encode(sample))
                kept.append(i)
                cut.append(self.models.num_truncated > before)
                results.append(BrokenRewardError("not scored"))
            except PoiseError as error:
                results.append(BadSampleError(str(error)))
        if not encoded:
            return results
        heads = self.models(encoded)
        distances = [None] * len(kept) if heads.distance is None else list(heads.distance)
        seen = self._validated([samples[i] for i in kept])
        for i, mean, std, far, truncated, said in zip(kept, heads.mean, heads.std, distances, cut, seen, strict=True):
            try:
                finite_or_raise(HeadRewards(mean, std, far))
                results[i] = Scored(mean, std, truncated, far, said)
            except PoiseError as error:
                results[i] = BrokenRewardError(str(error))
        return results

    def _validated(self, samples: Sequence[Sample]) -> list[float | None]:
        """What the validator says; None of a sample that it cannot read, for it must not stop a training."""
        found: list[float | None] = [None] * len(samples)
        if self._validator is None:
            return found
        encoded: dict[int, list[Tokens]] = {}
        for i, sample in enumerate(samples):
            with contextlib.suppress(PoiseError):
                encoded[i] = self._validator.encode(sample)
        if encoded:
            rewards = self._validator(list(encoded.values())).mean.mean(-1).tolist()
            for i, reward in zip(encoded, rewards, strict=True):
                found[i] = reward if math.isfinite(reward) else None
        return found

    async def _fit(self, samples: Sequence[Sample], scored: Sequence[Scored]) -> None:
        assert self._file is not None
        self._scale = self._file.read()  # of another replica
        known, now = len(self._first), time.monotonic()
        for sample, one in zip(samples, scored, strict=True):
            self._first[json.dumps([sample.prompt, sample.completion])] = one
        if len(self._first) > known or now - self._asked > _AWAY:
            self._grew = now
        self._asked = now
        all_there = len(self._first) >= FEWEST and now - self._grew >= STALL
        if self._scale is None and (len(self._first) >= self._count or all_there):
            if all_there:
                console.print(
                    f"the scale is fitted to {len(self._first)} completions, not {self._count}: for {STALL:g} s the "
                    f"callers have asked for no other"
                )
            first, bounds = _stacked(list(self._first.values())), (self._file.floor, self._file.ceiling)
            self._scale = self._file.keep(RewardScale.fit(first, self._combine, *bounds))
        if self._scale is not None:
            self._first.clear()
            self._fitted.set()
            return
        try:
            await asyncio.wait_for(self._fitted.wait(), HOLD)
        except TimeoutError:
            raise NoScaleYetError(
                f"the scale is fitted to the first {self._count} different completions, and {len(self._first)} are "
                f"here; send more at once, or serve with a smaller --scale-count"
            ) from None

    def _rows(self, scored: Sequence[Scored]) -> list[Json]:
        heads = _stacked(scored)
        reward = self._combine(heads)
        if self._scale is not None:
            reward = self._scale.combine(heads, self._combine)
            heads = self._scale.centered(heads)
        columns = score_columns(heads, self.models.layout, reward)
        if not all(column.isfinite().all() for column in columns.values()):
            raise BrokenRewardError("a reward is not finite: the reward model is broken")
        listed = {name: column.tolist() for name, column in columns.items()}
        return [
            {name: column[i] for name, column in listed.items()}
            | {"truncated": one.truncated}
            | ({} if one.validator is None else {"validator": one.validator})
            for i, one in enumerate(scored)
        ]


def _stacked(scored: Sequence[Scored]) -> HeadRewards:
    distances = [one.distance for one in scored if one.distance is not None]
    return HeadRewards(
        torch.stack([one.mean for one in scored]), torch.stack([one.std for one in scored]),
        torch.stack(distances) if len(distances) == len(scored) else None,
    )  # fmt: skip
