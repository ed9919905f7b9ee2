"""The score of a clip: one definition, in training, evaluation, prediction and report."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from adapter_files import trained, write_base
from flax import nnx
from tiny_model import tiny_config

from aatjax import Scoring, data, embed, evaluate, fit, load_adapter, petl, predict
from aatjax.audio.frontend import FrontEnd
from aatjax.audio.scoring import fit_sharpness
from aatjax.cli import main
from aatjax.data.clip_windows import cut_clips
from aatjax.errors import UsageError
from aatjax.inference.calibration import Calibration, compute_probabilities
from aatjax.inference.classifier import Classifier
from aatjax.models.ast import AST
from aatjax.train.adapter_file import save_adapter
from aatjax.train.evaluation import score_clips
from aatjax.train.training import Training

RATE = 16000
FRONT = FrontEnd(frames=98)  # windows of 15,920 samples
SIZE = FRONT.samples
CLASSES = ("high", "low", "noise")


def tone(hertz: float, seconds: float) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return 0.4 * np.sin(2 * np.pi * hertz * time)


def make_sound(label: str, seed: int, *, before: float, seconds: float) -> np.ndarray:
    """A class's sound after near-silence, as in a recording that was started early."""
    rng = np.random.default_rng(seed)
    quiet = 1e-3 * rng.normal(size=round(before * RATE))
    sounds = {
        "high": tone(3000 + 50 * seed, seconds),
        "low": tone(200 + 5 * seed, seconds),
        "noise": 0.2 * rng.normal(size=round(seconds * RATE)),
    }
    return np.concatenate([quiet, sounds[label]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("late")
    for label in CLASSES:
        (root / label).mkdir()
        for seed in range(3):
            sound = make_sound(label, seed, before=2.0, seconds=2.37)
            soundfile.write(root / label / f"take {seed}.wav", sound, RATE, subtype="FLOAT")
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors", config=tiny_config())


def run_command(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    return int(ended.value.code or 0)


def write_adapter(path: Path, base: Path, scoring: Scoring | None = None, **extra: Any) -> Path:
    return save_adapter(
        path,
        trained(base, petl.SoftMoA(num_experts=2, reduction=8)),
        classes=CLASSES,
        multi_label=False,
        frontend=FRONT,
        scoring=scoring,
        extra=extra,
    )


# The formula.


def pool_by_formula(scoring: Scoring, logits: Any, lengths: Any, multi_label: bool) -> np.ndarray:
    """Pooled probabilities, written out window by window in float64."""
    z = np.asarray(logits, np.float64)
    p = 1 / (1 + np.exp(-z)) if multi_label else np.exp(z) / np.exp(z).sum(1, keepdims=True)
    n = np.asarray(lengths, float)
    if scoring.pooling == "first":
        return p[0]
    if scoring.pooling == "max":
        pooled = p[n >= n.max() / 2].max(axis=0)
    else:
        sharp = scoring.sharpness if scoring.pooling == "attention" else 0.0
        w = n[:, None] * np.exp(sharp * p)
        pooled = (w * p).sum(axis=0) / w.sum(axis=0)
    return pooled if multi_label else pooled / pooled.sum()


SCORINGS = [
    Scoring(),
    Scoring("max"),
    Scoring("first"),
    Scoring("attention", sharpness=7.0),
    Scoring("attention"),
]


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
def test_pooled_probabilities_are_those_of_the_formula(scoring: Scoring, multi_label: bool):
    rng = np.random.default_rng(0)
    logits, lengths = 4 * rng.normal(size=(5, 4)).astype(np.float32), [100, 100, 100, 100, 30]
    pooled = scoring.pool(logits, lengths, multi_label)
    found = compute_probabilities(pooled[None].astype(np.float64), 1.0, multi_label)[0]
    want = pool_by_formula(scoring, logits, lengths, multi_label)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)
    # One window: its own logits, bit for bit.
    np.testing.assert_array_equal(scoring.pool(logits[:1], lengths[:1], multi_label), logits[0])
    extreme = scoring.pool(np.array([[500.0, -500.0], [500.0, -500.0]]), [1, 1], multi_label)
    assert np.isfinite(extreme).all() and extreme[0] > extreme[1]


def test_attention_lies_between_mean_and_max():
    logits = np.array([[3.0, 0.0], [-2.0, 0.0], [-2.0, 0.0]])
    ranked = [Scoring(), *(Scoring("attention", sharpness=s) for s in (2.0, 8.0, 90.0))]
    values = [s.pool(logits, [1, 1, 1], True)[0] for s in [*ranked, Scoring("max")]]
    assert np.all(np.diff(values[:-2]) > 0) and values[-1] - values[-2] < 1e-3


def test_the_sharpness_is_learned_where_one_window_holds_the_sound():
    rng = np.random.default_rng(0)
    windows, targets = [], np.zeros((40, 2))
    for row in range(40):
        logits = rng.normal(-3, 0.3, size=(6, 2))
        targets[row, row % 2] = 1
        logits[rng.integers(6), row % 2] = 3.0
        windows.append((logits, np.full(6, 100)))
    found = fit_sharpness(Scoring("attention"), windows, targets, multi_label=True)
    assert found.sharpness > 8
    whole = [(logits[:1], lengths[:1]) for logits, lengths in windows]
    assert fit_sharpness(Scoring("attention"), whole, targets, True).sharpness == 0


# One score everywhere.


@pytest.mark.parametrize(
    "scoring", [Scoring(), Scoring("max", hop=0.5), Scoring("first"), SCORINGS[3]], ids=str
)
def test_eval_and_predict_give_a_clip_the_same_score(
    scoring: Scoring, folder: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    calibration = Calibration(2.5, None, 0.8, 0.9, 40).to_json()
    path = write_adapter(tmp_path / "a.safetensors", base, scoring, decisions=calibration)
    adapter = load_adapter(path)
    assert adapter.scoring == scoring
    source = data.AudioFolder(folder)
    scores = score_clips(adapter.model, source, FRONT, scoring=adapter.scoring)
    predictions = [predict(path, str(clip.path)) for clip in source.clips]
    found = compute_probabilities(scores.logits.astype(np.float64), 2.5, False)
    np.testing.assert_allclose(found, [p.probabilities for p in predictions], atol=1e-5)
    labels = [source.classes[c] for c in scores.logits.argmax(axis=1)]
    assert [p.label for p in predictions] == labels, "a temperature changes no label"
    right = np.mean(
        [p.label == source.classes[c.label[0]] for p, c in zip(predictions, source, strict=True)]
    )
    assert run_command(["eval", str(path), str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(right)
    assert evaluate(adapter.model, source, scoring=scoring).accuracy == pytest.approx(right)


def test_a_sound_after_a_quiet_start_is_recognized_by_training_and_evaluation(folder: Path):
    sounds = data.AudioFolder(folder)
    run = fit(
        petl.adapt(AST(tiny_config(), rngs=nnx.Rngs(0)), petl.Full()),
        sounds,
        sounds,
        training=Training(epochs=12, batch_size=9),
        lr=3e-3,
        show=None,
    )
    assert run.test is not None and run.test.accuracy == 1.0
    first = evaluate(run.model, sounds, run.frontend, scoring=Scoring("first"))
    assert first.accuracy is not None and first.accuracy < 0.7, "the first window holds no class"
    assert first.notes == ("23% of the sound was used: the rest lies in no window",)
    assert not any("of the sound" in note for note in run.test.notes)


def test_a_long_clip_counts_once_in_training():
    rng = np.random.default_rng(0)
    sounds = [0.1 * rng.normal(size=size) for size in (3 * SIZE, SIZE, SIZE, 2 * SIZE)]
    sounds[3][:SIZE] = 0  # without sound: not trained on
    train = data.Arrays(sounds, [0, 1, 1, 0], ("a", "b"))
    cut = cut_clips(train, FRONT, Scoring(), train=True)
    assert [clip.id for clip in cut.windows.clips] == [
        *("0@0.000s", "0@0.995s", "0@1.990s", "1", "2", "3@0.995s")
    ]
    weights = cut.compute_weights()
    np.testing.assert_allclose(weights, np.array([1 / 3, 1 / 3, 1 / 3, 1, 1, 1]) * 6 / 4)
    model = petl.adapt(AST(tiny_config(num_classes=2), rngs=nnx.Rngs(0)), petl.LoRA(reduction=8))
    run = fit(model, train, training=Training(epochs=1, batch_size=6), lr=1e-12, show=None)
    windows = [sounds[0][i * SIZE :][:SIZE] for i in range(3)] + [*sounds[1:3], sounds[3][SIZE:]]
    labels = [0, 0, 0, 1, 1, 0]
    logits = score_clips(model, data.Arrays(windows, labels, ("a", "b")), FRONT).logits
    loss = np.log(np.exp(logits.astype(np.float64)).sum(1)) - logits[np.arange(6), labels]
    want = (loss[:3].mean() + loss[3:].sum()) / 4
    assert run.history[0]["train/loss"] == pytest.approx(want, rel=1e-5)
    start = fit(model, train, windows="start", training=Training(epochs=1), lr=1e-12, show=None)
    assert start.history[0]["train/loss"] == pytest.approx(
        np.mean([loss[0], *loss[3:5], start_loss(model, sounds[3])]), rel=1e-5
    )


def start_loss(model: AST, sound: np.ndarray) -> float:
    config = FrontEnd(frames=98)
    audio, length = config.fit((sound[:SIZE] * 32768).astype(np.int16))
    logits = np.asarray(model(config(audio[None], np.array([length])), np.array([98])))[0]
    return float(np.log(np.exp(logits.astype(np.float64)).sum()) - logits[0])


def test_embeddings_are_of_whole_clips(base: Path):
    rng = np.random.default_rng(0)
    sound = 0.1 * rng.normal(size=2 * SIZE + SIZE // 2)
    parts = [sound[:SIZE], sound[SIZE : 2 * SIZE], sound[2 * SIZE :]]
    model = trained(base, petl.LoRA(reduction=8))
    (whole,) = embed(model, data.Arrays([sound], [0], CLASSES)).matrix
    each = embed(model, data.Arrays(parts, [0, 0, 0], CLASSES)).matrix
    np.testing.assert_allclose(whole, np.average(each, axis=0, weights=[2, 2, 1]), atol=1e-5)


def test_the_share_of_the_sound_that_was_used():
    sounds = data.Arrays([np.ones(3 * SIZE) * 0.1, np.ones(SIZE) * 0.1], [0, 1], ("a", "b"))
    for scoring, used in (
        (Scoring(), 1.0),
        (Scoring("first"), 0.5),
        (Scoring(hop=SIZE / RATE / 2), 1.0),
        (Scoring(hop=2 * SIZE / RATE), 0.75),
    ):
        assert cut_clips(sounds, FRONT, scoring).measure_used(scoring) == pytest.approx(used)


def test_attention_needs_validation_clips():
    noise = 0.1 * np.random.default_rng(0).normal(size=SIZE)
    sounds = data.Arrays([noise, noise], [0, 1], ("a", "b"))
    model = petl.adapt(AST(tiny_config(num_classes=2), rngs=nnx.Rngs(0)), petl.Linear())
    with pytest.raises(UsageError, match="pooling='attention' is learned on validation clips"):
        fit(model, sounds, scoring=Scoring("attention"), show=None)
    run = fit(model, sounds, valid=sounds, scoring=Scoring("attention"), epochs=1, show=None)
    assert run.scoring == Scoring("attention", sharpness=0.0)


# Sounds without an answer.


def write_odd_sounds(folder: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    noise = 0.2 * rng.normal(size=RATE)
    sounds = {
        "silent": np.zeros(RATE),
        "offset": np.full(RATE, 0.1),
        "cancelling": np.stack([noise, -noise], axis=1),
        "ten zeros": np.zeros(10),
        "short": noise[:300],
        "loud": 1e30 * noise,
        "fine": noise,
        "half": np.concatenate([np.zeros(2 * SIZE), noise]),
    }
    paths = {name: folder / f"{name}.wav" for name in sounds}
    for name, sound in sounds.items():
        soundfile.write(paths[name], sound, RATE, subtype="FLOAT")
    return paths


@pytest.mark.parametrize("stream", [(), ("--batch-size", "3")])
def test_silent_and_too_short_sounds_get_no_class(
    stream: tuple[str, ...], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    adapter = write_adapter(tmp_path / "a.safetensors", base)
    paths = write_odd_sounds(tmp_path)
    files = [str(path) for path in paths.values()]
    assert run_command(["predict", str(adapter), *files, "--json", *stream]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = dict(zip(paths, rows, strict=True))
    for name in ("silent", "offset", "cancelling", "ten zeros"):
        assert (found[name]["label"], found[name]["reason"]) == (None, "silent")
        assert found[name]["probability"] is found[name]["probabilities"] is None
    assert "channels cancel out" in found["cancelling"]["notes"]
    assert found["short"]["label"] is None and "too short" in found["short"]["reason"]
    assert "padded from 300 samples" in found["short"]["notes"]
    assert found["loud"]["label"] and any("full scale" in n for n in found["loud"]["notes"])
    assert found["fine"]["label"] and not found["fine"]["notes"]
    # Windows without sound do not count: the answer is that of the sound alone.
    assert found["half"]["probabilities"] == pytest.approx(found["fine"]["probabilities"], abs=0.02)
    assert run_command(["predict", str(adapter), files[0], files[5], *stream]) == 0
    out, err = capsys.readouterr()
    assert "silent.wav  no class (silent)" in out
    assert "loud.wav: clipped, full scale is 1, the loudest sample" in err


def test_clips_without_sound_are_not_counted_and_this_is_stated(base: Path, tmp_path: Path):
    for label in CLASSES[:2]:
        (tmp_path / label).mkdir()
    rng = np.random.default_rng(0)
    for name, sound in {
        "high/a.wav": 0.1 * rng.normal(size=RATE),
        "high/silent.wav": np.zeros(RATE),
        "low/b.wav": 0.1 * rng.normal(size=RATE),
        "low/short.wav": 0.1 * rng.normal(size=100),
    }.items():
        soundfile.write(tmp_path / name, sound, RATE)
    adapter = load_adapter(write_adapter(tmp_path / "a.safetensors", base))
    source = data.AudioFolder(tmp_path).with_classes(CLASSES, "the adapter")
    metrics = evaluate(adapter.model, source, FRONT)
    assert metrics.clips == 2
    assert any("2 clips of 4 are silent, or 25 ms or less" in note for note in metrics.notes)


def test_silent_windows_are_in_no_segment(base: Path, tmp_path: Path):
    from aatjax.inference.stream import segment_files

    path = write_adapter(tmp_path / "a.safetensors", base)
    files = write_odd_sounds(tmp_path)
    track, silent = segment_files(Classifier.load(path), [files["half"], files["silent"]])
    assert not isinstance(track, Exception) and not isinstance(silent, Exception)
    assert track.segments[0].start == pytest.approx(2 * SIZE / RATE)
    assert silent.segments == ()


# Classes by name.


def test_eval_matches_the_classes_of_other_folders_by_name(
    base: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """E2: the adapter's classes in another order, without one of them, and a strange one."""
    classes = ("noise", "low", "high")
    adapter = save_adapter(
        tmp_path / "a.safetensors",
        trained(base, petl.LoRA(reduction=8)),
        classes=classes,
        multi_label=False,
        frontend=FRONT,
    )
    source = data.AudioFolder(folder)
    assert source.classes != classes
    right = np.mean(
        [predict(adapter, str(c.path)).label == source.classes[c.label[0]] for c in source]
    )
    assert run_command(["eval", str(adapter), str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] == pytest.approx(right)
    assert [row["name"] for row in result["per_class"]] == list(classes)

    rows = "".join(f"{c.path},{source.classes[c.label[0]]}\n" for c in source if c.label[0] != 1)
    table = tmp_path / "two.csv"
    table.write_text(f"path,label\n{rows}")
    assert run_command(["eval", str(adapter), str(table), "--json"]) == 0
    absent = json.loads(capsys.readouterr().out)["per_class"][1]
    assert (absent["name"], absent["support"], absent["recall"]) == ("low", 0, None)

    # In Python too, for the adapter, and for weights that know their labels.
    loaded = load_adapter(adapter)
    assert evaluate(loaded, source).confusion.tolist() == result["confusion"]
    model = trained(base, petl.LoRA(reduction=8))
    model.labels = classes
    assert evaluate(model, source, FRONT).confusion.tolist() == result["confusion"]

    table.write_text(f"path,label\n{rows}".replace(",noise", ",Noises"))
    assert run_command(["eval", str(adapter), str(table)]) == 2
    assert "'Noises', did you mean 'noise'?" in capsys.readouterr().err


def test_a_set_with_one_class_per_clip_can_be_evaluated_by_a_multi_label_adapter(
    base: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    adapter = save_adapter(
        tmp_path / "a.safetensors",
        trained(base, petl.LoRA(reduction=8)),
        classes=CLASSES,
        multi_label=True,
        frontend=FRONT,
    )
    assert run_command(["eval", str(adapter), str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["multi_label"] is True
    single = write_adapter(tmp_path / "b.safetensors", base)
    table = tmp_path / "several.csv"
    clip = data.AudioFolder(folder).clips[0].path
    table.write_text(f"path,labels\n{clip},high|low\n")
    assert run_command(["eval", str(single), str(table)]) == 2
    assert "may have several classes" in capsys.readouterr().err


def test_digits_are_in_the_order_of_their_values():
    x = np.random.default_rng(0).normal(size=(12, 800)) * 0.1
    assert data.Arrays(x, [str(i) for i in range(12)]).classes == tuple(map(str, range(12)))


def test_stored_configs_with_a_crop_open():
    from aatjax.config import Config

    fields = dataclasses.asdict(Config(petl=petl.Linear())) | {"petl": petl.Linear().to_json()}
    fields["training"]["crop"] = "random"
    del fields["data"]["windows"]
    assert Config.from_json(fields).data.windows == "random"
