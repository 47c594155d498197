"""The backend that reads with vLLM: one reward model, in one or several vLLM servers.

Here a sample becomes token ids, there ids become all 2K labels (`/classify`). vLLM never renders or truncates: its own
chat template might end a turn elsewhere than where the score is read. Before a server is asked it must answer for a few
texts as the checkpoint itself does, read here on the CPU: vLLM could hold other weights, squeeze labels into
probabilities, or round. The same check is made again of a server that was away. Heads with adapters of their own are
models of their own in vLLM, head_0, head_1, …: each text is asked of every one, and of its answer that head's labels
are taken.
"""

import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from poise.data.types import Sample
from poise.errors import PoiseError
from poise.models.encoding import Tokens
from poise.models.formats import ENSEMBLE_FILE
from poise.models.head_adapters import FOLDER
from poise.models.loading import resolve_model
from poise.models.reward_model import heads_fingerprint, read_layout
from poise.models.run_heads import taken_heads
from poise.models.scorer import Scorer
from poise.runtime.http_json import AgainError, ask
from poise.runtime.progress import console
from poise.runtime.run_folder import Json
from poise.serve.backend import BackendAwayError, Member, Read, RewardModels
from poise.serve.config import ServeConfig

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own
PATIENCE = 10.0  # seconds in which an answer is looked for, at all servers in turn; after it, callers get a 503
TIMEOUT = 120.0  # seconds for one answer
_PAUSE = 0.25
_NOISE = 1e-4  # of float32
_SHARE = 0.25  # of the spread between texts, that rounding may change: .08 in bfloat16 (LOG.md, 2026-11-28)
PROBE = [
    Sample("Review a film.", "A warm, funny film that I would see again."),
    Sample("Review a film.", "Bad."),
    Sample("What is 2 + 3?", "2 + 3 = 5."),
    Sample("Write a sentence about the sea.", "The sea the sea the sea the sea the sea the sea the sea."),
    Sample("Why is the sky blue?", "I cannot help with that."),
    Sample("Name a color, and say why.", "Green! It is the color of grass, of hope, and — in Paris — of waste bins."),
]


def remote(config: ServeConfig) -> RewardModels:
    """The reward model that the settings name, read by the vLLM servers that they name.

    Raises PoiseError for one that vLLM cannot read, and as `Servers.check` does.
    """
    (path,) = (taken_heads(reward, config.objective) for reward in config.rewards)
    if (Path(path) / ENSEMBLE_FILE).exists():
        raise PoiseError(f"--backend vllm reads one reward model, and {path} is an ensemble; serve it with local")
    layout = read_layout(path)
    layout = layout.with_reference(None)  # distances need features, and vLLM gives labels only
    layout.check_objective(config.objective)
    scorer = Scorer.load(path, config.max_length, place=torch.device("cpu"))
    encoder = scorer.extract.without_weights()
    probe = [encoder.encode(sample) for sample in PROBE]
    expected = scorer.extract.forward(probe) @ scorer.weight.T
    del scorer
    folder = Path(resolve_model(path)) / FOLDER
    adapters = {f"head_{k}": str(folder / f"head_{k}") for k in range(layout.num_heads)} if layout.adapters else {}
    servers = Servers(config.url, probe, expected, encoder.max_length, adapters)
    for url in config.url:
        difference = servers.check(url)
        console.print(f"{url} reads as {path} does, to {difference:.0e}", markup=False, soft_wrap=True)
    member = Member(0, slice(0, layout.num_labels), layout)
    return RewardModels([encoder], [servers], [member], layout, heads_fingerprint(path))


