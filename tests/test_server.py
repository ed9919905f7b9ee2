"""`aatjax serve`: answers equal `predict`, whatever shares a batch; limits hold."""

import asyncio
import dataclasses
import functools
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile
from adapter_files import rewrite
from flax import nnx
from safetensors.numpy import load_file

from aatjax import load, petl, surgery
from aatjax.audio.decode import decode
from aatjax.audio.frontend import FrontEnd
from aatjax.audio.windows import Window, cut_windows
from aatjax.convert import write_native
from aatjax.inference.calibration import Calibration
from aatjax.inference.classifier import Classifier
from aatjax.models.ast import AST, ASTConfig
from aatjax.train.adapter_file import save_adapter

pytest.importorskip("fastapi", reason="the server needs fastapi: pip install 'aatjax[serve]'")
pytest.importorskip("httpx", reason="starlette's test client needs httpx")

from fastapi.testclient import TestClient

from aatjax.inference.server.adapters import AdapterStore
from aatjax.inference.server.app import find_adapters, make_app
from aatjax.inference.server.batching import Batcher
from aatjax.inference.server.limits import ServerLimits
from aatjax.inference.server.metrics import ServerMetrics
from aatjax.inference.server.stacked import list_batch_sizes
from aatjax.train.forward import split_model

CONFIG = ASTConfig(
    dim=16,
    depth=1,
    heads=2,
    mlp_dim=24,
    stride=(16, 16),
    frames=64,
    mels=32,
    num_classes=3,
    pool="mean_patches",
)
METHODS: dict[str, petl.Method] = {
    "soft_moa": petl.SoftMoA(num_experts=2, reduction=8),
    "lora": petl.LoRA(reduction=8),
    "conformer": petl.Adapter(block="conformer", reduction=8),
    "linear": petl.Linear(),
    "full": petl.Full(),
}
MANY = 40


def write_adapter(
    folder: Path,
    name: str,
    method: petl.Method,
    seed: int,
    *,
    classes: int,
    frames: int = 64,
    multi_label: bool = False,
    calibrated: bool = False,
) -> Path:
    """An adapter whose every trained number is random, on the base of the folder."""
    rng = np.random.default_rng(seed)
    base = load(folder / "base" / "weights.safetensors", frames=frames, num_classes=classes)
    model = petl.adapt(base, method)
    for variable in surgery.variables(model).values():
        if isinstance(variable, nnx.Param | nnx.BatchStat):
            noise = 0.3 * rng.normal(size=variable[...].shape)
            if isinstance(variable, nnx.BatchStat):
                noise = np.abs(noise)
            variable[...] = variable[...] + noise.astype(np.float32)
    extra: dict[str, Any] = {}
    if calibrated:
        thresholds = tuple(0.4 for _ in range(classes)) if multi_label else None
        extra["decisions"] = Calibration(1.7, thresholds, 0.6, 0.9, 40).to_json()
    frontend = FrontEnd(
        frames=frames,
        mels=32,
        mean=float(-4 - rng.random()),
        std=float(3 + rng.random()),
        pad="silence" if seed % 5 == 4 else "log_mel_zero",
    )
    return save_adapter(
        folder / f"{name}.safetensors",
        model,
        classes=tuple(f"class {i}" for i in range(classes)),
        multi_label=multi_label,
        frontend=frontend,
        extra=extra,
    )


