"""`aatjax demo`: a local page to try an adapter."""

from pathlib import Path

from aatjax.cli.arguments import parser_of


def main(arguments: list[str]) -> None:
    """Run `aatjax demo`."""
    parser = parser_of("demo")
    parser.add_argument("adapter", type=Path, help="adapter.safetensors, or weights with a head")
    parser.add_argument("--base", help="the backbone's weights, if they moved since training")
    parser.add_argument("--port", type=int, default=7860, help="default 7860; 0 takes a free one")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    options = parser.parse_args(arguments)

    from aatjax.inference.server.serve import REQUIRED
    from aatjax.io.optional import need

    need(*REQUIRED, extra="serve")
    from aatjax.inference.demo.server import serve_page

    serve_page(
        options.adapter,
        base=options.base,
        port=options.port,
        browser=not options.no_browser,
        report=lambda line: print(line, flush=True),
    )
