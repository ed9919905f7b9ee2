"""Timing things against each other: in turn, in one process, medians after warm-up."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of one thing, one a round.

    Attributes:
        seconds: of each round after warm-up.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(low), float(high)

    def over(self, other: Timed) -> float:
        """Median over the rounds of how often the other's time this one takes."""
        return statistics.median(
            mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)
        )


def in_turn(
    things: Mapping[str, Callable[[], object]], *, rounds: int = 9, warm_up: int = 2
) -> dict[str, Timed]:
    """Runs each thing once a round, so that what disturbs the machine disturbs all alike.

    Args:
        things: by name; each returns when its work is done (`jax.block_until_ready`).
        rounds: rounds that count.
        warm_up: rounds before, in which programs are compiled.
    """
    spent: dict[str, list[float]] = {name: [] for name in things}
    for number in range(rounds + warm_up):
        for name, run in things.items():
            began = time.perf_counter()
            run()
            if number >= warm_up:
                spent[name].append(time.perf_counter() - began)
    return {name: Timed(tuple(seconds)) for name, seconds in spent.items()}
