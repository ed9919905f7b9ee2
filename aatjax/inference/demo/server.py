"""The page's server: one model, this machine only, nothing written to disk."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from aatjax.audio.decode import decode
from aatjax.errors import AatjaxError, UsageError
from aatjax.inference.classifier import RATE, Classifier, Cut, Prediction
from aatjax.inference.demo import PAGE, page_file

MOST_BYTES = 64 * 2**20
MOST_SECONDS = 600.0
HOSTS = ("localhost", "127.0.0.1")
BODY = "application/octet-stream"
SLOW = 30.0
"""Seconds that a connection may be silent."""


class Server(ThreadingHTTPServer):
    """Serves the page and answers for one classifier.

    Args:
        classifier: the model.
        config: what the page knows of it (`page_config`).
        port: 0 takes a free one.

    Raises:
        UsageError: the port is taken or is none.
    """

    daemon_threads = True

    def __init__(self, classifier: Classifier, config: str, port: int) -> None:
        self.classifier, self.config = classifier, config.encode()
        self.turn = threading.Lock()
        if not 0 <= port <= 65535:
            raise UsageError(f"--port {port} must lie between 0 and 65535")
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise UsageError(
                f"port {port} cannot be listened at: {error.strerror or error}; give another "
                "--port (0 takes a free one)"
            ) from error

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://localhost:{self.server_address[1]}/"

    def window(self, body: bytes) -> dict[str, Any]:
        """An answer to mono int16 samples at 16 kHz, little-endian, one window at most."""
        samples = np.frombuffer(body[: len(body) // 2 * 2], "<i2").astype(np.int16)
        if not 0 < samples.size <= self.classifier.frontend.samples:
            raise UsageError(
                f"{samples.size} samples are not between 1 and "
                f"{self.classifier.frontend.samples}, a window"
            )
        audio, length = self.classifier.frontend.fit(samples)
        window = Cut(audio, length, (0, samples.size))
        with self.turn:  # a batch of one: those of files are larger, and would be slower here
            found, plain = (np.asarray(part) for part in self.classifier.run([window], 1))
        return _told(self.classifier.summary("", found, plain, [window.span]))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a browser that went away before its answer came."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def file(self, body: bytes) -> dict[str, Any]:
        """An answer to the bytes of a sound file."""
        channels = self.classifier.frontend.channels
        sound = decode(
            body, channels=channels, max_seconds=MOST_SECONDS + 1, truncated="keep"
        ).waveform
        most = round(MOST_SECONDS * RATE)
        with self.turn:
            told = _told(self.classifier.predict_waveform(sound[:most]))
        if sound.size > most:
            told["note"] = f"only the first {MOST_SECONDS / 60:g} minutes were heard"
        return told


def _told(prediction: Prediction) -> dict[str, Any]:
    """A prediction as the page reads it: masks over the classes in their order."""
    given = (prediction.label,) if prediction.given is None else prediction.given
    possible = prediction.possible
    return {
        "calibrated": list(prediction.probabilities),
        "given": [name in given for name in prediction.classes],
        "possible": None if possible is None else [n in possible for n in prediction.classes],
        "windows": [
            {"start": w.start, "end": w.end, "calibrated": list(w.probabilities)}
            for w in prediction.windows
        ],
    }


class _Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = SLOW
    server_version, sys_version = "aatjax", ""

    def do_GET(self) -> None:
        name = self.path.split("?")[0].lstrip("/") or "index.html"
        if not self._at_home():
            return
        if name == "config.json":
            self._send(200, self.server.config, "application/json")
        elif name in PAGE:
            self._send(200, page_file(name), PAGE[name])
        else:
            self._refuse(404, "there is no such page")

    def do_POST(self) -> None:
        answer = {"/hear": self.server.window, "/file": self.server.file}.get(self.path)
        if not self._at_home():
            return
        length = self.headers.get("Content-Length", "")
        if answer is None:
            self._refuse(404, "there is no such page")
        elif self.headers.get("Content-Type") != BODY:
            self._refuse(415, f"the content type must be {BODY}")
        elif not length.isdecimal():
            self._refuse(411, "the length of the body must be told")
        elif int(length) > MOST_BYTES:
            self._refuse(413, f"the file has more than {MOST_BYTES >> 20} MiB")
        else:
            try:
                told = answer(self.rfile.read(int(length)))
            except AatjaxError as error:
                self._refuse(422, str(error).replace("<bytes>: ", ""))
            else:
                self._send(200, json.dumps(told).encode(), "application/json")

    def _at_home(self) -> bool:
        """Whether the page was asked for by this machine's name: not by another site's (DNS)."""
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if host in HOSTS:
            return True
        self._refuse(403, f"ask for {self.server.address}")
        return False

    def _refuse(self, status: int, message: str) -> None:
        self.close_connection = True
        self._send(status, json.dumps({"error": message}).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing of every request."""
