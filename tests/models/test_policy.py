"""The policy's short cuts (kept activations, packed rows, merged adapters) change nothing but speed."""

import dataclasses
import itertools
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_model, rest_slow
from forked import in_processes
from poise.errors import PoiseError
from poise.functional import memory
from poise.models import policy as policies
from poise.models import rollout as rollouts
from poise.models.drawing import draw, draw_completions
from poise.models.loading import load_policy
from poise.models.policy import Policy
from poise.models.rereading import check_rereading, has_plain_head
from poise.models.reward_model import load_trunk
from poise.models.rollout import Rollout, packed_attention, uniforms
from poise.runtime import distributed as processes

PROMPTS = ["Review a film.", [{"role": "user", "content": "And now review a phone, please."}]]


def test_a_draw_at_the_ends_of_its_range_takes_a_token_that_can_be() -> None:
    """Zero is no draw of a token without probability, and one, to which a float32 may round, is the last token."""
    logprobs = torch.tensor([[-math.inf, math.log(0.5), math.log(0.5)], [-math.inf, math.log(0.5), math.log(0.5)]])
    assert draw(logprobs, torch.tensor([0.0, 1.0])).tolist() == [[1], [2]]


def make_policy(model: str, adapted_layers: int, **options: Any) -> Policy:
    torch.manual_seed(1)
    policy = Policy(*load_policy(model), adapted_layers=adapted_layers, rank=4, **options)
    for name, parameter in policy.trained_parameters().items():
        if "lora_B" in name:  # zero at first: an untrained adapter would hide every mistake
            torch.nn.init.normal_(parameter, std=0.05)
        elif policy.tune == "full" and parameter.dim() > 1:
            parameter.data += 0.05 * torch.randn_like(parameter)
    torch.nn.init.normal_(policy.value_head.weight)
    return policy


def sample(policy: Policy, max_tokens: int = 12, seed: int = 0) -> Rollout:
    return policy.sample(PROMPTS, uniforms(len(PROMPTS), 3, max_tokens, torch.Generator().manual_seed(seed)))


def naive_logprobs(policy: Policy, rollout: Rollout) -> torch.Tensor:
    """One completion at a time, its prompt before it, no padding, the whole model."""
    model = policy.model
    out = torch.zeros_like(rollout.logprob_PMT)
    for p in range(out.shape[0]):
        prompt = rollout.prompt_ids_PL[p][rollout.prompt_mask_PL[p].bool()]
        for m in range(out.shape[1]):
            length = int(rollout.mask_PMT[p, m].sum())
            completion = rollout.completion_ids_PMT[p, m, :length]
            with torch.no_grad():
                logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
            logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1)
            out[p, m, :length] = logprobs.gather(-1, completion[:, None])[:, 0]
    return out


KINDS = [{}, {"tune": "full"}, {"value_trunk": "own"}, {"tune": "full", "value_trunk": "own"}]


@pytest.mark.parametrize("adapted_layers", rest_slow([1, 0, 2]))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_logprobs_kept_recomputed_and_naive_agree(any_model: str, adapted_layers: int, kind: dict[str, Any]) -> None:
    policy = make_policy(any_model, adapted_layers, **kind)
    rollout = sample(policy)
    naive = naive_logprobs(policy, rollout)
    recomputed, values, entropy = policy.evaluate(rollout)
    assert entropy is None
    torch.testing.assert_close(rollout.logprob_PMT, naive, rtol=0, atol=2e-5)
    torch.testing.assert_close(recomputed * rollout.mask_PMT, naive, rtol=0, atol=2e-5)
    # Values reach 13 here, where 2e-5 is 20 roundings of float32: less than a processor's kernels differ by.
    torch.testing.assert_close(values * rollout.mask_PMT, rollout.value_PMT, rtol=2e-6, atol=2e-5)
    # and the reference is the model as it was loaded
    fresh = Policy(*load_policy(any_model), adapted_layers=adapted_layers, rank=4)
    reference = policy.reference_logprobs(rollout) * rollout.mask_PMT
    torch.testing.assert_close(reference, naive_logprobs(fresh, rollout), rtol=0, atol=2e-5)
    assert (reference - naive).abs().max() > 1e-3


