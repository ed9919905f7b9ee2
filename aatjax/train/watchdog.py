"""A watchdog over the processes of a run: who is lost or stuck ends the run for all, by name.

JAX itself notices a dead peer after a minute and a half and then aborts without saying which. Here
every process tells process 0 once a second what it is doing; process 0 tells all others. A broken
connection, silence, or no progress ends every process that is left with exit code 69.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import secrets
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from aatjax.errors import UnavailableError
from aatjax.train.distributed import gather_bytes, is_distributed

EXIT = UnavailableError.exit_code
ALONE = ("start", "report")
"""Phases of any length, as nobody waits in them: decoding a large set, the last figures."""


@dataclasses.dataclass
class _Peer:
    """What is known of one process."""

    host: str = "?"
    phase: str = "start"
    step: int = 0
    since: float = dataclasses.field(default_factory=time.monotonic)
    heard: float = dataclasses.field(default_factory=time.monotonic)
    warm: bool = False  # has been through this phase before: it is no compilation


class Watchdog:
    """Heartbeats between the processes of a run; does nothing where there is one process.

    Args:
        rank: number of this process.
        silence: seconds without a heartbeat after which a process counts as lost.
        stuck: seconds in one phase of one step after which a process counts as stuck.
        compiling: the same the first time that it is in that phase, and compiles.
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
        """Tells what this process is about to do, again for every part of it; cheap."""
        own = self._own
        if phase != own.phase:
            self._known.add(own.phase)
            own.warm = phase in self._known
        own.phase, own.step, own.since = phase, step, time.monotonic()

    def start(self) -> None:
        """Connects all processes; every one must call it."""
        if not is_distributed():
            return
        server = None
        offer: dict[str, Any] = {}
        if self._rank == 0:
            server = socket.create_server(("", 0))
            offer = {
                "port": server.getsockname()[1],
                "token": secrets.token_hex(16),
                "host": socket.gethostname(),
            }
        everyone = gather_bytes(json.dumps(offer).encode())
        offer = json.loads(everyone[0])
        if server is not None:
            threading.Thread(
                target=self._serve, args=(server, len(everyone), offer["token"]), daemon=True
            ).start()
        else:
            local = offer["host"] == socket.gethostname()
            address = ("127.0.0.1" if local else offer["host"], offer["port"])
            try:
                link = socket.create_connection(address, timeout=10.0)
            except OSError as error:
                raise UnavailableError(
                    f"process 0 at {address[0]}:{address[1]} does not answer ({error}): hosts must "
                    "reach each other by name, on any port"
                ) from error
            self._links[0] = link
            self._send(0, {"token": offer["token"]})
            self._peers[0] = _Peer(offer["host"])
            threading.Thread(target=self._listen, args=(0, link), daemon=True).start()
        threading.Thread(target=self._tell, daemon=True).start()

    def finish(self, reason: str | None = None) -> None:
        """Says goodbye: what this process does from now on concerns nobody.

        Args:
            reason: why it ends before the others; ends them too.
        """
        if self._done:
            return
        self._done = True
        for peer in list(self._links):
            self._send(peer, {"rank": self._rank, "bye": reason})

    def blame(self, seconds: float = 25.0) -> None:
        """After an error of the network: waits for the watchdog to end the process by name."""
        if self._links:
            time.sleep(seconds)

    def _send(self, peer: int, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, KeyError), self._lock:  # it may have said goodbye
            self._links[peer].sendall(json.dumps(message).encode() + b"\n")

    def _serve(self, server: socket.socket, count: int, token: str) -> None:
        """Process 0: takes the connection of every other process."""
        while len(self._links) < count - 1:
            link, _ = server.accept()
            threading.Thread(target=self._welcome, args=(link, token), daemon=True).start()
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
            self._hear(rank, hello)
            self._read(rank, file)

    def _listen(self, peer: int, link: socket.socket) -> None:
        link.settimeout(None)
        self._read(peer, link.makefile("rb"))

    def _read(self, peer: int, file: Any) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in file:
                if self._hear(peer, json.loads(line)):
                    return
        # A goodbye would have come before. Not a moment to lose: where process 0 is gone, JAX
        # aborts this one as soon as it notices.
        if not self._done:
            self._end(peer, "was lost: its connection ended")

    def _hear(self, peer: int, message: dict[str, Any]) -> bool:
        """Takes a message in; whether it was the last one of that peer."""
        if "end" in message:
            self._finish_with(message["end"])
        if "bye" in message:
            if message["bye"] is not None:
                time.sleep(3.0)  # an error that all share is told by each in its own words
                if not self._done:
                    self._end(peer, f"has ended: {message['bye']}")
            self._peers.pop(peer, None)
            self._links.pop(peer, None)
            return True
        known = self._peers.get(peer)
        if known is not None:
            now = time.monotonic()
            known.host, known.heard = message["host"], now
            known.phase, known.step = message["phase"], message["step"]
            known.since, known.warm = now - message["age"], message["warm"]
        return False

    def _tell(self) -> None:
        """Once a second: what this process does, and a look at the others."""
        while not self._done:
            own, now = self._own, time.monotonic()
            message = {
                "rank": self._rank,
                "host": own.host,
                "phase": own.phase,
                "step": own.step,
                "age": now - own.since,
                "warm": own.warm,
            }
            for peer in list(self._links):
                self._send(peer, message)
            for peer, known in list(self._peers.items()):
                if now - known.heard > self._silence:
                    self._end(peer, f"was lost: not heard of for {self._silence:.0f} s")
            if self._rank == 0:
                self._look_for_stuck(now)
            time.sleep(1.0)

    def _look_for_stuck(self, now: float) -> None:
        everyone = {**self._peers, 0: self._own}

        def late(one: _Peer) -> bool:
            if one.phase in ALONE:
                return False
            return now - one.since > (self._stuck if one.warm else self._compiling)

        waiting = {rank: one for rank, one in everyone.items() if late(one)}
        # Those in a step wait for the one that is not: it is the one to name.
        if not waiting or len(everyone) == 1:
            return
        outside = {rank: one for rank, one in waiting.items() if one.phase != "step"}
        rank, one = min((outside or waiting).items(), key=lambda item: item[1].step)
        self._end(
            rank,
            f"is stuck: {now - one.since:.0f} s in {one.phase!r} after step {one.step}",
            stacks=True,
        )

    def _end(self, rank: int, what: str, *, stacks: bool = False) -> NoReturn:
        host = self._own.host if rank == self._rank else self._peers.get(rank, _Peer()).host
        text = (
            f"process {rank} (host {host}) {what}; the run is ended, and the same command goes on "
            "from the last checkpoint"
        )
        for peer in list(self._links):
            if peer != rank or stacks:
                self._send(peer, {"end": {"text": text, "stacks": stacks}})
        self._finish_with({"text": text, "stacks": stacks})

    def _finish_with(self, end: dict[str, Any]) -> NoReturn:
        with contextlib.suppress(Exception):
            if end["stacks"]:
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
            print(f"aatjax: {end['text']}", file=sys.stderr, flush=True)
        os._exit(EXIT)
