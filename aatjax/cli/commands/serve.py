"""`aatjax serve`: many adapters on one backbone over HTTP."""

from pathlib import Path

from aatjax.cli.arguments import parser_of
from aatjax.errors import UsageError
from aatjax.inference.server.limits import ServerLimits

LIMITS = {
    "max_bytes": (int, "of a request body (32 MiB)"),
    "max_seconds": (float, "of a sound (600)"),
    "body_timeout": (float, "seconds for the body to arrive (20)"),
    "timeout": (float, "seconds to the answer (60)"),
    "concurrency": (int, "requests in progress (64)"),
    "queue": (int, "windows that may wait (1024)"),
    "batch_size": (int, "windows per batch (16)"),
    "wait": (float, "seconds that a batch waits for more windows (0.005)"),
}


def main(arguments: list[str]) -> None:
    """Run `aatjax serve`."""
    parser = parser_of("serve")
    parser.add_argument("folder", type=Path, help="NAME.safetensors, NAME/adapter.safetensors")
    parser.add_argument("--base", help="the backbone's weights, if they moved since training")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine only")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    group = parser.add_argument_group("limits")
    for name, (kind, help) in LIMITS.items():
        default = getattr(ServerLimits, name)
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=help)
    options = vars(parser.parse_args(arguments))

    from aatjax.inference.server.serve import serve_adapters

    try:
        limits = ServerLimits(**{name: options.pop(name) for name in LIMITS})
    except UsageError as error:  # NAME=VALUE must be ...
        name, _, rest = str(error).partition("=")
        raise UsageError(f"--{name.replace('_', '-')} {rest}") from None
    serve_adapters(
        options.pop("folder"),
        **options,
        limits=limits,
        report=lambda line: print(line, flush=True),
    )
