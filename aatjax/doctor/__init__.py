"""Checks of a data set before training: files, labels, leaks, copies, levels.

Every file is decoded once as in training, and once more, up to a minute, at its own rate; if labels
are checked, once more for that. Each finding has a severity. `error`: training refuses the set.
`warning`: training omits the clip or uses it unchanged, and the model is probably worse for it, or
a metric measured on the set too high. `note`: for information. `KINDS` lists them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import cast, get_args

from aatjax.data.duplicates import hash_audio, hash_samples
from aatjax.data.formats import SourceFormat, open_source
from aatjax.data.groups import describe_groups
from aatjax.data.source import Progress, Source
from aatjax.data.splits import order_names
from aatjax.data.trainable import check_trainable
from aatjax.doctor.clip_checks import find_clip_problems, fit_measurements, measure_clip
from aatjax.doctor.findings import (
    KINDS,
    ClipMeasurements,
    Diagnosis,
    Finding,
    Item,
    LabelCheck,
    Severity,
)
from aatjax.doctor.label_checks import (
    ClipEmbedder,
    embed_clips,
    explain_skip,
    find_wrong_labels,
)
from aatjax.doctor.set_checks import describe_part, find_copies, find_set_problems
from aatjax.errors import DataError, UsageError
from aatjax.io.host import count_cores
from aatjax.io.threads import map_threads

__all__ = [
    "KINDS",
    "ClipMeasurements",
    "Diagnosis",
    "Finding",
    "Item",
    "LabelCheck",
    "Severity",
    "diagnose",
    "open_with_faults",
]


def diagnose(
    source: Source | str | Path,
    *,
    format: str = "auto",
    pattern: str | None = None,
    frames: int | Callable[[Sequence[float]], int] | None = None,
    labels: bool = True,
    base: str = "embedded",
    workers: int | None = None,
    progress: Progress = lambda stage, done, total: None,
    check: Callable[[Sequence[ClipMeasurements]], object] | None = None,
) -> Diagnosis:
    """Check every clip of a set and the set as a whole.

    Wrong rows of a manifest become findings. Per clip only measurements and embeddings are kept.

    Args:
        source: the clips, or anything `aatjax.data.formats.open_source` opens.
        format, pattern: as in `open_source`.
        frames: input length of the model in 10 ms frames, or a function that chooses it from the
            lengths of the clips in seconds; None takes that of `base`.
        labels: whether to search for wrong labels.
        base: weights of the embeddings for that, anything `aatjax.load` takes.
        workers: decoding threads; by default one per core.
        progress: called with the stage, and the number of clips done and in total.
        check: called with the measurements; a DataError that it raises becomes the finding
            `refused`. By default `aatjax.data.trainable.check_trainable` of the set.

    Raises:
        DataError: no usable data found, or `base` cannot be read.
        UsageError: an argument is out of range.
    """
    for name, value in (("frames", frames), ("workers", workers)):
        if isinstance(value, int) and value < 1:
            raise UsageError(f"{name} is {value}; give 1 or more")
    wrong_rows: DataError | None = None
    if isinstance(source, Source):
        whole = source
    else:
        whole, wrong_rows = open_with_faults(partial(_open, source, format, pattern))
    threads = workers or count_cores()
    visited = list(_measure_clips(whole, threads, progress))
    measurements, hashes, digests = zip(*visited, strict=True) if visited else ((), (), ())
    size = _choose_frames(frames, base, measurements)
    measurements = tuple(fit_measurements(m, size) for m in measurements)
    progress("compare", 0, 0)
    copies, same = find_copies(whole, hashes, digests)
    why = explain_skip(whole) if labels else "not requested"
    checked, wrong = LabelCheck(why=why), list[Finding]()
    if not why:
        vectors = embed_clips(whole, measurements, ClipEmbedder(base, size), threads, progress)
        checked, wrong = find_wrong_labels(whole, vectors, same, base)
    found = find_clip_problems(measurements) + find_set_problems(whole, measurements, size)
    found += _find_refusal(whole, measurements, wrong_rows, check)
    found = sorted([*found, *copies, *wrong], key=lambda one: list(KINDS).index(one.kind))
    sizes = Counter(c for clip in whole.clips for c in clip.label)
    return Diagnosis(
        name=whole.name,
        frames=size,
        classes={name: sizes[c] for c, name in enumerate(whole.classes)},
        parts=_count_parts(whole),
        measurements=measurements,
        findings=tuple(found),
        labels=checked,
        groups=describe_groups(whole),
    )


def open_with_faults(open: Callable[[bool], Source]) -> tuple[Source, DataError | None]:
    """Open a set; of a manifest with wrong rows the others, and the error that it is refused with.

    Args:
        open: opens the set, strictly or without its wrong rows.

    Raises:
        DataError: nothing of it can be used.
    """
    try:
        return open(True), None
    except DataError as error:
        try:
            return open(False), error
        except DataError:
            raise error from None


def _find_refusal(
    source: Source,
    measurements: Sequence[ClipMeasurements],
    wrong_rows: DataError | None,
    check: Callable[[Sequence[ClipMeasurements]], object] | None,
) -> list[Finding]:
    """The sentence with which training refuses the set, if it does."""
    try:
        if wrong_rows is not None:
            raise wrong_rows
        if check is None:
            check_trainable(source)
        else:
            check(measurements)
    except DataError as error:
        return [Finding("refused", (Item("", str(error)),))]
    return []


def _choose_frames(
    frames: int | Callable[[Sequence[float]], int] | None,
    base: str,
    measurements: Sequence[ClipMeasurements],
) -> int:
    if callable(frames):
        return frames([m.seconds for m in measurements if m.seconds is not None])
    return frames or _read_frames(base)


def _count_parts(source: Source) -> dict[str, int]:
    sizes = Counter(part for clip in source.clips if (part := describe_part(clip)) is not None)
    return {part: sizes[part] for part in order_names(set(sizes))}


def _measure_clips(
    source: Source, threads: int, progress: Progress
) -> Iterator[tuple[ClipMeasurements, bytes | None, str]]:
    """Measure and hash each clip, a few clips ahead in a pool of threads."""

    def visit(i: int) -> tuple[ClipMeasurements, bytes | None, str]:
        measured, samples = measure_clip(source, i)
        if samples is None:
            return measured, None, ""
        return measured, hash_audio(samples), hash_samples(samples)

    for done, visited in enumerate(map_threads(visit, len(source), workers=threads), 1):
        yield visited
        progress("measure", done, len(source))


def _open(path: str | Path, format: str, pattern: str | None, strict: bool) -> Source:
    if format not in get_args(SourceFormat):
        known = ", ".join(get_args(SourceFormat))
        raise UsageError(f"unknown data format {format!r}: one of {known}")
    return open_source(path, cast(SourceFormat, format), pattern=pattern, strict=strict)


def _read_frames(base: str) -> int:
    """Input length of weights, without building the model."""
    from aatjax.convert import read_checkpoint
    from aatjax.convert.load import locate_weights
    from aatjax.models.config import ASTConfig

    if base.startswith("random:"):
        return ASTConfig().frames
    return read_checkpoint(locate_weights(base)).config.frames
