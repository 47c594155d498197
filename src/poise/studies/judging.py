"""A page on this machine's own loopback address, on which a person judges the comparisons of `poise choose`."""

import html
import json
import secrets
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs

from poise.data.types import Prompt
from poise.runtime.display import visible
from poise.runtime.run_folder import Json, append_jsonl

ANSWERS = {"a": "A is better", "b": "B is better", "tie": "No difference"}
_LARGEST = 1000  # bytes of an answer
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c;
  background: #fff }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: 0; padding: .8rem; border: 1px solid #bbb;
  border-radius: .4rem }}
.two {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem }}
h1 {{ font-size: 1.2rem }} h2 {{ font-size: 1rem; margin: 1rem 0 .3rem }}
button {{ font: inherit; padding: .5rem 1.2rem; margin: 1.2rem .6rem 0 0 }}
</style>
<h1>{title}</h1>{body}</html>"""


class Judging(HTTPServer):
    """Shows one comparison at a time; every answer is saved when it is given. `serve` returns when all are judged.

    It listens on 127.0.0.1 alone, and answers only at an address that holds a token of this server.
    """

    timeout = 0.5  # seconds after which `serve` looks again whether all are judged

    def __init__(self, comparisons: Sequence[Json], judged: Mapping[int, str], path: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.comparisons, self.judged, self.path = comparisons, dict(judged), path
        self.token = secrets.token_urlsafe(16)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.token}"

    def serve(self) -> dict[int, str]:
        """Every comparison's answer, by its number."""
        while len(self.judged) < len(self.comparisons):
            self.handle_request()
        return self.judged

    def next(self) -> Json | None:
        """The first comparison that is not judged."""
        return next((row for row in self.comparisons if row["id"] not in self.judged), None)

    def answer(self, number: int, better: str) -> None:
        """Save a judgment; the first one of a comparison stays."""
        if number not in self.judged:
            append_jsonl(self.path, [{"id": number, "better": better}])
            self.judged[number] = better

    def page(self) -> str:
        """The next comparison, or thanks."""
        row = self.next()
        if row is None:
            return _PAGE.format(title="All are judged", body="<p>Thank you. This page may be closed.</p>")
        buttons = "".join(
            f'<button name="better" value="{value}" accesskey="{value[0]}">{says}</button>'
            for value, says in ANSWERS.items()
        )
        body = (
            f"<h2>Prompt</h2><pre>{_shown(_text(row['prompt']))}</pre><div class='two'>"
            f"<div><h2>A</h2><pre>{_shown(row['a'])}</pre></div><div><h2>B</h2><pre>{_shown(row['b'])}</pre></div></div>"
            f"<form method='post'><input type='hidden' name='id' value='{row['id']}'>{buttons}</form>"
        )
        done = f"Which answer is better? {len(self.judged) + 1} of {len(self.comparisons)}"
        return _PAGE.format(title=done, body=body)


class _Handler(BaseHTTPRequestHandler):
    server: Judging
    timeout = 30

    def do_GET(self) -> None:
        if self._allowed():
            self._send(200, self.server.page())

    def do_POST(self) -> None:
        if not self._allowed():
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isdigit() and int(length) <= _LARGEST):
            self._send(400, "an answer was expected")
            return
        fields = parse_qs(self.rfile.read(int(length)).decode("utf-8", "replace"))
        number, better = fields.get("id", [""])[0], fields.get("better", [""])[0]
        known = number.isascii() and number.isdigit() and int(number) < len(self.server.comparisons)
        if not known or better not in ANSWERS:
            self._send(400, "an answer was expected")
            return
        self.server.answer(int(number), better)
        self._send(200, self.server.page())

    def _allowed(self) -> bool:
        """Asked at the whole address, and by its name: a page elsewhere cannot have it."""
        port = self.server.server_port
        ours = self.headers.get("Host") in (f"127.0.0.1:{port}", f"localhost:{port}")
        if ours and secrets.compare_digest(self.path.encode(), f"/{self.server.token}".encode()):
            return True
        self._send(404, "no such page")
        return False

    def _send(self, status: int, text: str) -> None:
        content = text.encode("utf-8")
        self.send_response(status)
        for name, value in {
            "Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the address would be in it."""


def _text(prompt: Prompt) -> str:
    """A conversation as its turns, one below the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(
        f"{turn['role']}: {content if isinstance(content := turn['content'], str) else json.dumps(content)}"
        for turn in prompt
    )


def _shown(text: str) -> str:
    return html.escape(visible(text))