def vary(like: Path, path: Path, seed: int, *, classes: int) -> None:
    """A copy of an adapter file with its own numbers, statistics and number of classes."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, value in load_file(like).items():
        noise = 0.3 * rng.normal(size=value.shape)
        noise = np.abs(noise) if name.endswith("/var") else noise
        tensors[name] = value + noise.astype(value.dtype)
        if name.startswith("head/linear/"):
            tensors[name] = np.resize(tensors[name], (*value.shape[:-1], classes))

    def change(info: dict[str, Any]) -> None:
        info["golden"] = None  # the numbers are others
        info["classes"] = [f"class {i}" for i in range(classes)]
        info["model"]["num_classes"] = classes
        info["frontend"]["mean"], info["frontend"]["std"] = -4 - rng.random(), 3 + rng.random()

    rewrite(like, change, tensors, out=path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "base").mkdir()
    arrays = surgery.arrays(AST(CONFIG, rngs=nnx.Rngs(0)))
    write_native(folder / "base" / "weights.safetensors", arrays, CONFIG)
    for i, (name, method) in enumerate(METHODS.items()):
        write_adapter(
            folder,
            name,
            method,
            i,
            classes=2 + i,
            frames=64 if i % 2 else 96,
            multi_label=i % 3 == 1,
            calibrated=i % 2 == 0,
        )
    return folder


def sound(seconds: float, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    time = np.arange(round(16000 * seconds)) / 16000
    wave = 0.3 * np.sin(2 * np.pi * rng.uniform(200, 6000) * time) + 0.05 * rng.normal(
        size=time.size
    )
    file = io.BytesIO()
    soundfile.write(file, wave, 16000, "PCM_16", format="WAV")
    return file.getvalue()


SOUNDS = [sound(seconds, i) for i, seconds in enumerate([0.3, 0.62, 1.1, 2.0, 0.05, 0.95])]


@functools.cache
def load_classifier(path: Path) -> Classifier:
    return Classifier.load(path)


def predict(path: Path, body: bytes) -> dict[str, Any]:
    """The output of `aatjax predict --json`, without the path."""
    fields = load_classifier(path).predict_waveform(decode(body).waveform).to_json()
    return {key: value for key, value in fields.items() if key != "path"}


def assert_alike(found: Any, want: Any) -> None:
    if isinstance(want, dict):
        assert set(found) == set(want)
        for key in want:
            assert_alike(found[key], want[key])
    elif isinstance(want, list):
        assert len(found) == len(want)
        for one, two in zip(found, want, strict=True):
            assert_alike(one, two)
    elif isinstance(want, float):
        assert found == pytest.approx(want, abs=1e-5)
    else:
        assert found == want


def make_client(folder: Path, *, names: list[str] | None = None, **limits: Any) -> TestClient:
    store = AdapterStore(largest=4)
    files = find_adapters(folder).items()
    store.load_all({n: path for n, path in files if names is None or n in names}, print)
    app = make_app(store, ServerLimits(**limits), folder=folder)
    return TestClient(app, raise_server_exceptions=False)


def post(client: TestClient, name: str, body: Any, kind: str = "audio/wav", **more: Any) -> Any:
    return client.post(
        f"/v1/adapters/{name}/predict", content=body, headers={"Content-Type": kind}, **more
    )


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with make_client(folder, wait=0.05) as client:
        yield client


# --- answers -------------------------------------------------------------------------------------


def test_answers_are_those_of_predict(client: TestClient, folder: Path) -> None:
    """B27: methods, lengths, statistics, class counts and tasks of all kinds at the same time."""
    pairs = [(name, body) for name in METHODS for body in SOUNDS]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda pair: post(client, *pair), pairs))
    for (name, body), answer in zip(pairs, answers, strict=True):
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found.pop("adapter") == name
        assert_alike(found, predict(folder / f"{name}.safetensors", body))


@functools.cache
def forward(graphdef: Any, frontend: FrontEnd) -> Any:
    """Logits of one adapter by itself; the statistics of the front end are arguments."""

    @jax.jit
    def compute(state: Any, mean: Any, std: Any, audio: Any, length: Any) -> jax.Array:
        x = (frontend.features(audio, length) - mean) / (2 * std)
        return surgery.join(graphdef, *state)(x, frontend.count_frames(length))

    return compute


def compute_logits(classifier: Classifier, window: Window) -> np.ndarray:
    parts, frontend = split_model(classifier.model), classifier.frontend
    state = (parts.trainable, parts.stats, parts.frozen)
    run = forward(parts.graphdef, frontend.with_statistics(0.0, 1.0))
    clip = window.audio[None], np.array([window.length], np.int32)
    return np.asarray(run(state, frontend.mean, frontend.std, *clip))[0]


def test_many_adapters_in_mixed_batches_keep_their_own_results(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").symlink_to(folder / "base")
    for i in range(MANY):
        like = folder / ("conformer.safetensors" if i % 4 == 0 else "soft_moa.safetensors")
        vary(like, tmp_path / f"a{i:03d}.safetensors", 1000 + i, classes=2 + i % 3)
    store, failed = AdapterStore(largest=8), []
    store.load_all(find_adapters(tmp_path), failed.append)
    adapters = store.list_adapters()
    assert len(adapters) == len(failed) == MANY
    arrays = [surgery.arrays(one.classifier.model)["blocks/0/mlp/up/kernel"] for one in adapters]
    assert len({id(array) for array in arrays}) == 1, "the backbone is in memory more than once"
    sizes: list[int] = []
    metrics = ServerMetrics()
    monkeypatch.setattr(metrics, "count_batch", lambda windows, _: sizes.append(windows))
    batcher = Batcher(metrics, ServerLimits(batch_size=8, wait=0.05))
    waves = [decode(body).waveform for body in SOUNDS]
    windows = [
        list(cut_windows([waves[i % len(waves)]], one.classifier.frontend, 16000))
        for i, one in enumerate(adapters)
    ]

    async def ask() -> list[Any]:
        pairs = zip(adapters, windows, strict=True)
        return await asyncio.gather(*(batcher.compute_logits(*pair) for pair in pairs))

    answers = asyncio.run(ask())
    batcher.close()
    assert len({id(one.group) for one in adapters}) == 2 and max(sizes) > 4
    for one, cut, rows in zip(adapters, windows, answers, strict=True):
        assert rows.shape == (len(cut), one.classifier.model.config.num_classes)
        for window, row in zip(cut, rows, strict=True):
            expected = compute_logits(one.classifier, window)
            np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-5)


def test_adapters_come_and_go_while_requests_wait(folder: Path) -> None:
    with make_client(folder, names=["lora"], wait=0.3) as client:
        assert [a["name"] for a in client.get("/v1/adapters").json()["adapters"]] == ["lora"]
        assert post(client, "soft_moa", SOUNDS[0]).status_code == 404
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(post, client, "lora", body) for body in SOUNDS[:3]]
            time.sleep(0.1)
            assert client.delete("/v1/adapters/lora").json() == {"dropped": "lora"}
            for body, answer in zip(SOUNDS, waiting, strict=False):
                found = answer.result().json()
                assert_alike(
                    found, {"adapter": "lora", **predict(folder / "lora.safetensors", body)}
                )
        gone = post(client, "lora", SOUNDS[0])
        assert gone.status_code == 404 and "lora" in gone.json()["error"]
        assert client.delete("/v1/adapters/lora").status_code == 404
        for name in ("soft_moa", "lora", "soft_moa"):
            loaded = client.put(f"/v1/adapters/{name}")
            assert loaded.status_code == 200 and loaded.json()["method"] == name
        near = post(client, "soft_mao", SOUNDS[0]).json()["error"]
        assert "did you mean soft_moa?" in near
        assert client.put("/v1/adapters/nothing").status_code == 404
        assert post(client, "lora", SOUNDS[0]).status_code == 200


def test_another_backbone_is_refused_and_the_others_stay(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    arrays = surgery.arrays(AST(CONFIG, rngs=nnx.Rngs(9)))
    write_native(tmp_path / "base" / "weights.safetensors", arrays, CONFIG)
    write_adapter(tmp_path, "stranger", METHODS["lora"], 0, classes=3)
    os.symlink(folder / "linear.safetensors", tmp_path / "linear.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"not an adapter")
    with make_client(tmp_path, names=["linear"]) as client:
        answer = client.put("/v1/adapters/stranger")
        assert answer.status_code == 422 and "different backbones" in answer.json()["error"]
        assert client.put("/v1/adapters/damaged").status_code == 422
        assert client.get("/healthz").json() == {"status": "ok", "adapters": 1}


def test_requests_are_answered_while_an_adapter_loads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aatjax.inference.server import adapters

    with make_client(folder, names=["lora"], wait=0) as client, ThreadPoolExecutor(1) as pool:
        post(client, "lora", SOUNDS[0])
        reading, release = threading.Event(), threading.Event()
        read = adapters.load_adapter

        def slow(*args: Any, **more: Any) -> Any:
            reading.set()
            release.wait(20)
            return read(*args, **more)

        monkeypatch.setattr(adapters, "load_adapter", slow)
        loaded = pool.submit(client.put, "/v1/adapters/soft_moa")
        try:
            assert reading.wait(10)
            began = time.monotonic()
            assert client.get("/healthz").status_code == 200
            assert post(client, "lora", SOUNDS[0]).status_code == 200
            assert time.monotonic() - began < 10
        finally:
            release.set()
        assert loaded.result().status_code == 200


def test_one_more_adapter_compiles_no_forward_pass(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(folder / "base")
    store, programs = AdapterStore(largest=2), []
    for i in range(3):
        vary(folder / "lora.safetensors", tmp_path / f"{i}.safetensors", i, classes=3)
        group = store.load(str(i), tmp_path / f"{i}.safetensors").group
        programs.append([program.forward for program in group.stack().programs.values()])
    assert len({one.group for one in store.list_adapters()}) == 1
    assert programs[0] == programs[1] == programs[2] and len(programs[0]) == 2


def test_every_batch_size_is_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [list_batch_sizes(n) for n in (1, 2, 12, 16)] == [
        (1,),
        (1, 2),
        (1, 2, 4, 8, 12),
        (1, 2, 4, 8, 16),
    ]
    served = AdapterStore(largest=3).load("lora", folder / "lora.safetensors")
    monkeypatch.setattr(served.group, "_compile", None)
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    window = next(cut_windows([decode(SOUNDS[0]).waveform], served.classifier.frontend, 16000))
    want = compute_logits(served.classifier, window)
    for count in range(1, 8):
        rows = served.group.compute_logits(
            served.group.stack(), [served.key] * count, [window] * count
        )
        assert len(rows) == count
        np.testing.assert_allclose(rows, [want] * count, rtol=1e-5, atol=1e-5)


# --- limits --------------------------------------------------------------------------------------


def chunks(size: int, count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield bytes(size)


def test_refusals_name_the_fix(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """B26, over the application; nothing is written to disk."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with make_client(folder, names=["lora"], max_bytes=50_000, max_seconds=3) as client:
        for body, kind, status, words in [
            (bytes(50_001), "audio/wav", 413, "more than 50000 bytes"),
            (chunks(10_000, 6), "audio/wav", 413, "more than 50000 bytes"),
            (SOUNDS[0], "text/html", 415, "application/octet-stream"),
            (SOUNDS[0], "multipart/form-data; boundary=x", 415, "send the bytes"),
            (b"", "audio/wav", 400, "empty"),
            (b"RIFFnonsense", "audio/wav", 422, "not a usable sound"),
            (SOUNDS[1][:-4000], "audio/wav", 422, "?partial=true accepts it"),
            (sound(1.5, 0) + b"", "audio/flac", 200, ""),
        ]:
            answer = post(client, "lora", body, kind)
            assert answer.status_code == status, answer.text
            assert words in answer.json().get("error", "")
        short = io.BytesIO()
        soundfile.write(short, np.zeros(8000 * 4), 8000, format="FLAC")
        long_sound, cut_sound = short.getvalue(), SOUNDS[1][:-4000]
        long = post(client, "lora", long_sound)
        assert long.status_code == 413 and "longer than 3 s" in long.json()["error"]
        for body, note in [(long_sound, "only the first 0.05 minutes"), (cut_sound, "truncated")]:
            kept = post(client, "lora", body, params={"partial": True, "detail": True}).json()
            assert kept["note"].startswith(note)
            for window in kept["windows"]:
                assert max(window["probabilities"].values()) == window["probability"]
        for hop in ("0", "-1", "nan", "1e-9", "many"):
            answer = post(client, "lora", SOUNDS[2], params={"hop": hop})
            assert answer.status_code == 422 and "hop" in answer.json()["error"]
        many = post(client, "lora", SOUNDS[2], params={"hop": 0.0004})
        assert many.status_code == 413 and "longer hop" in many.json()["error"]
        few = post(client, "lora", SOUNDS[2], params={"hop": 0.1})
        assert few.status_code == 200 and len(few.json()["windows"]) == 6
        assert "Not Found" in client.get("/nothing").json()["error"]
        assert "not allowed" in client.get("/v1/adapters/lora/predict").json()["error"].lower()
        for name in ("..%2Flora", "%2Fetc%2Fpasswd", "lora%00", "a" * 200, ".lora", "base"):
            for answer in (
                post(client, name, SOUNDS[0]),
                client.put(f"/v1/adapters/{name}"),
                client.delete(f"/v1/adapters/{name}"),
            ):
                assert answer.status_code == 404
    assert list(tmp_path.iterdir()) == []


