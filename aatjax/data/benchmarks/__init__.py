"""The papers' benchmarks by name, read from the archives as their owners distribute them."""

import importlib
import pkgutil

from aatjax.data.benchmarks.base import Benchmark, Census, Division, Protocol, find_part
from aatjax.errors import UsageError, suggest

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Census",
    "Division",
    "Protocol",
    "find_benchmark",
    "find_part",
]

BENCHMARKS: dict[str, Benchmark] = {
    value.name: value
    for module in pkgutil.iter_modules(__path__, f"{__name__}.")
    for value in vars(importlib.import_module(module.name)).values()
    if isinstance(value, Benchmark)
}
"""Every `Benchmark` of the modules beside this one."""


def find_benchmark(name: str) -> Benchmark:
    """Return the benchmark of a name.

    Raises:
        UsageError: there is none; the message suggests the nearest.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    hint = suggest(name, BENCHMARKS)
    raise UsageError(f"no benchmark {name!r}{hint} (there are {', '.join(BENCHMARKS)})")
