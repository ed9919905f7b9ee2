"""Sets as they are unpacked or published: recognised, or refused with what to give instead."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
from official_layouts import MAKERS, table

from aatjax.data.class_folders import fold_spelling
from aatjax.data.folders import AudioFolder
from aatjax.data.formats import detect_benchmark, detect_format, open_source
from aatjax.data.source import Source
from aatjax.errors import DataError, UsageError


def sound(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = np.random.default_rng(number).integers(-3000, 3000, 1600).astype(np.int16)
    soundfile.write(path, wave, 16000)
    return path


def sounds(root: Path, *folders: str, clips: int = 2) -> Path:
    for number, folder in enumerate(folders):
        for k in range(clips):
            sound(root / folder / f"{k}.wav", 10 * number + k)
    return root


def splits(source: Source) -> dict[str | None, int]:
    return {s: sum(c.split == s for c in source.clips) for s in {c.split for c in source.clips}}


RECOGNISED = {
    "esc50": ("esc", 5),
    "urbansound8k": ("urbansound8k", 10),
    "speech_commands_v1": ("folder", 4),
    "speech_commands_v2": ("folder", 5),
    "openmic2018": ("openmic2018", 20),
    "gtzan": ("gtzan", 10),
    "fluent_speech_commands": ("fluent_speech_commands", 31),
    "iemocap": ("iemocap", 4),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_benchmark_is_recognised_as_it_is_unpacked(name: str, tmp_path: Path) -> None:
    top = MAKERS[name](tmp_path / "unpacked")
    (tmp_path / "unpacked" / "__MACOSX").mkdir(exist_ok=True)
    format, classes = RECOGNISED[name]
    for folder in {top, tmp_path / "unpacked", tmp_path}:
        assert detect_format(folder)[0] == format
        source = open_source(folder)
        assert len(source.classes) == classes
        assert any(clip.fold or clip.split for clip in source.clips)
        assert detect_benchmark(folder, "auto") == (format if format == name else None)


def test_spoken_digits_are_recognised_in_the_folder_of_their_archive(tmp_path: Path) -> None:
    for name in ("0_ann_0", "1_ann_0", "0_bob_1", "1_bob_1"):
        sound(tmp_path / "free-spoken-digit-dataset-master" / "recordings" / f"{name}.wav")
    source = open_source(tmp_path)
    assert source.classes == ("0", "1") and {c.group for c in source.clips} == {"ann", "bob"}


def test_genres_of_ones_own_are_not_gtzan(tmp_path: Path) -> None:
    source = open_source(sounds(tmp_path, "blues", "rock", "techno"))
    assert source.classes == ("blues", "rock", "techno") and len(source) == 6


def test_a_clip_in_another_fold_than_its_row_says(tmp_path: Path) -> None:
    top = MAKERS["urbansound8k"](tmp_path)
    wav = min((top / "audio/fold3").glob("[0-9]*.wav"))
    wav.rename(top / "audio/fold5" / wav.name)
    with pytest.raises(
        DataError, match=rf"row \d+: '{wav.name}' lies in fold5, not in fold3: move"
    ):
        open_source(top)


def arabic(root: Path) -> Path:
    """Arabic Speech Commands in small: three speakers of two takes, all of the test list absent."""
    rows = {name: [["file", "class"]] for name in ("train", "val")}
    for word in ("backward", "zoom in"):
        for speaker in ("00000002", "00000030", "00000031"):
            for take in ("01", "02"):
                name = f"dataset/{word}/{speaker}_NO_{take}.wav"
                sound(root / name, int(speaker) + int(take))
                rows["val" if speaker == "00000002" else "train"].append([name, word])
    for name, lines in rows.items():
        table(root / f"{name}.csv", lines)
    sound(root / "background_noise" / "pink.wav")
    return root


def test_arabic_speech_commands_as_published(tmp_path: Path) -> None:
    source = open_source(arabic(tmp_path))
    assert source.classes == ("backward", "zoom in") and len(source) == 12
    assert splits(source) == {"train": 8, "valid": 4}
    assert {c.group for c in source.clips} == {"00000002", "00000030", "00000031"}
    assert source.clips[0].id == "train/dataset/backward/00000030_NO_01.wav"
    with pytest.raises(
        DataError, match=rf"level deeper: 'dataset' .*; give {tmp_path}/dataset, or"
    ):
        open_source(tmp_path, "folder")
    assert AudioFolder(tmp_path / "dataset").clips[0].group == "00000002"


@pytest.mark.slow
def test_all_of_arabic_speech_commands(real_audio: Path) -> None:
    source = open_source(real_audio / "arabic_speech_commands")
    assert splits(source) == {"train": 7200, "valid": 2400} and len(source.classes) == 40
    assert len({clip.group for clip in source.clips}) == 24 and not source.leaks("split")


def test_files_named_by_their_parts(tmp_path: Path) -> None:
    sounds(tmp_path, "audio/cat", "audio/dog", clips=4)
    for k, name in enumerate(("fit", "check")):
        rows = [[f"{animal}/{2 * k + i}.wav", animal] for animal in ("cat", "dog") for i in (0, 1)]
        table(tmp_path / "lists" / f"{name}.csv", [["fname", "animal"], *rows])
    paths = {p: str(tmp_path / f"lists/{n}.csv") for p, n in (("train", "fit"), ("test", "check"))}
    columns = {"path": "fname", "label": "animal"}
    root = str(tmp_path / "audio")
    source = open_source(paths, columns=columns, root=root)  # type: ignore[arg-type]
    assert splits(source) == {"train": 4, "test": 4} and source.name == "lists"
    with pytest.raises(DataError, match=r"no column path or .*fname, animal \(name yours by"):
        open_source(paths)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"names relative to another folder need --data.root"):
        open_source(paths, columns=columns)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"'cat/0.wav' is in train and test: remove it from one"):
        open_source(dict.fromkeys(("train", "test"), paths["train"]), columns=columns, root=root)
    with pytest.raises(UsageError, match=r"--data.columns is for CSV .* is read as folder"):
        open_source(root, columns=columns)  # type: ignore[arg-type]


def test_wrong_rows_name_their_file(tmp_path: Path) -> None:
    sounds(tmp_path, "cat", "dog")
    table(tmp_path / "train.csv", [["path", "label"], ["cat/0.wav", "cat"], ["dog/0.wav", "dog"]])
    table(tmp_path / "test.csv", [["path", "label"], ["cat/1.wav", "cat"], ["dog/7.wav", "dog"]])
    with pytest.raises(DataError, match=r"test.csv: 1 problem: row 3: no such file: 'dog/7.wav'"):
        open_source(tmp_path)
    skipped = open_source(tmp_path, strict=False).skipped
    assert [what for what, _ in skipped] == ["test: row 3"]


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "valid", "Test-clean")])
def test_folders_named_by_their_parts(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        sounds(tmp_path / name, "cat", "dog")
    sounds(tmp_path, "unlabelled", "_background_noise_")
    source = open_source(tmp_path)
    assert source.classes == ("cat", "dog") and set(splits(source).values()) == {4}
    assert len(splits(source)) == len(names) and len(source) == 4 * len(names)


def test_two_spellings_in_different_parts(tmp_path: Path) -> None:
    sounds(tmp_path, "train/Dog", "train/cat", "test/dog", "test/cat")
    for folder in ("", "unlabelled"):
        sounds(tmp_path, *filter(None, [folder]))
        with pytest.raises(DataError, match=r"'Dog' and 'dog' differ only in capitals"):
            open_source(tmp_path)


def test_groups_from_file_names(tmp_path: Path) -> None:
    for name in ("p1_a", "p1_b", "p2_a", "p2_b"):
        sound(tmp_path / name[-1] / f"{name}.wav")
    source = open_source(tmp_path, group=r"(p\d)_")
    assert {c.id: c.group for c in source.clips}["a/p2_a.wav"] == "p2"
    assert {c.group for c in open_source(tmp_path, group="^(.)/").clips} == {"a", "b"}  # the path
    with pytest.raises(UsageError, match=r"marks no group: .*parentheses"):
        open_source(tmp_path, group=r"p\d")
    with pytest.raises(UsageError, match=r"no regular expression"):
        open_source(tmp_path, group="(")
    with pytest.raises(DataError, match=r"finds a group in none of 4 file names; .*'p1_a.wav'"):
        open_source(tmp_path, group=r"(q\d)")
    with pytest.raises(DataError, match=r"in 2 of 4 file names; it does not fit 'p2_a.wav'"):
        open_source(tmp_path, group="(p1)_")


class TestFoldersThatAreNoClasses:
    """Each of these was read as a set of classes."""

    @pytest.mark.parametrize(
        ("folders", "message"),
        [
            (("fold1", "fold2", "fold10"), "fold1, fold10, fold2 look like folds, not classes"),
            (("audio/fold1", "audio/fold2"), "fold1, fold2 look like folds"),
            (("Fold 1/cat", "Fold 2/dog"), r"--data.pattern 'Fold \(\?P<fold>"),
            (("train", "test"), "look like parts of a set"),
            (
                ("training", "validation", "noise"),
                "--data.path train=.*training valid=.*validation",
            ),
            (("train", "test", "unlabelled"), "look like parts of a set"),
            (("data/cat", "data/dog"), "level deeper: 'data' holds cat, dog; give .*/data$"),
            (("a/b/cat", "a/b/dog", "a/b/owl", "a/b/pig"), "'a/b' holds cat, dog, owl, ...; give"),
            (("wavs/cat", "wavs/dog", "background_noise"), "level deeper: 'wavs'"),
            (("Dog", "cat", "dog"), "'Dog' and 'dog' differ only in capitals"),
            (("cat", "cat "), "'cat' and 'cat ' differ only"),
            (("tea pot", "tea  pot"), "differ only in capitals, spaces or the form"),
            (("caf\u00e9", "cafe\u0301 "), "differ only"),
            (("Stra\u00dfe", "STRASSE"), "differ only"),
            (("1\u00b2", "12"), "differ only"),
            (("cat", "cat\u200b"), "differ only"),
        ],
    )
    def test_they_are_refused(self, folders: tuple[str, ...], message: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=message):
            AudioFolder(sounds(tmp_path, *folders))

    def test_the_advice_for_folds_can_be_followed(self, tmp_path: Path) -> None:
        sounds(tmp_path, "fold1/cat", "fold1/dog", "fold2/cat", "fold2/dog")
        with pytest.raises(DataError, match=r"--data.pattern") as error:
            open_source(tmp_path)
        source = open_source(tmp_path, pattern=str(error.value).split("'")[1])
        assert source.classes == ("cat", "dog") and source.folds == ("1", "2")

    @pytest.mark.parametrize(
        "folders",
        [
            ("train", "bus", "tram"),  # a class called train
            ("cat/rex", "cat/tom", "dog/ann"),
            ("speech/ann", "speech/bob", "noise"),
            ("test tone", "sweep"),
            ("fold", "unfold"),
            ("C", "c#"),
            ("digit1", "digit2"),
            ("0", "1", "2", "10"),
        ],
    )
    def test_classes_are_not(self, folders: tuple[str, ...], tmp_path: Path) -> None:
        source = AudioFolder(sounds(tmp_path, *folders))
        assert set(source.classes) == {folder.partition("/")[0] for folder in folders}

    def test_system_folders_are_omitted_and_numbers_ordered_by_value(self, tmp_path: Path) -> None:
        sounds(tmp_path, "2", "10", "__MACOSX/2", "2/@eaDir/x", "$RECYCLE.BIN")
        source = AudioFolder(tmp_path)
        assert source.classes == ("2", "10") and len(source) == 4
        assert {why for _, why in source.skipped} == {"system folder"}

    def test_the_folder_of_one_class(self, tmp_path: Path) -> None:
        sounds(tmp_path, "dog", "cat")
        with pytest.raises(DataError, match=f"if 'dog' is one of the classes, give {tmp_path}$"):
            AudioFolder(tmp_path / "dog")

    def test_a_class_folder_that_cannot_be_read(self, tmp_path: Path, monkeypatch) -> None:
        from aatjax.audio import listing

        sounds(tmp_path, "cat", "dog", "owl")
        scan = listing.os.scandir

        def refuse(path):
            if Path(path).name == "owl":
                raise PermissionError(13, "Permission denied")
            return scan(path)

        monkeypatch.setattr(listing.os, "scandir", refuse)
        with pytest.raises(DataError, match=r"the folder 'owl' cannot be read .*class would be"):
            AudioFolder(tmp_path)


def test_spellings_are_folded() -> None:
    assert fold_spelling(" Tea\u00a0\u200bPot ") == fold_spelling("tea  pot") == "tea pot"


class TestListFiles:
    def write(self, root: Path, text: str | bytes, name: str = "testing_list.txt") -> Path:
        data = text if isinstance(text, bytes) else text.encode()
        (sounds(root, "0", "1") / name).write_bytes(data)
        return root

    def test_one_that_names_no_file(self, tmp_path: Path) -> None:
        root = self.write(tmp_path, "\nzero/0.wav\none/1.wav\n")
        with pytest.raises(
            DataError, match=r"testing_list.txt: line 2: no such file: 'zero/0.wav' .*of 2 lines"
        ):
            open_source(root)

    def test_lines_that_name_no_file_are_counted(self, tmp_path: Path) -> None:
        source = open_source(self.write(tmp_path, "0/0.wav\n0/7.wav\n1/8.wav\n"))
        assert splits(source) == {"train": 3, "test": 1}
        text = "no such file: '0/7.wav' (2 lines of this kind)"
        assert source.skipped[-1] == ("testing_list.txt: line 2", text)

    @pytest.mark.parametrize("name", ["testing_list.txt", "validation_list.txt"])
    def test_one_that_is_not_utf_8(self, name: str, tmp_path: Path) -> None:
        root = self.write(tmp_path, b"0/0.wav\n1/caf\xe9.wav\n", name)
        with pytest.raises(DataError, match=f"{name}: line 2 is not UTF-8"):
            open_source(root)

    def test_an_empty_one(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"names no file: list one path per line, or remove it"):
            open_source(self.write(tmp_path, "\n \n"))

    @pytest.mark.parametrize("text", ["\ufeff./0/0.wav\r\n", "0\\0.wav", "0/0.wav\n\n"])
    def test_ways_to_write_a_path(self, text: str, tmp_path: Path) -> None:
        assert splits(open_source(self.write(tmp_path, text))) == {"train": 3, "test": 1}

    def test_accents_in_either_form(self, tmp_path: Path) -> None:
        sound(tmp_path / "0" / unicodedata.normalize("NFD", "\u00e9.wav"))
        root = self.write(tmp_path, unicodedata.normalize("NFC", "0/\u00e9.wav"))
        assert splits(open_source(root))["test"] == 1
