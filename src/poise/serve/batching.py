"""Dynamic micro-batches: what several callers send at about the same time is scored in one call.

One worker thread scores; the event loop stays free. While a batch is being scored the next one gathers. Completions of
one prompt that are in one batch share the reading of the prompt.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_BATCH = 256  # items in one call, unless a single request has more
WINDOW = 0.004  # seconds in which an idle worker waits for company


class QueueFullError(Exception):
    """As many items wait as may."""


class _Job(NamedTuple):
    items: list[Any]
    done: "asyncio.Future[Any]"


class Batcher(Generic[Item, Result]):
    """Gathers items of concurrent callers and has `work` done on them, in one thread, in the order they came in.

    work: a list of items -> one result or exception for each. If it raises, every caller of the batch gets that error.
    """

    def __init__(self, work: Callable[[list[Item]], Sequence[Result | Exception]], max_waiting: int):
        self._work, self._max_waiting = work, max_waiting
        self._jobs: deque[_Job] = deque()
        self._thread = ThreadPoolExecutor(1, "poise-scoring")
        self._loop: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self.waiting = 0

    async def __call__(self, items: Sequence[Item]) -> list[Result]:
        """One result for each item. Raises QueueFullError, or the first error among the results."""
        if self.waiting + len(items) > self._max_waiting and self.waiting:
            raise QueueFullError
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run())
        done = asyncio.get_running_loop().create_future()
        self._jobs.append(_Job(list(items), done))
        self.waiting += len(items)
        self._wake.set()
        results = await done
        if error := next((one for one in results if isinstance(one, Exception)), None):
            raise error
        return results

    @property
    def full(self) -> bool:
        """Would a request be refused?"""
        return self.waiting >= self._max_waiting

    def close(self) -> None:
        """End the thread; what was accepted has been answered before."""
        if self._loop is not None:
            self._loop.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        while True:
            if not self._jobs:
                self._wake.clear()
                await self._wake.wait()
                await asyncio.sleep(WINDOW)
            jobs = self._next()
            items = [item for job in jobs for item in job.items]
            try:
                results = await asyncio.get_running_loop().run_in_executor(self._thread, self._work, items)
            except Exception as error:  # noqa: BLE001  whatever it is, the callers must hear of it
                results = [error] * len(items)
            self.waiting -= len(items)
            rest = iter(results)
            for job in jobs:
                part = list(itertools.islice(rest, len(job.items)))
                if not job.done.done():  # the caller may have gone
                    job.done.set_result(part)

    def _next(self) -> list[_Job]:
        jobs, count = [self._jobs.popleft()], 0
        count = len(jobs[0].items)
        while self._jobs and count + len(self._jobs[0].items) <= MAX_BATCH:
            jobs.append(self._jobs.popleft())
            count += len(jobs[-1].items)
        return jobs
