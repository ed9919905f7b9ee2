"""HTTP/1.1 protocol of uvicorn with a timeout for headers and a limit of connections."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from aatjax.inference.server.gate import RETRY, format_error
from aatjax.inference.server.limits import CLOSE, RefusedError, ServerLimits

SLOW_HEADERS = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
FULL_SECONDS = 1.0
"""Seconds for the headers over a connection that is one too many."""


def make_protocol(limits: ServerLimits) -> type[H11Protocol]:
    """Return a protocol for the limits of a server.

    Connections whose request line and headers take longer than `body_timeout` are closed; those
    beyond `connections` answer every request with 503.
    """
    reason = f"{limits.connections} connections are open: try again"
    full = format_error(RefusedError(503, reason, RETRY | CLOSE))

    class LimitedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _seconds: float = limits.body_timeout

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self.app = full
                self._seconds = min(FULL_SECONDS, limits.body_timeout)
            self._restart()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._restart()

        def _restart(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(self._seconds, self._check)

        def _check(self) -> None:
            busy = self.cycle is not None and not self.cycle.response_complete
            if busy or self.transport.is_closing():
                return
            partial = self.conn.trailing_data[0]
            if partial and self.conn.our_state is h11.IDLE:
                self.transport.write(SLOW_HEADERS)
            self.transport.close()

    return LimitedProtocol
