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
import http.client
import json
import math
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from poise.errors import PoiseError
from poise.runtime.records import parse_json

URL_VARIABLE, TOKEN_VARIABLE = "POISE_URL", "POISE_TOKEN"
DEFAULT_URL = "http://127.0.0.1:8400"
_AGAIN = {408, 429, 502, 503, 504}
_LONGEST_WAIT = 10.0
_CONCURRENT = 64
T = TypeVar("T")


class Client:
    """One reward server.

    url, token: by default from POISE_URL and POISE_TOKEN.
    timeout: seconds for one answer. patience: seconds over which a request is sent again, for a server that is
    restarted, slow or full.
    """

    def __init__(self, url: str = "", token: str = "", timeout: float = 120.0, patience: float = 600.0):
        self.url = (url or os.environ.get(URL_VARIABLE, "") or DEFAULT_URL).rstrip("/")
        self.token = token or os.environ.get(TOKEN_VARIABLE, "")
        self.timeout, self.patience = timeout, patience
        self._threads: ThreadPoolExecutor | None = None

    def score(self, prompt: str | Sequence[Any], completions: Sequence[str]) -> list[dict[str, Any]]:
        """One row per completion of a prompt (text, or turns): reward, mean and std of every head, uncertainties.

        Raises PoiseError for what the server refuses, and if it gave no answer within `patience`.
        """
        answer = self.post("/score", {"prompt": prompt, "completions": list(completions)})
        rows: list[dict[str, Any]] = answer["scores"]
        if len(rows) != len(completions) or not all(_is_reward(row.get("reward")) for row in rows):
            raise PoiseError(f"{self.url} gave no reward for each completion")
        return rows

    async def ascore(self, prompt: str | Sequence[Any], completions: Sequence[str]) -> list[dict[str, Any]]:
        """As `score`, without blocking the event loop; up to 64 at once."""
        return await self._in_thread(self.score, prompt, completions)

    def post(self, path: str, value: dict[str, Any]) -> dict[str, Any]:
        """The JSON answer to a JSON request. Raises as `score` does."""
        body = json.dumps(value).encode()
        end, wait = time.monotonic() + self.patience, 0.25
        while True:
            try:
                return self._once(path, body)
            except _AgainError as error:
                pause = min(max(error.after, wait * (0.5 + random.random())), _LONGEST_WAIT)
                if time.monotonic() + pause > end:
                    line = f"{self.url}{path} gave no answer in {self.patience:g} s: {error}"
                    raise PoiseError(line) from None
                time.sleep(pause)
                wait = min(2 * wait, _LONGEST_WAIT)

    async def apost(self, path: str, value: dict[str, Any]) -> dict[str, Any]:
        """As `post`, without blocking the event loop."""
        return await self._in_thread(self.post, path, value)

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_CONCURRENT, "poise-client")
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    def _once(self, path: str, body: bytes) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with OPENER.open(request, timeout=self.timeout) as response:
                answer = parse_json(response.read(), parse_constant=_refuse)
        except urllib.error.HTTPError as error:
            with error:
                said = _line(error)
                if error.code in _AGAIN:
                    raise _AgainError(said, error.headers.get("Retry-After", "")) from None
            raise PoiseError(f"{self.url}{path}: {said}") from None
        except (OSError, http.client.HTTPException) as error:  # also URLError and timeouts
            raise _AgainError(str(getattr(error, "reason", error)) or type(error).__name__) from None
        except _NoNumberError as error:
            raise PoiseError(f"{self.url}{path} gave no reward, but {error}") from None
        except ValueError as error:
            raise PoiseError(f"{self.url}{path} did not answer in JSON: {error}") from None
        if not isinstance(answer, dict) or answer.get("request") != hashlib.sha256(body).hexdigest():
            raise PoiseError(f"{self.url}{path} answered another request than this one")
        return answer


class _AgainError(Exception):
    """Worth another try, after so many seconds."""

    def __init__(self, line: str, after: str = ""):
        super().__init__(line)
        self.after = float(after) if after.isdigit() else 0.0


class _NoNumberError(Exception):
    """NaN or an infinity where numbers are."""


def _refuse(constant: str) -> None:
    raise _NoNumberError(constant)


# Rewards are not sent through a proxy that the environment names for the internet.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _line(error: urllib.error.HTTPError) -> str:
    try:
        return f"{error.code} {parse_json(error.read())['error']}"
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        return f"{error.code} {error.reason}"


def _is_reward(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """A row as numbers only, the same names for every row: `head_0` … and `head_std_0` … for the lists.

    >>> scalars({"reward": 1.0, "gap": 0.5, "mean": [1.0, 2.0], "std": [0.1, 0.2], "truncated": False})
    {'reward': 1.0, 'gap': 0.5, 'truncated': 0.0, 'head_0': 1.0, 'head_1': 2.0, 'head_std_0': 0.1, 'head_std_1': 0.2}
    """
    plain = {name: float(value) for name, value in row.items() if name not in ("mean", "std")}
    means = {f"head_{k}": value for k, value in enumerate(row["mean"])}
    return plain | means | {f"head_std_{k}": value for k, value in enumerate(row["std"])}


@functools.cache
def own_client() -> Client:
    """The client of this process, with url and token from the environment: made once, for functions that keep none."""
    return Client()
