"""`aatjax serve` before, while and after it compiles; connections and odd requests."""

import asyncio
import io
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from aatjax import load, petl
from aatjax.audio.frontend import FrontEnd
from aatjax.errors import AatjaxError, UsageError
from aatjax.train.adapter_file import save_adapter

pytest.importorskip("fastapi", reason="the server needs fastapi: pip install 'aatjax[serve]'")
pytest.importorskip("httpx", reason="starlette's test client needs httpx")

from fastapi.testclient import TestClient

from aatjax.inference.server.adapters import AdapterStore
from aatjax.inference.server.app import find_adapters, make_app
from aatjax.inference.server.batching import Batcher, QueueFullError
from aatjax.inference.server.limits import ServerLimits
from aatjax.inference.server.metrics import ServerMetrics
from aatjax.inference.server.serve import open_socket, run_server
from aatjax.inference.server.stacked import AdapterGroup

LIMITS = ServerLimits(batch_size=2, wait=0)
BATCHES = len(("one", "two"))


@pytest.fixture(scope="module")
def folder(small_ast: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of two groups."""
    folder = tmp_path_factory.mktemp("served")
    base = load(small_ast, frames=64, num_classes=2)
    for name, method in {"lora": petl.LoRA(rank=2), "linear": petl.Linear()}.items():
        save_adapter(
            folder / f"{name}.safetensors",
            petl.adapt(base, method),
            classes=("yes", "no"),
            multi_label=False,
            frontend=FrontEnd(frames=64),
        )
    return folder


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    """A server with one adapter."""
    store = AdapterStore(largest=2)
    store.load("linear", folder / "linear.safetensors")
    with TestClient(make_app(store, LIMITS, folder=folder)) as client:
        yield client


def make_sound() -> bytes:
    file = io.BytesIO()
    noise = 0.1 * np.random.default_rng(0).normal(size=4000)
    soundfile.write(file, noise, 16000, "PCM_16", format="WAV")
    return file.getvalue()


SOUND = make_sound()
WAV = {"Content-Type": "audio/wav"}


def post(client: TestClient, name: str = "linear", query: str = "", **headers: str) -> Any:
    path = f"/v1/adapters/{name}/predict{query}"
    return client.post(path, content=SOUND, headers={**WAV, **headers})


class Steps:
    """Programs that are compiled when they are let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._allowed, self._compile = threading.Semaphore(0), AdapterGroup._compile
        self._waiting = threading.Event()
        monkeypatch.setattr(AdapterGroup, "_compile", lambda *given: self._run(*given))

    def _run(self, *given: Any) -> Any:
        self._waiting.set()
        assert self._allowed.acquire(timeout=20)
        return self._compile(*given)

    def allow(self, count: int) -> None:
        for _ in range(count):
            self._allowed.release()

    def wait(self) -> None:
        assert self._waiting.wait(20)


def wait_until(true: Any) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_ready_means_that_every_adapter_and_batch_size_is_compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    store, reported = AdapterStore(largest=2), []
    app = make_app(
        store, LIMITS, start=lambda: store.load_all(find_adapters(folder), reported.append)
    )
    with TestClient(app) as client:
        steps.wait()
        for compiled in range(2 * BATCHES):
            wait_until(lambda compiled=compiled: store.progress == (compiled, 2 * BATCHES))
            answer = client.get("/readyz")
            assert answer.status_code == 503 and answer.headers["Retry-After"] == "1"
            assert answer.json()["error"] == f"not ready: {compiled} of 4 compiled"
            assert client.get("/livez").json() == {"status": "ok"}
            assert client.get("/healthz").json()["adapters"] == compiled // BATCHES
            early = post(client, "lora")
            assert early.status_code == 503 and f"{compiled} of 4 compiled" in early.json()["error"]
            steps.allow(1)
            wait_until(lambda compiled=compiled: store.progress[0] > compiled)
            if compiled + 1 == BATCHES:  # its group answers before the other is compiled
                wait_until(lambda: len(store.list_adapters()) == 1)
                assert post(client).status_code == 200
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.get("/readyz").json() == {"status": "ready", "adapters": 2}
        monkeypatch.setattr(AdapterGroup, "_compile", None)
        assert post(client).status_code == post(client, "lora").status_code == 200
    assert [served.name for served in reported] == ["linear", "lora"]


def test_others_are_answered_while_an_adapter_compiles(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch)
    with ThreadPoolExecutor(12) as pool:
        loads = [pool.submit(client.put, "/v1/adapters/lora") for _ in range(12)]
        steps.wait()
        wait_until(lambda: sum(load.done() for load in loads) == 4)  # no more than eight wait
        assert {load.result().status_code for load in loads if load.done()} == {429}
        assert client.get("/readyz").status_code == 200
        assert [post(client).status_code for _ in range(4)] == [200] * 4
        assert post(client, "lora").status_code == 503
        assert client.get("/v1/adapters/lora").status_code == 503
        assert [a["name"] for a in client.get("/v1/adapters").json()["adapters"]] == ["linear"]
        steps.allow(8 * BATCHES)
        assert sorted({load.result().status_code for load in loads}) == [200, 429]
    assert post(client, "lora").status_code == 200
    assert client.get("/v1/adapters/lora").json()["method"] == "lora"


def test_a_server_that_ends_stops_compiling(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    store, errors = AdapterStore(largest=2), []

    def start() -> None:
        try:
            store.load_all(find_adapters(folder), print)
        except AatjaxError as error:
            errors.append(str(error))

    with TestClient(make_app(store, LIMITS, start=start)):
        steps.wait()
        store.close()
        steps.allow(1)
    assert errors == ["the server ends: nothing more is loaded"] and not store.list_adapters()


def test_windows_that_could_not_be_computed_in_time_are_refused() -> None:
    rows = SimpleNamespace(rows={0: (0, 2)})
    group = SimpleNamespace(stack=lambda: rows, compute_logits=lambda *given: np.zeros((4, 2)))
    served = SimpleNamespace(key=0, group=group)
    batcher = Batcher(ServerMetrics(), ServerLimits(batch_size=4, timeout=10, wait=1))

    def ask(count: int) -> Any:
        batcher._seconds = 3.0  # of a batch
        return asyncio.run(batcher.compute_logits(served, [None] * count))  # pyright: ignore

    assert len(ask(12)) == 12
    with pytest.raises(QueueFullError, match="13 windows of sound need about 12 s"):
        ask(13)
    batcher.close()


def test_unknown_parameters_of_the_address_are_refused(client: TestClient) -> None:
    for query, words in (
        ("?hopp=1", "unknown parameter 'hopp', did you mean 'hop'?"),
        ("?hop=1&Detail=true", "unknown parameter 'Detail', did you mean 'detail'?"),
        ("?x=1", "unknown parameter 'x': there are hop, partial, detail"),
    ):
        answer = post(client, query=query)
        assert answer.status_code == 400 and answer.json()["error"] == words
    answer = client.get("/v1/adapters?x")
    assert answer.status_code == 400 and answer.json()["error"].endswith("there are none")


def test_a_compressed_body_is_refused(client: TestClient) -> None:
    for coding in ("gzip", "br, identity", "GZIP"):
        answer = post(client, **{"Content-Encoding": coding})
        assert answer.status_code == 415 and "as they are" in answer.json()["error"]
        assert answer.headers["Accept-Encoding"] == "identity"
    assert post(client, **{"Content-Encoding": "identity"}).status_code == 200


def test_head_is_get_without_a_body(client: TestClient) -> None:
    for path in ("/livez", "/readyz", "/healthz", "/v1/adapters", "/openapi.json", "/nothing"):
        head, get = client.head(path), client.get(path)
        assert head.status_code == get.status_code and head.content == b"" != get.content
        assert head.headers["Content-Type"] == get.headers["Content-Type"]
    assert client.head("/v1/adapters/linear/predict").status_code == 405
    body = client.get("/openapi.json").json()["paths"]["/v1/adapters/{name}/predict"]["post"]
    assert "audio/*" in body["requestBody"]["content"]
    assert client.get("/docs").status_code == 404  # it would load scripts of another host


# --- over sockets --------------------------------------------------------------------------------


def ask(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as link:
        link.sendall(request)
        found = b""
        while data := link.recv(65536):
            found += data
        return found


def test_connections_are_bounded_and_old_clients_answered(tmp_path: Path) -> None:
    """A real server, in this process: its start ends it with an error, which is raised."""
    limits = ServerLimits(connections=3, body_timeout=5, timeout=1)
    listening = open_socket("127.0.0.1", 0)
    port = listening.getsockname()[1]
    found: list[bytes] = []

    def start() -> None:
        for request in (
            b"GET /livez HTTP/1.0\r\n\r\n",
            b"HEAD /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
            b"GET /livez HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
        ):
            found.append(ask(port, request))
        open_links = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        time.sleep(0.2)
        found.append(ask(port, b"GET /livez HTTP/1.0\r\n\r\n"))
        for link in open_links:
            link.close()
        raise UsageError("nothing to serve")

    hosts = ["localhost"]
    with pytest.raises(UsageError, match="nothing to serve"):
        run_server(
            lambda start: make_app(AdapterStore(), limits, hosts=hosts, start=start),
            start,
            listening,
            limits,
        )
    old, head, evil, full = found
    assert old.startswith(b"HTTP/1.1 200") and old.endswith(b'{"status":"ok"}')
    assert head.startswith(b"HTTP/1.1 200") and head.endswith(b"\r\n\r\n")
    assert evil.startswith(b"HTTP/1.1 400")
    assert full.startswith(b"HTTP/1.1 503") and b"3 connections are open" in full
