"""Reward models: the checkpoint is a stock classifier, and a score does not depend on company or padding."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from forked import started
from poise.data.types import Sample
from poise.errors import PoiseError
from poise.functional.objectives import HeadRewards
from poise.models.chat_format import completion_text, prompt_text
from poise.models.reward_model import HeadLayout
from poise.models.scorer import Ensemble, FeatureExtractor, Scorer, _batches, generated
from poise.models.shared_prompt import PADDING, Family, PackedRows, separate_hidden

SAMPLES = [
    Sample("Review a film.", "A fine film."),
    Sample("Review.", "bad"),
    Sample([{"role": "user", "content": "Review a phone that is really great."}], "not really great, not really awful"),
    Sample("Review a kettle.", "It was the poor kettle of a poor kettle maker, and I love it."),
]


@pytest.fixture(scope="module")
def reward_run(any_model: str, train_tiny_reward: Callable[[str], Path]) -> Path:
    return train_tiny_reward(any_model)


@pytest.mark.parametrize("name", ["single", "brme", "posterior"])
def test_score_is_the_same_alone_and_in_any_batch(reward_run: Path, name: str) -> None:
    scorer = Scorer.load(str(reward_run / name))
    together = scorer(SAMPLES)
    for i, sample in enumerate(SAMPLES):
        for heads in (scorer([sample]), scorer([sample, *SAMPLES[::-1]])):
            torch.testing.assert_close(heads.mean[0], together.mean[i], rtol=0, atol=1e-5)
            torch.testing.assert_close(heads.std[0], together.std[i], rtol=0, atol=1e-5)


def test_a_fork_of_a_process_that_has_read_reads(reward_run: Path) -> None:
    """`datasets.map(num_proc=…)` forks. OpenMP's threads do not come along, and whoever counts on them waits."""
    scorer = Scorer.load(str(reward_run / "brme"))
    expected = scorer(SAMPLES).mean

    def reads() -> int:
        return int(not torch.allclose(scorer(SAMPLES).mean, expected, atol=1e-5))

    def parent() -> int:
        torch.set_num_threads(2)  # this process may have one
        if reads():
            return 1
        child = started(reads)
        try:
            return child.ended(timeout=30)
        finally:
            child.killed()

    assert started(parent).ended(timeout=60) == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_score_is_the_same_with_padding_on_either_side(reward_run: Path, side: str) -> None:
    scorer = Scorer.load(str(reward_run / "brme"))
    texts = [[*tokens.prompt, *tokens.completion] for tokens in map(scorer.extract.encode, SAMPLES)]
    longest = max(map(len, texts)) + 5
    pad = [longest - len(text) if side == "left" else 0 for text in texts]
    ids = torch.full((len(texts), longest), scorer.extract.tokenizer.pad_token_id)
    group, position, last = torch.full_like(ids, PADDING), torch.zeros_like(ids), []
    for i, text in enumerate(texts):
        span = slice(pad[i], pad[i] + len(text))
        ids[i, span], group[i, span], position[i, span] = torch.tensor(text), i, torch.arange(len(text))
        last.append([i, span.stop - 1])
    rows = PackedRows(ids, position, group, torch.zeros_like(ids), torch.tensor(last))
    with torch.no_grad():
        padded = scorer.decode(separate_hidden(scorer.extract.classifier, rows))
    torch.testing.assert_close(padded.mean, scorer(SAMPLES).mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded.std, scorer(SAMPLES).std, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rtol"), [("single", 0.0), ("brme", 0.0), ("posterior", 1e-5)])
def test_score_is_the_same_whether_or_not_the_prompt_is_shared(
    reward_run: Path, name: str, rtol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty completions of two prompts, some twice; both prompts in one batch, completions in several.

    rtol: single posterior draws have large weights, and rewards of 5 to 10 in which 1e-5 is the last float32 digits.
    """
    monkeypatch.setattr("poise.models.scorer.TOKENS_PER_BATCH", 400)
    prompts = ["Review a film. " * 3, "Review a phone."]
    samples = [Sample(prompts[i % 2], f"it is {'very ' * (i % 7)}good {i % 50}") for i in range(60)]
    scorer = Scorer.load(str(reward_run / name))
    told: list[int] = []
    together = scorer(samples, told.append)
    assert sum(told) == 60
    for i, sample in enumerate(samples):
        torch.testing.assert_close(scorer([sample]).mean[0], together.mean[i], rtol=rtol, atol=1e-5)
        torch.testing.assert_close(scorer([sample]).std[0], together.std[i], rtol=rtol, atol=1e-5)


def test_a_shared_prompt_is_read_once(reward_run: Path) -> None:
    scorer = Scorer.load(str(reward_run / "brme"))
    samples = [Sample("Review a film. " * 5, f"good {i}") for i in range(8)]
    lengths = [len(scorer.extract.encode(sample)) for sample in samples]
    seen: list[int] = []
    base = scorer.extract.classifier.base_model
    hook = base.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    assert scorer.extract._shares_prompts
    seen.clear()
    scorer(samples)
    hook.remove()
    assert sum(seen) < sum(lengths) / 3


@pytest.mark.parametrize("name", ["single", "brme", "posterior"])
def test_checkpoint_is_a_stock_classifier(reward_run: Path, name: str) -> None:
    """Opened without a line of Poise, its logits decode to the scorer's rewards."""
    folder = reward_run / name
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert stock.config.problem_type == "regression"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert stock.config.pad_token_id == tokenizer.pad_token_id
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".jinja", ".txt"}
    texts = [prompt_text(tokenizer, s.prompt) + completion_text(tokenizer, s.prompt, s.completion) for s in SAMPLES]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.no_grad():
        logits = stock(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    block = stock.config.poise
    heads = HeadLayout(block["num_heads"], block["kind"], tuple(block["offset"]), block["floor"]).decode(logits)
    scorer = Scorer.load(str(folder))
    torch.testing.assert_close(heads.mean, scorer(SAMPLES).mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(heads.std, scorer(SAMPLES).std, rtol=0, atol=1e-4)


def test_the_layout_equals_one_worked_out_by_hand() -> None:
    layout = HeadLayout(2, "gaussian", (1.0, 0.0, 0.5, 0.0), floor=0.1)
    heads = layout.decode(torch.tensor([3.0, 4.0, 0.5, -50.0]))
    assert heads.mean.tolist() == [2.0, 4.0]
    assert heads.std.tolist() == pytest.approx([0.1 + 0.693147, 0.1])
    with pytest.raises(PoiseError, match="has 2 labels but its poise block says 2 gaussian heads, which need 4"):
        layout.decode(torch.zeros(3, 2))


@pytest.mark.parametrize("objective", ["nominal", "tradeoff(0.4)", "tradeoff", "expected_tradeoff(0.4)"])
def test_the_nominal_of_several_point_heads_is_refused(reward_run: Path, tmp_path: Path, objective: str) -> None:
    """By every command that binds an objective to a reward model; of one head it is that head."""
    from poise.integrations.trl_reward import RobustReward
    from poise.policy import train as train_policy
    from poise.policy.loop import Training
    from poise.reward import score
    from poise.runtime.run_folder import Run

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Review a film.", "completion": "good"}\n')
    posterior = str(reward_run / "posterior")
    with pytest.raises(PoiseError, match="point heads of std 0"):
        score.run(score.Config(posterior, str(rows), objective))
    with pytest.raises(PoiseError, match="point heads of std 0"):
        RobustReward.load(posterior, objective)
    config = train_policy.Config(prompts="", reward=posterior, objective=objective)
    with pytest.raises(PoiseError, match="point heads of std 0"):
        Training(config, Run(tmp_path), [])
    HeadLayout(1, "point", (0.0,)).check_objective(objective)
    HeadLayout(2, "gaussian", (0.0,) * 4).check_objective(objective)
    HeadLayout(2, "point", (0.0,) * 2).check_objective("worst_case")


def test_any_scalar_classifier_is_a_conventional_reward_model(tiny_model: str, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model.save_pretrained(tmp_path / "scalar")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "scalar")
    heads = Scorer.load(str(tmp_path / "scalar"))(SAMPLES)
    assert heads.mean.shape == (4, 1)
    assert (heads.std == 0).all()


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"])
@pytest.mark.parametrize("template", ["llama3", "qwen3", "qwen3_5_think", "gemma3", "deepseek_r1_distill"])
def test_a_public_classifier_gets_the_scores_of_its_own_card(
    any_model: str, tmp_path: Path, template: str, pad: str
) -> None:
    """As cards compute them: apply_chat_template of the whole conversation, then the stock classifier.

    Exact where the template ends at the end of turn; the white space after it is not read. Where that end is the
    padding, too, the stock classifier reads its score one token before, and was trained so.
    """
    import trl

    folder = tmp_path / "public"
    tokenizer = transformers.AutoTokenizer.from_pretrained(any_model)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    if template in ("llama3", "gemma3"):  # as with their own tokenizers, the end of turn is one token
        end = {"llama3": "<|eot_id|>", "gemma3": "<end_of_turn>"}[template]
        tokenizer.chat_template = tokenizer.chat_template.replace(end, "<|im_end|>")
    tokenizer.pad_token = pad
    model = transformers.AutoModelForSequenceClassification.from_pretrained(any_model, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    samples = [*SAMPLES, Sample("Which letter?", "d"), Sample("Why?", "<think>\nHm.\n</think>\n\nIt is b.")]
    expected = []
    for sample in samples:
        turns = [{"role": "user", "content": sample.prompt}] if isinstance(sample.prompt, str) else sample.prompt
        conversation = [*turns, {"role": "assistant", "content": sample.completion}]
        text = tokenizer.apply_chat_template(conversation, tokenize=False).rstrip()
        with torch.no_grad():
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            expected.append(stock(ids).logits[0])
    torch.testing.assert_close(Scorer.load(str(folder))(samples).mean, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_long_samples_lose_their_oldest_tokens_and_are_counted(reward_run: Path) -> None:
    scorer = Scorer.load(str(reward_run / "brme"), max_length=60)
    long = [Sample("x" * 300 + tail, "good") for tail in ("A", "B")]
    heads = scorer(long)
    assert scorer.extract.num_truncated == 2
    assert not torch.equal(heads.mean[0], heads.mean[1])  # the newest tokens were kept
    assert scorer([Sample("x", "y" * 200)]).mean.isfinite().all()  # a completion that is too long by itself
    assert scorer.extract.num_truncated == 3


def test_empty_completion_is_refused(reward_run: Path) -> None:
    with pytest.raises(PoiseError, match="empty completion"):
        Scorer.load(str(reward_run / "brme"))([Sample("x", " ")])


def edited(reward_run: Path, folder: Path, **changes: object) -> str:
    shutil.copytree(reward_run / "brme", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return str(folder)


def test_a_checkpoint_without_poise_block_is_refused(reward_run: Path, tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match="no `poise` block"):
        Scorer.load(edited(reward_run, tmp_path / "x", poise=None))


def test_heads_that_do_not_fit_the_labels(reward_run: Path, tmp_path: Path) -> None:
    block = {"num_heads": 4, "kind": "gaussian", "offset": [0.0] * 8}
    with pytest.raises(PoiseError, match="10 labels but its poise block says 4 gaussian heads, which need 8"):
        Scorer.load(edited(reward_run, tmp_path / "x", poise=block))


def test_truncated_weights_are_one_line(reward_run: Path, tmp_path: Path) -> None:
    folder = Path(edited(reward_run, tmp_path / "x"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(PoiseError, match="cannot load"):
        Scorer.load(str(folder))


def test_heads_of_another_checkpoint_share_one_trunk(reward_run: Path) -> None:
    brme = Scorer.load(str(reward_run / "brme"))
    shared = brme.with_heads_of(str(reward_run / "single"))(SAMPLES)
    assert isinstance(shared, HeadRewards)
    torch.testing.assert_close(shared.mean, Scorer.load(str(reward_run / "single"))(SAMPLES).mean)


def test_padding_is_tried_once_and_only_for_texts_of_several_lengths(
    members: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []
    monkeypatch.setattr("poise.models.scorer.padded_or_raise", tried.append)
    scorer = Scorer.load(members[0])
    scorer([SAMPLES[0]])
    assert tried == []
    scorer(SAMPLES)
    scorer(SAMPLES)
    assert tried == [scorer.extract.classifier]


@pytest.mark.parametrize(("room", "rows"), [(0, 1), (-1, 2)])
def test_a_prompt_of_two_is_shared_up_to_the_steady_context(
    room: int, rows: int, members: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer.load(members[0])
    samples = [Sample("Review a film.", text) for text in ("good", "fine")]
    prompt, completion = scorer.extract.encode(samples[0])
    assert scorer.extract._shares_prompts
    longest = len(prompt) + len(completion) + room
    monkeypatch.setattr("poise.models.scorer.steady_context", lambda _: longest)
    scorer(samples)  # the model is tried
    seen: list[int] = []
    base = scorer.extract.classifier.base_model
    hook = base.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    scorer(samples)
    hook.remove()
    assert sum(seen) == rows * len(prompt) + 2 * len(completion)


def test_distances_are_one_a_text(members: list[str]) -> None:
    far = Scorer.load(members[0])(SAMPLES).distance
    assert far is not None
    assert far.shape == (len(SAMPLES), 1)


# ---- ensembles ----


@pytest.fixture(scope="module")
def members(tiny_model: str, train_tiny_reward: Callable[[str], Path]) -> list[str]:
    run = train_tiny_reward(tiny_model)
    return [str(run / name) for name in ("single", "posterior", "brme")]


@pytest.mark.parametrize(("names", "num_heads"), [(("single", "posterior"), 7), (("brme", "brme"), 10)])
def test_an_ensemble_is_its_members_heads_on_one_scale(
    members: list[str], names: tuple[str, ...], num_heads: int
) -> None:
    chosen = [path for name in names for path in members if Path(path).name == name]
    ensemble = Ensemble.fit(chosen, SAMPLES)
    heads = ensemble(SAMPLES)
    assert heads.mean.shape == (4, num_heads) == heads.std.shape
    assert ensemble.layout.num_heads == num_heads
    start = 0
    for path in chosen:
        own = Scorer.load(path)(SAMPLES)
        part = heads.mean[:, start : start + own.mean.shape[1]]
        reward = own.mean.mean(-1)
        torch.testing.assert_close(part, (own.mean - reward.mean()) / reward.std(), rtol=0, atol=1e-4)
        torch.testing.assert_close(
            heads.std[:, start : start + own.mean.shape[1]], own.std / reward.std(), rtol=0, atol=1e-4
        )
        assert part.mean(-1).std().item() == pytest.approx(1.0, abs=1e-4)  # of its own mean head, on the reference
        start += own.mean.shape[1]


def test_an_ensemble_is_saved_and_found_again(members: list[str], tmp_path: Path) -> None:
    ensemble = Ensemble.fit(members[:2], SAMPLES)
    folder = tmp_path / "new" / "both"
    ensemble.save(folder, [str(Path(path).resolve()) for path in members[:2]])
    ensemble.save(folder, [str(Path(path).resolve()) for path in members[:2]])  # in place of itself
    loaded = Ensemble.load(str(folder))
    assert loaded.extract.max_length == Scorer.load(members[0]).extract.max_length
    torch.testing.assert_close(loaded(SAMPLES), ensemble(SAMPLES))
    assert loaded.extract is not None


def test_members_of_one_trunk_share_it(members: list[str]) -> None:
    ensemble = Ensemble.fit(members[:2], SAMPLES)
    assert len({id(member.extract) for member in ensemble.members}) == 1


def test_what_no_ensemble_can_be_made_of(members: list[str], tmp_path: Path) -> None:
    with pytest.raises(PoiseError, match="point heads and Gaussian heads"):
        Ensemble.fit(members, SAMPLES)
    with pytest.raises(PoiseError, match="the same reward"):
        Ensemble.fit(members[:2], [SAMPLES[0], SAMPLES[0]])
    (tmp_path / "ensemble.json").write_text('{"members": 3}')
    with pytest.raises(PoiseError, match="not one this version reads"):
        Scorer.load(str(tmp_path))


class Known(FeatureExtractor):
    """In place of a trunk: a text's feature is known, and calls are counted."""

    def __init__(self, factor: float, num_truncated: int = 0) -> None:
        self.factor, self.num_truncated, self.asked = factor, num_truncated, []

    def __call__(self, samples: list[Sample], progress: object = None) -> torch.Tensor:
        self.asked.append(progress)
        return torch.tensor([[self.factor * len(sample.completion)] for sample in samples])


def known_scorer(trunk: Known, weight: list[float], layout: HeadLayout) -> Scorer:
    return Scorer(trunk, torch.tensor(weight).unsqueeze(-1), layout)


def test_an_ensemble_of_known_heads_equals_values_worked_out_by_hand() -> None:
    one, other = Known(1.0, 2), Known(10.0, 5)
    members = [
        known_scorer(one, [1.0, 2.0], HeadLayout(2, "point", (0.0, 1.0), reward_scale=0.5, std_scale=(3.0, 4.0))),
        known_scorer(other, [1.0], HeadLayout(1, "point", (4.0,), reward_scale=2.0)),
        known_scorer(one, [-1.0], HeadLayout(1, "point", (0.0,))),
    ]
    ensemble = Ensemble(members, [1.0, 0.0, -2.0], [2.0, 4.0, 1.0])
    told = [].append
    heads = ensemble([Sample("p", "abc"), Sample("p", "a")], told)
    assert heads.mean.tolist() == [[1.0, 2.0, 6.5, -1.0], [0.0, 0.0, 1.5, 1.0]]
    assert heads.std.tolist() == [[0.0] * 4] * 2
    assert (one.asked, other.asked) == ([told], [None])  # each trunk reads once; the bar counts the first
    assert ensemble.num_truncated == 7  # a text that two members of one trunk read is one text
    assert ensemble.extract is one
    layout = ensemble.layout
    assert (layout.num_heads, layout.kind, layout.offset) == (4, "point", (0.0,) * 4)
    assert layout.std_scale == (3.0, 4.0, 1.0, 1.0)
    assert layout.reward_scale == pytest.approx((0.5 * 2 + 2.0 * 4 + 1.0 * 1) / 3)
    with pytest.raises(PoiseError, match="score texts instead"):
        ensemble.decode(torch.zeros(1, 1))
    with pytest.raises(ValueError, match="shorter"):
        Ensemble(members, [0.0] * 3, [1.0] * 2)


def test_an_ensemble_of_gaussian_heads_scales_their_stds() -> None:
    layout = HeadLayout(1, "gaussian", (0.0, 0.0), floor=1.0)
    ensemble = Ensemble([known_scorer(Known(1.0), [1.0, -1000.0], layout)] * 2, [0.0, 0.0], [2.0, 4.0])
    heads = ensemble([Sample("p", "abcd")])
    assert heads.mean.tolist() == [[2.0, 1.0]]
    assert heads.std.tolist() == [[0.5, 0.25]]  # each head's floor of 1
    assert ensemble.layout.offset == (0.0,) * 4


def test_a_policy_that_wrote_nothing_is_scored_as_a_full_stop() -> None:
    assert generated("p", " \n") == Sample("p", ".")
    assert generated("p", "") == Sample("p", ".")
    assert generated("p", " fine ") == Sample("p", " fine ")


def test_batches_hold_at_most_their_tokens_with_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poise.models.scorer.TOKENS_PER_BATCH", 12)
    families = [Family([0], [[0] * (length - 1)]) for length in (2, 6, 3, 6, 20, 4, 4)]
    lengths = [[1 + len(family.completions[0]) for family in batch] for batch in _batches(families)]
    assert lengths == [[20], [6, 6], [4, 4, 3], [2]]  # 3 of 4 are 12; one that is too long stands alone


def test_heads_on_another_trunk_are_not_mixed_with_this_one(members: list[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(edited(Path(members[2]).parent, tmp_path / "x"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if not name.startswith("score"))
    weights[name][0] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    brme = Scorer.load(members[2])
    with pytest.raises(PoiseError, match="does not share its trunk"):
        brme.with_heads_of(str(folder))
    assert not brme.shares_trunk_with(Scorer.load(str(folder)))
    ensemble = Ensemble.fit([members[2], str(folder)], SAMPLES)
    assert len({id(member.extract) for member in ensemble.members}) == 2


def test_features_are_kept_on_disk_only_where_asked(
    members: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POISE_CACHE", str(tmp_path))
    path = members[2]
    plain = Scorer.load(path)(SAMPLES)
    Ensemble.fit([path, path], SAMPLES)(SAMPLES)
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    kept = Scorer.load(path, cached=True)
    torch.testing.assert_close(kept(SAMPLES), plain)
    assert [file for file in tmp_path.rglob("*") if file.is_file()]


def test_progress_tells_how_many_samples_are_done(members: list[str]) -> None:
    """Also of a text that is asked for twice, which is computed once."""
    told: list[int] = []
    Scorer.load(members[2])([*SAMPLES, SAMPLES[0], Sample("Review a film.", "Another.")], told.append)
    assert sum(told) == 6


def test_a_token_without_an_embedding_is_refused_in_a_text_and_nowhere_else(reward_run: Path, tmp_path: Path) -> None:
    """Gemma 3 text models have one added token more than embeddings; their texts never hold it."""
    before = Scorer.load(str(reward_run / "brme"))(SAMPLES)
    folder = Path(edited(reward_run, tmp_path / "x"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<a token the trunk does not know>"])
    tokenizer.save_pretrained(folder)
    scorer = Scorer.load(str(folder))
    torch.testing.assert_close(scorer(SAMPLES), before)
    for sample in (
        Sample("Hi <a token the trunk does not know>", "good"),
        Sample("Hi", "<a token the trunk does not know>"),
    ):
        with pytest.raises(PoiseError, match="are of different models"):
            scorer([sample])


def test_a_model_without_a_padding_token_gets_one(tiny_model: str, tmp_path: Path) -> None:
    """No pad token at all, and none to spare in the vocabulary: one is added, and scores do not change by it."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.unk_token  # padding that is the end of turn would be read before it
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(tmp_path / "with")
    tokenizer.save_pretrained(tmp_path / "with")
    tokenizer.pad_token = tokenizer.unk_token = None
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "without")
    tokenizer.save_pretrained(tmp_path / "without")
    scorer = Scorer.load(str(tmp_path / "without"))
    assert scorer.extract.tokenizer.pad_token_id not in (None, scorer.extract.tokenizer.eos_token_id)
    torch.testing.assert_close(
        scorer(SAMPLES).mean, Scorer.load(str(tmp_path / "with"))(SAMPLES).mean, rtol=0, atol=1e-5
    )
