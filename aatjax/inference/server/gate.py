"""ASGI middleware in front of the server's routes."""

import re
import time

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aatjax.inference.server.limits import CLOSE, RefusedError, ServerLimits
from aatjax.inference.server.metrics import ServerMetrics

PORT = re.compile(r":\d+$")
RETRY = {"Retry-After": "1"}
PROBES = ("/livez", "/readyz", "/healthz", "/metrics")
"""Paths that are answered however many requests are in progress."""


def format_error(error: RefusedError) -> JSONResponse:
    """Return the answer to a refused request: `{"error": ...}`."""
    return JSONResponse({"error": error.message}, error.status, error.headers)


class Gate:
    """Counts requests, refuses other host names and too many at once; HEAD is GET without a body.

    The body of a refused request is never read.

    Args:
        app: the application.
        metrics: counts the requests.
        limits: `concurrency`.
        hosts: names by which requests may call this host; None for any.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: ServerMetrics,
        limits: ServerLimits,
        hosts: list[str] | None,
    ) -> None:
        self._app, self._metrics = app, metrics
        self._most, self._hosts = limits.concurrency, hosts
        self._in_progress = 0
        metrics.add_gauge("requests_under_way", "Requests in progress.", lambda: self._in_progress)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        if scope["method"] == "HEAD":  # uvicorn sends no body
            scope = {**scope, "method": "GET"}
        refusal = self._find_refusal(scope)
        self._in_progress += 1
        try:
            app = self._app if refusal is None else format_error(refusal)
            await app(scope, receive, send_and_note)
        finally:
            self._in_progress -= 1
            self._metrics.count_request(status, time.perf_counter() - began)

    def _find_refusal(self, scope: Scope) -> RefusedError | None:
        given = Headers(scope=scope).get("host")
        host = PORT.sub("", given or "").lower()
        named = given is not None or scope["http_version"] != "1.0"  # browsers always name one
        if self._hosts is not None and named and host not in self._hosts:  # DNS rebinding
            reason = f"host {host!r} is refused: use {' or '.join(self._hosts)}"
            return RefusedError(400, f"{reason}; aatjax serve --host allows others", CLOSE)
        if self._in_progress >= self._most and scope["path"] not in PROBES:
            reason = f"{self._most} requests are in progress: try again"
            return RefusedError(429, reason, RETRY | CLOSE)
        return None
