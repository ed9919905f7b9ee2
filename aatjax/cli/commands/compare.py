"""`aatjax compare`: methods side by side on one data set and protocol."""

import argparse
import shlex
import sys
from pathlib import Path

from aatjax.cli.arguments import config_of, text_table
from aatjax.errors import UsageError

HELP = """usage: aatjax compare [CONFIG ...] [--methods A B@LR ...] [--FIELD VALUE ...]

Runs several configs, or one config with several methods, on the same clips, and writes a folder
with tables (CSV, JSON, Markdown, LaTeX), pictures (SVG, PNG) and a page. The first row is what the
others are compared with. A run that is finished is not run again, so the same command goes on after
an interruption.

  --methods A B@LR   rows of `aatjax methods`, each with a learning rate after @ if wanted
  --seeds 0 1 2      seeds of each (default 0)
  --cross-validate   every fold of the data or run of its protocol
  --protocol NAME    divide a benchmark as a paper does: honest (default), aat or petl
  --budget N         parameters that mixtures are sized to
  --out DIR          folder of the comparison (default runs/compare)
  --verbose          the progress of each run

configs: {configs}
fields of the configs are flags, for all of them: aatjax compare CONFIG --flags lists them
"""


def main(arguments: list[str]) -> None:
    """Runs `aatjax compare`."""
    names = []
    rest = list(arguments)
    while rest and not rest[0].startswith("-"):
        names.append(rest.pop(0))
    configs = []
    options = None
    for name in names or ["default"]:
        config, options = config_of("compare", [name, *rest], HELP, _flags)
        if options.protocol is not None:
            config = config.with_protocol(options.protocol)
        configs.append(config)
    assert options is not None
    if options.method:
        raise UsageError("compare takes --methods, several of them, instead of --method")
    from aatjax.cli.commands.train import keep_compiled
    from aatjax.experiments.compare.runs import make_entries, run_grid
    from aatjax.experiments.compare.tables import format_table
    from aatjax.reports.html.compare import write_comparison

    entries = make_entries(configs, options.methods, options.budget)
    if len(entries) < 2:
        raise UsageError("a comparison needs two rows: give more configs, or --methods A B")
    keep_compiled()
    found = run_grid(
        entries,
        options.out,
        seeds=options.seeds,
        folds=options.cross_validate,
        show=sys.stderr if options.verbose else None,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    command = shlex.join(["aatjax", "compare", *arguments])
    files = write_comparison(found, options.out, command)
    print(text_table(*format_table(found)))
    for note in found.notes:
        print(f"- {note}")
    print(f"report: {files[-1]}")


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--cross-validate", action="store_true")
    parser.add_argument("--protocol")
    parser.add_argument("--budget", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--verbose", action="store_true")
