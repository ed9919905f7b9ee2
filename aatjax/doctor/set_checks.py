"""Findings of a whole set: rows, classes, parts, leaks and copies."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from aatjax.audio.fbank import count_frames
from aatjax.data.duplicates import Duplicate, find_duplicates
from aatjax.data.source import Clip, Source
from aatjax.data.splits import order_names
from aatjax.doctor.clip_checks import is_usable
from aatjax.doctor.findings import ClipMeasurements, Finding, Item

ROW = re.compile(r"(^|: )row \d+$")
"""A row of a manifest among what was skipped, such as `test: row 3`."""
EXPECTED = {
    "hidden",
    "system folder",
    "not an audio extension",
    "not recognised as audio",
    "background noise",
    "link to a folder",
}
"""Reasons for skipping an entry that is not meant to be a clip."""
LEVEL_GAP = 12.0  # dB between a speaker or part and the others
LEVEL_CLIPS = 10  # clips of a speaker or part from which its level is judged
FEW = 5
IMBALANCE = 10
PADDING = 0.5
CUT = 0.1


def describe_part(clip: Clip) -> str | None:
    """The part of a clip: its split, its fold, both, or None."""
    fold = None if clip.fold is None else f"fold {clip.fold}"
    return ", ".join(part for part in (clip.split, fold) if part) or None


def find_set_problems(
    source: Source, measurements: Sequence[ClipMeasurements], frames: int
) -> list[Finding]:
    """Find the problems of the set, except copies."""
    cases = {
        **_check_skipped(source),
        **_check_balance(source),
        **_check_division(source),
        **_check_lengths(measurements, frames),
        "level": [Item(name, detail) for name, detail, _ in list_level_gaps(source, measurements)],
    }
    return [Finding(kind, tuple(items)) for kind, items in cases.items() if items]


def _check_skipped(source: Source) -> dict[str, list[Item]]:
    cases: dict[str, list[Item]] = {"row": [], "skipped": [], "other-files": []}
    for what, why in source.skipped:
        kind = "row" if ROW.search(what) else "other-files" if why in EXPECTED else "skipped"
        cases[kind].append(Item(what, why))
    return cases


def _check_balance(source: Source) -> dict[str, list[Item]]:
    counts = Counter(c for clip in source.clips for c in clip.label)
    most = max(counts.values(), default=0)
    few, rare, absent = [], [], []
    for c, name in enumerate(source.classes):
        text = _count_clips(counts[c])
        if counts[c] < FEW:
            few.append(Item(name, text))
        elif counts[c] * IMBALANCE < most:
            rare.append(Item(name, f"{text}, the largest class has {most}"))
    for by in ("split", "fold"):
        held: dict[str, set[int]] = {}
        for clip in source.clips:
            name = getattr(clip, by)
            if name is not None:
                held.setdefault(name, set()).update(clip.label)
        for part in order_names(set(held)) if len(held) > 1 else ():
            absent += [
                Item(source.classes[c], f"no clip in {by} {part}")
                for c in sorted(counts.keys() - held[part])
            ]
    one = len(counts) == 1 and not source.multi_label
    single = [Item(source.classes[c], _count_clips(n)) for c, n in counts.items() if one]
    return {"few-clips": few, "imbalance": rare, "absent-class": absent, "one-class": single}


def _check_division(source: Source) -> dict[str, list[Item]]:
    without = [clip.id for clip in source.clips if clip.fold is None]
    partial = len(without) < len(source)
    leaks = []
    for by in ("split", "fold"):
        for group, names in source.leaks(by).items():
            clips = tuple(clip.id for clip in source.clips if clip.group == group)
            text = f"{len(clips)} clips in {by}s {', '.join(names)}"
            leaks.append(Item(group, text, clips))
    return {
        "no-fold": [Item(id, "", (id,)) for id in without if partial],
        "source-in-parts": leaks,
    }


def _check_lengths(measurements: Sequence[ClipMeasurements], frames: int) -> dict[str, list[Item]]:
    readable = [m for m in measurements if m.seconds is not None]
    if not readable:
        return {}
    cases: dict[str, list[Item]] = {}
    padding = float(np.mean([m.padding for m in readable if m.padding is not None]))
    lengths = [max(1, count_frames(round(16000 * (m.seconds or 0.0)))) for m in readable]
    if padding > PADDING:
        enough = int(np.percentile(lengths, 95))
        text = f"{100 * padding:.0f} % of {frames} frames; 95 % of the clips fit into {enough}"
        cases["padding"] = [Item("", text)]
    beyond = sum(m.beyond or 0.0 for m in readable)
    total = sum(m.seconds or 0.0 for m in readable)
    if beyond > CUT * total:
        text = f"{beyond:.0f} of {total:.0f} s; the input has {frames} frames of 10 ms"
        cases["cut"] = [Item("", text)]
    rates = Counter(m.rate for m in readable if m.rate is not None)
    if len(rates) > 1:
        cases["rates"] = [Item(f"{rate} Hz", _count_clips(n)) for rate, n in rates.most_common()]
    return cases


def list_level_gaps(
    source: Source, measurements: Sequence[ClipMeasurements]
) -> list[tuple[str, str, float]]:
    """List the groups and parts that differ in level from all other clips.

    The level of several clips is the median of their root mean squares.

    Returns:
        Name, levels in words, and the difference in dB, the largest first.
    """
    levels = [m.level if is_usable(m) else None for m in measurements]
    gaps = []
    for noun, names in (
        ("group", [clip.group for clip in source.clips]),
        ("part", [describe_part(clip) for clip in source.clips]),
    ):
        for name in sorted({name for name in names if name is not None}):
            pairs = [(n == name, v) for n, v in zip(names, levels, strict=True) if v is not None]
            own, rest = ([v for mine, v in pairs if mine is side] for side in (True, False))
            if min(len(own), len(rest)) < LEVEL_CLIPS:
                continue
            level, others = float(np.median(own)), float(np.median(rest))
            if abs(level - others) >= LEVEL_GAP:
                text = f"{level:.0f} dB of full scale, the others {others:.0f} dB"
                gaps.append((f"{noun} {name}", text, level - others))
    return sorted(gaps, key=lambda gap: -abs(gap[2]))


def find_copies(
    source: Source, hashes: Sequence[bytes | None], exact: Sequence[str]
) -> tuple[list[Finding], list[tuple[int, int]]]:
    """Find pairs of identical and nearly identical clips; also return them as pairs of indices."""
    ids = [clip.id for clip in source.clips]
    parts = [describe_part(clip) for clip in source.clips]
    at = {id: i for i, id in enumerate(ids)}
    # Each clip as its own part gives the pairs within parts; those across parts are searched
    # separately, since of many equal clips only some pairs are listed.
    found: dict[tuple[int, int], Duplicate] = {}
    across = find_duplicates(ids, parts, hashes, exact) if len(set(parts)) > 1 else []
    for pair in [*across, *find_duplicates(ids, ids, hashes, exact)]:
        found.setdefault((at[pair.first], at[pair.second]), pair)
    cases: dict[str, list[Item]] = {}
    for (i, j), pair in sorted(found.items(), key=lambda entry: (entry[1].distance, entry[0])):
        apart = None not in (parts[i], parts[j]) and parts[i] != parts[j]
        kind = ("" if pair.exact else "near-") + "duplicate" + ("-across" if apart else "")
        detail = f"{parts[i]} and {parts[j]}" if apart else ""
        if not pair.exact:
            detail += f"{'; ' * bool(detail)}{100 * pair.distance:.0f} % of the bits differ"
        subject, both = f"{ids[i]} = {ids[j]}", (ids[i], ids[j])
        cases.setdefault(kind, []).append(Item(subject, detail, both))
        if set(source.clips[i].label) != set(source.clips[j].label):
            named = [
                "|".join(source.classes[c] for c in source.clips[k].label) or "no class"
                for k in (i, j)
            ]
            cases.setdefault("label-conflict", []).append(
                Item(subject, f"{named[0]} and {named[1]}", both)
            )
    return [Finding(kind, tuple(items)) for kind, items in cases.items()], list(found)


def _count_clips(count: int) -> str:
    return f"{count} clip{'s' * (count != 1)}"
