"""Baselines and rewards of a policy whose completions, and a reward model whose heads, are known."""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from poise.data.types import Prompt, Sample
from poise.errors import PoiseError
from poise.functional.objectives import HeadRewards, RewardScale, parse_objective
from poise.models.policy import Policy
from poise.models.reward_model import HeadLayout
from poise.models.scorer import Scorer
from poise.policy.reward import Baselines, PolicyReward


class Lengths(Scorer):
    """Two heads: a completion's length, and the negative; stds 1 and 2."""

    def __init__(self, reward_scale: float = 1.0) -> None:
        self.layout = HeadLayout(2, "gaussian", (0.0,) * 4, reward_scale=reward_scale)
        self.asked: list[Sample] = []

    num_truncated = 3  # type: ignore[assignment]

    def __call__(self, samples: Sequence[Sample], progress: object = None) -> HeadRewards:  # noqa: ARG002
        self.asked += samples
        length = torch.tensor([[float(len(sample.completion))] for sample in samples])
        return HeadRewards(torch.cat([length, -length], -1), torch.tensor([[1.0, 2.0]]).expand(len(samples), -1))


class Drawing(Policy):
    """Writes as many letters as the first of its numbers says, and notes which numbers it was given."""

    is_spread = False

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.given: list[torch.Tensor] = []
        self.is_reference = False

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        self.is_reference = True
        yield
        self.is_reference = False

    def sample(self, prompts: list[Prompt], uniform: torch.Tensor, *, read_again: bool = True) -> Any:
        assert self.is_reference
        assert not read_again
        assert len(prompts) == len(uniform)
        self.given.append(uniform)
        return uniform

    def texts(self, rollout: Any) -> list[list[str]]:
        return [["x" * (1 + int(9 * numbers[0])) for numbers in row] for row in rollout]


def baselines(folder: Path, seed: int = 0) -> Baselines:
    return Baselines(Lengths(), 3, 4, seed, folder)


def test_baselines_are_sampled_once_and_kept(tmp_path: Path) -> None:
    """What a prompt's are depends on the prompt and the seed alone, not on the step or its company."""
    policy, first = Drawing(), baselines(tmp_path)
    both = first.of(["a", "b"], 2, policy)
    assert both.mean.shape == (2, 3, 2)
    assert torch.equal(both.mean[..., 0], -both.mean[..., 1])
    assert torch.equal(first.of(["b", "a"], 3, policy).mean, both.mean.flip(0))
    assert len(policy.given) == 1
    assert policy.given[0].shape == (2, 3, 4)
    (tmp_path / "other").mkdir()
    alone = baselines(tmp_path / "other").of(["b"], 9, policy)
    assert torch.equal(alone.mean[0], both.mean[1])
    (tmp_path / "seed").mkdir()
    baselines(tmp_path / "seed", seed=1).of(["a", "b"], 2, policy)
    assert not torch.equal(policy.given[-1], policy.given[0])


