"""`aatjax serve`: many adapters on one backbone behind HTTP."""

import math
from pathlib import Path

from aatjax.cli.arguments import parser_of


def main(arguments: list[str]) -> None:
    """Runs `aatjax serve`."""
    parser = parser_of("serve")
    parser.add_argument("folder", type=Path, help="NAME.safetensors, NAME/adapter.safetensors")
    parser.add_argument("--base", help="the backbone's weights, where they have moved")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine only")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    limit = parser.add_argument_group("limits")
    limit.add_argument("--max-bytes", type=int, default=32 * 2**20, help="of a body (32 MiB)")
    limit.add_argument("--max-seconds", type=float, default=600.0, help="of a sound (600)")
    limit.add_argument("--body-timeout", type=float, default=20.0, help="seconds to send it (20)")
    limit.add_argument("--timeout", type=float, default=60.0, help="seconds to the answer (60)")
    limit.add_argument("--concurrency", type=int, default=64, help="requests under way (64)")
    limit.add_argument("--queue", type=int, default=1024, help="windows that may wait (1024)")
    limit.add_argument("--batch-size", type=int, default=16, help="windows of a pass (16)")
    limit.add_argument(
        "--wait",
        type=float,
        default=0.005,
        metavar="SECONDS",
        help="how long a batch waits for company (0.005)",
    )
    options = vars(parser.parse_args(arguments))

    from aatjax.errors import UsageError
    from aatjax.inference.server import serve

    for name in (
        "max_bytes",
        "max_seconds",
        "body_timeout",
        "timeout",
        "concurrency",
        "queue",
        "batch_size",
    ):
        if not 0 < options[name] < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} {options[name]} must be above 0, finite")
    if not 0 <= options["wait"] < math.inf:
        raise UsageError(f"--wait {options['wait']} must be 0 or more, finite")
    serve(options.pop("folder"), **options, say=lambda line: print(line, flush=True))
