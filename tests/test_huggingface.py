"""Data sets as `datasets` and the Hub write them: rows, labels and sounds come back as written."""

import csv
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from aatjax.data.decode_cache import decode_all
from aatjax.data.folders import AudioFolder
from aatjax.data.huggingface.dataset import HuggingFace, is_hub_dataset
from aatjax.errors import DataError, UnavailableError, WriteError

NAMES = ["zebra", "ape", "cow"]
LABEL = {"names": NAMES, "_type": "ClassLabel"}
AUDIO = {"sampling_rate": 16000, "_type": "Audio"}
SOUND = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
DAMAGED = "cannot be read: .*copy or download it again"


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    """The user's cache, which is elsewhere in tests."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "aatjax" / "huggingface"


def wave(i):
    return np.random.default_rng(i).integers(-9000, 9000, 1000 + i).astype(np.int16)


def content(i, format="WAV"):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave(i), 16000, format=format, subtype="PCM_16")
    return buffer.getvalue()


def sound(i, path=None):
    return {"bytes": content(i), "path": path}


def table(audio, label, features=None, kind=SOUND, label_kind=None, name="label", **more):
    """A table as `datasets` makes it, with its features in the metadata of the schema."""
    columns = {
        "audio": pyarrow.array(audio, kind),
        name: pyarrow.array(label, label_kind),
        **{key: pyarrow.array(values) for key, values in more.items()},
    }
    made = pyarrow.table(columns)
    if features is None:
        return made
    about = json.dumps({"info": {"features": {"audio": AUDIO, **features}}})
    return made.replace_schema_metadata({"huggingface": about})


def parquet(path, made):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(made, path)
    return path


def saved(folder, tables, features):
    """A folder as save_to_disk writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, made in zip(names, tables, strict=True):
        with (
            (folder / name).open("wb") as file,
            pyarrow.ipc.new_stream(file, made.schema) as stream,
        ):
            stream.write_table(made, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    info = {"citation": "", "features": {"audio": AUDIO, **features}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def recording(path, i):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(i))


def sheet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def same(source, numbers):
    """Whether the clips hold these waves, in this order."""
    assert len(source) == len(numbers)
    for i, number in enumerate(numbers):
        np.testing.assert_array_equal(source.waveform(i), wave(number))
    return True


def labels(source):
    return [tuple(source.classes[c] for c in clip.label) for clip in source.clips]


class TestParquet:
    @pytest.mark.parametrize("inside", [".", "data", "default", "plain/data"])
    def test_shards_splits_names_and_sounds(self, tmp_path, inside):
        folder = tmp_path / "set" / inside
        shards = {
            "train-00000-of-00002": ([0, 1], [2, 0]),
            "train-00001-of-00002": ([2], [2]),
            "validation-00000-of-00001": ([3], [0]),
            "test-00000-of-00001": ([4, 5], [2, 0]),
        }
        for name, (numbers, label) in shards.items():
            audio = [sound(i, f"s{i}.wav") for i in numbers]
            parquet(folder / f"{name}.parquet", table(audio, label, {"label": LABEL}))
        assert is_hub_dataset(tmp_path / "set")
        source = HuggingFace(tmp_path / "set")
        assert source.classes == tuple(NAMES)  # their order, and the one that does not occur
        assert source.name == "set" and not source.multi_label and not source.skipped
        ids = ["test/s4.wav", "test/s5.wav", "train/s0.wav", "train/s1.wav", "train/s2.wav"]
        assert [clip.id for clip in source.clips] == [*ids, "valid/s3.wav"]
        assert [clip.split for clip in source.clips] == ["test"] * 2 + ["train"] * 3 + ["valid"]
        assert [clip.label for clip in source.clips] == [(2,), (0,), (2,), (0,), (2,), (0,)]
        assert same(source, [4, 5, 0, 1, 2, 3])
        assert all(clip.fold is None and clip.group is None for clip in source.clips)

    def test_one_file_without_a_split(self, tmp_path):
        made = table([sound(0), sound(1)], ["dog", "cat"], fold=[2.0, 1.0], speaker_id=[7, None])
        source = HuggingFace(parquet(tmp_path / "sounds.parquet", made))
        assert source.name == "sounds" and source.classes == ("cat", "dog")
        assert [clip.id for clip in source.clips] == ["row-0", "row-1"]
        assert [clip.split for clip in source.clips] == [None, None]
        assert [clip.fold for clip in source.clips] == ["2", "1"]
        assert [clip.group for clip in source.clips] == ["7", None]
        assert same(source, [0, 1])

    def test_names_that_repeat_are_replaced_by_row_numbers_across_shards(self, tmp_path):
        for k, paths in enumerate((["a.wav", "/home/x/b.wav"], ["a.wav", "row-1"])):
            made = table([sound(2 * k + i, p) for i, p in enumerate(paths)], ["x", "y"])
            parquet(tmp_path / f"train-0000{k}-of-00002.parquet", made)
        source = HuggingFace(tmp_path)
        assert [clip.id for clip in source.clips] == [
            *("train/row-0", "train/b.wav"),
            *("train/row-2", "train/row-3"),
        ]
        assert same(source, [0, 1, 2, 3])

    @pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()])
    def test_plain_bytes(self, tmp_path, kind):
        made = table([content(0), content(1, "FLAC"), b"", None], [0, 10, 2, 2], kind=kind)
        source = HuggingFace(parquet(tmp_path / "train.parquet", made))
        assert source.classes == ("0", "10") and same(source, [0, 1])
        assert [Path(str(clip.path)).suffix for clip in source.clips] == [".wav", ".flac"]
        assert source.skipped == tuple((f"train.parquet: row {i}", "no sound") for i in (2, 3))

    def test_numbers_without_names_are_sorted_by_value(self, tmp_path):
        made = table([sound(i) for i in range(3)], [10, 9, 2])
        source = HuggingFace(parquet(tmp_path / "a.parquet", made))
        assert source.classes == ("2", "9", "10")
        assert [clip.label for clip in source.clips] == [(2,), (1,), (0,)]

    @pytest.mark.parametrize("inside", ["data/train/0000.parquet", "default/train/0000.parquet"])
    def test_the_folder_may_name_the_split(self, tmp_path, inside):
        parquet(tmp_path / inside, table([sound(0)], ["x"]))
        assert [clip.split for clip in HuggingFace(tmp_path).clips] == ["train"]

    def test_paths_are_relative_to_the_file_or_the_folder(self, tmp_path):
        recording(tmp_path / "data" / "a.wav", 0)
        recording(tmp_path / "wav" / "b.wav", 1)
        made = table(["a.wav", "wav/b.wav"], ["x", "y"], kind=pyarrow.string())
        parquet(tmp_path / "data" / "test.parquet", made)
        assert is_hub_dataset(tmp_path)
        source = HuggingFace(tmp_path, label="label")
        assert [clip.id for clip in source.clips] == ["test/a.wav", "test/wav/b.wav"]
        assert same(source, [0, 1])
        made = table([{"bytes": None, "path": "wav/b.wav"}], ["x"])
        parquet(tmp_path / "data" / "test.parquet", made)
        assert same(HuggingFace(tmp_path), [1])

    @pytest.mark.parametrize("shape", ["Sequence", "List", "plain list"])
    def test_lists_make_a_multi_label_set(self, tmp_path, shape):
        feature = [LABEL] if shape == "plain list" else {"feature": LABEL, "_type": shape}
        made = table(
            [sound(i) for i in range(5)],
            [[2, 0], [], [1, 1], None, [0, None]],
            {"labels": feature},
            label_kind=pyarrow.list_(pyarrow.int64()),
            name="labels",
        )
        source = HuggingFace(parquet(tmp_path / "train.parquet", made))
        assert source.multi_label and source.classes == tuple(NAMES)
        assert [clip.label for clip in source.clips] == [(0, 2), (), (1,)]
        np.testing.assert_array_equal(source.targets(), [[1, 0, 1], [0, 0, 0], [0, 1, 0]])
        assert [why for _, why in source.skipped] == ["no label", "no label"]

    def test_lists_of_names(self, tmp_path):
        made = table([sound(0), sound(1)], [["b", "a"], ["c"]])
        source = HuggingFace(parquet(tmp_path / "train.parquet", made))
        assert source.multi_label and labels(source) == [("a", "b"), ("c",)]

    def test_rows_without_sound_or_label_are_left_out(self, tmp_path):
        audio = [None, {"bytes": None, "path": None}, sound(2), sound(3), sound(4), sound(5)]
        made = table(audio, [0, 0, -1, None, 1, 0], {"label": LABEL})
        source = HuggingFace(parquet(tmp_path / "test-00000-of-00001.parquet", made))
        assert source.skipped == (
            ("test-00000-of-00001.parquet: row 0", "no sound"),
            ("test-00000-of-00001.parquet: row 1", "no sound"),
            ("test-00000-of-00001.parquet: row 2", "label -1: kept secret"),
            ("test-00000-of-00001.parquet: row 3", "no label"),
        )
        assert [clip.id for clip in source.clips] == ["test/row-4", "test/row-5"]
        assert labels(source) == [("ape",), ("zebra",)] and same(source, [4, 5])
        made = table([sound(0)], [-1], {"label": LABEL})
        with pytest.raises(DataError, match=r"no clip; rows skipped: 1, such as .*row 0"):
            HuggingFace(parquet(tmp_path / "secret" / "test.parquet", made))

    def test_names_of_two_files_go_by_name(self, tmp_path):
        other = {"names": ["cow", "emu"], "_type": "ClassLabel"}
        parquet(tmp_path / "test.parquet", table([sound(0)], [1], {"label": other}))
        parquet(tmp_path / "train.parquet", table([sound(1)], [2], {"label": LABEL}))
        source = HuggingFace(tmp_path)
        assert source.classes == ("cow", "emu", "zebra", "ape")
        assert labels(source) == [("emu",), ("cow",)]
        parquet(tmp_path / "train.parquet", table([sound(1)], [2]))
        with pytest.raises(DataError, match=r"train\.parquet: row 0: label '2' is not one of"):
            HuggingFace(tmp_path)

    def test_several_configurations_are_not_mixed(self, tmp_path):
        for name in ("de", "en"):
            parquet(tmp_path / name / "train.parquet", table([sound(0)], ["x"]))
        assert is_hub_dataset(tmp_path)
        with pytest.raises(DataError, match=r"2 configurations: de, en; open one .*/de"):
            HuggingFace(tmp_path)
        assert len(HuggingFace(tmp_path / "en")) == 1


