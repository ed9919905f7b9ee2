"""How fast the clips of an ESC folder are read: prepared, from the cache, and decoded anew.

    python tools/bench_reading.py ESC-50-master

Each is one pass over all clips in order, read by two threads as in training; the passes are made
in turn, five times, and ratios are of the medians. Prints the seconds of preparing as well.
"""

import argparse
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from aatjax.data.benchmarks import BENCHMARKS
from aatjax.data.decode_cache import decode_all
from aatjax.data.prepare import prepare
from aatjax.data.source import Source
from aatjax.data.tfds import Prepared


def one_pass(source: Source, threads: int) -> float:
    """Seconds of reading every clip and touching every sample."""
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda i: int(source.waveform(i).sum()), range(len(source))))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--benchmark", default="esc10", choices=tuple(BENCHMARKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--passes", type=int, default=5)
    options = parser.parse_args()
    decoded = BENCHMARKS[options.benchmark].read(options.folder)
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        outcome = prepare(options.benchmark, options.folder, to=place, subset=True)
        print(f"prepared {len(decoded)} clips in {time.perf_counter() - began:.1f} s")
        sources = {
            "decoded anew": decoded,
            "cache": decode_all(decoded, Path(place) / "cache"),
            "prepared": Prepared(outcome.folder),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sources}
        for turn in range(options.passes + 1):
            for name, source in sources.items():
                spent = one_pass(source, options.threads)
                if turn:  # the first is a warm-up
                    seconds[name].append(spent)
        base = statistics.median(seconds["decoded anew"])
        for name, spent in seconds.items():
            median = statistics.median(spent)
            print(f"{name:<13} {len(decoded) / median:8.0f} clips/s  {base / median:6.1f}x")


if __name__ == "__main__":
    main()
