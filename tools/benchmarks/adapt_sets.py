"""What `aatjax adapt` makes of real sets without any setting, beside ridge regression alone."""

import contextlib
import dataclasses
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tyro

from aatjax.cli.main import run
from benchmarks import append_row, write_manifest
from benchmarks.tables import FIGURES
from benchmarks.verdict import TASKS, read_rows

SETS = ("esc10", "digits", "commands")


def adapt(
    data: tyro.conf.Positional[Path],
    sets: tuple[str, ...] = SETS,
    base: str = "embedded",
    out: Path = FIGURES / "adapt.csv",
) -> None:
    """Run `aatjax adapt` with each fold of each set held out; rows that --out has stay.

    Args:
        data: folder of the sets, as of `verdict`.
        sets: tasks of `verdict`, here with all clips.
        base: weights of the backbone.
        out: CSV file, a row for each run.
    """
    done = [(row["set"], row["fold"], row["asked"]) for row in read_rows(out)]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "clips.csv"
        for name in sets:
            for fold, rows in list_folds(name, data):
                write_manifest(path, rows)
                for asked in ("", "ridge"):
                    if (name, fold, asked) in done:
                        continue
                    folder = Path(place) / f"{name}-{fold}-{asked}"
                    row = {"set": name, "fold": fold, "asked": asked}
                    row |= run_adapt(path, folder, base, asked)
                    append_row(out, row)
                    print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def list_folds(name: str, data: Path) -> Iterator[tuple[str, list[tuple[Path, str, str, str]]]]:
    """Return each fold of a task, and file, class, part and group of all clips."""
    items = dataclasses.replace(TASKS[name], takes=10**6).list(data)
    for fold in sorted({item.fold for item in items}):
        parts = {True: "test", False: "train"}
        yield (
            fold,
            [(item.path, item.label, parts[item.fold == fold], item.group) for item in items],
        )


def run_adapt(path: Path, folder: Path, base: str, asked: str) -> dict[str, str]:
    """Return the figures of one run."""
    command = ["adapt", str(path), "--out", str(folder), "--base", base, "--no-labels", "--quiet"]
    command += ["--json", "--data.leaks", "report"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        code = run([*command, *(["--method", asked] if asked else [])])
    if code:
        raise SystemExit(f"aatjax {' '.join(command)}: exit code {code}")
    found = json.loads(printed.getvalue())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "method": found["config"]["petl"]["name"],
        "epochs": str(rows[-1]["epoch"]),
        "left_out": f"{rows[0]['left_out/accuracy']:.4f}",
        "accuracy": f"{found['result']['headline'][1]:.4f}",
        "seconds": f"{found['result']['seconds']:.0f}",
    }
