"""The web application: sound files in, predictions of named adapters out, as JSON."""

import asyncio
import contextlib
import difflib
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aatjax.audio.decode import decode
from aatjax.audio.waveform import AudioError
from aatjax.audio.windows import RATE, Window, compute_step, count_windows, cut_windows
from aatjax.errors import AatjaxError
from aatjax.inference.classifier import Classifier
from aatjax.inference.prediction import WindowLogits
from aatjax.inference.server.adapters import AdapterStore, ServedAdapter
from aatjax.inference.server.batching import Batcher, QueueFullError
from aatjax.inference.server.limits import CLOSE, RefusedError, ServerLimits, read_body
from aatjax.inference.server.metrics import ServerMetrics

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
PORT = re.compile(r":\d+$")
FILE = "adapter.safetensors"
RETRY = {"Retry-After": "1"}


def find_adapters(folder: Path) -> dict[str, Path]:
    """Return the adapter files of a folder by name: NAME.safetensors, NAME/adapter.safetensors."""
    found = {path.parent.name: path for path in sorted(folder.glob(f"*/{FILE}"))}
    found |= {path.stem: path for path in sorted(folder.glob("*.safetensors")) if path.name != FILE}
    return {name: path for name, path in found.items() if NAME.fullmatch(name)}


def make_app(
    store: AdapterStore,
    limits: ServerLimits,
    *,
    folder: Path | None = None,
    hosts: list[str] | None = None,
) -> FastAPI:
    """Return the application.

    Args:
        store: the adapters in memory.
        limits: limits of requests.
        folder: from where requests may load more adapters, and drop any; None: they may not.
        hosts: names by which requests may call this host; None for any.
    """
    service = _Service(store, limits, folder)
    app = FastAPI(title="aatjax", lifespan=service.run)
    for kind in (RefusedError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.get("/healthz")(service.get_health)
    app.get("/metrics")(service.get_metrics)
    app.get("/v1/adapters")(service.get_adapters)
    app.post("/v1/adapters/{name}/predict")(service.predict)
    if folder is not None:
        app.put("/v1/adapters/{name}")(service.load_adapter)
        app.delete("/v1/adapters/{name}")(service.drop_adapter)
    app.add_middleware(_Gate, service.metrics, limits, hosts)
    return app


class _Service:
    """The handlers of the routes."""

    def __init__(self, store: AdapterStore, limits: ServerLimits, folder: Path | None) -> None:
        self._store, self._limits, self._folder = store, limits, folder
        self.metrics = ServerMetrics()
        self._batcher = Batcher(self.metrics, limits)
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "adapters": ("Adapters in memory.", lambda: len(store.list_adapters())),
            "adapter_parameters": (
                "Parameters of the adapters in memory.",
                lambda: sum(served.parameters for served in store.list_adapters()),
            ),
            "windows_waiting": ("Windows that wait.", lambda: self._batcher.waiting),
        }
        for name, (help, read) in gauges.items():
            self.metrics.add_gauge(name, help, read)

    @contextlib.asynccontextmanager
    async def run(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(self._batcher.close)

    async def get_health(self) -> dict[str, Any]:
        return {"status": "ok", "adapters": len(self._store.list_adapters())}

    async def get_metrics(self) -> Response:
        return Response(self.metrics.format(), media_type=CONTENT_TYPE_LATEST)

    async def get_adapters(self) -> dict[str, Any]:
        return {"adapters": [_describe(served) for served in self._store.list_adapters()]}

    async def load_adapter(self, name: str) -> dict[str, Any]:
        _check_name(name)
        assert self._folder is not None
        path = find_adapters(self._folder).get(name)
        if path is None:
            raise RefusedError(404, f"no file {name}.safetensors or {name}/{FILE} is served")
        try:
            return _describe(await run_in_threadpool(self._store.load, name, path))
        except AatjaxError as error:
            raise RefusedError(422, str(error)) from error

    async def drop_adapter(self, name: str) -> dict[str, Any]:
        _check_name(name)
        if not self._store.drop(name):
            raise _refuse_unknown(name, self._store)
        return {"dropped": name}

    async def predict(
        self,
        name: str,
        request: Request,
        hop: float | None = None,
        partial: bool = False,
        detail: bool = False,
    ) -> dict[str, Any]:
        """Predict the classes of a sound file.

        Args:
            name: the adapter.
            request: its body is the file.
            hop: seconds between window starts; by default those of the adapter's scoring.
            partial: accept a truncated file, and the start of a too long one, with a `note`.
            detail: return the probabilities of every window too.
        """
        _check_name(name)
        limits = self._limits
        with self._store.use(name) as served:
            if served is None:
                raise _refuse_unknown(name, self._store)
            body = await read_body(request, limits)
            try:
                async with asyncio.timeout(limits.timeout):
                    windows, note, notes = await run_in_threadpool(
                        _read_windows, body, served.classifier, hop, partial, limits
                    )
                    del body
                    logits = await self._batcher.compute_logits(served, windows)
            except TimeoutError:
                reason = f"no answer within {limits.timeout:g} s: try again"
                raise RefusedError(504, reason) from None
            except QueueFullError:
                reason = f"{limits.queue} windows of sound wait: try again"
                raise RefusedError(429, reason, RETRY) from None
            found = WindowLogits.from_windows(logits, windows)
            prediction = served.classifier.summarize("", found, notes)
        answer = {"adapter": name, **prediction.to_json(detail=detail), **note}
        del answer["path"]
        return answer


class _Gate:
    """ASGI middleware: counts requests, refuses other host names and too many at once.

    The body of a refused request is never read.
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

        refusal = self._find_refusal(scope)
        self._in_progress += 1
        try:
            app = self._app if refusal is None else _format_error(refusal)
            await app(scope, receive, send_and_note)
        finally:
            self._in_progress -= 1
            self._metrics.count_request(status, time.perf_counter() - began)

    def _find_refusal(self, scope: Scope) -> RefusedError | None:
        host = PORT.sub("", Headers(scope=scope).get("host", "")).lower()
        if self._hosts is not None and host not in self._hosts:  # DNS rebinding
            reason = f"host {host!r} is refused: use {' or '.join(self._hosts)}"
            return RefusedError(400, f"{reason}; aatjax serve --host allows others", CLOSE)
        if self._in_progress >= self._most and scope["path"] not in ("/healthz", "/metrics"):
            reason = f"{self._most} requests are in progress: try again"
            return RefusedError(429, reason, RETRY | CLOSE)
        return None


def _read_windows(
    body: bytes, classifier: Classifier, hop: float | None, partial: bool, limits: ServerLimits
) -> tuple[list[Window], dict[str, str], tuple[str, ...]]:
    """The windows of a sound file, a note on what of it is missing, if any, and all notes."""
    frontend = classifier.frontend
    try:
        step = compute_step(frontend.samples, classifier.find_hop(hop))
        sound = decode(
            body,
            channels=frontend.channels,
            max_seconds=limits.max_seconds + 1,
            truncated="keep" if partial else "skip",
        )
    except AudioError as error:
        reason = str(error).removeprefix("<bytes>: ").partition("; pass truncated=")[0]
        readable = error.reason == "truncated" and error.__cause__ is None
        more = "; ?partial=true accepts it" if readable else ""
        raise RefusedError(422, f"not a usable sound: {reason}{more}") from error
    except AatjaxError as error:
        raise RefusedError(422, str(error)) from error
    waveform, most = sound.waveform, round(limits.max_seconds * RATE)
    notes = [note for note in sound.notes if note.startswith("truncated")]
    if waveform.size > most:
        if not partial:
            reason = f"the sound is longer than {limits.max_seconds:g} s"
            raise RefusedError(413, f"{reason}: cut it, or raise --max-seconds")
        notes = [f"only the first {limits.max_seconds / 60:g} minutes were analysed"]
        waveform = waveform[:most]
    count = count_windows(waveform.size, frontend.samples, step)
    if count > limits.queue:
        raise RefusedError(
            413,
            f"{count} windows, more than the {limits.queue} that may wait: send a shorter "
            "sound, or give a longer hop=",
        )
    windows = list(cut_windows([waveform], frontend, step))
    return windows, {"note": notes[0]} if notes else {}, sound.notes


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        reason = "the name of an adapter has letters, digits, '.', '_' and '-', and no path"
        raise RefusedError(404, reason)


def _refuse_unknown(name: str, store: AdapterStore) -> RefusedError:
    names = [served.name for served in store.list_adapters()]
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see GET /v1/adapters"
    return RefusedError(404, f"no adapter {name!r} is loaded: {hint}")


def _describe(served: ServedAdapter) -> dict[str, Any]:
    classifier = served.classifier
    return {
        "name": served.name,
        "method": served.method,
        "parameters": served.parameters,
        "classes": list(classifier.classes),
        "multi_label": classifier.multi_label,
        "seconds": classifier.frontend.samples / RATE,
    }


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        error = RefusedError(error.status_code, str(error.detail), dict(error.headers or {}))
    elif isinstance(error, RequestValidationError):
        parts = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        error = RefusedError(422, "; ".join(parts))
    elif not isinstance(error, RefusedError):
        error = RefusedError(500, "the server failed at this request; see its log")
    return _format_error(error)


def _format_error(error: RefusedError) -> JSONResponse:
    return JSONResponse({"error": error.message}, error.status, error.headers)
