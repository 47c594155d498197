"""For the tests in tests/engines: the conversations that every engine asks about, a server, and a wire to it.

`Wire` records what an engine sent, and can answer with a fault in the server's place.
"""

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]

QUESTION = [{"role": "user", "content": "Review the film."}]
CONVERSATIONS: list[tuple[list[dict[str, str]], str]] = [
    (QUESTION, "It is a good film."),
    (QUESTION, "It is a bad film, really."),
    (QUESTION, "Bad."),
    ([{"role": "system", "content": "Be kind."}, *QUESTION], "It was fine: 10 € well spent.\n\nReally."),
    (
        [*QUESTION, {"role": "assistant", "content": "Which?"}, {"role": "user", "content": "That one — “Đ”."}],
        "Not great, not awful.",
    ),
    ([{"role": "user", "content": "Review the phone. " + "It is a phone. " * 30}], "A great phone, I love it."),
]  # the last one is longer than the model's context


class Server:
    """`poise serve` in a process of its own, at one port through all restarts."""

    def __init__(self, model: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        program = "import sys; from poise.cli.main import main; sys.exit(main())"
        self._command = [sys.executable, "-c", program, "serve", model, "--port", str(self.port)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(self._command, env=environment, stderr=subprocess.DEVNULL)
        while wait:
            try:
                with urllib.request.urlopen(self.url + "/readyz"):
                    return
            except (OSError, http.client.HTTPException):
                assert self._process.poll() is None, "the server ended"
                time.sleep(0.1)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            assert self._process.wait(60) == 0
            self._process = None


class Call(NamedTuple):
    """One request that an engine or its adapter sent, and its answer."""

    path: str
    request: Any
    status: int
    answer: Any


class Wire:
    """A port that hands requests on to the server and remembers them."""

    def __init__(self, server: Server):
        self.calls: list[Call] = []
        self.fault: Callable[[bytes], tuple[int, bytes] | None] | None = None  # None: no answer
        self._to = server.url
        wire = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if wire.fault is not None:
                    faulty = wire.fault(body)
                    if faulty is None:
                        return
                    status, answer = faulty
                else:
                    try:
                        status, answer = wire.forward(self.path, body)
                    except OSError:
                        return  # hangs up, as a server that is away would
                wire.calls.append(Call(self.path, json.loads(body), status, json.loads(answer)))
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def forward(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of the server's own answer."""
        try:
            with urllib.request.urlopen(urllib.request.Request(self._to + path, body)) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Reference(NamedTuple):
    """The rewards of CONVERSATIONS, which the scorer, the command and the server agree on."""

    rewards: list[float]
    difference: float  # the largest between the three

    def difference_to(self, rewards: list[float]) -> float:
        """The largest difference, which must be less than 1e-5; also to the three's own."""
        assert len(rewards) == len(self.rewards)
        found = max(abs(one - other) for one, other in zip(rewards, self.rewards, strict=True))
        assert found < 1e-5
        return max(found, self.difference)


def answering(number: str, **content: Any) -> Callable[[bytes], tuple[int, bytes]]:
    """A fault: a good answer but for one number, such as NaN."""

    def fault(body: bytes) -> tuple[int, bytes]:
        answer = json.dumps({**content, "request": hashlib.sha256(body).hexdigest()})
        assert "0.5" in answer
        return 200, answer.replace("0.5", number, 1).encode()

    return fault


BROKEN = (500, b'{"error": "a reward is not finite: the reward model is broken"}')  # what the server says of NaN


def place(request: dict[str, Any]) -> int:
    """Which conversation a request is about."""
    text = request["response"] if "response" in request else request.get("completions", request.get("query"))[0]
    answer = text.removesuffix("<|im_end|>")
    return next(i for i, (_, expected) in enumerate(CONVERSATIONS) if answer.endswith(expected))


def remember(name: str, calls: list[Call], **result: Any) -> None:
    """The dated result of an engine's test; and its first call for each conversation, for tests/serve/recorded.

    result: also `version`, for an engine that is not installed.
    """
    if path := os.environ.get("ENGINE_RESULT"):
        version = result.pop("version", "") or metadata.version(name)
        content = {
            "engine": name, "version": version, "date": time.strftime("%Y-%m-%d"),
            "python": ".".join(map(str, sys.version_info[:3])), "conversations": len(CONVERSATIONS),
        }  # fmt: skip
        Path(path).write_text(json.dumps({**content, **result}, indent=1) + "\n")
        first: dict[int, Call] = {}
        for call in calls:
            first.setdefault(place(call.request), call)
        kept = [{"path": first[i].path, "request": first[i].request, "answer": sorted(first[i].answer)} for i in first]
        kept.sort(key=lambda call: place(call["request"]))
        recorded = Path(path).with_name("recorded.json")
        recorded.write_text(json.dumps({**content, "calls": kept}, indent=1, ensure_ascii=False) + "\n")
