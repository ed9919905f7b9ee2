"""`aatjax doctor`: what is wrong with a set of labelled sounds, before training on it."""

from aatjax.cli.arguments import parser_of
from aatjax.cli.progress import StageBar

EPILOG = (
    "exit code: 0 no error was found, 1 an error was found (with --strict, or a warning), 2 wrong "
    "usage, 65 nothing usable lies there. error: training stops, leaves the clip out, or a figure "
    "would be too high; warning: it is trained on as it is; note: good to know."
)


def main(arguments: list[str]) -> None:
    """Runs `aatjax doctor`."""
    parser = parser_of("doctor")
    parser.epilog = EPILOG
    parser.add_argument("path", help="a folder of class folders, a CSV or JSON-lines file, ...")
    parser.add_argument("--format", default="auto", help="as data.format (default auto)")
    parser.add_argument("--pattern", help="regular expression for --format names")
    parser.add_argument(
        "--frames", type=int, help="input length in 10 ms frames (default: that of --base)"
    )
    parser.add_argument(
        "--no-labels", action="store_true", help="do not look for labels that look wrong"
    )
    parser.add_argument(
        "--base", default="embedded", help="weights that listen to the labels (default embedded)"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 on warnings too")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="FINDING",
        help="a finding that does not count for the exit code",
    )
    parser.add_argument("--show", type=int, default=5, help="cases shown of each (default 5)")
    parser.add_argument("--workers", type=int, help="decoding threads (default: one a core)")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options = parser.parse_args(arguments)
    import json

    from aatjax.cli.arguments import nearest
    from aatjax.doctor import KINDS, diagnose
    from aatjax.errors import UsageError

    for kind in options.ignore:
        if kind not in KINDS:
            hint = nearest(kind, list(KINDS)) or f"; there are {', '.join(KINDS)}"
            raise UsageError(f"--ignore {kind}: no such finding{hint}")
    if options.show < 0:
        raise UsageError(f"--show is {options.show}; give 0 or more")
    with StageBar(quiet=options.quiet) as bar:
        diagnosis = diagnose(
            options.path,
            format=options.format,
            pattern=options.pattern,
            frames=options.frames,
            labels=not options.no_labels,
            base=options.base,
            workers=options.workers,
            progress=bar.tell,
        )
    if options.json:
        print(json.dumps(diagnosis.to_json(), indent=2, allow_nan=False))
    else:
        print(diagnosis.text(most=options.show))
    code = diagnosis.exit_code(strict=options.strict, ignore=options.ignore)
    if code:
        raise SystemExit(code)
