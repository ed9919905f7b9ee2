"""Timing of functions in turn in one process, so that disturbances affect all of them alike."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np

from aatjax.io.progress import track


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each round of one function, without warm-up."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(low), float(high)

    def compute_ratio(self, other: Timing) -> float:
        """Return the median over the rounds of this time over the other's."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


def time_interleaved(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = 9, warm_up: int = 2
) -> dict[str, Timing]:
    """Run each function once per round.

    Args:
        functions: by name; each returns when its work is done (`jax.block_until_ready`).
        rounds: rounds that count.
        warm_up: rounds before, in which programs are compiled.
    """
    spent: dict[str, list[float]] = {name: [] for name in functions}
    total = rounds + warm_up
    for number in track(range(total), "rounds", total):
        for name, run in functions.items():
            began = time.perf_counter()
            run()
            if number >= warm_up:
                spent[name].append(time.perf_counter() - began)
    return {name: Timing(tuple(seconds)) for name, seconds in spent.items()}
