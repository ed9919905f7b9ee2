"""Bottleneck widths: given as a width, or as one of the papers' alternatives."""

import bisect
import dataclasses
from collections.abc import Callable
from typing import Any

from aatjax.errors import UsageError

SIZES = ("width", "rank", "reduction", "ratio", "budget")
"""Fields that set the width; a method has two or three of them, None by default."""


BASE_WIDTH = 768
"""Token width of AST-base, the model of the papers."""
LEAST_WIDTH = 8
"""Bottleneck width by default on narrower models, at least."""


def find_sizes(method: Any) -> dict[str, Any]:
    """Return the size fields of a method that are given.

    Raises:
        UsageError: more than one is.
    """
    names = [f.name for f in dataclasses.fields(method) if f.name in SIZES and f.default is None]
    given = {n: value for n in names if (value := getattr(method, n)) is not None}
    if len(given) > 1:
        both = " and ".join(f"{name}={value}" for name, value in given.items())
        raise UsageError(f"{type(method).__name__} {both}: each sets the width, give one of them")
    return given


def find_widths(
    method: Any, dim: int, blocks: int, count: Callable[[int], int] | None = None
) -> list[int]:
    """Return the bottleneck width r in each adapted block, on a model of token width D.

    `width` (`rank` of LoRA) is r itself. `reduction` gives r = round(D / reduction)
    (arXiv 2312.03694, 2402.00828), `ratio` r = int(ratio * D) (arXiv 2401.10544), `budget` the r
    whose number of parameters comes nearest. With none of them the method's `default_size` holds;
    on models narrower than AST-base (D = 768), where a reduction leaves a width of 1 to 6,
    `LEAST_WIDTH` at least. A tuple gives each block its own.

    Args:
        method: the method.
        dim: D.
        blocks: number of adapted blocks.
        count: number of parameters by r, for `budget`.

    Raises:
        UsageError: the given size is less than a width of 1, or not one per block.
    """
    given, name = find_sizes(method), type(method).__name__
    field, value = next(iter(given.items()), method.default_size)
    if field == "budget":
        assert count is not None
        return [_fit_budget(name, int(value), count)] * blocks
    values = value if isinstance(value, tuple) else (value,) * blocks
    if len(values) != blocks:
        raise UsageError(
            f"{name} {field}={value}: {len(values)} sizes for {blocks} adapted blocks: give one, "
            "or one for each"
        )
    return [_find_width(name, field, each, dim, is_given=bool(given)) for each in values]


def _find_width(name: str, field: str, value: float, dim: int, *, is_given: bool) -> int:
    if field in ("width", "rank"):
        return int(value)
    exact = dim / value if field == "reduction" else value * dim
    if not is_given and field == "reduction" and dim < BASE_WIDTH:
        exact = max(exact, LEAST_WIDTH)
    if is_given and exact < 1:
        most = f"at most {dim}" if field == "reduction" else f"at least {1 / dim:g}"
        raise UsageError(
            f"{name} {field}={value:g} gives a width of {exact:.2g} on a model of width {dim}, "
            f"less than 1: give {field} {most}, or a width"
        )
    return max(1, round(exact) if field == "reduction" else int(exact))


def _fit_budget(name: str, budget: int, count: Callable[[int], int]) -> int:
    one = count(1)
    if one > 1.5 * budget:
        raise UsageError(
            f"{name} budget={budget:,} is not enough: with a width of 1 the added modules have "
            f"{one:,} parameters; give a larger budget, or fewer experts or sites"
        )
    most = 2 + max(0, budget - one) // (count(2) - one)
    above = bisect.bisect_left(range(1, most + 1), budget, key=count) + 1
    return min(max(1, above - 1), above, key=lambda width: abs(count(width) - budget))
