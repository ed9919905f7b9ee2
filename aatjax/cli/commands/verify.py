"""`aatjax verify`: whether an adapter or an export still says what it said when it was written."""

from pathlib import Path

from aatjax.cli.arguments import parser_of


def main(arguments: list[str]) -> None:
    """Runs `aatjax verify`."""
    parser = parser_of("verify")
    parser.add_argument("file", type=Path, help="adapter.safetensors, or the folder of an export")
    parser.add_argument("--base", help="the backbone's weights, where they have moved")
    options = parser.parse_args(arguments)

    from aatjax.errors import printable
    from aatjax.export import verify

    done = verify(options.file, base=options.base)
    print(
        f"{printable(options.file)}: as it was, logits within {done.largest:.2g} "
        f"({done.allowed:.2g} is allowed), run by {done.by}"
    )
