"""The commands of tools/bench.py, and the table that they print."""

from collections.abc import Mapping

from aatjax.analysis.timing import Timing


def print_timings(timings: Mapping[str, Timing], reference: str, clips: int = 0) -> None:
    """Print a line for each timing, in ms or clips/s, with its speed relative to a reference."""
    for name, timing in timings.items():
        figure = f"{1e3 * timing.median:9.1f} ms"
        if clips:
            figure = f"{clips / timing.median:9.1f} clips/s"
        ratio = timings[reference].compute_ratio(timing)
        print(f"{name:<20} {figure} {ratio:7.2f}x {reference}", flush=True)
