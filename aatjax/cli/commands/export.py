"""`aatjax export`: an adapter in the files of another runtime."""

import sys
from pathlib import Path

from aatjax.cli.arguments import parser_of


def main(arguments: list[str]) -> None:
    """Runs `aatjax export`."""
    parser = parser_of("export")
    parser.add_argument("adapter", type=Path, help="adapter.safetensors")
    parser.add_argument("out", type=Path, help="folder to write; it must be new or empty")
    parser.add_argument(
        "--to",
        required=True,
        choices=("hf", "peft", "onnx", "stablehlo", "safetensors", "web"),
        help="transformers, PEFT's LoRA, ONNX, jax.export, plain weights for aatjax.load, or a "
        "page of static files that runs in a browser",
    )
    parser.add_argument("--base", help="the backbone's weights, where they have moved")
    parser.add_argument(
        "--check",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="sound files to compare model and export on (default: synthetic sounds)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="how far a logit may move, in units of the largest one (default 1e-4)",
    )
    parser.add_argument("--platforms", default="cpu,cuda,tpu", help="of stablehlo, with commas")
    parser.add_argument(
        "--runtime", metavar="TGZ", help="of web: the onnxruntime-web package, without network"
    )
    parser.add_argument("--licence", default="unknown", help="for the model card, such as mit")
    options = parser.parse_args(arguments)

    from aatjax.export import export
    from aatjax.export.parity import TOLERANCE

    done = export(
        options.adapter,
        options.to,
        options.out,
        base=options.base,
        check=options.check,
        tolerance=TOLERANCE if options.tolerance is None else options.tolerance,
        platforms=options.platforms.split(","),
        runtime=options.runtime,
        licence=options.licence,
    )
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    largest = max(done.largest.values())
    print(f"{options.out}: {done.to}, logits within {largest:.2g} of the model's, run by {done.by}")
