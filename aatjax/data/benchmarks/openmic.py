"""OpenMIC-2018: which of 20 instruments play, annotated in part (Humphrey et al., ISMIR 2018)."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from aatjax.data.benchmarks.base import AAT, Benchmark, Protocol, split_names, use_lists
from aatjax.data.source import Clip
from aatjax.data.tables import read_table
from aatjax.errors import DataError
from aatjax.io.json_file import read_json

CLASSES = split_names(
    "accordion banjo bass cello clarinet cymbals drums flute guitar mallet_percussion mandolin "
    "organ piano saxophone synthesizer trombone trumpet ukulele violin voice"
)
LABELS = "openmic-2018-aggregated-labels.csv"


def _list_clips(root: Path) -> Iterator[Clip]:
    """Yield the clips of the official split; groups are tracks.

    A class is observed where annotators were asked about it. A relevance of 0.5 or more is a
    positive, less a negative; all else is unknown.

    Raises:
        DataError: an unknown instrument, or a relevance outside 0 to 1.
    """
    _check_class_map(root / "class-map.json")
    relevance: dict[str, dict[int, float]] = defaultdict(dict)
    for row in read_table(root / LABELS, ("sample_key", "instrument", "relevance")):
        try:
            share = float(row["relevance"])
        except ValueError:
            share = -1.0
        if row["instrument"] not in CLASSES or not 0 <= share <= 1:
            raise row.error(
                f"instrument {row['instrument']!r} or relevance {row['relevance']!r} is not one of "
                "OpenMIC's 20 names or not 0 to 1"
            )
        instrument = CLASSES.index(row["instrument"])
        known = relevance[row["sample_key"]]
        known[instrument] = max(share, known.get(instrument, 0.0))
    for split in ("train", "test"):
        file = root / "partitions" / f"split01_{split}.csv"
        for key in file.read_text(encoding="utf-8-sig").split():
            if key == "sample_key":
                continue
            if key not in relevance:
                raise DataError(f"{file}: {key!r} has no row in {LABELS}")
            known, id = relevance[key], f"{key[:3]}/{key}.ogg"
            yield Clip(
                id,
                tuple(sorted(c for c, share in known.items() if share >= 0.5)),
                str(root / "audio" / id),
                split=split,
                group=key.partition("_")[0],
                observed=tuple(sorted(known)),
            )


def _check_class_map(path: Path) -> None:
    found = read_json(path, advice="unpack the archive again")
    if found != {name: c for c, name in enumerate(CLASSES)}:
        raise DataError(f"{path}: the classes are not OpenMIC's 20 in their order")


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
    signs=(LABELS,),
    list_clips=_list_clips,
    classes=CLASSES,
    clips=20_000,
    parts={"train": 14_915, "test": 5_085},
    metric="mean_ap",
    statistics="openmic",
    protocols=(
        Protocol(
            "honest",
            "the official split; weights of the last epoch; unknown labels masked",
            use_lists(valid=None),
        ),
        Protocol(
            "aat",
            f"{AAT}; every instrument that was asked about counts as present, every other as "
            "absent",
            use_lists(valid="test"),
            selection="best",
            labels="as_published",
        ),
    ),
    home="zenodo.org/records/1432913",
    url="https://zenodo.org/records/1432913/files/openmic-2018-v1.0.0.tgz",
    checksum="md5:e4ccf187e2bb5ab2e115416e8aafe7f4",
)
