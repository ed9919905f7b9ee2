"""`aatjax eval`: metrics of an adapter."""

from pathlib import Path

from aatjax.cli.arguments import parser_of


def main(arguments: list[str]) -> None:
    """Runs `aatjax eval`."""
    parser = parser_of("eval")
    parser.add_argument("adapter", type=Path, help="adapter.safetensors")
    parser.add_argument("path", nargs="?", help="labelled sounds; default: the run's own test part")
    parser.add_argument("--format", default="auto", help="auto, folder, manifest, esc or names")
    parser.add_argument("--base", help="the backbone's weights, where they have moved")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    import json

    from aatjax.config import Data
    from aatjax.experiments import run
    from aatjax.train.adapter_file import load_adapter

    adapter = load_adapter(options.adapter, base=options.base)
    data = None if options.path is None else Data(path=options.path, format=options.format)
    result, source = run.evaluate_adapter(adapter, data)
    if options.json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        print(f"{options.adapter} on {source.name}")
        print(result.table())
