"""OpenMIC-2018: which of 20 instruments play, annotated in part (Humphrey et al., ISMIR 2018)."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from aatjax.data.benchmarks.base import (
    AAT,
    Benchmark,
    Division,
    Protocol,
    official_lists,
    present,
    read_table,
)
from aatjax.data.source import Clip, Source
from aatjax.errors import DataError

CLASSES = (
    "accordion",
    "banjo",
    "bass",
    "cello",
    "clarinet",
    "cymbals",
    "drums",
    "flute",
    "guitar",
    "mallet_percussion",
    "mandolin",
    "organ",
    "piano",
    "saxophone",
    "synthesizer",
    "trombone",
    "trumpet",
    "ukulele",
    "violin",
    "voice",
)
LABELS = "openmic-2018-aggregated-labels.csv"


def read(root: Path) -> Source:
    """Clips of the official split; groups are tracks.

    A class is observed where annotators were asked about it. A relevance of 0.5 or more is a
    positive, less a negative; all else is unknown.

    Raises:
        DataError: an unknown instrument, or a relevance that is no share.
    """
    table = root / LABELS
    order = _class_map(root / "class-map.json")
    positive: dict[str, set[int]] = defaultdict(set)
    observed: dict[str, set[int]] = defaultdict(set)
    for number, row in enumerate(read_table(table, ("sample_key", "instrument", "relevance")), 2):
        try:
            relevance = float(row["relevance"])
        except ValueError:
            relevance = -1.0
        if row["instrument"] not in order or not 0 <= relevance <= 1:
            raise DataError(
                f"{table}: row {number}: instrument {row['instrument']!r} or relevance "
                f"{row['relevance']!r} cannot be; they are OpenMIC's 20 names and 0 to 1"
            )
        key, c = row["sample_key"], order[row["instrument"]]
        observed[key].add(c)
        if relevance >= 0.5:
            positive[key].add(c)
    clips = []
    for split in ("train", "test"):
        file = root / "partitions" / f"split01_{split}.csv"
        for key in file.read_text(encoding="utf-8-sig").split():
            if key == "sample_key":
                continue
            if key not in observed:
                raise DataError(f"{file}: {key!r} has no row in {LABELS}")
            path = root / "audio" / key[:3] / f"{key}.ogg"
            clips.append(
                Clip(
                    f"{key[:3]}/{key}.ogg",
                    tuple(sorted(positive[key])),
                    str(path),
                    split=split,
                    group=key.partition("_")[0],
                    observed=tuple(sorted(observed[key])),
                )
            )
    here, skipped = present(root / "audio", clips)
    return Source(here, CLASSES, name="OpenMIC-2018", multi_label=True, skipped=skipped)


def _class_map(path: Path) -> dict[str, int]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; unpack the archive anew") from error
    ours = {name: c for c, name in enumerate(CLASSES)}
    if found != ours:
        raise DataError(f"{path}: the classes are not OpenMIC's 20 in their order")
    return ours


OPENMIC = Benchmark(
    name="openmic2018",
    title="OpenMIC-2018",
    paper="Humphrey, Durand, McFee, OpenMIC-2018: An Open Data-set for Multiple Instrument "
    "Recognition, ISMIR 2018",
    licence="CC BY 4.0 (each clip's own in its metadata)",
    marks=(
        LABELS,
        "class-map.json",
        "partitions/split01_train.csv",
        "partitions/split01_test.csv",
        "audio",
    ),
    reader=read,
    classes=CLASSES,
    clips=20_000,
    parts={"train": 14_915, "test": 5_085},
    metric="mean_ap",
    statistics="openmic",
    protocols=(
        Protocol(
            "honest",
            "the official split; weights of the last epoch; unknown labels masked",
            official_lists(valid=None),
        ),
        Protocol(
            "aat",
            f"{AAT}; every instrument that was asked about counts as present, every "
            "other as absent",
            (Division("official", ("train",), ("test",), ("test",)),),
            selection="best",
            labels="as_published",
        ),
    ),
    home="zenodo.org/records/1432913",
    url="https://zenodo.org/records/1432913/files/openmic-2018-v1.0.0.tgz",
    checksum="md5:e4ccf187e2bb5ab2e115416e8aafe7f4",
)
