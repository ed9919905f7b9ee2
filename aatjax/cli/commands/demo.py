"""Opens a page in the browser to try an adapter on microphone and files."""

from pathlib import Path

from aatjax.cli.arguments import Port

GROUP = "use"


def main(
    adapter: Path,
    *,
    base: str | None = None,
    port: Port = 7860,
    no_browser: bool = False,
) -> None:
    """Run `aatjax demo`.

    Args:
        adapter: adapter.safetensors, its run folder, or weights with a head
        base: the backbone's weights, if they moved since training
        port: port on this machine; 0 takes a free one
        no_browser: print the address and open no browser
    """
    from aatjax.inference.server.serve import REQUIRED
    from aatjax.io.optional import need

    need(*REQUIRED, extra="serve")
    from aatjax.inference.demo.server import serve_page

    serve_page(
        adapter,
        base=base,
        port=port,
        browser=not no_browser,
        report=lambda line: print(line, flush=True),
    )
