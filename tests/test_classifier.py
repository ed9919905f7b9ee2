"""Predictions for sounds of any length: windows, their average, and one answer for one sound."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx
from jaxtyping import Int16
from tiny_model import tiny_config

from aatjax import Classifier, load, petl, predict, surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.audio.waveform import AudioError
from aatjax.audio.windows import Window, compute_step, cut_windows
from aatjax.convert import known_weights, write_native
from aatjax.errors import AatjaxError, DataError, UsageError
from aatjax.inference.classifier import choose_batch_size
from aatjax.models.ast import AST
from aatjax.train.adapter_file import save_adapter

RATE = 16000
FRONTEND = FrontEnd(frames=98)
SIZE = FRONTEND.samples
CLASSES = ("ant", "bee", "cat")
TINY = tiny_config(depth=2)


def make_model(seed: int = 0) -> AST:
    model = AST(TINY, rngs=nnx.Rngs(seed))
    kernel = model.head.linear.kernel
    kernel[...] = 100 * kernel[...]  # predictions that differ between sounds
    return model


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(make_model(), CLASSES, FRONTEND)


def sound(samples: int, seed: int = 0) -> Int16[np.ndarray, " s"]:
    """A glide in noise: no two stretches are alike."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / RATE
    wave = np.sin(2 * np.pi * (300 + 90 * time) * time) + 0.2 * rng.normal(size=samples)
    return (9000 * wave / 1.5).astype(np.int16)


def write(path: Path, wave: np.ndarray, rate: int = RATE) -> Path:
    soundfile.write(path, wave, rate, subtype="PCM_16")
    return path


@functools.cache
def program(multi_label: bool) -> Any:
    """The model on one window, without the classifier's windows and batches."""
    graphdef = nnx.split(make_model())[0]

    @jax.jit
    def compute(state: Any, audio: jax.Array, length: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state, copy=True)
        logits = model(FRONTEND(audio[None], length[None]))[0]
        return jax.nn.sigmoid(logits) if multi_label else jax.nn.softmax(logits)

    return compute


def compute_directly(model: AST, wave: np.ndarray, multi_label: bool = False) -> np.ndarray:
    audio, length = FRONTEND.fit(wave)
    state = nnx.split(model)[1]
    return np.asarray(program(multi_label)(state, jnp.asarray(audio), jnp.asarray(length)))


@pytest.mark.parametrize("samples", [401, 5000, SIZE - 1, SIZE])
def test_one_window_is_the_model_called_directly(classifier: Classifier, samples: int) -> None:
    wave = sound(samples)
    found = classifier.predict_waveform(wave)
    assert len(found.windows) == 1
    expected = compute_directly(classifier.model, wave)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    assert found.windows[0].start == 0
    assert found.windows[0].end == pytest.approx(samples / RATE)
    assert sum(found.probabilities) == pytest.approx(1, abs=1e-5)
    assert found.label == CLASSES[int(np.argmax(found.probabilities))]
    assert found.probability == max(found.probabilities)


