"""The embedded default: what `aatjax train` does on a fresh machine, from end to end."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny_run

import aatjax
from aatjax.cli.main import run
from aatjax.config import Model
from aatjax.convert import load
from aatjax.convert.load import EMBEDDED
from aatjax.data.synthetic.synthesize import PRETRAIN_SOUNDS, TARGET_SOUNDS, synthesize
from aatjax.experiments import run as experiment
from aatjax.train.adapter_file import read_metadata


def test_the_embedded_weights_are_small_and_know_none_of_the_target_sounds():
    assert sum(path.stat().st_size for path in EMBEDDED.values()) < 12e6
    model = aatjax.load("embedded")
    assert model.labels == PRETRAIN_SOUNDS
    assert not set(model.labels) & set(TARGET_SOUNDS)


def test_the_embedded_weights_recognise_sounds_they_were_trained_for():
    classifier = aatjax.Classifier.load("embedded")
    right = 0
    for sound in PRETRAIN_SOUNDS:
        right += classifier.predict_waveform(synthesize(sound, 10_000_000)).label == sound
    assert right > 0.5 * len(PRETRAIN_SOUNDS)


def test_what_was_made_on_former_embedded_weights_stays_on_them(tmp_path, monkeypatch):
    config = tiny_run.make_config(tmp_path)
    config = dataclasses.replace(config, model=Model(frames=48))
    longer = dataclasses.replace(config.training, epochs=3)
    whole = tiny_run.train(
        dataclasses.replace(config, model=Model("embedded-1", frames=48), training=longer),
        tmp_path / "whole",
    )
    with monkeypatch.context() as patch:  # as a former version wrote it
        patch.setitem(load.EMBEDDED, "embedded", load.EMBEDDED["embedded-1"])
        tiny_run.train(config, tmp_path / "run")
    stated = read_metadata(tmp_path / "run/adapter.safetensors").base
    assert stated.source == "embedded"
    assert stated.fingerprint != aatjax.load("embedded").origin.fingerprint
    for base in (None, "embedded"):
        found = aatjax.load_adapter(tmp_path / "run/adapter.safetensors", base=base)
        assert found.model.origin is not None
        assert found.model.origin.fingerprint == stated.fingerprint
    assert tiny_run.train(config, tmp_path / "run").run is None  # finished before
    config = dataclasses.replace(config, training=longer)
    more = experiment.train(
        config, run_dir=tmp_path / "run", show=None, allow_change=["training.epochs"]
    )
    assert more.run.history[-1]["train/loss"] == whole.run.history[-1]["train/loss"]
    assert run(["eval", str(tmp_path / "run"), "--quiet"]) == 0


@pytest.mark.slow
def test_the_default_trains_evaluates_and_predicts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["train", "--training.epochs", "8", "--data.test-clips", "10", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "soft_moa" in printed and "accuracy" in printed
    folder = Path("runs/default-soft_moa")
    result = json.loads((folder / "result.json").read_text())
    accuracy = result["test"]["accuracy"]
    assert accuracy > 0.4  # ten classes
    for name in TARGET_SOUNDS[:2]:
        soundfile.write(f"{name}.wav", synthesize(name, 5), 16000)
    files = [f"{name}.wav" for name in TARGET_SOUNDS[:2]]
    assert run(["eval", str(folder / "adapter.safetensors"), "--json"]) == 0
    assert np.isclose(json.loads(capsys.readouterr().out)["accuracy"], accuracy)
    assert run(["predict", str(folder / "adapter.safetensors"), *files]) == 0
    assert all(name in capsys.readouterr().out for name in ["siren"])
