"""Benchmarks through lm-evaluation-harness: each shape of rows beside a computation of our own, and good manners."""

import copy
import gzip
import json
import math
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers.modeling_outputs import CausalLMOutputWithPast

from poise.cli import main as cli
from poise.errors import PoiseError
from poise.integrations import lm_eval as harness
from poise.integrations import lm_eval_tasks as benchmarks
from poise.models.loading import HfModel, HfTokenizer, load_policy
from poise.models.trained_parts import with_adapters

SHARED = Path(__file__).parents[3] / "shared" / "data" / "benchmarks"


@pytest.fixture(scope="module")
def loaded(tiny_model: str) -> tuple[HfModel, HfTokenizer]:
    return load_policy(tiny_model)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write(folder: Path, name: str, rows: list[Any]) -> str:
    """A benchmark's file in `folder`; returns the folder as an option's value."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text)
    return str(folder)


def loglikelihood(model: HfModel, tokenizer: HfTokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """(log-probability of the continuation, is it the greedy one?), token by token; the tokenizer has no merges."""
    before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in (context, continuation))
    with torch.no_grad():
        logprobs = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    at = range(len(before) - 1, len(before) + len(after) - 1)
    said = [logprobs[position].argmax().item() for position in at]
    return sum(logprobs[i, token].item() for i, token in zip(at, after, strict=True)), said == after


CHOICES = [
    ("Question: which is a fruit?", ["pear", "a long stone"]),
    ("Question: what is wet?", ["sand that lies in the sun", "rain", "dust"]),
    ("Question: who sings?", ["a bird", "the wall of a house", "nobody"]),
    ("Question: what burns? \n", ["wood", "water in a very deep well"]),
    ("Question: what is up?", ["the sky over all of us", "mud"]),
    ("Question: how many legs has a spider?\nAnswer:", ["8", "four or so"]),
]


def test_choices_are_scored_as_by_hand(loaded: tuple[HfModel, HfTokenizer], tmp_path: Path) -> None:
    rows, expected, per_character = [], "", []
    for i, (query, choices) in enumerate(CHOICES):
        asked = query if query.endswith("Answer:") else f"{query.rstrip()}\nAnswer:"
        scores = [loglikelihood(*loaded, asked, f" {choice}")[0] for choice in choices]
        best = int(np.argmax(scores))
        per_character.append(int(np.argmax([s / len(c) for s, c in zip(scores, choices, strict=True)])))
        gold = best if i % 2 else (best + 1) % len(choices)  # every other one is wrong
        rows.append({"query": query, "choices": choices, "gold": gold})
        expected += str(i % 2)
    by_character = [int(row["gold"] == pick) for row, pick in zip(rows, per_character, strict=True)]
    write(tmp_path, "arc_easy", rows)
    [easy, hard] = harness.read_tasks(("arc_easy", "arc_challenge"), write(tmp_path, "arc_challenge", rows), 0)
    found = harness.evaluate(*loaded, easy)
    assert (found.metric, found.outcomes, found.num_truncated) == ("acc", expected, 0)
    assert (found.mean, found.stderr) == (0.5, pytest.approx(np.std([0, 1] * 3, ddof=1) / 6**0.5))
    found = harness.evaluate(*loaded, hard, batch_size=1)
    assert (found.metric, found.outcomes) == ("acc_norm", "".join(map(str, by_character)))
    assert found.also == {"acc": 0.5}
    assert found.outcomes != expected  # the two metrics are told apart


def test_contexts_are_scored_as_by_hand(loaded: tuple[HfModel, HfTokenizer], tmp_path: Path) -> None:
    rows, expected = [], ""
    for i, (one, other) in enumerate([("a pan", "the kettle"), ("Ann", "Bob"), ("it", "the film"), ("1", "22")]):
        contexts = [f"She put down {one} because {who}" for who in (one, other)]
        scores = [loglikelihood(*loaded, context, " was hot.")[0] for context in contexts]
        gold = int(np.argmax(scores)) ^ (i % 2)
        rows.append({"context_options": contexts, "continuation": "was hot.", "gold": gold})
        expected += str(1 - i % 2)
    [task] = harness.read_tasks(("winogrande",), write(tmp_path, "winogrande", rows), 0)
    assert harness.evaluate(*loaded, task).outcomes == expected


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("arc_easy", {"query": "Question: which?", "choices": ["pear", "stone"], "gold": 0}),
        ("winogrande", {"context_options": ["a", "b"], "continuation": "c", "gold": 0}),
        ("lambada", {"context": "This is", "continuation": "it"}),
    ],
)
def test_a_model_that_says_nan_has_no_answers(
    loaded: tuple[HfModel, HfTokenizer], tmp_path: Path, name: str, row: Any
) -> None:
    """Weights may be finite, and what is made of them not. The first choice would be right as often as any."""
    model = copy.deepcopy(loaded[0])
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    [task] = harness.read_tasks((name,), write(tmp_path, name, [row]), 0)
    with pytest.raises(PoiseError, match=f"^{name}: the model's log-likelihoods are NaN"):
        harness.evaluate(model, loaded[1], task)


def test_an_end_token_that_the_tokenizer_adds_is_not_scored(
    loaded: tuple[HfModel, HfTokenizer], tmp_path: Path
) -> None:
    """Part of each continuation would be the end instead; with what such a tokenizer begins texts with, as by hand."""
    model, ending = loaded[0], copy.deepcopy(loaded[1])
    ids = [("<|im_start|>", ending.bos_token_id), ("<|im_end|>", ending.eos_token_id)]
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=ids
    )
    rows = [{"context": "She went", "continuation": word} for word in ("home", "to", "by")]
    expected = [loglikelihood(*loaded, "<|im_start|>She went", f" {row['continuation']}")[0] for row in rows]
    [task] = harness.read_tasks(("lambada",), write(tmp_path, "lambada", rows), 0)
    found = harness.evaluate(model, ending, task)
    assert found.also["perplexity"] == pytest.approx(np.exp(-np.mean(expected)), rel=1e-4)
    assert ending("a").input_ids[-1] == ending.eos_token_id  # of the caller's tokenizer nothing has changed


def test_a_tokenizer_without_an_end_is_one_line(loaded: tuple[HfModel, HfTokenizer], tmp_path: Path) -> None:
    """The harness would fail in its own words. Choices need something to begin with only."""
    model, endless = loaded[0], copy.deepcopy(loaded[1])
    endless.eos_token = None
    write(tmp_path, "gsm8k", [{"question": "How many?", "answer": "#### 4"}])
    rows = [{"query": query, "choices": choices, "gold": 0} for query, choices in CHOICES]
    asked, chosen = harness.read_tasks(("gsm8k", "arc_easy"), write(tmp_path, "arc_easy", rows), 0)
    harness.evaluate(model, endless, chosen)
    with pytest.raises(PoiseError, match="gsm8k: the tokenizer has no eos_token"):
        harness.evaluate(model, endless, asked)
    endless.bos_token = None
    with pytest.raises(PoiseError, match="arc_easy: the tokenizer has no eos_token"):
        harness.evaluate(model, endless, chosen)


@pytest.fixture
def bigram(loaded: tuple[HfModel, HfTokenizer], monkeypatch: pytest.MonkeyPatch) -> tuple[HfModel, HfTokenizer]:
    """A model that says " 42" and ends after a colon, and " it" after a comma."""
    model, tokenizer = loaded
    ids = {text: tokenizer(text).input_ids[0] for text in ": 42,it"} | {"end": tokenizer.eos_token_id}
    logits = torch.zeros(len(tokenizer), len(tokenizer))
    for before, after in [(":", " "), (" ", "4"), ("4", "2"), ("2", "end"), ("i", "t")]:
        logits[ids[before], ids[after]] = 9.0
    logits[ids[","], ids[" "]] = 9.0
    logits[ids[" "], ids["i"]] = 8.5

    def forward(input_ids: torch.Tensor, **_: Any) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=logits[input_ids])

    monkeypatch.setattr(model, "forward", forward)
    return model, tokenizer


def test_a_word_is_right_if_it_is_the_greedy_one(bigram: tuple[HfModel, HfTokenizer], tmp_path: Path) -> None:
    rows = [{"context": "He said,", "continuation": word} for word in ("42", "it", "4", "no")]
    [task] = harness.read_tasks(("lambada",), write(tmp_path, "lambada", rows), 0)
    found = harness.evaluate(*bigram, task)
    assert found.outcomes == "1010"
    expected = [loglikelihood(*bigram, "He said,", f" {row['continuation']}") for row in rows]
    assert found.outcomes == "".join(str(int(greedy)) for _, greedy in expected)
    assert found.also["perplexity"] == pytest.approx(np.exp(-np.mean([score for score, _ in expected])), rel=1e-4)


def test_numbers_are_written_and_compared(bigram: tuple[HfModel, HfTokenizer], tmp_path: Path) -> None:
    rows = [{"question": f"How many {i}?", "answer": f"Let us see. #### {i}"} for i in (42, 18)]
    [task] = harness.read_tasks(("gsm8k",), write(tmp_path, "gsm8k", rows), 0)
    advanced: list[int] = []
    found = harness.evaluate(*bigram, task, max_tokens=8, advance=lambda: advanced.append(1))
    assert (found.metric, found.outcomes) == ("exact_match", "10")
    assert len(advanced) == len(task.requests()) == 2


def test_what_is_written_is_the_greedy_text_whatever_the_generation_config_says(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models bring penalties and beams along, and a policy would be compared with its start under different ones."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_policy(tiny_model)
    adapted = with_adapters(load_policy(tiny_model)[0], 0, 4)
    written: list[list[str]] = []
    generate = HFLM.generate_until
    monkeypatch.setattr(HFLM, "generate_until", lambda *args: written.append(generate(*args)) or written[-1])
    rows = [{"question": f"How many {i}?", "answer": "#### 3"} for i in range(3)]
    [task] = harness.read_tasks(("gsm8k",), write(tmp_path, "gsm8k", rows), 0)
    harness.evaluate(model, tokenizer, task, max_tokens=12)
    said = {
        "repetition_penalty": 5.0,
        "num_beams": 3,
        "min_new_tokens": 12,
        "suppress_tokens": [tokenizer.pad_token_id],
    }
    for asked in (model, adapted.get_base_model()):
        asked.generation_config.update(**said)
    kept = adapted.generation_config.to_dict()
    harness.evaluate(model, tokenizer, task, max_tokens=12)
    harness.evaluate(adapted, tokenizer, task, max_tokens=12)
    assert written[0] == written[1] == written[2]
    assert kept == adapted.generation_config.to_dict() == adapted.get_base_model().generation_config.to_dict()


SAID = {
    "gsm8k": [
        ("He has 3 pans and buys 4, so 7.", "7", True), ("It is $1,200.50.", "1200.50", True), ("-5", "-5", True),
        ("7 of them, no, 8", "7", False), ("no idea", "7", False),
    ],
    "bbh": [
        (" (C) hellboy", "(C)", True), (" The answer is (B).", "(B)", True), (" True.", "true", True),
        (" invalid\nQ: is", "invalid", True), (" ] )", "] )", True), (" (A)", "(B)", False),
        (" not valid", "valid", False),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_answers_are_found_in_what_was_written(
    loaded: tuple[HfModel, HfTokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from lm_eval.models.huggingface import HFLM

    cases = SAID[name]
    monkeypatch.setattr(HFLM, "generate_until", lambda _self, requests: [said for said, _, _ in cases[: len(requests)]])
    if name == "gsm8k":
        rows = [{"question": f"{i}?", "answer": f"#### {target}"} for i, (_, target, _) in enumerate(cases)]
    else:
        rows = [{"task": "any", "input": f"{i}?", "target": target} for i, (_, target, _) in enumerate(cases)]
    [task] = harness.read_tasks((name,), write(tmp_path, name, rows), 0)
    found = harness.evaluate(*loaded, task, max_tokens=8)
    assert found.outcomes == "".join(str(int(right)) for _, _, right in cases)


# ---- manners ----


def test_nothing_is_disturbed(tiny_model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_policy(tiny_model)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    settings = (model.config.to_dict(), model.generation_config.to_dict(), tokenizer.padding_side)
    asks = [parameter.requires_grad for parameter in model.parameters()]
    rows = [{"question": f"How many {i}?", "answer": "#### 3"} for i in range(3)]
    write(tmp_path, "lambada", [{"context": f"a film {i} is", "continuation": "good"} for i in range(3)])
    tasks = harness.read_tasks(("gsm8k", "lambada"), write(tmp_path, "gsm8k", rows), 0)

    def numbers() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()

    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    undisturbed = numbers()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    # As dropout would, the model draws random numbers.
    hook = model.register_forward_hook(lambda *_: numbers() and None)
    capfd.readouterr()
    for task in tasks:
        harness.evaluate(model, tokenizer, task, max_tokens=4)
    hook.remove()
    assert capfd.readouterr() == ("", "")
    assert numbers() == undisturbed
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == asks
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert settings == (model.config.to_dict(), model.generation_config.to_dict(), tokenizer.padding_side)


def test_long_requests_are_taken_a_few_at_a_time(
    loaded: tuple[HfModel, HfTokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [task] = harness.read_tasks(("openbookqa",), write(tmp_path, "openbookqa", _plain_rows(5)), 0)
    model, tokenizer = loaded
    sizes: list[int] = []
    hook = model.register_forward_hook(lambda _module, given, _out: sizes.append(len(given[0])))
    whole = harness.evaluate(model, tokenizer, task, batch_size=10)
    monkeypatch.setattr(harness, "LOGIT_BYTES", 2 * 8 * 30 * model.config.vocab_size)
    parts = harness.evaluate(model, tokenizer, task, batch_size=10)
    hook.remove()
    assert whole == parts
    assert sizes[0] == 10
    assert set(sizes[1:]) == {2}


def _plain_rows(count: int) -> list[Any]:
    return [{"query": f"the film number {i} is", "choices": ["good", "bad"], "gold": i % 2} for i in range(count)]


def test_what_does_not_fit_is_said(loaded: tuple[HfModel, HfTokenizer], tmp_path: Path) -> None:
    write(tmp_path, "lambada", [{"context": "a " * 200, "continuation": "good"}, {"context": "b", "continuation": "c"}])
    write(tmp_path, "sciq", [{"query": "What?", "choices": ["x" * 300, "y"], "gold": 0}])
    data = write(tmp_path, "gsm8k", [{"question": "How many?", "answer": "#### 3"}])
    word, choice, number = harness.read_tasks(("lambada", "sciq", "gsm8k"), data, 0)
    assert harness.evaluate(*loaded, word).num_truncated == 1
    with pytest.raises(PoiseError, match=r"sciq: an answer alone is longer than the model's context of 256 tokens"):
        harness.evaluate(*loaded, choice)
    with pytest.raises(PoiseError, match="completions of 256 tokens leave no room in the model's context of 256"):
        harness.evaluate(*loaded, number)


# ---- reading ----

GOOD = {"query": "Question: what?", "choices": ["a", "b"], "gold": 1}
BAD = [
    ("sciq", "{", "not JSON"),
    ("sciq", GOOD | {"gold": 2}, "`gold` is not a number from 0 to 1"),
    ("sciq", GOOD | {"gold": True}, "`gold` is not a number from 0 to 1"),
    ("sciq", GOOD | {"choices": ["a"]}, "`choices` is not a list of two or more texts"),
    ("sciq", GOOD | {"choices": ["a", ""]}, "`choices` is not a list of two or more texts"),
    ("sciq", {"choices": ["a", "b"], "gold": 0}, "`query` is missing"),
    ("sciq", GOOD | {"query": 3}, "`query` is not a text"),
    ("winogrande", {"continuation": "x", "gold": 0}, "`context_options` is missing"),
    ("lambada", {"context": "a"}, "`continuation` is missing"),
    ("gsm8k", {"question": "a", "answer": "3"}, "`answer` does not end in #### and a number"),
    ("bbh", {"task": "a", "input": "b", "target": " "}, "`target` is not a text"),
]


@pytest.mark.parametrize(("name", "row", "reason"), BAD)
def test_a_bad_row_is_one_line(tmp_path: Path, name: str, row: Any, reason: str) -> None:
    good = {
        "sciq": GOOD, "winogrande": {"context_options": ["a", "b"], "continuation": "x", "gold": 0},
        "lambada": {"context": "a", "continuation": "b"}, "gsm8k": {"question": "a", "answer": "#### 3"},
        "bbh": {"task": "a", "input": "b", "target": "c"},
    }  # fmt: skip
    with pytest.raises(PoiseError) as caught:
        harness.read_tasks((name,), write(tmp_path, name, [good[name], "", row]), 0)
    assert str(caught.value).startswith(f"{tmp_path}/{name}.jsonl:3: {reason}")
    assert "\n" not in str(caught.value)


def test_other_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path, "sciq", [GOOD, GOOD])
    write(tmp_path, "piqa", [])
    (tmp_path / "race.jsonl.gz").write_bytes(b"not gzip")
    for names, folder, message in [
        (("sciq",), data, r"sciq.jsonl:2: the same row as in line 1; delete one of them"),
        (("piqa",), data, r"piqa.jsonl is empty"),
        (("race",), data, r"race.jsonl.gz:1: not JSON"),
        (("mmlu",), data, r"has no mmlu.jsonl or mmlu.jsonl.gz; add it or leave mmlu out"),
        (("sciq",), f"{data}/none", r"no such folder: .*/none; it should hold a file NAME.jsonl"),
        (("siqc",), data, r"no benchmark 'siqc'; choose from arc_easy, "),
        (("sciq", "sciq"), data, r"a benchmark is named twice"),
        ((), data, r"no benchmark is named"),
    ]:
        with pytest.raises(PoiseError, match=message) as caught:
            harness.read_tasks(names, folder, 0)
        assert "\n" not in str(caught.value)

    def missing(name: str) -> str:
        raise harness.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(harness.metadata, "version", missing)
    with pytest.raises(PoiseError, match=r"pip install 'poise-rlhf\[eval\]'"):
        harness.read_tasks(("sciq",), data, 0)


def test_rows_are_the_first_and_the_identity_knows_them(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "piqa.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in _plain_rows(6))

    def identity(rows: int, tokens: int = 8) -> str:
        [task] = harness.read_tasks(("piqa",), str(tmp_path), rows)
        return task.identity(tokens)

    [task] = harness.read_tasks(("piqa",), str(tmp_path), 2)
    assert [doc["gold"] for doc in task.docs] == [0, 1]
    assert identity(2) == identity(2, tokens=9)  # nothing is written
    assert len({identity(2), identity(3), identity(6)}) == 3
    assert identity(0) == identity(6)


def test_parts_share_the_rows_out_rounded_up_as_the_help_says(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate-policy", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, parts, total in [("mmlu", 57, 114), ("bbh", 27, 108)]:
        task = harness.Task(name, loaded=dict.fromkeys(map(str, range(parts))), rows=100)
        assert task.limit is not None
        assert task.limit * parts == total
        assert f"{total} of {name}, which has {parts}" in said


@pytest.mark.skipif(not SHARED.exists(), reason="the samples lie outside the repository")
def test_all_samples_are_readable() -> None:
    tasks = harness.read_tasks(tuple(benchmarks.BENCHMARKS), str(SHARED), 0)
    assert len(tasks) == 17
    assert len(benchmarks.DEFAULT_TASKS) == 16
    assert {len(task.docs) for task in tasks} == {100}
    assert all(len(task.requests()) >= 100 for task in tasks)


# ---- the harness's own tasks ----


@pytest.fixture(scope="module")
def task_manager() -> Iterator[Any]:
    """One reading of the harness's list of tasks, for all. Only of these folders: the whole list takes 16 s."""
    from lm_eval import tasks

    folders = (
        "arc", "bbh", "commonsense_qa", "gsm8k", "hellaswag", "lambada", "mathqa", "mmlu/default", "openbookqa", "piqa",
        "race", "sciq", "siqa", "super_glue/boolq", "truthfulqa", "winogrande",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        root = Path(tasks.__file__).parent
        manager = tasks.TaskManager(include_path=[root / folder for folder in folders], include_defaults=False)
        patch.setattr(tasks, "TaskManager", lambda: manager)
        yield manager


def test_every_benchmark_has_a_task_of_the_harness(task_manager: Any) -> None:
    assert {benchmark.hub for benchmark in benchmarks.BENCHMARKS.values()} <= set(task_manager.all_tasks)


@pytest.mark.usefixtures("task_manager")
def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        PoiseError, match=r"cannot get lambada from the model hub \(Couldn't reach the hub\); use --data"
    ):
        harness.read_tasks(("lambada",), "", 5)


