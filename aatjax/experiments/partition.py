"""Partitions: a data set opened and divided into training, validation and test clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aatjax.config import Data
from aatjax.data.benchmarks import BENCHMARKS, Benchmark, Division, Protocol, find_part
from aatjax.data.decode_cache import decode_all
from aatjax.data.formats import detect_benchmark, open_source
from aatjax.data.pipeline import keep_in_memory
from aatjax.data.source import Source
from aatjax.data.splits import find_leaks
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.data.synthetic.synthesize import TARGET_SOUNDS
from aatjax.data.tfds import is_prepared, read_facts
from aatjax.errors import DataError, UsageError, format_count
from aatjax.io.host import find_user_cache
from aatjax.train.logging import TextStream

SYNTHETIC_TEST = 1_000_000  # number of the first test clip of each class
MOST_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Partition:
    """A data set, divided.

    Attributes:
        train, valid, test: the parts.
        about: what reports state of them, as JSON: benchmark, completeness, protocol and run,
            leaks, few-shot draw.
        chosen_on_test: the paper whose protocol chooses weights by the test clips.
    """

    train: Source
    valid: Source | None = None
    test: Source | None = None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    chosen_on_test: str | None = None

    def sources(self) -> dict[str, Source]:
        """The parts that exist, by name."""
        every = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: source for name, source in every.items() if source is not None}


def find_audio_cache(data: Data) -> Path:
    """Return the folder of decoded audio."""
    return find_user_cache() / "audio" if data.cache is None else Path(data.cache)


def find_protocol(data: Data) -> tuple[Benchmark, Protocol] | None:
    """Return the benchmark of a config's data and its protocol; None for other data."""
    name = detect_benchmark(data.path, data.format)
    if name is None:
        return None
    return BENCHMARKS[name], BENCHMARKS[name].protocol(data.protocol or "honest")


def open_data(
    data: Data, *, quarantine: Path | None = None, show: TextStream | None = None
) -> Source:
    """Return the whole labelled set, decoded once; unreadable files are quarantined."""
    if data.path is None:
        raise UsageError("no data: name the folder of sounds by --data.path (data.path)")
    source = open_source(data.path, data.format, pattern=data.pattern)
    kept = decode_all(
        source,
        find_audio_cache(data),
        max_bad=int(data.max_bad) if data.max_bad >= 1 else float(data.max_bad),
        quarantine_file=quarantine,
        channels=data.channels,
        truncated=data.truncated,
    )
    if show is not None:
        bad = len(source) - len(kept)
        text = f"{source.name}: {len(kept)} clips, {len(source.classes)} classes"
        if source.skipped:
            text += f", {format_count(len(source.skipped), 'other file')} left out"
        if bad:
            text += f", {bad} quarantined" + (f" (see {quarantine})" if quarantine else "")
        print(text, file=show, flush=True)
    return kept


def make_partition(
    data: Data, *, quarantine: Path | None = None, show: TextStream | None = None
) -> Partition:
    """Divide a data set into the parts that a config asks for.

    Raises:
        UsageError: the settings do not fit the set.
        DataError: the set cannot be used, or recordings or speakers lie in two parts.
    """
    if data.format == "synthetic":
        parts = _split_synthetic(data)
    else:
        whole = open_data(data, quarantine=quarantine, show=show)
        found = find_protocol(data)
        if found is not None:
            parts = _split_benchmark(data, whole, *found)
        elif data.protocol is not None:
            raise UsageError(
                f"--protocol {data.protocol} (data.protocol) applies to benchmarks only: name one "
                f"by --data.format, of {', '.join(BENCHMARKS)}"
            )
        else:
            parts = _split(data, whole)
    parts = _select_shots(data, _check_leaks(data, parts))
    if show is not None:
        for line in describe_partition(parts):
            print(line, file=show, flush=True)
    return parts


def describe_partition(parts: Partition) -> list[str]:
    """Return what reports state of the data, a line each."""
    about, lines = parts.about, []
    if "benchmark" in about:
        subset = "" if about["whole"] else "SUBSET: "
        lines.append(f"{about['benchmark']}: {subset}{about['there']}")
        lines.append(f"protocol {about['protocol']} ({about['paper']}), run {about['run']}")
    if about.get("duplicates"):
        pairs = format_count(about["duplicates"], "pair")
        lines.append(f"{pairs} of duplicate clips in different parts")
    if about.get("of_no_part"):
        lines.append(
            f"{format_count(about['of_no_part'], 'clip')} in no part of the division: left out"
        )
    if about.get("leaks"):
        lines.append(f"LEAK: {about['leaks']}")
    if "shots" in about:
        lines.append(f"few-shot: {about['shots']} clips per class, draw {about['draw']}")
    if parts.chosen_on_test is not None:
        lines.append(
            f"NOTE: weights are chosen by the test clips, as in {parts.chosen_on_test}; such "
            "figures are too high"
        )
    return lines


def list_runs(data: Data) -> dict[str, Data]:
    """Return the runs that together give one figure: of the protocol, or one per fold.

    Raises:
        UsageError: the set has no folds.
    """
    if data.format == "synthetic":
        raise UsageError("the synthetic sounds have no folds: omit --cross-validate")
    source = open_data(data)
    found = find_protocol(data)
    if found is None:
        names = list(source.folds)
        if not names:
            raise UsageError(
                f"{source.name} has no folds: add a fold column, or omit --cross-validate"
            )
    else:
        benchmark, protocol = found
        names = [division.name for division in _list_possible(protocol, source)]
        if len(protocol.divisions) < 2 or not names:
            raise UsageError(
                f"{benchmark.title} has one official division of the clips that are present: omit "
                "--cross-validate"
            )
    return {name: dataclasses.replace(data, fold=name) for name in names}