def test_windows_are_weighted_by_their_length(classifier: Classifier) -> None:
    wave = sound(5 * SIZE // 2)
    found = classifier.predict_waveform(wave)
    spans = [(round(w.start * RATE), round(w.end * RATE)) for w in found.windows]
    assert spans == [(0, SIZE), (SIZE, 2 * SIZE), (2 * SIZE, 5 * SIZE // 2)]
    parts = [compute_directly(classifier.model, wave[start:end]) for start, end in spans]
    for window, part in zip(found.windows, parts, strict=True):
        np.testing.assert_allclose(window.probabilities, part, atol=1e-5)
    mean = (parts[0] + parts[1] + parts[2] / 2) / 2.5
    np.testing.assert_allclose(found.probabilities, mean, atol=1e-5)
    assert np.abs(parts[0] - parts[2]).max() > 1e-3, "the windows differ"


@pytest.mark.parametrize("samples", [SIZE, SIZE + 1, 3 * SIZE - 1, 3 * SIZE, 3 * SIZE + 1])
@pytest.mark.parametrize("hop", [None, 0.25, 0.5, 0.1])
def test_every_sample_is_covered_and_no_window_is_wasted(samples: int, hop: float | None) -> None:
    step = SIZE if hop is None else round(hop * RATE)
    windows = cut_windows([sound(samples)], FRONTEND, compute_step(FRONTEND.samples, hop))
    spans = [window.span for window in windows]
    if samples % SIZE == 1 and hop is None:
        samples -= 1  # one sample is no window
    assert [start for start, _ in spans] == [i * step for i in range(len(spans))]
    assert spans[-1][1] == samples
    covered = np.zeros(samples, bool)
    for start, end in spans:
        assert 0 < end - start <= SIZE
        covered[start:end] = True
    assert covered.all()
    # One window less would miss the end.
    assert len(spans) == 1 or spans[-2][1] < samples


def test_overlapping_windows_are_their_spans(classifier: Classifier) -> None:
    wave = sound(2 * SIZE)
    found = classifier.compute_window_logits([wave], hop=0.25)
    logits, spans = found.logits, found.spans
    rows = jax.nn.softmax(logits)
    assert len(rows) == len(spans) == 5
    for row, (start, end) in zip(rows, spans, strict=True):
        np.testing.assert_allclose(
            row, compute_directly(classifier.model, wave[start:end]), atol=1e-5
        )


@pytest.mark.parametrize("hop", [0.0, -1.0, 1e-9, float("nan"), float("inf")])
def test_an_invalid_hop_is_refused(classifier: Classifier, hop: float) -> None:
    with pytest.raises(UsageError, match="hop"):
        classifier.predict_waveform(sound(SIZE), hop=hop)


@pytest.mark.parametrize("windows", [7, 8, 9, 16, 17])
def test_where_a_batch_ends_does_not_matter(classifier: Classifier, windows: int) -> None:
    wave = sound(windows * SIZE - 100)
    found = classifier.compute_window_logits([wave])
    rows = found.logits
    assert len(rows) == windows
    for number in {0, windows // 2, windows - 1}:
        found = classifier.compute_window_logits([wave[number * SIZE :][:SIZE]])
        alone = found.logits
        np.testing.assert_allclose(rows[number], alone[0], atol=1e-4)


def test_a_file_of_minutes(classifier: Classifier, tmp_path: Path) -> None:
    wave = np.tile(sound(10 * RATE), 18)
    found = classifier.predict(write(tmp_path / "long.wav", wave))
    assert len(found.windows) == -(-len(wave) // SIZE)
    assert found.windows[-1].end == pytest.approx(180)
    assert sum(found.probabilities) == pytest.approx(1, abs=1e-4)
    weights = [w.end - w.start for w in found.windows]
    mean = np.average([w.probabilities for w in found.windows], axis=0, weights=weights)
    np.testing.assert_allclose(found.probabilities, mean, atol=1e-6)


def test_all_formats_of_a_sound_give_one_prediction(classifier: Classifier, tmp_path: Path) -> None:
    wave = sound(RATE)
    plain = classifier.predict(write(tmp_path / "a.wav", wave))
    assert plain.probabilities == classifier.predict_waveform(wave).probabilities
    stereo = classifier.predict(write(tmp_path / "b.wav", np.stack([wave, wave], 1)))
    np.testing.assert_allclose(stereo.probabilities, plain.probabilities, atol=1e-6)
    soundfile.write(tmp_path / "c.flac", wave, RATE)
    flac = classifier.predict(tmp_path / "c.flac")
    assert flac.probabilities == plain.probabilities
    assert flac.path == str(tmp_path / "c.flac")


def test_a_bad_file_is_named(classifier: Classifier, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    with pytest.raises(AudioError, match=r"bad\.wav"):
        classifier.predict(tmp_path / "bad.wav")
    with pytest.raises(AudioError, match=r"gone\.wav"):
        classifier.predict(tmp_path / "gone.wav")
    with pytest.raises(DataError, match="no samples"):
        classifier.predict_waveform(np.zeros(0, np.int16))


def test_several_labels_are_sigmoids() -> None:
    model = make_model()
    many = Classifier(model, CLASSES, FRONTEND, multi_label=True)
    wave = sound(SIZE, seed=3)
    found = many.predict_waveform(wave)
    np.testing.assert_allclose(
        found.probabilities, compute_directly(model, wave, multi_label=True), atol=1e-5
    )
    assert abs(sum(found.probabilities) - 1) > 1e-2


def test_class_names_must_fit_the_head() -> None:
    with pytest.raises(UsageError, match="2 class names for a head of 3"):
        Classifier(make_model(), ("ant", "bee"), FRONTEND)


def test_the_front_end_must_fit_the_model() -> None:
    with pytest.raises(UsageError, match="frames"):
        Classifier(make_model(), CLASSES, FrontEnd(frames=50))


def test_predict_from_an_adapter_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_weights, "find_user_cache", lambda: tmp_path)  # of this test alone
    write_native(tmp_path / "base.safetensors", surgery.arrays(make_model()), TINY)
    model = petl.adapt(load(tmp_path / "base.safetensors", num_classes=2), petl.AAT())
    model.head.linear.kernel[...] = 100 * model.head.linear.kernel[...]
    frontend = FrontEnd(frames=98, mean=-6.0, std=3.0, pad="repeat")
    path = save_adapter(
        tmp_path / "a.safetensors",
        model,
        classes=("dog", "cat"),
        multi_label=False,
        frontend=frontend,
    )
    one, two = (write(tmp_path / f"{i}.wav", sound(9000, seed=i)) for i in range(2))
    found = predict(path, [one, two])
    assert [f.path for f in found] == [str(one), str(two)]
    single = predict(path, two)
    assert single == found[1]
    assert single.classes == ("dog", "cat")
    audio, length = frontend.fit(sound(9000, seed=1))
    run = jax.jit(lambda audio, length: model(frontend(audio, length)))
    logits = run(audio[None], np.array([length]))[0]
    np.testing.assert_allclose(single.probabilities, jax.nn.softmax(logits), atol=1e-5)
    assert predict(Classifier.load(path), two) == single
    # The base moved: the message says so; base= gives its place.
    (tmp_path / "base.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(DataError, match="base="):
        predict(path, two)
    assert predict(path, two, base=tmp_path / "moved.safetensors") == single


def test_vectors_are_the_patches_without_the_prompts() -> None:
    """Prompts stand between CLS and the patches."""
    model = petl.adapt(make_model(), petl.Prompt(tokens=40, deep=False))
    classifier = Classifier(model, CLASSES)
    audio, length = classifier.frontend.fit(sound(9000))
    found = classifier.run([Window(audio, length, (0, 9000))], 1, vectors=True)[1]
    run = jax.jit(lambda audio, length: model.tokens(classifier.frontend(audio, length)))
    tokens = run(audio[None], np.array([length]))
    patches = TINY.num_tokens - TINY.num_prefix
    assert tokens.shape[1] >= patches + 40
    np.testing.assert_allclose(found, tokens[:, -patches:].mean(axis=1), atol=1e-5)
    assert np.abs(found - tokens[:, 2:].mean(axis=1)).max() > 1e-2


def test_predict_from_weights_that_name_their_classes(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_native(path, surgery.arrays(make_model()), TINY, labels=CLASSES)
    found = Classifier.load(path).predict_waveform(sound(SIZE))
    assert found.classes == CLASSES
    np.testing.assert_allclose(
        found.probabilities, compute_directly(make_model(), sound(SIZE)), atol=1e-5
    )


@pytest.mark.parametrize("name", ["gone.safetensors", "text.safetensors"])
def test_a_file_that_is_not_weights_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(AatjaxError, match=name) as caught:
        Classifier.load(tmp_path / name)
    assert caught.value.exit_code == 65


def test_a_prediction_as_json_and_as_text(classifier: Classifier) -> None:
    found = classifier.predict_waveform(sound(2 * SIZE), path="a b.wav")
    values = json.loads(json.dumps(found.to_json()))
    assert values["path"] == "a b.wav"
    assert values["label"] == found.label
    assert values["probabilities"] == dict(zip(CLASSES, found.probabilities, strict=True))
    assert len(values["windows"]) == 2
    for window, plain in zip(found.windows, values["windows"], strict=True):
        assert plain["label"] == CLASSES[int(np.argmax(window.probabilities))]
        assert (plain["start"], plain["end"]) == (window.start, window.end)
    assert str(found) == f"a b.wav: {found.label} ({found.probability:.3f})"
    names = [label for label, _ in found.top(2)]
    assert names[0] == found.label and len(names) == 2
    assert len(found.top(99)) == 3


def test_a_batch_is_no_larger_than_its_windows_need() -> None:
    sizes = {(1, 100_000): 1, (2, 100_000): 8, (9, 100_000): 16, (40, 48): 48, (3, 4): 4, (1, 4): 1}
    assert {given: choose_batch_size(*given) for given in sizes} == sizes
