"""The command line: output, files and exit code of every command."""

import contextlib
import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile
from flax import nnx
from safetensors.numpy import load_file
from tiny_model import tiny_config

from aatjax import load, surgery
from aatjax.cli import commands, main
from aatjax.convert import write_native
from aatjax.models.ast import AST
from aatjax.models.config import SIZES
from aatjax.train.adapter_file import read_info

TINY = tiny_config(num_classes=2)
ODD_NAMES = [
    "plain.wav",
    "with space.wav",
    "ünïcode 音.wav",
    'quote\'s "and" ;.wav',
    "line\nbreak.wav",
    "-leading.wav",
    "tab\there.wav",
    "n" * 250 + ".wav",
]


def tone(label: int, seed: int, samples: int = 16000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    wave = np.sin(2 * np.pi * 300 * 3**label * np.arange(samples) / 16000)
    return 0.4 * wave + 0.1 * rng.normal(size=samples)


def make_sounds(root: Path, clips: int = 8, classes: tuple[str, ...] = ("hum", "whistle")) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(clips):
            soundfile.write(root / name / f"{i}.wav", tone(label, 10 * label + i), 16000)
    return root


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder with weights and sounds, and the arguments that every training in it shares."""

    root: Path
    base: Path
    sounds: Path

    def arguments(self, *more: str, run: str = "run", epochs: int = 3) -> list[str]:
        return [
            "train",
            "folder",
            "--data.path",
            str(self.sounds),
            "--model.source",
            str(self.base),
            "--out",
            str(self.root / run),
            "--data.cache",
            str(self.root / "cache"),
            "--data.split-method",
            "stratified",  # 13 of 16 clips train: four steps an epoch
            "--training.epochs",
            str(epochs),
            "--training.batch-size",
            "4",
            "--augment.freq-mask",
            "0",
            "--augment.time-mask",
            "0",
            *more,
        ]

    @property
    def adapter(self) -> str:
        return str(self.root / "run" / "adapter.safetensors")


def make_place(root: Path) -> Place:
    root.mkdir(exist_ok=True)
    base = root / "base.safetensors"
    write_native(base, surgery.arrays(AST(TINY, rngs=nnx.Rngs(0))), TINY)
    return Place(root, base, make_sounds(root / "sounds"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


@dataclasses.dataclass(frozen=True)
class Trained(Place):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One run that the tests below look at and use."""
    place = make_place(tmp_path_factory.mktemp("trained"))
    out, err = place.root / "out", place.root / "err"
    with (
        out.open("w") as o,
        err.open("w") as e,
        contextlib.redirect_stdout(o),
        contextlib.redirect_stderr(e),
    ):
        code = main.run(place.arguments(epochs=8))
    return Trained(place.root, place.base, place.sounds, code, out.read_text(), err.read_text())


def one_line(text: str) -> str:
    """The message, which is exactly one line, with no traceback."""
    assert "Traceback" not in text
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("aatjax: ")
    return lines[0]


# Training.


def test_train_prints_a_table_and_the_adapter_file(trained: Trained) -> None:
    assert trained.code == 0, trained.err
    heads, row, where = trained.out.splitlines()
    assert re.split(" {2,}", heads) == ["method", "trainable", "accuracy", "tested on", "seconds"]
    method, count, figure, clips, seconds = re.split(" {2,}", row)
    score, low, high = figure.split()
    assert re.fullmatch(r"\d+ clips", clips)
    assert method == "aat" and int(count.replace(",", "")) > 1000
    assert 0 <= float(score) <= 1 and float(seconds) >= 0
    assert low.startswith("[") and high.endswith("]")
    assert where.startswith(f"adapter: {trained.adapter} (") and where.endswith(" MB)")
    assert Path(trained.adapter).is_file()
    assert "sounds: 16 clips, 2 classes" in trained.err
    assert "trainable of" in trained.err
    assert trained.err.count("epoch ") == 8
    figures = json.loads((trained.root / "run" / "result.json").read_text())
    assert f"{figures['headline'][1]:.3f}" == score
    info = read_info(trained.adapter)
    assert info is not None
    assert info["classes"] == ["hum", "whistle"]
    assert info["config"]["training"]["epochs"] == 8
    assert info["test"]["value"] == figures["headline"][1]


def test_the_same_command_again_reports_a_finished_run(
    trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    before = Path(trained.adapter).read_bytes()
    began = time.monotonic()
    assert main.run(trained.arguments(epochs=8)) == 0
    assert time.monotonic() - began < 5
    captured = capfd.readouterr()
    assert captured.out == trained.out
    assert "finished before; delete it to retrain" in captured.err
    assert Path(trained.adapter).read_bytes() == before


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (["--optim.lr", "0.5"], "optim.lr: None -> 0.5"),
        (["--method", "linear"], "petl.name: 'aat' -> 'linear'"),
        (["--data.seed", "3"], "data.seed: 0 -> 3"),
    ],
)
def test_another_config_in_the_same_folder_is_refused(
    more: list[str], difference: str, trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    """F17."""
    before = (trained.root / "run" / "config.json").read_bytes()
    assert main.run(trained.arguments(*more, epochs=8)) == 2
    message = one_line(capfd.readouterr().err)
    assert difference in message and "--out" in message
    assert (trained.root / "run" / "config.json").read_bytes() == before


def test_a_folder_in_which_nothing_was_trained_claims_nothing(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    """A mistyped path must not make the right one a change of the config."""
    wrong = place.arguments("--data.path", str(place.root / "sonds"), epochs=1)
    assert main.run(wrong) == 65
    assert "sonds: no such file or folder" in one_line(capfd.readouterr().err)
    assert main.run(place.arguments("--method", "linear", epochs=1)) == 0


def test_quiet_prints_nothing_on_standard_error(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main.run(place.arguments("--quiet", "--method", "linear", epochs=1)) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines()[1].startswith("linear ")


def test_fields_of_the_method_are_flags(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    more = ["--petl.ratio", "0.5", "--petl.no-spatial", "--optim.clip", "1.0"]
    assert main.run(place.arguments("--quiet", *more, epochs=1)) == 0
    info = read_info(place.adapter)
    assert info is not None
    assert info["method"] == {
        "name": "aat",
        "mlp": True,
        "spatial": False,
        "ratio": 0.5,
        "width": None,
        "as_published": False,
        "blocks": None,
        "tag": "",
    }
    assert info["config"]["optim"]["clip"] == 1.0
    tensors = load_file(place.adapter)
    assert tensors["blocks/0/mlp/mlp_adapter/w_down"].shape == (32, 16)
    capfd.readouterr()
    # A field of another method is no flag.
    assert main.run(place.arguments("--method", "linear", "--petl.ratio", "0.5")) == 2
    assert "--petl.ratio" in capfd.readouterr().err


def test_best_by_validation_clips(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    more = [
        "--data.valid-fraction",
        "0.3",
        "--training.select",
        "best",
        "--quiet",
        "--method",
        "linear",
    ]
    assert main.run(place.arguments(*more, epochs=2)) == 0
    assert (place.root / "run" / "last.safetensors").is_file()
    info = read_info(place.adapter)
    assert info is not None
    assert info["weights"] == "best" and info["valid"]["clips"] == 4


# Data that is not as it should be.


def test_unreadable_files_are_counted_and_listed(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    (place.sounds / "hum" / "broken.wav").write_bytes(b"RIFF1234WAVEnothing")
    (place.sounds / "hum" / "notes.txt").write_text("not audio")
    assert main.run(place.arguments("--method", "linear", "--data.max-bad", "0.2", epochs=1)) == 0
    captured = capfd.readouterr()
    assert "16 clips, 2 classes, 1 other file left out, 1 quarantined" in captured.err
    (line,) = (place.root / "run" / "quarantine.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert entry["path"].endswith("broken.wav") and entry["reason"] == "undecodable"


def test_too_many_unreadable_files_end_it(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        (place.sounds / "hum" / f"broken{i}.wav").write_bytes(b"RIFF1234WAVEnothing")
    for allowed in ("0.1", "2", "0"):
        assert (
            main.run(place.arguments("--method", "linear", "--data.max-bad", allowed, epochs=1))
            == 65
        )
        err = capfd.readouterr().err
        message = [line for line in err.splitlines() if line.startswith("aatjax: ")]
        assert len(message) == 1 and "Traceback" not in err
        assert "3 of 19 clips cannot be used" in message[0] and "--data.max-bad" in message[0]
        assert "broken0.wav" in message[0]
    assert len((place.root / "run" / "quarantine.jsonl").read_text().splitlines()) == 3
    assert main.run(place.arguments("--method", "linear", "--data.max-bad", "3", epochs=1)) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "folder"], 2, "--data.path"),
        (["train", "esc"], 2, "--data.path"),
        (["train", "folder", "--data.path", "/nowhere/at all"], 65, "/nowhere/at all: no such"),
        (["train", "--data.path", "/sounds"], 2, "does not go with --data.format synthetic"),
        (["train", "--cross-validate"], 2, "no folds"),
        (["train", "folder", "--data.path", "{root}/empty"], 65, "empty"),
        (["train", "folder", "--data.path", "{root}/flat"], 65, "root/<class>/<file>"),
        (["train", "folder", "--data.path", "{root}/sounds", "--cross-validate"], 2, "no folds"),
        (["train", "folder", "--data.path", "{root}/sounds", "--data.fold", "9"], 65, "folds"),
        (["train", "esc", "--data.path", "{root}/sounds"], 65, "meta/esc50.csv"),
        (["train", "folder", "--data.path", "{root}/one"], 65, "one: cannot split"),
        (
            ["train", "folder", "--data.path", "{root}/sounds", "--training.select", "best"],
            2,
            "needs validation clips",
        ),
        (
            ["train", "folder", "--data.path", "{root}/sounds", "--model.source", "/no/w.pth"],
            65,
            "/no/w.pth",
        ),
    ],
)
def test_data_that_is_not_there_is_explained(
    arguments: list[str],
    code: int,
    words: str,
    trained: Trained,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (trained.root / "empty").mkdir(exist_ok=True)
    (trained.root / "flat").mkdir(exist_ok=True)
    soundfile.write(trained.root / "flat" / "a.wav", tone(0, 0), 16000)
    if not (trained.root / "one").exists():
        make_sounds(trained.root / "one", clips=1)
    given = [a.format(root=trained.root) for a in arguments]
    if "--model.source" not in given:
        given += ["--model.source", str(trained.base)]
    cache = str(trained.root / "cache")
    assert (
        main.run([*given, "--out", str(tmp_path / "r"), "--quiet", "--data.cache", cache]) == code
    )
    assert words in one_line(capfd.readouterr().err)


def test_a_class_of_one_clip_trains_and_is_reported(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    """B15: it stays in the training part; the figures do not break."""
    make_sounds(place.sounds / "x", clips=1, classes=("rare",))
    (place.sounds / "x" / "rare").rename(place.sounds / "rare")
    (place.sounds / "x").rmdir()
    assert main.run(place.arguments("--quiet", "--method", "linear", epochs=1)) == 0
    assert "nan" not in capfd.readouterr().out
    capfd.readouterr()
    assert main.run(["eval", place.adapter]) == 0
    out = capfd.readouterr().out
    assert "rare" in out and "n/a" in out and "nan" not in out


def test_a_run_folder_that_cannot_be_written(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    """F6."""
    assert main.run(place.arguments(run="base.safetensors/run")) == 74
    assert "base.safetensors" in one_line(capfd.readouterr().err)


def test_a_loss_that_is_not_finite(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """F23."""
    more = ["--method", "linear", "--optim.lr", "1e30", "--quiet"]
    assert main.run(place.arguments(*more)) == 3
    assert "optim.lr" in one_line(capfd.readouterr().err)


# Wrong usage.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "unknown command 'trian', did you mean 'train'?"),
        (["frobnicate"], "there are adapt, compare, eval, pretrain, report, train, demo"),
        (["train", "--method", "lineer"], "unknown method 'lineer', did you mean 'linear'?"),
        (["train", "--metod", "linear"], "unknown flag '--metod', did you mean '--method'?"),
        (["train", "foldr"], "no config 'foldr', did you mean 'folder'?"),
        (["train", "gone.py"], "gone.py: no such config file"),
        (["train", "--method"], "missing value for argument '--method'; see aatjax train --help"),
        (["predict"], "required: ADAPTER; see aatjax predict --help"),
        (["predict", "a.safetensors"], "required: FILES"),
        (["predict", "a.safetensors", "x.wav", "--jsn"], "did you mean '--json'?"),
        (["predict", "a.safetensors", "x.wav", "--top", "three"], "--top"),
        (["eval"], "required: ADAPTER"),
        (["eval", "a", "--bas", "x"], "did you mean '--base'?"),
        (["convert", "x"], "required: OUT"),
        (["convert", "x", "y", "--to", "onnx"], "onnx"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main.run(arguments) == 2
    captured = capfd.readouterr()
    assert words in one_line(captured.err)
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optm.lr", "3"], "--optim.lr"),
        (["--training.epoch", "3"], "--training.epochs"),
        (["--optim.lr", "fast"], "fast"),
        (["--optim.lr", "0"], "--optim.lr 0.0 must be above 0"),
        (["--training.batch-size", "0"], "--training.batch-size 0 must be at least 1"),
        (["--optim.schedule", "cosin"], "cosine"),
        (["folder"], "folder"),
    ],
)
def test_a_wrong_field_ends_with_2_and_one_line(
    arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["train", "default", *arguments]) == 2
    captured = capfd.readouterr()
    assert words in one_line(captured.err)
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments) == 0
    out = capfd.readouterr().out
    assert all(verb in out for verb in commands.COMMANDS)


# The flags of commands that people use: none may be lost.
FLAGS = {
    "adapt": "allow-change base dry-run json method no-labels out quiet",
    "bench flops": "classes frames json markdown methods quiet size",
    "bench scaling": "batch-size budget classes experts frames json lengths markdown quiet "
    "rounds size slots time",
    "bench step": "batch-size classes dtype frames json markdown methods quiet rounds size "
    "variants",
    "chaos": "dry-run interruptions json out quiet seed",
    "completion": "",
    "compare": "allow-change budget cross-validate dry-run flags json methods out protocol "
    "quiet seeds verbose",
    "convert": "base classes dry-run dtype force frames json multi-label pool revision rgb "
    "statistics to",
    "demo": "base no-browser port",
    "doctor": "base frames ignore json no-labels quiet show strict workers",
    "eval": "base dry-run json quiet",
    "export": "base check dry-run force json licence platforms quiet runtime to tolerance",
    "methods": "body-norm classes frames json quiet size",
    "plan": "advise classes fit flags json memory method per-device topology",
    "predict": "base batch-size csv dry-run embeddings gap hop json min-duration out "
    "segments smooth threshold to top",
    "prepare": "download dry-run from json max-bad out quiet subset workers",
    "recipes": "json",
    "report": "base dry-run json out quiet",
    "serve": "base batch-size body-timeout concurrency connections host max-bytes max-seconds port "
    "queue timeout wait",
    "summary": "flags json method",
    "train": "allow-change coordinator cross-validate draws dry-run flags json method out "
    "process processes protocol quiet stuck-after",
    "verify": "base json",
}


@pytest.mark.parametrize("command", FLAGS)
def test_every_command_explains_each_of_its_flags(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main.run([*command.split(), "--help"]) == 0
    out = capfd.readouterr().out
    assert f"usage: aatjax {command} [-h]" in out
    rows = re.findall(r"^│ (?:-h, )?--([a-z-]+)(.*?)(?=^│ -|^╰)", out, re.MULTILINE | re.DOTALL)
    assert {flag for flag, _ in rows} == {"help", *FLAGS[command].split()}
    empty = [flag for flag, text in rows if not re.search(r"  \w", text)]
    assert not empty, "flags without a help text"


def test_no_command_is_lost_and_every_one_has_a_group(capfd: pytest.CaptureFixture[str]) -> None:
    assert {name.split()[0] for name in FLAGS} <= set(commands.COMMANDS)
    for name, (group, summary) in commands.COMMANDS.items():
        where = f"aatjax/cli/commands/{name}.py"
        assert group in commands.GROUPS, f"{where}: GROUP must be one of {commands.GROUPS}"
        assert summary, f"{where}: its docstring has no first line"
        assert main.run([name, "--help"]) == 0
        assert f"usage: aatjax {name}" in capfd.readouterr().out


def test_the_package_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aatjax", "--help"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, main.format_overview() + "\n")


def test_flags_lists_the_fields(capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(["train", "folder", "--flags"]) == 0
    out = capfd.readouterr().out
    for flag in ("--optim.lr", "--training.epochs", "--data.path", "--petl.ratio"):
        assert flag in out


@pytest.mark.slow
def test_a_platform_that_is_not_there_is_one_line() -> None:
    """F26."""
    command = [sys.executable, "-c", "from aatjax.cli.main import main; main()", "train"]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "rocm"}, capture_output=True, text=True
    )
    assert done.returncode == 69
    assert "JAX finds no device on platform 'rocm'" in done.stderr
    assert "JAX_PLATFORMS=cpu" in done.stderr and "Traceback" not in done.stderr


def test_out_of_memory_names_the_flags_that_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """F25."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore")

    monkeypatch.setattr("aatjax.experiments.run.fit", full)
    code = main.run(["train", "default", "--out", str(tmp_path / "full"), "--quiet"])
    err = capfd.readouterr().err
    assert code == 71 and "Traceback" not in err
    assert "out of memory: Out of memory allocating 123 bytes.; take a smaller" in err
    assert "--model.remat" in err and "more" not in err


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    assert capfd.readouterr().out.strip().count(".") == 2


def test_summary(trained: Trained, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "summary",
        "folder",
        "--data.path",
        str(trained.sounds),
        "--model.source",
        str(trained.base),
        "--data.cache",
        str(trained.root / "cache"),
    ]
    assert main.run(arguments) == 0
    count = json.loads((trained.root / "run" / "result.json").read_text())["trainable"]
    total = capfd.readouterr().out.splitlines()[-2].split()
    assert total[:2] == ["total", f"{count:,}"]


# Evaluation.


def test_eval_gives_the_figures_of_train(
    trained: Trained, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["eval", trained.adapter, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    figures = json.loads((trained.root / "run" / "result.json").read_text())
    assert found == figures["test"]
    assert main.run(["eval", trained.adapter]) == 0
    out = capfd.readouterr().out
    assert f"accuracy          {found['accuracy']:.4f}" in out
    assert "hum" in out and "whistle" in out


@pytest.mark.parametrize(
    "words",
    [
        ["verify", "RUN"],
        ["eval", "RUN", "--dry-run"],
        ["export", "RUN", "OUT", "--to", "onnx", "--dry-run"],
        ["predict", "RUN", "SOUND", "--dry-run"],
        ["report", "RUN", "--dry-run"],
    ],
    ids=lambda words: words[0],
)
def test_the_run_folder_stands_for_its_adapter(
    trained: Trained, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sound = str(next(iter(sorted(trained.sounds.rglob("*.wav")))))
    named = {"RUN": str(trained.root / "run"), "OUT": str(tmp_path / "out"), "SOUND": sound}
    code = main.run([named.get(word, word) for word in words])
    assert code == 0, capfd.readouterr().err


def test_eval_on_other_sounds(
    trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = make_sounds(tmp_path / "other", clips=3)
    assert main.run(["eval", trained.adapter, str(other), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["clips"] == 6
    strange = make_sounds(tmp_path / "strange", clips=2, classes=("hum", "roar"))
    assert main.run(["eval", trained.adapter, str(strange)]) == 2
    assert "'roar': not among the classes of the adapter" in one_line(capfd.readouterr().err)
    fewer = make_sounds(tmp_path / "fewer", clips=2, classes=("hum",))
    assert main.run(["eval", trained.adapter, str(fewer), "--json"]) == 0
    assert [row["support"] for row in json.loads(capfd.readouterr().out)["per_class"]] == [2, 0]


def test_a_base_that_moved(place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(place.arguments("--quiet", "--method", "linear", epochs=1)) == 0
    moved = place.base.rename(tmp_path / "moved.safetensors")
    wave = str(place.sounds / "hum" / "0.wav")
    capfd.readouterr()
    assert main.run(["predict", place.adapter, wave]) == 65
    assert "--base" in one_line(capfd.readouterr().err)
    assert main.run(["predict", place.adapter, wave, "--base", str(moved)]) == 0
    assert main.run(["eval", place.adapter, "--base", str(moved)]) == 0


# Prediction.


def test_predict_prints_the_classes(trained: Trained, capfd: pytest.CaptureFixture[str]) -> None:
    waves = [str(trained.sounds / name / "0.wav") for name in ("hum", "whistle")]
    assert main.run(["predict", trained.adapter, *waves]) == 0
    lines = capfd.readouterr().out.splitlines()
    for line, path in zip(lines, waves, strict=True):
        shown, first, p, second, q = line.split("  ")[0], *line.removeprefix(path).split()
        assert shown == path
        assert {first, second} == {"hum", "whistle"}
        assert float(p) >= float(q) and float(p) + float(q) == pytest.approx(1, abs=0.002)
    assert main.run(["predict", trained.adapter, waves[0], "--top", "1"]) == 0
    assert len(capfd.readouterr().out.removeprefix(waves[0]).split()) == 2


def test_predict_json(trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "long.wav", tone(0, 0, samples=40000), 16000)
    arguments = ["predict", trained.adapter, str(tmp_path / "long.wav"), "--json"]
    assert main.run(arguments) == 0
    (line,) = capfd.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["path"] == str(tmp_path / "long.wav")
    assert set(found["probabilities"]) == {"hum", "whistle"}
    assert [w["start"] for w in found["windows"]] == [0.0, 0.995, 1.99]
    assert main.run([*arguments, "--hop", "0.5"]) == 0
    assert len(json.loads(capfd.readouterr().out)["windows"]) == 5
    assert main.run([*arguments, "--hop", "nan"]) == 2
    assert "hop" in one_line(capfd.readouterr().err)


def test_names_of_every_kind(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """B12."""
    monkeypatch.chdir(tmp_path)
    names = [*ODD_NAMES, os.fsdecode(b"broken-\xff-encoding.wav")]
    for name in names:
        soundfile.write("made.wav", tone(0, 0), 16000)
        Path("made.wav").rename(name)
    assert main.run(["predict", trained.adapter, "--json", "--", *names]) == 0
    found = [json.loads(line)["path"] for line in capfd.readouterr().out.splitlines()]
    assert found == names
    assert main.run(["predict", trained.adapter, "--", *names]) == 0
    out = capfd.readouterr().out
    assert len(out.splitlines()) == len(names), "one line a file"
    assert r"line\nbreak.wav" in out and r"broken-\xff-encoding.wav" in out
    assert "ünïcode 音.wav" in out


def test_names_of_every_kind_train(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """B12."""
    for name in [*ODD_NAMES, os.fsdecode(b"broken-\xff-encoding.wav")]:
        data = (place.sounds / "hum" / "0.wav").read_bytes()
        (place.sounds / "hum" / name).write_bytes(data)
    (place.sounds / "hum").rename(place.sounds / 'a class,\nwith 音 \'n "all"')
    assert main.run(place.arguments("--quiet", "--method", "linear", epochs=1)) == 0
    info = read_info(place.adapter)
    assert info is not None
    assert info["classes"] == ['a class,\nwith 音 \'n "all"', "whistle"]
    assert main.run(["eval", place.adapter]) == 0


def test_one_bad_file_does_not_stop_the_others(
    trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = str(trained.sounds / "hum" / "1.wav")
    bad = tmp_path / "not sound.wav"
    bad.write_text("hello")
    gone = tmp_path / "gone.wav"
    assert main.run(["predict", trained.adapter, str(bad), good, str(gone), good]) == 65
    captured = capfd.readouterr()
    assert [line.startswith(good) for line in captured.out.splitlines()] == [True, True]
    lines = captured.err.splitlines()
    assert len(lines) == 3 and all(line.startswith("aatjax: ") for line in lines)
    assert str(bad) in lines[0] and "cannot be decoded" in lines[0]
    assert str(gone) in lines[1]
    assert "2 of 4 files could not be read" in lines[2]


@pytest.mark.parametrize("verb", ["predict", "eval"])
def test_something_else_than_an_adapter(
    verb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    for make in (lambda: None, lambda: path.write_text("hello")):
        make()
        assert main.run([verb, str(path), *(["a.wav"] if verb == "predict" else [])]) == 65
        assert "x.safetensors" in one_line(capfd.readouterr().err)


# Conversion.


def test_convert_there_and_back(
    trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wave = np.random.default_rng(0).normal(size=(1, 98, 128)).astype(np.float32)
    config = dataclasses.replace(TINY, pool="cls_dist", num_classes=4)
    model = AST(config, rngs=nnx.Rngs(3))
    write_native(tmp_path / "w.safetensors", surgery.arrays(model), config, ["a", "b", "c", "d"])
    steps = [
        ("w.safetensors", "hf", ["--to", "hf"], "hf, from native"),
        ("hf", "again.safetensors", [], "again.safetensors: native, from hf"),
        ("again.safetensors", "orbax", ["--to", "orbax"], "orbax: orbax, from native"),
        ("orbax", "last.safetensors", [], "native, from orbax"),
    ]
    for source, out, more, words in steps:
        assert main.run(["convert", str(tmp_path / source), str(tmp_path / out), *more]) == 0
        assert words in capfd.readouterr().out
        found = load(tmp_path / out)
        np.testing.assert_allclose(
            found(jax.numpy.asarray(wave)), model(jax.numpy.asarray(wave)), atol=1e-4
        )
        assert found.labels == ("a", "b", "c", "d")
    assert main.run(["predict", str(tmp_path / "last.safetensors"), "/nowhere.wav"]) == 65


def test_convert_to_another_length_and_type(
    trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.safetensors"
    arguments = ["convert", str(trained.base), str(out), "--frames", "55", "--dtype", "float16"]
    assert main.run(arguments) == 0
    assert load(out).config.frames == 55
    assert out.stat().st_size < 0.6 * trained.base.stat().st_size


@pytest.mark.parametrize(
    ("source", "out", "code"),
    [("gone.pth", "o.safetensors", 65), ("base", "base/o.safetensors", 74), ("base", "o.pth", 2)],
)
def test_convert_that_fails(
    source: str,
    out: str,
    code: int,
    trained: Trained,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "base").write_bytes(trained.base.read_bytes())
    before = sorted(tmp_path.iterdir())
    source = str(trained.base) if source == "base" else str(tmp_path / source)
    assert main.run(["convert", source, str(tmp_path / out)]) == code
    one_line(capfd.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before


def test_convert_replaces_an_output_only_by_force(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One rule for files and folders; the umask decides the modes."""
    plain = tmp_path / "plain"
    plain.touch()
    outs = {"w.safetensors": [], "hf": ["--to", "hf"], "orbax": ["--to", "orbax"]}
    for name, more in outs.items():
        out = tmp_path / name
        command = ["convert", "embedded", str(out), *more]
        assert main.run(command) == 0
        found = [out] if out.is_file() else [f for f in out.rglob("*") if f.is_file()]
        assert {file.stat().st_mode for file in found} == {plain.stat().st_mode}
        capfd.readouterr()
        assert main.run(command) == 2
        assert "--force" in one_line(capfd.readouterr().err)
        assert main.run([*command, "--force"]) == 0
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    assert main.run(["convert", "embedded", str(tmp_path / "home"), "--force"]) == 2
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    assert {p.name for p in tmp_path.iterdir()} == {"plain", "home", *outs}


def test_convert_writes_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES["tiny"], "depth", 1)
    out = tmp_path / "w.safetensors"
    assert main.run(["convert", "random:tiny", str(out)]) == 0
    assert load(out).config.dim == 192


# Folds.


def make_esc(root: Path, folds: int = 2) -> Path:
    (root / "audio").mkdir(parents=True)
    (root / "meta").mkdir()
    heads = ["filename", "fold", "target", "category", "esc10", "src_file", "take"]
    rows: list[list[Any]] = []
    for label, name in enumerate(("hum", "whistle")):
        for i in range(8):
            fold, file = i % folds + 1, f"{i % folds + 1}-{label}{i}-A-{label}.wav"
            soundfile.write(root / "audio" / file, tone(label, 10 * label + i), 16000)
            rows.append([file, fold, label, name, "True", f"{label}{i}", "A"])
    with (root / "meta" / "esc50.csv").open("w", newline="") as file:
        csv.writer(file).writerows([heads, *rows])
    return root


def test_cross_validation(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    esc = make_esc(place.root / "esc")
    arguments = [
        "train",
        "esc",
        "--data.path",
        str(esc),
        "--model.source",
        str(place.base),
        "--model.frames",
        "98",
        "--out",
        str(place.root / "cv"),
        "--training.epochs",
        "2",
        "--data.cache",
        str(place.root / "cache"),
        "--method",
        "linear",
    ]
    assert main.run([*arguments, "--cross-validate"]) == 0
    captured = capfd.readouterr()
    heads, first, second, mean = captured.out.splitlines()
    columns = ["linear", "trainable", "accuracy", "tested on", "seconds"]
    assert re.split(" {2,}", heads) == columns
    assert re.search(r" 8 clips ", first) and re.search(r" 16 clips ", mean), captured.out
    assert first.startswith("fold 1 ") and second.startswith("fold 2 ")
    scores = []
    for fold in ("1", "2"):
        figures = json.loads((place.root / "cv" / f"fold{fold}" / "result.json").read_text())
        scores.append(figures["headline"][1])
        assert figures["test"]["clips"] == 8
    found = float(mean.split()[1])
    assert found == pytest.approx(np.mean(scores), abs=5e-4)
    assert "[" in mean and "]" in mean
    assert "fold 1 (1 of 2)" in captured.err
    # Again: every fold is finished; and a run without folds has the folder's result for itself.
    assert main.run([*arguments, "--cross-validate"]) == 0
    again = capfd.readouterr()
    assert again.out == captured.out and again.err.count("finished before") == 2
    assert main.run(arguments) == 0
    assert main.run([*arguments, "--cross-validate"]) == 0
    capfd.readouterr()
    assert main.run(arguments) == 0
    assert "finished before" in capfd.readouterr().err


def test_a_single_fold_cannot_be_held_out(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    esc = make_esc(place.root / "esc", folds=1)
    arguments = place.arguments("--data.path", str(esc), "--cross-validate", "--quiet")
    assert main.run(arguments) == 65
    assert "cross-validation needs two or more" in one_line(capfd.readouterr().err)


# Processes of their own.


def environment(**changes: str | None) -> dict[str, str]:
    cache = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    whole = {**os.environ, **cache, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **changes}
    return {name: value for name, value in whole.items() if value is not None}


MAIN = "import sys; from aatjax.cli.main import main; main(sys.argv[1:])"


def start(arguments: list[str], **changes: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**changes),
    )


def wait_for_rows(process: "subprocess.Popen[str]", metrics: Path, rows: int) -> None:
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= rows):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed(number: signal.Signals, place: Place) -> None:
    """F7, F8: it saves, reports it, ends with 130 or 143, and resumes to equal weights."""
    metrics = place.root / "broken" / "metrics.jsonl"
    arguments = place.arguments(run="broken", epochs=40)
    process = start(arguments)
    wait_for_rows(process, metrics, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert out == "" and "Traceback" not in err
    assert "the same command goes on from here" in err.splitlines()[-1]
    steps = int(err.splitlines()[-1].split("step ")[1].split(" ")[0])
    assert 0 < steps < 160
    assert (place.root / "broken" / "checkpoints" / str(steps)).is_dir()
    assert not (place.root / "broken" / "adapter.safetensors").exists()

    process = start(arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"going on from step {steps} of 160" in err
    rows = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert rows == list(range(4, 161, 4))
    if number == signal.SIGTERM:
        return  # it goes on as after SIGINT
    process = start(place.arguments(run="straight", epochs=40))
    assert process.communicate(timeout=120) and process.returncode == 0
    one, other = (
        load_file(place.root / run / "adapter.safetensors") for run in ("broken", "straight")
    )
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.slow
def test_killed_and_resumed(place: Place) -> None:
    """F2: kill -9; the same command goes on, and no step is reported twice."""
    arguments = place.arguments(run="killed", epochs=30)
    metrics = place.root / "killed" / "metrics.jsonl"
    process = start(arguments)
    wait_for_rows(process, metrics, 4)
    process.kill()
    process.communicate()
    process = start(arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "going on from step" in err and "adapter: " in out
    rows = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert rows == list(range(4, 121, 4))


@pytest.mark.slow
def test_a_closed_pipe_is_quiet(trained: Trained) -> None:
    """F29: aatjax predict | head -1."""
    process = start(["predict", trained.adapter, *[str(trained.sounds / "hum" / "0.wav")] * 300])
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.wait(60)
    assert process.returncode in (0, 141)
    assert err == ""


@pytest.mark.slow
def test_a_bare_environment(trained: Trained, tmp_path: Path) -> None:
    """B29: no HOME, no cache folder, a dumb and narrow terminal, no UTF-8."""
    bare = {
        "HOME": None,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TERM": "dumb",
        "COLUMNS": "20",
        "LC_ALL": "C",
        "LANG": None,
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    (tmp_path / "ü 音.wav").write_bytes((trained.sounds / "hum" / "0.wav").read_bytes())
    process = start(["predict", trained.adapter, str(tmp_path / "ü 音.wav")], **bare)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "hum" in out
    arguments = [
        "train",
        "folder",
        "--data.path",
        str(trained.sounds),
        "--model.source",
        str(trained.base),
        "--out",
        str(tmp_path / "run"),
        "--training.epochs",
        "1",
        "--method",
        "linear",
    ]
    process = start(arguments, **{**bare, "XDG_CACHE_HOME": None, "TMPDIR": "/nowhere"})
    out, err = process.communicate(timeout=90)
    assert process.returncode in (0, 74) and "Traceback" not in err, err
    process = start(["train", "--optm.lr", "3"], **bare)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "--optim.lr" in one_line(err)


@pytest.mark.slow
def test_the_bar_on_a_narrow_terminal(trained: Trained, tmp_path: Path) -> None:
    """B29: a terminal of 20 columns."""
    import pty

    arguments = [
        "train",
        "folder",
        "--data.path",
        str(trained.sounds),
        "--model.source",
        str(trained.base),
        "--out",
        str(tmp_path / "run"),
        "--training.epochs",
        "2",
        "--method",
        "linear",
        "--data.cache",
        str(trained.root / "cache"),
    ]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment(COLUMNS="20", TERM="xterm"),
        text=True,
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):
        while part := os.read(ours, 4096):
            shown += part
    out, _ = process.communicate(timeout=90)
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    assert "adapter: " in out
    assert b"Traceback" not in shown
    assert b"epoch 2/2" in b" ".join(shown.split())


@pytest.mark.slow
def test_help_is_quick_and_loads_no_jax() -> None:
    code = (
        "import sys; from aatjax.cli.main import run; assert run(['--help']) == 0; "
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_the_installed_command(tmp_path: Path) -> None:
    """It may not run where a checkout is on PYTHONPATH, which brings no script."""
    script = Path(sys.executable).with_name("aatjax")
    if not script.exists():
        pytest.skip(f"no {script}: aatjax is imported from a folder, not installed (pip install .)")
    process = subprocess.run([script, "trian"], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 2
    assert "did you mean 'train'" in one_line(process.stderr)
    assert not list(tmp_path.iterdir())
