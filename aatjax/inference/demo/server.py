"""The demo page on the server's application: one adapter, this machine only."""

import math
import os
import webbrowser
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, Response

from aatjax.audio.windows import RATE
from aatjax.inference.classifier import Classifier
from aatjax.inference.demo import PAGE, find_title, make_page_config, read_page_file
from aatjax.inference.server.adapters import AdapterStore
from aatjax.inference.server.app import make_app
from aatjax.inference.server.limits import RefusedError, ServerLimits
from aatjax.inference.server.serve import LOCAL_HOSTS, open_socket, run_server

NAME = "demo"
"""The adapter's name in requests; the page asks for it."""
MAX_SECONDS = 600.0
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
}
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def serve_page(
    source: str | os.PathLike[str],
    *,
    base: str | None = None,
    port: int = 7860,
    browser: bool = True,
    report: Callable[[str], None] = print,
) -> None:
    """Serve the page until SIGINT or SIGTERM.

    Args:
        source: an adapter file, or weights with a head.
        base: the backbone's weights if they moved since training.
        port: 0 for a free one.
        browser: open the page in a browser.
        report: gets the address.

    Raises:
        UsageError: the port is invalid.
        UnavailableError: it is in use.
        DataError: the source cannot be read.
    """
    listening = open_socket("127.0.0.1", port)
    page = Page(Classifier.load(source, base=base), find_title(source))
    address = f"http://localhost:{listening.getsockname()[1]}/"
    report(f"{address} (Ctrl-C ends)")
    if browser:
        webbrowser.open(address)
    run_server(page.make_app, page.start, listening, page.limits)


class Page:
    """The page's application, which predicts by one classifier.

    Args:
        classifier: the model.
        title: heading of the page.
    """

    def __init__(self, classifier: Classifier, title: str) -> None:
        windows = math.ceil(MAX_SECONDS * RATE / classifier.frontend.samples)
        self.limits: ServerLimits = ServerLimits(
            max_bytes=64 * 2**20,
            max_seconds=MAX_SECONDS,
            timeout=600.0,
            queue=max(1024, 2 * windows),
        )
        self._classifier = classifier
        self._store = AdapterStore(largest=self.limits.batch_size)
        method = getattr(classifier.model.method, "name", "no adapter")
        config = make_page_config(classifier, title=title, method=method, backend="server")
        self._files: dict[str, bytes] = {name: read_page_file(name) for name in PAGE}
        self._files["config.json"] = config.encode()

    def start(self) -> None:
        """Compile the classifier; predictions are refused before."""
        self._store.add(NAME, self._classifier)

    def make_app(self, start: Callable[[], object]) -> FastAPI:
        """Return the application, which begins with `start`."""
        app = make_app(self._store, self.limits, hosts=LOCAL_HOSTS, start=start)
        app.get("/", include_in_schema=False)(self._send_index)
        app.get("/{name}", include_in_schema=False)(self._send_file)
        return app

    async def _send_file(self, name: str) -> Response:
        if name not in self._files:
            raise RefusedError(404, "there is no such page")
        kind = TYPES[Path(name).suffix]
        return Response(self._files[name], media_type=kind, headers=HEADERS)

    async def _send_index(self) -> Response:
        return await self._send_file("index.html")
