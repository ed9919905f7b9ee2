"""What a request may be: how large, how slow, of which kind; each refusal has its status."""

import asyncio
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

TYPES = ("audio/", "application/octet-stream", "application/ogg")
SLOW_HEADERS = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class Refused(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        message: what was wrong and what to do.
        headers: more headers of the answer.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


async def read_body(request: Any, *, most: int, seconds: float) -> bytes:
    """The body of a request, never more of it in memory than `most` bytes and a chunk.

    Raises:
        Refused: 415 for a wrong content type, 413 for more bytes, 408 where it takes longer, 400
            where the client went away or sent nothing.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if not kind.startswith(TYPES):
        raise Refused(
            415,
            f"content type {kind or 'none'!r}: send the bytes of a sound file as audio/* or "
            "application/octet-stream",
        )
    large = Refused(
        413,
        f"the body has more than {most} bytes: send a shorter sound, or raise --max-bytes",
        {"Connection": "close"},
    )
    told = request.headers.get("content-length")
    if told is not None and int(told) > most:
        raise large
    parts: list[bytes] = []
    size, until = 0, time.monotonic() + seconds
    while True:
        try:
            message = await asyncio.wait_for(request.receive(), until - time.monotonic())
        except TimeoutError:
            raise Refused(
                408,
                f"the body did not arrive within {seconds:g} s ({size} bytes did)",
                {"Connection": "close"},
            ) from None
        if message["type"] == "http.disconnect":
            raise Refused(400, "the connection was closed before the body was there")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise large
        if not message.get("more_body", False):
            break
    if not size:
        raise Refused(400, "the body is empty: send the bytes of a sound file")
    return b"".join(parts)


def protocol(seconds: float) -> type[H11Protocol]:
    """HTTP/1.1 that closes connections whose request line and headers take longer."""

    class Impatient(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timer = self.loop.call_later(seconds, self._check)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
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

    return Impatient
