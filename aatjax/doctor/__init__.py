"""The doctor: looks at a set of labelled sounds before anybody trains on it.

Every file is read once as training reads it, and once more, up to a minute, at its own rate. What
is found has a severity. `error`: training stops, leaves the clip out, or a figure measured on the
set is too high (leaks). `warning`: it is trained on as it is, probably to no good. `note`: good to
know. `KINDS` lists them all.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast, get_args

from aatjax.data.duplicates import hash_audio, hash_samples
from aatjax.data.formats import SourceFormat, open_source
from aatjax.data.manifest import Manifest
from aatjax.data.source import Progress, Source
from aatjax.data.splits import order_names
from aatjax.doctor.clip_checks import file_findings, measure, sounds_itself
from aatjax.doctor.findings import (
    KINDS,
    SEVERITIES,
    Diagnosis,
    Finding,
    Item,
    LabelCheck,
    Measures,
    Severity,
)
from aatjax.doctor.label_checks import Ear, find_wrong_labels, unfit
from aatjax.doctor.set_checks import copy_findings, part_of, set_findings
from aatjax.errors import DataError, UsageError

__all__ = [
    "KINDS",
    "Diagnosis",
    "Finding",
    "Item",
    "LabelCheck",
    "Measures",
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
    progress: Progress | None = None,
) -> Diagnosis:
    """Looks at every clip of a set and at the set as a whole.

    Wrong rows of a manifest become findings. Memory does not grow with the number of clips, but
    for their measures and embeddings.

    Args:
        source: the clips, or what `aatjax.data.formats.open_source` opens.
        format: as in `open_source`.
        pattern: as in `open_source`.
        frames: input length of the model in 10 ms frames; None takes that of `base`.
        labels: whether to look for labels that look wrong.
        base: weights for the embeddings, anything `aatjax.load` takes.
        workers: decoding threads; by default one a core.
        progress: called with the stage, what is done and what there is.

    Raises:
        DataError: nothing usable lies there, or `base` cannot be read.
        UsageError: an argument that cannot be.
    """
    if frames is not None and frames < 1:
        raise UsageError(f"frames is {frames}; give 1 or more")
    if workers is not None and workers < 1:
        raise UsageError(f"workers is {workers}; at least one is needed")
    tell = progress or (lambda stage, done, total: None)
    whole = source if isinstance(source, Source) else _open(source, format, pattern)
    why = unfit(whole) if labels else "not asked for"
    ear = None if why else Ear(base, frames)
    size = ear.frontend.frames if ear else frames or _frames_of(base)

    def visit(i: int) -> tuple[Measures, bytes | None, str, Any]:
        measures, samples = measure(whole, i, size)
        if samples is None:
            return measures, None, "", None
        windows = ear.cut(samples) if ear and sounds_itself(measures) else None
        return measures, hash_audio(samples), hash_samples(samples), windows

    count = len(whole)
    threads = workers or os.cpu_count() or 2
    seen: list[Measures] = []
    hashes: list[bytes | None] = []
    exact: list[str] = []
    pool = ThreadPoolExecutor(threads, "doctor")
    try:
        waiting: deque[Future[tuple[Measures, bytes | None, str, Any]]] = deque()
        for i in range(count + 4 * threads):  # few are on their way at a time
            if i < count:
                waiting.append(pool.submit(visit, i))
            if i < 4 * threads or not waiting:
                continue
            measures, sound, digest, windows = waiting.popleft().result()
            if ear and windows is not None:
                ear.hear(len(seen), windows)
            seen.append(measures)
            hashes.append(sound)
            exact.append(digest)
            tell("listen", len(seen), count)
    finally:
        pool.shutdown(cancel_futures=True)

    tell("compare", 0, 0)
    copies, same = copy_findings(whole, hashes, exact)
    check, wrong = LabelCheck(why=why), list[Finding]()
    if ear:
        check, wrong = find_wrong_labels(whole, ear.vectors(), same, base)
    every = [*file_findings(tuple(seen)), *set_findings(whole, seen, size), *copies, *wrong]
    order = list(KINDS)
    sizes = Counter(c for clip in whole.clips for c in clip.label)
    parts = Counter(part for clip in whole.clips if (part := part_of(clip)) is not None)
    return Diagnosis(
        name=whole.name,
        frames=size,
        classes={name: sizes[c] for c, name in enumerate(whole.classes)},
        parts={part: parts[part] for part in order_names(set(parts))},
        measures=tuple(seen),
        findings=tuple(
            sorted(every, key=lambda f: (SEVERITIES.index(f.severity), order.index(f.kind)))
        ),
        labels=check,
    )


def _open(path: str | Path, format: str, pattern: str | None) -> Source:
    """Opens a set; of a manifest with wrong rows, those that are right."""
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


def _frames_of(base: str) -> int:
    """Input length of weights, read without making a model of them."""
    from aatjax.convert import read_checkpoint
    from aatjax.convert.load import find
    from aatjax.models.config import ASTConfig

    if base.startswith("random:"):
        return ASTConfig().frames
    return read_checkpoint(find(base)).config.frames
