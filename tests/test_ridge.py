"""Ridge regression: left-out errors against refits, rows of a file, heads that start there."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from adapter_files import write_base
from flax import nnx
from jaxtyping import Int16
from scipy.optimize import nnls
from sklearn.linear_model import Ridge
from tiny_model import tiny_config

from aatjax import evaluate, fit, load, load_adapter, petl, surgery
from aatjax.audio.scoring import Scoring
from aatjax.convert.load import make_front_end
from aatjax.data import Batches
from aatjax.data.clip_windows import cut_clips
from aatjax.data.source import Clip, Reader, Source
from aatjax.errors import DataError, UsageError
from aatjax.models.ast import AST
from aatjax.train import ridge
from aatjax.train.forward import bind_forward
from aatjax.train.head_start import read_pooled, solve_head
from aatjax.train.ridge import fit_ridge
from aatjax.train.sharding import MeshShape
from aatjax.train.training import Training

RNG = np.random.default_rng(0)
TINY = tiny_config(frames=39)


def make_rows(count: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of different means and scales, targets of four classes, weights."""
    rng = np.random.default_rng(count)
    features = rng.normal(size=(count, width)) * rng.uniform(0.1, 5, width) + rng.normal(size=width)
    return features, np.eye(4)[rng.integers(0, 4, count)], rng.uniform(0.2, 3, count)


def refit(
    x: np.ndarray, y: np.ndarray, w: np.ndarray, groups: np.ndarray, strength: float
) -> np.ndarray:
    """Outputs for each group by a fit of the others, solved for each."""
    mean = w @ x / w.sum()
    x = (x - mean) / np.sqrt(w @ (x - mean) ** 2 / w.sum())
    out = np.zeros_like(y)
    for group in np.unique(groups):
        kept = groups != group
        rows = np.concatenate([x[kept], np.ones((kept.sum(), 1))], axis=1)
        penalty = np.diag([*[strength * w.sum()] * x.shape[1], 0.0])
        kernel = np.linalg.solve(
            rows.T @ (w[kept, None] * rows) + penalty, rows.T @ (w[kept, None] * y[kept])
        )
        out[~kept] = x[~kept] @ kernel[:-1] + kernel[-1]
    return out


def measure_error(outputs: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """Mean squared error of outputs times the factor, not below 0, that makes it least."""
    center = w @ y / w.sum()
    roots = np.sqrt(w)[:, None]
    outputs, wanted = (roots * (outputs - center)).ravel(), (roots * (y - center)).ravel()
    factor, _ = nnls(outputs[:, None], wanted)
    return np.square(factor * outputs - wanted).sum() / w.sum() / y.shape[1]


@pytest.mark.parametrize("shape", [(40, 12), (30, 60)], ids=["tall", "wide"])
@pytest.mark.parametrize("kind", ["each clip", "small groups", "a large group"])
@pytest.mark.parametrize("strength", [1e-3, 0.3, 100.0])
def test_what_is_left_out_is_as_if_it_had_never_been_there(
    shape: tuple[int, int], kind: str, strength: float
) -> None:
    x, y, w = make_rows(*shape)
    numbers = np.arange(len(x))
    groups = {
        "each clip": numbers,
        "small groups": numbers // 4,
        "a large group": np.where(numbers < 20, 0, numbers),
    }[kind]
    found = fit_ridge(x, y, weights=w, groups=groups, strengths=np.array([strength]))
    np.testing.assert_allclose(found.left_out, refit(x, y, w, groups, strength), atol=1e-8)
    np.testing.assert_allclose(found.errors, [[measure_error(found.left_out, y, w)]])


def test_the_fit_is_that_of_scikit_learn_and_the_best_penalty_is_taken() -> None:
    x, y, w = make_rows(50, 10)
    found = fit_ridge(x, y, weights=w)
    mean = w @ x / w.sum()
    scaled = (x - mean) / np.sqrt(w @ (x - mean) ** 2 / w.sum())
    other = Ridge(alpha=found.strength[0] * w.sum()).fit(scaled, y, sample_weight=w)
    np.testing.assert_allclose(x @ found.kernel + found.bias, other.predict(scaled), atol=1e-8)
    errors = [measure_error(refit(x, y, w, np.arange(50), s), y, w) for s in ridge.STRENGTHS]
    np.testing.assert_allclose(found.errors[0], errors, atol=1e-12)
    assert errors.count(min(errors)) == 1
    assert found.strength[0] == ridge.STRENGTHS[int(np.argmin(errors))]


def test_features_that_tell_nothing_of_clips_left_out_take_the_largest_penalty() -> None:
    y = np.eye(2)[np.arange(40) % 2]
    found = fit_ridge(np.ones((40, 3)), y)
    assert found.strength[0] == ridge.STRENGTHS[-1]
    np.testing.assert_allclose(found.kernel, 0.0, atol=1e-12)


def test_several_tasks_have_penalties_of_their_own() -> None:
    x, y, _ = make_rows(60, 8)
    easy = x[:, :2] @ np.ones((2, 2)) + 0.01 * RNG.normal(size=(60, 2))
    both = fit_ridge(x, np.concatenate([y, easy], axis=1), tasks=(4, 2))
    assert both.strength[0] > both.strength[1]
    for columns, one in ((slice(4), fit_ridge(x, y)), (slice(4, 6), fit_ridge(x, easy))):
        np.testing.assert_allclose(both.kernel[:, columns], one.kernel, atol=1e-10)
        np.testing.assert_allclose(both.left_out[:, columns], one.left_out, atol=1e-10)


def test_rows_of_a_file_in_blocks_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, w = make_rows(700, 9)
    groups = np.arange(700) // 3
    whole = fit_ridge(x, y, weights=w, groups=groups)
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    monkeypatch.setattr(ridge, "BLOCK", 300)
    again = fit_ridge(np.load(tmp_path / "x.npy", mmap_mode="r"), y, weights=w, groups=groups)
    assert again.strength == whole.strength
    np.testing.assert_allclose(again.left_out, whole.left_out, atol=1e-6)
    np.testing.assert_allclose(again.kernel, whole.kernel, atol=1e-6)


def test_constant_features_and_copies_do_no_harm() -> None:
    x, y, _ = make_rows(30, 5)
    more = np.concatenate([x, np.full((30, 1), 1e6), x[:, :1]], axis=1)
    found = fit_ridge(more, y)
    assert np.isfinite(found.kernel).all() and not found.kernel[5].any()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"targets": np.eye(4)[:3]}, UsageError),
        ({"tasks": (3,)}, UsageError),
        ({"groups": np.zeros(40, int)}, DataError),
        ({"weights": np.zeros(40)}, DataError),
        ({"targets": np.full((40, 4), np.nan)}, DataError),
        ({"features": np.full((40, 12), np.inf)}, DataError),
    ],
    ids=str,
)
def test_what_cannot_be_fitted_is_refused(changes: dict[str, Any], error: type) -> None:
    x, y, _ = make_rows(40, 12)
    with pytest.raises(error, match="ridge"):
        fit_ridge(**{"features": x, "targets": y, **changes})


