"""Whether a set of labelled sounds can be trained on: one check for training and the doctor."""

from __future__ import annotations

from collections import Counter

from aatjax.data.source import Source
from aatjax.data.splits import find_leaks
from aatjax.errors import DataError

MOST_SHOWN = 5


def check_trainable(source: Source, *, leaks: bool = True) -> None:
    """Refuse a set whose classes or official division cannot be used.

    Args:
        source: the whole set.
        leaks: whether to refuse recordings and speakers in more than one fold or part.

    Raises:
        DataError: one class; an official division without training clips; clips without a fold
            where others have one; or, with `leaks`, a group in two folds or parts.
    """
    splits = {clip.split for clip in source.clips} - {None}
    if splits and "train" not in splits:
        raise DataError(
            f"{source.name}: its official division holds only {', '.join(sorted(map(str, splits)))}"
            " clips: add the training clips (split train), or remove the division"
        )
    check_classes(source.by_split("train") if splits else source)
    if leaks or any(clip.fold is None for clip in source.clips):
        _ = source.folds
    if leaks:
        groups = [clip.group for clip in source.clips]
        refuse_leaks(source.name, find_leaks(groups, [clip.split for clip in source.clips]))


def check_classes(train: Source) -> None:
    """Refuse training clips of a single class.

    Raises:
        DataError: all clips of a single-label set are of one class.
    """
    counts = Counter(c for clip in train.clips for c in clip.label)
    if train.multi_label or len(counts) > 1:
        return
    name = train.classes[next(iter(counts))]
    raise DataError(
        f"{train.name}: every training clip ({len(train):,}) is of class {name!r}: a classifier "
        "needs two classes or more; check that the labels are those of the clips, or that the "
        "folder given is the one that holds a folder for each class"
    )


def describe_leaks(leaks: dict[str, list[str]]) -> str:
    """Return the recordings or speakers in several parts, in words."""
    shown = "; ".join(f"{g!r} in {' and '.join(n)}" for g, n in list(leaks.items())[:MOST_SHOWN])
    return f"recordings or speakers in more than one part ({len(leaks)}): {shown}"


def refuse_leaks(name: str, leaks: dict[str, list[str]]) -> None:
    """Refuse recordings and speakers in several parts.

    Raises:
        DataError: there are some.
    """
    if leaks:
        raise DataError(
            f"{name}: {describe_leaks(leaks)}; put each in one part, or add --data.leaks report to "
            "train anyway; every report then notes it"
        )
