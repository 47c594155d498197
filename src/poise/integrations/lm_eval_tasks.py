"""The known benchmarks, and how their local rows become tasks of lm-evaluation-harness.

Rows come from a folder, DIR/NAME.jsonl or .jsonl.gz. Their shapes:

    choices    query, choices, gold                    log-likelihood of " choice" after the query
    contexts   context_options, continuation, gold     log-likelihood of " continuation" after each context (winogrande)
    word       context, continuation                   does greedy decoding give " continuation"? (lambada)
    number     question, answer (…#### 18)             the last number of a greedy completion (gsm8k)
    text       task, input, target                     its first line, or the (A) that it begins with (bbh)

Metrics: `acc` picks the choice of highest log-likelihood, `acc_norm` that of highest log-likelihood per character;
`exact_match` compares the extracted answer. The harness itself is in integrations/lm_eval.py: nothing here needs it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from poise.data.preferences import as_object, raw_rows
from poise.errors import PoiseError
from poise.runtime.run_folder import Json

Shape = Literal["choices", "contexts", "word", "number", "text"]

_ANSWER = "\nAnswer:"


@dataclass(frozen=True)
class Benchmark:
    """What the harness calls a benchmark, what its local rows look like, and which of its metrics counts.

    cue: what a local query ends with; added where it is missing.
    """

    hub: str
    shape: Shape = "choices"
    metric: str = "acc"
    cue: str = ""


BENCHMARKS = {
    "arc_easy": Benchmark("arc_easy", cue=_ANSWER),
    "arc_challenge": Benchmark("arc_challenge", metric="acc_norm", cue=_ANSWER),
    "lambada": Benchmark("lambada_openai", "word"),
    "mmlu": Benchmark("mmlu", cue=_ANSWER),
    "hellaswag": Benchmark("hellaswag", metric="acc_norm"),
    "winogrande": Benchmark("winogrande", "contexts"),
    "piqa": Benchmark("piqa", metric="acc_norm", cue=_ANSWER),
    "boolq": Benchmark("boolq", cue=_ANSWER),
    "openbookqa": Benchmark("openbookqa", metric="acc_norm"),
    "sciq": Benchmark("sciq", cue=_ANSWER),
    "race": Benchmark("race", cue=_ANSWER),
    "truthfulqa_mc1": Benchmark("truthfulqa_mc1", cue="\nA:"),
    "commonsense_qa": Benchmark("commonsense_qa", cue=_ANSWER),
    "social_iqa": Benchmark("social_iqa", cue=_ANSWER),
    "math_qa": Benchmark("mathqa", cue=_ANSWER),
    "gsm8k": Benchmark("gsm8k", "number", "exact_match"),
    "bbh": Benchmark("bbh_zeroshot", "text", "exact_match"),
}
MAX_TOKENS = 256  # of a completion of the generative benchmarks
DEFAULT_TASKS = tuple(name for name in BENCHMARKS if name != "bbh")


# ---- reading ----


def check_tasks(names: Sequence[str], data: str) -> None:
    """Raise PoiseError, one line, for benchmarks that are none, named twice, or without a file in the folder `data`.

    data="": they come from the model hub.
    """
    if not names:
        raise PoiseError(f"no benchmark is named; choose from {', '.join(BENCHMARKS)}")
    for name in names:
        if name not in BENCHMARKS:
            raise PoiseError(f"no benchmark {name!r}; choose from {', '.join(BENCHMARKS)}")
    if len(set(names)) < len(names):
        raise PoiseError("a benchmark is named twice")
    if not data:
        return
    if not Path(data).is_dir():
        raise PoiseError(
            f"no such folder: {data}; it should hold a file NAME.jsonl or NAME.jsonl.gz for each benchmark"
        )
    for name in names:
        _file_of(name, Path(data))


def _file_of(name: str, folder: Path) -> Path:
    paths = [folder / f"{name}{suffix}" for suffix in (".jsonl", ".jsonl.gz")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise PoiseError(f"{folder} has no {name}.jsonl or {name}.jsonl.gz; add it or leave {name} out of the tasks")
    return path


def read_docs(name: str, folder: Path) -> list[Json]:
    """Every row of a benchmark's file, as the harness is to see it."""
    path = _file_of(name, folder)
    docs: list[Json] = []
    lines: dict[str, int] = {}
    for number, raw in raw_rows(path):
        try:
            docs.append(doc_of(name, as_object(raw)))
        except ValueError as error:
            raise PoiseError(f"{path}:{number}: {error}; correct the line or delete it") from None
        first = lines.setdefault(json.dumps(docs[-1], sort_keys=True), number)
        if first != number:
            raise PoiseError(f"{path}:{number}: the same row as in line {first}; delete one of them")
    if not docs:
        raise PoiseError(f"{path} is empty; leave {name} out of the tasks or fill the file")
    return docs