# ------------------------------------------------------------------------------ heads


class Tones(Reader):
    """A tone in noise; the classes give its pitches."""

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        rng = np.random.default_rng(int(clip.id))
        time = np.arange(int(6480 * (1 + int(clip.id) % 2))) / 16000
        wave = sum(np.sin(2 * np.pi * 500 * 2**c * time) for c in clip.label)
        return (6000 * wave + 2000 * rng.normal(size=len(time))).astype(np.int16)


class Noise(Reader):
    """Sounds that tell nothing of their class."""

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        rng = np.random.default_rng(int(clip.id))
        return (2000 * rng.normal(size=6480)).astype(np.int16)


def tones(count: int, *, first: int = 0, multi_label: bool = False) -> Source:
    """Clips of one and of two windows; with several labels, some of them unknown."""
    labels = [(i % 3, (i + 1) % 3)[: 1 + (i % 2) * multi_label] for i in range(count)]
    clips = [Clip(str(first + i), label, None) for i, label in enumerate(labels)]
    if multi_label:
        seen = [tuple({*clip.label, i % 3}) for i, clip in enumerate(clips)]
        clips = [dataclasses.replace(c, observed=s) for c, s in zip(clips, seen, strict=True)]
    names = [f"pitch{c}" for c in range(3)]
    return Source(clips, names, name="tones", multi_label=multi_label, reader=Tones())


def adapted(method: petl.Method) -> AST:
    return petl.adapt(AST(TINY, rngs=nnx.Rngs(0)), method)


def train(model: AST, **more: Any) -> Any:
    options = {"show": None, "mesh": MeshShape().make(jax.devices()[:1])}
    return fit(model, more.pop("source", tones(24)), **{**options, **more})


def test_ridge_is_fitted_without_a_step_and_comes_back(tmp_path: Path) -> None:
    test = tones(12, first=100)
    base = write_base(tmp_path / "base.safetensors", config=TINY)
    model = petl.adapt(load(base, num_classes=3), petl.Ridge())
    run = train(model, test=test, run_dir=tmp_path / "run")
    assert [row["epoch"] for row in run.history] == [0]
    assert run.history[0]["left_out/accuracy"] > 0.8 and run.test.accuracy > 0.8
    again = train(model, test=test, run_dir=tmp_path / "run")
    assert again.test.to_json() == run.test.to_json() and again.history == run.history
    path = run.save(tmp_path / "ridge.safetensors")
    assert evaluate(load_adapter(path, base=base), test).accuracy == run.test.accuracy