def test_too_many_requests_at_once_are_refused(folder: Path) -> None:
    with make_client(folder, names=["lora"], concurrency=3, wait=0.5) as client:
        with ThreadPoolExecutor(40) as pool:
            statuses = [
                answer.status_code
                for answer in pool.map(lambda _: post(client, "lora", SOUNDS[0]), range(40))
            ]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 3
        text = client.get("/metrics").text
        assert f'aatjax_requests_total{{status="429"}} {statuses.count(429)}.0' in text
        assert "aatjax_requests_under_way 1.0" in text and "aatjax_adapters 1.0" in text
        assert "# HELP aatjax_request_seconds " in text
        buckets = [float(line.split()[-1]) for line in text.splitlines() if "_bucket" in line]
        assert buckets == sorted(buckets) and buckets[-1] == 40
    with make_client(folder, names=["lora"], queue=1) as client:
        answer = post(client, "lora", SOUNDS[3])  # four windows
        assert answer.status_code == 413 and "4 windows" in answer.json()["error"]


def test_an_answer_that_takes_too_long_is_a_timeout(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_client(folder, names=["lora"], timeout=0.5, wait=0.01) as client:
        release = threading.Event()
        run = Batcher._compute

        def slow(self: Batcher, jobs: Any) -> None:
            release.wait(5)
            run(self, jobs)

        monkeypatch.setattr(Batcher, "_compute", slow)
        answer = post(client, "lora", SOUNDS[0])
        assert answer.status_code == 504 and "0.5 s" in answer.json()["error"]
        assert client.delete("/v1/adapters/lora").status_code == 200
        release.set()
        monkeypatch.setattr(Batcher, "_compute", run)
        assert client.put("/v1/adapters/lora").status_code == 200
        with make_client(folder, names=["lora"]) as patient:
            assert post(patient, "lora", SOUNDS[0]).status_code == 200


def test_a_failing_batch_is_an_error_and_the_next_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aatjax.inference.server.stacked import AdapterGroup

    with make_client(folder, names=["lora"]) as client, monkeypatch.context() as patch:
        patch.setattr(AdapterGroup, "compute_logits", lambda *_: 1 / 0)
        failed = post(client, "lora", SOUNDS[0])
        assert failed.status_code == 500 and "failed" in failed.json()["error"]
        patch.undo()
        assert post(client, "lora", SOUNDS[0]).status_code == 200


# --- the real server -----------------------------------------------------------------------------


MAIN = "from aatjax.cli.main import main; main()"


class Server:
    def __init__(self, folder: Path, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "serve", str(folder), "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("serving "):
                break
        assert self.lines, self.process.communicate()
        self.port = int(self.lines[-1].rpartition(":")[2])

    def ask(self, head: str, *parts: tuple[float, bytes]) -> bytes:
        """Send a request line and headers, then each part after its delay; return the answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as link:
            link.sendall(head.encode())
            for delay, part in parts:
                time.sleep(delay)
                try:
                    link.sendall(part)
                except OSError:
                    break
            found = b""
            try:
                while data := link.recv(65536):
                    found += data
            except ConnectionResetError:
                pass
            return found


HEAD = (
    "POST /v1/adapters/lora/predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: audio/wav\r\n"
    "Connection: close\r\n"
)
HERE = HEAD.format(host="localhost")


@pytest.mark.slow
def test_the_server_itself(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    for name in ("lora", "linear"):
        os.symlink(folder / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
    base = str(folder / "base" / "weights.safetensors")
    limits = ("--body-timeout", "3", "--max-bytes", "100000")
    server = Server(tmp_path, "--base", base, *limits)
    try:
        assert any(line.startswith("skipped: ") and "broken" in line for line in server.lines)
        assert "serving 2 adapters at http://127.0.0.1:" in server.lines[-1]
        body = SOUNDS[0]
        whole = f"{HERE}Content-Length: {len(body)}\r\n\r\n"
        answer = server.ask(whole, (0, body))
        assert answer.startswith(b"HTTP/1.1 200")
        found = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert_alike(found, {"adapter": "lora", **predict(folder / "lora.safetensors", body)})
        # a body, then headers, that come a byte at a time
        drops = [(0.6, body[i : i + 1]) for i in range(8)]
        assert server.ask(whole, *drops).startswith(b"HTTP/1.1 408")
        slow = [(0.6, bytes([b])) for b in HERE.encode()[:8]]
        assert server.ask("", *slow).startswith(b"HTTP/1.1 408")
        assert server.ask(f"{HERE}Content-Length: 1000000000\r\n\r\n").startswith(b"HTTP/1.1 413")
        chunked = f"{HERE}Transfer-Encoding: chunked\r\n\r\n"
        parts = [(0.0, b"4e20\r\n" + bytes(20000) + b"\r\n")] * 8
        assert server.ask(chunked, *parts).startswith(b"HTTP/1.1 413")
        # a page of another site that calls this address by its own name
        evil = HEAD.format(host="evil.example")
        assert server.ask(f"{evil}Content-Length: 0\r\n\r\n").startswith(b"HTTP/1.1 400")
        # a signal during a request: it is answered, then the server ends
        with ThreadPoolExecutor(1) as pool:
            late = pool.submit(server.ask, whole, (0.0, body[:100]), (2.0, body[100:]))
            time.sleep(1)
            server.process.send_signal(signal.SIGTERM)
            assert late.result().startswith(b"HTTP/1.1 200")
        assert server.process.wait(30) == 143
        assert server.process.stderr is not None
        assert "Traceback" not in server.process.stderr.read()
    finally:
        server.process.kill()
        server.process.communicate()


def serve(*arguments: Any) -> tuple[int, str]:
    from aatjax.cli.main import run

    with pytest.MonkeyPatch.context() as patch:
        errors = io.StringIO()
        patch.setattr(sys, "stderr", errors)
        return run(["serve", *map(str, arguments)]), errors.getvalue()


def test_a_start_that_fails_is_explained_in_one_line(folder: Path, tmp_path: Path) -> None:
    code, message = serve(tmp_path)
    assert code == 2 and "no adapters found" in message
    (tmp_path / "x.safetensors").write_bytes(b"x")
    code, message = serve(tmp_path, "--port", "0")
    assert code == 2 and "0 of 1 adapter files" in message
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, message = serve(folder, "--port", taken.getsockname()[1])
    assert code == 69 and "give another --port" in message and "Traceback" not in message
    for flags in ["--timeout inf", "--port 99999", "--max-bytes 0", "--wait -1"]:
        code, message = serve(folder, *flags.split())
        assert code == 2 and flags in message


def test_names_of_adapters(tmp_path: Path) -> None:
    names = ("a", "b/adapter", ".hidden", "adapter", "with space", "c/other")
    for name in (f"{name}.safetensors" for name in names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert set(find_adapters(tmp_path)) == {"a", "b"}


def test_limits_are_documented() -> None:
    documented = ServerLimits.__doc__ or ""
    assert all(f"{field.name}:" in documented for field in dataclasses.fields(ServerLimits))
