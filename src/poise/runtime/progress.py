"""Long stages: progress bars with time left, one look for all; and stopping without losing what was done."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, TypeVar, cast

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from poise.runtime.display import visible
from poise.runtime.processes import process_index


class _Stderr:
    """The stderr of the moment. If nobody reads it any more, what is printed is lost, and the work is not.

    While a bar is shown, rich puts a proxy in the place of sys.stderr, which prints above the bar through this very
    console. The console itself writes to what lies behind it: to the proxy it would print nothing at all.
    """

    encoding = "utf-8"

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._file.write(text.encode("utf-8", "backslashreplace").decode("utf-8"))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._file.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            return self._file.isatty()
        return False

    def fileno(self) -> int:
        return self._file.fileno()

    @property
    def _file(self) -> Any:
        file: Any = sys.stderr
        while isinstance(file, FileProxy):
            file = file.rich_proxied_file
        return file


class PlainConsole(Console):
    """Prints text as it is: paths and completions hold no markup, and what cannot be seen is shown as an escape."""

    def __init__(self) -> None:
        super().__init__(file=cast(IO[str], _Stderr()), highlight=False, markup=False, emoji=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """As of rich; in a pipe or a file, where no bar is seen, a sentence stays on its line."""
        options.setdefault("soft_wrap", not self.is_terminal)
        super().print(*objects, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """As of rich, of the visible text; table cells come here too."""
        return super().render_str(visible(text), **options)


Item = TypeVar("Item")
console = PlainConsole()
_SECONDS_WITHOUT_BAR = 3.0
_SECONDS_BETWEEN_LINES = 60.0  # in a pipe or a file, where no bar is seen
_parts_of_another = 0


@contextlib.contextmanager
def progress(label: str, total: int | None, done: int = 0) -> Iterator[Callable[..., None]]:
    """Yield `advance(count, note="")`. On a terminal a live bar; in a log file a line a minute, and one at the end.

    total: None where nobody knows it; then no time left is shown. Of several processes the first one shows the bar.
    In a notebook, which cannot move its cursor up, the bar is one of tqdm's.
    """
    disable = process_index() > 0 or _parts_of_another > 0
    if console.is_jupyter:
        from tqdm import tqdm  # of notebooks alone: a command starts sooner without

        with tqdm(desc=visible(label), total=total, initial=done, disable=disable, file=sys.stderr, ncols=100) as text:

            def advance_text(count: int = 1, note: str = "") -> None:
                if note:
                    text.set_postfix_str(note, refresh=False)
                text.update(count)

            yield advance_text
        return
    columns = (  # 80 characters wide with a note, so that nothing is cut off in a plain terminal
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=10), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("left"), TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=disable) as bar:
        task = bar.add_task(visible(label), total=total, completed=done, note="")
        said = time.monotonic()

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal said
            bar.advance(task, count)
            if note:
                bar.update(task, note=note)
            if not console.is_terminal and not bar.disable and time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                of = "" if total is None else f"/{total}"
                console.print(f"{label} {bar.tasks[0].completed:.0f}{of} {note}".rstrip())

        yield advance


def shown_if_long(
    label: str, items: Iterable[Item], total: Callable[[], int | None], number: Callable[[Item], int] | None = None
) -> Iterator[Item]:
    """The items, with a bar of their own from when they have taken three seconds.

    total: asked for only then. number: an item's place among all of them, from 1; default: they are counted.
    """
    began, done, rest = time.monotonic(), 0, iter(items)
    for item in rest:
        done = number(item) if number else done + 1
        yield item
        if time.monotonic() - began > _SECONDS_WITHOUT_BAR:
            break
    else:
        return
    with progress(label, total(), done) as advance:
        for item in rest:
            before, done = done, number(item) if number else done + 1
            advance(done - before)
            yield item


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


class Clock:
    """Seconds of the parts of a step. seconds: `NAME_seconds` of every part so far, rounded to milliseconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, Any] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """The part `name` is over."""
        now = time.monotonic()
        self.seconds[f"{name}_seconds"] = round(now - self._last, 3)
        self._last = now
