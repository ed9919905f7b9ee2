"""The commands of tools/bench.py, and the tables that they print and write."""

import csv
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aatjax.io.host import count_cores, read_cpu_info
from aatjax.io.timing import Timing

LIMITS = ("XLA_FLAGS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Variables that hold JAX's and PyTorch's libraries to narrower vector units."""


def print_timings(timings: Mapping[str, Timing], reference: str, clips: int = 0) -> None:
    """Print a line for each timing, in ms or clips/s, with its speed relative to a reference."""
    for name, timing in timings.items():
        figure = f"{1e3 * timing.median:9.1f} ms"
        if clips:
            figure = f"{clips / timing.median:9.1f} clips/s"
        ratio = timings[reference].compute_ratio(timing)
        print(f"{name:<20} {figure} {ratio:7.2f}x {reference}", flush=True)


def describe_cpu() -> str:
    """Return the name of the processor, its cores, and the vector units among its flags."""
    about = read_cpu_info()
    flags = about.get("flags", "").split()
    units = [unit for unit in ("amx_tile", "avx512_bf16", "avx512f", "avx2") if unit in flags]
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    name = about.get("model name") or platform.processor() or "CPU"
    return ", ".join([name, f"{count_cores()} cores", " ".join(units), *limits])


def append_row(path: Path | None, row: Mapping[str, Any]) -> None:
    """Add a row to a CSV file, with the names of its columns if it is new; None is no file.

    Raises:
        SystemExit: the file has other columns.
    """
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        file.seek(0)
        columns = next(csv.reader(file), None)
        if columns is not None and columns != list(row):
            raise SystemExit(f"{path} has the columns {', '.join(columns)}: give another file")
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if columns is None:
            writer.writeheader()
        writer.writerow(row)


def write_manifest(path: Path, rows: Iterable[tuple[Path, str, str, str | None]]) -> None:
    """Write file, class, part and group of clips as a CSV that `aatjax` reads."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "label", "split", "group"))
        writer.writerows(rows)
