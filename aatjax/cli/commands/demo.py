"""`aatjax demo`: a page to try an adapter."""

from pathlib import Path

from aatjax.cli.arguments import parser_of


def main(arguments: list[str]) -> None:
    """Runs `aatjax demo`."""
    parser = parser_of("demo")
    parser.add_argument("adapter", type=Path, help="adapter.safetensors, or weights with a head")
    parser.add_argument("--base", help="the backbone's weights, where they have moved")
    parser.add_argument("--port", type=int, default=7860, help="default 7860; 0 takes a free one")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    options = parser.parse_args(arguments)

    import webbrowser

    from aatjax.inference.classifier import Classifier
    from aatjax.inference.demo import page_config, title_of
    from aatjax.inference.demo.server import Server
    from aatjax.train.adapter_file import read_info

    classifier = Classifier.load(options.adapter, base=options.base)
    info = read_info(options.adapter) if options.adapter.is_file() else None
    method = "no adapter" if info is None else str(info["method"]["name"])
    config = page_config(
        classifier, title=title_of(options.adapter), method=method, backend="server"
    )
    with Server(classifier, config, options.port) as server:
        print(f"{server.address} (Ctrl-C ends)", flush=True)
        if not options.no_browser:
            webbrowser.open(server.address)
        server.serve_forever()
