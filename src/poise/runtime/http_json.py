"""JSON over HTTP: one request, which is answered, refused, or worth another try. It needs the standard library only."""

import email.utils
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Container, Mapping
from typing import Any

from poise import __version__
from poise.errors import PoiseError
from poise.runtime.records import parse_json


class _Stays(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would ask again without the body, and give the key to whatever host is named."""

    def redirect_request(self, *_: Any) -> None:
        return None


def make_opener(*handlers: urllib.request.BaseHandler) -> urllib.request.OpenerDirector:
    """An opener that goes nowhere but to the address that it is given."""
    return urllib.request.build_opener(_Stays, *handlers)


# Not through a proxy that the environment names for the internet.
OPENER = make_opener(urllib.request.ProxyHandler({}))
AGAIN = frozenset({408, 429, *range(500, 600)})  # statuses after which another try may be answered


class RefusedError(PoiseError):
    """The server answered, and another try would be answered alike. status: what it answered."""

    def __init__(self, line: str, status: int = 0):  # of a line alone, as pickle makes it in another process
        super().__init__(line)
        self.status = status


class AgainError(Exception):
    """Worth another try. status: what was answered, 408 if an answer took too long, 0 if nobody was reached; after:
    seconds that the server asks to wait."""

    def __init__(self, line: str, status: int = 0, after: str = ""):
        super().__init__(line)
        self.status, self.after = status, _seconds(after)


def ask(
    url: str,
    body: bytes | None = None,
    *,
    key: str = "",
    timeout: float,
    again: Container[int] = AGAIN,
    opener: urllib.request.OpenerDirector = OPENER,
    parse_constant: Callable[[str], Any] | None = None,
) -> Any:
    """The JSON answer to a POST of `body`, or to a GET. Redirects are refused.

    key: bearer token. timeout: in seconds. parse_constant: as of `json.loads`; what it raises is passed on.
    Raises AgainError where nothing was answered, or one of the statuses `again`; RefusedError for any other, and
    PoiseError for what is not JSON. All say what the server said, on one line.
    """
    if not key.isascii() or not key.isprintable() or key != key.strip():  # http.client would show it in its error
        raise PoiseError(f"{url}: the key must be one line of plain characters")
    # Some servers' gateways refuse urllib by its name.
    headers = {"Content-Type": "application/json", "User-Agent": f"poise/{__version__}"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    try:
        with opener.open(urllib.request.Request(url, body, headers), timeout=timeout) as response:
            return parse_json(response.read(), parse_constant=parse_constant)
    except urllib.error.HTTPError as error:
        with error:
            said = f"{error.code} {_message(error.read) or error.reason}"
            if place := error.headers.get("Location") if 300 <= error.code < 400 else None:
                said = f"{error.code}, the answer is at {place[:300]}; give that address, if you trust it"
            if error.code in again:
                raise AgainError(said, error.code, error.headers.get("Retry-After", "")) from None
        raise RefusedError(f"{url}: {said}", error.code) from None
    except TimeoutError as error:  # of an answer; that of a connection is an URLError
        raise AgainError(str(error) or "timed out", 408) from None
    except (OSError, http.client.HTTPException) as error:  # also URLError
        raise AgainError(str(getattr(error, "reason", error)) or type(error).__name__) from None
    except ValueError as error:
        raise PoiseError(f"{url} did not answer in JSON: {error}") from None


def _message(read: Callable[[], bytes]) -> str:
    """What a server says of an error, on one line: its `error`, that one's `message`, or the whole text."""
    try:
        content = read()
    except (OSError, http.client.HTTPException):
        return ""
    try:
        return said_of(parse_json(content)["error"])
    except (ValueError, LookupError, TypeError):
        return said_of(content.decode("utf-8", "replace"))


def said_of(error: Any) -> str:
    """What the `error` of an answer says, on one line; LookupError for an object without a message."""
    return " ".join(str(error["message"] if isinstance(error, Mapping) else error).split())[:300]


def _seconds(after: str) -> float:
    """The seconds of a Retry-After header, which may be a date; 0 for what is neither, and for the past.

    >>> _seconds("7"), _seconds("0.5"), _seconds("Wed, 21 Oct 2015 07:28:00 GMT"), _seconds("soon")
    (7.0, 0.5, 0.0, 0.0)
    """
    try:
        seconds = float(after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if seconds > 0 else 0.0
