"""Writes everything about a trained adapter into one HTML file."""

from pathlib import Path

from aatjax.cli.arguments import OtherSounds

GROUP = "train"


def main(
    run: Path,
    sounds: OtherSounds,
    *,
    fields: list[str],
    command: list[str],
    out: Path | None = None,
    base: str | None = None,
) -> None:
    """Run `aatjax report`.

    Args:
        run: a run folder, or an adapter file
        out: the file to write (default: report.html beside the adapter)
        base: the backbone's weights, if they moved since training
    """
    from aatjax.io.atomic import write_text
    from aatjax.reports.html.collect import collect_report
    from aatjax.reports.html.report import render_report

    data = sounds.load(fields)
    evidence = collect_report(run, data, base=base)
    page = render_report(evidence, command)
    out = out or evidence.path.parent / "report.html"
    write_text(out, page)
    print(f"{out} ({len(page.encode()) / 1e6:.2f} MB)")
