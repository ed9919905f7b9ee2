"""The web application: sound files in, predictions of named adapters out, as JSON."""

import asyncio
import contextlib
import difflib
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from aatjax.audio.decode import decode
from aatjax.audio.waveform import AudioError
from aatjax.audio.windows import RATE, Window, compute_step, count_windows, cut_windows
from aatjax.errors import AatjaxError, suggest
from aatjax.inference.classifier import Classifier
from aatjax.inference.prediction import WindowLogits
from aatjax.inference.server.adapters import AdapterStore, ClosedError, ServedAdapter
from aatjax.inference.server.batching import Batcher, QueueFullError
from aatjax.inference.server.gate import RETRY, Gate, format_error
from aatjax.inference.server.limits import CLOSE, RefusedError, ServerLimits, read_body
from aatjax.inference.server.metrics import ServerMetrics

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
FILE = "adapter.safetensors"
MOST_LOADS = 8
"""Adapters that may be loading, or wait for it."""
SOUND: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("audio/*", "application/octet-stream")
        },
    }
}
"""The body of a prediction, for OpenAPI."""


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
    start: Callable[[], object] | None = None,
) -> FastAPI:
    """Return the application.

    Args:
        store: the adapters in memory.
        limits: limits of requests.
        folder: from where requests may load more adapters, and drop any; None: they may not.
        hosts: names by which requests may call this host; None for any.
        start: loads the first adapters, in a thread of its own; `/readyz` waits for it.
    """
    service = _Service(store, limits, folder, start)
    # Pages of documentation would fetch their scripts from another host.
    app = FastAPI(title="aatjax", lifespan=service.run, docs_url=None, redoc_url=None)
    for kind in (RefusedError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.get("/livez")(service.get_life)
    app.get("/readyz")(service.get_readiness)
    app.get("/healthz")(service.get_health)
    app.get("/metrics")(service.get_metrics)
    routes = APIRouter(prefix="/v1/adapters", dependencies=[Depends(_check_query)])
    routes.get("")(service.get_adapters)
    routes.get("/{name}")(service.get_adapter)
    routes.post("/{name}/predict", openapi_extra=SOUND)(service.predict)
    if folder is not None:
        routes.put("/{name}")(service.load_adapter)
        routes.delete("/{name}")(service.drop_adapter)
    app.include_router(routes)
    app.add_middleware(Gate, service.metrics, limits, hosts)
    return app


class _Service:
    """The handlers of the routes."""

    def __init__(
        self,
        store: AdapterStore,
        limits: ServerLimits,
        folder: Path | None,
        start: Callable[[], object] | None,
    ) -> None:
        self._store, self._limits, self._folder = store, limits, folder
        self._start, self._ready = start, start is None
        # Loads wait for each other here, and take no thread from the requests.
        self._loader = ThreadPoolExecutor(1, "loader")
        self._loads = 0
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
        self._loader.submit(self._load_first)
        yield
        self._store.close()
        await run_in_threadpool(self._loader.shutdown, cancel_futures=True)
        await run_in_threadpool(self._batcher.close)

    def _load_first(self) -> None:
        if self._start is not None:
            self._start()
        self._ready = True

    async def get_life(self) -> dict[str, Any]:
        return {"status": "ok"}

    async def get_readiness(self) -> Response:
        if self._ready:
            return JSONResponse({"status": "ready", "adapters": len(self._store.list_adapters())})
        compiled, total = self._store.progress
        answer = {"error": f"not ready: {compiled} of {total} compiled"}
        return JSONResponse({**answer, "compiled": compiled, "of": total}, 503, RETRY)

    async def get_health(self) -> dict[str, Any]:
        return {"status": "ok", "adapters": len(self._store.list_adapters())}

    async def get_metrics(self) -> Response:
        return Response(self.metrics.format(), media_type=CONTENT_TYPE_LATEST)

    async def get_adapters(self) -> dict[str, Any]:
        return {"adapters": [_describe(served) for served in self._store.list_adapters()]}

    async def get_adapter(self, name: str) -> dict[str, Any]:
        with self._store.use(name) as served:
            return _describe(self._check_served(name, served))

    async def load_adapter(self, name: str) -> dict[str, Any]:
        """Load an adapter of the folder, or load it again; answers once requests can use it."""
        _check_name(name)
        assert self._folder is not None
        path = find_adapters(self._folder).get(name)
        if path is None:
            raise RefusedError(404, f"no file {name}.safetensors or {name}/{FILE} is served")
        if self._loads >= MOST_LOADS:
            raise RefusedError(429, f"{self._loads} adapters are being loaded: try again", RETRY)
        self._loads += 1
        try:
            loop = asyncio.get_running_loop()
            served = await loop.run_in_executor(self._loader, self._store.load, name, path)
        except ClosedError as error:
            raise RefusedError(503, str(error), CLOSE) from error
        except AatjaxError as error:
            raise RefusedError(422, str(error)) from error
        finally:
            self._loads -= 1
        return _describe(served)

    def _check_served(self, name: str, served: ServedAdapter | None) -> ServedAdapter:
        if served is not None:
            return served
        _check_name(name)
        if name in self._store.pending:
            compiled, total = self._store.progress
            reason = f"adapter {name!r} is being loaded, {compiled} of {total} compiled: try again"
            raise RefusedError(503, reason, RETRY)
        raise _refuse_unknown(name, self._store)

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
        limits = self._limits
        with self._store.use(name) as served:
            served = self._check_served(name, served)
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
            except QueueFullError as error:
                raise RefusedError(429, f"{error}: try again", RETRY) from None
            found = WindowLogits.from_windows(logits, windows)
            prediction = served.classifier.summarize("", found, notes)
        answer = {"adapter": name, **prediction.to_json(detail=detail), **note}
        del answer["path"]
        return answer


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


def _check_query(request: Request) -> None:
    """Refuse parameters of the address that the route does not have."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            there = suggest(name, known) or f": there are {', '.join(known) or 'none'}"
            raise RefusedError(400, f"unknown parameter {name!r}{there}")


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
    return format_error(error)
