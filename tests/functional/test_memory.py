"""Memory of a training against sums worked out by hand."""

import dataclasses
import itertools

import pytest

from poise.functional import memory as memories
from poise.functional.memory import (
    Measured,
    Memory,
    ModelShape,
    PolicyRun,
    RewardRun,
    TrlRun,
    adapters,
    policy_memory,
    reward_memory,
    sampled_at_once,
    trl_memory,
)

# 4 layers of 100 weights, 40 outside; maps of 2 x 3 and 3 x 4; 5 hidden, 7 tokens known, 16 numbers cached of each.
SHAPE = ModelShape(num_layers=4, layer=100, outside=40, linear_sizes=12, linear=18, hidden=5, vocabulary=7, cached=16)
REWARD = dataclasses.replace(SHAPE, outside=20)
RUN = PolicyRun(
    SHAPE, REWARD, "lora", own_values=False, adapted_layers=3, lora_rank=2, prompts=2, completions=3, prompt_tokens=10,
    max_tokens=6,
)  # fmt: skip
MEASURED = Measured(update=1000, update_logits=200, reading=300, prefill=400)


def test_weights_and_adapters() -> None:
    assert (SHAPE.weights, SHAPE.upper(3), SHAPE.upper(0), SHAPE.upper(9)) == (440, 3, 4, 4)
    assert adapters(SHAPE, 3, 2) == 3 * 2 * (2 + 3 + 3 + 4)


def test_lora_on_one_gpu() -> None:
    memory = policy_memory(RUN, MEASURED)
    assert memory.held == {
        "weights": 440 * 2 + 72 * 4, "gradients": 72 * 4, "optimizer": 72 * 8, "reference": 0, "values": 16 * 6,
        "reward model": 420 * 2,
    }  # fmt: skip
    tokens = 2 * 10 + 6 * 6
    cache = 6 * 16 * 16 * 2
    assert memory.phases["sampling"] == {
        "rollout cache": cache + cache // 8, "logits": 6 * 7 * 22, "rollout": 2 * tokens * 5 * 2, "activations": 400,
        "folded weights": 0, "whole layers": 0,
    }  # fmt: skip
    assert memory.phases["update"] == {
        "rollout": tokens * 5 * 2, "activations": 1000, "logits": 200, "messages": 0, "whole layers": 0,
    }  # fmt: skip
    assert memory.phases["scoring"]["reward cache"] == (2 * 10 + 6 * 16) * 16 * 2
    assert memory.total == sum(memory.held.values()) + max(sum(part.values()) for part in memory.phases.values())
    assert memory.bottleneck == max(memory.peak, key=lambda name: memory.peak[name])


@pytest.mark.parametrize("kind", ["ppo", "trl"])
def test_a_validator_is_held_beside_the_reward_model_and_scores_after_it(kind: str) -> None:
    """The larger of the two caches counts, not their sum."""

    def planned(validator: ModelShape | None) -> Memory:
        if kind == "ppo":
            return policy_memory(dataclasses.replace(RUN, validator=validator), MEASURED)
        return trl_memory(dataclasses.replace(TRL, validator=validator), MEASURED)

    alone = planned(None)
    for cached, factor in ((8, 1), (16, 1), (48, 3)):
        watched = planned(dataclasses.replace(SHAPE, outside=30, cached=cached))
        assert watched.held == alone.held | {"validator": 430 * 2}
        cache = watched.phases["scoring"]["reward cache"]
        assert cache == factor * alone.phases["scoring"]["reward cache"] == factor * (2 * 10 + 6 * 16) * 16 * 2
        assert {**watched.phases, "scoring": {}} == {**alone.phases, "scoring": {}}


