"""Serves many adapters on one backbone over HTTP, with their requests batched together."""

from pathlib import Path

from tyro.conf import OmitArgPrefixes

from aatjax.cli.arguments import Port
from aatjax.inference.server.limits import ServerLimits

GROUP = "use"


def main(
    folder: Path,
    *,
    base: str | None = None,
    host: str = "127.0.0.1",
    port: Port = 8000,
    limits: OmitArgPrefixes[ServerLimits],
) -> None:
    """Run `aatjax serve`.

    Args:
        folder: folder of adapters, NAME.safetensors or NAME/adapter.safetensors
        base: the backbone's weights, if they moved since training
        host: address to listen on; the default is reachable from this machine only
        port: port to listen on; 0 takes a free one
    """
    from aatjax.inference.server.serve import serve_adapters

    serve_adapters(
        folder,
        base=base,
        host=host,
        port=port,
        limits=limits,
        report=lambda line: print(line, flush=True),
    )
