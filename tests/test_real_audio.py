"""Real recordings are read and trained on without special cases."""

import dataclasses
import re

import numpy as np
import pytest
import soundfile
from adapter_files import trained

from aatjax import data, evaluate, load_adapter, petl, predict
from aatjax.audio.frontend import FrontEnd
from aatjax.config import Data, Model, load_config
from aatjax.data.formats import open_source
from aatjax.experiments.run import make_partition, train
from aatjax.export import export
from aatjax.inference.calibration import Calibration, compute_probabilities
from aatjax.reports.html.collect import collect_report
from aatjax.train.adapter_file import save_adapter
from aatjax.train.evaluation import score_clips
from aatjax.train.training import Training

CLIPS = 20  # of ESC-10 in the comparison of scores
SETS = {
    "esc10": (320, 10, 4),
    "esc50_fold4": (320, 40, 1),
    "fsdd": (2500, 10, 0),
    "speech_commands_v0.01": (300, 30, 0),
}


@pytest.mark.parametrize("name", SETS)
def test_every_layout_is_detected(real_audio, name):
    clips, classes, folds = SETS[name]
    source = open_source(real_audio / name)
    assert (len(source), len(source.classes), len(source.folds)) == (clips, classes, folds)


def test_speech_commands_keep_their_official_split_and_speakers_apart(real_audio, tmp_path):
    chosen = Data(path=str(real_audio / "speech_commands_v0.01"), cache=str(tmp_path))
    parts = make_partition(chosen)
    assert parts.valid is not None and parts.test is not None
    assert len(parts.train) + len(parts.valid) + len(parts.test) == 300
    speakers = [{c.group for c in part.clips} for part in (parts.train, parts.valid, parts.test)]
    assert not speakers[0] & speakers[1] and not speakers[0] & speakers[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["speech_commands_v0.01", "fsdd"])
def test_one_epoch_of_the_folder_config(real_audio, name, tmp_path):
    config = load_config("folder")
    config = dataclasses.replace(
        config,
        data=Data(path=str(real_audio / name), cache=str(tmp_path / "cache"), test_fraction=0.9),
        model=Model(frames=98),
        training=Training(epochs=1, batch_size=64),
    )
    result = train(config, run_dir=tmp_path / "run", show=None)
    assert result.headline is not None and result.headline[1] is not None
    assert result.artefact.exists() and not (tmp_path / "run" / "quarantine.jsonl").exists()


@pytest.mark.slow
def test_one_fold_of_real_environmental_sounds(real_audio, tmp_path):
    config = load_config("esc")
    chosen = dataclasses.replace(
        config.data, path=str(real_audio / "esc10"), cache=str(tmp_path / "cache"), fold="1"
    )
    config = dataclasses.replace(
        config, data=chosen, training=Training(epochs=3, batch_size=32), model=Model(frames=198)
    )
    result = train(config, run_dir=tmp_path / "run", show=None)
    assert result.headline is not None and result.headline[1] is not None
    assert result.headline[1] > 0.2  # ten classes


@pytest.mark.slow
def test_a_clip_has_one_score_in_evaluation_prediction_report_and_exports(
    real_audio, tmp_path, monkeypatch
):
    """ESC-10 as it is, and each clip behind 4 s of silence and behind another clip."""
    every = open_source(real_audio / "esc10")
    chosen = every.subset(range(0, 320, 320 // CLIPS))
    for number, clip in enumerate(chosen.clips):
        sound, rate = soundfile.read(clip.path, dtype="int16")
        other, _ = soundfile.read(chosen.clips[number - 1].path, dtype="int16")
        silence = np.zeros(4 * rate, np.int16)
        name, label = f"{number:03d}.wav", every.classes[clip.label[0]]
        for form, whole in {
            "plain": sound,
            "silence": np.concatenate([silence, sound]),
            "other": np.concatenate([other, sound]),
        }.items():
            place = tmp_path / form / label
            place.mkdir(parents=True, exist_ok=True)
            soundfile.write(place / name, whole, rate, subtype="PCM_16")
    adapter = save_adapter(
        tmp_path / "adapter.safetensors",
        trained("embedded", petl.LoRA(reduction=32), classes=10, frames=198),
        classes=every.classes,
        multi_label=False,
        frontend=FrontEnd(frames=198),
        extra={"decisions": Calibration(1.4, None, 0.8, 0.9, 50).to_json()},
    )
    folders = {to: export(adapter, to, tmp_path / to).folder for to in ("onnx", "hf")}
    loaded = load_adapter(adapter)
    for form in ("plain", "silence", "other"):
        source = data.AudioFolder(tmp_path / form).with_classes(every.classes, "ESC-10")
        logits = score_clips(loaded.model, source, loaded.frontend).logits
        scored = compute_probabilities(logits.astype(np.float64), 1.4, False)
        found = predict(adapter, [str(clip.path) for clip in source.clips])
        np.testing.assert_allclose([p.probabilities for p in found], scored, atol=1e-5)
        assert [p.label for p in found] == [every.classes[i] for i in scored.argmax(axis=1)]
        report = collect_report(adapter, Data(path=str(tmp_path / form), cache=str(tmp_path)))
        assert report.evaluation.metrics.accuracy == evaluate(loaded.model, source).accuracy
        np.testing.assert_allclose(report.evaluation.logits, logits, atol=1e-5)
        for folder in folders.values():
            exported = run_recipe(folder, source, monkeypatch)
            np.testing.assert_allclose(exported, scored, atol=1e-5)
            assert (exported.argmax(axis=1) == scored.argmax(axis=1)).all()


def run_recipe(folder, source, monkeypatch):
    """The probabilities of files by the recipe in the card of an export."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (code,) = (block for block in blocks if "def read_windows" in block)
    monkeypatch.chdir(folder)
    rows = []
    for clip in source.clips:
        names = {}
        exec(code.replace("sound.wav", clip.path), names)
        rows.append(names["pool"](names["logits"], names["lengths"]))
    return np.array(rows)
