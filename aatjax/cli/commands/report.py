"""Writes everything about a trained adapter into one HTML file."""

from pathlib import Path

GROUP = "train"


def main(
    run: Path,
    *,
    command: list[str],
    out: Path | None = None,
    clips: str | None = None,
    format: str = "auto",
    base: str | None = None,
) -> None:
    """Run `aatjax report`.

    Args:
        run: a run folder, or an adapter file
        out: the file to write (default: report.html beside the adapter)
        clips: labelled sounds (default: the test clips of the run)
        format: how CLIPS is read: auto, folder, manifest, esc or names
        base: the backbone's weights, if they moved since training
    """
    from aatjax.config import Data
    from aatjax.io.atomic import write_text
    from aatjax.reports.html.collect import collect_report
    from aatjax.reports.html.report import render_report

    data = None if clips is None else Data(path=clips, format=format)  # pyright: ignore[reportArgumentType]
    evidence = collect_report(run, data, base=base)
    page = render_report(evidence, command)
    out = out or evidence.path.parent / "report.html"
    write_text(out, page)
    print(f"{out} ({len(page.encode()) / 1e6:.2f} MB)")
