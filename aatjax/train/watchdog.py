"""Watchdog over the processes of a run: a lost or stuck process ends the run and is named.

JAX itself notices a dead peer after a minute and a half and aborts without naming it. Here every
process reports to process 0 once per second, and process 0 to all others. A broken connection,
silence, or no progress ends every remaining process with exit code 69.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from aatjax.errors import UnavailableError
from aatjax.train.distributed import gather_bytes, is_distributed

EXIT = UnavailableError.exit_code
ALONE = ("start", "report")
"""Phases without a time limit, as no peer waits in them: decoding a large set, final figures."""


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
        silence: seconds without a heartbeat after which a process counts as lost.
        stuck: seconds in one phase of one step after which a process counts as stuck.
        compiling: the same for the first time in that phase, which compiles.
    """

    def __init__(
        self, rank: int, *, silence: float = 20.0, stuck: float = 600.0, compiling: float = 3600.0
    ) -> None:
        self._rank, self._silence = rank, silence
        self._stuck, self._compiling = stuck, compiling
        self._own = _Peer(socket.gethostname())
        self._known: set[str] = set()  # phases that were left
        self._peers: dict[int, _Peer] = {}
        self._links: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._done = False

    def beat(self, phase: str, step: int) -> None:
        """Record what this process is about to do; cheap, to be called for every part of it."""
        own = self._own
        if phase != own.phase:
            self._known.add(own.phase)
            own.warm = phase in self._known
        own.phase, own.step, own.since = phase, step, time.monotonic()

    def start(self) -> None:
        """Connect all processes; every one must call it."""
        if not is_distributed():
            return
        _delay_abort()
        server = socket.create_server(("", 0)) if self._rank == 0 else None
        offer: dict[str, Any] = {}
        if server is not None:
            offer = {
                "port": server.getsockname()[1],
                "token": secrets.token_hex(16),
                "host": self._own.host,
            }
        everyone = gather_bytes(json.dumps(offer).encode())
        offer = json.loads(everyone[0])
        if server is None:
            self._connect(offer)
        else:
            self._run(self._serve, server, len(everyone), offer["token"])
        self._run(self._report)

    def finish(self, reason: str | None = None) -> None:
        """Take this process out of the watch.

        Args:
            reason: why it ends before the others; ends them too.
        """
        if not self._done:
            self._done = True
            self._send_all({"rank": self._rank, "bye": reason})

    def blame(self, seconds: float = 25.0) -> None:
        """After a network error, wait for the watchdog to end the process and name the cause."""
        if self._links:
            time.sleep(seconds)

    @staticmethod
    def _run(target: Any, *args: Any) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()

    def _connect(self, offer: dict[str, Any]) -> None:
        host = "127.0.0.1" if offer["host"] == self._own.host else offer["host"]
        try:
            link = socket.create_connection((host, offer["port"]), timeout=10.0)
        except OSError as error:
            raise UnavailableError(
                f"process 0 at {host}:{offer['port']} does not answer ({error}): hosts must "
                "reach each other by name, on any port"
            ) from error
        link.settimeout(None)
        self._links[0] = link
        self._send(0, {"token": offer["token"]})
        self._peers[0] = _Peer(offer["host"])
        self._run(self._read, 0, link.makefile("rb"))

    def _send(self, peer: int, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, KeyError), self._lock:  # it may have finished
            self._links[peer].sendall(json.dumps(message).encode() + b"\n")

    def _send_all(self, message: dict[str, Any], skip: int | None = None) -> None:
        for peer in list(self._links):
            if peer != skip:
                self._send(peer, message)

    def _serve(self, server: socket.socket, count: int, token: str) -> None:
        """In process 0, accept the connection of every other process."""
        while len(self._links) < count - 1:
            link, _ = server.accept()
            self._run(self._welcome, link, token)
            time.sleep(0.01)
        server.close()

    def _welcome(self, link: socket.socket, token: str) -> None:
        link.settimeout(10.0)
        with contextlib.suppress(OSError, ValueError, KeyError):
            file = link.makefile("rb")
            if not secrets.compare_digest(json.loads(file.readline(4096))["token"], token):
                link.close()
                return
            hello = json.loads(file.readline(4096))
            rank = int(hello["rank"])
            link.settimeout(None)
            self._peers[rank] = _Peer(str(hello["host"]))
            self._links[rank] = link
            self._receive(rank, hello)
            self._read(rank, file)

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
        return False

    def _report(self) -> None:
        """Once per second, report what this process does and check the others."""
        while not self._done:
            own, now = self._own, time.monotonic()
            about = {"host": own.host, "phase": own.phase, "step": own.step, "warm": own.warm}
            self._send_all({"rank": self._rank, "age": now - own.since, **about})
            for peer, known in list(self._peers.items()):
                if now - known.reported > self._silence:
                    self._end(peer, f"was lost: no heartbeat for {self._silence:.0f} s")
            if self._rank == 0:
                self._check_stuck(now)
            time.sleep(1.0)

    def _check_stuck(self, now: float) -> None:
        everyone = {**self._peers, 0: self._own}
        waiting = {
            rank: one
            for rank, one in everyone.items()
            if one.phase not in ALONE
            and now - one.since > (self._stuck if one.warm else self._compiling)
        }
        if not waiting or len(everyone) == 1:
            return
        # Those in a step wait for one that is not: that one is to be named, though it may have
        # stopped a little later than they began to wait.
        outside = {
            rank: one
            for rank, one in everyone.items()
            if one.phase not in (*ALONE, "step") and now - one.since > self._stuck / 2
        }
        rank, one = min((outside or waiting).items(), key=lambda item: item[1].step)
        text = f"is stuck: {now - one.since:.0f} s in {one.phase!r} after step {one.step}"
        self._end(rank, text, stacks=True)

    def _end(self, rank: int, what: str, *, stacks: bool = False) -> NoReturn:
        host = self._own.host if rank == self._rank else self._peers.get(rank, _Peer()).host
        text = (
            f"process {rank} (host {host}) {what}; the run has ended, and the same command goes on "
            "from the last checkpoint"
        )
        end = {"text": text, "stacks": stacks}
        self._send_all({"end": end}, skip=None if stacks else rank)
        self._exit(end)

    def _exit(self, end: dict[str, Any]) -> NoReturn:
        with contextlib.suppress(Exception):
            if end["stacks"]:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
            print(f"aatjax: {end['text']}", file=sys.stderr, flush=True)
        os._exit(EXIT)
