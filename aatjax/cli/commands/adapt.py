"""Checks your sounds, picks settings, trains, evaluates and writes a report, in one command."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from aatjax.cli.arguments import SoundsArguments

GROUP = "train"


def main(
    sounds: SoundsArguments,
    *,
    fields: list[str],
    command: list[str],
    base: str = "embedded",
    method: str | None = None,
    out: Path | None = None,
    dry_run: bool = False,
    no_labels: bool = False,
    quiet: bool = False,
) -> None:
    """Run `aatjax adapt`.

    Args:
        sounds: every field of the config given as a flag (--model.frames 128) replaces the setting
            that was picked
        base: weights of the backbone: a file, a folder or a Hugging Face id
        method: another adaptation method than the one that was picked
        out: run folder (default: runs/adapt-NAME)
        dry_run: print the settings and stop
        no_labels: skip the search for labels that look wrong
        quiet: no progress
    """
    from aatjax.cli.fields import replace_fields, select_fields
    from aatjax.cli.progress import StageBar
    from aatjax.config import Config, Model
    from aatjax.convert.load import load
    from aatjax.errors import DataError
    from aatjax.experiments import autoconfig
    from aatjax.experiments.check import diagnose_data
    from aatjax.experiments.partition import divide
    from aatjax.petl import make_method
    from aatjax.petl.simple import Linear

    asked = make_method(method) if method is not None else None
    plain = Config(petl=Linear(), model=Model(source=base))
    given = sounds.load(plain, select_fields(fields, "data", "model"))
    shape = load(given.model.source, num_classes=2, revision=given.model.revision).config
    with StageBar(quiet=quiet) as bar:
        source, diagnosis = diagnose_data(
            given.data,
            frames=given.model.frames or (lambda s: autoconfig.choose_frames(s, shape.frames)),
            labels=not no_labels,
            base=given.model.source,
            progress=bar.update,
        )
    print(diagnosis.text(most=3))
    if diagnosis.refusal:
        raise DataError(diagnosis.refusal)
    data, made = autoconfig.choose_division(source, given.data)
    given = dataclasses.replace(given, data=data)
    data = replace_fields(given, select_fields(fields, "data"), "aatjax train").data
    parts = divide(data, source)
    config, more = autoconfig.choose_settings(
        source, parts, diagnosis, given.model, data, (shape.frames, shape.dim), asked
    )
    config = replace_fields(config, fields, "aatjax train")
    print("\nsettings:")
    for choice in [*made, *more]:
        print(f"  {choice.what:<20} {choice.value}\n      {choice.why}")
    print()
    if fields:
        print(f"replaced by your flags: {' '.join(fields)}\n")
    print(autoconfig.describe_training(config, parts))
    if dry_run:
        print(f"dry run: nothing was trained ({config.petl.name}, {len(source)} clips)")
        return
    folder = out or autoconfig.name_adapt_folder(source)
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