class Servers:
    """vLLM servers of one reward model: a `Backend`."""

    def __init__(
        self,
        urls: Sequence[str],
        probe: Sequence[Tokens],
        expected: Float[Tensor, "texts labels"],
        max_length: int,
        adapters: Mapping[str, str] | None = None,
    ):
        """probe: texts with logits that every server must answer with. max_length: longest sample in tokens.

        adapters: of heads with adapters of their own, in their order: the name of each in vLLM, and its folder.
        """
        self._adapters = dict(adapters or {})
        self._urls = [url.rstrip("/") for url in urls]
        self._probe, self._expected, self._max_length = list(probe), expected, max_length
        self._unchecked = set(self._urls)
        self._turns = itertools.count()
        self._threads = ThreadPoolExecutor(len(urls), "poise-vllm")

    def __call__(self, tokens: Sequence[Tokens]) -> Read:
        """All labels of every text, in the order of `tokens`. Texts of one prompt go to one server, which caches it.

        Raises BackendAwayError if no server answers, PoiseError for an answer that is none.
        """
        different = list(dict.fromkeys(tokens))
        parts = self._parts(different)
        start = next(self._turns)
        asked = [self._threads.submit(self._ask, part, start + i) for i, part in enumerate(parts)]
        rows: dict[Tokens, list[float]] = {}
        for part, answer in zip(parts, asked, strict=True):
            rows.update(zip(part, answer.result(), strict=True))
        return Read(torch.tensor([rows[text] for text in tokens]))

    def check(self, url: str) -> float:
        """The largest difference between a server's logits and the checkpoint's on the probe.

        Raises PoiseError for a server that is away, that reads less than the longest sample, or another model.
        """
        try:
            return self._difference(url.rstrip("/"))
        except AgainError as error:
            raise PoiseError(f"no vLLM answers at {url}: {error}; start it: vllm serve … --runner pooling") from None

    def _parts(self, texts: list[Tokens]) -> list[list[Tokens]]:
        """One part for each server, at most: whole prompts, and about as many tokens in each."""
        prompts: dict[tuple[int, ...], list[Tokens]] = {}
        for text in texts:
            prompts.setdefault(text.prompt, []).append(text)
        parts: list[list[Tokens]] = [[] for _ in self._urls]
        sizes = [0] * len(parts)
        for family in sorted(prompts.values(), key=lambda family: -sum(map(len, family))):
            least = sizes.index(min(sizes))
            parts[least] += family
            sizes[least] += sum(map(len, family))
        return [part for part in parts if part]

    def _ask(self, texts: list[Tokens], first: int) -> list[list[float]]:
        """Of the servers in turn, beginning with number `first`, until one answers."""
        end = time.monotonic() + PATIENCE
        for number in itertools.count(first):
            url = self._urls[number % len(self._urls)]
            try:
                if url in self._unchecked:
                    self._difference(url)
                return self._classify(url, texts)
            except AgainError as error:
                self._unchecked.add(url)
                if time.monotonic() > end:
                    raise BackendAwayError(f"no vLLM answers, the last one at {url}: {error}") from None
                if number - first >= len(self._urls) - 1:  # all were asked
                    time.sleep(_PAUSE)
        raise AssertionError

    def _difference(self, url: str) -> float:
        """As `check`, which says what a server that is away means; one that passes counts as checked."""
        try:
            served = _get(url, "/v1/models")["data"]
            longest, names = int(served[0]["max_model_len"]), {model["id"] for model in served}
        except (LookupError, TypeError, ValueError):
            raise PoiseError(f"{url} does not say what it serves; is it vLLM?") from None
        if longest < self._max_length:
            raise PoiseError(
                f"{url} reads at most {longest} tokens, and samples have up to {self._max_length}: set --max-length "
                f"{longest}, or vLLM's --max-model-len {self._max_length}"
            )
        if self._adapters.keys() - names:
            modules = " ".join(f"{name}={folder}" for name, folder in self._adapters.items())
            raise PoiseError(
                f"{url} does not serve the adapters of the heads; start vLLM with --enable-lora --max-loras "
                f"{len(self._adapters)} --lora-modules {modules}"
            )
        found = torch.tensor(self._classify(url, self._probe))
        difference = (found - self._expected).abs()
        allowed = _NOISE + _SHARE * self._expected.std(0).square().mean().sqrt()
        if not difference.square().mean().sqrt() <= allowed:
            raise PoiseError(
                f"{url} does not read as the checkpoint does: logits differ by up to {difference.max():.2g}. Does vLLM "
                f"serve this very folder, as it is, with --runner pooling?"
            )
        self._unchecked.discard(url)
        return difference.max().item()

    def _classify(self, url: str, texts: Sequence[Tokens]) -> list[list[float]]:
        """All labels of every text; of heads with adapters, those of head k from the model that is head k's."""
        if not self._adapters:
            return self._labels(url, texts, {})
        rows = [[0.0] * self._expected.shape[1] for _ in texts]
        for k, name in enumerate(self._adapters):
            own = slice(k, None, len(self._adapters))
            for row, answer in zip(rows, self._labels(url, texts, {"model": name}), strict=True):
                row[own] = answer[own]
        return rows

    def _labels(self, url: str, texts: Sequence[Tokens], more: Json) -> list[list[float]]:
        asked = {"input": [[*text.prompt, *text.completion] for text in texts], "use_activation": False, **more}
        answer = _get(url, "/classify", asked)
        labels = self._expected.shape[1]
        try:
            found = {row["index"]: [float(value) for value in row["probs"]] for row in answer["data"]}
            rows = [found[i] for i in range(len(texts))]
        except (LookupError, TypeError, ValueError):
            raise PoiseError(f"{url} did not answer with labels for each text") from None
        if any(len(row) != labels for row in rows):
            raise PoiseError(f"{url} answers with {len(rows[0])} labels, and the checkpoint has {labels}")
        return rows


def _get(url: str, path: str, value: Any = None) -> Any:
    """The JSON answer to a GET, or to a POST of a value. Raises AgainError, and PoiseError for a refusal."""
    body = None if value is None else json.dumps(value).encode()
    return ask(url + path, body, key=os.environ.get(KEY_VARIABLE, "").strip(), timeout=TIMEOUT)