def test_completions_are_sampled_in_turns_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    row = 16 * 16 * 2
    monkeypatch.setattr(memories, "SAMPLED_AT_ONCE", 2 * row)
    sampling = policy_memory(RUN, MEASURED).phases["sampling"]
    assert RUN.turn == (1, 2)
    assert sampling["rollout cache"] == 2 * row + 2 * row // 8
    assert sampling["logits"] == 2 * 7 * 22
    for prompts, completions, fit in itertools.product(range(1, 9), range(1, 9), range(12)):
        monkeypatch.setattr(memories, "SAMPLED_AT_ONCE", fit * 7)
        some, each = sampled_at_once(prompts, completions, 7)
        assert 1 <= some * each <= max(fit, 1)
        turns = -(-prompts // some) * -(-completions // each)
        assert turns <= (
            prompts * -(-completions // max(fit, 1)) if fit < completions else -(-prompts // (fit // completions))
        )


def test_float32_folds_adapters_while_it_samples() -> None:
    memory = policy_memory(dataclasses.replace(RUN, frozen_bytes=4), MEASURED)
    assert memory.held["weights"] == 440 * 4 + 72 * 4
    assert memory.phases["sampling"]["folded weights"] == 3 * 18 * 4
    assert memory.phases["sampling"]["logits"] == 6 * 7 * 24


def test_all_weights_keep_a_reference_and_double_the_digits_of_what_is_trained() -> None:
    memory = policy_memory(dataclasses.replace(RUN, tune="full"), MEASURED)
    assert memory.held["weights"] == 100 * 2 + 300 * 4 + 40 * 2
    assert memory.held["reference"] == memory.held["gradients"] == 300 * 4
    assert memory.held["optimizer"] == 300 * 8
    whole = policy_memory(dataclasses.replace(RUN, tune="full", adapted_layers=0), MEASURED)
    assert whole.held["weights"] == whole.held["gradients"] == 440 * 4
    assert whole.phases["update"]["rollout"] == 0  # nothing below the trained layers


def test_values_of_their_own_have_layers_gradients_and_states() -> None:
    lora, full = (
        policy_memory(dataclasses.replace(RUN, tune=tune, own_values=True), MEASURED)  # type: ignore[arg-type]
        for tune in ("lora", "full")
    )
    assert lora.held["values"] == 300 * 2 + 72 * 16 + 96
    assert full.held["values"] == 300 * 16 + 96
    assert lora.phases["update"]["activations"] == 2000


def test_several_gpus_send_what_was_trained_and_shards_divide_the_layers() -> None:
    plain = policy_memory(dataclasses.replace(RUN, gpus=2), MEASURED)
    assert plain.phases["update"]["messages"] == 2 * 72 * 4
    sharded = policy_memory(dataclasses.replace(RUN, gpus=2, shard=True), MEASURED)
    layers = 400 * 2 + 72 * 4
    assert sharded.held["weights"] == layers // 2 + 40 * 2
    assert sharded.held["gradients"] == 72 * 2
    assert sharded.held["reward model"] == plain.held["reward model"]
    assert sharded.phases["sampling"]["whole layers"] == layers // 2
    assert sharded.phases["update"] | {"whole layers": 0} == plain.phases["update"] | {"messages": 0}
    assert sharded.phases["update"]["whole layers"] == 2 * layers // 4


@pytest.mark.parametrize(("shard", "over"), [(False, 1), (True, 2)])
def test_a_reward_model(shard: bool, over: int) -> None:
    memory = reward_memory(RewardRun(SHAPE, "full", 2, gpus=2, shard=shard), MEASURED)
    assert memory.held == {"weights": 1760 // over, "gradients": 1760 // over, "optimizer": 3520 // over}
    update = memory.phases["update"]
    assert update["messages"] == (0 if shard else 1760)
    assert update["rounded weights"] == (880 // 4 if shard else 880)
    assert update["whole layers"] == (240 * 4 if shard else 0)
    lora = reward_memory(RewardRun(SHAPE, "lora", 2, autocast=False), MEASURED)
    assert lora.held == {"weights": (440 + 96) * 4, "gradients": 96 * 4, "optimizer": 96 * 8}
    assert sum(lora.phases["update"].values()) == 1000
    heads = reward_memory(RewardRun(SHAPE, "full", 2, autocast=False, adapter_heads=3, head_layers=1), MEASURED)
    assert heads.held == {"weights": (440 + 3 * 24) * 4, "gradients": 3 * 24 * 4, "optimizer": 3 * 24 * 8}


TRL = TrlRun(
    SHAPE, REWARD, adapted_layers=3, lora_rank=2, prompts=2, completions=3, minibatches=2, prompt_tokens=10,
    max_tokens=6,
)  # fmt: skip


def test_rloo_and_grpo_on_one_gpu() -> None:
    memory = trl_memory(TRL, MEASURED)
    assert (TRL.rows, TRL.part, TRL.turn) == (6, 3, 6)
    assert memory.held == {"weights": 440 * 2 + 72 * 4, "optimizer": 72 * 8, "reward model": 420 * 2}
    cache = 6 * 16 * 16 * 2
    assert memory.phases["sampling"] == {
        "rollout cache": cache + cache // 8, "logits": 6 * 7 * 10, "whole layers": 0,
    }  # fmt: skip
    assert memory.phases["prompts"] == {
        "rollout cache": 6 * 10 * 16 * 2, "activations": 400, "whole layers": 0,
    }  # fmt: skip
    scored = 3 * 6  # tokens of completions
    assert memory.phases["reading"] == {"activations": 300, "logits": scored * 32768 * 2, "whole layers": 0}
    assert memory.phases["scoring"] == {"reward cache": (2 * 10 + 6 * 16) * 16 * 2}
    assert memory.phases["update"] == {
        "gradients": 72 * 4, "activations": 1000, "logits": scored * (32768 * 2 + 5 * 4), "messages": 0,
        "whole layers": 0,
    }  # fmt: skip


def test_rloo_and_grpo_on_a_cpu_keep_tables_of_the_vocabulary() -> None:
    """Of all tokens, prompts too; a tile has at most 4,096 tokens and 32,768 words."""
    update = trl_memory(dataclasses.replace(TRL, frozen_bytes=4), MEASURED).phases["update"]
    assert update["logits"] == 3 * 16 * (32768 * 4 + 7 * 29 + 5 * 4)
    wide = dataclasses.replace(SHAPE, vocabulary=50_000)
    long = trl_memory(dataclasses.replace(TRL, shape=wide, prompt_tokens=2042, frozen_bytes=4), MEASURED)
    assert long.phases["update"]["logits"] == 4096 * 32768 * (4 + 29) + 3 * 2048 * 5 * 4


def test_rloo_and_grpo_over_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trl_memory(dataclasses.replace(TRL, gpus=2), MEASURED)
    assert plain.phases["update"]["messages"] == 72 * 4
    sharded = trl_memory(dataclasses.replace(TRL, gpus=2, shard=True), MEASURED)
    whole = 440 * 2 + 72 * 4
    assert sharded.held == {"weights": whole // 2, "optimizer": 72 * 4, "reward model": 420 * 2}
    for phase in ("prompts", "sampling"):
        assert sharded.phases[phase]["whole layers"] == whole // 2
    assert sharded.phases["update"]["whole layers"] == sharded.phases["reading"]["whole layers"] == 240 * 2
    assert (sharded.phases["update"]["gradients"], sharded.phases["update"]["messages"]) == (72 * 2, 0)
    monkeypatch.setattr(memories, "SAMPLED_AT_ONCE", 4 * 16 * 16 * 2)
    assert TRL.turn == 3  # two turns, equally large
    assert trl_memory(TRL, MEASURED).phases["sampling"]["logits"] == 3 * 7 * 10
