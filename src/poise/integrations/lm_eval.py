"""Evaluate a language model on benchmarks with lm-evaluation-harness, and extract the outcome of every row.

Tasks are made of local rows (lm_eval_tasks.py) or are the harness's own. No chat template is applied. Local rows are
evaluated zero-shot, the harness's own tasks with the examples that their authors chose (gsm8k: five).
"""

import contextlib
import copy
import itertools
import json
import logging
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from tokenizers.processors import TemplateProcessing

from poise.errors import PoiseError, first_line
from poise.integrations.lm_eval_tasks import BENCHMARKS, MAX_TOKENS, Benchmark, check_tasks, read_docs, settings_of
from poise.models.chat_format import added_tokens
from poise.models.end_tokens import plain_generation
from poise.models.loading import HfModel, HfTokenizer
from poise.runtime.progress import console
from poise.runtime.quiet import quiet_loading
from poise.runtime.run_folder import Json

LOGIT_BYTES = 2**30  # of one batch: logits and their log-softmax, in float32


@dataclass(frozen=True)
class Answers:
    """A model's outcomes on a benchmark.

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
        """Most rows of each part, so that all together are `rows` or, rounded up, some more; None for all."""
        return -(-self.rows // len(self.parts)) if self.rows else None

    def identity(self, max_tokens: int) -> str:
        """Digest of everything but the model that determines the outcomes: rows, settings, the harness's version."""
        parts: Json = {"lm_eval": _version(), "name": self.name, "tokens": max_tokens if self.generates else 0}
        if self.generates:
            parts["generation"] = "plain"  # as `_plain` has it
        if self.docs:
            parts |= {"settings": settings_of(self.name), "docs": self.docs}
        else:
            for name, part in self.loaded.items():
                docs = list(itertools.islice(part.eval_docs, self.limit))
                parts[name] = {"version": part.VERSION, "shots": part.config.num_fewshot, "docs": docs}
        return blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=20).hexdigest()

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

    data="": the harness's own, from the model hub; one of several parts takes the first ceil(rows / parts) of each,
    which may be more than `rows` (see Task.limit).
    Raises PoiseError, one line, for an unknown name, a missing or empty file, a bad or repeated row, no harness, or a
    hub that cannot be reached. Touches the network only without `data`, and no model.
    """
    check_tasks(names, data)
    _require()
    if not data:
        return _from_hub(names, rows)
    docs = {name: read_docs(name, Path(data)) for name in names}
    return [Task(name, docs=read[:rows] if rows else read) for name, read in docs.items()]


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


def _local_task(task: Task) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    rows = {"test": Dataset.from_list(task.docs)}  # in memory: nothing is downloaded, nothing written
    return ConfigurableTask(config=settings_of(task.name) | {"custom_dataset": lambda: rows})


# ---- evaluating ----


def evaluate(
    model: HfModel, tokenizer: HfTokenizer, task: Task, *, batch_size: int = 8, max_tokens: int = MAX_TOKENS,
    advance: Callable[[], None] = lambda: None,
) -> Answers:  # fmt: skip
    """Evaluate a causal language model, with its PEFT adapters, on its device and in its dtype; it is not changed.

    What is generated is the model's own greedy text, whatever its generation config says of penalties or beams.

    batch_size: requests at a time; fewer where they are so long that their logits would exceed LOGIT_BYTES.
    max_tokens: longest completion of a generative task. advance: called once per request.
    Raises PoiseError if the model's context has no room for a completion, or the tokenizer has no eos token.
    """
    _require()
    with _quiet() as cut, _undisturbed(model), _plain(model, tokenizer):
        from lm_eval.evaluator import evaluate as harness_evaluate
        from lm_eval.models.huggingface import HFLM

        if tokenizer.eos_token_id is None and (task.generates or tokenizer.bos_token_id is None):
            raise PoiseError(f"{task.name}: the tokenizer has no eos_token, by which a benchmark knows where texts end")
        tokenizer = _without_end(tokenizer)
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
            found = harness_evaluate(lm, {"tasks": task.parts}, limit=task.limit, bootstrap_iters=0)
        except AssertionError:  # the one thing it refuses in well-formed rows
            raise PoiseError(
                f"{task.name}: an answer alone is longer than the model's context of {lm.max_length} tokens; "
                f"leave {task.name} out"
            ) from None
    return _answers(task, found, cut.count)


def _answers(task: Task, found: Json, num_truncated: int) -> Answers:
    metric, by = task.benchmark.metric, "flexible-extract" if task.generates else "none"
    samples = [row for part in task.parts for row in found["samples"][part] if row["filter"] == by]
    if not task.generates and any(math.isnan(answer[0]) for row in samples for answer in row["filtered_resps"]):
        raise PoiseError(  # the harness would take the first choice of each row
            f"{task.name}: the model's log-likelihoods are NaN, so it has no answers: its weights are broken"
        )
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


def _without_end(tokenizer: HfTokenizer) -> HfTokenizer:
    """A tokenizer that begins texts as this one does, and adds nothing after them.

    The harness takes what a context has as tokens off the context with its continuation. An end token after each would
    be scored in place of the continuation, and a completion would be written after the end.
    """
    before, after = added_tokens(tokenizer)
    if not after:
        return tokenizer
    if not tokenizer.is_fast:
        raise PoiseError("the tokenizer adds an end token to every text; set its add_eos_token to false")
    found = copy.deepcopy(tokenizer)
    names = tokenizer.convert_ids_to_tokens(before)
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*names, "$A"], special_tokens=list(zip(names, before, strict=True))
    )
    return found


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
def _plain(model: HfModel, tokenizer: HfTokenizer) -> Iterator[None]:
    """Within it nothing of the generation config but the end tokens counts; peft leaves a copy at its base model."""
    base = getattr(model, "get_base_model", lambda: model)()
    places = [model] if base is model else [model, base]
    before = [vars(place).get("generation_config") for place in places]
    for place in places:
        place.generation_config = plain_generation(base, tokenizer)
    try:
        yield
    finally:
        for place, kept in zip(places, before, strict=True):
            del place.generation_config
            if kept is not None:
                place.generation_config = kept


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
