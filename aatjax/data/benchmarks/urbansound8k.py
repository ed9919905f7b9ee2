"""UrbanSound8K: urban sounds of up to four seconds (Salamon et al., ACM MM 2014)."""

from __future__ import annotations

from pathlib import Path

from aatjax.data.benchmarks.base import (
    AAT,
    PETL,
    Benchmark,
    Protocol,
    fold_names,
    held_out,
    present,
    read_table,
)
from aatjax.data.source import Clip, Source
from aatjax.errors import DataError

CLASSES = (
    "air_conditioner",
    "car_horn",
    "children_playing",
    "dog_bark",
    "drilling",
    "engine_idling",
    "gun_shot",
    "jackhammer",
    "siren",
    "street_music",
)
FOLDS = fold_names(10)
COUNTS = (873, 888, 925, 990, 936, 823, 838, 806, 816, 837)


def read(root: Path) -> Source:
    """Clips of the metadata; the group of a clip is the Freesound recording (`fsID`).

    Raises:
        DataError: a row contradicts its file name, which holds recording and class too.
    """
    table = root / "metadata/UrbanSound8K.csv"
    columns = ("slice_file_name", "fsID", "fold", "classID", "class")
    clips = []
    for number, row in enumerate(read_table(table, columns), 2):
        name, fold, label = row["slice_file_name"], row["fold"], row["classID"]
        parts = name.rpartition(".")[0].split("-")
        if len(parts) != 4 or parts[0] != row["fsID"] or parts[1] != label:
            raise DataError(
                f"{table}: row {number}: {name!r} does not fit fsID {row['fsID']!r} and classID "
                f"{label!r}; names are fsID-classID-occurrence-slice.wav"
            )
        if fold not in FOLDS or not label.isdigit() or int(label) >= len(CLASSES):
            raise DataError(f"{table}: row {number}: fold {fold!r} or classID {label!r} is unknown")
        if CLASSES[int(label)] != row["class"]:
            raise DataError(
                f"{table}: row {number}: class {row['class']!r} of classID {label} is "
                f"{CLASSES[int(label)]!r} in UrbanSound8K"
            )
        id = f"fold{fold}/{name}"
        clips.append(
            Clip(id, (int(label),), str(root / "audio" / id), fold=fold, group=row["fsID"])
        )
    here, skipped = present(root / "audio", clips)
    return Source(here, CLASSES, name="UrbanSound8K", skipped=skipped)


URBANSOUND8K = Benchmark(
    name="urbansound8k",
    title="UrbanSound8K",
    paper="Salamon, Jacoby, Bello, A Dataset and Taxonomy for Urban Sound Research, ACM MM 2014",
    licence="CC BY-NC 4.0",
    marks=("metadata/UrbanSound8K.csv", "audio"),
    reader=read,
    classes=CLASSES,
    clips=sum(COUNTS),
    parts=dict(zip(FOLDS, COUNTS, strict=True)),
    metric="accuracy",
    statistics="us8k",
    protocols=(
        Protocol(
            "honest", "ten folds, each held out once; weights of the last epoch", held_out(FOLDS)
        ),
        Protocol("aat", AAT, held_out(FOLDS, on_test=True), selection="mean_curve"),
        Protocol("petl", PETL, held_out(("10", *FOLDS[:-1])), few_shot="first"),
    ),
    home="zenodo.org/records/1203745",
    url="https://zenodo.org/records/1203745/files/UrbanSound8K.tar.gz",
    checksum="md5:9aa69802bbf37fb986f71ec1483a196e",
)
