"""A finished run: compared like a running one, continued, evaluated again, or left as it is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from adapter_files import write_base

from aatjax import petl
from aatjax.cli import main
from aatjax.config import Config, Data, Model
from aatjax.errors import AatjaxError, DataError, UsageError
from aatjax.experiments import run as experiment
from aatjax.reports.html.collect import collect_report
from aatjax.train.optim import Optim
from aatjax.train.training import Training

EPOCHS = ("training.epochs",)


def write_sound(path: Path, seed: int) -> None:
    wave = 0.1 * np.random.default_rng(seed).normal(size=8000)
    wave += (path.parent.name == "tone") * np.sin(np.arange(8000) / 5)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.5 * wave, 16000)


def write_table(root: Path) -> None:
    """Every third clip is a test clip."""
    files = sorted(path.relative_to(root) for path in root.rglob("*.wav"))
    rows = [f"{f},{f.parent},{'test' if int(f.stem) % 3 == 0 else 'train'}" for f in files]
    (root / "list.csv").write_text("\n".join(["path,label,split", *rows]))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("hiss", "tone"):
        for i in range(6):
            write_sound(tmp_path / "s" / name / f"{i}.wav", i)
    write_table(tmp_path / "s")
    return Config(
        petl=petl.Linear(),
        model=Model(source=str(write_base(tmp_path / "base.safetensors"))),
        data=Data(
            path=str(tmp_path / "s" / "list.csv"), format="manifest", cache=str(tmp_path / "c")
        ),
        training=Training(epochs=2, batch_size=4, threads=0),
        optim=Optim(lr=1e-2, schedule="constant"),
    )


def take_snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Content and time of every file but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def with_epochs(config: Config, epochs: int) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, epochs=epochs))


def train(config: Config, folder: Path, *allow: str) -> experiment.ExperimentResult:
    return experiment.train(config, run_dir=folder, show=None, allow_change=allow)


def test_a_finished_run_is_compared_like_a_running_one(config: Config, tmp_path: Path) -> None:
    run, sounds = tmp_path / "run", tmp_path / "s"
    first = train(config, run)
    before = take_snapshot(run)
    assert train(config, run).headline == first.headline

    def refuse(message: str, changed: Config = config, *allow: str) -> None:
        with pytest.raises(AatjaxError, match=message) as caught:
            train(changed, run, *allow)
        assert "\n" not in str(caught.value)
        assert take_snapshot(run) == before

    new = sounds / "tone" / "7.wav"
    write_sound(new, 7)
    write_table(sounds)
    refuse("train: new 'tone/7.wav'.*delete it: the run is finished")
    refuse("nothing left to train with the change .*train: new 'tone/7.wav'", config, "clips")
    new.unlink()
    kept = (sounds / "hiss" / "1.wav").read_bytes()
    write_sound(sounds / "hiss" / "1.wav", 99)
    write_table(sounds)
    refuse("train: changed 'hiss/1.wav'")
    (sounds / "hiss" / "1.wav").unlink()
    write_table(sounds)
    refuse("train: gone 'hiss/1.wav'")
    refuse("nothing left to train with the change .*train: gone 'hiss/1.wav'", config, "clips")
    (sounds / "hiss" / "1.wav").write_bytes(kept)
    write_table(sounds)
    refuse("optim.lr: 0.01 -> 0.5", dataclasses.replace(config, optim=Optim(lr=0.5)))
    refuse(r"training.epochs: 2 -> 1", with_epochs(config, 1))
    refuse(r"more epochs behind it .*training.epochs: 2 -> 1", with_epochs(config, 1), *EPOCHS)
    steeper = dataclasses.replace(config, optim=Optim(lr=0.5, schedule="constant"))
    refuse("nothing left to train with the change .optim.lr", steeper, "optim")
    falling = dataclasses.replace(with_epochs(config, 4), optim=Optim(lr=1e-2))
    refuse("falls to zero over the epochs", falling, "optim", *EPOCHS)
    write_base(tmp_path / "base.safetensors", seed=1)
    refuse("holds a run on other weights: .* had fingerprint")
    write_base(tmp_path / "base.safetensors")
    assert train(config, run).headline == first.headline and take_snapshot(run) == before
    # On the command line, also where it is quiet.
    write_sound(sounds / "hiss" / "2.wav", 98)
    (run / "config.json").write_text(json.dumps(config.to_json()))
    command = ["train", str(run / "config.json"), "--out", str(run), "--quiet"]
    assert main.run(command) == 2


def test_more_epochs_are_trained_as_from_the_start(config: Config, tmp_path: Path) -> None:
    """To the byte: an extended run writes the adapter of a straight one."""
    run = tmp_path / "run"
    train(config, run)
    longer = train(with_epochs(config, 4), run, *EPOCHS)
    straight = train(with_epochs(config, 4), tmp_path / "straight")
    for name in ("adapter.safetensors", "config.json", "clips.json"):
        assert (run / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    assert longer.headline == straight.headline
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 4
    with pytest.raises(UsageError, match=r"training\.epochs: 4 -> 2"):
        train(config, run)


def test_an_extension_that_ends_early_is_not_taken_for_a_finished_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(config, run)

    def fail(*args: Any, **options: Any) -> None:
        raise DataError("the disk is gone")

    monkeypatch.setattr(experiment, "_write_result", fail)
    with pytest.raises(DataError, match="the disk is gone"):
        train(with_epochs(config, 3), run, *EPOCHS)
    monkeypatch.undo()
    assert not (run / "result.json").exists()
    assert train(with_epochs(config, 3), run).run is not None
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_other_test_clips_have_other_figures_and_the_same_weights(
    config: Config, tmp_path: Path
) -> None:
    run, sounds = tmp_path / "run", tmp_path / "s"
    train(config, run)
    before = json.loads((run / "result.json").read_text())
    write_sound(sounds / "tone" / "9.wav", 9)
    write_table(sounds)
    with pytest.raises(UsageError, match=r"test: new 'tone/9.wav'.*to have its figures made again"):
        train(config, run)
    assert train(config, run, "clips").run is not None
    after = json.loads((run / "result.json").read_text())
    assert (before["test"]["clips"], after["test"]["clips"]) == (4, 5)
    assert after["seconds"] == before["seconds"]
    # Without checkpoints there is nothing to go on from.
    write_sound(sounds / "tone" / "12.wav", 12)
    write_table(sounds)
    (run / "checkpoints").rename(tmp_path / "checkpoints")
    with pytest.raises(UsageError, match="its checkpoints are gone"):
        train(config, run, "clips")


@pytest.mark.slow
def test_a_replaced_adapter_has_no_share_in_the_figures_of_the_run(
    config: Config, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    train(config, run)
    train(with_epochs(config, 3), other)
    kept = (run / "adapter.safetensors").read_bytes()
    (run / "adapter.safetensors").write_bytes((other / "adapter.safetensors").read_bytes())
    for use in (lambda: train(config, run), lambda: collect_report(run)):
        with pytest.raises(DataError, match="is not the file that the run wrote"):
            use()
    (run / "adapter.safetensors").unlink()
    assert train(config, run).run is not None
    assert (run / "adapter.safetensors").read_bytes() == kept
