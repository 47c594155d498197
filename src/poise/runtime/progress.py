"""Long stages: progress bars with time left, one look for all; and stopping without losing what was done."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from poise.runtime.processes import process_index

console = Console(stderr=True, highlight=False)
_parts_of_another = 0


@contextlib.contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yield `advance(count, note="")`. On a terminal a live bar; in a log file one line when the stage ends.

    Of several processes the first one shows it.
    """
    columns = (  # 80 characters wide with a note, so that nothing is cut off in a plain terminal
        TextColumn("{task.description}"), BarColumn(bar_width=10), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("left"), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=process_index() > 0 or _parts_of_another > 0) as bar:
        task = bar.add_task(label, total=total, completed=done, note="")

        def advance(count: int = 1, note: str = "") -> None:
            bar.advance(task, count)
            if note:
                bar.update(task, note=note)

        yield advance


@contextlib.contextmanager
def parts_of_another() -> Iterator[None]:
    """No bars within: their stages are parts of one whose own bar is shown."""
    global _parts_of_another
    _parts_of_another += 1
    try:
        yield
    finally:
        _parts_of_another -= 1


@contextlib.contextmanager
def finish_the_step() -> Iterator[Callable[[], bool]]:
    """Yield `asked_to_stop()`. Ctrl-C or a termination request is noted, so that a step can end and be saved.

    The second one is obeyed at once. Outside the main thread, where signals do not arrive, nothing changes.
    """
    asked: list[int] = []

    def note(number: int, _frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        console.print("stopping after this step; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, note) for kind in kinds]
    try:
        yield lambda: bool(asked)
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
