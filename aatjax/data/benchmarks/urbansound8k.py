"""UrbanSound8K: urban sounds of up to four seconds (Salamon et al., ACM MM 2014)."""

from collections.abc import Iterator
from pathlib import Path

from aatjax.data.benchmarks.base import Benchmark, hold_out_folds, make_fold_protocols, split_names
from aatjax.data.source import Clip
from aatjax.data.tables import TableRow, read_table

CLASSES = split_names(
    "air_conditioner car_horn children_playing dog_bark drilling engine_idling gun_shot "
    "jackhammer siren street_music"
)
FOLDS = tuple(str(k) for k in range(1, 11))
COUNTS = (873, 888, 925, 990, 936, 823, 838, 806, 816, 837)
COLUMNS = ("slice_file_name", "fsID", "fold", "classID", "class")


def _list_clips(root: Path) -> Iterator[Clip]:
    """Yield the clips of the metadata; the group is the Freesound recording (`fsID`).

    Raises:
        DataError: a row contradicts its file name, which holds recording and class too, or the
            folder that its file lies in.
    """
    for row in read_table(root / "metadata/UrbanSound8K.csv", COLUMNS):
        name, group, fold, number = (row[column] for column in COLUMNS[:4])
        parts = name.rpartition(".")[0].split("-")
        if len(parts) != 4 or parts[:2] != [group, number]:
            raise row.error(
                f"{name!r} does not fit fsID {group!r} and classID {number!r}; names are "
                "fsID-classID-occurrence-slice.wav"
            )
        if fold not in FOLDS:
            raise row.error(f"fold {fold!r} is not 1 to 10")
        label = row.read_class("classID", "class", CLASSES, "UrbanSound8K")
        id = f"fold{fold}/{name}"
        _check_fold(root / "audio", id, row)
        yield Clip(id, (label,), str(root / "audio" / id), fold=fold, group=group)


def _check_fold(audio: Path, id: str, row: TableRow) -> None:
    """Refuse a clip that lies in the folder of another fold than its row states."""
    if (audio / id).is_file():
        return
    name = id.rpartition("/")[2]
    for fold in FOLDS:
        if (audio / f"fold{fold}" / name).is_file():
            raise row.error(
                f"{name!r} lies in fold{fold}, not in {id.partition('/')[0]}: move it, or unpack "
                "the archive again"
            )


URBANSOUND8K = Benchmark(
    name="urbansound8k",
    title="UrbanSound8K",
    paper="Salamon, Jacoby, Bello, A Dataset and Taxonomy for Urban Sound Research, ACM MM 2014",
    licence="CC BY-NC 4.0",
    marks=("metadata/UrbanSound8K.csv", "audio"),
    signs=("metadata/UrbanSound8K.csv",),
    list_clips=_list_clips,
    classes=CLASSES,
    clips=sum(COUNTS),
    parts=dict(zip(FOLDS, COUNTS, strict=True)),
    statistics="us8k",
    protocols=make_fold_protocols(FOLDS, hold_out_folds(("10", *FOLDS[:-1]))),
    home="zenodo.org/records/1203745",
    url="https://zenodo.org/records/1203745/files/UrbanSound8K.tar.gz",
    checksum="md5:9aa69802bbf37fb986f71ec1483a196e",
)
