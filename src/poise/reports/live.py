"""Pages of runs in progress, written anew while the run goes on."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from poise.errors import PoiseError
from poise.reports import run_pages
from poise.reports.blocks import RELOAD_SECONDS


@contextlib.contextmanager
def refreshed(folder: Path, seconds: float = RELOAD_SECONDS) -> Iterator[None]:
    """Write FOLDER/report.html every so many seconds while the block runs, whenever the run has made something new.

    A page that cannot be made yet is left for the next time: the run never fails by its page. A page takes at most a
    twentieth of the time. At most one process of a run should do this.
    """
    ended = threading.Event()

    def keep_writing() -> None:
        seen, pause = 0.0, min(seconds, 5.0)
        while not ended.wait(pause):
            started, newest = time.monotonic(), last_change([folder])
            if newest > seen:
                with contextlib.suppress(PoiseError, OSError):
                    run_pages.build([folder], folder / run_pages.NAME)
                seen = newest
            pause = max(seconds, 20 * (time.monotonic() - started))

    thread = threading.Thread(target=keep_writing, name="page", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def last_change(folders: Sequence[Path]) -> float:
    """When a file that a page reads was last written; 0.0 before there is one."""
    found = 0.0
    for folder in folders:
        for pattern in ("*.json", "*.jsonl", "config.yaml", "*/*.json", "*/*.jsonl"):
            for path in folder.glob(pattern):
                with contextlib.suppress(OSError):
                    found = max(found, os.stat(path).st_mtime)
    return found
