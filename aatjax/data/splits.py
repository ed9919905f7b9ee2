"""Splits by hash and stratified, few-shot draws, and groups that leak between parts."""

from __future__ import annotations

import hashlib
import numbers
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np

from aatjax.errors import DataError, UsageError, check_kind

SplitMethod = Literal["hash", "stratified"]
"""How a part is split off: each clip by its name alone, or every class at the same fraction."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The usual names of the parts of a set, in lower case, and the part that each is."""


def stratify(
    labels: Sequence[tuple[int, ...]], groups: Sequence[str | None], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Divide clips in two so that every class is cut at the same fraction.

    A unit is all clips of one group, or one clip without a group; units are never cut. Classes are
    taken from the rarest to the most frequent and each unit goes to the side that lacks more clips
    of that class (the idea of iterative stratification: Sechidis et al., ECML 2011), the largest
    units first. A class held by a single unit stays in the first part; a class held by two or more
    is then brought to both parts where no other class loses its place by it.

    Args:
        labels: class indices of each clip; one in a single-label set, any number otherwise.
        groups: the recording or speaker of each clip, or None.
        fraction: share of the clips in the second part, between 0 and 1.
        seed: chooses among equally good units.

    Returns:
        The sorted clip indices of the first and of the second part.

    Raises:
        UsageError: the fraction is not between 0 and 1.
        DataError: no division leaves clips on both sides.
    """
    _check_fraction(fraction)
    units = _collect_units(groups)
    rng = np.random.default_rng(seed)
    contents = [Counter(c for i in unit for c in labels[i]) for unit in units]
    shuffled = rng.permutation(len(units)).tolist()
    holders: dict[int, list[int]] = defaultdict(list)
    for u in sorted(shuffled, key=lambda u: -len(units[u])):
        for c in contents[u]:
            holders[c].append(u)
    wanted = _round_shares(contents, holders, fraction, rng)
    holders = dict(sorted(holders.items(), key=lambda item: (len(item[1]), item[0])))
    second = _assign(contents, holders, wanted)
    _repair([len(unit) for unit in units], contents, holders, second)
    missing = fraction * len(labels) - sum(len(units[u]) for u in second if second[u])
    for u in shuffled:  # units whose clips have no class at all
        if u not in second:
            second[u] = missing > 0
            missing -= len(units[u]) if second[u] else 0
    return _collect_parts(units, second)


def split_by_hash(
    ids: Sequence[str],
    labels: Sequence[tuple[int, ...]],
    groups: Sequence[str | None],
    fraction: float,
    seed: int,
    part: str,
) -> tuple[list[int], list[int]]:
    """Divide clips in two by a hash of their names, so that added clips move no others.

    A unit (see `stratify`) goes to the second part where the SHA-256 of the seed, the part and the
    name of the group or clip, as a number from 0 to 1, is below the fraction: as Speech Commands
    assigns its speakers (Warden, arXiv 1804.03209). The share of each class is near the fraction,
    not equal to it.

    Only a class of which one part would hold no clip is corrected: if it has a single unit, that
    goes to the first part; else the unit nearest to the fraction changes sides, where no other
    class loses its place by it. Such a unit may change again when the class gets more clips.

    Args:
        ids: names of the clips.
        labels, groups, fraction: as for `stratify`.
        seed: chooses another division.
        part: name of the second part; divisions for other parts are independent.

    Returns:
        The sorted clip indices of the first and of the second part.

    Raises:
        UsageError: the fraction is not between 0 and 1.
        DataError: one side would be empty.
    """
    _check_fraction(fraction)
    units = _collect_units(groups)
    draws: list[float] = []
    contents: list[set[int]] = []
    holders: dict[int, list[int]] = defaultdict(list)
    for u, unit in enumerate(units):
        group = groups[unit[0]]
        kind, name = ("clip", ids[unit[0]]) if group is None else ("group", group)
        draws.append(draw_number(f"{seed}\0{part}\0{kind}", name))
        contents.append(
            {*labels[unit[0]]} if len(unit) == 1 else {c for i in unit for c in labels[i]}
        )
        for c in contents[u]:
            holders[c].append(u)
    second = {u: draw < fraction for u, draw in enumerate(draws)}
    for holding in holders.values():
        if len(holding) == 1:
            second[holding[0]] = False
    holders = dict(sorted(holders.items(), key=lambda item: (len(item[1]), item[0])))
    _repair([abs(draw - fraction) for draw in draws], contents, holders, second)
    return _collect_parts(units, second)


def draw_number(start: str, name: str) -> float:
    """Return a number from 0 to 1 that depends on two texts alone."""
    text = f"{start}\0{name if name.isascii() else unicodedata.normalize('NFC', name)}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _check_fraction(fraction: float) -> None:
    check_kind("split: fraction", fraction, numbers.Real, "give a number between 0 and 1")
    if not 0 < fraction < 1:
        raise UsageError(f"split fraction is {fraction:g}; it must be between 0 and 1")


def _collect_parts(
    units: Sequence[list[int]], second: Mapping[int, bool]
) -> tuple[list[int], list[int]]:
    """Return the sorted clips of both parts, neither of them empty."""
    parts = tuple(
        sorted(i for u, unit in enumerate(units) if second[u] is side for i in unit)
        for side in (False, True)
    )
    if not parts[0] or not parts[1]:
        raise DataError(
            f"cannot split {sum(map(len, units))} clips: every class comes from a single clip or "
            "group; add clips from other recordings, or give a separate test set"
        )
    return parts[0], parts[1]


def _collect_units(groups: Sequence[str | None]) -> list[list[int]]:
    units: dict[object, list[int]] = {}
    for i, group in enumerate(groups):
        units.setdefault(("clip", i) if group is None else ("group", group), []).append(i)
    return list(units.values())


def _round_shares(
    contents: list[Counter[int]],
    holders: dict[int, list[int]],
    fraction: float,
    rng: np.random.Generator,
) -> dict[int, int]:
    """Whole numbers of clips per class for the second part, by largest remainder."""
    totals = {c: sum(contents[u][c] for u in units) for c, units in holders.items()}
    exact = {c: round(fraction * n, 9) for c, n in totals.items()}
    wanted = {c: int(x) for c, x in exact.items()}
    left = round(sum(exact.values())) - sum(wanted.values())
    ordered = sorted(totals)
    classes = [ordered[k] for k in rng.permutation(len(totals))]
    for c in sorted(classes, key=lambda c: wanted[c] - exact[c])[:left]:
        wanted[c] += 1
    return {
        c: min(max(wanted[c], 1), n - 1) if len(holders[c]) > 1 else 0 for c, n in totals.items()
    }


def _assign(
    contents: list[Counter[int]], holders: dict[int, list[int]], wanted: dict[int, int]
) -> dict[int, bool]:
    """Whether each unit that has a class goes to the second part."""
    second: dict[int, bool] = {}
    for c, units in holders.items():
        need = wanted[c] - sum(contents[u][c] for u in units if second.get(u) is True)
        rest = sum(contents[u][c] for u in units if second.get(u) is not False) - wanted[c]
        for u in units:
            if u in second:
                continue
            second[u] = need > 0 and need >= rest
            if second[u]:
                need -= contents[u][c]
            else:
                rest -= contents[u][c]
    return second


def _repair(
    rank: Sequence[float],
    contents: Sequence[Collection[int]],
    holders: dict[int, list[int]],
    second: dict[int, bool],
) -> None:
    """Move units of low rank so that every class with two units or more is on both sides."""
    held = {side: Counter[int]() for side in (False, True)}
    for u, side in second.items():
        held[side].update(contents[u])
    for c, holding in holders.items():
        for side in (False, True):
            if held[side][c] or len(holding) < 2:
                continue
            for u in sorted(holding, key=lambda u: rank[u]):
                if all(held[not side][other] > 1 for other in contents[u]):
                    second[u] = side
                    held[side].update(contents[u])
                    held[not side].subtract(contents[u])
                    break


def draw_shots(
    labels: Sequence[tuple[int, ...]],
    groups: Sequence[str | None],
    classes: Sequence[str],
    shots: int,
    seed: int | None,
) -> list[int]:
    """Draw a few-shot training set: `shots` clips per class.

    Clips of recordings or speakers that were not drawn from yet are taken first, so that a class is
    covered by as many of them as there are. In a multi-label set the rarest classes are served
    first, and a clip counts for each of its classes.

    Args:
        labels: class indices of each clip.
        groups: the recording or speaker of each clip, or None.
        classes: class names, for the message.
        shots: clips per class.
        seed: which draw; None takes the first clips in their order, whatever their groups.

    Returns:
        Sorted clip indices.

    Raises:
        UsageError: fewer than one clip per class.
        DataError: a class has fewer clips.
    """
    if shots < 1:
        raise UsageError(f"shots is {shots}: give 1 clip per class or more")
    order = range(len(labels))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    holders: dict[int, list[int]] = {c: [] for c in range(len(classes))}
    for i in order:
        for c in labels[i]:
            holders[c].append(i)
    for c, clips in holders.items():
        if len(clips) < shots:
            raise DataError(
                f"class {classes[c]!r} has {len(clips)} training clips, {shots} are requested: "
                "take fewer shots"
            )
    chosen: set[int] = set()
    used: Counter[str] = Counter()
    for c in sorted(holders, key=lambda c: (len(holders[c]), c)):
        waiting = [i for i in holders[c] if i not in chosen]
        for _ in range(shots - (len(holders[c]) - len(waiting))):
            pick = waiting[0]
            if seed is not None:
                pick = min(waiting, key=lambda i: 0 if groups[i] is None else used[str(groups[i])])
            waiting.remove(pick)
            chosen.add(pick)
            used[str(groups[pick])] += 1
    return sorted(chosen)


def order_names(names: set[str]) -> tuple[str, ...]:
    """Sort names: whole numbers by value if all are, else as text."""
    if names and all(n.isascii() and n.isdigit() and len(n) < 19 for n in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def find_leaks(groups: Sequence[str | None], parts: Sequence[str | None]) -> dict[str, list[str]]:
    """Return the groups whose clips lie in more than one part, each with those parts."""
    seen: dict[str, set[str]] = defaultdict(set)
    for group, part in zip(groups, parts, strict=True):
        if group is not None and part is not None:
            seen[group].add(part)
    return {group: list(order_names(where)) for group, where in seen.items() if len(where) > 1}