class TestColumns:
    def test_the_only_class_label_is_the_label(self, tmp_path):
        made = table([sound(0)], [1], {"animal": LABEL}, name="animal", text=["hello"])
        assert labels(HuggingFace(parquet(tmp_path / "a.parquet", made))) == [("ape",)]

    def test_the_columns_can_be_named(self, tmp_path):
        made = table([sound(0)], [1], {"label": LABEL}, mood=["glad"])
        about = made.schema.metadata  # it still names `audio`, which is no column any more
        made = made.rename_columns(["noise", "label", "mood"]).replace_schema_metadata(about)
        file = parquet(tmp_path / "a.parquet", made)
        assert labels(HuggingFace(file)) == [("ape",)]  # the only column with sound
        assert labels(HuggingFace(file, audio="noise", label="mood")) == [("glad",)]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {},
                "no column 'label' or 'labels', did you mean 'lable'.; the columns are",
            ),
            ({"label": "txt"}, "no column 'txt', did you mean 'text'.; the columns are .*label="),
            ({"audio": "wave", "label": "text"}, "no column 'wave'; the columns are .*audio="),
            (
                {"audio": "text", "label": "lable"},
                "named files are missing .*first 'hello' .*row 0",
            ),
            ({"audio": "lable", "label": "text"}, "column 'lable': holds a int, not sound"),
            ({"label": "audio"}, "row 0, column 'audio': .* is no label"),
        ],
    )
    def test_a_wrong_column_is_reported_in_one_line(self, tmp_path, options, message):
        made = table([sound(0)], [1], name="lable", text=["hello"])
        file = parquet(tmp_path / "a.parquet", made)
        with pytest.raises(DataError, match=message) as caught:
            HuggingFace(file, **options)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)

    @pytest.mark.parametrize("wrong", [3, -2])
    def test_a_label_out_of_range(self, tmp_path, wrong):
        file = parquet(tmp_path / "a.parquet", table([sound(0)] * 2, [0, wrong], {"label": LABEL}))
        message = f"a.parquet: row 1, column 'label': label {wrong} is not among the 3 classes"
        with pytest.raises(DataError, match=message):
            HuggingFace(file)

    def test_decoded_arrays_are_no_sound_files(self, tmp_path):
        made = table([{"array": [0.5], "sampling_rate": 16000}], ["x"], kind=None)
        file = parquet(tmp_path / "a.parquet", made)
        with pytest.raises(DataError, match="the fields array, sampling_rate, but neither bytes"):
            HuggingFace(file)


