"""A client of `poise serve` for training scripts. It needs the standard library only, no torch.

    from poise.serve.client import Client

    rows = Client("http://127.0.0.1:8400").score("Review a film.", ["A warm, funny film."])
    rows[0]["reward"], rows[0]["mean"]

It asks again while the server is restarted or has too much to do, and never makes up a number: what cannot be scored
raises PoiseError.
"""

import asyncio
import functools
import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from poise.errors import PoiseError
from poise.runtime.http_json import AgainError, ask
from poise.runtime.settings import NotNegative, Positive, check_address, check_value

URL_VARIABLE, TOKEN_VARIABLE = "POISE_URL", "POISE_TOKEN"
DEFAULT_URL = "http://127.0.0.1:8400"
_OFTEN = 3  # a server that starts, or waits for the other callers' texts, says "later" once or twice
_AGAIN = {408, 429, 502, 503, 504}  # not 500: the reward model is broken
_LONGEST_WAIT = 10.0
_CONCURRENT = 64
_LARGEST = 3e38
_ENDPOINTS = ("score", "get_reward", "remote_rm")
_LOG = logging.getLogger("poise")
T = TypeVar("T")


class Client:
    """One reward server.

    url, token: by default from POISE_URL and POISE_TOKEN.
    timeout: seconds for one answer. patience: seconds over which a request is sent again, for a server that is
    restarted, slow or full.
    Raises PoiseError for what is no address, token or number of seconds.
    """

    def __init__(self, url: str = "", token: str = "", timeout: float = 120.0, patience: float = 600.0):
        # A variable that a shell read from a file may end in a newline, or be empty.
        address = url or os.environ.get(URL_VARIABLE, "").strip() or DEFAULT_URL
        key = token or os.environ.get(TOKEN_VARIABLE, "").strip()
        check_address("reward server", str(address))
        if (last := str(address).rstrip("/").rpartition("/")[2]) in _ENDPOINTS:
            raise PoiseError(f"reward server {address}: give the address without /{last}")
        check_value("timeout", timeout, Positive)
        check_value("patience", patience, NotNegative)
        if not isinstance(key, str) or not key.isascii() or not key.isprintable() or key != key.strip():
            raise PoiseError("the token of the reward server must be one line of plain characters")
        self.url, self.token = str(address).rstrip("/"), key
        self.timeout, self.patience = timeout, patience
        self._threads: tuple[int, ThreadPoolExecutor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without threads: a copy, or the client of a worker process, starts its own."""
        return {**self.__dict__, "_threads": None}

    def score(self, prompt: str | Sequence[Any], completions: Sequence[str]) -> list[dict[str, Any]]:
        """One row per completion of a prompt (text, or turns): reward, mean and std of every head, uncertainties.

        Raises PoiseError for what the server refuses, and if it gave no answer within `patience`.
        """
        texts = _texts("completions", completions)
        rows = self.post("/score", {"prompt": _prompt(prompt), "completions": texts}).get("scores")
        if not isinstance(rows, list) or len(rows) != len(texts) or not all(map(_is_row, rows)):
            raise PoiseError(f"{self.url} gave no reward for each completion")
        return rows

    def one(self, prompt: str | Sequence[Any], response: str) -> dict[str, Any]:
        """Reward and every number of one answer, by name; its prompt and end token may be as rendered."""
        [text] = _texts("responses", [response])
        answer = self.post("/remote_rm", {"prompt": _prompt(prompt), "response": text})
        found = {name: value for name, value in answer.items() if name != "request"}
        if "reward" not in found or not all(map(_is_reward, found.values())):
            raise PoiseError(f"{self.url} gave no reward, or what is no number beside it")
        return found

    async def aone(self, prompt: str | Sequence[Any], response: str) -> dict[str, Any]:
        """As `one`, without blocking the event loop."""
        return await self._in_thread(self.one, prompt, response)

    async def ascore(self, prompt: str | Sequence[Any], completions: Sequence[str]) -> list[dict[str, Any]]:
        """As `score`, without blocking the event loop; up to 64 at once."""
        return await self._in_thread(self.score, prompt, completions)

    def post(self, path: str, value: dict[str, Any]) -> dict[str, Any]:
        """The JSON answer to a JSON request. Raises as `score` does."""
        try:
            body = json.dumps(value, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise PoiseError(f"{self.url}{path} cannot be asked: {error}") from None
        end, wait, tries, said = time.monotonic() + self.patience, 0.25, 0, False
        while True:
            tries += 1
            try:
                return self._once(path, body)
            except AgainError as error:
                pause = min(max(error.after, wait * (0.5 + random.random())), _LONGEST_WAIT)
                if time.monotonic() + pause > end:
                    line = f"{self.url}{path} gave no answer in {self.patience:g} s: {error}"
                    raise PoiseError(line) from None
                # Nobody there: perhaps the address is wrong. One who says "later" each time may wait for more texts.
                if not said and (not error.status or (error.status == 503 and tries == _OFTEN)):
                    said = True
                    _LOG.warning("%s: %s; asking again for %g s", self.url, error, self.patience)
                time.sleep(pause)
                wait = min(2 * wait, _LONGEST_WAIT)

    async def apost(self, path: str, value: dict[str, Any]) -> dict[str, Any]:
        """As `post`, without blocking the event loop."""
        return await self._in_thread(self.post, path, value)

    def of_queries(self, queries: Sequence[str], prompts: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """Rewards of prompts with their answers, as rendered, and the means of every other number by name."""
        asked, given = _texts("queries", queries), _texts("prompts", prompts)
        if len(asked) != len(given):
            raise PoiseError(f"{len(asked)} queries and {len(given)} prompts; there must be one for each")
        answer = self.post("/get_reward", {"query": asked, "prompts": given})
        rewards, logs = answer.get("rewards"), answer.get("extra_logs")
        if not isinstance(rewards, list) or len(rewards) != len(asked) or not all(map(_is_reward, rewards)):
            raise PoiseError(f"{self.url} gave no reward for each query")
        if not isinstance(logs, dict) or not all(map(_is_reward, logs.values())):
            raise PoiseError(f"{self.url} gave what is no number beside the rewards")
        return rewards, logs

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        if self._threads is None or self._threads[0] != os.getpid():  # a fork has its parent's pool without its threads
            self._threads = os.getpid(), ThreadPoolExecutor(_CONCURRENT, "poise-client")
        return await asyncio.get_running_loop().run_in_executor(self._threads[1], call, *arguments)

    def _once(self, path: str, body: bytes) -> dict[str, Any]:
        try:
            answer = ask(
                self.url + path, body, key=self.token, timeout=self.timeout, again=_AGAIN, parse_constant=_refuse
            )
        except _NoNumberError as error:
            raise PoiseError(f"{self.url}{path} gave no reward, but {error}") from None
        if not isinstance(answer, dict) or answer.get("request") != hashlib.sha256(body).hexdigest():
            raise PoiseError(f"{self.url}{path} answered another request than this one")
        return answer


class _NoNumberError(Exception):
    """NaN or an infinity where numbers are."""


def _refuse(constant: str) -> None:
    raise _NoNumberError(constant)


def _texts(what: str, given: Any) -> list[str]:
    """A list of texts. PoiseError for one text, whose letters would be asked for one by one, and for other types."""
    if isinstance(given, (str, bytes)):
        raise PoiseError(f"{what} are a list of texts, not one text")
    if isinstance(given, Mapping) or not hasattr(given, "__iter__") or not getattr(given, "ndim", 1):
        raise PoiseError(f"{what} are a list of texts, not {type(given).__name__}")
    texts = list(given)
    if wrong := next(
        (f"number {i} is {type(text).__name__}" for i, text in enumerate(texts, 1) if not isinstance(text, str)), ""
    ):
        raise PoiseError(f"{what} are a list of texts, and {wrong}")
    return texts


def _prompt(given: Any) -> Any:
    """Text, or turns as a list. PoiseError for another type; what the turns hold is for the server to say."""
    prompt = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(prompt, (str, list, tuple)):
        raise PoiseError(f"a prompt is text or a list of turns, not {type(given).__name__}")
    return prompt


def _is_reward(value: Any) -> bool:
    """A number that float32 holds, too."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST


def _is_row(value: Any) -> bool:
    """A reward with the means of its heads and as many stds."""
    if not isinstance(value, dict) or not _is_reward(value.get("reward")):
        return False
    mean, std = value.get("mean"), value.get("std")
    return isinstance(mean, list) and isinstance(std, list) and all(map(_is_reward, (*mean, *std)))


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """A row as numbers only: `head_0` … and `head_std_0` … for the lists; what is no number is left out.

    >>> scalars({"reward": 1.0, "gap": 0.5, "mean": [1.0, 2.0], "std": [0.1, 0.2], "truncated": False})
    {'reward': 1.0, 'gap': 0.5, 'truncated': 0.0, 'head_0': 1.0, 'head_1': 2.0, 'head_std_0': 0.1, 'head_std_1': 0.2}
    """
    plain = {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}
    means = {f"head_{k}": value for k, value in enumerate(row["mean"])}
    return plain | means | {f"head_std_{k}": value for k, value in enumerate(row["std"])}


@functools.cache
def own_client() -> Client:
    """The client of this process, with url and token from the environment: made once, for functions that keep none."""
    return Client()
