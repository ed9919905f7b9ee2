"""Parametrised cases of which only some are in the default run."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def mark_slow(cases: Iterable[tuple], default: Callable[..., bool] | set[tuple]) -> list[Any]:
    """Return all cases, those outside `default` marked slow.

    Args:
        cases: tuples of arguments.
        default: the cases of the default run, or a function of a case's arguments.
    """
    chosen = default.__contains__ if isinstance(default, set) else lambda case: default(*case)
    return [pytest.param(*case, marks=[] if chosen(case) else pytest.mark.slow) for case in cases]