def test_a_resumed_run_has_the_baselines_of_before_and_samples_the_others_again(tmp_path: Path) -> None:
    policy, first = Drawing(), baselines(tmp_path)
    kept, later = first.of(["a"], 1, policy), first.of(["b"], 5, policy)
    rows = [json.loads(line) for line in (tmp_path / "baselines.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 5]
    assert all(len(row["completions"]) == 3 for row in rows)
    again, fresh = baselines(tmp_path), Drawing()
    again.resume(5)
    assert torch.equal(again.of(["a"], 5, fresh).mean, kept.mean)
    assert not fresh.given
    assert torch.equal(again.of(["b"], 5, fresh).mean, later.mean)
    assert len(fresh.given) == 1
    baselines(tmp_path / "none").resume(3)  # a run that has sampled none yet


def test_baselines_of_a_file_are_cut_to_the_fewest(tmp_path: Path) -> None:
    file = tmp_path / "baselines.jsonl"
    rows = [("a", "one"), ("b", "three"), ("a", "12"), ("b", "1"), ("b", "22")]
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    given = baselines(tmp_path / "run")
    given.read(str(file), ["a", "b", "a"])
    assert given.of(["a", "b"], 0, Drawing()).mean[..., 0].tolist() == [[3.0, 2.0], [5.0, 1.0]]
    assert given.of(["b"], 0, Drawing()).mean[..., 0].tolist() == [[5.0, 1.0, 2.0]]
    with pytest.raises(PoiseError, match="no completion of the prompt 'c'; --baselines needs all"):
        given.read(str(file), ["a", "c"])


def test_heads_are_less_the_mean_of_the_prompts_own_baselines(tmp_path: Path) -> None:
    """In units in which a difference is the log odds of a preference: lengths times 0.5."""
    file = tmp_path / "baselines.jsonl"
    file.write_text('{"prompt": "a", "completion": "22"}\n{"prompt": "b", "completion": "55555"}\n')
    scorer = Lengths(reward_scale=0.5)
    given = Baselines(scorer, 1, 4, 0, tmp_path / "run")
    given.read(str(file), ["a", "b"])
    reward = PolicyReward(scorer, parse_objective("mean"), "contrastive", given)
    heads = reward.heads(Drawing(), ["a", "b"], [["1", ""], ["333", "7777777"]], 0)
    assert heads.mean[:, 0].tolist() == [-0.5, -0.5, -1.0, 1.0]  # no text at all counts as one full stop
    assert heads.mean[:, 1].tolist() == [0.5, 0.5, 1.0, -1.0]
    plain = PolicyReward(scorer, parse_objective("mean"))
    assert plain.heads(Drawing(), ["a"], [["1", "333"]], 0).mean[:, 0].tolist() == [1.0, 3.0]
    assert [(sample.prompt, sample.completion) for sample in scorer.asked[-2:]] == [("a", "1"), ("a", "333")]


def test_texts_that_were_cut_are_counted_with_those_before_a_resume() -> None:
    assert PolicyReward(Lengths(), parse_objective("mean"), truncated_before=4).num_truncated == 7


def test_a_head_that_is_not_finite_is_named_by_its_text() -> None:
    class Broken(Lengths):
        def __call__(self, samples: Sequence[Sample], progress: object = None) -> HeadRewards:
            heads = super().__call__(samples, progress)
            return heads._replace(std=heads.std.clone().index_fill_(0, torch.tensor([1]), math.inf))

    reward = PolicyReward(Broken(), parse_objective("mean"))
    with pytest.raises(PoiseError, match="the reward of 'second' is not finite"):
        reward.heads(Drawing(), ["a"], [["first", "second"]], 0)


def test_rewards_are_on_the_scale_of_the_initial_policy() -> None:
    reward = PolicyReward(Lengths(), parse_objective("mean"), scale=RewardScale((1.0, 1.0), 0.5, 2.0))
    heads = HeadRewards(torch.tensor([[3.0, 5.0]]), torch.zeros(1, 2))
    assert reward.combine(heads).tolist() == [(4.0 - 1.0 - 0.5) / 2.0]


def test_the_regret_bonus_is_paid_prompt_by_prompt() -> None:
    reward = PolicyReward(Lengths(), parse_objective("mean"), regret_bonus=0.5)
    score = torch.tensor([0.0, 1.0, 1.0, 3.0, 3.0, 2.9])
    texts = [["a", "b", "b"], ["c", "c", "d"]]
    # One: 1 - 2/3 * .5 is more than 0 - 1/3 * .5. Two: 3 - 2/3 * .5 is less than 2.9 - 1/3 * .5.
    assert reward.with_bonus(score, ["one", "two"], texts).tolist() == pytest.approx([0.0, 1.5, 1.5, 3.0, 3.0, 3.4])
    assert PolicyReward(Lengths(), parse_objective("mean")).with_bonus(score, ["one", "two"], texts) is score
