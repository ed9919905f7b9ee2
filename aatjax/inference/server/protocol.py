"""HTTP/1.1 protocol of uvicorn with a timeout for request headers."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SLOW_HEADERS = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def make_protocol(seconds: float) -> type[H11Protocol]:
    """Return a protocol that closes connections whose request line and headers take longer."""

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
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
            self._timer = self.loop.call_later(seconds, self._check)

        def _check(self) -> None:
            busy = self.cycle is not None and not self.cycle.response_complete
            if busy or self.transport.is_closing():
                return
            partial = self.conn.trailing_data[0]
            if partial and self.conn.our_state is h11.IDLE:
                self.transport.write(SLOW_HEADERS)
            self.transport.close()

    return TimedProtocol