def doc_of(name: str, row: Json) -> Json:
    """A local row as the harness's templates want it. Raises ValueError that says what is wrong with it.

    >>> doc_of("piqa", {"query": "Question: a pan?", "choices": ["fry", "fly"], "gold": 0})["query"]
    'Question: a pan?\\nAnswer:'
    """
    benchmark = BENCHMARKS[name]
    if benchmark.shape == "choices":
        query, choices = _text(row, "query"), _texts(row, "choices")
        if not query.endswith(benchmark.cue.strip()):
            query += benchmark.cue
        return {"query": query, "choices": choices, "gold": _index(row, len(choices))}
    if benchmark.shape == "contexts":
        contexts = _texts(row, "context_options")
        continuation = _text(row, "continuation").lstrip()
        return {"contexts": contexts, "continuation": continuation, "gold": _index(row, len(contexts))}
    if benchmark.shape == "word":
        return {"query": _text(row, "context"), "target": f" {_text(row, 'continuation').lstrip()}"}
    if benchmark.shape == "number":
        number = _text(row, "answer").rpartition("####")
        if not (number[1] and number[2].strip()):
            raise ValueError("`answer` does not end in #### and a number")
        return {"query": f"Question: {_text(row, 'question')}{_ANSWER}", "target": number[2].strip()}
    return {"query": f"Q: {_text(row, 'input')}\nA:", "target": _text(row, "target").lstrip()}


def _text(row: Json, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{key}` is missing" if value is None else f"`{key}` is not a text")
    return value.rstrip()


def _texts(row: Json, key: str) -> list[str]:
    values = row.get(key)
    if values is None:
        raise ValueError(f"`{key}` is missing")
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(t, str) and t.strip() for t in values):
        raise ValueError(f"`{key}` is not a list of two or more texts")
    return [text.strip() for text in values]


def _index(row: Json, count: int) -> int:
    gold = row.get("gold")
    if type(gold) is not int or not 0 <= gold < count:
        raise ValueError(f"`gold` is not a number from 0 to {count - 1}")
    return gold


# ---- settings ----


def settings_of(name: str) -> Json:
    """The harness's settings of a local task, without its rows."""
    benchmark = BENCHMARKS[name]
    common: Json = {"task": name, "test_split": "test", "num_fewshot": 0, "doc_to_text": "query"}
    if benchmark.shape == "choices":
        return common | {
            "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold",
            "metric_list": [_metric("acc"), _metric("acc_norm")],
        }  # fmt: skip
    if benchmark.shape == "contexts":  # a text that is a number tells the harness that the choices are contexts
        return common | {
            "output_type": "multiple_choice", "doc_to_text": "gold", "doc_to_choice": "contexts",
            "doc_to_target": "continuation", "metric_list": [_metric("acc")],
        }  # fmt: skip
    if benchmark.shape == "word":
        perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
        return common | {
            "output_type": "loglikelihood", "doc_to_target": "target", "metric_list": [_metric("acc"), perplexity]
        }  # fmt: skip
    if benchmark.shape == "number":
        extract = {"function": "regex", "regex_pattern": r"-?\$?\d[\d,]*(?:\.\d+)?", "group_select": -1}
        until, ignored = ["Question:"], [",", r"\$"]
    else:
        pattern = r"^\s*(?:[Tt]he answer is:?\s*)?(\([A-Z]\)|[^\n]+?(?=\.?\s*(?:\n|$)))"
        extract = {"function": "regex", "regex_pattern": pattern}
        until, ignored = ["Q:", "\n\n"], []
    return common | {
        "output_type": "generate_until", "doc_to_target": "target",
        "generation_kwargs": {"until": until, "do_sample": False},
        "filter_list": [{"name": "flexible-extract", "filter": [extract, {"function": "take_first"}]}],
        "metric_list": [_metric("exact_match") | {"ignore_case": True, "regexes_to_ignore": ignored}],
    }  # fmt: skip


def _metric(name: str) -> Json:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}
