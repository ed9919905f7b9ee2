"""Manifests: clips that are read, and a message for every wrong row."""

import json
import os
import unicodedata

import pytest

from aatjax.data.manifest import Column, Manifest
from aatjax.errors import DataError, UsageError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.wav", "b.wav", "c.wav", "d.wav"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def write(folder, text, name="list.csv", encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def found(source):
    return [(c.id, [source.classes[k] for k in c.label]) for c in source.clips]


class TestReading:
    @pytest.mark.parametrize("sep", [",", ";", "\t"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    def test_b14_separators_line_ends_and_byte_order_mark(self, folder, sep, end, encoding):
        rows = [("Path", "Label", "fold"), ("a.wav", "dog, big", "1"), ("b.wav", "bee", "2")]
        quoted = [[f'"{cell}"' if sep in cell else cell for cell in row] for row in rows]
        text = end.join(sep.join(row) for row in quoted) + end
        source = Manifest(write(folder, text, encoding=encoding))
        assert found(source) == [("a.wav", ["dog, big"]), ("b.wav", ["bee"])]
        assert source.classes == ("bee", "dog, big") and source.folds == ("1", "2")
        assert source.name == "list" and source.skipped == ()
        assert source.clips[0].path == str(folder / "a.wav")

    def test_b14_excel_quotes_and_separator_line(self, folder):
        os.rename(folder / "a.wav", folder / 'say "hi"; twice.wav')
        text = (
            'sep=;\r\nfilename;label\r\n"say ""hi""; twice.wav";"dog ""rex"""\r\n\r\nb.wav;bee\r\n'
        )
        source = Manifest(write(folder, text))
        assert found(source) == [('say "hi"; twice.wav', ['dog "rex"']), ("b.wav", ["bee"])]

    @pytest.mark.parametrize("column", ["path", "file", "filename", "wav", " WAV "])
    def test_names_of_the_file_column(self, folder, column):
        assert len(Manifest(write(folder, f"label,{column}\ndog,a.wav\n"))) == 1

    def test_columns_by_choice(self, folder):
        path = write(folder, "path;clip;bird;cv;who\nzzz;a.wav;owl;3;ann\n")
        columns: dict[Column, str] = {"path": "clip", "label": "Bird"}
        assert found(Manifest(path, columns=columns)) == [("a.wav", ["owl"])]
        source = Manifest(path, columns={**columns, "fold": "cv", "group": "who"}, sep=";")
        assert [(c.fold, c.group) for c in source.clips] == [("3", "ann")]
        several = Manifest(path, columns={"path": "clip", "labels": "bird"})
        assert several.multi_label and found(several) == [("a.wav", ["owl"])]
        with pytest.raises(DataError, match=r"no column label or .*name yours by --data.columns"):
            Manifest(path, columns={"path": "clip"})
        with pytest.raises(DataError, match=r"no column brd, did you mean 'bird'\?; the columns"):
            Manifest(path, columns={"path": "clip", "label": "brd"})
        with pytest.raises(DataError, match="no column folds; the columns are path, clip, bird"):
            Manifest(path, columns={**columns, "fold": "folds"})
        with pytest.raises(UsageError, match="either label or labels"):
            Manifest(path, columns={"label": "bird", "labels": "bird"})
        with pytest.raises(UsageError, match="one character"):
            Manifest(path, sep=";;")

    def test_fold_split_and_group(self, folder):
        text = "path,label,fold,split,speaker\na.wav,x,1,Train,ann\nb.wav,y,2,val,\n"
        clips = Manifest(write(folder, text)).clips
        assert [(c.fold, c.split, c.group) for c in clips] == [
            ("1", "train", "ann"),
            ("2", "valid", None),
        ]

    def test_json_lines(self, folder):
        rows = [
            {"path": "a.wav", "labels": ["dog", "bee"], "fold": 1},
            {"path": "b.wav", "labels": [], "fold": 2},
        ]
        text = "\n".join(map(json.dumps, rows)) + "\n\n"
        for name in ("list.jsonl", "list.txt"):
            source = Manifest(write(folder, text, name))
            assert source.multi_label and source.folds == ("1", "2")
            assert found(source) == [("a.wav", ["bee", "dog"]), ("b.wav", [])]
        rows = [{"file": "a.wav", "label": 1}, {"file": "b.wav", "label": 0}]
        path = write(folder, "\n".join(map(json.dumps, rows)), "one.jsonl")
        assert found(Manifest(path, classes=["dog", "bee"])) == [
            ("a.wav", ["bee"]),
            ("b.wav", ["dog"]),
        ]

    def test_several_labels_in_a_cell(self, folder):
        path = write(folder, "path,labels\na.wav,dog|bee|dog\nb.wav,cat\nc.wav,|\n")
        source = Manifest(path)
        assert source.multi_label and source.classes == ("bee", "cat", "dog")
        assert found(source) == [("a.wav", ["bee", "dog"]), ("b.wav", ["cat"]), ("c.wav", [])]
        path = write(folder, "path,labels\na.wav,dog; bee\nb.wav,|\n")
        assert found(Manifest(path)) == [("a.wav", ["bee", "dog"]), ("b.wav", [])]
        path = write(folder, "path,label\na.wav,dog|bee\n")
        assert found(Manifest(path, multi_label=True)) == [("a.wav", ["bee", "dog"])]
        assert found(Manifest(path, multi_label=False)) == [("a.wav", ["dog|bee"])]
        with pytest.raises(
            DataError, match=r"row 2: several labels \(dog\|bee\).*--data.columns labels=COLUMN"
        ):
            Manifest(path)

    def test_numbers_as_classes(self, folder):
        path = write(folder, "path,label\na.wav,10\nb.wav,9\nc.wav,10\n")
        source = Manifest(path)
        assert source.classes == ("9", "10") and [c.label for c in source.clips] == [
            (1,),
            (0,),
            (1,),
        ]
        with pytest.raises(DataError, match="row 2: class number 10 is not among the 10 classes"):
            Manifest(path, classes=[f"k{i}" for i in range(10)])
        assert Manifest(path, classes=[f"k{i}" for i in range(11)]).clips[0].label == (10,)
        assert Manifest(path, classes=["10", "9"]).clips[0].label == (0,)

    def test_paths_relative_to_a_root_absolute_or_from_windows(self, folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "e.wav").write_bytes(b"")
        path = write(folder, "path,label\ne.wav,x\n../a.wav,x\n")
        assert [c.path for c in Manifest(path, root=folder / "sub").clips] == [
            str(folder / "sub" / "e.wav"),
            str(folder / "a.wav"),
        ]
        path = write(folder, f"path,label\nsub\\e.wav,x\n{folder / 'b.wav'},x\n")
        assert [c.path for c in Manifest(path).clips] == [
            str(folder / "sub" / "e.wav"),
            str(folder / "b.wav"),
        ]

    @pytest.mark.parametrize(
        "name",
        [
            "with space.wav",
            "it's.wav",
            "a;b,c.wav",
            "line\nbreak.wav",
            "-x.wav",
            "y" * 251 + ".wav",
        ],
    )
    def test_b12_strange_names(self, folder, name):
        (folder / name).write_bytes(b"")
        quoted = '"' + name.replace('"', '""') + '"'
        source = Manifest(write(folder, f"path,label\n{quoted},x\nb.wav,y\n"))
        assert found(source) == [(name, ["x"]), ("b.wav", ["y"])]

    @pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
    @pytest.mark.parametrize("in_file", ["NFC", "NFD"])
    def test_b12_accents_in_either_form(self, folder, on_disk, in_file):
        name = unicodedata.normalize(on_disk, "caf\u00e9 \u00fc.wav")
        (folder / name).write_bytes(b"")
        text = unicodedata.normalize(in_file, "path,label\ncaf\u00e9 \u00fc.wav,na\u00efve\n")
        source = Manifest(write(folder, text))
        assert source.clips[0].path == str(folder / name)
        assert source.classes == (unicodedata.normalize("NFC", "na\u00efve"),)


class TestProblems:
    def test_b14_all_are_collected_with_row_numbers(self, folder):
        text = (
            "path,label\n"
            "a.wav,dog\n"
            '"line\nbreak.wav",dog\n'
            "\n"
            "b.wav,\n"
            "a.wav,dog\n"
            ",dog\n"
            "c.wav,dog,extra\n"
            "d.wav,Dog\n"
        )
        path = write(folder, text)
        with pytest.raises(DataError) as raised:
            Manifest(path)
        message = str(raised.value)
        assert message.startswith(f"{path}: 6 problems: row 3: no such file: 'line\\nbreak.wav'")
        assert "\n" not in message
        for part in (
            "row 5: empty label",
            "row 6: 'a.wav' is listed before, in row 2",
            "row 7: no file name",
            "row 8: 3 cells under 2 columns",
            "row 9: label 'Dog' differs from 'dog' only in case, spaces",
        ):
            assert part in message
        source = Manifest(path, strict=False)
        assert found(source) == [("a.wav", ["dog"])]
        assert [row for row, _ in source.skipped] == [f"row {n}" for n in (3, 5, 6, 7, 8, 9)]

    def test_ten_are_shown_and_the_rest_counted(self, folder):
        path = write(folder, "path,label\n" + "".join(f"no{i}.wav,x\n" for i in range(25)))
        with pytest.raises(
            DataError, match=r"25 problems: row 2: .*row 11: .*; and 15 more; names"
        ) as e:
            Manifest(path)
        assert "row 12" not in str(e.value)
        with pytest.raises(DataError, match="25 problems"):  # nothing would be left
            Manifest(path, strict=False)

    def test_b14_unknown_class_gets_a_suggestion(self, folder):
        path = write(folder, "path,label\na.wav,dog\nb.wav,Rooter\nc.wav,qqq\n")
        with pytest.raises(DataError) as raised:
            Manifest(path, classes=["rooster", "dog"])
        assert "row 3: unknown class 'Rooter'; did you mean 'rooster'?" in str(raised.value)
        assert str(raised.value).endswith("row 4: unknown class 'qqq'")
        source = Manifest(path, classes=["rooster", "dog"], strict=False)
        assert source.classes == ("rooster", "dog") and found(source) == [("a.wav", ["dog"])]

    @pytest.mark.parametrize("classes", [None, ["bee", "cat", "dog"]])
    def test_b14_names_and_numbers_are_not_mixed(self, folder, classes):
        path = write(folder, "path,label\na.wav,dog\nb.wav,1\nc.wav,cat\n")
        with pytest.raises(DataError, match=r"1 problem: row 3: label '1' is a class number"):
            Manifest(path, classes=classes)
        path = write(folder, "path,label\na.wav,dog\nb.wav,1\nc.wav,2\n")
        with pytest.raises(DataError, match=r"1 problem: row 2: label 'dog' is a class name"):
            Manifest(path, classes=classes)
        kept = Manifest(path, classes=classes, strict=False)
        assert [c.id for c in kept.clips] == ["b.wav", "c.wav"]
        assert Manifest(path, classes=["dog", "2", "1"]).clips[1].label == (2,)

    def test_b17_partial_folds_have_row_numbers(self, folder):
        path = write(folder, "path,label,fold\na.wav,x,1\nb.wav,x,\nc.wav,x,2\n")
        with pytest.raises(DataError, match="1 problem: row 3: no fold; give every row one"):
            Manifest(path)

    def test_b16_lists_in_a_single_label_file(self, folder):
        path = write(folder, '{"path": "a.wav", "label": ["x", "y"]}', "l.jsonl")
        with pytest.raises(DataError, match=r"several labels \(x\|y\) in a single-label file"):
            Manifest(path, multi_label=False)

    def test_bad_json_lines(self, folder):
        lines = ['{"path": "a.wav", "label": "x"}', "{oops", "[1]", '{"path": 3, "label": "x"}']
        path = write(folder, "\n".join(lines), "l.jsonl")
        with pytest.raises(DataError, match=r"3 problems: row 2: not JSON.*row 3: not a JSON obj"):
            Manifest(path)
        assert len(Manifest(path, strict=False)) == 1

    def test_files_that_are_no_files(self, folder):
        (folder / "folder.wav").mkdir()
        os.mkfifo(folder / "pipe.wav")
        path = write(folder, "path,label\nfolder.wav,x\npipe.wav,x\na\0b.wav,x\n")
        with pytest.raises(DataError) as raised:
            Manifest(path)
        message = str(raised.value)
        assert message.count("is not a file:") == 2
        assert "row 4: no such file: 'a\\x00b.wav'" in message

    def test_unusable_files(self, folder):
        with pytest.raises(DataError, match=r"none.csv: cannot be read: No such file"):
            Manifest(folder / "none.csv")
        with pytest.raises(DataError, match="the file is empty"):
            Manifest(write(folder, ""))
        with pytest.raises(DataError, match="no rows"):
            Manifest(write(folder, "path,label\n\n"))
        with pytest.raises(DataError, match="no rows"):
            Manifest(write(folder, "\n", "x.jsonl"))
        with pytest.raises(DataError, match="line 2 is not UTF-8"):
            Manifest(write(folder, "path,label\na.wav,\xe9\n", encoding="latin-1"))
        with pytest.raises(DataError, match=r"row 3: not CSV: .*quotes in it doubled"):
            Manifest(write(folder, 'path,label\na.wav,x\nb.wav,"x\n'))
        with pytest.raises(DataError, match="column 'label' occurs twice"):
            Manifest(write(folder, "path,label,Label\na.wav,x,y\n"))
