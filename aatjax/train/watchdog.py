"""Watchdog over the processes of a run: a lost or stuck process ends the run and is named.

JAX itself notices a dead peer after a minute and a half and aborts without naming it. Here every
process reports to process 0 once per second, and process 0 to all others, over the connections by
which they met. A broken connection, silence, or no progress ends every remaining process with exit
code 69.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from aatjax.errors import UnavailableError
from aatjax.train.meeting import SILENCE, Link, Waiting

EXIT = UnavailableError.exit_code
ALONE = ("start", "report")
"""Phases in which a process works for itself, at its own pace: decoding a large set, figures.

They count as stuck only while others wait and this one does not use the processor.
"""
WAIT = "wait"
BLOCKED = ("step", WAIT)
"""Phases in which a process may be waiting for the others."""
NETWORK = ("gloo", "nccl", "unavailable", "deadline_exceeded", "coordination", "connection")
"""Words of JAX's errors about other processes."""
IDLE = 0.02  # share of a core below which a process does no work


@dataclasses.dataclass
class _Peer:
    """The last report of one process."""

    host: str = "?"
    phase: str = "start"
    step: int = 0
    since: float = dataclasses.field(default_factory=time.monotonic)
    reported: float = dataclasses.field(default_factory=time.monotonic)
    warm: bool = False  # has been in this phase before: it is no compilation


def _delay_abort() -> None:
    """Let a native abort of this process wait for 6 seconds, so that the watchdog ends it first.

    JAX aborts as soon as the connection to process 0 breaks, on a thread of its own that needs no
    interpreter lock, so it often wins. The handler is C's own `sleep`, which gets the signal's
    number as its seconds and then lets the abort go on; a handler in Python would run too late.
    """
    if sys.platform == "win32":
        return
    library = ctypes.CDLL(None)
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.signal.restype = ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


