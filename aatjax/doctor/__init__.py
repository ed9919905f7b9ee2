"""Checks of a data set before training: files, labels, leaks, copies.

Every file is decoded once as in training, and once more, up to a minute, at its own rate. Each
finding has a severity. `error`: training stops, omits the clip, or a metric measured on the set is
too high (leaks). `warning`: training uses it unchanged, and the model is probably worse for it.
`note`: for information. `KINDS` lists them all.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

from aatjax.data.duplicates import hash_audio, hash_samples
from aatjax.data.formats import SourceFormat, open_source
from aatjax.data.manifest import Manifest
from aatjax.data.source import Progress, Source
from aatjax.data.splits import order_names
from aatjax.doctor.clip_checks import find_clip_problems, is_usable, measure_clip
from aatjax.doctor.findings import (
    KINDS,
    ClipMeasurements,
    Diagnosis,
    Finding,
    Item,
    LabelCheck,
    Severity,
)
from aatjax.doctor.label_checks import ClipEmbedder, explain_skip, find_wrong_labels
from aatjax.doctor.set_checks import describe_part, find_copies, find_set_problems
from aatjax.errors import DataError, UsageError
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
]


def diagnose(
    source: Source | str | Path,
    *,
    format: str = "auto",
    pattern: str | None = None,
    frames: int | None = None,
    labels: bool = True,
    base: str = "embedded",
    workers: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> Diagnosis:
    """Check every clip of a set and the set as a whole.

    Wrong rows of a manifest become findings. Per clip only measurements and embeddings are kept.

    Args:
        source: the clips, or anything `aatjax.data.formats.open_source` opens.
        format, pattern: as in `open_source`.
        frames: input length of the model in 10 ms frames; None takes that of `base`.
        labels: whether to search for wrong labels.
        base: weights of the embeddings for that, anything `aatjax.load` takes.
        workers: decoding threads; by default one per core.
        progress: called with the stage, and the number of clips done and in total.

    Raises:
        DataError: no usable data found, or `base` cannot be read.
        UsageError: an argument is out of range.
    """
    for name, value in (("frames", frames), ("workers", workers)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; give 1 or more")
    whole = source if isinstance(source, Source) else _open(source, format, pattern)
    why = explain_skip(whole) if labels else "not requested"
    embedder = None if why else ClipEmbedder(base, frames)
    size = embedder.frontend.frames if embedder else frames or _read_frames(base)
    measurements, hashes, digests = [], [], []
    visits = _visit_clips(whole, size, embedder, workers or os.cpu_count() or 2)
    for done, (measured, sound_hash, digest) in enumerate(visits, 1):
        measurements.append(measured)
        hashes.append(sound_hash)
        digests.append(digest)
        progress("measure", done, len(whole))
    progress("compare", 0, 0)
    copies, same = find_copies(whole, hashes, digests)
    check, wrong = LabelCheck(why=why), list[Finding]()
    if embedder:
        check, wrong = find_wrong_labels(whole, embedder.finish(), same, base)
    found = find_clip_problems(measurements) + find_set_problems(whole, measurements, size)
    found = sorted([*found, *copies, *wrong], key=lambda one: list(KINDS).index(one.kind))
    sizes = Counter(c for clip in whole.clips for c in clip.label)
    return Diagnosis(
        name=whole.name,
        frames=size,
        classes={name: sizes[c] for c, name in enumerate(whole.classes)},
        parts=_count_parts(whole),
        measurements=tuple(measurements),
        findings=tuple(found),
        labels=check,
    )


def _count_parts(source: Source) -> dict[str, int]:
    sizes = Counter(part for clip in source.clips if (part := describe_part(clip)) is not None)
    return {part: sizes[part] for part in order_names(set(sizes))}


def _visit_clips(
    source: Source, frames: int, embedder: ClipEmbedder | None, threads: int
) -> Iterator[tuple[ClipMeasurements, bytes | None, str]]:
    """Measure, hash and embed each clip, a few clips ahead in a pool of threads."""

    def visit(i: int) -> tuple[ClipMeasurements, bytes | None, str, list[Any]]:
        measured, samples = measure_clip(source, i, frames)
        if samples is None:
            return measured, None, "", []
        windows = embedder.cut_windows(samples) if embedder and is_usable(measured) else []
        return measured, hash_audio(samples), hash_samples(samples), windows

    visits = map_threads(visit, len(source), workers=threads)
    for i, (measured, sound_hash, digest, windows) in enumerate(visits):
        if embedder:
            embedder.add(i, windows)
        yield measured, sound_hash, digest


def _open(path: str | Path, format: str, pattern: str | None) -> Source:
    """Open a set; of a manifest with wrong rows, the others."""
    if format not in get_args(SourceFormat):
        known = ", ".join(get_args(SourceFormat))
        raise UsageError(f"unknown data format {format!r}: one of {known}")
    try:
        return open_source(path, cast(SourceFormat, format), pattern=pattern)
    except DataError as error:
        if format not in ("auto", "manifest") or not Path(path).expanduser().is_file():
            raise
        try:
            return Manifest(path, strict=False)
        except DataError:
            raise error from None


def _read_frames(base: str) -> int:
    """Input length of weights, without building the model."""
    from aatjax.convert import read_checkpoint
    from aatjax.convert.load import locate_weights
    from aatjax.models.config import ASTConfig

    if base.startswith("random:"):
        return ASTConfig().frames
    return read_checkpoint(locate_weights(base)).config.frames
