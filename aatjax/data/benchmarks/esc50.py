"""ESC-50 and ESC-10: environmental sounds (Piczak, ACM MM 2015)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from aatjax.data.benchmarks.base import (
    AAT,
    PETL,
    Benchmark,
    Division,
    Protocol,
    fold_names,
    held_out,
    present,
    read_table,
)
from aatjax.data.source import Clip, Source
from aatjax.errors import DataError

CLASSES = (
    "dog",
    "rooster",
    "pig",
    "cow",
    "frog",
    "cat",
    "hen",
    "insects",
    "sheep",
    "crow",
    "rain",
    "sea_waves",
    "crackling_fire",
    "crickets",
    "chirping_birds",
    "water_drops",
    "wind",
    "pouring_water",
    "toilet_flush",
    "thunderstorm",
    "crying_baby",
    "sneezing",
    "clapping",
    "breathing",
    "coughing",
    "footsteps",
    "laughing",
    "brushing_teeth",
    "snoring",
    "drinking_sipping",
    "door_wood_knock",
    "mouse_click",
    "keyboard_typing",
    "door_wood_creaks",
    "can_opening",
    "washing_machine",
    "vacuum_cleaner",
    "clock_alarm",
    "clock_tick",
    "glass_breaking",
    "helicopter",
    "chainsaw",
    "siren",
    "car_horn",
    "engine",
    "train",
    "church_bells",
    "airplane",
    "fireworks",
    "hand_saw",
)
ESC10 = (0, 1, 10, 11, 12, 20, 21, 38, 40, 41)
FOLDS = fold_names(5)


def read(root: Path, *, esc10: bool) -> Source:
    """Clips of `meta/esc50.csv`; the group of a clip is the recording it was cut from."""
    table = root / "meta/esc50.csv"
    columns = ("filename", "fold", "target", "category", "esc10", "src_file")
    targets = ESC10 if esc10 else range(len(CLASSES))
    clips = []
    for number, row in enumerate(read_table(table, columns), 2):
        if not row["target"].isdigit() or int(row["target"]) >= len(CLASSES):
            raise DataError(f"{table}: row {number}: target {row['target']!r} is not 0 to 49")
        target = int(row["target"])
        if CLASSES[target] != row["category"]:
            raise DataError(
                f"{table}: row {number}: category {row['category']!r} of target {target} is "
                f"{CLASSES[target]!r} in ESC-50"
            )
        if target in targets:
            path = str(root / "audio" / row["filename"])
            label = (targets.index(target),)
            clips.append(
                Clip(row["filename"], label, path, fold=row["fold"], group=row["src_file"])
            )
    here, skipped = present(root / "audio", clips)
    title = "ESC-10" if esc10 else "ESC-50"
    return Source(here, [CLASSES[t] for t in targets], name=title, skipped=skipped)


PROTOCOLS = (
    Protocol(
        "honest", "five folds, each held out once; weights of the last epoch", held_out(FOLDS)
    ),
    Protocol("aat", AAT, held_out(FOLDS, on_test=True), selection="mean_curve"),
    Protocol(
        "petl",
        PETL,
        tuple(
            Division(test, train, (valid,), (test,))
            for train, valid, test in (
                (("1", "2", "3"), "4", "5"),
                (("2", "3", "4"), "5", "1"),
                (("3", "4", "5"), "1", "2"),
                (("4", "5", "1"), "2", "3"),
                (("5", "1", "2"), "3", "4"),
            )
        ),
        few_shot="first",
    ),
)

ESC_50 = Benchmark(
    name="esc50",
    title="ESC-50",
    paper="Piczak, ESC: Dataset for Environmental Sound Classification, ACM MM 2015",
    licence="CC BY-NC 3.0 (each clip's own in its LICENSE)",
    marks=("meta/esc50.csv", "audio"),
    reader=lambda root: read(root, esc10=False),
    classes=CLASSES,
    clips=2000,
    parts=dict.fromkeys(FOLDS, 400),
    metric="accuracy",
    statistics="esc50",
    protocols=PROTOCOLS,
    home="github.com/karolpiczak/ESC-50",
    url="https://github.com/karolpiczak/ESC-50/archive/master.zip",
)

ESC_10 = dataclasses.replace(
    ESC_50,
    name="esc10",
    title="ESC-10",
    licence="CC BY 3.0",
    reader=lambda root: read(root, esc10=True),
    classes=tuple(CLASSES[t] for t in ESC10),
    clips=400,
    parts=dict.fromkeys(FOLDS, 80),
)
