"""Checks your sounds, picks settings, trains, evaluates and writes a report, in one command."""

import sys
from pathlib import Path
from typing import Any

GROUP = "train"


def main(
    path: str,
    *,
    fields: list[str],
    command: list[str],
    base: str = "embedded",
    format: str = "auto",
    pattern: str | None = None,
    method: str | None = None,
    run: Path | None = None,
    dry_run: bool = False,
    no_labels: bool = False,
    quiet: bool = False,
) -> None:
    """Run `aatjax adapt`.

    Args:
        path: a folder of class folders, a CSV or JSON-lines file, ...; every field of the config
            given as a flag (--model.frames 128) replaces the setting that was picked
        base: weights of the backbone: a file, a folder or a Hugging Face id
        format: how PATH is read, as --data.format of `aatjax train`
        pattern: regular expression for --format names
        method: another adaptation method than the one that was picked
        run: run folder (default: runs/adapt-NAME)
        dry_run: print the settings and stop
        no_labels: skip the search for labels that look wrong
        quiet: no progress
    """
    from aatjax.cli.arguments import replace_fields
    from aatjax.cli.progress import StageBar
    from aatjax.convert.load import load
    from aatjax.data.formats import open_source
    from aatjax.doctor import diagnose
    from aatjax.experiments import autoconfig

    source = open_source(path, format, pattern=pattern)  # pyright: ignore[reportArgumentType]
    shape = load(base, num_classes=len(source.classes)).config
    with StageBar(quiet=quiet) as bar:
        diagnosis = diagnose(source, frames=shape.frames, labels=not no_labels, progress=bar.update)
    print(diagnosis.text(most=3))
    data = {"path": path, "format": format, "pattern": pattern}
    config, made = autoconfig.choose_settings(
        source, diagnosis, **data, base=base, base_shape=(shape.frames, shape.dim)
    )
    if method:
        config = config.with_method(method)
    config = replace_fields(config, fields, "aatjax train")
    print("\nsettings:")
    for choice in made:
        print(f"  {choice.what:<20} {choice.value}\n      {choice.why}")
    print()
    if method or fields:
        given = " ".join([*(["--method", method] if method else []), *fields])
        print(f"replaced by your flags: {given}\n")
    if dry_run:
        print(f"dry run: nothing was trained ({config.petl.name}, {len(source)} clips)")
        return
    folder = run or autoconfig.name_adapt_folder(source)
    _train(config, folder, diagnosis, command, show=None if quiet else sys.stderr)


def _train(config: Any, folder: Path, diagnosis: Any, command: list[str], *, show: Any) -> None:
    from aatjax.cli.output import format_result
    from aatjax.experiments import autoconfig, run
    from aatjax.io.json_file import write_json

    result = run.train(config, run_dir=folder, show=show)
    write_json(folder / "diagnosis.json", diagnosis.to_json())
    report = write_report(folder, command)
    print(format_result(result))
    outcome = None if result.run is None else result.run.test
    steps = autoconfig.suggest_next_steps(diagnosis, outcome, config.model.source)
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
