"""Running the server: sockets, adapters of a folder, uvicorn."""

import math
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aatjax.errors import AatjaxError, UnavailableError, UsageError, format_count, printable
from aatjax.inference.server.limits import ServerLimits
from aatjax.io.optional import need

LOCAL_HOSTS = ["127.0.0.1", "localhost", "[::1]"]
"""Names by which requests may call a local server."""
BACKLOG = 2048
"""Connections that wait to be accepted."""
SWITCH_SECONDS = 0.001
"""Seconds for which a thread that traces a model may keep the others waiting."""
REQUIRED = ("fastapi", "prometheus_client", "uvicorn")


def serve_adapters(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    base: str | None = None,
    limits: ServerLimits | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Serve the adapters of a folder until SIGINT or SIGTERM; requests in progress are answered.

    Args:
        folder: holds NAME.safetensors and NAME/adapter.safetensors.
        host: address to listen at. There is no password: another than the default is public.
        port: 0 for a free one.
        base: the backbone's weights if they moved since training.
        limits: limits of requests.
        report: gets a line per adapter that is compiled or skipped, and the address; from
            another thread.

    Raises:
        UsageError: no adapter in the folder can be loaded.
        UnavailableError: the address is in use, or the extra `serve` is not installed.
    """
    need(*REQUIRED, extra="serve")
    from aatjax.inference.server.adapters import AdapterStore, ServedAdapter
    from aatjax.inference.server.app import find_adapters, make_app

    limits = limits or ServerLimits()
    files = find_adapters(folder) if folder.is_dir() else {}
    if not files:
        raise UsageError(
            f"{folder}: no adapters found; give a folder with NAME.safetensors or "
            "NAME/adapter.safetensors in it"
        )
    listening = open_socket(host, port)
    local = host in ("127.0.0.1", "localhost", "::1")
    if not local:
        report(f"warning: {host} is open to other machines, and there is no password")
    address = f"[{host}]" if ":" in host else host
    address = f"http://{address}:{listening.getsockname()[1]}"
    report(f"loading and compiling; {address}/readyz answers 200 when that is done")
    store = AdapterStore(base, largest=limits.batch_size)

    def report_adapter(found: ServedAdapter | AatjaxError) -> None:
        if isinstance(found, AatjaxError):
            report(f"skipped: {printable(str(found))}")
        else:
            classes, size = len(found.classifier.classes), f"{found.parameters:,}"
            report(f"{found.name}: {found.method}, {classes} classes, {size} parameters")

    def start() -> None:
        store.load_all(files, report_adapter)
        count = len(store.list_adapters())
        if not count:
            raise UsageError(f"{folder}: 0 of {len(files)} adapter files could be loaded")
        report(f"serving {format_count(count, 'adapter')} at {address}")

    hosts = LOCAL_HOSTS if local else None
    run_server(
        lambda start: make_app(store, limits, folder=folder, hosts=hosts, start=start),
        start,
        listening,
        limits,
    )


def run_server(
    make: Callable[[Callable[[], None]], Any],
    start: Callable[[], None],
    listening: socket.socket,
    limits: ServerLimits,
) -> None:
    """Run an application on a socket until SIGINT or SIGTERM.

    Args:
        make: makes the application, of the function that it starts with.
        start: loads the adapters; an error ends the server, and is raised.
        listening: from `open_socket`.
        limits: `body_timeout`, `timeout` and `connections`.
    """
    import uvicorn

    from aatjax.inference.server.protocol import make_protocol

    errors: list[Exception] = []

    def start_or_end() -> None:
        try:
            start()
        except Exception as error:
            errors.append(error)
            server.should_exit = True
            raise

    config = uvicorn.Config(
        make(start_or_end),
        http=make_protocol(limits),
        ws="none",
        log_config=None,  # as the process has it: errors go to standard error
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=math.ceil(limits.body_timeout + limits.timeout),
        h11_max_incomplete_event_size=16 * 1024,
        backlog=BACKLOG,
    )
    server = uvicorn.Server(config)
    sys.setswitchinterval(SWITCH_SECONDS)
    server.run(sockets=[listening])
    for error in errors:
        raise error


def open_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket.

    Raises:
        UsageError: the port is invalid.
        UnavailableError: it is in use, or the host is not of this machine.
    """
    _raise_file_limit()
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port} must be between 0 and 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = getattr(error, "strerror", None) or error
        raise UnavailableError(
            f"cannot listen at {host}:{port}: {reason}; give another --port (0 takes a free one)"
        ) from error


def _raise_file_limit() -> None:
    """Raise the process' limit of open connections to what the system allows."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
