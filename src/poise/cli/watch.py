"""`poise watch`: the page of runs in progress, served on this machine only. It reads run folders and writes nothing."""

import http.server
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from poise.errors import PoiseError, first_line
from poise.runtime.progress import console
from poise.runtime.run_kinds import kind_of
from poise.runtime.settings import EachOnce, Settings, between

_HOST = "127.0.0.1"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Config(Settings):
    """Serve the page of run folders on this machine; it loads itself anew while a run goes on. Ctrl-C ends."""

    folders: Annotated[tyro.conf.Positional[tuple[str, ...]], EachOnce(), tyro.conf.arg(metavar="RUN [RUN …]")]
    """Run folders, in progress or finished."""
    port: Annotated[int, between(0, 65535)] = 8765
    """Port on 127.0.0.1; 0 takes a free one."""

    def check(self) -> None:
        """As for every command; and every folder is a run."""
        super().check()
        if not self.folders:
            raise PoiseError("name a run folder: poise watch RUN")
        for folder in self.folders:
            kind_of(folder)


def run(config: Config) -> None:
    """Serve until interrupted."""
    with server(config) as serving:
        console.print(f"http://{_HOST}:{serving.server_port}/ (Ctrl-C ends)", soft_wrap=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            console.print("stopped watching; the runs go on")


def server(config: Config) -> http.server.ThreadingHTTPServer:
    """The server, listening. PoiseError for a folder that is no run, or a port in use."""
    config.check()
    pages = _Pages([Path(folder) for folder in config.folders])

    class Handler(_Handler):
        def page(self) -> str:
            return pages.current()

    try:
        return http.server.ThreadingHTTPServer((_HOST, config.port), Handler)
    except OSError as error:
        raise PoiseError(f"cannot serve on port {config.port}: {first_line(error)}; choose another --port") from None


class _Pages:
    """The page of some runs, made again only if they have written something."""

    def __init__(self, folders: list[Path]):
        self._folders, self._text, self._made = folders, "", -1.0
        self._lock = threading.Lock()

    def current(self) -> str:
        from poise.reports import live, run_pages  # draws figures

        with self._lock:
            newest = live.last_change(self._folders)
            if newest > self._made:
                self._text = run_pages.html(self._folders)
                self._made = newest
            return self._text


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET / for browsers that ask for this machine by its name: another site's page must not read a run."""

    def page(self) -> str:
        raise NotImplementedError

    def do_GET(self) -> None:
        host = re.sub(r":\d+$", "", self.headers.get("Host", ""))
        if host not in (_HOST, "localhost"):
            self._send(403, "this page is for 127.0.0.1 only")
        elif self.path.partition("?")[0] not in ("/", "/report.html"):
            self._send(404, "no such page")
        else:
            try:
                self._send(200, self.page(), "text/html")
            except PoiseError as error:
                self._send(503, f"{error}; load again", refresh=True)

    def _send(self, status: int, text: str, kind: str = "text/plain", *, refresh: bool = False) -> None:
        body = text.encode("utf-8", "backslashreplace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if refresh:
            self.send_header("Refresh", "5")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page that loads itself anew would fill the terminal."""
