"""Log-mel kept between epochs: the same training, where nothing changes the waveforms."""

from typing import Any

import numpy as np
import pytest
from flax import nnx

from aatjax import petl
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data import clip_windows
from aatjax.data.pipeline import make_train_batches
from aatjax.data.source import Reader
from aatjax.data.synthetic.dataset import Synthetic
from aatjax.data.synthetic.synthesize import TARGET_SOUNDS
from aatjax.models.ast import AST
from aatjax.models.config import ASTConfig
from aatjax.train import input_cache
from aatjax.train.fit import fit
from aatjax.train.log_mel_cache import LogMelCache, is_read_alike, measure_log_mel
from aatjax.train.sharding import MeshShape
from aatjax.train.training import Training

CONFIG = ASTConfig(dim=32, depth=2, heads=2, mlp_dim=48, frames=48, num_classes=3)
FRONT = FrontEnd(frames=48)


class Counted(Reader):
    """Counts how often each clip is read."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.reads = reader, dict[str, int]()

    def read(self, clip: Any) -> np.ndarray:
        self.reads[clip.id] = self.reads.get(clip.id, 0) + 1
        return self.reader.read(clip)

    def key(self, clip: Any) -> str | None:
        return self.reader.key(clip)


def make_source(seconds: float = 0.45, clips: int = 4) -> tuple[Any, Counted]:
    made = Synthetic(TARGET_SOUNDS[:3], clips, seconds=seconds)
    reader = Counted(made.reader)
    return made.with_clips(made.clips, reader=reader), reader


def train(source: Any, windows: Any = "start", **augment: Any) -> Any:
    model = petl.adapt(AST(CONFIG, rngs=nnx.Rngs(0)), petl.SoftMoA(num_experts=2, reduction=8))
    training = Training(epochs=3, batch_size=4, threads=0)
    given = {
        "training": training,
        "augment": Augment(**augment),
        "frontend": FRONT,
        "windows": windows,
    }
    return fit(model, source, valid=source, show=None, lr=1e-2, **given)


MASKED = {"freq_mask": 24, "time_mask": 10, "noise": True, "roll": True}


@pytest.mark.parametrize(
    "augment",
    [pytest.param({}, id="plain"), pytest.param(MASKED, id="masked", marks=pytest.mark.slow)],
)
def test_the_same_training_with_each_clip_read_once(augment, monkeypatch):
    source, reader = make_source()
    kept = train(source, **augment)
    assert set(reader.reads.values()) == {2}  # as training and as validation clips
    monkeypatch.setattr(input_cache, "LIMIT", 0)
    for name in ("HELD", "LATEST"):  # nor are the samples held
        monkeypatch.setattr(clip_windows, name, 0)
    source, reader = make_source()
    plain = train(source, **augment)
    assert set(reader.reads.values()) == {10}  # and epochs, validations, the mixtures' figures
    for a, b in zip(plain.history, kept.history, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
        assert a["mixture/balance"] == pytest.approx(b["mixture/balance"], rel=1e-4)
    np.testing.assert_allclose(
        plain.valid_scores.logits, kept.valid_scores.logits, rtol=1e-4, atol=1e-5
    )


def test_the_features_are_those_of_the_front_end_whatever_the_order():
    source, _ = make_source()
    orders = []
    for seed in (0, 1):
        stored = LogMelCache(FRONT).load(source)
        for rows in make_train_batches(
            source, FRONT, batch_size=4, epochs=1, seed=seed, stored=stored, threads=0
        ):
            assert rows["audio"].shape == (4, 48, 128)
        orders.append(stored.features)
    np.testing.assert_array_equal(*orders)
    for index in (0, 7):
        audio, length = FRONT.fit(source.waveform(index))
        want = FRONT.features(audio[None], np.array([length]))[0]
        np.testing.assert_allclose(orders[0][index], want, rtol=1e-6, atol=1e-6)


def test_where_a_waveform_changes_nothing_is_kept():
    mesh = MeshShape().make()
    assert is_read_alike(Augment(), mesh, "start") and is_read_alike(
        Augment(**MASKED), mesh, "start"
    )
    assert not is_read_alike(Augment(), mesh, "random")
    assert not is_read_alike(Augment(mixup=0.5), mesh, "start")
    source, reader = make_source()
    assert measure_log_mel({"train": source, "test": source}, FRONT) == 24 * 48 * 128 * 4
    assert not reader.reads


def test_a_random_crop_trains_from_the_sounds():
    source, reader = make_source(seconds=1.0)
    run = train(source, "random")
    assert set(reader.reads.values()) == {4} and len(run.history) == 3