class TestSavedToDisk:
    def test_one_data_set(self, tmp_path):
        tables = [
            table([sound(2 * k, "a.wav"), sound(2 * k + 1)], [2, 0], source=["u", "v"])
            for k in (0, 1)
        ]
        folder = saved(tmp_path / "set", tables, {"label": LABEL})
        assert is_hub_dataset(folder)
        source = HuggingFace(folder)
        assert source.classes == tuple(NAMES) and labels(source) == [("cow",), ("zebra",)] * 2
        assert [clip.id for clip in source.clips] == ["row-0", "row-1", "row-2", "row-3"]
        assert [clip.group for clip in source.clips] == ["u", "v"] * 2
        assert all(clip.split is None for clip in source.clips) and same(source, [0, 1, 2, 3])

    def test_several_splits(self, tmp_path):
        for k, part in enumerate(("train", "validation", "odd one")):
            made = table([sound(k, f"{k}.wav")], [k], {"label": LABEL})
            saved(tmp_path / part, [made], {"label": LABEL})
        about = {"splits": ["train", "validation", "odd one"]}
        (tmp_path / "dataset_dict.json").write_text(json.dumps(about))
        assert is_hub_dataset(tmp_path)
        source = HuggingFace(tmp_path)
        assert [clip.id for clip in source.clips] == ["train/0.wav", "valid/1.wav", "odd one/2.wav"]
        assert [clip.split for clip in source.clips] == ["train", "valid", None]
        assert labels(source) == [(name,) for name in NAMES] and same(source, [0, 1, 2])
        for hostile in (["../set"], ["/etc"], [".."], "train", [3]):
            (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": hostile}))
            with pytest.raises(DataError, match="lists no splits"):
                HuggingFace(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "state.json: cannot be read: not JSON"),
            ("[]", "state.json: cannot be read: not a JSON object"),
            ("{}", "state.json lists no data files"),
            ('{"_data_files": [{"filename": "../x.arrow"}]}', "state.json lists no data files"),
            ('{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow: cannot be read"),
        ],
    )
    def test_a_wrong_state(self, tmp_path, text, message):
        folder = saved(tmp_path / "set", [table([sound(0)], [0])], {"label": LABEL})
        (folder / "state.json").write_text(text)
        with pytest.raises(DataError, match=message):
            HuggingFace(folder)