@pytest.mark.slow
@pytest.mark.usefixtures("task_manager")
def test_tasks_of_the_hub_answer_as_local_ones(
    loaded: tuple[HfModel, HfTokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    # Of the harness's own tasks three kinds: a word, written answers after examples, and a group of 57 parts.
    rows = {
        "EleutherAI/lambada_openai": [{"text": f"the film {i} is {word}"} for i, word in enumerate(("good", "bad"))],
        "openai/gsm8k": [{"question": f"How many {i}?", "answer": f"#### {i}"} for i in range(7)],
        "cais/mmlu": [{"question": f"What {i}?", "choices": list("wxyz"), "answer": i} for i in range(4)],
    }  # fmt: skip

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        del name
        return {split: datasets.Dataset.from_list(rows[path]) for split in ("train", "dev", "test")}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    word, number, group = harness.read_tasks(("lambada", "gsm8k", "mmlu"), "", 3)
    local = [
        {"context": row["text"].rpartition(" ")[0], "continuation": row["text"].rpartition(" ")[2]}
        for row in rows["EleutherAI/lambada_openai"]
    ]
    [same] = harness.read_tasks(("lambada",), write(tmp_path, "lambada", local), 0)
    assert harness.evaluate(*loaded, word) == harness.evaluate(*loaded, same)
    found = harness.evaluate(*loaded, number, max_tokens=4)
    assert (found.metric, len(found.outcomes)) == ("exact_match", 3)
    assert [r.args[0] for r in number.requests()] == [r.args[0] for r in number.requests()]  # the same examples again
    assert number.identity(4) != number.identity(5)
    found = harness.evaluate(*loaded, group)
    assert (found.metric, len(found.outcomes)) == ("acc", 57)  # three rows over 57 parts: one each
