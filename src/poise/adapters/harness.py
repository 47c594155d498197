"""lm-evaluation-harness: which benchmarks there are, how local rows become its tasks, and what it says row by row.

The harness asks, scores and extracts the answers; this file names its tasks, feeds it rows and keeps it quiet. No chat
template is applied. Rows from a folder (DIR/NAME.jsonl or .jsonl.gz) are asked zero-shot, the harness's own tasks with
the examples that their authors give them (gsm8k: five). Shapes of local rows:

    choices    query, choices, gold                    log-likelihood of " choice" after the query
    contexts   context_options, continuation, gold     log-likelihood of " continuation" after each context (winogrande)
    word       context, continuation                   is " continuation" what greedy decoding would say? (lambada)
    number     question, answer (…#### 18)             the last number of a greedy completion (gsm8k)
    text       task, input, target                     its first line, or the (A) that it begins with (bbh)

Metrics: `acc` picks the choice of highest log-likelihood, `acc_norm` that of highest log-likelihood per character;
`exact_match` compares the extracted answer.
"""

import contextlib
import itertools
import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy import ndarray

from poise.data import as_object, raw_rows
from poise.errors import PoiseError, first_line
from poise.models import HfModel, HfTokenizer, quiet_loading
from poise.progress import console
from poise.runs import Json

Shape = Literal["choices", "contexts", "word", "number", "text"]

MAX_TOKENS = 256
LOGIT_BYTES = 2**30  # of one batch: logits and their log-softmax, in float32
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
DEFAULT_TASKS = tuple(name for name in BENCHMARKS if name != "bbh")


@dataclass(frozen=True)
class Answers:
    """What a model made of a benchmark.

    outcomes: a character per row, 1 for right and 0 for wrong by `metric`.
    also: other metrics of the same rows: `acc` where acc_norm counts, `perplexity` of a word.
    num_truncated: requests that lost the beginning of their context, being longer than the model's.
    """

    metric: str
    outcomes: str
    also: dict[str, float]
    num_truncated: int

    @property
    def array(self) -> ndarray:
        """Outcomes (rows,) as 0.0 and 1.0."""
        return np.array(list(self.outcomes), dtype=float)

    @property
    def mean(self) -> float:
        return float(self.array.mean())

    @property
    def stderr(self) -> float:
        """Standard error of the mean: std of the rows (n - 1) / sqrt(n); NaN for a single row."""
        rows = self.array
        return float(rows.std(ddof=1) / np.sqrt(len(rows))) if len(rows) > 1 else float("nan")


