"""The backend that reads with vLLM: one reward model, in one or several vLLM servers.

Here a sample becomes token ids, there ids become all 2K labels (`/classify`). vLLM never renders or truncates: its own
chat template might end a turn elsewhere than where the score is read. Before a server is asked it must answer for a few
texts as the checkpoint itself does, read here on the CPU: vLLM could hold other weights, squeeze labels into
probabilities, or round. The same check is made again of a server that was away.
"""

import http.client
import itertools
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
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
from poise.models.reward_model import heads_fingerprint, read_layout
from poise.models.scorer import Scorer
from poise.runtime.progress import console
from poise.runtime.records import parse_json
from poise.serve.backend import BackendAwayError, Member, Read, RewardModels
from poise.serve.client import OPENER
from poise.serve.config import ServeConfig

KEY_VARIABLE = "VLLM_API_KEY"  # vLLM's own
PATIENCE = 10.0  # seconds in which an answer is looked for, at all servers in turn; after it, callers get a 503
TIMEOUT = 120.0  # seconds for one answer
_PAUSE = 0.25
_NOISE = 1e-4  # of float32
_SHARE = 0.25  # of the spread between texts, that rounding may change: .08 in bfloat16 (LOG.md, 2026-11-28)
_AGAIN = {408, 429}
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
    (path,) = config.rewards
    if (Path(path) / ENSEMBLE_FILE).exists():
        raise PoiseError(f"--backend vllm reads one reward model, and {path} is an ensemble; serve it with local")
    layout = read_layout(path)
    if layout.adapters:
        raise PoiseError(
            f"the heads of {path} have adapters of their own, which vLLM does not read; serve it with local"
        )
    layout = layout.with_reference(None)  # distances need features, and vLLM gives labels only
    layout.check_objective(config.objective)
    scorer = Scorer.load(path, config.max_length, place=torch.device("cpu"))
    encoder = scorer.extract.without_weights()
    probe = [encoder.encode(sample) for sample in PROBE]
    expected = scorer.extract.forward(probe) @ scorer.weight.T
    del scorer
    servers = Servers(config.url, probe, expected, encoder.max_length)
    for url in config.url:
        difference = servers.check(url)
        console.print(f"{url} reads as {path} does, to {difference:.0e}", markup=False, soft_wrap=True)
    member = Member(0, slice(0, layout.num_labels), layout)
    return RewardModels([encoder], [servers], [member], layout, heads_fingerprint(path))


class Servers:
    """vLLM servers of one reward model: a `Backend`."""

    def __init__(
        self, urls: Sequence[str], probe: Sequence[Tokens], expected: Float[Tensor, "texts labels"], max_length: int
    ):
        """probe: texts with logits that every server must answer with. max_length: longest sample in tokens."""
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
        except _AwayError as error:
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
            except _AwayError as error:
                self._unchecked.add(url)
                if time.monotonic() > end:
                    raise BackendAwayError(f"no vLLM answers, the last one at {url}: {error}") from None
                if number - first >= len(self._urls) - 1:  # all were asked
                    time.sleep(_PAUSE)
        raise AssertionError

    def _difference(self, url: str) -> float:
        """As `check`, which says what a server that is away means; one that passes counts as checked."""
        try:
            longest = int(_get(url, "/v1/models")["data"][0]["max_model_len"])
        except (LookupError, TypeError, ValueError):
            raise PoiseError(f"{url} does not say what it serves; is it vLLM?") from None
        if longest < self._max_length:
            raise PoiseError(
                f"{url} reads at most {longest} tokens, and samples have up to {self._max_length}: set --max-length "
                f"{longest}, or vLLM's --max-model-len {self._max_length}"
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
        asked = {"input": [[*text.prompt, *text.completion] for text in texts], "use_activation": False}
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


class _AwayError(Exception):
    """No answer; another server, or the same one later, may give it."""


def _get(url: str, path: str, value: Any = None) -> Any:
    """The JSON answer to a GET, or to a POST of a value. Raises _AwayError, and PoiseError for a refusal."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE, ""):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url + path, None if value is None else json.dumps(value).encode(), headers)
    try:
        with OPENER.open(request, timeout=TIMEOUT) as response:
            return parse_json(response.read())
    except urllib.error.HTTPError as error:
        with error:
            said = f"{error.code} {error.reason}"
            if error.code >= 500 or error.code in _AGAIN:
                raise _AwayError(said) from None
            raise PoiseError(f"{url}{path} refuses: {said}: {_message(error.read)}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _AwayError(str(getattr(error, "reason", error)) or type(error).__name__) from None
    except ValueError:
        raise PoiseError(f"{url}{path} did not answer in JSON") from None


def _message(read: Callable[[], bytes]) -> str:
    """What vLLM says of an error."""
    try:
        said = parse_json(read())["error"]
        return str(said["message"] if isinstance(said, dict) else said)[:200]
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException):
        return "no reason given"