@pytest.mark.parametrize("tokens", [1, 70, 140, 10**6])
@pytest.mark.parametrize("kind", [{}, {"tune": "full", "value_trunk": "own"}], ids=str)
def test_passes_over_a_rollout_change_nothing(
    tiny_model: str, kind: dict[str, Any], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes of one completion, of some of a prompt's, of whole prompts: with and without kept hidden states."""
    policy = make_policy(tiny_model, 1, **kind)
    whole = sample(policy)
    recomputed, values, _ = policy.evaluate(whole)
    reference = policy.reference_logprobs(whole)
    monkeypatch.setattr(rollouts, "TOKENS_PER_PASS", tokens)
    parts = rollouts.passes(whole, packed=True, together=False)
    longest = max(part.prompts.numel() * len(range(3)[part.completions]) for part in parts)
    assert longest == {1: 1, 70: 2, 140: 3, 10**6: 6}[tokens]
    for rollout in (whole, dataclasses.replace(whole, hidden_PLH=None)):
        read = [policy.evaluate(rollout.part(part)) for part in parts]
        for part, (logprob, value, _) in zip(parts, read, strict=True):
            torch.testing.assert_close(logprob, recomputed[part], rtol=0, atol=2e-5)
            torch.testing.assert_close(value, values[part], rtol=2e-6, atol=2e-5)
        torch.testing.assert_close(policy.reference_logprobs(rollout), reference, rtol=0, atol=2e-5)
    again = sample(policy)
    assert torch.equal(again.completion_ids_PMT, whole.completion_ids_PMT)
    torch.testing.assert_close(again.value_PMT, whole.value_PMT, rtol=2e-6, atol=2e-5)


def test_parts_hold_every_completion_once() -> None:
    for prompts, per_prompt, number in itertools.product(range(1, 6), range(1, 6), range(1, 30)):
        seen = torch.zeros(10, per_prompt)
        parts = rollouts.parts_of(torch.arange(prompts) + 3, per_prompt, number)
        for part in parts:
            seen[part] += 1
        assert seen[3 : 3 + prompts].eq(1).all()
        assert seen.sum() == prompts * per_prompt
        assert len(parts) >= min(number, prompts) / 2  # torch's chunks are of equal size


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_trained_and_what_it_moves(tiny_model: str, kind: dict[str, Any]) -> None:
    policy = make_policy(tiny_model, 1, **kind)
    rollout = sample(policy)
    policy.evaluate(rollout).logprob.sum().backward()
    moved = {name for name, p in policy.trained_parameters().items() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved
    assert all(name.startswith("model.") and ".layers.2." in name for name in moved)
    policy.zero_grad()
    policy.evaluate(rollout).value.sum().backward()
    moved = {name for name, p in policy.trained_parameters().items() if p.grad is not None and p.grad.abs().max() > 0}
    own = {name for name in moved if name.startswith("value_model")}
    assert bool(own) == (kind.get("value_trunk") == "own")
    assert moved - own == {"value_head.weight", "value_head.bias"}


def test_a_reference_shares_what_is_frozen(tiny_model: str) -> None:
    policy = make_policy(tiny_model, 1, tune="full")
    mine, kept = (dict(model.named_parameters()) for model in (policy.model, policy._reference[0]))
    shared = {name for name in mine if mine[name] is kept[name]}
    assert {name for name in mine if ".layers.2." in name} == mine.keys() - shared
    assert shared


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_sampling_can_be_that_of_the_reference(tiny_model: str, tune: str) -> None:
    policy = make_policy(tiny_model, 1, tune=tune)
    fresh = Policy(*load_policy(tiny_model), adapted_layers=1, rank=4)
    with policy.as_reference():
        rollout = sample(policy)
    assert torch.equal(rollout.completion_ids_PMT, sample(fresh).completion_ids_PMT)
    assert not torch.equal(rollout.completion_ids_PMT, sample(policy).completion_ids_PMT)


def test_entropy_is_that_of_the_distribution(tiny_model: str) -> None:
    policy = make_policy(tiny_model, 1)
    rollout = sample(policy, max_tokens=1)
    entropy = policy.evaluate(rollout, entropy=True).entropy
    assert entropy is not None
    ids = rollout.prompt_ids_PL[1][rollout.prompt_mask_PL[1].bool()]
    probability = policy.model(input_ids=ids[None]).logits[0, -1].softmax(-1)
    assert entropy[1, 0, 0].item() == pytest.approx(-(probability * probability.log()).sum().item(), abs=1e-4)


def test_a_head_with_a_bias_is_no_plain_one(tiny_model: str) -> None:
    model, _ = load_policy(tiny_model)
    assert has_plain_head(model)
    model.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    assert not has_plain_head(model)


def test_capped_logits_are_seen(tmp_path: Path, tiny_model: str) -> None:
    capped = make_policy(make_model(tmp_path, "gemma2"), 0)
    rollout = sample(capped)
    assert (capped._plain_head, make_policy(tiny_model, 0)._plain_head) == (False, True)
    naive = naive_logprobs(capped, rollout)
    torch.testing.assert_close(rollout.logprob_PMT, naive, rtol=0, atol=2e-5)
    torch.testing.assert_close(capped.evaluate(rollout).logprob * rollout.mask_PMT, naive, rtol=0, atol=2e-5)


def test_one_pass_or_the_whole_table(any_model: str) -> None:
    """The table is made where entropies are asked for: the same log-probabilities, the same gradient."""
    policy = make_policy(any_model, 0)
    rollout = sample(policy)
    gradients = []
    for entropy in (False, True):
        policy.zero_grad()
        logprob = policy.evaluate(rollout, entropy=entropy).logprob * rollout.mask_PMT
        logprob.sum().backward()
        gradients.append([p.grad.clone() for p in policy.trained_parameters().values() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)
    assert policy._plain_head


def test_a_completion_does_not_depend_on_what_is_sampled_beside_it(tiny_model: str) -> None:
    policy = make_policy(tiny_model, 1)
    numbers = uniforms(2, 3, 12, torch.Generator().manual_seed(0))
    together = policy.sample(PROMPTS, numbers)
    alone = policy.sample(PROMPTS[1:], numbers[1:])
    assert torch.equal(together.completion_ids_PMT[1:], alone.completion_ids_PMT)
    torch.testing.assert_close(together.logprob_PMT[1:], alone.logprob_PMT, rtol=0, atol=2e-5)


def test_tokens_are_drawn_where_the_probabilities_pass_the_number() -> None:
    logprobs = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(5, -1)
    numbers = torch.tensor([0.0, 0.4999, 0.5001, 0.7501, 0.9999], dtype=torch.float64)
    assert draw(logprobs, numbers)[:, 0].tolist() == [0, 0, 2, 3, 3]  # never token 1, which is impossible


def test_lower_layers_are_kept_where_they_can_be(any_model: str) -> None:
    rollout = sample(make_policy(any_model, 1))
    assert (rollout.hidden_PLH is None) == ("gpt2" in any_model)


def test_gradients_of_packed_rows_equal_those_of_single_ones(tiny_model: str) -> None:
    policy = make_policy(tiny_model, 1)
    rollout = sample(policy)
    weight = torch.randn(rollout.mask_PMT.shape, generator=torch.Generator().manual_seed(0)) * rollout.mask_PMT
    logprob = policy.evaluate(rollout).logprob
    (logprob * weight).sum().backward()
    packed = {n: p.grad.clone() for n, p in policy.trained_parameters().items() if p.grad is not None}
    policy.zero_grad()
    for p in range(2):
        prompt = rollout.prompt_ids_PL[p][rollout.prompt_mask_PL[p].bool()]
        for m in range(3):
            length = int(rollout.mask_PMT[p, m].sum())
            ids = torch.cat([prompt, rollout.completion_ids_PMT[p, m, :length]])
            logprobs = policy.model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            (logprobs.gather(-1, ids[len(prompt) :, None])[:, 0] * weight[p, m, :length]).sum().backward()
    for name, gradient in packed.items():
        single = dict(policy.named_parameters())[name].grad
        if single is not None:
            torch.testing.assert_close(gradient, single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("kind", [{}, {"tune": "full", "value_trunk": "own"}], ids=str)
def test_completions_do_not_depend_on_the_turns_in_which_they_are_sampled(
    rows: int, kind: dict[str, Any], tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns of one completion, of some of a prompt's three, of whole prompts: each has its own random numbers."""
    policy = make_policy(tiny_model, 2, **kind)
    policy.end_ids = list(range(2, 259, 9))
    whole = sample(policy)
    turns: list[tuple[int, ...]] = []

    def told(base: Any, *given: Any, **more: Any) -> Rollout:
        turns.append(tuple(given[2].shape[:2]))
        return draw_completions(base, *given, **more)

    monkeypatch.setattr(policies, "draw_completions", told)
    row = (whole.prompt_ids_PL.shape[1] + 12) * 2 * 3 * 2 * 8 * 4  # keys and values: 3 layers, 2 heads of 8, float32
    monkeypatch.setattr(memory, "SAMPLED_AT_ONCE", rows * row)
    found = sample(policy)
    expected = {1: 6 * [(1, 1)], 2: 2 * [(1, 2), (1, 1)], 3: 2 * [(1, 3)], 5: 2 * [(1, 3)], 6: [(2, 3)]}
    assert turns == expected[rows]
    assert torch.equal(found.completion_ids_PMT, whole.completion_ids_PMT)
    assert torch.equal(found.mask_PMT, whole.mask_PMT)
    assert len(whole.mask_PMT.sum(-1).unique()) > 1  # completions of several lengths
    for one, other in ((found.logprob_PMT, whole.logprob_PMT), (found.value_PMT, whole.value_PMT)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    assert (found.hidden_PLH is None) == (whole.hidden_PLH is None)
    if whole.hidden_PLH is not None:
        torch.testing.assert_close(found.hidden_PLH, whole.hidden_PLH, rtol=0, atol=1e-4)


def test_sampling_leaves_the_weights_bitwise_alone(tiny_model: str) -> None:
    policy = make_policy(tiny_model, 2)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    sample(policy)
    after = policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_sampling_repeats_with_its_generator(tiny_model: str) -> None:
    policy = make_policy(tiny_model, 1)
    one, two, other = sample(policy), sample(policy), sample(policy, seed=1)
    assert torch.equal(one.completion_ids_PMT, two.completion_ids_PMT)
    assert not torch.equal(one.completion_ids_PMT, other.completion_ids_PMT)


def test_sampled_frequencies_are_the_models_own(tiny_model: str) -> None:
    policy = make_policy(tiny_model, 1)
    rollout = policy.sample(["Review a film."], uniforms(1, 4000, 1, torch.Generator().manual_seed(0)))
    ids = rollout.completion_ids_PMT.flatten()
    counts = torch.bincount(ids, minlength=policy.model.config.vocab_size) / len(ids)
    expected = torch.zeros_like(counts)
    expected[ids] = rollout.logprob_PMT.flatten().exp()
    assert 0.5 * (counts - expected).abs().sum() < 0.1


def test_nothing_follows_the_end_of_turn(tiny_model: str) -> None:
    policy = make_policy(tiny_model, 1)
    rollout = policy.sample(PROMPTS, uniforms(2, 64, 24, torch.Generator().manual_seed(0)))
    ids, mask = rollout.completion_ids_PMT.flatten(0, 1), rollout.mask_PMT.flatten(0, 1)
    ended = (ids == policy.tokenizer.eos_token_id).any(-1)
    assert ended.any()
    for row in ended.nonzero()[:, 0]:
        end = (ids[row] == policy.tokenizer.eos_token_id).nonzero()[0, 0]
        assert mask[row].sum() == end + 1
        assert (ids[row, end + 1 :] == policy.tokenizer.pad_token_id).all()


def test_packed_attention_equals_values_worked_out_by_hand() -> None:
    rollout = Rollout(
        torch.tensor([[0, 5]]), torch.tensor([[0, 1]]), torch.tensor([[[6, 7], [8, 0]]]),
        torch.tensor([[[1.0, 1.0], [1.0, 0.0]]]), torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), None,
    )  # fmt: skip
    sees, positions = packed_attention(rollout)
    # columns: pad, prompt, a1, a2, b1, padding of b
    expected = [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 1],  # padding sees padding: nothing reads it, and no softmax is over nothing
    ]
    assert sees[0].int().tolist() == expected
    assert positions[0].tolist() == [0, 0, 1, 2, 1, 2]


def test_value_head_does_not_move_the_policy(tiny_model: str) -> None:
    policy = make_policy(tiny_model, 1)
    policy.evaluate(sample(policy)).value.sum().backward()
    for name, parameter in policy.trained_parameters().items():
        assert (parameter.grad is not None) == name.startswith("value_head"), name


def test_prompt_beyond_the_context_is_said_in_one_line(tiny_model: str) -> None:
    policy = make_policy(tiny_model, 1)
    with pytest.raises(PoiseError, match=r"context of 256.*--max-tokens"):
        policy.sample(["x" * 400], uniforms(1, 1, 8, torch.Generator()))


def test_pickled_weights_are_refused(tiny_model: str, tmp_path: Path) -> None:
    """A folder with pytorch_model.bin alone: unpickling could run anything."""
    folder = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file(f"{tiny_model}/model.safetensors"), folder / "pytorch_model.bin")
    for load in (load_policy, lambda path: load_trunk(path, 0)):
        with pytest.raises(PoiseError, match=r"cannot load .*safetensors"):
            load(str(folder))


def test_a_rollout_beyond_a_sliding_window_is_read_again_as_it_was_sampled(tmp_path: Path) -> None:
    model, tokenizer = load_policy(make_model(tmp_path, "gemma2"))
    model.config.sliding_window = 16
    policy = Policy(model, tokenizer, adapted_layers=2, rank=4)
    rollout = sample(policy)
    assert rollout.hidden_PLH is not None  # layers of two kinds no longer stand in the way of kept hidden states
    naive = naive_logprobs(policy, rollout)
    torch.testing.assert_close(rollout.logprob_PMT, naive, rtol=0, atol=2e-5)
    torch.testing.assert_close(policy.evaluate(rollout).logprob * rollout.mask_PMT, naive, rtol=0, atol=2e-5)


# ---- bfloat16 ----


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen weights in bfloat16, as on a GPU."""
    monkeypatch.setattr("poise.models.loading.frozen_dtype", lambda: torch.bfloat16)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("kind", rest_slow(KINDS), ids=str)
def test_in_bfloat16_a_fresh_rollout_is_that_of_reading_it_again(any_model: str, kind: dict[str, Any]) -> None:
    """To the bit, for a policy that has moved; and one that has not is its reference, to the bit."""
    policy = make_policy(any_model, 1, **kind)
    rollout = sample(policy)
    assert rollout.sampled_PMT is not None
    with torch.no_grad():
        again = policy.evaluate(rollout)
    assert torch.equal(again.logprob * rollout.mask_PMT, rollout.logprob_PMT)
    assert torch.equal(again.value * rollout.mask_PMT, rollout.value_PMT)
    policy.check_rereading(rollout)
    assert (policy.reference_logprobs(rollout) * rollout.mask_PMT - rollout.logprob_PMT).abs().max() > 1e-2
    fresh = Policy(*load_policy(any_model), adapted_layers=1, rank=4, **kind)
    rollout = sample(fresh)
    assert torch.equal(fresh.reference_logprobs(rollout) * rollout.mask_PMT, rollout.logprob_PMT)


@pytest.mark.usefixtures("bfloat16")
def test_in_bfloat16_small_adapters_count_when_sampling(tiny_model: str) -> None:
    """Less than half of the last bit of every weight, so that a sum in bfloat16 would leave the weights as they are."""
    policy = make_policy(tiny_model, 0)
    for layer in (module for module in policy.model.modules() if hasattr(module, "get_delta_weight")):
        for name, size in (("lora_A", 1.0), ("lora_B", 2.0**-15)):
            getattr(layer, name)["default"].weight.data.sign_().mul_(size)
        weight = layer.get_base_layer().weight
        weight.data = 0.25 * torch.where(weight < 0, -torch.ones_like(weight), torch.ones_like(weight))
        assert torch.equal(weight + layer.get_delta_weight("default").to(weight.dtype), weight)
    with policy.as_reference():
        reference = sample(policy)
    assert reference.sampled_PMT is not None
    assert not torch.equal(sample(policy).sampled_PMT, reference.sampled_PMT)


def read_with_errors(sampling: float, reading: float) -> None:
    """The check of a rollout of 2 x 50 tokens whose readings differ from sampling by these rms, in nats."""
    config = SimpleNamespace(num_hidden_layers=30, model_type="llama")
    config.get_text_config = lambda: config
    model = SimpleNamespace(config=config, dtype=torch.bfloat16)  # as much of a model as the check asks for
    generator = torch.Generator().manual_seed(0)
    ids = torch.ones(1, 2, 50, dtype=torch.long)
    logprob = -torch.rand(1, 2, 50, generator=generator)
    rollout = Rollout(ids[0, :1], ids[0, :1], ids, torch.ones(1, 2, 50), logprob, logprob, None)
    errors = torch.randn(2, 1, 2, 50, generator=generator)
    check_rereading(rollout, logprob + reading * errors[0], model, logprob + sampling * errors[1])


def test_in_bfloat16_the_rounding_that_is_allowed_is_measured() -> None:
    read_with_errors(0.046, 0.046)
    read_with_errors(0.0, 0.005)  # one eps
    read_with_errors(0.2, 0.24)
    for sampling, reading in ((0.046, 0.2), (0.0, 0.02), (1.0, 0.4), (0.046, math.nan)):
        with pytest.raises(PoiseError, match=r"differ by .* nats"):
            read_with_errors(sampling, reading)


@pytest.mark.parametrize("kind", rest_slow([{"tune": "full", "value_trunk": "own"}, {}]), ids=str)
def test_a_policy_spread_over_two_processes_says_what_a_whole_one_says(
    tiny_model: str, kind: dict[str, Any], tmp_path: Path
) -> None:
    def facts(policy: Policy) -> dict[str, Any]:
        rollout = sample(policy)
        with torch.no_grad():
            read = policy.evaluate(rollout)
        return {
            "ids": rollout.completion_ids_PMT, "logprob": rollout.logprob_PMT, "value": rollout.value_PMT,
            "read": read.logprob * rollout.mask_PMT, "reference": policy.reference_logprobs(rollout),
        }  # fmt: skip

    def work(_rank: int) -> dict[str, Any]:
        policy = make_policy(tiny_model, 1, **kind)
        before = policy.is_spread
        policy.spread()
        layers = [p for p in policy.model.parameters() if hasattr(p, "to_local")]
        share = sum(p.to_local().numel() for p in layers) / sum(p.numel() for p in layers)
        spread = policy.is_spread
        found = facts(policy)
        with policy.whole():
            assert not policy.is_spread
            for _ in range(1 + _rank):  # each may compute for itself
                alone = sample(policy).completion_ids_PMT
        names = set(policy.trained_parameters())
        return found | {"spread": (before, spread, policy.is_spread), "share": share, "alone": alone, "names": names}

    whole = make_policy(tiny_model, 1, **kind)
    whole.spread()  # of one process nothing is spread
    expected = facts(whole)
    for found in in_processes(2, work, tmp_path):
        assert found["spread"] == (False, True, True)
        assert found["share"] == pytest.approx(0.5, abs=0.01)
        assert found["names"] == set(whole.trained_parameters())
        assert torch.equal(found["ids"], expected["ids"])
        assert torch.equal(found["alone"], expected["ids"])
        for name in ("logprob", "value", "read", "reference"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=2e-5)


def test_copies_that_cannot_enter_a_layer_are_not_spread(tmp_path: Path) -> None:
    model = make_model(tmp_path / "gpt2", "gpt2")

    def work(_rank: int) -> str:
        with pytest.raises(PoiseError) as caught:
            make_policy(model, 1, value_trunk="own").spread()
        return str(caught.value)

    said = "--shard: this model's own values and its reference need --adapted-layers 0"
    assert in_processes(2, work, tmp_path) == [said] * 2


@pytest.mark.parametrize("low", [False, True])
def test_a_misreading_of_one_process_stops_all(tiny_model: str, tmp_path: Path, low: bool) -> None:
    """Else the others would wait for it, at the next sum over processes, for ever."""

    def work(rank: int) -> tuple[int, str]:
        policy = make_policy(tiny_model, 1)
        rollout = sample(policy)
        again = rollout.logprob_PMT + 0.1 * rank
        try:
            check_rereading(rollout, again, policy._base, rollout.logprob_PMT if low else None)
        except PoiseError as error:
            return processes.num_processes(), str(error)
        return processes.num_processes(), ""

    found = in_processes(2, work, tmp_path)
    assert [number for number, _ in found] == [2, 2]
    assert found[0][1] == found[1][1]
    assert "differ by 0.1 nats" in found[0][1]
