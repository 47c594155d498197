"""The ASGI application: who may ask, how much, and what is answered when something is wrong."""

import asyncio
import base64
import binascii
import contextlib
import functools
import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from poise import __version__
from poise.errors import first_line
from poise.serve.backend import BackendAwayError
from poise.serve.batching import QueueFullError
from poise.serve.forms import FORMS, BadRequestError, openapi, read
from poise.serve.metrics import Metrics
from poise.serve.rewards import BadSampleError, NoScaleYetError, Rewards

BODY_SECONDS = 30.0  # that a caller may take to send a body
RETRY_AFTER = 1  # seconds
REQUEST_HASH = "X-Poise-Request"


class Limits(NamedTuple):
    """What one request may hold."""

    max_bytes: int = 8 * 2**20
    max_completions: int = 1024
    max_characters: int = 2**21


class _RefusedError(Exception):
    def __init__(self, status: int, line: str, **headers: str):
        super().__init__(line)
        self.status, self.headers = status, headers


def make_app(rewards: Rewards, metrics: Metrics, limits: Limits = Limits(), token: str = "") -> Starlette:  # noqa: B008
    """All endpoints. token: what requests must carry; "" for none."""

    def guarded(
        path: str, answer: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """path: ours, whatever prefix the server is behind."""

        async def respond(request: Request) -> Response:
            start = time.perf_counter()
            try:
                if token and not _carries(request, token):
                    await _drain(request)
                    challenge = {"WWW-Authenticate": "Bearer"}
                    raise _RefusedError(401, "this server needs a bearer token", **challenge)
                response = await answer(request)
            except Exception as error:  # noqa: BLE001  the boundary: every error becomes one line
                response = _refusal(error)
            metrics.requests.labels(path, response.status_code).inc()
            metrics.seconds.labels(path).observe(time.perf_counter() - start)
            return response

        return respond

    async def score(path: str, request: Request) -> Response:
        form = FORMS[path]
        body = await _body(request, limits.max_bytes)
        hashed = hashlib.sha256(body).hexdigest()
        # Parsing a large body takes a while, too: in a thread, so that others are answered meanwhile.
        asked = (form, body, rewards.models.tokenizer, limits.max_completions, limits.max_characters)
        samples = await asyncio.to_thread(read, *asked) if len(body) > 2**16 else read(*asked)
        rows = await rewards(samples)
        metrics.scored(path, hashed, samples, rows)
        return JSONResponse({**form.answer(rows), "request": hashed}, headers={REQUEST_HASH: hashed})

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "alive", "version": __version__})

    async def readyz(_: Request) -> Response:
        if rewards.batcher.full:
            raise QueueFullError
        return JSONResponse({"status": "ready", "scale": rewards.ready, "objective": rewards.objective})

    async def show_metrics(_: Request) -> Response:
        metrics.waiting.set(rewards.batcher.waiting)
        sizes, rewards.batch_sizes = rewards.batch_sizes, []
        for size in sizes:
            metrics.batch.observe(size)
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    async def document(_: Request) -> Response:
        return JSONResponse(openapi(__version__))

    pages = {"/healthz": healthz, "/readyz": readyz, "/metrics": show_metrics, "/openapi.json": document}
    answers = {path: functools.partial(score, path) for path in FORMS} | pages
    # With a slash at the end, too: a redirect would name the scheme that a proxy before this server does not speak.
    routes = [
        Route(f"{path}{slash}", guarded(path, answer), methods=["POST" if path in FORMS else "GET"])
        for path, answer in answers.items() for slash in ("", "/")
    ]  # fmt: skip
    return Starlette(routes=routes)


def denied(line: str) -> Response:
    """What somebody gets who may not ask."""
    return _refusal(_RefusedError(401, line))


async def respond(app: Starlette, request: Request) -> Response:
    """The app's answer to a request that another server, such as Ray Serve's, has taken."""
    head: MutableMapping[str, Any] = {}
    parts: list[bytes] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            head.update(message)
        else:
            parts.append(message.get("body", b""))

    await app(request.scope, request.receive, send)
    response = Response(b"".join(parts), head["status"])
    response.raw_headers = list(head["headers"])
    return response


async def _body(request: Request, max_bytes: int) -> bytes:
    """The body, in limited size and time."""
    if (coding := request.headers.get("content-encoding", "identity")).lower() != "identity":
        await _drain(request)
        raise _RefusedError(415, f"a body in the coding {coding[:20]!r}; send it as it is")
    too_large = f"a body of more than {max_bytes} bytes; send less at once"
    said = request.headers.get("content-length", "")
    if "expect" in request.headers and said.isdigit() and int(said) > max_bytes:  # it asks before it sends
        raise _RefusedError(413, too_large, Connection="close")
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= max_bytes:
                    parts.append(part)
                else:  # it is read to its end and not kept, for the reason that `_drain` gives
                    parts.clear()
    except TimeoutError:
        line = f"the body took more than {BODY_SECONDS:g} s to arrive"
        raise _RefusedError(408, line, Connection="close") from None
    if size > max_bytes:
        raise _RefusedError(413, too_large)
    return b"".join(parts)


async def _drain(request: Request) -> None:
    """Read a body to its end before it is refused: the connection of a caller that is still sending would break, and
    the answer be lost. Whoever asks before it sends has sent nothing."""
    if "expect" in request.headers:
        return
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(BODY_SECONDS):
            async for _ in request.stream():
                pass


def _carries(request: Request, token: str) -> bool:
    """Does a request carry the token, as a bearer's, or as the password in http://poise:TOKEN@host?"""
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    return kind.lower() in ("bearer", "basic") and hmac.compare_digest(given.strip().encode(), token.encode())


def _refusal(error: Exception) -> Response:
    """A status and one line for what went wrong. Nothing that is no number ever looks like a reward."""
    retry = {"Retry-After": str(RETRY_AFTER)}
    if isinstance(error, _RefusedError):
        return JSONResponse({"error": str(error)}, error.status, headers=error.headers)
    if isinstance(error, BadRequestError):
        return JSONResponse({"error": str(error)}, error.status)
    if isinstance(error, BadSampleError):
        return JSONResponse({"error": str(error)}, 422)
    if isinstance(error, QueueFullError):
        return JSONResponse({"error": "too many completions wait; come again"}, 429, headers=retry)
    if isinstance(error, (NoScaleYetError, BackendAwayError)):
        return JSONResponse({"error": str(error)}, 503, headers=retry)
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody is there to read it
    return JSONResponse({"error": f"{type(error).__name__}: {first_line(error)}"}, 500)