class TestSoundFolder:
    @pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
    def test_metadata_at_the_root(self, tmp_path, kind):
        rows = [
            ("train/b.wav", "dog", "r1", 0),
            ("train/deep/a.wav", "cat", "r2", 1),
            ("test/a.wav", "dog", "r3", 2),
        ]
        for name, _, _, i in rows:
            recording(tmp_path / name, i)
        recording(tmp_path / "train" / "unnamed.wav", 9)
        file = tmp_path / f"metadata.{kind}"
        keys = ("file_name", "label", "speaker")
        if kind == "csv":
            sheet(file, [keys, *(row[:3] for row in rows)])
        elif kind == "jsonl":
            lines = [json.dumps(dict(zip(keys, row, strict=False))) for row in rows]
            file.write_text("\n".join(lines))
        else:
            parquet(file, pyarrow.table({k: [r[i] for r in rows] for i, k in enumerate(keys)}))
        assert is_hub_dataset(tmp_path)
        source = HuggingFace(tmp_path)
        assert source.classes == ("cat", "dog") and labels(source) == [(r[1],) for r in rows]
        assert [clip.id for clip in source.clips] == [row[0] for row in rows]
        assert [clip.path for clip in source.clips] == [str(tmp_path / row[0]) for row in rows]
        assert [clip.split for clip in source.clips] == ["train", "train", "test"]
        assert [clip.group for clip in source.clips] == ["r1", "r2", "r3"]
        assert source.skipped == (("train/unnamed.wav", "not named in the metadata"),)
        assert same(source, [0, 1, 2])

    def test_metadata_in_each_split_folder(self, tmp_path):
        for k, part in enumerate(("train", "dev")):
            recording(tmp_path / part / "a.wav", k)
            sheet(tmp_path / part / "metadata.csv", [["file_name", "Mood"], ["a.wav", "glad"]])
        assert is_hub_dataset(tmp_path)
        source = HuggingFace(tmp_path, label="Mood")
        found = {clip.id: clip.split for clip in source.clips}
        assert found == {"train/a.wav": "train", "dev/a.wav": "valid"}
        assert source.classes == ("glad",)
        with pytest.raises(DataError, match="the columns are file_name, mood; choose one"):
            HuggingFace(tmp_path)

    def test_numbers_lists_and_secrets(self, tmp_path):
        for i in range(3):
            recording(tmp_path / f"{i}.wav", i)
        rows = [["0.wav", "10"], ["1.wav", "-1"], ["2.wav", ""]]
        sheet(tmp_path / "metadata.csv", [["file_name", "label"], *rows])
        source = HuggingFace(tmp_path)
        assert source.classes == ("10",)
        assert source.skipped[:2] == (
            ("metadata.csv: row 3", "label -1: kept secret"),
            ("metadata.csv: row 4", "no label"),
        )
        (tmp_path / "metadata.csv").unlink()
        lines = [{"file_name": "0.wav", "label": ["b", "a"]}, {"file_name": "1.wav", "label": []}]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        source = HuggingFace(tmp_path)
        assert source.multi_label and labels(source) == [("a", "b"), ()]

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("../secret.wav", "leads out of the folder"),
            ("in/../../secret.wav", "leads out of the folder"),
            ("in\\..\\..\\secret.wav", "leads out of the folder"),
            ("/etc/passwd", "is not a path relative to the folder"),
            ("C:\\secret.wav", "is not a path relative to the folder"),
            ("link.wav", "is a link out of the folder"),
            ("in/a.wav", "is named before, in .*row 2"),
            ("gone.wav", "row 3"),
        ],
    )
    def test_a_path_that_leaves_the_folder_is_refused(self, tmp_path, name, why):
        recording(tmp_path / "secret.wav", 0)
        recording(tmp_path / "set" / "in" / "a.wav", 1)
        (tmp_path / "set" / "link.wav").symlink_to(tmp_path / "secret.wav")
        rows = [["file_name", "label"], ["in/a.wav", "x"], [name, "x"]]
        sheet(tmp_path / "set" / "metadata.csv", rows)
        with pytest.raises(DataError, match=why) as caught:
            HuggingFace(tmp_path / "set")
        assert "metadata.csv: row 3" in str(caught.value) and "\n" not in str(caught.value)

    def test_split_folders_with_class_folders(self, tmp_path):
        names = ["train/dog/b.wav", "train/cat/deep/a.wav", "test/emu/a.wav", "test/cat/a.wav"]
        for i, name in enumerate(names):
            recording(tmp_path / name, i)
        recording(tmp_path / "train" / "loose.wav", 9)
        recording(tmp_path / "train" / "_background_noise_" / "hum.wav", 9)
        recording(tmp_path / "top.wav", 9)
        assert is_hub_dataset(tmp_path)
        source = HuggingFace(tmp_path)
        assert source.classes == ("cat", "dog", "emu")
        assert {c.id: (source.classes[c.label[0]], c.split) for c in source.clips} == {
            name: (name.split("/")[1], name.split("/")[0]) for name in names
        }
        order = sorted(range(4), key=names.__getitem__)
        assert same(source, order)
        assert set(source.skipped) == {
            ("train/loose.wav", "not in a class folder"),
            ("train/_background_noise_/hum.wav", "background noise"),
            ("top.wav", "not in a split folder"),
        }

    def test_a_snapshot_of_the_hubs_cache_is_links_to_blobs(self, tmp_path):
        root = tmp_path / "hub" / "snapshots" / "abc"
        blob = tmp_path / "hub" / "blobs" / "123"
        recording(blob, 0)
        (root / "train" / "dog").mkdir(parents=True)
        (root / "train" / "dog" / "a.wav").symlink_to(blob)
        assert is_hub_dataset(root) and same(HuggingFace(root), [0])
        sheet(root / "metadata.csv", [["file_name", "label"], ["train/dog/a.wav", "x"]])
        assert same(HuggingFace(root), [0])

    def test_two_metadata_files_or_a_broken_one(self, tmp_path):
        recording(tmp_path / "a.wav", 0)
        sheet(tmp_path / "metadata.csv", [["file_name", "label"], ["a.wav", "x", "y"]])
        with pytest.raises(DataError, match=r"metadata\.csv: row 2: 3 cells under 2 columns"):
            HuggingFace(tmp_path)
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.wav", "label": "x"}\n')
        with pytest.raises(DataError, match=r"has metadata\.csv and metadata\.jsonl; keep one"):
            HuggingFace(tmp_path)


