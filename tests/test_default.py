"""The embedded default: what `aatjax train` does on a fresh machine, from end to end."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny_run
from flax import nnx

import aatjax
from aatjax import surgery
from aatjax.cli.main import run
from aatjax.config import Model
from aatjax.convert import write_native
from aatjax.convert.load import EMBEDDED
from aatjax.data.synthetic.synthesize import TARGET_SOUNDS, synthesize
from aatjax.experiments import run as experiment
from aatjax.experiments.pretrain import MADE
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.train.adapter_file import read_metadata


def test_the_embedded_weights_are_small_and_know_none_of_the_target_sounds():
    assert sum(path.stat().st_size for path in set(EMBEDDED.values())) < 12e6
    for name in EMBEDDED:
        labels = aatjax.load(name).labels
        assert labels is not None
        sets = {label.rpartition("/")[0] for label in labels}
        assert sets <= {"", "synthetic", "words", "arabic_speech_commands"}
        assert not {label.rpartition("/")[2] for label in labels} & set(TARGET_SOUNDS)


def test_the_embedded_weights_recognise_sounds_they_were_trained_for():
    classifier = aatjax.Classifier.load("embedded")
    known = {f"{name}/{k}": k for name in MADE for k in MADE[name][:40]}
    assert set(known) < set(classifier.classes)
    right = sum(
        classifier.predict_waveform(synthesize(sound, 10_000_000)).label == label
        for label, sound in known.items()
    )
    assert right > 0.6 * len(known)


def test_what_was_made_on_former_embedded_weights_stays_on_them(tmp_path, monkeypatch):
    config = dataclasses.replace(tiny_run.make_config(tmp_path), model=Model(frames=48))
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, epochs=3))
    whole = tiny_run.train(longer, tmp_path / "whole")
    tiny_run.train(config, tmp_path / "run")
    adapter = tmp_path / "run/adapter.safetensors"
    former = read_metadata(adapter).base.fingerprint

    shape = ASTConfig.from_text("tiny,depth=1")  # a new version comes with other weights
    arrays = surgery.arrays(AST(shape, rngs=nnx.Rngs(0)))
    write_native(tmp_path / "newer.safetensors", arrays, shape)
    newer = {"embedded": tmp_path / "newer.safetensors", "embedded-3": EMBEDDED["embedded"]}
    for name, path in newer.items():
        monkeypatch.setitem(EMBEDDED, name, path)
    now = aatjax.load("embedded", num_classes=2).origin
    assert now is not None and now.fingerprint != former
    for base in (None, "embedded"):
        found = aatjax.load_adapter(adapter, base=base).model.origin
        assert found is not None and found.fingerprint == former
    assert tiny_run.train(config, tmp_path / "run").run is None  # finished before
    more = experiment.train(
        longer, run_dir=tmp_path / "run", show=None, allow_change=["training.epochs"]
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
