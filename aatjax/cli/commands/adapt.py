"""`aatjax adapt`: one command from a folder of sounds to an adapter, a report and what to mend."""

import sys
from pathlib import Path
from typing import Any

from aatjax.cli.arguments import Parser, text_table, with_fields
from aatjax.cli.progress import StageBar

TEXT = (
    "Looks the sounds over (as `aatjax doctor`), chooses length, division, method, batch and "
    "augmentation by rules that it prints, trains, evaluates and writes a report. Every field of "
    "the config that is given as a flag (--model.frames 128) replaces the choice."
)


def main(arguments: list[str]) -> None:
    """Runs `aatjax adapt`."""
    parser = Parser(prog="aatjax adapt", description=TEXT, allow_abbrev=False)
    parser.add_argument("path", help="a folder of class folders, a CSV or JSON-lines file, ...")
    parser.add_argument(
        "--base",
        default="embedded",
        help="the backbone's weights: a file, a folder, a Hugging Face id (default embedded)",
    )
    parser.add_argument("--format", default="auto", help="as data.format (default auto)")
    parser.add_argument("--pattern", help="regular expression for --format names")
    parser.add_argument("--method", help="another method than the chosen one")
    parser.add_argument("--run", type=Path, help="run folder (default runs/adapt-NAME)")
    parser.add_argument("--dry-run", action="store_true", help="print the choices and stop")
    parser.add_argument(
        "--no-labels", action="store_true", help="do not look for labels that look wrong"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
    options, fields = parser.parse_known_args(arguments)
    from aatjax.convert.load import load
    from aatjax.data.formats import open_source
    from aatjax.doctor import diagnose
    from aatjax.experiments import autoconfig

    source = open_source(options.path, options.format, pattern=options.pattern)
    shape = load(options.base, num_classes=len(source.classes)).config
    with StageBar(quiet=options.quiet) as bar:
        diagnosis = diagnose(
            source, frames=shape.frames, labels=not options.no_labels, progress=bar.tell
        )
    print(diagnosis.text(most=3))
    config, made = autoconfig.choose(
        source,
        diagnosis,
        path=str(options.path),
        format=options.format,
        pattern=options.pattern,
        base=options.base,
        base_shape=(shape.frames, shape.dim),
    )
    if options.method:
        config = config.with_method(options.method)
    config = with_fields(config, fields, "aatjax adapt")
    print("\nchosen:")
    for choice in made:
        print(f"  {choice.what:<20} {choice.value}\n      {choice.why}")
    print()
    if options.method or fields:
        given = " ".join([f"--method {options.method}" if options.method else "", *fields])
        print(f"replaced by you: {given.strip()}\n")
    if options.dry_run:
        print(f"nothing was trained; {config.petl.name} on {len(source)} clips would be")
        return
    _train(config, source, diagnosis, options, arguments)


def _train(config: Any, source: Any, diagnosis: Any, options: Any, arguments: list[str]) -> None:

    from aatjax.cli.arguments import with_interval
    from aatjax.cli.commands.train import keep_compiled
    from aatjax.experiments import autoconfig, run
    from aatjax.io.json_file import write_json

    keep_compiled()
    folder: Path = options.run or autoconfig.run_folder_of(source)
    show = None if options.quiet else sys.stderr
    result = run.train(config, run_dir=folder, show=show)
    write_json(folder / "diagnosis.json", diagnosis.to_json())
    report = write_report(folder, ["aatjax", "adapt", *arguments])
    metric = result.headline[0] if result.headline else "test"
    row = [
        result.method,
        f"{result.trainable:,}",
        with_interval(result.headline),
        f"{result.seconds:.0f}",
    ]
    print(text_table(["method", "trainable", metric, "seconds"], [row]))
    outcome = None if result.run is None else result.run.test
    steps = autoconfig.next_steps(diagnosis, outcome, config.model.source)
    if steps:
        print("\nnext:")
        print("\n".join(f"  {number}. {line}" for number, line in enumerate(steps, 1)))
    print(f"\nadapter: {result.artefact}\n{report}")
    print(f"aatjax predict {result.artefact} FILES...")


def write_report(folder: Path, command: list[str]) -> str:
    """Write the report, and return the line that names it, or says why there is none."""
    from aatjax.errors import UnavailableError
    from aatjax.io.atomic import write_text

    try:
        from aatjax.reports.html.collect import collect_report
        from aatjax.reports.html.report import render_report
    except UnavailableError as error:
        return f"report not written: {error}; then run aatjax report {folder}"
    path = folder / "report.html"
    text = render_report(collect_report(folder), command)
    write_text(path, text)
    return f"report: {path}"
