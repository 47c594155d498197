"""Requests to an ASGI application in this process, without a socket."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any, NamedTuple


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def call(
    app: Any,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    parts: Sequence[bytes | float | None] = (),
) -> Answer:
    """GET, or POST with a body. parts: the body piece by piece; a number waits, None is a disconnect."""
    pieces = list(parts) if parts else [body or b""]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        while pieces and isinstance(pieces[0], float):
            await asyncio.sleep(pieces.pop(0))
        if not pieces:
            await asyncio.Event().wait()
        part = pieces.pop(0)
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": bool(pieces)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "path": path,
        "method": "GET" if body is None and not parts else "POST", "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "server": ("test", 80), "client": ("test", 1),
        "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
    }  # fmt: skip
    await app(scope, receive, send)
    start = sent[0]
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], found, b"".join(message.get("body", b"") for message in sent[1:]))


async def post(app: Any, path: str, value: Any, **headers: str) -> Answer:
    return await call(app, path, json.dumps(value).encode(), headers)
