"""Opening a data set and dividing it, as a config or a paper's protocol says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aatjax.config import Data
from aatjax.data.benchmarks import BENCHMARKS, Benchmark, Division, Protocol, find_part
from aatjax.data.decode_cache import decode_all, find_user_cache
from aatjax.data.formats import detect_benchmark, open_source
from aatjax.data.pipeline import keep_in_memory
from aatjax.data.source import Source
from aatjax.data.splits import find_leaks
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.data.synthetic.synthesize import TARGET_SOUNDS
from aatjax.data.tfds import is_prepared, read_facts
from aatjax.errors import DataError, UsageError
from aatjax.train.logging import TextStream

SYNTHETIC_TEST = 1_000_000  # number of the first test clip of each class
MOST_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Parts:
    """A data set, divided.

    Attributes:
        train, valid, test: the parts.
        about: what a report must tell of them, as JSON: the benchmark and how much of it is there,
            the protocol and its run, leaks, few-shot draw. Empty where there is nothing to tell.
        chosen_on_test: the paper whose protocol chooses weights by the clips that are reported.
        clips: how many clips the whole set has.
    """

    train: Source
    valid: Source | None
    test: Source | None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    chosen_on_test: str | None = None

    def sources(self) -> dict[str, Source]:
        """The parts that are there, by name."""
        every = {"train": self.train, "valid": self.valid, "test": self.test}
        return {name: source for name, source in every.items() if source is not None}


def cache_folder(data: Data) -> Path:
    """Where decoded audio is kept."""
    if data.cache is not None:
        return Path(data.cache)
    return find_user_cache() / "audio"


def open_data(
    data: Data, *, quarantine: Path | None = None, show: TextStream | None = None
) -> Source:
    """The whole labelled set, decoded once; unreadable files are quarantined."""
    if data.path is None:
        raise UsageError(
            "no data: give data.path (on the command line --data.path), the folder of sounds"
        )
    source = open_source(data.path, data.format, pattern=data.pattern)
    max_bad = int(data.max_bad) if data.max_bad >= 1 else float(data.max_bad)
    kept = decode_all(
        source,
        cache_folder(data),
        max_bad=max_bad,
        quarantine_file=quarantine,
        channels=data.channels,
        truncated=data.truncated,
    )
    if show is not None:
        bad = len(source) - len(kept)
        text = f"{source.name}: {len(kept)} clips, {len(source.classes)} classes"
        if source.skipped:
            text += f", {len(source.skipped)} other files left out"
        if bad:
            text += f", {bad} quarantined" + (f" (see {quarantine})" if quarantine else "")
        print(text, file=show, flush=True)
    return kept


def divide(data: Data, *, quarantine: Path | None = None, show: TextStream | None = None) -> Parts:
    """The training, validation and test parts that a config asks for.

    Raises:
        UsageError: what is asked for does not go with the set.
        DataError: the set cannot be used, or recordings or speakers lie in two parts.
    """
    if data.format == "synthetic":
        parts = _synthetic(data)
    else:
        whole = open_data(data, quarantine=quarantine, show=show)
        name = detect_benchmark(data.path, data.format)
        if name is not None:
            parts = _by_protocol(data, whole, BENCHMARKS[name])
        elif data.protocol is not None:
            raise UsageError(
                f"data.protocol={data.protocol!r} goes with a benchmark only: name it by "
                f"data.format, one of {', '.join(BENCHMARKS)}"
            )
        else:
            parts = _divided(data, whole)
    parts = _check_leaks(data, parts)
    parts = _few_shot(data, parts)
    if show is not None:
        for line in describe(parts):
            print(line, file=show, flush=True)
    return parts


def describe(parts: Parts) -> list[str]:
    """What a report must tell of the data, as a person reads it."""
    about, lines = parts.about, []
    if "benchmark" in about:
        subset = "" if about["whole"] else "SUBSET: "
        lines.append(f"{about['benchmark']}: {subset}{about['there']}")
        lines.append(f"protocol {about['protocol']} ({about['paper']}), run {about['run']}")
    if about.get("duplicates"):
        lines.append(f"{about['duplicates']} pairs of clips of one sound lie in different parts")
    if about.get("of_no_part"):
        lines.append(f"{about['of_no_part']} clips belong to no part of the division: left out")
    if about.get("leaks"):
        lines.append(f"LEAK: {about['leaks']}")
    if "shots" in about:
        lines.append(f"few-shot: {about['shots']} clips a class, draw {about['draw']}")
    if parts.chosen_on_test is not None:
        lines.append(
            "NOTE: weights are chosen by the clips that are reported, as in "
            f"{parts.chosen_on_test}; such figures are too high"
        )
    return lines


def runs_of(data: Data) -> dict[str, Data]:
    """The runs that together are one figure: of the protocol, or one for every fold.

    Raises:
        UsageError: the set has no folds.
    """
    if data.format == "synthetic":
        raise UsageError("the synthetic sounds have no folds: leave --cross-validate")
    source = open_data(data)
    name = detect_benchmark(data.path, data.format)
    if name is not None:
        protocol = BENCHMARKS[name].protocol(data.protocol or "honest")
        names = [division.name for division in _possible(protocol, source)]
        if len(protocol.divisions) < 2 or not names:
            raise UsageError(
                f"{BENCHMARKS[name].title} has one official division of what is there: leave "
                "--cross-validate"
            )
    else:
        names = list(source.folds)
        if not names:
            raise UsageError(
                f"{source.name} has no folds: add a fold column, or leave --cross-validate"
            )
    return {name: dataclasses.replace(data, fold=name) for name in names}


def _synthetic(data: Data) -> Parts:
    made = keep_in_memory(Synthetic(TARGET_SOUNDS, data.train_clips, data.seed))
    part = made.split(data.valid_fraction, seed=data.seed) if data.valid_fraction else None
    test = Synthetic(TARGET_SOUNDS, data.test_clips, data.seed, first=SYNTHETIC_TEST)
    return Parts(part[0] if part else made, part[1] if part else None, keep_in_memory(test))


def _divided(data: Data, whole: Source) -> Parts:
    splits = {clip.split for clip in whole.clips} - {None}
    valid: Source | None = None
    about: dict[str, Any] = {}
    if data.fold is not None:
        train, test = whole.fold(data.fold)
    elif splits - {"train"}:
        if "train" not in splits:
            raise DataError(
                f"{whole.name}: of its official division only {', '.join(sorted(map(str, splits)))}"
                " is here: add the training clips (split train), or remove the division"
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
    if valid is None and data.valid_fraction:
        train, valid = train.split(data.valid_fraction, seed=data.seed)
    return Parts(train, valid, test, about)


def _possible(protocol: Protocol, whole: Source) -> list[Division]:
    """The runs of which both training and test clips are there."""
    there = {find_part(clip) for clip in whole.clips}
    return [d for d in protocol.divisions if there & set(d.train) and there & set(d.test)]


def _by_protocol(data: Data, whole: Source, benchmark: Benchmark) -> Parts:
    protocol = benchmark.protocol(data.protocol or "honest")
    if protocol.labels == "as_published":
        whole = _as_published(whole)
    census = benchmark.census(whole)
    about: dict[str, Any] = {
        "benchmark": benchmark.title,
        "whole": census.whole,
        "there": census.text(),
        "protocol": protocol.name,
        "paper": protocol.paper,
    }
    if data.path is not None and is_prepared(Path(data.path).expanduser()):
        about["duplicates"] = len(read_facts(Path(data.path).expanduser())["duplicates"])
    possible = _possible(protocol, whole)
    names = [division.name for division in protocol.divisions]
    if data.fold is not None and data.fold not in names:
        raise UsageError(
            f"{benchmark.title} has no run {data.fold!r} in protocol {protocol.name}: there are "
            f"{', '.join(names)}"
        )
    chosen = [d for d in possible if data.fold in (None, d.name)]
    if not chosen and data.fold is not None:
        raise DataError(
            f"{whole.name}: the clips of run {data.fold!r} are not there: {census.text()}"
        )
    if not chosen:
        train, test = whole.split(data.test_fraction or 0.2, seed=data.seed)
        about["run"] = "none that is official: what is there was split"
        return Parts(train, None, test, about)
    division = chosen[0]
    at = f"{division.name}, {names.index(division.name) + 1} of {len(names)}"
    about["run"] = at if len(names) > 1 else division.name

    def part(names: Sequence[str]) -> Source | None:
        clips = [clip for clip in whole.clips if str(find_part(clip)) in names]
        return whole.with_clips(clips) if clips else None

    train, valid, test = part(division.train), part(division.valid), part(division.test)
    assert train is not None
    if valid is None and data.valid_fraction:
        train, valid = train.split(data.valid_fraction, seed=data.seed)
    paper = protocol.paper if protocol.chooses_on_test else None
    return Parts(train, valid, test, about, paper)


def _as_published(whole: Source) -> Source:
    """A set annotated in part as arXiv 2401.10544's code labels it: whatever was asked is there."""
    return whole.with_clips(
        dataclasses.replace(clip, label=clip.observed, observed=None)
        if clip.observed is not None
        else clip
        for clip in whole.clips
    )


def _check_leaks(data: Data, parts: Parts) -> Parts:
    """Recordings and speakers are in one part only; where a part is two, it counts once."""
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
    text = f"{len(leaks)} recordings or speakers lie in more than one part: {shown}"
    if data.leaks == "refuse":
        raise DataError(
            f"{parts.train.name}: {text}; put each in one part, or give --data.leaks report to go "
            "on and have every report tell"
        )
    return dataclasses.replace(parts, about={**parts.about, "leaks": text})


def _few_shot(data: Data, parts: Parts) -> Parts:
    if data.shots is None:
        return parts
    name = detect_benchmark(data.path, data.format)
    seed: int | None = data.draw
    if name is not None:
        few_shot = BENCHMARKS[name].protocol(data.protocol or "honest").few_shot
        seed = None if few_shot == "first" else data.draw
    train = parts.train.shots(data.shots, seed)
    about = {"shots": data.shots, "draw": "the first in file order" if seed is None else seed}
    return dataclasses.replace(parts, train=train, about={**parts.about, **about})
