"""Every field of a JSON value, put in turn to values of every kind."""

import copy
from collections.abc import Iterator
from typing import Any

DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
WRONG: list[Any] = [
    *(10**7, -1, 0, 10**30, 10**400, 1.5, -0.5, 1e300, float("nan"), float("inf"), True, None),
    *("", "x", "\0", "x" * 10**5, [], [[]], [1, 2, 3], [None] * 9, {}, {"name": "stacked"}, DEEP),
]


def list_places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all fields, and of the first item of each list."""
    if place:
        yield place
    if isinstance(value, dict):
        for key, item in value.items():
            yield from list_places(item, (*place, key))
    elif isinstance(value, list) and value:
        yield from list_places(value[0], (*place, 0))


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy of a JSON value with another value at a place."""
    changed = copy.deepcopy(value)
    inside: Any = changed
    for part in place[:-1]:
        inside = inside[part]
    inside[place[-1]] = new
    return changed


def remove(value: Any, place: tuple[Any, ...]) -> Any:
    """A copy of a JSON value without a field or item."""
    changed = copy.deepcopy(value)
    inside: Any = changed
    for part in place[:-1]:
        inside = inside[part]
    del inside[place[-1]]
    return changed


def attack(value: Any) -> Iterator[Any]:
    """The value with each field removed, and put to each wrong value; other values in its place."""
    yield from WRONG
    for place in list_places(value):
        yield remove(value, place)
        for new in WRONG:
            yield put(value, place, new)
