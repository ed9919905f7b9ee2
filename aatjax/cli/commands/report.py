"""`aatjax report`: everything about a trained adapter in one HTML file."""

from pathlib import Path

from aatjax.cli.arguments import parser_of


def main(arguments: list[str]) -> None:
    """Runs `aatjax report`."""
    parser = parser_of("report")
    parser.add_argument("run", type=Path, help="a run folder, or an adapter file")
    parser.add_argument(
        "--out", type=Path, help="the file (default: report.html beside the adapter)"
    )
    parser.add_argument("--clips", help="labelled sounds; default: the run's own test part")
    parser.add_argument("--format", default="auto", help="auto, folder, manifest, esc or names")
    parser.add_argument("--base", help="the backbone's weights, where they have moved")
    options = parser.parse_args(arguments)
    from aatjax.config import Data
    from aatjax.io.atomic import write_text
    from aatjax.reports.html.collect import collect_report
    from aatjax.reports.html.report import render_report

    data = None if options.clips is None else Data(path=options.clips, format=options.format)
    found = collect_report(options.run, data, base=options.base)
    text = render_report(found, ["aatjax", "report", *arguments])
    out: Path = options.out or found.path.parent / "report.html"
    write_text(out, text)
    print(f"{out} ({len(text.encode()) / 1e6:.2f} MB)")
