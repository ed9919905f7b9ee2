"""What training refuses: `doctor`, `train` and `adapt` agree, in the same sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from aatjax.cli.main import run
from aatjax.config import Data
from aatjax.data.source import Clip, Source
from aatjax.data.trainable import check_trainable
from aatjax.errors import DataError
from aatjax.experiments.check import diagnose_data
from aatjax.experiments.partition import divide


def make_sounds(root: Path, *folders: str, clips: int = 6) -> Path:
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for k in range(clips):
            wave = np.random.default_rng(100 * number + k).integers(-6000, 6000, 9000)
            soundfile.write(root / folder / f"{k}.wav", wave.astype(np.int16), 16000)
    return root


def make_table(root: Path, head: str, row: Callable[[str, int], str], clips: int = 6) -> Path:
    make_sounds(root, "cat", "dog", clips=clips)
    rows = [f"{a}/{k}.wav,{row(a, k)}" for a in ("cat", "dog") for k in range(clips)]
    (root / "list.csv").write_text("\n".join([f"path,{head}", *rows]))
    return root / "list.csv"


def make_damaged(root: Path) -> Path:
    make_sounds(root, "cat", "dog")
    for k in range(4):
        (root / "cat" / f"{k}.wav").write_bytes(b"no sound")
    return root


def make_list(root: Path) -> Path:
    (make_sounds(root, "cat", "dog") / "testing_list.txt").write_text("cats/0.wav\n")
    return root


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "labels that are all x": (
        lambda root: make_table(root, "label", lambda a, k: "x"),
        "every training clip (12) is of class 'x': a classifier needs two classes or more",
    ),
    "one class to train on": (
        lambda root: make_table(
            root, "label,split", lambda a, k: f"{a},{'train' if a == 'cat' else 'test'}"
        ),
        "every training clip (6) is of class 'cat'",
    ),
    "one class folder": (lambda root: make_sounds(root, "cat"), "is of class 'cat'"),
    "test rows only": (
        lambda root: make_table(root, "label,split", lambda a, k: f"{a},test"),
        "its official division holds only test clips",
    ),
    "one clip per class": (
        lambda root: make_sounds(root, "cat", "dog", clips=1),
        "cannot split 2 clips: every class comes from a single clip or group",
    ),
    "one speaker per class": (
        lambda root: make_table(root, "label,speaker", lambda a, k: f"{a},{a}"),
        "every class comes from a single clip or group",
    ),
    "a speaker in two parts": (
        lambda root: make_table(
            root, "label,split,speaker", lambda a, k: f"{a},{('train', 'test')[k % 2]},ann"
        ),
        "recordings or speakers in more than one part (1): 'ann' in test and train",
    ),
    "a speaker in two folds": (
        lambda root: make_table(root, "label,fold,speaker", lambda a, k: f"{a},{k % 2},ann"),
        "groups in more than one fold (1)",
    ),
    "wrong rows": (
        lambda root: make_table(root, "label", lambda a, k: "" if k == 3 else a),
        "2 problems: row 5: empty label; row 11: empty label",
    ),
    "too many damaged files": (make_damaged, "4 of 12 clips cannot be used and 0 may fail: "),
    "a list file of other names": (make_list, "line 1: no such file: 'cats/0.wav'"),
    "folds in place of classes": (
        lambda root: make_sounds(root, "fold1", "fold2"),
        "fold1, fold2 look like folds, not classes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_doctor_train_and_adapt_refuse_the_same_sets(
    name: str, tmp_path: Path, small_ast: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = REFUSED[name]
    path = str(make(tmp_path / "sounds"))
    cache = ["--data.cache", str(tmp_path / "cache")]
    train = ["train", "folder", "--data.path", path, *cache, "--out", str(tmp_path / "run")]
    assert run(train) == 65
    sentence = capsys.readouterr().err.strip().splitlines()[-1].removeprefix("aatjax: ")
    assert message in sentence
    adapt = ["adapt", path, *cache, "--base", small_ast, "--no-labels", "--quiet", "--dry-run"]
    assert run(adapt) == 65
    assert capsys.readouterr().err.strip() == f"aatjax: {sentence}"
    assert run(["doctor", path, "--no-labels", "--quiet", "--frames", "64", "--json"]) == 65
    printed = capsys.readouterr()
    found = printed.out and json.loads(printed.out)["findings"]
    refused = [f for f in found or [] if f["kind"] == "refused"]
    said = refused[0]["items"][0]["detail"] if refused else printed.err.strip()[len("aatjax: ") :]
    assert said == sentence


@pytest.mark.parametrize("clips", [5, 6])
def test_what_the_doctor_passes_is_trained(clips: int, tmp_path: Path) -> None:
    """A damaged file and a speaker of a known name are no reason to refuse a set."""
    make_sounds(tmp_path, "cat", "dog", clips=clips)
    (tmp_path / "cat" / "0.wav").write_bytes(b"no sound")
    data = Data(path=str(tmp_path), max_bad=1)
    source, diagnosis = diagnose_data(data, labels=False, frames=64)
    assert diagnosis.refusal is None and diagnosis.exit_code() == 0
    assert diagnosis.exit_code(strict=True) == 1 and len(source) == 2 * clips - 1
    parts = divide(data, source)
    assert parts.test is not None and len(parts.train) + len(parts.test) == len(source)


def make_source(labels: list[int], multi_label: bool = False, **fields: list[str]) -> Source:
    clips = [
        Clip(str(i), (c,), None, **{name: values[i] for name, values in fields.items()})  # type: ignore[arg-type]
        for i, c in enumerate(labels)
    ]
    return Source(clips, ("a", "b"), name="made", multi_label=multi_label)


def test_a_set_that_can_be_trained_on() -> None:
    check_trainable(make_source([0, 1]))
    check_trainable(make_source([0, 0], multi_label=True))  # the other class may be absent
    leaking = make_source([0, 1, 0, 1], split=["train", "train", "test", "test"], group=["g"] * 4)
    check_trainable(leaking, leaks=False)
    with pytest.raises(DataError, match="'g' in test and train"):
        check_trainable(leaking)
    with pytest.raises(DataError, match="every training clip"):
        check_trainable(make_source([1, 1]))
