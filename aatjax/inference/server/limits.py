"""Limits of requests, and how a request is refused."""

import asyncio
import dataclasses
import time
from typing import Annotated, Any

from aatjax.errors import Range, check_fields

AUDIO_TYPES = ("audio/", "application/octet-stream", "application/ogg")
CLOSE = {"Connection": "close"}

Count = Annotated[int, Range(1)]
Seconds = Annotated[float, Range(above=0)]


@dataclasses.dataclass(frozen=True)
class ServerLimits:
    """Limits of the server.

    Attributes:
        max_bytes: bytes of a request body.
        max_seconds: seconds of a sound.
        body_timeout: seconds for the headers, and for the body, to arrive.
        timeout: seconds from then to the answer.
        concurrency: requests in progress; one more is answered with 429.
        connections: open connections; one more is answered with 503.
        queue: windows that may wait.
        batch_size: windows per batch.
        wait: seconds that a batch waits for more windows.
    """

    max_bytes: Count = 32 * 2**20
    max_seconds: Seconds = 600.0
    body_timeout: Seconds = 20.0
    timeout: Seconds = 60.0
    concurrency: Count = 64
    connections: Count = 4096
    queue: Count = 1024
    batch_size: Count = 16
    wait: Annotated[float, Range(0)] = 0.005

    def __post_init__(self) -> None:
        check_fields(self, "")


class RefusedError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        message: what is wrong and what to do.
        headers: more headers of the answer.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status: int = status
        self.message: str = message
        self.headers: dict[str, str] | None = headers


async def read_body(request: Any, limits: ServerLimits) -> bytes:
    """Return the body of a request, holding at most `max_bytes` and a chunk of it in memory.

    Raises:
        RefusedError: 415 for a wrong content type or a compressed body, 413 for too many bytes, 408
            if it takes too long, 400 if the client closed the connection or sent nothing.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if not kind.startswith(AUDIO_TYPES):
        raise RefusedError(
            415,
            f"content type {kind or 'none'!r}: send the bytes of a sound file as audio/* or "
            "application/octet-stream",
        )
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        reason = f"content encoding {coding!r}: send the bytes of the sound file as they are"
        raise RefusedError(415, reason, {"Accept-Encoding": "identity"})
    too_large = RefusedError(
        413,
        f"the body has more than {limits.max_bytes} bytes: send a shorter sound, or raise "
        "--max-bytes",
        CLOSE,
    )
    declared = request.headers.get("content-length")
    if declared is not None and int(declared) > limits.max_bytes:
        raise too_large
    parts: list[bytes] = []
    size, until, more = 0, time.monotonic() + limits.body_timeout, True
    while more:
        try:
            message = await asyncio.wait_for(request.receive(), until - time.monotonic())
        except TimeoutError:
            reason = f"the body did not arrive within {limits.body_timeout:g} s ({size} bytes did)"
            raise RefusedError(408, reason, CLOSE) from None
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "the connection was closed before the body was complete")
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
        size += len(parts[-1])
        if size > limits.max_bytes:
            raise too_large
    if not size:
        raise RefusedError(400, "the body is empty: send the bytes of a sound file")
    return b"".join(parts)