class TestWrittenSounds:
    def test_they_lie_in_the_users_cache_and_are_written_once(self, tmp_path, user_cache):
        made = table([sound(0, "x.wav"), sound(1, "y.wav")], ["x", "y"])
        file = parquet(tmp_path / "train.parquet", made)
        first = HuggingFace(file)
        paths = [Path(str(clip.path)) for clip in first.clips]
        assert all(path.is_relative_to(user_cache) for path in paths)
        assert sorted(p for p in user_cache.rglob("*") if p.is_file()) == sorted(paths)
        for path in paths:
            os.utime(path, ns=(1, 1))
        second = HuggingFace(file)
        assert second.clips == first.clips
        assert [path.stat().st_mtime_ns for path in paths] == [1, 1]
        paths[0].write_bytes(bytes(paths[0].stat().st_size))  # the right size, and wrong
        paths[1].write_bytes(b"short")
        assert same(HuggingFace(file), [0, 1])

    def test_another_version_of_the_data_does_not_touch_them(self, tmp_path):
        file = tmp_path / "train.parquet"
        made = table([{"bytes": content(0)[:-2], "path": "x.wav"}], ["x"])
        parquet(file, table([sound(0, "x.wav")], ["x"]))
        first = HuggingFace(file, extract_to=tmp_path / "out")
        parquet(file, made)
        second = HuggingFace(file, extract_to=tmp_path / "out")
        assert Path(str(first.clips[0].path)).read_bytes() == content(0)
        assert Path(str(second.clips[0].path)).read_bytes() == content(0)[:-2]
        assert Path(str(first.clips[0].path)).is_relative_to(tmp_path / "out")

    @pytest.mark.parametrize(
        "hostile", ["../../../evil.wav", "/tmp/evil.wav", "a\nb.wav", "..", "x.wav/../.."]
    )
    def test_their_names_never_come_from_the_data(self, tmp_path, hostile):
        parquet(tmp_path / "set" / "train.parquet", table([sound(0, hostile)], ["x"]))
        source = HuggingFace(tmp_path / "set", extract_to=tmp_path / "out")
        (written,) = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
        assert source.clips[0].path == str(written) and written.stem == "0000000"
        assert ".." not in source.clips[0].id and source.clips[0].id.isprintable()
        assert same(source, [0])

    def test_the_decode_cache_takes_them(self, tmp_path):
        made = table([sound(0, "x.wav"), {"bytes": b"not sound", "path": None}], ["x", "y"])
        source = HuggingFace(parquet(tmp_path / "train.parquet", made))
        cached = decode_all(source, tmp_path / "decoded", max_bad=1)
        assert same(cached, [0]) and cached.skipped[0][0] == "train/row-1"

    def test_a_place_that_cannot_be_written(self, tmp_path):
        file = parquet(tmp_path / "train.parquet", table([sound(0)], ["x"]))
        (tmp_path / "out").write_text("a file")
        with pytest.raises(WriteError, match="cannot be written"):
            HuggingFace(file, extract_to=tmp_path / "out")


