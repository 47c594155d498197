"""Progress bars with time left, one look for every long stage."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


@contextlib.contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yield `advance(count, note="")`. On a terminal a live bar; in a log file one line when the stage ends."""
    columns = (
        TextColumn("{task.description:<34}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total, completed=done, note="")

        def advance(count: int = 1, note: str = "") -> None:
            bar.advance(task, count)
            if note:
                bar.update(task, note=note)

        yield advance
