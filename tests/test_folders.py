"""Sources: layouts on disk, labels, splits, folds, and the messages about bad folders."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile

from aatjax.data import splits
from aatjax.data.folders import ESC, AudioFolder, NamePattern
from aatjax.data.source import Clip, Reader, Source
from aatjax.data.splits import stratify
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.data.synthetic.synthesize import SOUNDS
from aatjax.errors import DataError, UsageError


def tone(path, pitch=440.0, seconds=0.1, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(int(seconds * rate)) / rate
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch * time), rate, format="WAV")
    return path


def listed(labels, groups=None, folds=None, splits=None, multi_label=False):
    """A source of clips in memory; labels are ints, or tuples of them."""
    n = len(labels)
    rows = zip(labels, groups or [None] * n, folds or [None] * n, splits or [None] * n, strict=True)
    clips = [
        Clip(f"c{i:03d}", x if isinstance(x, tuple) else (x,), None, fold, split, group)
        for i, (x, group, fold, split) in enumerate(rows)
    ]
    classes = [f"k{c}" for c in range(1 + max(max(clip.label, default=0) for clip in clips))]
    return Source(clips, classes, name="listed", multi_label=multi_label)


class TestAudioFolder:
    def test_classes_are_sorted_and_every_clip_keeps_its_label(self, tmp_path):
        for name, pitch in (("dog", 300), ("bird", 3000), ("cat", 900)):
            tone(tmp_path / name / "a.wav", pitch)
            tone(tmp_path / name / "deep" / "er" / "b.WAV", pitch)
        source = AudioFolder(tmp_path)
        assert source.classes == ("bird", "cat", "dog")
        assert [clip.id for clip in source.clips] == [
            f"{name}/{file}" for name in source.classes for file in ("a.wav", "deep/er/b.WAV")
        ]
        assert len(source) == 6 and not source.multi_label and source.name == tmp_path.name
        for i, clip in enumerate(source.clips):
            assert source.classes[clip.label[0]] == clip.id.split("/")[0]
            wave = source.waveform(i)
            assert wave.dtype == np.int16 and wave.shape == (1600,)
            peak = np.abs(np.fft.rfft(wave)).argmax() * 10
            assert peak == {"bird": 3000, "cat": 900, "dog": 300}[clip.id.split("/")[0]]
        np.testing.assert_array_equal(source.targets(), np.repeat(np.eye(3), 2, axis=0))
        assert source.targets().dtype == np.float32

    def test_b10_b13_what_is_no_clip_is_skipped_with_a_reason(self, tmp_path):
        tone(tmp_path / "dog" / "a.wav")
        tone(tmp_path / "dog" / "no_extension")
        tone(tmp_path / "dog" / ".hidden.wav")
        tone(tmp_path / ".cache" / "a.wav")
        tone(tmp_path / "_background_noise_" / "hum.wav")
        tone(tmp_path / "top.wav")
        (tmp_path / "dog" / "notes.txt").write_text("bark")
        (tmp_path / "empty").mkdir()
        (tmp_path / "dog" / "loop").symlink_to(tmp_path / "dog", target_is_directory=True)
        os.mkfifo(tmp_path / "dog" / "pipe.wav")
        source = AudioFolder(tmp_path)
        assert [clip.id for clip in source.clips] == ["dog/a.wav", "dog/no_extension"]
        assert source.classes == ("dog",)
        reasons = dict(source.skipped)
        assert reasons["top.wav"] == "not in a class folder"
        assert reasons["_background_noise_/hum.wav"] == "background noise"
        assert reasons["empty"] == "no audio in this folder"
        assert {"dog/notes.txt", "dog/loop", "dog/pipe.wav"} <= set(reasons)

    def test_b12_strange_names_all_work(self, tmp_path):
        names = [
            "with space.wav",
            "quote\"'.wav",
            "semi;colon,comma.wav",
            "line\nbreak.wav",
            "-dash.wav",
            "caf\u00e9.wav",
            "cafe\u0301.wav",
            "x" * 251 + ".wav",
        ]
        for name in names:
            tone(tmp_path / "a b" / name)
        raw = os.fsencode(tmp_path / "a b") + b"/\xff\xfe.wav"
        os.rename(tone(tmp_path / "a b" / "tmp.wav"), raw)
        source = AudioFolder(tmp_path)
        assert len(source) == len(names) + 1
        assert all(len(source.waveform(i)) == 1600 for i in range(len(source)))
        assert len(source.fingerprint()) == 64

    def test_b18_unusable_folders_say_what_is_expected(self, tmp_path):
        with pytest.raises(DataError, match="no such folder; expected a folder with root/<class>"):
            AudioFolder(tmp_path / "none")
        with pytest.raises(DataError, match="is a file, not a folder"):
            AudioFolder(tone(tmp_path / "x" / "a.wav"))
        (tmp_path / "y").mkdir()
        with pytest.raises(DataError, match=r"the folder is empty; .*root/<class>/<file>"):
            AudioFolder(tmp_path / "y")
        with pytest.raises(DataError, match="found 1 audio file; one folder"):
            AudioFolder(tmp_path / "x")
        tone(tmp_path / "z" / "train" / "dog" / "a.wav")
        tone(tmp_path / "z" / "test" / "dog" / "b.wav")
        with pytest.raises(DataError, match=r"look like parts of a set.*test=.*z/test$"):
            AudioFolder(tmp_path / "z")

    def test_speech_commands_lists_and_speakers(self, tmp_path):
        for k, word in enumerate(("yes", "no")):
            for speaker in ("aa11", "bb22", "cc33"):
                tone(tmp_path / word / f"{speaker}_nohash_{k}.wav")
        (tmp_path / "testing_list.txt").write_text("yes/aa11_nohash_0.wav\nno/aa11_nohash_1.wav\n")
        (tmp_path / "validation_list.txt").write_text("yes/bb22_nohash_0.wav\r\nyes/not_here.wav\n")
        source = AudioFolder(tmp_path)
        assert {clip.id: clip.split for clip in source.by_split("test").clips} == {
            "yes/aa11_nohash_0.wav": "test",
            "no/aa11_nohash_1.wav": "test",
        }
        assert [clip.id for clip in source.by_split("valid").clips] == ["yes/bb22_nohash_0.wav"]
        assert len(source.by_split("train")) == 3
        assert [why for name, why in source.skipped if name.endswith("_list.txt")] == []
        assert [clip.group for clip in source.clips] == ["aa11", "bb22", "cc33"] * 2
        assert source.leaks("split") == {"bb22": ["train", "valid"]}
        with pytest.raises(UsageError, match="no split 'dev'; there are test, train, valid"):
            source.by_split("dev")
        (tmp_path / "validation_list.txt").write_text("yes/aa11_nohash_0.wav")
        with pytest.raises(DataError, match=r"aa11_nohash_0.wav' is in both"):
            AudioFolder(tmp_path)


class TestNamePattern:
    def test_labels_groups_and_folds_come_from_the_name(self, tmp_path):
        for name in ("10_ann_0", "9_ann_0", "9_bob_1", "10_bob_1"):
            tone(tmp_path / f"{name}.wav")
        tone(tmp_path / "other.wav")
        source = NamePattern(tmp_path, r"(?P<label>\d+)_(?P<group>\w+)_(?P<fold>\d)\.wav")
        assert source.classes == ("9", "10")
        assert [(c.id, c.label, c.group, c.fold) for c in source.clips] == [
            ("10_ann_0.wav", (1,), "ann", "0"),
            ("10_bob_1.wav", (1,), "bob", "1"),
            ("9_ann_0.wav", (0,), "ann", "0"),
            ("9_bob_1.wav", (0,), "bob", "1"),
        ]
        assert source.skipped == (("other.wav", "name does not match the pattern"),)
        assert source.folds == ("0", "1")

    def test_urbansound_folders(self, tmp_path):
        tone(tmp_path / "fold1" / "100-3-0-0.wav")
        tone(tmp_path / "fold10" / "101-0-0-2.wav")
        source = NamePattern(tmp_path, r"fold(?P<fold>\d+)/(?P<group>\d+)-(?P<label>\d)-.*")
        assert [(c.fold, c.group) for c in source.clips] == [("1", "100"), ("10", "101")]
        assert source.folds == ("1", "10") and source.classes == ("0", "3")

    def test_bad_patterns_and_labels(self, tmp_path):
        tone(tmp_path / "1_a.wav")
        with pytest.raises(UsageError, match="no regular expression"):
            NamePattern(tmp_path, "(")
        with pytest.raises(UsageError, match=r"needs \(\?P<label>"):
            NamePattern(tmp_path, r"(\d)_.*")
        with pytest.raises(UsageError, match="speaker"):
            NamePattern(tmp_path, r"(?P<label>\d)_(?P<speaker>.).*")
        with pytest.raises(DataError, match=r"such as '1_a.wav'; no name matches the pattern"):
            NamePattern(tmp_path, r"(?P<label>\d\d)_.*")
        with pytest.raises(DataError, match="label '1' is not one of the classes 2, 3"):
            NamePattern(tmp_path, r"(?P<label>\d)_.*", classes=["2", "3"])


class TestESC:
    HEAD = "filename,fold,target,category,esc10,src_file,take\n"

    def write(self, root, rows, head=HEAD):
        (root / "meta").mkdir(exist_ok=True)
        (root / "meta" / "esc50.csv").write_text(head + "\n".join(rows) + "\n")
        for row in rows:
            tone(root / "audio" / row.partition(",")[0])

    def test_classes_follow_the_target_and_folds_hold(self, tmp_path):
        rows = ["1-7-A-38.wav,1,38,clock_tick,True,7,A", "2-8-A-2.wav,2,2,pig,False,8,A"]
        self.write(tmp_path, [*rows, "2-9-A-2.wav,2,2,pig,False,9,A"])
        source = ESC(tmp_path)
        assert source.classes == ("pig", "clock_tick")
        assert [(c.label, c.fold, c.group) for c in source.clips] == [
            ((1,), "1", "7"),
            ((0,), "2", "8"),
            ((0,), "2", "9"),
        ]
        train, held_out = source.fold(1)
        assert [c.id for c in held_out.clips] == ["1-7-A-38.wav"] and len(train) == 2
        assert ESC(tmp_path, esc10=True).classes == ("clock_tick",)
        assert ESC(tmp_path, esc10=False).classes == ("pig",)

    def test_broken_tables_are_refused(self, tmp_path):
        with pytest.raises(DataError, match=r"esc50.csv: cannot be read"):
            ESC(tmp_path)
        rows = ["a.wav,1,0,dog,True,7,A", "b.wav,1,0,cat,True,8,A"]
        self.write(tmp_path, rows)
        with pytest.raises(DataError, match="category and target do not agree"):
            ESC(tmp_path)
        self.write(tmp_path, [rows[0], "b.wav,1,,cat,True,8,A"])
        with pytest.raises(DataError, match="row 3: empty cell in column 'target'"):
            ESC(tmp_path)
        self.write(tmp_path, ["a.wav,1,0"], head="filename,fold,target\n")
        with pytest.raises(DataError, match="lacks the columns category, esc10, src_file"):
            ESC(tmp_path)
        self.write(tmp_path, [rows[0], "gone.wav,1,0,dog,True,8,A"])
        (tmp_path / "audio" / "gone.wav").unlink()
        with pytest.raises(DataError, match=r"1 of the 2 files .* missing, first 'gone.wav'"):
            ESC(tmp_path)


class TestSynthetic:
    def test_a_clip_is_the_same_wherever_it_stands(self):
        one = Synthetic(["bark", "rain"], clips=3, seed=5, seconds=0.3)
        other = Synthetic(["rain", "bark"], clips=2, seed=5, seconds=0.3, first=1)
        assert [clip.id for clip in one.clips[:3]] == ["bark/00000", "bark/00001", "bark/00002"]
        waves = {clip.id: one.waveform(i) for i, clip in enumerate(one.clips)}
        assert all(wave.shape == (4800,) and wave.dtype == np.int16 for wave in waves.values())
        for i, clip in enumerate(other.clips):
            np.testing.assert_array_equal(other.waveform(i), waves[clip.id])
        assert one.classes[one[4].label[0]] == "rain"
        again = Synthetic(["bark", "rain"], clips=3, seed=6, seconds=0.3)
        assert not np.array_equal(again.waveform(0), one.waveform(0))
        assert again.fingerprint() != one.fingerprint()

    def test_train_and_test_ranges_share_no_clip(self):
        train, test = Synthetic(clips=4, seconds=0.1), Synthetic(clips=2, seconds=0.1, first=4)
        assert not {c.id for c in train.clips} & {c.id for c in test.clips}
        numbers = [s.reader.number(c) for s in (train, test) for c in s.clips]
        assert len(set(numbers)) == len(numbers) == 60

    def test_bad_arguments(self):
        with pytest.raises(UsageError, match="give a list of sounds"):
            Synthetic("bark")
        with pytest.raises(UsageError, match="give a list of sounds"):
            Synthetic([SOUNDS[0]], clips=0)
        with pytest.raises(UsageError, match="unknown sound 'brk'"):
            Synthetic(["brk"])


class TestSplit:
    def test_every_class_is_cut_at_the_same_fraction(self):
        source = listed([0] * 40 + [1] * 10 + [2] * 5)
        train, test = source.split(0.2, seed=1)
        assert Counter(c.label[0] for c in test.clips) == {0: 8, 1: 2, 2: 1}
        assert len(train) == 44 and not {c.id for c in train.clips} & {c.id for c in test.clips}
        assert train.classes == test.classes == source.classes
        assert [c.id for c in source.split(0.2, seed=1)[1].clips] == [c.id for c in test.clips]
        assert [c.id for c in source.split(0.2, seed=2)[1].clips] != [c.id for c in test.clips]

    @pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5, 0.8])
    def test_total_and_presence(self, fraction):
        source = listed([c for c in range(6) for _ in range(7)])
        train, test = source.split(fraction)
        for part in (train, test):
            assert {c.label[0] for c in part.clips} == set(range(6))
        assert abs(len(test) - fraction * 42) <= 3  # 0.1: each class must give one of seven

    def test_groups_stay_whole(self):
        rng = np.random.default_rng(0)
        groups = [f"g{g}" for g in rng.integers(0, 25, 200)]
        labels = rng.integers(0, 4, 200).tolist()
        train, test = listed(labels, groups).split(0.25)
        assert not {c.group for c in train.clips} & {c.group for c in test.clips}
        assert abs(len(test) - 50) <= 10
        for part in (train, test):
            assert {c.label[0] for c in part.clips} == set(range(4))

    def test_a_class_of_two_groups_is_on_both_sides(self):
        labels = [0] * 20 + [1] * 20
        groups = ["a"] * 15 + ["b"] * 5 + ["c"] * 10 + ["d"] * 10
        train, test = listed(labels, groups).split(0.05)
        assert {c.group for c in test.clips} == {"b", "c"} or {c.group for c in test.clips} == {
            "b",
            "d",
        }
        assert {c.label[0] for c in train.clips} == {0, 1}

    def test_a_class_of_one_clip_stays_in_training(self):
        train, test = listed([0] * 10 + [1]).split(0.9)
        assert 1 in {c.label[0] for c in train.clips}
        assert {c.label[0] for c in test.clips} == {0}

    def test_multi_label_and_unlabelled_clips(self):
        rng = np.random.default_rng(1)
        labels = [tuple(np.flatnonzero(row).tolist()) for row in rng.random((120, 5)) < 0.3]
        source = listed(labels, multi_label=True)
        train, test = source.split(0.25)
        assert abs(len(test) - 30) <= 6
        ratio = test.targets().sum(0) / source.targets().sum(0)
        assert (abs(ratio - 0.25) < 0.1).all()
        assert any(not clip.label for clip in train.clips)

    def test_refusals(self):
        for fraction in (0.0, 1.0, -0.5, float("nan")):
            with pytest.raises(UsageError, match="between 0 and 1"):
                listed([0, 0]).split(fraction)
        with pytest.raises(DataError, match="listed: cannot split 3 clips"):
            listed([0, 1, 2]).split(0.5)

    def split_names(self, source, **options):
        train, test = source.split(0.2, method="hash", **options)
        return {c.id for c in train.clips}, {c.id for c in test.clips}

    def test_s7_added_and_removed_clips_move_no_others(self):
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 6, 400).tolist()
        groups = [f"g{g}" if g < 60 else None for g in rng.integers(0, 90, 400)]
        whole = listed(labels, groups)
        train, test = self.split_names(whole)
        assert abs(len(test) - 80) < 25 and not train & test
        grouped = [
            {c.group for c in whole.clips if c.id in part} - {None} for part in (train, test)
        ]
        assert not grouped[0] & grouped[1]
        for _ in range(20):
            kept = rng.permutation(400)[: rng.integers(200, 400)]  # in another order too
            some_train, some_test = self.split_names(whole.subset(kept))
            assert some_train <= train and some_test <= test
        assert self.split_names(whole, seed=1) != (train, test)
        assert self.split_names(whole, part="valid") != (train, test)

    def test_the_hash_of_a_name_is_the_same_for_ever(self):
        ids = [f"{i:03d}.wav" for i in range(20)]
        clips = [Clip(id, (i % 2,), None) for i, id in enumerate(ids)]
        _, test = Source(clips, "ab", name="s").split(0.3, 7, method="hash")
        numbers = [0, 5, 8]
        assert [c.id for c in test.clips] == [ids[i] for i in numbers]

    def test_a_split_by_hash_has_every_class_on_both_sides_where_possible(self):
        for seed in range(30):
            source = listed([c for c in range(8) for _ in range(4)] + [8])
            train, test = source.split(0.1, seed, method="hash")
            assert {c.label[0] for c in train.clips} == set(range(9))
            assert {c.label[0] for c in test.clips} == set(range(8))

    def test_a_part_of_a_part_by_hash_is_independent(self):
        train, test = listed([i % 3 for i in range(900)]).split(0.2, method="hash")
        _, valid = train.split(0.2, method="hash", part="valid")
        assert abs(len(valid) - 144) < 40 and abs(len(test) - 180) < 40

    def test_b15_five_thousand_classes_take_linear_time(self, monkeypatch):
        calls = []

        def counting(*given, **options):
            calls.append(1)
            return sorted(*given, **options)

        monkeypatch.setattr(splits, "sorted", counting, raising=False)
        labels = [(i % 5000,) for i in range(15000)]
        for method in ("stratified", "hash"):
            calls.clear()
            clips = [Clip(str(i), label, None) for i, label in enumerate(labels)]
            source = Source(clips, [str(c) for c in range(5000)], name="s")
            source.split(0.2, method=method)
            assert len(calls) < 5100  # of each class once at most

    def test_thousands_of_clips_take_little_time(self):
        n = 30000
        labels = [(i % 35,) for i in range(n)]
        groups = [f"s{i % 1800}" for i in range(n)]
        first, second = stratify(labels, groups, 0.1, 0)
        assert len(first) + len(second) == n and abs(len(second) - 3000) < 300


class TestFolds:
    def test_each_fold_is_held_out_once(self):
        source = listed([0, 1] * 10, folds=[str(1 + i // 2) for i in range(20)])
        assert source.folds == tuple(map(str, range(1, 11)))
        held = []
        for k in source.folds:
            train, test = source.fold(k)
            assert len(train) == 18 and {c.fold for c in test.clips} == {k}
            held += [c.id for c in test.clips]
        assert sorted(held) == [c.id for c in source.clips]
        assert source.fold(3)[1].clips == source.fold("3")[1].clips

    def test_b17_missing_partial_and_overlapping_folds(self):
        with pytest.raises(DataError, match="has 0 folds"):
            listed([0, 1]).fold(1)
        with pytest.raises(DataError, match="has 1 folds"):
            listed([0, 1], folds=["1", "1"]).fold(1)
        partial = listed([0] * 9, folds=["1", "2"] + [None] * 7)
        with pytest.raises(
            DataError, match=r"7 of 9 clips have no fold \(c002, c003, .*c006, and 2"
        ):
            partial.fold(1)
        leaking = listed([0, 0, 0, 1], ["rec7", "rec7", "rec8", None], ["1", "2", "2", "1"])
        with pytest.raises(
            DataError, match=r"groups in more than one fold \(1\), .*'rec7' in 1, 2"
        ):
            leaking.fold(2)
        with pytest.raises(UsageError, match="no fold '9'; the folds are 1, 2"):
            listed([0, 1], folds=["1", "2"]).fold("9")

    def test_by_split_needs_an_official_division(self):
        with pytest.raises(DataError, match="no official division"):
            listed([0, 1]).by_split("test")
        with pytest.raises(UsageError, match="'fold' or 'split'"):
            listed([0, 1]).leaks("group")


class TestSource:
    def test_bad_sets_are_refused(self):
        def make(*clips, classes=("a", "b"), multi_label=False):
            return Source(clips, classes, name="s", multi_label=multi_label)

        with pytest.raises(DataError, match="s: no clips"):
            make()
        with pytest.raises(DataError, match="clip 'x' occurs twice"):
            make(Clip("x", (0,), None), Clip("x", (1,), None))
        with pytest.raises(DataError, match=r"label \(2,\), but there are 2 classes"):
            make(Clip("x", (2,), None))
        with pytest.raises(DataError, match="2 labels in a single-label set"):
            make(Clip("x", (0, 1), None))
        with pytest.raises(DataError, match="class name occurs twice"):
            make(Clip("x", (0,), None), classes=("a", "a"))
        assert len(make(Clip("x", (), None), multi_label=True)) == 1

    def test_subset_keeps_order_classes_and_remarks(self):
        source = listed([0, 1, 2])
        part = source.subset(np.array([2, 0]))
        assert [c.id for c in part.clips] == ["c002", "c000"] and part.classes == source.classes
        np.testing.assert_array_equal(part.targets(), [[0, 0, 1], [1, 0, 0]])
        assert part[np.int64(0)].id == "c002"
        assert [clip.id for clip in part] == ["c002", "c000"]

    def test_fingerprint_covers_ids_labels_and_classes_but_not_paths(self, tmp_path):
        for root in ("here", "there"):
            tone(tmp_path / root / "set" / "a" / "1.wav")
            tone(tmp_path / root / "set" / "b" / "2.wav")
        here, there = (AudioFolder(tmp_path / root / "set") for root in ("here", "there"))
        assert here.fingerprint() == there.fingerprint()
        assert here.subset([0]).fingerprint() != here.fingerprint()
        assert here.subset([1, 0]).fingerprint() != here.fingerprint()
        assert listed([0, 1]).fingerprint() != listed([1, 0]).fingerprint()

    def test_fingerprint_is_the_hash_of_json_lines(self):
        """Adapter files and run folders keep it: it may not change."""

        class Keyed(Reader):
            def key(self, clip):
                return {"a": None}.get(clip.id, "k" * 64)

        clips = [
            Clip("a", (1, 0), None),
            Clip('e\u0301 "x"\n', (), None),
            Clip("\udcff", (1,), None, observed=(1, 2, 0)),
        ]
        source = Source(clips, ["x", "\u00e9", "z"], name="s", multi_label=True, reader=Keyed())
        lines = [
            [["x", "\u00e9", "z"], True],
            ["a", [0, 1], None],
            ['\u00e9 "x"\n', [], "k" * 64],
            ["\udcff", [1], "k" * 64, [0, 1, 2]],
        ]
        text = "\n".join(json.dumps(line) for line in lines)
        assert source.fingerprint() == hashlib.sha256(text.encode()).hexdigest()

    def test_f28_errors_of_reading_name_the_file(self, tmp_path):
        class Broken(Reader):
            def read(self, clip):
                raise KeyError("inside")

        clip = Clip("x", (0,), str(tmp_path / "x.wav"))
        with pytest.raises(DataError, match=r"x.wav: could not be read: 'inside'"):
            Source([clip], ["a"], name="s", reader=Broken()).waveform(0)
        with pytest.raises(DataError, match=r"x\.wav"):
            Source([clip], ["a"], name="s").waveform(0)
        with pytest.raises(DataError, match="c000: the clip has no file"):
            listed([0]).waveform(0)

    def test_sources_travel_to_other_processes(self):
        source = Synthetic(["bark"], clips=2, seconds=0.1)
        copy = pickle.loads(pickle.dumps(source))
        assert copy.fingerprint() == source.fingerprint()
        np.testing.assert_array_equal(copy.waveform(1), source.waveform(1))


class TestRealAudio:
    def test_esc10(self, real_audio):
        source = ESC(real_audio / "esc10")
        assert len(source) == 320 and source.folds == ("1", "2", "3", "4")
        assert source.classes[:3] == ("dog", "rooster", "rain") and len(source.classes) == 10
        assert Counter(c.fold for c in source.clips) == dict.fromkeys("1234", 80)
        train, test = source.fold(4)
        assert len(train) == 240
        assert not {c.group for c in train.clips} & {c.group for c in test.clips}
        assert 79000 < len(source.waveform(0)) < 81000  # 5 s
        train, test = source.split(0.25)
        assert not {c.group for c in train.clips} & {c.group for c in test.clips}
        assert abs(len(test) - 80) <= 4
        assert set(Counter(c.label[0] for c in test.clips)) == set(range(10))

    def test_the_other_classes_of_esc50(self, real_audio):
        source = ESC(real_audio / "esc50_fold4")
        assert len(source) == 320 and len(source.classes) == 40
        assert source.waveform(7).shape == (80000,)

    def test_speech_commands(self, real_audio):
        source = AudioFolder(real_audio / "speech_commands_v0.01")
        assert len(source) == 300 and len(source.classes) == 30
        assert all(clip.group for clip in source.clips)
        parts = {name: len(source.by_split(name)) for name in ("train", "valid", "test")}
        assert sum(parts.values()) == 300 and min(parts.values()) > 0
        assert source.leaks("split") == {}

    def test_spoken_digits_by_name(self, real_audio):
        pattern = r"(?P<label>\d)_(?P<group>[a-z]+)_\d+\.wav"
        source = NamePattern(real_audio / "fsdd" / "recordings", pattern)
        assert len(source) == 2500 and source.classes == tuple("0123456789")
        train, test = source.split(0.2)
        assert len({c.group for c in test.clips}) == 1 and len(train) == 2000


def test_reading_folders_manifests_and_synthetic_sounds_needs_no_extra(tmp_path):
    tone(tmp_path / "set" / "a" / "1.wav")
    (tmp_path / "list.csv").write_text("path,label\nset/a/1.wav,a\n")
    code = f"""
import sys
from aatjax.data import AudioFolder, Manifest, Synthetic
from aatjax.data.formats import open_source
for source in (AudioFolder({str(tmp_path / "set")!r}), Manifest({str(tmp_path / "list.csv")!r}),
               Synthetic(["bark"], clips=1, seconds=0.1), open_source({str(tmp_path / "set")!r})):
    assert source.waveform(0).ndim == 1
extras = ("tensorflow_datasets", "array_record", "pooch", "requests", "pyarrow", "librosa")
print([name for name in extras if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
