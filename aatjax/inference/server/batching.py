"""Windows of many requests, put together into batches by one thread that runs the model."""

import asyncio
import dataclasses
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from aatjax.inference.classifier import Cut
from aatjax.inference.server.adapters import Held
from aatjax.inference.server.metrics import Gauges

Logits = Float[np.ndarray, " c"]


class Full(Exception):
    """More windows wait than may."""


@dataclasses.dataclass(frozen=True)
class _Job:
    held: Held
    window: Cut
    answer: "asyncio.Future[Logits]"


class Batches:
    """Takes windows from any number of requests and runs what waits in as few passes as it can.

    Args:
        gauges: what is counted.
        size: windows of a batch.
        wait: seconds that the first window of a batch waits for company.
        longest: windows that may wait.
    """

    def __init__(self, gauges: Gauges, *, size: int, wait: float, longest: int) -> None:
        self._gauges = gauges
        self._size, self._wait, self._longest = size, wait, longest
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Windows that wait."""
        return self._jobs.qsize()

    async def logits(self, held: Held, windows: Sequence[Cut]) -> list[Logits]:
        """Logits of every window of a request.

        Raises:
            Full: too many wait already.
        """
        if self._jobs.qsize() + len(windows) > self._longest:
            raise Full
        loop = asyncio.get_running_loop()
        jobs = [_Job(held, window, loop.create_future()) for window in windows]
        for job in jobs:
            self._jobs.put(job)
        try:
            return list(await asyncio.gather(*(job.answer for job in jobs)))
        finally:
            for job in jobs:  # a request that gave up is not computed any more
                job.answer.cancel()

    def close(self) -> None:
        """Ends the thread after what waits."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._jobs.get()) is not None:
            jobs, until = [first], time.monotonic() + self._wait
            while len(jobs) < self._size:
                try:
                    job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if job is None:
                    self._jobs.put(None)
                    break
                jobs.append(job)
            by_group: dict[int, list[_Job]] = defaultdict(list)
            for job in jobs:
                if not job.answer.cancelled():
                    by_group[id(job.held.group)].append(job)
            for together in by_group.values():
                self._run(together)

    def _run(self, jobs: list[_Job]) -> None:
        began = time.perf_counter()
        group = jobs[0].held.group
        try:
            ready = group.ready()
            # Those that are not in it gave up, and their adapters were dropped.
            jobs = [job for job in jobs if job.held.key in ready.places]
            found = group.logits(ready, [j.held.key for j in jobs], [j.window for j in jobs])
        except Exception as error:
            for job in jobs:
                _tell(job, error)
            return
        self._gauges.batch(len(jobs), time.perf_counter() - began)
        for job, row in zip(jobs, found, strict=True):
            _tell(job, row)


def _tell(job: _Job, outcome: Logits | Exception) -> None:
    """Gives the answer to the request's own thread; one that has ended does not ask any more."""

    def tell() -> None:
        if job.answer.done():
            return
        if isinstance(outcome, Exception):
            job.answer.set_exception(outcome)
        else:
            job.answer.set_result(outcome)

    loop = job.answer.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(tell)
