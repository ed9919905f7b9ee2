"""The papers' benchmarks by name, read from the archives as their owners distribute them."""

import difflib

from aatjax.data.benchmarks.base import Benchmark, Census, Division, Protocol, find_part
from aatjax.data.benchmarks.esc50 import ESC_10, ESC_50
from aatjax.data.benchmarks.fluent import FLUENT
from aatjax.data.benchmarks.gtzan import GTZAN
from aatjax.data.benchmarks.iemocap import IEMOCAP
from aatjax.data.benchmarks.openmic import OPENMIC
from aatjax.data.benchmarks.speech_commands import V1, V2
from aatjax.data.benchmarks.urbansound8k import URBANSOUND8K
from aatjax.errors import UsageError

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
    benchmark.name: benchmark
    for benchmark in (ESC_50, ESC_10, URBANSOUND8K, V1, V2, OPENMIC, GTZAN, FLUENT, IEMOCAP)
}


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        UsageError: there is none; the message suggests the nearest.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    near = difflib.get_close_matches(name.lower().replace("-", ""), BENCHMARKS, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"no benchmark {name!r}{hint} (there are {', '.join(BENCHMARKS)})")
