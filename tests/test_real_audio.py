"""Real recordings are read and trained on without special cases."""

import dataclasses

import pytest

from aatjax.config import Data, Model, load_config
from aatjax.data.formats import open_source
from aatjax.experiments.run import make_partition, train
from aatjax.train.loop import Training

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
    data = Data(path=str(real_audio / "speech_commands_v0.01"), cache=str(tmp_path))
    parts = make_partition(data)
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
    data = dataclasses.replace(
        config.data, path=str(real_audio / "esc10"), cache=str(tmp_path / "cache"), fold="1"
    )
    config = dataclasses.replace(
        config, data=data, training=Training(epochs=3, batch_size=32), model=Model(frames=198)
    )
    result = train(config, run_dir=tmp_path / "run", show=None)
    assert result.headline is not None and result.headline[1] is not None
    assert result.headline[1] > 0.2  # ten classes