def test_a_start_that_suffices_stays_as_it_is(tmp_path: Path, capsys: Any) -> None:
    model = adapted(petl.AAT())
    start = train(model, training=Training(epochs=0, head_init="ridge"))
    assert start.history[0]["left_out/accuracy"] > 0.8
    enough = Training(epochs=2, head_init="ridge", ridge_suffices=0.8)
    for _ in range(2):  # from the beginning, and from the checkpoint of a run that was cut off
        run = train(model, training=enough, run_dir=tmp_path / "run", show=True)
        (tmp_path / "run" / "result.json").unlink(missing_ok=True)
        assert [row["epoch"] for row in run.history] == [0]
        for path, value in surgery.arrays(run.model).items():
            np.testing.assert_array_equal(value, surgery.arrays(start.model)[path])
    assert "the start suffices: at least" in capsys.readouterr().err
    clips = tones(24)
    noise = Source(clips.clips, clips.classes, name="noise", reader=Noise())
    run = train(model, source=noise, training=enough)
    assert [row["epoch"] for row in run.history] == [0, 1, 2]
    assert run.history[0]["left_out/accuracy"] < 0.8


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_head_starts_at_the_fit_of_what_it_reads(multi_label: bool) -> None:
    source = tones(24, multi_label=multi_label)
    model = adapted(petl.AAT())
    run = train(model, source=source, training=Training(epochs=0, head_init="ridge"))
    frontend = make_front_end(model)
    cut = cut_clips(source, frontend, Scoring(), train=True)
    forward = bind_forward(model, frontend, read_pooled)
    head = surgery.arrays(run.model.head.linear)
    assert np.isfinite(np.asarray(head["kernel"])).all()
    windows = [_read(cut.windows, i, frontend.samples) for i in range(len(cut.owner))]
    features = np.concatenate([np.asarray(forward(*window)) for window in windows])
    fitted = solve_head(cut.average(features), source)
    np.testing.assert_allclose(head["kernel"], fitted.kernel, rtol=1e-3, atol=1e-4)
    assert run.history[0][f"left_out/{'micro_f1' if multi_label else 'accuracy'}"] > 0.8


def _read(source: Source, index: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    sound = source.waveform(index)
    padded = np.zeros((1, samples), np.int16)
    padded[0, : len(sound)] = sound[:samples]
    return padded, np.array([min(len(sound), samples)], np.int32)


def test_logits_of_a_fit_are_calibrated_on_clips_left_out() -> None:
    """Scaled by the factor of least log loss, neither far too sure nor too unsure."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 300)
    features = np.eye(3)[labels] + 0.7 * rng.normal(size=(300, 3))
    clips = [Clip(str(i), (int(c),), None) for i, c in enumerate(labels)]
    source = Source(clips, ["a", "b", "c"], name="s", reader=Tones())
    head = solve_head(features, source)
    logits = features @ head.kernel + head.bias

    def loss(scale: float) -> float:
        z = scale * logits
        return float((np.log(np.exp(z).sum(1)) - z[np.arange(300), labels]).mean())

    assert min(loss(0.8), loss(1.25)) > loss(1.0)


def test_rare_classes_weigh_as_much_in_a_balanced_fit() -> None:
    rng = np.random.default_rng(1)
    labels = np.array([0] * 190 + [1] * 10)
    features = labels[:, None] + 0.8 * rng.normal(size=(200, 1))
    clips = [Clip(str(i), (int(c),), None) for i, c in enumerate(labels)]
    source = Source(clips, ["a", "b"], name="s", reader=Tones())
    recalls = []
    for balance in (False, True):
        head = solve_head(features, source, balance=balance)
        found = (features @ head.kernel + head.bias).argmax(1)
        recalls.append((found[labels == 1] == 1).mean())
    assert recalls[0] < 0.5 < recalls[1]


def test_a_head_of_zeros() -> None:
    run = train(adapted(petl.AAT()), training=Training(epochs=0, head_init="zeros"))
    assert not any(np.asarray(v).any() for v in surgery.arrays(run.model.head.linear).values())
    assert run.history == []


def test_batches_cannot_be_fitted() -> None:
    batches = Batches([(np.zeros((1, 6480), np.int16), [0])], ["a", "b", "c"])
    for method, start in ((petl.Ridge(), "model"), (petl.AAT(), "ridge")):
        with pytest.raises(UsageError, match="fitted to clips, and batches have none"):
            train(adapted(method), source=batches, training=Training(head_init=start))


def test_epochs_without_a_gain_end_the_training(tmp_path: Path) -> None:
    options = {"source": tones(12), "valid": tones(6, first=50), "test": tones(6, first=90)}
    training = Training(epochs=40, batch_size=6, head_init="ridge", patience=2, select="best")
    run = train(adapted(petl.AAT()), training=training, run_dir=tmp_path, **options)
    scores = [row["valid/accuracy"] for row in run.history]
    assert len(scores) < 40 and np.argmax(scores) == len(scores) - 3
    again = train(adapted(petl.AAT()), training=training, run_dir=tmp_path, **options)
    assert again.history == run.history
    alone = train(
        adapted(petl.AAT()),
        source=tones(12),
        training=Training(epochs=60, batch_size=6, head_init="ridge", patience=3),
        lr=1e-2,
    )
    right = [row["train/accuracy"] == 1.0 for row in alone.history[1:]]
    assert len(right) < 60 and right[-3:] == [True] * 3 and right[-4:] != [True] * 4