class TestDamage:
    @pytest.mark.parametrize("cut", [0, 3, 100, -30])
    def test_a_cut_parquet_file(self, tmp_path, cut):
        file = parquet(tmp_path / "train.parquet", table([sound(0)], ["x"]))
        file.write_bytes(file.read_bytes()[:cut])
        assert is_hub_dataset(tmp_path)
        with pytest.raises(DataError, match=f"{file}: {DAMAGED}") as caught:
            HuggingFace(tmp_path)
        assert "\n" not in str(caught.value)

    def test_parquet_with_a_broken_middle(self, tmp_path):
        file = parquet(tmp_path / "train.parquet", table([sound(0)], ["x"]))
        good = file.read_bytes()
        file.write_bytes(good[:4] + b"\xff" * 200 + good[204:])
        with pytest.raises(DataError, match=f"{file}: {DAMAGED}"):
            HuggingFace(file)

    @pytest.mark.parametrize("cut", [0, 40, -700])
    def test_a_cut_arrow_file(self, tmp_path, cut):
        folder = saved(tmp_path / "set", [table([sound(0)], [0])], {"label": LABEL})
        file = folder / "data-00000-of-00001.arrow"
        file.write_bytes(file.read_bytes()[:cut])
        with pytest.raises(DataError, match=f"{file}: {DAMAGED}"):
            HuggingFace(folder)

    def test_without_pyarrow_the_message_names_the_extra(self, tmp_path, monkeypatch):
        file = parquet(tmp_path / "train.parquet", table([sound(0)], ["x"]))
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        assert is_hub_dataset(file)
        with pytest.raises(UnavailableError, match=r"pip install 'aatjax\[huggingface\]'"):
            HuggingFace(file)
        recording(tmp_path / "csv" / "a.wav", 0)
        sheet(tmp_path / "csv" / "metadata.csv", [["file_name", "label"], ["a.wav", "x"]])
        assert same(HuggingFace(tmp_path / "csv"), [0])

    def test_a_pointer_of_git_lfs(self, tmp_path):
        file = tmp_path / "train.parquet"
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(DataError, match="a Git LFS pointer, not a table: run `git lfs pull`"):
            HuggingFace(file)

    def test_what_is_not_there_or_not_a_set(self, tmp_path):
        with pytest.raises(DataError, match="gone: no such file or folder"):
            HuggingFace(tmp_path / "gone")
        with pytest.raises(DataError, match="not a data set of Hugging Face's; expected"):
            HuggingFace(tmp_path)


