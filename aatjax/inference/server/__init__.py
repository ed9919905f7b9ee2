"""`aatjax serve`: many adapters on one backbone behind HTTP."""

import math
import socket
from collections.abc import Callable
from pathlib import Path

from aatjax.errors import AatjaxError, UsageError
from aatjax.io.optional import need

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    base: str | None = None,
    say: Callable[[str], None] = print,
    **limits: float,
) -> None:
    """Serves the adapters of a folder until SIGINT or SIGTERM; answers what is under way first.

    Args:
        folder: holds NAME.safetensors and NAME/adapter.safetensors.
        host: address to listen at; without a password, so anywhere but here it is open to all.
        port: 0 takes a free one.
        base: the backbone's weights where they are not where they were in training.
        say: told what is loaded, what is left out and why, and the address.
        limits: fields of `Limits`.

    Raises:
        UsageError: no adapter in the folder can be used, or the address is taken.
        UnavailableError: FastAPI or uvicorn is not installed.
    """
    need("fastapi", "uvicorn", extra="serve")
    import uvicorn

    from aatjax.inference.server.adapters import Bank
    from aatjax.inference.server.app import Limits, find_adapters, make_app
    from aatjax.inference.server.limits import protocol

    allowed = Limits(**limits)  # type: ignore[arg-type]
    files = find_adapters(folder) if folder.is_dir() else {}
    if not files:
        raise UsageError(
            f"{folder}: holds no adapters; give a folder with NAME.safetensors or "
            "NAME/adapter.safetensors in it"
        )
    listening = _listen(host, port)
    bank = Bank(base, largest=allowed.batch_size)
    for name, path in files.items():
        try:
            held = bank.load(name, path)
            say(
                f"{name}: {held.adapter.info['method']['name']}, {len(held.adapter.classes)} "
                f"classes, {held.parameters:,} parameters"
            )
        except AatjaxError as error:
            say(f"left out: {error}")
    if not bank.all():
        raise UsageError(f"{folder}: none of its {len(files)} adapters could be loaded")
    local = host in LOOPBACK
    if not local:
        say(f"warning: {host} is not this machine alone, and there is no password")
    app = make_app(folder, bank, allowed, [*LOOPBACK[:2], "[::1]"] if local else None)
    longest = math.ceil(allowed.body_timeout + allowed.timeout)
    config = uvicorn.Config(
        app,
        http=protocol(allowed.body_timeout),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=longest,
        h11_max_incomplete_event_size=16 * 1024,
    )
    shown = f"[{host}]" if ":" in host else host
    say(f"serving {len(bank.all())} adapters at http://{shown}:{listening.getsockname()[1]}")
    uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, before anything is loaded."""
    _more_files()
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port} must lie between 0 and 65535")
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, number)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{host}:{port} cannot be listened at: {why}; give another --port (0 takes a free one)"
        ) from error
    listening.listen(2048)
    return listening


def _more_files() -> None:
    """Lets the process have as many connections as the system allows it."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
