"""Batches of the windows of many requests, computed by one thread."""

import asyncio
import dataclasses
import math
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from jaxtyping import Float

from aatjax.audio.windows import Window
from aatjax.inference.server.adapters import ServedAdapter
from aatjax.inference.server.limits import ServerLimits
from aatjax.inference.server.metrics import ServerMetrics

AVERAGING = 0.1
"""Weight of the last round in the moving average of their duration."""
Logits = Float[np.ndarray, " c"]


class QueueFullError(Exception):
    """More windows wait than `ServerLimits` allow, or than can be computed in time."""


@dataclasses.dataclass(frozen=True)
class _Job:
    served: ServedAdapter
    window: Window
    answer: "Future[Logits]"


class Batcher:
    """Collects windows from any number of requests and computes them in few batches.

    Args:
        metrics: counts the batches.
        limits: `batch_size`, `wait`, `queue` and `timeout`.
    """

    def __init__(self, metrics: ServerMetrics, limits: ServerLimits) -> None:
        self._metrics, self._limits = metrics, limits
        self._seconds = 0.0  # of a round of the thread, a moving average
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of waiting windows."""
        return self._jobs.qsize()

    async def compute_logits(
        self, served: ServedAdapter, windows: Sequence[Window]
    ) -> Float[np.ndarray, "w c"]:
        """Return the logits of every window of a request.

        Raises:
            QueueFullError: too many windows wait, or for too long.
        """
        count = self.waiting + len(windows)
        if count > self._limits.queue:
            raise QueueFullError(f"{self._limits.queue} windows of sound wait")
        seconds = math.ceil(count / self._limits.batch_size) * self._seconds
        if seconds > self._limits.timeout:
            raise QueueFullError(f"{count} windows of sound need about {seconds:.0f} s")
        jobs = [_Job(served, window, Future()) for window in windows]
        for job in jobs:
            self._jobs.put(job)
        # A request that times out cancels its jobs, which are then not computed.
        return np.stack(await asyncio.gather(*(asyncio.wrap_future(job.answer) for job in jobs)))

    def close(self) -> None:
        """End the thread after it computed what waits."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._jobs.get()) is not None:
            jobs, until = [first], time.monotonic() + self._limits.wait
            while len(jobs) < self._limits.batch_size:
                try:
                    job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if job is None:
                    self._jobs.put(None)
                    break
                jobs.append(job)
            began = time.perf_counter()
            by_group: dict[int, list[_Job]] = defaultdict(list)
            for job in jobs:
                if job.answer.set_running_or_notify_cancel():
                    by_group[id(job.served.group)].append(job)
            for group_jobs in by_group.values():
                self._compute(group_jobs)
            self._seconds += AVERAGING * (time.perf_counter() - began - self._seconds)

    def _compute(self, jobs: list[_Job]) -> None:
        began = time.perf_counter()
        group = jobs[0].served.group
        try:
            stack = group.stack()
            # An adapter that is not in the stack was dropped: its request timed out.
            jobs = [job for job in jobs if job.served.key in stack.rows]
            keys, windows = [job.served.key for job in jobs], [job.window for job in jobs]
            results = group.compute_logits(stack, keys, windows)
        except Exception as error:
            for job in jobs:
                job.answer.set_exception(error)
            return
        self._metrics.count_batch(len(jobs), time.perf_counter() - began)
        for job, logits in zip(jobs, results, strict=True):
            job.answer.set_result(logits)
