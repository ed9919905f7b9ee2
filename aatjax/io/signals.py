"""Ctrl-C, SIGTERM, SIGHUP: finish the step and save at the first, end at once at the second."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from aatjax.errors import AatjaxError


def _list_ends() -> list[int]:
    """The signals that ask a process to end; a SIGHUP that `nohup` has it ignore is none."""
    ends = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        ends.append(signal.SIGHUP)  # the terminal or the connection was closed
    return [int(number) for number in ends]


class InterruptedRunError(AatjaxError):
    """The run stopped at a signal, after it was saved."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code: int = 128 + signum


class StopRequest:
    """A context in which the first SIGINT, SIGTERM or SIGHUP only sets `signum`, and is answered.

    A second one ends the process at once with 128 + its number; so does a first SIGTERM or SIGHUP
    while `unsaved` is false, since nothing would be lost. This works during a long compilation too,
    when Python's handlers have to wait: a thread reads the signals from a socket that the C handler
    writes to. Outside the main thread, where handlers cannot be set, nothing is caught.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.unsaved = False
        self._before: dict[int, Any] = {}
        self._wakeup: tuple[int, socket.socket, socket.socket] | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *_list_ends()):
                self._before[number] = signal.signal(number, self._handle)
            reading, writing = socket.socketpair()
            writing.setblocking(False)
            before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
            self._wakeup = (before, reading, writing)
            threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._wakeup is not None:
            before, _, writing = self._wakeup
            signal.set_wakeup_fd(before)
            writing.close()  # the thread reads an end and returns
            self._wakeup = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum

    def _watch(self, reading: socket.socket) -> None:
        seen = 0
        while number := reading.recv(1):
            signum, seen = number[0], seen + 1
            if signum not in self._before:
                seen -= 1
            elif signum != signal.SIGINT and not self.unsaved and seen == 1:
                _end("stopped before the first step: nothing to save", signum)
            elif seen == 1:
                _say("finishing the step, then saving; a second signal ends the run at once")
            else:
                time.sleep(0.5)  # the main thread's own handler comes first where it can
                if self._wakeup is not None:
                    _end("ended at once", signum)
        reading.close()


def _say(message: str) -> None:
    with contextlib.suppress(Exception):
        print(f"aatjax: {message}", file=sys.stderr, flush=True)


def _end(message: str, signum: int) -> NoReturn:
    _say(message)
    os._exit(128 + signum)


@contextlib.contextmanager
def catch_ends() -> Iterator[None]:
    """Raise InterruptedRunError at SIGTERM or SIGHUP, as Ctrl-C raises KeyboardInterrupt."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise InterruptedRunError("terminated", signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in _list_ends()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
