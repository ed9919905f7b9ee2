"""Parametrised cases of which only some are in the default run."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import pytest

First, Second = TypeVar("First"), TypeVar("Second")


def mark_slow(cases: Iterable[tuple], default: Callable[..., bool] | set[tuple]) -> list[Any]:
    """Return all cases, those outside `default` marked slow.

    Args:
        cases: tuples of arguments.
        default: the cases of the default run, or a function of a case's arguments.
    """
    chosen = default.__contains__ if isinstance(default, set) else lambda case: default(*case)
    return [pytest.param(*case, marks=[] if chosen(case) else pytest.mark.slow) for case in cases]


def pair_in_turn(names: Sequence[First], cases: Sequence[Second]) -> list[tuple[First, Second]]:
    """Pair every case with one of the names, in turn: all of both are tried, not every pair."""
    return [(names[number % len(names)], case) for number, case in enumerate(cases)]
