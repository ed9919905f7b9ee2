"""The start of a run of several processes: they meet at the coordinator's address.

JAX itself waits for five minutes and then aborts without naming the process that is missing. Here
process 0 first listens at the coordinator's port itself until all processes have come, and only
then leaves the port to JAX. The connections stay open for the watchdog.
"""

import contextlib
import dataclasses
import errno
import ipaddress
import json
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, BinaryIO

from aatjax.errors import UnavailableError, UsageError
from aatjax.train.cluster import Place

PREFLIGHT = 10.0  # seconds in which the coordinator must answer
GREETING = 5.0  # seconds in which whoever has answered must send its greeting
SILENCE = 20.0  # seconds without a heartbeat after which a process counts as lost
PATIENCE = 5.0  # seconds of waiting after which it is reported
MOST = 4096  # bytes of a greeting
START = "start"

Say = Callable[[str], None]


@dataclasses.dataclass
class Link:
    """A connection to another process: messages of one line of JSON each."""

    host: str
    socket: socket.socket
    file: BinaryIO

    def send(self, message: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")


class Waiting:
    """Reports what is waited for, at first after 5 seconds and then ever less often."""

    def __init__(self, say: Say) -> None:
        self._say, self._began, self._next = say, time.monotonic(), PATIENCE

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def report(self, what: str) -> None:
        if self.seconds >= self._next:
            self._next = self.seconds + min(60.0, 2 * self._next)
            self._say(f"waiting for {what} ({self.seconds:.0f} s)")


def name_processes(ranks: Sequence[int], count: int) -> str:
    """Return `process 1 of 4`, or `processes 1, 3 of 4`."""
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"process{'es' * (len(ranks) > 1)} {shown} of {count}"


def meet(place: Place, limit: float, say: Say) -> dict[int, Link]:
    """Wait until all processes of a run have come to the coordinator's address.

    Args:
        place: of this process.
        limit: seconds to wait for the last one.
        say: reports whom it waits for.

    Returns:
        In process 0 the connections to all others by their number, elsewhere that to process 0.

    Raises:
        UnavailableError: the port is in use, something else answers there or nothing does, or a
            process has not come in time.
        UsageError: the processes were started with different numbers.
    """
    check_address(place, limit)
    if place.index == 0:
        with open_port(place.address[1]) as listener:
            return Coordinator(place, limit, say).gather(listener)
    return {0: attend(place, limit, say)}


def check_address(place: Place, limit: float) -> None:
    """Check that the coordinator's name resolves, to an address that all hosts can reach.

    The names of a launcher's hosts are waited for: Pods get them as they start.
    """
    host, port = place.address
    until = time.monotonic() + (limit if place.launched else 0.0)
    while True:
        try:
            found = {str(info[4][0]) for info in socket.getaddrinfo(host, port)}
            break
        except OSError as error:
            if time.monotonic() > until:
                raise UnavailableError(
                    f"coordinator {place.coordinator}: the host name {host!r} does not resolve: "
                    f"{error}"
                ) from error
            time.sleep(1.0)
    loopback = all(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in found)
    if loopback and place.hosts > 1:
        raise UnavailableError(
            f"coordinator {place.coordinator} is {', '.join(sorted(found))}, which is each host "
            f"itself, and the job has {place.hosts} hosts: give --coordinator a name or address "
            "that all reach"
        )


def open_port(port: int) -> socket.socket:
    """Listen on a port of all addresses of this host; 0 takes a free one.

    Raises:
        UnavailableError: it is in use or not allowed.
    """
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        host = socket.gethostname()
        what = f"cannot be opened ({error.strerror or error})"
        if error.errno == errno.EADDRINUSE:
            what = "is in use by another program, or by a run that has not ended yet"
        raise UnavailableError(
            f"coordinator: port {port} of this host ({host}:{port}) {what}: give all processes "
            "another one with --coordinator"
        ) from error


class Coordinator:
    """Process 0 of a meeting.

    Args:
        place: of this process.
        limit: seconds to wait for the last one.
        say: reports whom it waits for.
    """

    def __init__(self, place: Place, limit: float, say: Say) -> None:
        self._place, self._limit = place, limit
        self._waiting = Waiting(say)
        self._links: dict[int, Link] = {}
        self._problem: str | None = None
        self._lock = threading.Lock()

    def gather(self, listener: socket.socket) -> dict[int, Link]:
        """Accept the others until all are there, then let all begin."""
        count = self._place.count
        listener.settimeout(0.5)
        while missing := self._find_missing():
            with contextlib.suppress(TimeoutError):
                link, _ = listener.accept()
                threading.Thread(target=self._welcome, args=(link,), daemon=True).start()
                continue
            self._tell({"waiting": missing})
            self._waiting.report(name_processes(missing, count))
            if self._problem is not None:
                self._tell({"wrong": self._problem})
                raise UsageError(self._problem)
            if self._waiting.seconds > self._limit:
                text = self._describe_missing(missing)
                self._tell({"end": text})
                raise UnavailableError(text)
        self._tell({START: True})
        return self._links

    def _find_missing(self) -> list[int]:
        """Return whose connections are not there; those that have ended are forgotten."""
        with self._lock:
            self._links = {n: link for n, link in self._links.items() if _is_open(link.socket)}
            return [rank for rank in range(1, self._place.count) if rank not in self._links]

    def _describe_missing(self, missing: Sequence[int]) -> str:
        there = "; ".join(f"process {n} on {link.host}" for n, link in self._links.items())
        return (
            f"{name_processes(missing, self._place.count)} did not come to "
            f"{self._place.coordinator} within {self._limit:.0f} s (--stuck-after); there were "
            f"{'process 0' if not there else f'process 0; {there}'}: start all of them"
        )

    def _tell(self, message: dict[str, Any]) -> None:
        """Send to all who have come; one that is gone may come again."""
        for link in list(self._links.values()):
            with contextlib.suppress(OSError):
                link.send(message)

    def _welcome(self, connection: socket.socket) -> None:
        """Exchange greetings with whoever has connected."""
        connection.settimeout(GREETING)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            link = Link("?", connection, connection.makefile("rb"))
            link.send({"aatjax": version("aatjax"), "host": socket.gethostname()})
            hello = json.loads(link.file.readline(MOST))
            rank, count, link.host = int(hello["process"]), int(hello["count"]), str(hello["host"])
            connection.settimeout(None)
            with self._lock:
                if count != self._place.count or not 0 < rank < count:
                    self._problem = (
                        f"process {rank} of {count} (host {link.host}) came to a run of "
                        f"{self._place.count} processes: give all of them the same --processes, "
                        "and each its own --process"
                    )
                    link.send({"wrong": self._problem})
                elif (first := self._links.get(rank)) is not None and _is_open(first.socket):
                    link.send(
                        {
                            "wrong": f"process {rank} of {count} is there already (host "
                            f"{first.host}): give each process its own --process"
                        }
                    )
                else:
                    self._links[rank] = link
            return
        connection.close()


def _is_open(connection: socket.socket) -> bool:
    """Return whether the other end has not closed; it sends nothing before the start."""
    with selectors.DefaultSelector() as selector:  # leaves the socket's own timeout alone
        selector.register(connection, selectors.EVENT_READ)
        if not selector.select(timeout=0):
            return True
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except OSError:
        return False


def attend(place: Place, limit: float, say: Say) -> Link:
    """Come to process 0 and wait until all are there."""
    waiting = Waiting(say)
    link = _reach(place, limit, waiting)
    link.send({"process": place.index, "count": place.count, "host": socket.gethostname()})
    link.socket.settimeout(SILENCE)
    name = f"process 0 (host {link.host}, {place.coordinator})"
    while True:
        try:
            line = link.file.readline()
        except TimeoutError as error:
            raise UnavailableError(
                f"{name} was lost before the run began: no heartbeat for {SILENCE:.0f} s"
            ) from error
        except OSError:
            line = b""
        if not line:
            raise UnavailableError(f"{name} was lost before the run began: its connection ended")
        message = json.loads(line)
        if "wrong" in message:
            raise UsageError(message["wrong"])
        if "end" in message:
            raise UnavailableError(message["end"])
        if START in message:
            link.socket.settimeout(None)
            return link
        waiting.report(name_processes(message["waiting"], place.count))


def _reach(place: Place, limit: float, waiting: Waiting) -> Link:
    """Connect to process 0 and read its greeting.

    It must answer within 10 seconds, after a launcher's start within the limit.
    """
    until = limit if place.launched else PREFLIGHT
    while True:
        try:
            connection = socket.create_connection(place.address, timeout=2.0)
            break
        except OSError as error:
            if waiting.seconds > until:
                raise UnavailableError(
                    f"coordinator {place.coordinator}: no answer within {until:.0f} s ({error}): "
                    "is process 0 running there, and the port open?"
                ) from error
            waiting.report(f"process 0 of {place.count} at {place.coordinator}")
            time.sleep(0.2)
    connection.settimeout(GREETING)
    try:
        file = connection.makefile("rb")
        return Link(str(_read_greeting(file)["host"]), connection, file)
    except (OSError, ValueError, KeyError, TypeError) as error:
        connection.close()
        why = str(error) if isinstance(error, ValueError) else "it closes the connection"
        if isinstance(error, TimeoutError):
            why = f"it accepts connections and sends nothing for {GREETING:.0f} s"
        raise UnavailableError(
            f"coordinator {place.coordinator}: another program than process 0 of this run answers "
            f"there: {why}; give all processes another port with --coordinator"
        ) from error


def _read_greeting(file: BinaryIO) -> dict[str, Any]:
    """Read what process 0 sends first.

    Raises:
        ValueError: something else was sent.
    """
    first = file.read(1)
    if not first:
        raise OSError
    if first != b"{":
        # The SETTINGS frame of HTTP/2: JAX's coordination service, with which a run begins.
        what = "JAX's coordinator of a run that has begun" if first == b"\0" else "another protocol"
        raise ValueError(f"it is {what}")
    try:
        return json.loads(first + file.readline(MOST))
    except ValueError:
        raise ValueError("it is another protocol") from None
