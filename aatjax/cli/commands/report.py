"""Writes everything about a trained adapter into one HTML file."""

from pathlib import Path

from aatjax.cli.arguments import OtherSounds
from aatjax.cli.dry_run import make_begin

GROUP = "train"


def main(
    run: Path,
    sounds: OtherSounds,
    *,
    fields: list[str],
    command: list[str],
    out: Path | None = None,
    base: str | None = None,
    dry_run: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `aatjax report`.

    Args:
        run: a run folder, or an adapter file
        out: the file to write (default: report.html beside the adapter)
        base: the backbone's weights, if they moved since training
        dry_run: open the adapter, its run and the sounds, and stop
        json: print one JSON object, with the name of the file
        quiet: no progress
    """
    from json import dumps

    from aatjax.io.atomic import check_output, write_text
    from aatjax.io.progress import report
    from aatjax.reports.html.collect import collect_report
    from aatjax.reports.html.report import render_report
    from aatjax.train.adapter_file import find_adapter

    data = sounds.load(fields)
    out = out or find_adapter(run)[0].parent / "report.html"
    check_output(out)
    begin = make_begin(dry_run, f"would write {out}")
    evidence = collect_report(run, data, base=base, begin=begin)
    report("drawing the page")
    page = render_report(evidence, command)
    write_text(out, page)
    size = len(page.encode())
    about = {"report": str(out), "bytes": size}
    print(dumps(about) if json else f"{out} ({size / 1e6:.2f} MB)")
