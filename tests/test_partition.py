"""Dividing a set: official parts by any of their names, and figures on clips never trained on."""

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from adapter_files import rewrite

from aatjax import petl
from aatjax.cli import main
from aatjax.config import Config, Data, Model
from aatjax.data.manifest import Manifest
from aatjax.errors import DataError, UsageError
from aatjax.experiments import partition
from aatjax.experiments import run as experiment
from aatjax.experiments.cross_validation import cross_validate
from aatjax.experiments.evaluate import evaluate_adapter, load_test_clips
from aatjax.inference.classifier import Classifier
from aatjax.io import progress
from aatjax.reports.html.collect import collect_report
from aatjax.train.adapter_file import load_adapter
from aatjax.train.training import Training


def write_sounds(root: Path, per_class: int = 6) -> Path:
    """Class folders of stereo files: sound on the left, nothing on the right."""
    for label, name in enumerate(("hiss", "tone")):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            rng = np.random.default_rng(10 * label + i)
            wave = 0.1 * rng.normal(size=8000)
            wave += label * 0.5 * np.sin(np.arange(8000) / (3 + i))
            soundfile.write(root / name / f"{i}.wav", np.stack([wave, 0 * wave], 1), 16000)
    return root


def write_table(root: Path, *splits: str) -> Data:
    """A manifest with a number of splits for the clips of each class in turn."""
    files = sorted(path.relative_to(root) for path in root.rglob("*.wav"))
    rows = [f"{f},{f.parent},{splits[int(f.stem) % len(splits)]}" for f in files]
    (root / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    return Data(format="manifest", path=str(root / "list.csv"), cache=str(root / "cache"))


@pytest.mark.parametrize(
    "names",
    [("training", "validation", "testing"), ("Train", "dev", "eval"), ("train", "val", "test")],
)
def test_official_parts_by_their_usual_names(names: tuple[str, ...], tmp_path: Path) -> None:
    parts = partition.make_partition(write_table(write_sounds(tmp_path / "s"), *names))
    found = [{int(Path(c.id).stem) % 3 for c in p.clips} for p in parts.sources().values()]
    assert list(parts.sources()) == ["train", "valid", "test"] and found == [{0}, {1}, {2}]


def test_an_unknown_part_is_refused_by_its_row(tmp_path: Path) -> None:
    data = write_table(write_sounds(tmp_path / "s"), "train", "test", "holdout")
    with pytest.raises(DataError, match="row 4: unknown split 'holdout'; write train, valid or"):
        partition.make_partition(data)


def test_a_division_without_training_clips_is_refused(tmp_path: Path) -> None:
    data = write_table(write_sounds(tmp_path / "s"), "test", "valid")
    with pytest.raises(DataError, match="holds only test, valid clips: add the training clips"):
        partition.make_partition(data)


def test_clips_of_no_part_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_table(write_sounds(tmp_path / "s"), "train", "test", "valid")
    whole = Manifest(str(data.path))
    clips = [dataclasses.replace(c, split=None) if c.split == "valid" else c for c in whole.clips]
    monkeypatch.setattr(partition, "open_data", lambda *_, **__: whole.with_clips(clips))
    parts = partition.make_partition(dataclasses.replace(data, valid_fraction=0))
    assert (len(parts.train), parts.valid) == (4, None)
    assert partition.describe_partition(parts) == ["4 clips in no part of the division: left out"]


def test_a_figure_without_test_clips_is_not_repeated(tmp_path: Path) -> None:
    write_sounds(tmp_path / "s")
    data = Data(path=str(tmp_path / "s"), cache=str(tmp_path / "c"), shots=1, test_fraction=0)
    with pytest.raises(UsageError, match="no test clips, so no figure to repeat"):
        cross_validate(
            Config(petl=petl.Linear(), data=data),
            run_dir=tmp_path / "run",
            draws=2,
            folds=False,
            show=None,
        )
    assert not (tmp_path / "run").exists(), "no training before the error"


def test_s7_a_new_clip_moves_no_other_between_the_parts(tmp_path: Path) -> None:
    write_sounds(tmp_path / "s", per_class=12)
    data = Data(path=str(tmp_path / "s"), cache=str(tmp_path / "c"), valid_fraction=0.3)

    def divide() -> dict[str, set[str]]:
        parts = partition.make_partition(data).sources()
        return {name: {clip.id for clip in part.clips} for name, part in parts.items()}

    before = divide()
    assert sorted(before) == ["test", "train", "valid"]
    for number in range(6):
        copy = tmp_path / "s" / "tone" / f"new{number}.wav"
        copy.write_bytes((tmp_path / "s" / "tone" / "0.wav").read_bytes())
        after = divide()
        assert all(before[name] <= after[name] for name in before)
        before = after


@pytest.mark.parametrize("size", [16, 20, 80])
def test_a_stage_that_takes_long_is_shown(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", str(size))
    for is_terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda is_terminal=is_terminal: is_terminal
        with progress.StageBar(stream=stream, after=2.0) as bar:
            bar.update("list", 1, 1000)
            now[0] += 1.9
            bar.update("list", 100, 1000)
            assert not stream.getvalue()
            bar.update("decode", 1, 1000)
            now[0] += 2.1
            for done in (500, 501):
                bar.update("decode", done, 1000)
        text = stream.getvalue()
        assert "decode" in text and "list" not in text
        if not is_terminal:
            assert text == "decode (500 of 1,000, 0:02 left)\n"
        else:
            plain = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", text)
            assert max(map(len, re.split(r"[\r\n]", plain))) <= size
    stream = io.StringIO()
    with progress.StageBar(stream=stream, quiet=True) as bar:
        bar.update("decode", 1, 2)
    assert not stream.getvalue()


def test_a_channel_number_on_the_command_line(tmp_path: Path, capfd: Any) -> None:
    write_sounds(tmp_path / "s")
    given = ["--data.path", str(tmp_path / "s"), "--data.cache", str(tmp_path / "c")]
    run = ["--out", str(tmp_path / "run"), "--data.channels"]
    assert main.run(["train", "folder", *given, *run, "7"]) == 2
    assert "channel 7 is requested, but there are 2" in capfd.readouterr().err
    assert main.run(["train", "folder", *given, *run, "right"]) == 2
    assert "--data.channels 'right' is not one of {mean,left}|INT" in capfd.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_ast: str) -> Path:
    """A run folder, trained on the left channel of the sounds beside it."""
    root = tmp_path_factory.mktemp("trained")
    write_sounds(root / "s")
    config = Config(
        petl=petl.Linear(),
        model=Model(source=small_ast),
        data=Data(
            path=str(root / "s"),
            cache=str(root / "cache"),
            channels="left",
            split_method="stratified",
        ),
        training=Training(epochs=1, batch_size=4, threads=0),
    )
    experiment.train(config, run_dir=root / "run", show=None)
    return root / "run"


def test_a_set_that_has_changed_has_no_test_part_any_more(trained: Path, tmp_path: Path) -> None:
    adapter = load_adapter(trained / "adapter.safetensors")
    data = {**adapter.info["config"]["data"], "path": str(tmp_path / "s")}
    config = {**adapter.info["config"], "data": data}
    (tmp_path / "config.json").write_text(json.dumps(config))
    own = tmp_path / "adapter.safetensors"
    adapter = dataclasses.replace(adapter, info={**adapter.info, "config": config}, path=own)
    write_sounds(tmp_path / "s")
    metrics, test = evaluate_adapter(adapter)
    assert metrics.clips == len(test) == 2
    write_sounds(tmp_path / "more", per_class=8)
    for name in ("hiss", "tone"):
        for i in (6, 7):
            (tmp_path / "more" / name / f"{i}.wav").rename(tmp_path / "s" / name / f"{i}.wav")
    with pytest.raises(UsageError, match="not those that the adapter was trained on: files were"):
        evaluate_adapter(adapter)
    whole = Data(path=str(tmp_path / "s"), cache=str(tmp_path / "cache"))
    assert evaluate_adapter(adapter, whole)[0].clips == 16


def test_the_sounds_that_a_file_names_are_opened_only_beside_its_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file from elsewhere no path is followed; a cache is never where a file wants it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    config = json.loads((trained / "config.json").read_text())
    config["data"]["cache"] = str(tmp_path / "planted")
    sent = tmp_path / "sent"
    sent.mkdir()

    def change(info: dict[str, Any]) -> None:
        info["config"] = config

    file = rewrite(trained / "adapter.safetensors", change, out=sent / "adapter.safetensors")
    opened: list[Any] = []
    monkeypatch.setattr(partition, "open_source", lambda *args, **_: opened.append(args))
    assert main.run(["eval", str(file)]) == 2
    assert isinstance(collect_report(file).evaluation, str)
    (sent / "config.json").write_text(json.dumps({**config, "name": "another run"}))
    with pytest.raises(UsageError, match="does not lie in the folder of the run that wrote it"):
        evaluate_adapter(load_adapter(file))
    assert not opened
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    (sent / "config.json").write_text(json.dumps(config))
    metrics, _ = evaluate_adapter(load_adapter(file))
    assert metrics.clips == 2
    assert (tmp_path / "user" / "aatjax" / "audio").is_dir()
    assert not (tmp_path / "planted").exists()
    unproven = dataclasses.replace(load_adapter(file), info={"config": config})
    with pytest.raises(UsageError, match="not those that the adapter was trained on"):
        evaluate_adapter(unproven)  # a folder with the sounds of someone else in it
    pipe = {**config, "data": {**config["data"], "path": "/dev/zero"}}
    (sent / "config.json").write_text(json.dumps(pipe))
    unproven = dataclasses.replace(unproven, info={"config": pipe})
    with pytest.raises(UsageError, match="'/dev/zero': it is a device"):
        evaluate_adapter(unproven)
    for wrong in ({"data": 5}, [], {"petl": {"name": "linear"}, "data": {"max_bad": -1}}):
        (sent / "config.json").write_text(json.dumps(wrong))
        damaged = dataclasses.replace(load_adapter(file), info={"config": wrong})
        with pytest.raises(DataError, match=r"adapter\.safetensors: damaged or changed: "):
            evaluate_adapter(damaged)


def test_a_report_names_the_changed_set(trained: Path) -> None:
    wav = trained.parent / "s" / "tone" / "0.wav"
    extra = wav.with_name("extra.wav")
    try:
        extra.write_bytes(wav.read_bytes())
        text = collect_report(trained).evaluation
    finally:
        extra.unlink()
    assert isinstance(text, str) and "name the sounds to evaluate on" in text


def test_evaluation_and_prediction_use_the_channel_of_training(
    trained: Path, tmp_path: Path
) -> None:
    adapter = load_adapter(trained / "adapter.safetensors")
    assert adapter.frontend.channels == "left"
    sounds = trained.parent / "s"
    left = soundfile.read(sounds / "tone" / "3.wav", dtype="int16")[0][:, 0]
    classifier = Classifier.load(trained / "adapter.safetensors")
    from_file = classifier.predict(sounds / "tone" / "3.wav")
    assert from_file.probabilities == classifier.predict_waveform(left).probabilities
    assert from_file.probabilities != classifier.predict_waveform(left // 2).probabilities
    source = load_test_clips(adapter, Data(path=str(sounds), cache=str(tmp_path / "cache")))
    at = [Path(clip.id).as_posix() for clip in source.clips].index("tone/3.wav")
    np.testing.assert_array_equal(source.waveform(at), left)


def test_lists_without_a_test_part_are_used_and_this_is_stated(tmp_path: Path) -> None:
    """Arabic Speech Commands' development lists: speakers stay whole, `val.csv` validates."""
    for word in ("backward", "zoom in"):
        (tmp_path / "dataset" / word).mkdir(parents=True)
        for speaker in (2, 30, 31):
            wave = np.random.default_rng(speaker + len(word)).normal(size=8000) * 0.1
            soundfile.write(tmp_path / "dataset" / word / f"{speaker:08d}_NO_01.wav", wave, 16000)
    for name, speakers in (("train", (30, 31)), ("val", (2,))):
        rows = [
            f"dataset/{word}/{speaker:08d}_NO_01.wav,{word}"
            for word in ("backward", "zoom in")
            for speaker in speakers
        ]
        (tmp_path / f"{name}.csv").write_text("\n".join(["file,class", *rows]))
    screen = io.StringIO()
    data = Data(path=str(tmp_path), cache=str(tmp_path / "cache"))
    parts = partition.make_partition(data, show=screen)
    assert parts.valid is not None and parts.test is None
    assert [len({c.group for c in part.clips}) for part in (parts.train, parts.valid)] == [2, 1]
    first, last = screen.getvalue().splitlines()
    assert first.endswith(": 6 clips, 2 classes, 3 recordings or speakers")
    assert last == "no test clips: no test figure; name some by --data.path train=... test=..."
