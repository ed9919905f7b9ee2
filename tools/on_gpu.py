"""Everything that is to be measured on a GPU, in one command, the most valuable first.

    python tools/on_gpu.py --minutes 10 --out DIR
    python tools/on_gpu.py --tables --out DIR
    python tools/on_gpu.py --rehearse --out DIR

Each stage writes DIR/STAGE.json, row by row, before the next one begins; a second call goes on
where the first one stopped. It needs no network. `--rehearse` runs all stages on a CPU, at toy
sizes.
"""

import datetime
import importlib.util
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

PACKAGES = ("jax", "jaxlib", "flax", "aatjax", "torch", "tokamax")


def main(
    out: Path,
    minutes: float = 10.0,
    only: tuple[str, ...] = (),
    rehearse: bool = False,
    tables: bool = False,
    stage: str | None = None,
) -> None:
    """Run the stages that are not done, each in a process of its own.

    Args:
        out: folder of the results.
        minutes: time for all of them.
        only: some stages, by name.
        rehearse: toy sizes, on a CPU.
        tables: print the tables of what is in the folder, and run nothing.
        stage: run this one here; for the command's own use.
    """
    out.mkdir(parents=True, exist_ok=True)
    if tables:
        print(make_tables(out))
    elif stage is not None:
        run_stage(stage, out, rehearse=rehearse)
    else:
        run_stages(out, minutes, only, rehearse=rehearse)


def run_stages(out: Path, minutes: float, only: tuple[str, ...], *, rehearse: bool) -> None:
    """Run each stage within its own time and the time that is left."""
    from benchmarks.gpu_day import STAGES

    if unknown := set(only) - set(STAGES):
        raise SystemExit(f"unknown stage {', '.join(sorted(unknown))}: use {', '.join(STAGES)}")
    ends = time.monotonic() + 60 * minutes
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment.pop("PYTHONSAFEPATH", None)  # a stage imports what lies beside this file
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(out.absolute() / "compiled"))
    if rehearse:
        environment["JAX_PLATFORMS"] = "cpu"
    for name in only or STAGES:
        left = ends - time.monotonic()
        if read(out, name).get("complete"):
            print(f"{name}: done before", flush=True)
            continue
        if left < 5:
            print(f"{name}: no time left; the same command goes on here", flush=True)
            continue
        command = [sys.executable, __file__, "--out", str(out), "--stage", name]
        began = time.monotonic()
        try:
            code = subprocess.run(
                [*command, *(["--rehearse"] if rehearse else [])],
                env=environment,
                timeout=min(left, STAGES[name].seconds),
                check=False,
            ).returncode
            ended = "done" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        rows = len(read(out, name).get("rows", []))
        print(f"{name}: {ended}, {rows} rows, {time.monotonic() - began:.0f} s", flush=True)


def run_stage(name: str, out: Path, *, rehearse: bool) -> None:
    """Run the measurements of a stage that are not in its file."""
    from benchmarks.gpu_day import STAGES, Day

    from aatjax.io.json_file import write_json

    held = {"about": describe(rehearse=rehearse), "rows": [], "keys": [], "complete": False}
    held |= read(out, name)
    for key, measure in STAGES[name].measurements(Day(rehearse)):
        if key in held["keys"]:
            continue
        try:
            found = measure()
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}"[:500]}
        held["rows"] += [
            {"key": key, **row} for row in (found if isinstance(found, list) else [found])
        ]
        held["keys"].append(key)
        write_json(out / f"{name}.json", held)
    write_json(out / f"{name}.json", held | {"complete": True})


def read(out: Path, name: str) -> dict[str, Any]:
    """Return what is known of a stage."""
    from aatjax.io.json_file import read_json_object

    path = out / f"{name}.json"
    return read_json_object(path) if path.is_file() else {}


def describe(*, rehearse: bool) -> dict[str, Any]:
    """Return device, versions and date."""
    import jax

    found = {name: version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    device = jax.devices()[0]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    about = {"device": device.device_kind, "platform": device.platform, "date": date}
    return about | {"python": sys.version.split()[0], "versions": found, "rehearsal": rehearse}


def make_tables(out: Path) -> str:
    """Return the rows of every stage as Markdown tables, under what they were measured with."""
    from benchmarks.gpu_day import STAGES

    from aatjax.experiments.compare.tables import make_markdown_table

    parts = []
    for name in STAGES:
        held = read(out, name)
        if not held:
            continue
        about = held["about"]
        versions = ", ".join(f"{one} {number}" for one, number in about["versions"].items())
        part = f"{name}: {about['device']}, {about['date']}, Python {about['python']}, {versions}"
        part += "" if held["complete"] else " (not complete)"
        rows = [{k: v for k, v in row.items() if k != "key"} for row in held["rows"]]
        heads = list(dict.fromkeys(head for row in rows for head in row))
        lines = [tuple(_format(row.get(head)) for head in heads) for row in rows]
        parts.append(f"{part}\n\n{make_markdown_table(tuple(heads), lines)}")
    return "\n\n".join(parts) or f"{out}: no results"


def _format(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    tyro.cli(main, prog="on_gpu.py")