def _split_synthetic(data: Data) -> Partition:
    train = keep_in_memory(Synthetic(TARGET_SOUNDS, data.train_clips, data.seed))
    test = Synthetic(TARGET_SOUNDS, data.test_clips, data.seed, first=SYNTHETIC_TEST)
    return _split_valid(data, Partition(train, None, keep_in_memory(test)))


def _split_valid(data: Data, parts: Partition) -> Partition:
    """Split validation clips off the training clips where there are none and some are wanted."""
    if parts.valid is not None or not data.valid_fraction:
        return parts
    train, valid = parts.train.split(data.valid_fraction, seed=data.seed)
    return dataclasses.replace(parts, train=train, valid=valid)


def _split(data: Data, whole: Source) -> Partition:
    """Divide by fold, by the official division, or at random."""
    splits = {clip.split for clip in whole.clips} - {None}
    valid: Source | None = None
    about: dict[str, Any] = {}
    if data.fold is not None:
        train, test = whole.fold(data.fold)
    elif splits - {"train"}:
        if "train" not in splits:
            raise DataError(
                f"{whole.name}: its official division holds only "
                f"{', '.join(sorted(map(str, splits)))} clips: add the training clips (split "
                "train), or remove the division"
            )
        train = whole.by_split("train")
        left = sum(clip.split is None for clip in whole.clips)
        if left:
            about["of_no_part"] = left
        valid = whole.by_split("valid") if "valid" in splits else None
        test = whole.by_split("test") if "test" in splits else None
    elif data.test_fraction:
        train, test = whole.split(data.test_fraction, seed=data.seed)
    else:
        train, test = whole, None
    return _split_valid(data, Partition(train, valid, test, about))


def _list_possible(protocol: Protocol, whole: Source) -> list[Division]:
    """The runs of a protocol of which training and test clips are present."""
    present = {find_part(clip) for clip in whole.clips}
    return [d for d in protocol.divisions if present & set(d.train) and present & set(d.test)]


def _split_benchmark(
    data: Data, whole: Source, benchmark: Benchmark, protocol: Protocol
) -> Partition:
    if protocol.labels == "as_published":
        whole = _label_as_published(whole)
    census = benchmark.census(whole)
    about: dict[str, Any] = {
        "benchmark": benchmark.title,
        "whole": census.whole,
        "there": census.text(),
        "protocol": protocol.name,
        "paper": protocol.paper,
    }
    folder = Path(data.path or "").expanduser()
    if is_prepared(folder):
        about["duplicates"] = len(read_facts(folder)["duplicates"])
    names = [division.name for division in protocol.divisions]
    if data.fold is not None and data.fold not in names:
        raise UsageError(
            f"{benchmark.title} has no run {data.fold!r} in protocol {protocol.name}: --data.fold "
            f"is one of {', '.join(names)}"
        )
    possible = [d for d in _list_possible(protocol, whole) if data.fold in (None, d.name)]
    if not possible and data.fold is not None:
        raise DataError(f"{whole.name}: no clips of run {data.fold!r}: {census.text()}")
    if not possible:
        train, test = whole.split(data.test_fraction or 0.2, seed=data.seed)
        about["run"] = "not official: the clips that are present were split"
        return Partition(train, None, test, about)
    division = possible[0]
    about["run"] = division.name
    if len(names) > 1:
        about["run"] += f", {names.index(division.name) + 1} of {len(names)}"

    def select(names: Sequence[str]) -> Source | None:
        clips = [clip for clip in whole.clips if str(find_part(clip)) in names]
        return whole.with_clips(clips) if clips else None

    train = select(division.train)
    assert train is not None
    paper = protocol.paper if protocol.chooses_on_test else None
    parts = Partition(train, select(division.valid), select(division.test), about, paper)
    return _split_valid(data, parts)


def _label_as_published(whole: Source) -> Source:
    """Label a partially annotated set as arXiv 2401.10544's code does: asked means present."""
    return whole.with_clips(
        clip
        if clip.observed is None
        else dataclasses.replace(clip, label=clip.observed, observed=None)
        for clip in whole.clips
    )


def _check_leaks(data: Data, parts: Partition) -> Partition:
    """Refuse or note recordings and speakers in several parts; equal parts count once."""
    where: dict[tuple[str, str | None], list[str]] = {}
    for name, source in parts.sources().items():
        for clip in source.clips:
            where.setdefault((clip.id, clip.group), []).append(name)
    groups = [group for _, group in where]
    leaks = find_leaks(groups, [names[0] for names in where.values()])
    twice = [id for (id, _), names in where.items() if "train" in names and len(names) > 1]
    if twice and data.format != "synthetic":
        leaks |= {f"clip {id}": ["train", "valid or test"] for id in twice}
    if not leaks:
        return parts
    shown = "; ".join(f"{g!r} in {' and '.join(n)}" for g, n in list(leaks.items())[:MOST_SHOWN])
    text = f"recordings or speakers in more than one part ({len(leaks)}): {shown}"
    if data.leaks == "refuse":
        raise DataError(
            f"{parts.train.name}: {text}; put each in one part, or add --data.leaks report to train"
            " anyway; every report then notes it"
        )
    return dataclasses.replace(parts, about={**parts.about, "leaks": text})


def _select_shots(data: Data, parts: Partition) -> Partition:
    if data.shots is None:
        return parts
    found = find_protocol(data)
    seed = None if found is not None and found[1].few_shot == "first" else data.draw
    train = parts.train.shots(data.shots, seed)
    about = {"shots": data.shots, "draw": "the first in file order" if seed is None else seed}
    return dataclasses.replace(parts, train=train, about={**parts.about, **about})
