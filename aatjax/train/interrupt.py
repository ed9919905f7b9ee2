"""Ctrl-C and SIGTERM: finish the step and save at the first, end at once at the second."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from aatjax.errors import AatjaxError


class Interrupted(AatjaxError):
    """The run was asked to stop and did, after saving."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """A context in which the first SIGINT or SIGTERM only sets `signum`.

    A second one ends the process at once with 128 + its number. Outside the main thread, where
    handlers cannot be set, nothing is caught.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum
