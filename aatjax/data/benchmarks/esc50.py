"""ESC-50 and ESC-10: environmental sounds (Piczak, ACM MM 2015)."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from aatjax.data.benchmarks.base import Benchmark, Division, make_fold_protocols, split_names
from aatjax.data.source import Clip
from aatjax.data.tables import read_table

CLASSES = split_names(
    "dog rooster pig cow frog cat hen insects sheep crow rain sea_waves crackling_fire crickets "
    "chirping_birds water_drops wind pouring_water toilet_flush thunderstorm crying_baby "
    "sneezing clapping breathing coughing footsteps laughing brushing_teeth snoring "
    "drinking_sipping door_wood_knock mouse_click keyboard_typing door_wood_creaks can_opening "
    "washing_machine vacuum_cleaner clock_alarm clock_tick glass_breaking helicopter chainsaw "
    "siren car_horn engine train church_bells airplane fireworks hand_saw"
)
ESC10 = (0, 1, 10, 11, 12, 20, 21, 38, 40, 41)
FOLDS = ("1", "2", "3", "4", "5")
COLUMNS = ("filename", "fold", "target", "category", "esc10", "src_file")


def _list_clips(root: Path, *, targets: tuple[int, ...]) -> Iterator[Clip]:
    """Yield the clips of the target numbers; the group is the recording a clip was cut from."""
    for row in read_table(root / "meta/esc50.csv", COLUMNS):
        target = row.read_class("target", "category", CLASSES, "ESC-50")
        if target in targets:
            name = row["filename"]
            path, label = str(root / "audio" / name), (targets.index(target),)
            yield Clip(name, label, path, fold=row["fold"], group=row["src_file"])


def _petl_runs() -> tuple[Division, ...]:
    """Three folds train, the next chooses, the one after is tested."""
    rings = [[FOLDS[(start + k) % 5] for k in range(5)] for start in range(5)]
    return tuple(Division(e, (a, b, c), (d,), (e,)) for a, b, c, d, e in rings)


ESC_50 = Benchmark(
    name="esc50",
    title="ESC-50",
    paper="Piczak, ESC: Dataset for Environmental Sound Classification, ACM MM 2015",
    licence="CC BY-NC 3.0 (each clip's own in its LICENSE)",
    marks=("meta/esc50.csv", "audio"),
    list_clips=partial(_list_clips, targets=tuple(range(50))),
    classes=CLASSES,
    clips=2000,
    parts=dict.fromkeys(FOLDS, 400),
    statistics="esc50",
    protocols=make_fold_protocols(FOLDS, _petl_runs()),
    home="github.com/karolpiczak/ESC-50",
    url="https://github.com/karolpiczak/ESC-50/archive/master.zip",
)

ESC_10 = dataclasses.replace(
    ESC_50,
    name="esc10",
    title="ESC-10",
    licence="CC BY 3.0",
    list_clips=partial(_list_clips, targets=ESC10),
    classes=tuple(CLASSES[t] for t in ESC10),
    clips=400,
    parts=dict.fromkeys(FOLDS, 80),
)
