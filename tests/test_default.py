"""The embedded default: what `aatjax train` does on a fresh machine, from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

import aatjax
from aatjax.cli.main import run
from aatjax.convert.load import EMBEDDED
from aatjax.data.synthetic.synthesize import PRETRAIN_SOUNDS, TARGET_SOUNDS, synthesize


def test_the_embedded_weights_are_small_and_know_none_of_the_target_sounds():
    assert EMBEDDED.stat().st_size < 12e6
    model = aatjax.load("embedded")
    assert model.labels == PRETRAIN_SOUNDS
    assert not set(model.labels) & set(TARGET_SOUNDS)


def test_the_embedded_weights_recognise_sounds_they_were_trained_for():
    classifier = aatjax.Classifier.load("embedded")
    right = 0
    for sound in PRETRAIN_SOUNDS:
        right += classifier.predict_waveform(synthesize(sound, 10_000_000)).label == sound
    assert right > 0.5 * len(PRETRAIN_SOUNDS)


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
