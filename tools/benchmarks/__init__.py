"""The commands of tools/bench.py, and the table that they print."""

import platform
from collections.abc import Mapping
from pathlib import Path

from aatjax.analysis.timing import Timing


def print_timings(timings: Mapping[str, Timing], reference: str, clips: int = 0) -> None:
    """Print a line for each timing, in ms or clips/s, with its speed relative to a reference."""
    for name, timing in timings.items():
        figure = f"{1e3 * timing.median:9.1f} ms"
        if clips:
            figure = f"{clips / timing.median:9.1f} clips/s"
        ratio = timings[reference].compute_ratio(timing)
        print(f"{name:<20} {figure} {ratio:7.2f}x {reference}", flush=True)


def describe_cpu() -> str:
    """Return the name of the processor, its cores, and the widest vector units of its flags."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    about = {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in text.splitlines())
    }
    flags = set(about.get("flags", "").split())
    units = ("amx_tile", "avx512_bf16", "avx512f", "avx2", "fma")
    found = [unit for unit in units if unit in flags]
    return f"{about.get('model name', 'CPU')}, {text.count('processor')} cores, {' '.join(found)}"
