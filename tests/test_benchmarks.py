"""The benchmarks: read from their official layouts, divided as the papers divide them."""

import csv
import dataclasses
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from official_layouts import MAKERS, table

from aatjax.config import Data
from aatjax.data.benchmarks import BENCHMARKS, find_benchmark, gtzan
from aatjax.data.benchmarks.base import make_list_protocols
from aatjax.data.benchmarks.esc50 import CLASSES as ESC_CLASSES
from aatjax.data.formats import SourceFormat
from aatjax.errors import DataError, UsageError
from aatjax.experiments.partition import describe_partition, list_runs, make_partition


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory):
    """From the name of a benchmark to a folder as its archive unpacks, made once."""
    home = tmp_path_factory.mktemp("official")
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            MAKERS[name](home / name)
            made[name] = home / name
        return made[name]

    return of


def data(name: str, folder: Path, tmp_path: Path, **fields) -> Data:
    return Data(format=name, path=str(folder), cache=str(tmp_path / "cache"), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_benchmark_is_read_from_its_official_layout(name, official) -> None:
    benchmark = BENCHMARKS[name]
    source = benchmark.read(official(name))
    assert source.classes == benchmark.classes
    assert source.leaks("fold" if source.clips[0].fold else "split") == {}
    assert all(Path(str(clip.path)).is_file() for clip in source.clips)
    census = benchmark.census(source)
    assert not census.whole and census.clips == len(source) and census.official == benchmark.clips


def test_every_benchmark_is_a_source_format() -> None:
    missing = set(BENCHMARKS) - set(get_args(SourceFormat))
    assert not missing, f"add {missing} to SourceFormat in aatjax/data/formats.py"
    assert set(MAKERS) <= set(BENCHMARKS)


def test_official_lists_without_one_that_chooses() -> None:
    (honest,) = make_list_protocols(valid=None)
    assert (honest.selection, honest.divisions[0].valid) == ("last", ())
    assert "last epoch" in honest.paper
    (chosen,) = make_list_protocols()
    assert (chosen.selection, chosen.divisions[0].valid) == ("best", ("valid",))


def test_the_official_counts_are_the_published_ones() -> None:
    published = {
        "esc50": (2000, 50),
        "esc10": (400, 10),
        "urbansound8k": (8732, 10),
        "speech_commands_v1": (64721, 30),
        "speech_commands_v2": (105829, 35),
        "openmic2018": (20000, 20),
        "gtzan": (930, 10),
        "fluent_speech_commands": (30043, 31),
        "iemocap": (5531, 4),
    }
    assert published.keys() <= BENCHMARKS.keys()
    for name, counts in published.items():
        assert (BENCHMARKS[name].clips, len(BENCHMARKS[name].classes)) == counts
    for benchmark in BENCHMARKS.values():
        if benchmark.parts:
            assert sum(benchmark.parts.values()) == benchmark.clips
        for protocol in benchmark.protocols:
            for division in protocol.divisions:
                assert not set(division.train) & {*division.valid, *division.test}


def test_gtzans_lists_are_disjoint_and_of_the_published_sizes() -> None:
    sizes = {
        part: [len(gtzan.parse_ranges(ranges)) for ranges in genres.values()]
        for part, genres in gtzan.LISTS.items()
    }
    assert sizes == {
        "train": [46, 48, 45, 42, 47, 43, 44, 41, 43, 44],
        "valid": [23, 20, 23, 22, 18, 17, 20, 13, 17, 24],
        "test": [31, 31, 30, 29, 27, 27, 27, 30, 26, 32],
    }
    for genre in gtzan.CLASSES:
        every = [n for part in gtzan.LISTS.values() for n in gtzan.parse_ranges(part[genre])]
        assert len(every) == len(set(every)) and min(every) >= 0 and max(every) < 100
    assert 54 in gtzan.parse_ranges(gtzan.LISTS["train"]["jazz"])


def test_gtzan_is_read_as_first_published_too(tmp_path: Path) -> None:
    import soundfile

    for genre in ("blues", "rock"):
        (tmp_path / "genres" / genre).mkdir(parents=True)
    soundfile.write(tmp_path / "genres/blues/blues.00029.au", np.zeros(999), 22050, format="AU")
    source = BENCHMARKS["gtzan"].read(tmp_path)
    assert [clip.id for clip in source.clips] == ["blues/blues.00029.au"]


def test_openmic_has_observed_and_present_classes(official) -> None:
    source = BENCHMARKS["openmic2018"].read(official("openmic2018"))
    first, last = source.clips[0], source.clips[-1]
    assert (first.label, first.observed) == ((0, 19), (0, 7, 19))  # 0.5 counts as present
    assert last.label == () and last.observed is not None and len(last.observed) == 3
    assert (first.group, first.split, last.split) == ("000000", "train", "test")
    targets = source.targets()
    assert targets[0, [0, 7, 19]].tolist() == [1, 0, 1]
    assert np.isnan(np.delete(targets[0], [0, 7, 19])).all()


def test_openmic_as_published_only_by_the_papers_name(official, tmp_path) -> None:
    folder = official("openmic2018")
    honest = make_partition(data("openmic2018", folder, tmp_path))
    published = make_partition(data("openmic2018", folder, tmp_path, protocol="aat"))
    assert honest.valid is None and honest.chosen_on_test is None
    assert np.isnan(honest.train.targets()).any()
    assert not np.isnan(published.train.targets()).any()
    assert published.train.clips[0].label == (0, 7, 19)  # 7 was asked about and is absent
    assert published.chosen_on_test is not None and "2401.10544" in published.chosen_on_test
    assert any("chosen by the test clips" in line for line in describe_partition(published))


def test_fluents_commas_and_intents(official) -> None:
    source = BENCHMARKS["fluent_speech_commands"].read(official("fluent_speech_commands"))
    assert {clip.label[0] for clip in source.clips} == {0, 1, 11, 23}
    assert source.classes[11] == "activate lights kitchen" and source.classes[0] == (
        "change language"
    )
    assert {c.group for c in source.clips if c.split == "train"} == {"a", "b"}


def test_iemocap_keeps_four_emotions_of_ten_speakers(official) -> None:
    source = BENCHMARKS["iemocap"].read(official("iemocap"))
    assert len(source) == 50 and len(source.folds) == 10
    assert [clip.label[0] for clip in source.clips[:5]] == [0, 1, 1, 2, 3]
    runs = BENCHMARKS["iemocap"].protocol("petl").divisions
    assert [(r.name, r.valid, r.test) for r in runs[:3]] == [
        ("5M", ("5F",), ("5M",)),
        ("5F", ("5M",), ("5F",)),
        ("1M", ("1F",), ("1M",)),
    ]
    assert all(len(run.train) == 8 for run in runs)


def test_the_protocols_of_the_folds_are_the_papers() -> None:
    esc = BENCHMARKS["esc50"]
    assert [(d.train, d.valid, d.test) for d in esc.protocol("petl").divisions] == [
        (("1", "2", "3"), ("4",), ("5",)),
        (("2", "3", "4"), ("5",), ("1",)),
        (("3", "4", "5"), ("1",), ("2",)),
        (("4", "5", "1"), ("2",), ("3",)),
        (("5", "1", "2"), ("3",), ("4",)),
    ]
    aat = esc.protocol("aat")
    assert aat.selection == "mean_curve" and aat.chooses_on_test
    assert all(d.valid == d.test for d in aat.divisions)
    honest = esc.protocol("honest")
    assert not honest.chooses_on_test and all(not d.valid for d in honest.divisions)
    eight = BENCHMARKS["urbansound8k"].protocol("petl")
    assert [d.name for d in eight.divisions] == ["10", *(str(k) for k in range(1, 10))]
    choosing = {
        (b.name, p.name) for b in BENCHMARKS.values() for p in b.protocols if p.chooses_on_test
    }
    assert choosing == {(n, "aat") for n in ("esc50", "esc10", "urbansound8k", "openmic2018")}


def test_a_run_of_a_protocol_has_its_clips(official, tmp_path) -> None:
    folder = official("esc10")
    parts = make_partition(data("esc10", folder, tmp_path, protocol="petl", fold="2"))
    assert parts.valid is not None and parts.test is not None
    assert {c.fold for c in parts.train.clips} == {"3", "4", "5"}
    assert {c.fold for c in parts.valid.clips} == {"1"}
    assert {c.fold for c in parts.test.clips} == {"2"}
    assert parts.about["run"] == "2, 3 of 5"
    assert list(list_runs(data("esc10", folder, tmp_path, protocol="petl"))) == list("51234")
    with pytest.raises(UsageError, match=r"protocol honest: --data\.fold is one of 1, 2"):
        make_partition(data("esc10", folder, tmp_path, fold="7"))
    with pytest.raises(UsageError, match="one official division"):
        list_runs(data("gtzan", official("gtzan"), tmp_path, max_bad=0.1))


def test_a_protocol_needs_a_benchmark_that_has_it(official, tmp_path) -> None:
    with pytest.raises(UsageError, match="no protocol 'petl': there are honest, aat"):
        make_partition(data("gtzan", official("gtzan"), tmp_path, protocol="petl", max_bad=0.1))
    with pytest.raises(UsageError, match=r"--protocol aat .* applies to benchmarks only"):
        make_partition(data("esc", official("esc10"), tmp_path, protocol="aat"))


@pytest.mark.parametrize(
    ("name", "file", "column", "value", "message"),
    [
        ("esc50", "meta/esc50.csv", "category", "cat", "row 2: category 'cat' of target 0 is"),
        ("esc50", "meta/esc50.csv", "target", "51", "row 2: target '51' is not 0 to 49"),
        ("urbansound8k", "metadata/UrbanSound8K.csv", "fsID", "7", "row 2: .* does not fit fsID"),
        ("urbansound8k", "metadata/UrbanSound8K.csv", "fold", "11", "row 2: fold '11'"),
        ("urbansound8k", "metadata/UrbanSound8K.csv", "class", "siren", "row 2: class 'siren'"),
        ("openmic2018", "openmic-2018-aggregated-labels.csv", "relevance", "1.5", "row 2: .*1.5"),
        ("openmic2018", "openmic-2018-aggregated-labels.csv", "instrument", "oud", "row 2: .*oud"),
        ("openmic2018", "openmic-2018-aggregated-labels.csv", "instrument", "", "row 2: empty"),
        ("fluent_speech_commands", "data/train_data.csv", "location", "attic", "row 2: unknown"),
    ],
)
def test_a_table_that_is_wrong_is_refused_with_its_row(
    name, file, column, value, message, tmp_path
) -> None:
    top = MAKERS[name](tmp_path)
    with (top / file).open() as opened:
        rows = list(csv.reader(opened))
    rows[1][rows[0].index(column)] = value
    table(top / file, [list(row) for row in rows])
    with pytest.raises(DataError, match=message):
        BENCHMARKS[name].read(tmp_path)


def test_another_folder_is_not_a_benchmark(tmp_path, official) -> None:
    with pytest.raises(DataError, match="GTZAN is not there: no folder in it holds blues and rock"):
        BENCHMARKS["gtzan"].read(tmp_path)
    with pytest.raises(DataError, match=r"'backward' is no word of .*v0\.02 has it"):
        BENCHMARKS["speech_commands_v1"].read(official("speech_commands_v2"))
    with pytest.raises(UsageError, match="did you mean 'esc50'"):
        find_benchmark("ESC-50")


def test_a_speaker_in_two_parts_is_refused_or_reported(tmp_path) -> None:
    top = MAKERS["fluent_speech_commands"](tmp_path)
    rows = (top / "data/test_data.csv").read_text().replace(",d,", ",a,")
    (top / "data/test_data.csv").write_text(rows)
    with pytest.raises(DataError, match="'a' in test and train; put each in one part"):
        make_partition(data("fluent_speech_commands", tmp_path, tmp_path))
    parts = make_partition(data("fluent_speech_commands", tmp_path, tmp_path, leaks="report"))
    assert "'a' in test and train" in parts.about["leaks"]
    assert any(line.startswith("LEAK") for line in describe_partition(parts))


def test_few_shots(official, tmp_path) -> None:
    folder = official("esc10")

    def shots(**fields) -> list[str]:
        return [
            c.id
            for c in make_partition(data("esc10", folder, tmp_path, shots=2, **fields)).train.clips
        ]

    # The small set holds 4 of the 10 classes; the others have no clip to draw.
    with pytest.raises(DataError, match="class 'rooster' has 0 training clips, 2 are requested"):
        shots()


def test_few_shots_are_stratified_seeded_and_of_many_recordings(official, tmp_path) -> None:
    source = BENCHMARKS["iemocap"].read(official("iemocap"))
    draws = [source.shots(3, seed=k) for k in (0, 0, 1)]
    for draw in draws:
        assert np.bincount([c.label[0] for c in draw.clips]).tolist() == [3, 3, 3, 3]
        speakers = [c.group for c in draw.clips]
        assert len(set(speakers)) == 10  # of ten speakers; twelve clips
    assert [c.id for c in draws[0].clips] == [c.id for c in draws[1].clips]
    assert [c.id for c in draws[0].clips] != [c.id for c in draws[2].clips]
    first = source.shots(2, seed=None)
    assert [c.id for c in first.clips] == [
        c.id
        for i, c in enumerate(source.clips)
        if sum(d.label == c.label for d in source.clips[:i]) < 2
    ]
    with pytest.raises(UsageError, match="1 clip per class"):
        source.shots(0)


def test_few_shots_of_several_labels_count_every_class() -> None:
    from aatjax.data.source import Clip, Source

    clips = [Clip(f"{i}", tuple({i % 3, i % 2}), "x") for i in range(24)]
    source = Source(clips, "abc", name="several", multi_label=True)
    drawn = source.shots(2, seed=4)
    counts = np.bincount([c for clip in drawn.clips for c in clip.label], minlength=3)
    assert counts.min() >= 2 and len(drawn) < 8


@pytest.mark.parametrize(
    ("name", "folder", "clips", "text"),
    [
        ("esc10", "esc10", 320, r"320 of 400 clips \(5: 0 of 80\)"),
        ("esc50", "esc50_fold4", 320, "320 of 2,000 clips .*4: 320 of 400.*; no clip of dog"),
        ("speech_commands_v1", "speech_commands_v0.01", 300, "300 of 64,721 .*test: 51 of 6,835"),
    ],
)
def test_real_recordings_are_read_and_counted(name, folder, clips, text, real_audio) -> None:
    import re

    benchmark = BENCHMARKS[name]
    source = benchmark.read(real_audio / folder)
    assert len(source) == clips
    assert re.match(text, benchmark.census(source).text())


def test_esc50s_classes_are_those_of_the_real_tables(real_audio) -> None:
    seen = {}
    for folder in ("esc10", "esc50_fold4"):
        with (real_audio / folder / "meta/esc50.csv").open() as file:
            seen |= {int(row["target"]): row["category"] for row in csv.DictReader(file)}
    assert tuple(seen[i] for i in range(50)) == ESC_CLASSES


def test_one_fold_alone_is_split_and_reported(real_audio, tmp_path) -> None:
    parts = make_partition(data("esc50", real_audio / "esc50_fold4", tmp_path))
    assert parts.test is not None and len(parts.train) + len(parts.test) == 320
    assert "not official" in parts.about["run"]
    assert not parts.about["whole"]


def test_a_census_that_is_met_is_whole(official, tmp_path) -> None:
    source = BENCHMARKS["iemocap"].read(official("iemocap"))
    benchmark = dataclasses.replace(BENCHMARKS["iemocap"], clips=50)
    assert benchmark.census(source).whole
    assert benchmark.census(source).text() == "50 of 50 clips"
