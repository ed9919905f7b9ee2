"""The web server: adapters by name, sounds in, what `aatjax predict` says out."""

import asyncio
import contextlib
import dataclasses
import difflib
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aatjax.audio.decode import decode
from aatjax.audio.waveform import AudioError
from aatjax.errors import AatjaxError
from aatjax.inference.classifier import RATE, Cut, cut, step_of
from aatjax.inference.server.adapters import Bank, Held
from aatjax.inference.server.batching import Batches, Full
from aatjax.inference.server.limits import Refused, read_body
from aatjax.inference.server.metrics import Gauges

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
PORT = re.compile(r":\d+$")
FILE = "adapter.safetensors"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the server puts up with.

    Attributes:
        max_bytes: bytes of a body.
        max_seconds: seconds of a sound.
        body_timeout: seconds for a body to arrive, and for the headers.
        timeout: seconds from then to the answer.
        concurrency: requests under way; one more is answered with 429.
        queue: windows that may wait.
        batch_size: windows of a pass.
        wait: seconds that the first window of a batch waits for company.
    """

    max_bytes: int = 32 * 2**20
    max_seconds: float = 600.0
    body_timeout: float = 20.0
    timeout: float = 60.0
    concurrency: int = 64
    queue: int = 1024
    batch_size: int = 16
    wait: float = 0.005


def find_adapters(folder: Path) -> dict[str, Path]:
    """The adapter files of a folder: NAME.safetensors and NAME/adapter.safetensors, by name."""
    found = {path.parent.name: path for path in sorted(folder.glob(f"*/{FILE}"))}
    found |= {path.stem: path for path in sorted(folder.glob("*.safetensors")) if path.name != FILE}
    return {name: path for name, path in found.items() if NAME.fullmatch(name)}


def make_app(folder: Path, bank: Bank, limits: Limits, hosts: list[str] | None = None) -> FastAPI:
    """The application.

    Args:
        folder: where adapters are loaded from by name.
        bank: the adapters in memory.
        limits: what it puts up with.
        hosts: names that requests may call this host by; None for any.
    """
    gauges = Gauges()
    batches = Batches(gauges, size=limits.batch_size, wait=limits.wait, longest=limits.queue)
    gate = _Gate(gauges, limits.concurrency, hosts)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batches.close)

    app = FastAPI(title="aatjax serve", lifespan=lifespan)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return _error(error)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
        return _error(Refused(error.status_code, str(error.detail), dict(error.headers or {})))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        return _error(Refused(422, told))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return _error(Refused(500, "the server failed at this request; its log says where"))

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "adapters": len(bank.all())}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        held = bank.all()
        now = {
            "adapters": len(held),
            "adapter_parameters": sum(h.parameters for h in held),
            "requests_under_way": gate.under_way,
            "windows_waiting": batches.waiting,
        }
        return PlainTextResponse(gauges.text(now), media_type="text/plain; version=0.0.4")

    @app.get("/v1/adapters")
    async def adapters() -> dict[str, Any]:
        return {"adapters": [_about(held) for held in bank.all()]}

    @app.put("/v1/adapters/{name}")
    async def load(name: str) -> dict[str, Any]:
        _check(name)
        path = find_adapters(folder).get(name)
        if path is None:
            raise Refused(404, f"no file {name}.safetensors or {name}/{FILE} is served")
        try:
            return _about(await run_in_threadpool(bank.load, name, path))
        except AatjaxError as error:
            raise Refused(422, str(error)) from error

    @app.delete("/v1/adapters/{name}")
    async def drop(name: str) -> dict[str, Any]:
        _check(name)
        if not bank.drop(name):
            raise _unknown(name, bank)
        return {"dropped": name}

    @app.post("/v1/adapters/{name}/predict")
    async def predict(name: str, request: Request, hop: float | None = None) -> dict[str, Any]:
        _check(name)
        with bank.using(name) as held:
            if held is None:
                raise _unknown(name, bank)
            body = await read_body(request, most=limits.max_bytes, seconds=limits.body_timeout)
            try:
                async with asyncio.timeout(limits.timeout):
                    windows = await run_in_threadpool(_windows, body, held, hop, limits)
                    del body
                    logits = await batches.logits(held, windows)
            except TimeoutError:
                raise Refused(504, f"no answer within {limits.timeout:g} s: try again") from None
            except Full:
                raise Refused(
                    429, f"{limits.queue} windows of sound wait: try again", {"Retry-After": "1"}
                ) from None
            told = held.prediction("", logits, windows).to_json()
            return {"adapter": name, **{k: v for k, v in told.items() if k != "path"}}

    app.add_middleware(lambda inner: gate.around(inner))
    return app


class _Gate:
    """Counts requests, and refuses those that call this host by another name or are too many.

    ASGI, so that the body of a refused request is never read.
    """

    def __init__(self, gauges: Gauges, most: int, hosts: list[str] | None) -> None:
        self._gauges, self._most, self._hosts = gauges, most, hosts
        self.under_way = 0

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application, counted."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            began, status = time.perf_counter(), 500

            async def watched(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            refusal = self._refusal(scope)
            self.under_way += 1
            try:
                await (_error(refusal) if refusal else app)(scope, receive, watched)
            finally:
                self.under_way -= 1
                self._gauges.request(status, time.perf_counter() - began)

        return counted

    def _refusal(self, scope: Scope) -> Refused | None:
        host = PORT.sub("", Headers(scope=scope).get("host", "")).lower()
        if self._hosts is not None and host not in self._hosts:  # DNS rebinding
            return Refused(
                400,
                f"this is not {host!r}: call it {' or '.join(self._hosts)}, or start it with "
                "--host",
                {"Connection": "close"},
            )
        if self.under_way >= self._most and scope["path"] not in ("/healthz", "/metrics"):
            return Refused(
                429,
                f"{self._most} requests are under way: try again",
                {"Retry-After": "1", "Connection": "close"},
            )
        return None


def _windows(body: bytes, held: Held, hop: float | None, limits: Limits) -> list[Cut]:
    """The windows of a sound file."""
    frontend = held.classifier.frontend
    try:
        step = step_of(frontend, hop)
        sound = decode(body, channels=frontend.channels, max_seconds=limits.max_seconds + 1)
    except AudioError as error:
        reason = str(error).replace("<bytes>: ", "").replace("pass truncated='keep'", "")
        raise Refused(422, f"not a sound that can be used: {reason}") from error
    except AatjaxError as error:
        raise Refused(422, str(error)) from error
    if sound.waveform.size > limits.max_seconds * RATE:
        raise Refused(
            413,
            f"the sound is longer than {limits.max_seconds:g} s: cut it, or raise --max-seconds",
        )
    count = 1 - (-max(0, sound.waveform.size - frontend.samples) // step)
    if count > limits.queue:
        raise Refused(
            413,
            f"{count} windows, more than the {limits.queue} that may wait: send a shorter "
            "sound, or give a longer hop=",
        )
    return list(cut([sound.waveform], frontend, step))


def _check(name: str) -> None:
    if not NAME.fullmatch(name):
        raise Refused(
            404, "the name of an adapter has letters, digits, '.', '_' and '-', and no path"
        )


def _unknown(name: str, bank: Bank) -> Refused:
    names = [held.name for held in bank.all()]
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see GET /v1/adapters"
    return Refused(404, f"no adapter {name!r} is loaded: {hint}")


def _about(held: Held) -> dict[str, Any]:
    adapter = held.adapter
    return {
        "name": held.name,
        "method": adapter.info["method"]["name"],
        "parameters": held.parameters,
        "classes": list(adapter.classes),
        "multi_label": adapter.multi_label,
        "seconds": adapter.frontend.samples / RATE,
    }


def _error(refused: Refused) -> JSONResponse:
    return JSONResponse(
        {"error": refused.message}, status_code=refused.status, headers=refused.headers
    )