class Watchdog:
    """Heartbeats between the processes of a run; does nothing in a single process.

    Args:
        rank: number of this process.
        count: number of processes.
        stuck: seconds in one phase of one step after which a process counts as stuck.
        compiling: the same for the first time in that phase, which compiles.
    """

    def __init__(
        self, rank: int = 0, count: int = 1, *, stuck: float = 600.0, compiling: float = 3600.0
    ) -> None:
        self.stuck = stuck
        self._rank, self._count, self._compiling = rank, count, compiling
        self._own = _Peer(socket.gethostname())
        self._known: set[str] = set()  # phases that were left
        self._peers: dict[int, _Peer] = {}
        self._links: dict[int, Link] = {}
        self._awaited = ""
        self._lock = threading.Lock()
        self._done = False

    def __str__(self) -> str:
        """Name of this process, empty where it is alone."""
        if self._count == 1:
            return ""
        return f"process {self._rank} of {self._count} on host {self._own.host}"

    def beat(self, phase: str, step: int) -> None:
        """Record what this process is about to do; cheap, to be called for every part of it."""
        own = self._own
        if phase != own.phase:
            self._known.add(own.phase)
            own.warm = phase in self._known
        own.phase, own.step, own.since = phase, step, time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which this process waits for all others to come to the same place."""
        own = self._own
        before = own.phase, own.warm
        own.phase, own.since, own.warm = WAIT, time.monotonic(), True
        try:
            yield
        finally:
            own.phase, own.warm = before
            own.since = time.monotonic()

    def start(self, links: Mapping[int, Link]) -> None:
        """Watch over the processes at the other ends of these connections."""
        _delay_abort()
        atexit.register(self.leave)
        self._links = dict(links)
        self._peers = {rank: _Peer(link.host) for rank, link in links.items()}
        for rank, link in links.items():
            self._run(self._read, rank, link.file)
        self._run(self._report)

    @property
    def is_watching(self) -> bool:
        """Whether it is connected to other processes."""
        return bool(self._links) and not self._done

    def finish(self, reason: str | None = None) -> None:
        """Take this process out of the watch.

        Args:
            reason: why it ends before the others; ends them too.
        """
        if not self._done:
            self._done = True
            self._send_all({"rank": self._rank, "bye": reason})

    def leave(self, code: int = 0) -> None:
        """Take this process out of the watch as it exits, with a code or an uncaught error."""
        error = getattr(sys, "last_value", None)
        reason = None if code == 0 else f"exit code {code}"
        self.finish(reason if error is None else f"{type(error).__name__}: {error}")

    def blame(self, error: Exception, seconds: float = 25.0) -> UnavailableError | None:
        """After a failed exchange, let the watchdog end the process and name the cause.

        A broken connection is seen by both, and the watchdog knows whose it was; where JAX gave up
        waiting, nobody is lost, and the one that is late is named soon.

        Returns:
            What to raise where it does not; None where the error is not one of the network.
        """
        text = " ".join(str(error).split())
        if not self._links or not any(word in text.lower() for word in NETWORK):
            return None
        gave_up = any(word in text.lower() for word in ("deadline_exceeded", "timed out"))
        time.sleep(min(3.0, seconds) if gave_up else seconds)
        late = self._name_late()
        whom = "another process was lost or late" if late is None else f"{late} was late"
        return UnavailableError(
            f"{whom}, and JAX does not wait longer ({text[:200]}); start all processes again: the "
            "same command goes on from the last checkpoint"
        )

    @staticmethod
    def _run(target: Any, *args: Any) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()

    def _send(self, peer: int, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, KeyError), self._lock:  # it may have finished
            self._links[peer].send(message)

    def _send_all(self, message: dict[str, Any], skip: int | None = None) -> None:
        for peer in list(self._links):
            if peer != skip:
                self._send(peer, message)

    def _read(self, peer: int, file: Any) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in file:
                if self._receive(peer, json.loads(line)):
                    return
        # A process that finishes says so first. At once: without process 0, JAX aborts this one as
        # soon as it notices.
        if not self._done:
            self._end(peer, "was lost: its connection ended")

    def _receive(self, peer: int, message: dict[str, Any]) -> bool:
        """Take in a message; return whether it was the last one of that peer."""
        if "end" in message:
            self._exit(message["end"])
        if "bye" in message:
            if message["bye"] is not None:
                time.sleep(3.0)  # each process reports an error that all share in its own words
                if not self._done:
                    self._end(peer, f"has ended: {message['bye']}")
            self._peers.pop(peer, None)
            self._links.pop(peer, None)
            return True
        known = self._peers.get(peer)
        if known is not None:
            known.host, known.reported = message["host"], time.monotonic()
            known.phase, known.step = message["phase"], message["step"]
            known.since, known.warm = known.reported - message["age"], message["warm"]
            self._awaited = message["awaited"]
        return False

    def _report(self) -> None:
        """Once per second, report what this process does and check the others."""
        used, waiting = time.process_time(), Waiting(self._say)
        while not self._done:
            own, now = self._own, time.monotonic()
            if own.phase in ALONE and time.process_time() - used > IDLE:
                own.since = now
            used = time.process_time()
            if self._rank == 0:
                self._awaited = self._name_awaited()
            about = {"host": own.host, "phase": own.phase, "step": own.step, "warm": own.warm}
            about |= {"age": now - own.since, "awaited": self._awaited}
            self._send_all({"rank": self._rank, **about})
            if own.phase != WAIT:
                waiting = Waiting(self._say)
            elif self._awaited:
                waiting.report(self._awaited)
            for peer, known in list(self._peers.items()):
                if now - known.reported > SILENCE:
                    self._end(peer, f"was lost: no heartbeat for {SILENCE:.0f} s")
            if self._rank == 0:
                self._check_stuck(now)
            time.sleep(1.0)

    def _name(self, rank: int) -> str:
        peer = self._own if rank == self._rank else self._peers.get(rank, _Peer())
        return f"process {rank} (host {peer.host})"

    def _name_awaited(self) -> str:
        """Name those that others are waiting for; only process 0 knows all."""
        everyone = {0: self._own, **self._peers}
        if all(one.phase != WAIT for one in everyone.values()):
            return ""
        ranks = [rank for rank, one in everyone.items() if one.phase != WAIT]
        more = f" and {len(ranks) - 5} more" if len(ranks) > 5 else ""
        return ", ".join(map(self._name, ranks[:5])) + more

    def _name_late(self) -> str | None:
        """Name a process that this one has waited for too long, or None."""
        for rank, one in list(self._peers.items()):
            if one.phase not in BLOCKED:
                return f"{self._name(rank)}, in {one.phase!r} after step {one.step},"
        return None

    def _check_stuck(self, now: float) -> None:
        everyone = {**self._peers, 0: self._own}

        def find_limit(one: _Peer) -> float:
            return self.stuck if one.warm or one.phase in ALONE else self._compiling

        late = {
            rank: one
            for rank, one in everyone.items()
            if one.phase not in ALONE and now - one.since > find_limit(one)
        }
        if not late or len(everyone) == 1:
            return
        # Those that may be blocked wait for one that is not: that one is to be named, though it
        # may have stopped a little later than they began to wait, unless it is at work.
        outside = {rank: one for rank, one in everyone.items() if one.phase not in BLOCKED}
        stopped = {
            rank: one for rank, one in outside.items() if now - one.since > find_limit(one) / 2
        }
        if outside and not stopped:
            return
        rank, one = min((stopped or late).items(), key=lambda item: item[1].step)
        text = f"is stuck: {now - one.since:.0f} s in {one.phase!r} after step {one.step}"
        self._end(rank, text, stacks=True)

    def _end(self, rank: int, what: str, *, stacks: bool = False) -> NoReturn:
        text = (
            f"{self._name(rank)} {what}; the run has ended, and the same command goes on from the "
            "last checkpoint"
        )
        end = {"text": text, "stacks": stacks}
        self._send_all({"end": end}, skip=None if stacks else rank)
        self._exit(end)

    def _say(self, text: str) -> None:
        print(f"aatjax: {self}: {text}", file=sys.stderr, flush=True)

    def _exit(self, end: dict[str, Any]) -> NoReturn:
        with contextlib.suppress(Exception):
            if end["stacks"]:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
            self._say(end["text"])
        os._exit(EXIT)
