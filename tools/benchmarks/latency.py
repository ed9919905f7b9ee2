"""Latency and memory of `aatjax serve` under load, and while it loads an adapter."""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soundfile
from flax import nnx

from aatjax import load, petl, surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.train.adapter_file import save_adapter
from benchmarks import append_row, describe_cpu

SERVED: dict[str, petl.Method] = {
    "first": petl.SoftMoA(reduction=24),
    "second": petl.SoftMoA(reduction=24),
    "third": petl.LoRA(rank=8),
}
"""Adapters of two groups."""
LATER: dict[str, petl.Method] = {
    "of a group in memory": petl.SoftMoA(reduction=24),
    "of a new group": petl.Adapter(reduction=24),
}
"""Adapters that are loaded under load, by what they are."""


def serve_latency(
    weights: str = "embedded",
    frames: int = 198,
    clients: int = 8,
    requests: int = 1000,
    many: int = 20_000,
    out: Path | None = None,
) -> None:
    """Measure a server with three adapters of two groups, from an empty cache of programs on.

    Each client sends one sound of 0.5 to 4 s after the other, to the adapters in turn.

    Args:
        weights: the backbone.
        frames: input length.
        clients: requests in progress.
        requests: requests of each figure.
        many: requests over which the memory is measured.
        out: CSV file that gets a row per figure.
    """
    about = {"cpu": describe_cpu(), "weights": weights, "frames": frames, "clients": clients}

    def report(part: str, run: "Load | None" = None, **values: Any) -> None:
        row = {"part": part, "requests": 0, "p50_ms": "", "p99_ms": "", "answers": ""}
        if run is not None:
            p50, p99 = (1e3 * np.percentile(run.seconds, q) for q in (50, 99))
            statuses = " ".join(f"{n}x{status}" for status, n in sorted(run.statuses.items()))
            row |= {"requests": len(run.seconds), "p50_ms": f"{p50:.0f}", "p99_ms": f"{p99:.0f}"}
            row["answers"] = statuses
        row |= {"seconds": "", "rss_mib": "", **values}
        one, *_ = os.getloadavg()
        append_row(out, {**about, **row, "load_average": f"{one:.1f}"})
        print(", ".join(f"{key} {value}" for key, value in row.items() if value), flush=True)

    with TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_adapters(folder, weights, frames)
        sounds = make_sounds()
        for start in ("first start, nothing compiled", "second start"):
            server = stack.enter_context(run_server(folder))
            lives = server.wait("/livez")
            report(f"{start}: /livez", seconds=f"{lives:.1f}")
            report(f"{start}: /readyz", seconds=f"{server.wait('/readyz'):.1f}")
            if start != "second start":
                server.stop()
        load_requests = lambda count, **more: send(server, sounds, clients, count, **more)  # noqa: E731
        report("after /readyz", load_requests(requests), rss_mib=server.measure_rss())
        for number, kind in enumerate(LATER):
            (folder / f"{number}.later").rename(folder / f"later{number}.safetensors")
            run = load_requests(requests, halfway=lambda n=number: server.put(f"later{n}"))
            report(f"while an adapter {kind} loads", run, rss_mib=server.measure_rss())
        for _ in range(many // requests):
            report("memory", load_requests(requests), rss_mib=server.measure_rss())


def write_adapters(folder: Path, weights: str, frames: int) -> None:
    """Write the adapters, those for later under a name that is not served."""
    rng = np.random.default_rng(0)
    base = load(weights, frames=frames, num_classes=10)
    methods = {f"{name}.safetensors": method for name, method in SERVED.items()}
    methods |= {f"{n}.later": method for n, method in enumerate(LATER.values())}
    for name, method in methods.items():
        model = petl.adapt(base, method)
        for variable in surgery.variables(model).values():
            if isinstance(variable, nnx.Param):
                noise = 0.02 * rng.normal(size=variable[...].shape)
                variable[...] = variable[...] + noise.astype(np.float32)
        path = save_adapter(
            folder / "new.safetensors",
            model,
            classes=tuple(map(str, range(10))),
            multi_label=False,
            frontend=FrontEnd(frames=frames),
        )
        path.rename(folder / name)


def make_sounds(count: int = 32) -> list[bytes]:
    """Return WAV files of 0.5 to 4 s."""
    rng = np.random.default_rng(0)
    sounds = []
    for seconds in np.linspace(0.5, 4, count):
        file = io.BytesIO()
        noise = 0.1 * rng.standard_normal((round(16000 * seconds),))
        soundfile.write(file, noise, 16000, "PCM_16", format="WAV")
        sounds.append(file.getvalue())
    return sounds


class Server:
    """A running `aatjax serve`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self._began = process, time.monotonic()
        assert process.stdout is not None
        found = re.search(r":(\d+)/readyz", process.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start")
        self.port = int(found[1])
        threading.Thread(target=process.stdout.read, daemon=True).start()

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection of its own."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def wait(self, path: str) -> float:
        """Return the seconds from the start until a path answers 200."""
        while True:
            link = self.connect()
            link.request("GET", path)
            if link.getresponse().status == 200:
                return time.monotonic() - self._began
            time.sleep(0.05)

    def put(self, name: str) -> None:
        """Load an adapter."""
        link = self.connect()
        link.request("PUT", f"/v1/adapters/{name}")
        answer = link.getresponse()
        if answer.status != 200:
            raise SystemExit(json.loads(answer.read())["error"])

    def measure_rss(self) -> int:
        """Return the MiB of memory in use."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) // 1024 if found else 0

    def stop(self) -> None:
        """End the server."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


@contextlib.contextmanager
def run_server(folder: Path) -> Iterator[Server]:
    """Run a server on a folder, in which its cache of programs lies too."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-m", "aatjax", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield Server(process)
    finally:
        process.kill()
        process.wait()


@dataclass
class Load:
    """What came of some requests.

    Attributes:
        seconds: latency of each.
        statuses: number of answers of each status.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)


def send(
    server: Server,
    sounds: list[bytes],
    clients: int,
    count: int,
    halfway: Callable[[], None] | None = None,
) -> Load:
    """Send requests; `halfway` is called after a tenth, and they go on until it has returned."""
    run, names, lock = Load(), list(SERVED), threading.Lock()
    numbers = iter(range(10**9))
    done = threading.Event()

    def interfere() -> None:
        while halfway is not None and len(run.seconds) < count // 10:
            time.sleep(0.01)
        if halfway is not None:
            halfway()
        done.set()

    def work(client: int) -> None:
        link = server.connect()
        while (number := next(numbers)) < count or not done.is_set():
            body = sounds[number % len(sounds)]
            began = time.perf_counter()
            path = f"/v1/adapters/{names[number % len(names)]}/predict"
            link.request("POST", path, body, {"Content-Type": "audio/wav"})
            answer = link.getresponse()
            answer.read()
            seconds = time.perf_counter() - began
            with lock:
                run.seconds.append(seconds)
                run.statuses[answer.status] += 1

    with ThreadPoolExecutor(clients + 1) as pool:
        futures = [pool.submit(interfere), *(pool.submit(work, i) for i in range(clients))]
        for future in futures:
            future.result()
    return run
