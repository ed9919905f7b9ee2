"""Groups: the speaker or recording of a clip, read from the name of its file."""

from __future__ import annotations

import dataclasses
import re

from aatjax.data.source import Source
from aatjax.errors import DataError, UsageError, format_count

SPEAKERS = (re.compile(r"(.+?)_nohash_"), re.compile(r"(\d{8})_NO_\d+\b"))
"""File names that begin with a speaker: of Speech Commands (Warden, arXiv 1804.03209) and of Arabic
Speech Commands (Ghandoura, Hjabo, Al Dakkak, 2021)."""
MOST_SHOWN = 3


def parse_speaker(id: str) -> str | None:
    """Return the speaker that a file name of a known form begins with, or None."""
    name = id.rpartition("/")[2]
    if "_" not in name:
        return None
    return next((found[1] for form in SPEAKERS if (found := form.match(name))), None)


def describe_groups(source: Source) -> str:
    """Return the number of groups, `24 recordings or speakers`; empty where none is known."""
    count = len({clip.group for clip in source.clips} - {None})
    return "" if not count else format_count(count, "recording") + f" or speaker{'s' * (count > 1)}"


def assign_groups(source: Source, pattern: str) -> Source:
    r"""Return the set with the group of each clip taken from its file name.

    Args:
        source: the clips.
        pattern: regular expression, searched in the file name, or in the clip's id (the path)
            where the pattern holds a slash. What its first pair of parentheses matches is the
            group: `(\d{8})_NO` reads `00000030` from `00000030_NO_01.wav`.

    Raises:
        UsageError: the pattern is not a regular expression, or has no pair of parentheses.
        DataError: it matches no file name, or not all of them.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--data.group {pattern!r} is no regular expression: {error}") from None
    if not regex.groups:
        raise UsageError(
            f"--data.group {pattern!r} marks no group: put the part of the file name that is the "
            rf"speaker or recording in parentheses, as in '(\d+)_.*'"
        )
    texts = [c.id if "/" in pattern else c.id.rpartition("/")[2] for c in source.clips]
    found = [regex.search(text) for text in texts]
    groups = [match[1] if match else None for match in found]
    odd = [text for text, group in zip(texts, groups, strict=True) if not group]
    if odd:
        shown = ", ".join(map(repr, odd[:MOST_SHOWN]))
        count = "none" if len(odd) == len(texts) else f"{len(texts) - len(odd):,}"
        raise DataError(
            f"{source.name}: --data.group {pattern!r} finds a group in {count} of "
            f"{format_count(len(texts), 'file name')}; it does not fit {shown}"
        )
    return source.with_clips(
        dataclasses.replace(clip, group=group)
        for clip, group in zip(source.clips, groups, strict=True)
    )