class TestLooksLike:
    def test_class_folders_are_left_to_audio_folder(self, tmp_path):
        recording(tmp_path / "dog" / "a.wav", 0)
        recording(tmp_path / "train" / "a.wav", 1)  # a class of this name
        recording(tmp_path / "train" / "far" / "a.wav", 2)
        assert not is_hub_dataset(tmp_path)
        sheet(tmp_path / "metadata.csv", [["name", "label"], ["dog/a.wav", "dog"]])
        (tmp_path / "metadata.jsonl").write_text("3\n")
        parquet(tmp_path / "features.parquet", pyarrow.table({"mean": [0.5]}))
        parquet(tmp_path / "dog" / "features.parquet", pyarrow.table({"mean": [0.5]}))
        assert not is_hub_dataset(tmp_path)
        assert AudioFolder(tmp_path).classes == ("dog", "train")

    def test_esc_is_left_to_esc(self, tmp_path):
        recording(tmp_path / "audio" / "1-1-A-0.wav", 0)
        sheet(tmp_path / "meta" / "esc50.csv", [["filename", "fold"], ["1-1-A-0.wav", "1"]])
        assert not is_hub_dataset(tmp_path)

    def test_other_places(self, tmp_path):
        recording(tmp_path / "train" / "a.wav", 0)
        sheet(tmp_path / "list.csv", [["file_name", "label"], ["train/a.wav", "x"]])
        for path in (tmp_path, tmp_path / "list.csv", tmp_path / "gone", tmp_path / "train"):
            assert not is_hub_dataset(path)
        assert is_hub_dataset(parquet(tmp_path / "x.parquet", table([sound(0)], ["x"])))
