"""Partitions: a data set opened and divided into training, validation and test clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aatjax.config import Data
from aatjax.data.benchmarks import BENCHMARKS, Benchmark, Division, Protocol, find_part
from aatjax.data.decode_cache import decode_all
from aatjax.data.formats import detect_benchmark, open_source
from aatjax.data.groups import describe_groups
from aatjax.data.known_files import Peers
from aatjax.data.pipeline import keep_in_memory
from aatjax.data.quarantine import check_failures
from aatjax.data.source import Progress, Source
from aatjax.data.splits import find_leaks
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.data.synthetic.synthesize import TARGET_SOUNDS
from aatjax.data.tfds import is_prepared, read_facts
from aatjax.data.trainable import check_classes, check_trainable, describe_leaks, refuse_leaks
from aatjax.errors import DataError, UsageError, format_count
from aatjax.io.host import find_user_cache, pause_collection
from aatjax.io.progress import SHOWN_AFTER, StageBar, TextStream

SYNTHETIC_TEST = 1_000_000  # number of the first test clip of each class


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
    name = detect_benchmark(data.path, data.format, data.pattern)
    if name is None:
        return None
    return BENCHMARKS[name], BENCHMARKS[name].protocol(data.protocol or "honest")


def open_data(
    data: Data,
    *,
    quarantine: Path | None = None,
    show: TextStream | None = None,
    peers: Peers | None = None,
    check: Callable[[Source], None] = lambda source: None,
) -> Source:
    """Return the whole labelled set, decoded once; unreadable files are quarantined.

    Args:
        data: where and how.
        quarantine: file that lists them.
        show: where progress goes, of stages that take longer than two seconds.
        peers: the processes of a run that share the work, see `decode_all`.
        check: called with the set as it is listed, before a file is decoded.
    """
    with StageBar(quiet=show is None, stream=show, after=SHOWN_AFTER) as bar:
        source = open_listed(data, progress=bar.update)
        check(source)
        kept = decode_all(
            source,
            find_audio_cache(data),
            max_bad=_parse_max_bad(data),
            quarantine_file=quarantine,
            progress=bar.update,
            channels=data.channels,
            truncated=data.truncated,
            peers=peers,
        )
    if show is not None:
        bad = len(source) - len(kept)
        text = f"{source.name}: {format_count(len(kept), 'clip')}, {len(source.classes)} class"
        text += "es" * (len(source.classes) != 1)
        if groups := describe_groups(kept):
            text += f", {groups}"
        if source.skipped:
            text += f", {format_count(len(source.skipped), 'other file')} left out"
        if bad:
            text += f", {bad} quarantined" + (f" (see {quarantine})" if quarantine else "")
        print(text, file=show, flush=True)
    return kept


def open_listed(data: Data, *, strict: bool = True, progress: Progress | None = None) -> Source:
    """Return the whole labelled set as it is listed; no file is decoded.

    Args:
        data: where and how.
        strict: refuse a CSV or JSON-lines file with wrong rows; otherwise they are skipped.
        progress: called with the stage `list` and the files found.

    Raises:
        UsageError: no path, or settings that do not go with the layout.
        DataError: no usable data found.
    """
    if data.path is None:
        raise UsageError("no data: name the folder of sounds by --data.path (data.path)")
    return open_source(
        data.path,
        data.format,
        pattern=data.pattern,
        columns=data.columns,
        root=data.root,
        group=data.group,
        strict=strict,
        progress=progress,
    )


def _parse_max_bad(data: Data) -> int | float:
    return int(data.max_bad) if data.max_bad >= 1 else float(data.max_bad)


def make_partition(
    data: Data,
    *,
    quarantine: Path | None = None,
    show: TextStream | None = None,
    peers: Peers | None = None,
    check: Callable[[Partition], None] = lambda parts: None,
) -> Partition:
    """Divide a data set into the parts that a config asks for.

    Args:
        data: where and how.
        quarantine, show, peers: as for `open_data`.
        check: called with the parts of the set as it is listed, before a file is decoded.

    Raises:
        UsageError: the settings do not fit the set.
        DataError: the set cannot be used, or recordings or speakers lie in two parts.
    """
    if data.format == "synthetic":
        parts = _select_shots(data, _split_synthetic(data))
        check(parts)
    else:
        whole = open_data(
            data,
            quarantine=quarantine,
            show=show,
            peers=peers,
            check=lambda listed: check(divide(data, listed)),
        )
        parts = divide(data, whole)
    if show is not None:
        for line in describe_partition(parts):
            print(line, file=show, flush=True)
    return parts


def list_partition(data: Data) -> Partition:
    """Divide a data set as it is listed; no file is decoded. Errors as of `make_partition`."""
    if data.format == "synthetic":
        return _select_shots(data, _split_synthetic(data))
    return divide(data, open_listed(data))


@pause_collection()
def divide(data: Data, whole: Source) -> Partition:
    """Divide an opened set: every reason for which training refuses one is here.

    `adapt --dry-run` and `doctor` call this too, so that they refuse what `train` refuses.

    Args:
        data: how; its path and format were used before.
        whole: the set, without the clips that cannot be decoded.

    Raises:
        UsageError: the settings do not fit the set.
        DataError: the set cannot be trained on (see `check_trainable`), or not be divided.
    """
    check_trainable(whole, leaks=data.leaks == "refuse")
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
    check_classes(parts.train)
    return _select_shots(data, _check_leaks(data, parts))


def omit_unusable(data: Data, source: Source, reasons: Mapping[str, str]) -> Source:
    """Return the set without clips that cannot be decoded, as training does.

    Args:
        data: `max_bad` and `truncated`.
        source: the set as listed.
        reasons: why, by the id of such a clip.

    Raises:
        DataError: more than `data.max_bad` of the clips, or all.
    """
    check_failures(source, list(reasons.values()), _parse_max_bad(data))
    return source.with_clips(clip for clip in source.clips if clip.id not in reasons)


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
    if parts.test is None:
        lines.append("no test clips: no test figure; name some by --data.path train=... test=...")
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
    source = open_listed(data)
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
    data = dataclasses.replace(data, split_method="stratified")  # a set that nobody adds to
    return _split_valid(data, Partition(train, None, keep_in_memory(test)))


def _split_valid(data: Data, parts: Partition) -> Partition:
    """Split validation clips off the training clips where there are none and some are wanted."""
    if parts.valid is not None or not data.valid_fraction:
        return parts
    train, valid = _split_off(data, parts.train, data.valid_fraction, "valid")
    return dataclasses.replace(parts, train=train, valid=valid)


def _split_off(data: Data, source: Source, fraction: float, part: str) -> tuple[Source, Source]:
    return source.split(fraction, data.seed, method=data.split_method, part=part)


def _split(data: Data, whole: Source) -> Partition:
    """Divide by fold, by the official division, or at random."""
    splits = {clip.split for clip in whole.clips} - {None}
    valid: Source | None = None
    about: dict[str, Any] = {}
    if data.fold is not None:
        train, test = whole.fold(data.fold)
    elif splits - {"train"}:
        train = whole.by_split("train")
        left = sum(clip.split is None for clip in whole.clips)
        if left:
            about["of_no_part"] = left
        valid = whole.by_split("valid") if "valid" in splits else None
        test = whole.by_split("test") if "test" in splits else None
    elif data.test_fraction:
        train, test = _split_off(data, whole, data.test_fraction, "test")
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
    folder = None if isinstance(data.path, dict) else Path(data.path or "").expanduser()
    if folder is not None and is_prepared(folder):
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
        train, test = _split_off(data, whole, data.test_fraction or 0.2, "test")
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
    if data.leaks == "refuse":
        refuse_leaks(parts.train.name, leaks)
    return dataclasses.replace(parts, about={**parts.about, "leaks": describe_leaks(leaks)})


def _select_shots(data: Data, parts: Partition) -> Partition:
    if data.shots is None:
        return parts
    found = find_protocol(data)
    seed = None if found is not None and found[1].few_shot == "first" else data.draw
    train = parts.train.shots(data.shots, seed)
    about = {"shots": data.shots, "draw": "the first in file order" if seed is None else seed}
    return dataclasses.replace(parts, train=train, about={**parts.about, **about})