@dataclass
class Task:
    """A benchmark with its rows. Local ones hold `docs`; the harness's own are `loaded`, several if it is a group."""

    name: str
    docs: list[Json] = field(default_factory=list)
    loaded: dict[str, Any] = field(default_factory=dict)
    rows: int = 0

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.name]

    @property
    def generates(self) -> bool:
        return self.benchmark.metric == "exact_match"

    @cached_property
    def parts(self) -> dict[str, Any]:
        """The harness's task objects."""
        return self.loaded or {self.name: _local_task(self)}

    @property
    def limit(self) -> int | None:
        """Most rows of each part; None for all."""
        return -(-self.rows // len(self.parts)) if self.rows else None

    def identity(self, max_tokens: int) -> str:
        """Digest of all that decides what is asked and how it is scored, the model apart."""
        asked: Json = {"lm_eval": _version(), "name": self.name, "tokens": max_tokens if self.generates else 0}
        if self.docs:
            asked |= {"settings": _settings(self.name), "docs": self.docs}
        else:
            for name, part in self.loaded.items():
                docs = list(itertools.islice(part.eval_docs, self.limit))
                asked[name] = {"version": part.VERSION, "shots": part.config.num_fewshot, "docs": docs}
        return blake2b(json.dumps(asked, sort_keys=True, default=str).encode(), digest_size=20).hexdigest()

    def requests(self) -> list[Any]:
        """The harness's requests, one per choice, context or completion."""
        found: list[Any] = []
        with _quiet():
            for part in self.parts.values():
                part.set_fewshot_seed(_fewshot_seed())
                part.build_all_requests(limit=self.limit)
                found += part.instances
        return found


# ---- reading ----


def read_tasks(names: tuple[str, ...], data: str, rows: int) -> list[Task]:
    """The named benchmarks, with at most `rows` rows (0: all) each: the first ones of the files in folder `data`.

    data="": the harness's own, from the model hub; a benchmark of several parts shares `rows` out among them.
    Raises PoiseError, one line, for an unknown name, a missing or empty file, a bad or repeated row, no harness, or a
    hub that cannot be reached. Touches the network only without `data`, and no model.
    """
    if not names:
        raise PoiseError(f"no benchmark is named; choose from {', '.join(BENCHMARKS)}")
    for name in names:
        if name not in BENCHMARKS:
            raise PoiseError(f"no benchmark {name!r}; choose from {', '.join(BENCHMARKS)}")
    if len(set(names)) < len(names):
        raise PoiseError("a benchmark is named twice")
    _require()
    if not data:
        return _from_hub(names, rows)
    if not Path(data).is_dir():
        raise PoiseError(
            f"no such folder: {data}; it should hold a file NAME.jsonl or NAME.jsonl.gz for each benchmark"
        )
    docs = {name: _read_docs(name, Path(data)) for name in names}
    return [Task(name, docs=read[:rows] if rows else read) for name, read in docs.items()]


def _read_docs(name: str, folder: Path) -> list[Json]:
    """Every row of a benchmark's file, as the harness is to see it."""
    paths = [folder / f"{name}{suffix}" for suffix in (".jsonl", ".jsonl.gz")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise PoiseError(f"{folder} has no {name}.jsonl or {name}.jsonl.gz; add it or leave {name} out of the tasks")
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


def _from_hub(names: tuple[str, ...], rows: int) -> list[Task]:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each of its attempts
    with _quiet(), console.status("reading benchmarks from the model hub"):
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        tasks = []
        for name in names:
            try:
                loaded = manager.load([BENCHMARKS[name].hub])["tasks"]
            except Exception as error:  # noqa: BLE001  of the hub client, its data sets and the network: a dozen kinds
                raise PoiseError(
                    f"cannot get {name} from the model hub ({first_line(error)}); "
                    f"use --data (--eval-data in training) with a folder of the benchmarks' rows"
                ) from None
            tasks.append(Task(name, loaded=loaded, rows=rows))
    return tasks


# ---- local rows as tasks of the harness ----


def _settings(name: str) -> Json:
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


def _local_task(task: Task) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rows = {"test": Dataset.from_list(task.docs)}  # in memory: nothing is downloaded, nothing written
    return ConfigurableTask(config=_settings(task.name) | {"custom_dataset": lambda: rows})


# ---- evaluating ----


def evaluate(
    model: HfModel, tokenizer: HfTokenizer, task: Task, *, batch_size: int = 8, max_tokens: int = MAX_TOKENS,
    advance: Callable[[], None] = lambda: None,
) -> Answers:  # fmt: skip
    """Ask a causal language model (PEFT adapters and all), where it is and in its dtype; it is left as it was found.

    batch_size: requests at a time; fewer where they are so long that their logits would exceed LOGIT_BYTES.
    max_tokens: longest completion of a generative task. advance: called once per request.
    Raises PoiseError if the model's context has no room for a completion.
    """
    _require()
    with _quiet() as cut, _undisturbed(model):
        from lm_eval.evaluator import evaluate as ask
        from lm_eval.models.huggingface import HFLM

        requests = task.requests()
        longest = _longest(requests, tokenizer)
        lm: Any = HFLM(
            pretrained=model, tokenizer=tokenizer, softmax_dtype="float32",
            batch_size=max(1, min(batch_size, LOGIT_BYTES // (8 * longest * model.config.vocab_size))),
        )  # fmt: skip
        if task.generates and max_tokens >= lm.max_length:
            raise PoiseError(
                f"{task.name}: completions of {max_tokens} tokens leave no room in the model's context of "
                f"{lm.max_length}; lower --max-tokens or leave {task.name} out"
            )
        lm.set_cache_hook(_Counter(advance))
        for part in task.parts.values():
            part.set_fewshot_seed(_fewshot_seed())
            if task.generates:
                part.set_config("generation_kwargs", {"max_gen_toks": max_tokens}, update=True)
        try:
            # bootstrap_iters=0: no standard errors, which would be drawn 100,000 times in processes of their own
            found = ask(lm, {"tasks": task.parts}, limit=task.limit, bootstrap_iters=0)
        except AssertionError:  # the one thing it refuses in well-formed rows
            raise PoiseError(
                f"{task.name}: an answer alone is longer than the model's context of {lm.max_length} tokens; "
                f"leave {task.name} out"
            ) from None
    return _answers(task, found, cut.count)


def _answers(task: Task, found: Json, num_truncated: int) -> Answers:
    metric, by = task.benchmark.metric, "flexible-extract" if task.generates else "none"
    samples = [row for part in task.parts for row in found["samples"][part] if row["filter"] == by]
    also = {}
    if metric == "acc_norm":
        also["acc"] = float(np.mean([row["acc"] for row in samples]))
    if (perplexity := found["results"][next(iter(task.parts))].get("perplexity,none")) is not None:
        also["perplexity"] = float(perplexity)
    return Answers(metric, "".join(str(int(row[metric])) for row in samples), also, num_truncated)


def _longest(requests: list[Any], tokenizer: HfTokenizer) -> int:
    """Length in tokens of the request with the longest text; its completion, if it is to have one, left out."""
    texts = ("".join(part for part in request.args if isinstance(part, str)) for request in requests)
    return len(tokenizer(max(texts, key=len)).input_ids)


class _Counter:
    """In the place of the harness's own cache, which is told of each request that is done."""

    def __init__(self, advance: Callable[[], None]):
        self.advance = advance

    def add_partial(self, _kind: str, _request: Any, _answer: Any) -> None:
        self.advance()


# ---- manners ----


def _require() -> None:
    try:
        _version()
    except metadata.PackageNotFoundError:
        raise PoiseError("benchmarks need lm-evaluation-harness: pip install 'poise-rlhf[eval]'") from None


def _version() -> str:
    return metadata.version("lm_eval")


def _fewshot_seed() -> int:
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    return DEFAULT_OTHER_SEED


class _Cut(logging.Handler):
    """Counts the harness's reports of contexts that were cut, and swallows all others."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "runcat" in record.getMessage()  # "Truncating …", "Left truncation applied"


@contextlib.contextmanager
def _quiet() -> Iterator[_Cut]:
    """Silence of the harness's bars and logs: ours say what matters."""
    with quiet_loading():
        import lm_eval.api.model
        import lm_eval.api.task
        import lm_eval.models.huggingface

        modules: list[Any] = [lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface]
        bars = [module.tqdm for module in modules]
        logger, handler = logging.getLogger("lm_eval"), _Cut()
        level, propagate = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        try:
            for module, bar in zip(modules, bars, strict=True):
                module.tqdm = _hidden(bar)
            yield handler
        finally:
            for module, bar in zip(modules, bars, strict=True):
                module.tqdm = bar
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def _hidden(bar: Any) -> Callable[..., Any]:
    return lambda *args, **options: bar(*args, **options | {"disable": True})


@contextlib.contextmanager
def _undisturbed(model: HfModel) -> Iterator[None]:
    """Afterwards random numbers go on and modules are in the mode as if nothing had happened."""
    modes = {module: module.training for module in model.modules()}
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)
