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
        UsageError: the port is invalid or in use.
        DataError: the source cannot be read.
    """
    listening = open_socket("127.0.0.1", port)
    app, limits = make_page_app(Classifier.load(source, base=base), find_title(source))
    address = f"http://localhost:{listening.getsockname()[1]}/"
    report(f"{address} (Ctrl-C ends)")
    if browser:
        webbrowser.open(address)
    run_server(app, listening, limits)


def make_page_app(classifier: Classifier, title: str) -> tuple[FastAPI, ServerLimits]:
    """Return the application that serves the page and predicts by one classifier."""
    windows = math.ceil(MAX_SECONDS * RATE / classifier.frontend.samples)
    limits = ServerLimits(
        max_bytes=64 * 2**20, max_seconds=MAX_SECONDS, timeout=600.0, queue=max(1024, 2 * windows)
    )
    store = AdapterStore(largest=limits.batch_size)
    method = store.add(NAME, classifier).method
    app = make_app(store, limits, hosts=LOCAL_HOSTS)
    pages = {name: read_page_file(name) for name in PAGE}
    config = make_page_config(classifier, title=title, method=method, backend="server")
    pages["config.json"] = config.encode()

    async def send_page(name: str) -> Response:
        if name not in pages:
            raise RefusedError(404, "there is no such page")
        return Response(pages[name], media_type=TYPES[Path(name).suffix], headers=HEADERS)

    async def send_index() -> Response:
        return await send_page("index.html")

    app.get("/", include_in_schema=False)(send_index)
    app.get("/{name}", include_in_schema=False)(send_page)
    return app, limits
