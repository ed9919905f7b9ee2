"""Checks your sounds, picks settings, trains, evaluates and writes a report, in one command."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from tyro.conf import UseAppendAction

from aatjax.cli.arguments import SoundsArguments
from aatjax.cli.dry_run import make_begin

GROUP = "train"


def main(
    sounds: SoundsArguments,
    *,
    fields: list[str],
    command: list[str],
    base: str = "embedded",
    method: str | None = None,
    out: Path | None = None,
    allow_change: UseAppendAction[tuple[str, ...]] = (),
    dry_run: bool = False,
    json: bool = False,
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
        allow_change: as of `aatjax train`
        dry_run: print the settings and stop
        json: print one JSON object, with the settings, the result and the report's name; the
            text goes to standard error
        no_labels: skip the search for labels that look wrong
        quiet: no progress
    """
    from json import dumps

    from aatjax.cli.fields import replace_fields, select_fields
    from aatjax.config import Config, Model
    from aatjax.convert.load import load
    from aatjax.errors import DataError
    from aatjax.experiments import autoconfig, run
    from aatjax.experiments.check import diagnose_data
    from aatjax.experiments.partition import divide
    from aatjax.io.atomic import check_output
    from aatjax.io.json_file import write_json
    from aatjax.io.progress import StageBar
    from aatjax.petl import make_method
    from aatjax.petl.simple import Ridge

    screen = sys.stderr if json else sys.stdout
    if out is not None:
        check_output(out / "config.json")
    asked = make_method(method) if method is not None else None
    plain = Config(petl=Ridge(), model=Model(source=base))
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
    print(diagnosis.text(most=3), file=screen)
    if diagnosis.refusal:
        raise DataError(diagnosis.refusal)
    data, made = autoconfig.choose_division(source, given.data)
    given = dataclasses.replace(given, data=data)
    data = replace_fields(given, select_fields(fields, "data"), "aatjax train").data
    parts = divide(data, source)
    config, more = autoconfig.choose_settings(
        source, parts, diagnosis, given.model, data, shape, asked
    )
    config = replace_fields(config, fields, "aatjax train")
    text = ["\nsettings:"]
    text += [f"  {one.what:<20} {one.value}\n      {one.why}" for one in [*made, *more]]
    if fields:
        text.append(f"\nreplaced by your flags: {' '.join(fields)}")
    text += ["", autoconfig.describe_training(config, parts)]
    print("\n".join(text), file=screen)
    make_begin(dry_run, f"nothing was trained ({config.petl.name}, {len(source)} clips)")()
    folder = out or autoconfig.name_adapt_folder(source)
    result = run.train(
        config,
        run_dir=folder,
        show=None if quiet else sys.stderr,
        allow_change=allow_change,
    )
    write_json(folder / "diagnosis.json", diagnosis.to_json())
    report = write_report(folder, command)
    print("\n".join(_list_outcome(result, diagnosis, config, report)), file=screen)
    if json:
        print(dumps({"config": config.to_json(), "result": result.to_json(), "report": report}))


def _list_outcome(result: Any, diagnosis: Any, config: Any, report: str) -> list[str]:
    """The lines that end the output: the result, what to try next, and the files."""
    from aatjax.cli.output import format_result
    from aatjax.experiments import autoconfig

    lines = [format_result(result)]
    outcome = None if result.run is None else result.run.test
    steps = autoconfig.suggest_next_steps(diagnosis, outcome, config.model.source)
    if steps:
        lines += ["\nnext:", *(f"  {number}. {line}" for number, line in enumerate(steps, 1))]
    lines += [f"\nadapter: {result.artefact}", report]
    return [*lines, f"aatjax predict {result.artefact} FILES..."]


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
