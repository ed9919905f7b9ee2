"""Training: frozen and trained weights, selection, and stopping and resuming a run."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Int16
from sklearn.metrics import f1_score
from tiny_model import tiny_config

from aatjax import evaluate, fit, petl, surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.convert.load import make_front_end
from aatjax.data.source import Clip, Reader, Source
from aatjax.errors import DataError, NotFiniteError, UsageError, WriteError
from aatjax.inference.classifier import Classifier
from aatjax.io.signals import InterruptedRunError
from aatjax.models.ast import AST, ASTConfig
from aatjax.train import evaluation, loop
from aatjax.train import fit as fit_module
from aatjax.train.checkpoint import Checkpoints
from aatjax.train.evaluation import Evaluator, score_clips
from aatjax.train.fit import FitContext, Run
from aatjax.train.forward import make_forward, split_model
from aatjax.train.optim import Optim, make_optimizer
from aatjax.train.sharding import MeshShape
from aatjax.train.state import TrainState, init_state
from aatjax.train.step import Steps, compute_losses, count_labels, make_steps
from aatjax.train.training import Training

METHODS = [petl.AAT(), petl.SoftMoA(reduction=8.0)]
AUGMENTED = Augment(noise=True, freq_mask=9)
MIXED = Augment(mixup=1.0, noise=True, freq_mask=20)
TINY = tiny_config(frames=39)


class Tones(Reader):
    """A tone in noise; the class gives its pitch."""

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        rng = np.random.default_rng(int(clip.id))
        pitch = 400 * 2 ** sum(clip.label)
        wave = np.sin(2 * np.pi * pitch * np.arange(6480) / 16000 + rng.uniform(0, 6))
        return (8000 * wave + 2000 * rng.normal(size=6480)).astype(np.int16)


def tones(count: int, *, first: int = 0, classes: int = 3, multi_label: bool = False) -> Source:
    def label(i: int) -> tuple[int, ...]:
        return (i % classes, (i + 1) % classes)[: 1 + (i % 2)] if multi_label else (i % classes,)

    return Source(
        [Clip(str(i), label(i), None) for i in range(first, first + count)],
        [f"pitch{c}" for c in range(classes)],
        name="tones",
        multi_label=multi_label,
        reader=Tones(),
    )


def adapted(method: petl.Method | None = None, config: ASTConfig = TINY) -> AST:
    return petl.adapt(AST(config, rngs=nnx.Rngs(0)), method or petl.AAT())


def train(model: AST, **more: Any) -> Run:
    """Ten clips in batches of four: three steps an epoch, the last one half padding."""
    options: dict[str, Any] = {
        "training": Training(epochs=3, batch_size=4),
        "optim": Optim(lr=1e-2),
        "show": None,
        "mesh": MeshShape().make(jax.devices()[:1]),  # several: test_sharding
    }
    return fit(model, more.pop("source", tones(10)), **{**options, **more})


def frozen_arrays(model: AST) -> dict[str, np.ndarray]:
    every, trained = surgery.arrays(model), surgery.arrays(model, nnx.Param)
    return {path: np.asarray(value) for path, value in every.items() if path not in trained}


def trained_arrays(model: AST) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in surgery.arrays(model, nnx.Param).items()}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert set(one) == set(other) and one
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """History without the clock."""
    timed = ("clips_per_s", "seconds", "seconds_input", "seconds_transfer")
    return [{k: v for k, v in row.items() if k.rpartition("/")[2] not in timed} for row in rows]


@pytest.fixture
def steps_made(monkeypatch: pytest.MonkeyPatch) -> list[Steps]:
    """The compiled steps of every `fit` in the test."""
    made: list[Steps] = []

    def record(*args: Any, **kwargs: Any) -> Steps:
        made.append(make_steps(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(fit_module, "make_steps", record)
    return made


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Sets what is done with the state after each step: f(number, state) -> state."""

    def use(change: Callable[[int, TrainState], TrainState]) -> None:
        def wrapped(*args: Any, **kwargs: Any) -> Steps:
            steps = make_steps(*args, **kwargs)

            def step(state: TrainState, *rest: Any) -> Any:
                number = int(state.step) + 1
                state, sums = steps.train(state, *rest)
                return change(number, state), sums

            return Steps(step, steps.forward)

        monkeypatch.setattr(fit_module, "make_steps", wrapped)

    return use


def interrupt_at(monkeypatch: pytest.MonkeyPatch, at: int, times: int = 1) -> None:
    """Ctrl-C while step `at` is shown."""
    shown = loop.ProgressDisplay.step

    def step(self: Any, done: int, *rest: Any) -> None:
        shown(self, done, *rest)
        if done == at:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop.ProgressDisplay, "step", step)


# Frozen and trained weights.


def test_every_batch_of_the_final_evaluation_is_a_heartbeat() -> None:
    beats: list[tuple[str, int]] = []
    train(
        adapted(),
        test=tones(9, first=20),
        valid=tones(5, first=40),
        context=FitContext(beat=lambda *one: beats.append(one)),
    )
    last = beats[len(beats) - beats[::-1].index(("step", 8)) :]
    # One validation at the end of the last epoch, then the figures on test clips.
    assert last.count(("eval", 9)) >= 1 + 1 + 1


@pytest.mark.parametrize(
    "method", [*METHODS, pytest.param(petl.Linear(), marks=pytest.mark.slow)], ids=lambda m: m.name
)
def test_frozen_weights_stay_bit_identical(method: petl.Method) -> None:
    model = adapted(method)
    frozen, before = frozen_arrays(model), trained_arrays(model)
    run = train(model, optim=Optim(lr=1e-2, clip=1.0), augment=AUGMENTED)
    assert_same(frozen_arrays(run.model), frozen)
    assert len(frozen) > 20
    after = trained_arrays(run.model)
    assert set(after) == set(before)
    still = [path for path in before if (after[path] == before[path]).all()]
    assert not still, "every trainable leaf moves"
    assert_same(trained_arrays(model), before)  # the model that was given is left alone


def test_everything_moves_in_full_fine_tuning() -> None:
    model = adapted(petl.Full())
    before = trained_arrays(model)
    assert set(before) == set(surgery.arrays(model))
    after = trained_arrays(train(model).model)
    for path in before:
        if path.endswith("attn/k/bias"):
            continue  # a key bias changes no softmax: its gradient is rounding noise
        assert (after[path] != before[path]).any(), path


SLOW_METHODS = [petl.Linear(), petl.SoftMoA(reduction=8.0), petl.Full()]


@pytest.mark.parametrize(
    "method",
    [petl.AAT(), *(pytest.param(method, marks=pytest.mark.slow) for method in SLOW_METHODS)],
    ids=lambda m: m.name,
)
def test_loss_goes_down_and_the_tones_are_learnt(method: petl.Method) -> None:
    run = train(
        adapted(method),
        source=tones(24),
        test=tones(12, first=100),
        training=Training(epochs=25, batch_size=8),
        optim=Optim(lr=1e-2, weight_decay=0.0),
    )
    losses = [row["train/loss"] for row in run.history]
    assert losses[-1] < 0.5 * losses[0]
    assert run.test is not None and run.test.accuracy is not None
    assert run.test.accuracy > 0.8


def weight_gradients(method: petl.Method) -> list[str]:
    """Products in the optimised train step whose result has the shape of a matrix of the body."""
    config = dataclasses.replace(TINY, dim=40, mlp_dim=56)
    model = adapted(method, config)
    parts = surgery.split(model)
    tx = make_optimizer(Optim(), steps_per_epoch=1, epochs=1)
    steps = make_steps(
        parts.graphdef, tx, frontend=FrontEnd(frames=39), augment=Augment(), loss="ce"
    )
    state = init_state(parts.trainable, parts.stats, tx, average=False)
    jaxtyping.config.update("jaxtyping_disable", True)  # lowering puts descriptions in the state
    try:
        lowered = steps.train.lower(state, parts.frozen, make_batch(4), jax.random.key(0))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    text = lowered.compile().as_text()
    shapes = r"40,40|40,56|56,40"
    found = re.findall(rf"f32\[(?:{shapes})\]\S* (?:dot|custom-call)\(", text)
    return found + re.findall(r"f32\[(?:16,16,1,40|40,1,16,16)\]\S* convolution\(", text)


def test_the_step_holds_no_weight_gradient_of_a_frozen_matrix() -> None:
    assert weight_gradients(petl.SoftMoA(reduction=8.0)) == []
    # The same search finds q, k, v, out, up and down where they are trained.
    assert len(weight_gradients(petl.Full())) >= 6


def test_one_compilation_for_all_epochs_batches_and_resumes(
    steps_made: list[Steps], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partial batches, validation, test and a resumed run; settings that no other test has."""
    options: dict[str, Any] = {
        "valid": tones(7, first=50),
        "test": tones(5, first=70),
        "run_dir": tmp_path,
        "optim": Optim(lr=0.0123),
        "frontend": FrontEnd(frames=39, mean=-4.125),
    }
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(InterruptedRunError):
            train(adapted(), **options)
    assert len(train(adapted(), **options).history) == 3
    first, second = steps_made
    assert first.train is second.train and first.forward is second.forward
    programs: list[Any] = [first.train, first.forward]
    assert [program._cache_size() for program in programs] == [1, 1]


def test_evaluating_twice_compiles_once() -> None:
    frontend = FrontEnd(frames=39, mean=-4.0625)
    counts = []
    for model in (adapted(), adapted()):
        model.labels = ("a", "b", str(len(counts)))  # no number depends on it
        evaluate(model, tones(5), frontend)
        forward = make_forward(split_model(model).graphdef, frontend)
        counts.append(forward._cache_size())
    assert counts == [1, 1]


def test_validation_clips_are_evaluated_once_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    predict = Evaluator.predict

    def count(self: Evaluator, weights: Any, source: Source, **more: Any) -> Any:
        sizes.append(len(source))
        return predict(self, weights, source, **more)

    monkeypatch.setattr(Evaluator, "predict", count)
    for select in ("last", "best"):
        sizes.clear()
        training = Training(epochs=3, batch_size=4, select=select)
        run = train(adapted(), valid=tones(7, first=50), test=tones(5, first=70), training=training)
        assert sizes == [7, 7, 7, 5]
        assert run.valid is not None and run.valid_scores is not None
        again = score_clips(run.model, tones(7, first=50), run.frontend).logits
        np.testing.assert_allclose(run.valid_scores.logits, again, atol=1e-5)


# Steps.


def make_batch(count: int, *, seed: int = 0, classes: int = 3) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    samples = FrontEnd(frames=39).samples
    return {
        "audio": jnp.asarray(rng.integers(-9000, 9000, (count, samples)), jnp.int16),
        "length": jnp.full(count, samples, jnp.int32),
        "target": jax.nn.one_hot(jnp.arange(count) % classes, classes),
        "weight": jnp.ones(count, jnp.float32),
    }


def one_step(
    batch: dict[str, Any],
    *,
    augment: Augment | None = None,
    loss: Any = "ce",
    key: int = 0,
    method: petl.Method | None = None,
    **options: Any,
) -> tuple[TrainState, dict[str, float]]:
    model = adapted(method)
    if method is None:
        up = model.blocks[0].mlp.mlp_adapter.w_up
        up[...] = 0.1 + up[...]
    parts = surgery.split(model)
    tx = make_optimizer(Optim(), steps_per_epoch=3, epochs=3)
    steps = make_steps(
        parts.graphdef,
        tx,
        frontend=FrontEnd(frames=39),
        augment=augment or Augment(),
        loss=loss,
        **options,
    )
    state = init_state(parts.trainable, parts.stats, tx, average=False)
    state, sums = steps.train(state, parts.frozen, batch, jax.random.key(key))
    return state, {name: float(value) for name, value in sums.items()}


def first_moment(state: TrainState) -> list[np.ndarray]:
    """A tenth of the gradient of the first step."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state.opt_state[0][0].mu)]


@pytest.mark.parametrize(
    ("augment", "loss"),
    [(MIXED, "bce"), pytest.param(Augment(), "ce", marks=pytest.mark.slow)],
    ids=["augmented-bce", "plain-ce"],
)
def test_rows_of_weight_zero_change_nothing(augment: Augment, loss: str) -> None:
    batch = make_batch(4)
    batch["weight"] = jnp.asarray([1, 1, 1, 0], jnp.float32)
    other = dict(batch)
    other["audio"] = batch["audio"].at[3:].set(-32768)
    other["target"] = batch["target"].at[3:].set(1.0)
    other["length"] = batch["length"].at[3:].set(400)
    one, sums = one_step(batch, augment=augment, loss=loss)
    two, also = one_step(other, augment=augment, loss=loss)
    assert sums == also and sums["weight"] == 3
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("loss", ["ce", pytest.param("bce", marks=pytest.mark.slow)])
def test_padding_gives_the_loss_and_gradient_of_the_batch_without(loss: str) -> None:
    batch = make_batch(4)
    short = {name: value[:3] for name, value in batch.items()}
    batch["weight"] = jnp.asarray([1, 1, 1, 0], jnp.float32)
    (padded, sums), (plain, alone) = one_step(batch, loss=loss), one_step(short, loss=loss)
    assert sums["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert (sums["weight"], sums["correct"]) == (3, alone["correct"])
    for a, b in zip(first_moment(padded), first_moment(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-7)
    assert any(np.abs(a).max() > 1e-4 for a in first_moment(plain))


def test_a_batch_of_padding_alone_is_finite() -> None:
    batch = make_batch(4)
    batch["weight"] = jnp.zeros(4, jnp.float32)
    state, sums = one_step(batch)
    assert set(sums) == {"loss", "correct", "weight", "skipped", "shared", "labels"}
    assert not any(sums.values())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trainable))


def test_without_augmentation_the_key_does_not_matter() -> None:
    def trainable(augment: Augment, key: int) -> np.ndarray:
        state, _ = one_step(make_batch(4), augment=augment, key=key)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.trainable)])

    np.testing.assert_array_equal(trainable(Augment(), 0), trainable(Augment(), 1))
    np.testing.assert_array_equal(trainable(MIXED, 0), trainable(MIXED, 0))
    assert (trainable(MIXED, 0) != trainable(MIXED, 1)).any()


def test_every_step_draws_new_augmentation() -> None:
    parts = surgery.split(adapted())
    tx = make_optimizer(Optim(), steps_per_epoch=3, epochs=3)
    steps = make_steps(parts.graphdef, tx, frontend=FrontEnd(frames=39), augment=MIXED, loss="ce")
    losses = []
    for number in (0, 1, 1):
        state = init_state(parts.trainable, parts.stats, tx, average=False)
        state = dataclasses.replace(state, step=jnp.int32(number))
        _, sums = steps.train(state, parts.frozen, make_batch(4), jax.random.key(0))
        losses.append(float(sums["loss"]))
    assert losses[0] != losses[1] == losses[2]


@pytest.mark.parametrize(
    ("method", "loss", "augment"),
    [
        (None, "ce", MIXED),
        (petl.TopKMoA(num_experts=3, reduction=8), "bce", Augment()),
    ],
    ids=["mixup", "penalty"],
)
def test_a_batch_in_parts_takes_the_step_of_the_whole(
    method: petl.Method | None, loss: str, augment: Augment
) -> None:
    batch = make_batch(12)
    batch["weight"] = batch["weight"].at[-3:].set(0.0)  # parts hold more and less padding
    given = {"method": method, "loss": loss, "augment": augment}
    whole, sums = one_step(batch, **given)
    parts, sums_of_parts = one_step(batch, accumulate=3, **given)
    assert sums_of_parts == pytest.approx(sums, rel=1e-5)
    if method is not None:  # its penalty counts tokens of each part
        return
    largest = max(np.abs(leaf).max() for leaf in first_moment(whole))
    for one, other in zip(first_moment(whole), first_moment(parts), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * largest)


def test_a_batch_that_does_not_divide_into_its_parts_is_refused() -> None:
    with pytest.raises(UsageError, match=r"batch_size=32 is not a multiple of training.accum.*=3"):
        Training(accumulate=3)
    mesh = MeshShape().make(jax.devices()[:4])
    with pytest.raises(UsageError, match=r"training\.batch_size / training\.accumulate=2 does not"):
        train(adapted(), training=Training(batch_size=8, accumulate=4), mesh=mesh)


def test_focal_loss_and_label_smoothing_are_their_formulas() -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(6, 4)) * 4, rng.dirichlet(np.ones(4), 6)
    known = (rng.random((6, 4)) < 0.7).astype(np.float64)
    known[:, 0] = 1
    options = {"focal": 2.5, "smoothing": 0.2}
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    smooth = 0.8 * target + 0.2 / 4
    wanted = -(smooth * (1 - p) ** 2.5 * np.log(p)).sum(1)
    given = [jnp.asarray(x, jnp.float32) for x in (logits, target, known)]
    np.testing.assert_allclose(
        compute_losses(given[0], given[1], "ce", **options), wanted, rtol=1e-5
    )
    q = 1 / (1 + np.exp(-logits))
    smooth = (0.8 * target + 0.1) * known
    each = -smooth * (1 - q) ** 2.5 * np.log(q) - (known - smooth) * q**2.5 * np.log(1 - q)
    found = compute_losses(given[0], given[1] * given[2], "bce", given[2], **options)
    np.testing.assert_allclose(found, each.sum(1) / known.sum(1), rtol=1e-5)
    sure = jnp.asarray([[80.0, -80.0]])  # p is 1 in float32
    gradient = jax.grad(lambda z: compute_losses(z, sure > 0, "ce", focal=0.5).sum())(sure)
    assert np.isfinite(np.asarray(gradient)).all()


def test_losses_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 4)).astype(np.float32) * 5
    soft = rng.dirichlet(np.ones(4), 6).astype(np.float32)
    many = rng.integers(0, 2, (6, 4)).astype(np.float32)
    functional = torch.nn.functional
    np.testing.assert_allclose(
        compute_losses(jnp.asarray(logits), jnp.asarray(soft), "ce"),
        functional.cross_entropy(torch.tensor(logits), torch.tensor(soft), reduction="none"),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        compute_losses(jnp.asarray(logits), jnp.asarray(many), "bce"),
        functional.binary_cross_entropy_with_logits(
            torch.tensor(logits), torch.tensor(many), reduction="none"
        ).mean(1),
        rtol=1e-5,
    )


# Which weights are kept.


FOR_BEST: dict[str, Any] = {
    "source": tones(12),
    "training": Training(epochs=8, batch_size=6, average=0.7, select="best"),
    "optim": Optim(lr=5e-2),
}


def test_last_best_and_average_weights(
    after_step: Callable[[Any], None],
) -> None:
    seen: dict[int, Any] = {}

    def keep(number: int, state: TrainState) -> TrainState:
        seen[number] = jax.tree.map(np.asarray, jax.device_get(state.trainable))
        return state

    after_step(keep)
    model = adapted()
    start = jax.tree.map(np.asarray, surgery.split(model).trainable)
    valid = tones(9, first=50)
    run = train(
        model,
        valid=valid,
        test=tones(6, first=70),
        **FOR_BEST,
    )
    parts = surgery.split(run.models["last"])
    for a, b in zip(jax.tree.leaves(parts.trainable), jax.tree.leaves(seen[16]), strict=True):
        np.testing.assert_array_equal(a, b)

    scores = [row["valid/accuracy"] for row in run.history]
    assert len(set(scores)) > 1, "the test needs epochs that differ"
    best = int(np.argmax(scores)) + 1  # the first of equals
    parts = surgery.split(run.models["best"])
    for a, b in zip(jax.tree.leaves(parts.trainable), jax.tree.leaves(seen[2 * best]), strict=True):
        np.testing.assert_array_equal(a, b)

    average = start
    for number in range(1, 17):
        average = jax.tree.map(lambda m, p: 0.7 * m + 0.3 * p, average, seen[number])
    parts = surgery.split(run.models["average"])
    for a, b in zip(jax.tree.leaves(parts.trainable), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)

    assert run.selected == "best" and set(run.models) == {"last", "best", "average"}
    assert run.valid is not None and run.valid.accuracy == max(scores)
    assert_same(trained_arrays(run.model), trained_arrays(run.models["best"]))
    again = evaluate(run.models["best"], tones(6, first=70), run.frontend)
    assert run.test is not None and run.test.to_json() == again.to_json()


def test_the_first_of_equally_good_epochs_is_the_best(
    after_step: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, Any] = {}

    def keep(number: int, state: TrainState) -> TrainState:
        seen[number] = jax.tree.map(np.asarray, jax.device_get(state.trainable))
        return state

    scores = itertools.chain([None, 0.2, 0.5, 0.5], itertools.repeat(0.1))
    measure = evaluation.measure_metrics

    def scripted(*args: Any) -> Any:
        return dataclasses.replace(measure(*args), accuracy=next(scores))

    after_step(keep)
    monkeypatch.setattr(evaluation, "measure_metrics", scripted)
    run = train(adapted(), valid=tones(3, first=50), **FOR_BEST)
    assert [row["valid/accuracy"] for row in run.history[:5]] == [None, 0.2, 0.5, 0.5, 0.1]
    parts = surgery.split(run.models["best"])
    for a, b in zip(jax.tree.leaves(parts.trainable), jax.tree.leaves(seen[6]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("select", ["last", "average"])
def test_the_selected_weights_are_the_run_s_model(select: Any) -> None:
    training = Training(epochs=3, batch_size=4, average=0.9, select=select)
    run = train(adapted(), training=training, augment=AUGMENTED)
    assert_same(trained_arrays(run.model), trained_arrays(run.models[select]))
    last, average = (trained_arrays(run.models[name]) for name in ("last", "average"))
    assert any((last[path] != average[path]).any() for path in last)


def test_weights_that_were_not_kept_are_refused(tmp_path: Path) -> None:
    run = train(adapted())
    with pytest.raises(UsageError, match="no best weights were kept; there are last"):
        run.save(tmp_path / "a.safetensors", weights="best")


def test_several_labels_per_clip_train_with_bce() -> None:
    many = tones(18, multi_label=True)
    run = train(
        adapted(),
        source=many,
        test=tones(12, first=100, multi_label=True),
        training=Training(epochs=20, batch_size=6),
    )
    assert run.multi_label and run.test is not None and run.test.multi_label
    assert run.history[0]["train/loss"] == pytest.approx(np.log(2), abs=0.15)
    assert run.history[-1]["train/loss"] < 0.5
    with pytest.raises(UsageError, match=r"several labels per clip: use training\.loss='bce'"):
        train(adapted(), source=many, training=Training(epochs=1, loss="ce"))


def test_one_label_per_clip_may_train_with_bce() -> None:
    training = Training(epochs=20, batch_size=6, loss="bce")
    run = train(adapted(), source=tones(18), training=training)
    assert not run.multi_label
    assert run.history[0]["train/loss"] == pytest.approx(np.log(2), abs=0.1)


# Reproducibility.


@pytest.mark.parametrize("augment", [Augment(), AUGMENTED])
def test_the_same_seed_is_bit_identical(augment: Augment, tmp_path: Path) -> None:
    def result(seed: int, folder: Path | None) -> tuple[dict[str, np.ndarray], Any]:
        training = Training(epochs=3, batch_size=4, seed=seed)
        options = {"training": training, "augment": augment, "windows": "random"}
        run = train(adapted(), run_dir=folder, **options)
        return trained_arrays(run.model), figures(run.history)

    one, rows = result(1, None)
    two, also = result(1, tmp_path)  # and writing it down changes nothing
    assert_same(one, two)
    assert rows == also
    other, _ = result(2, None)
    assert any((one[path] != other[path]).any() for path in one)


@pytest.mark.parametrize("at", [4, 6])
def test_stop_and_resume_is_a_straight_run(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F8: Ctrl-C in an epoch, and at the end of one (6); the same call goes on, bit for bit."""
    options: dict[str, Any] = {
        "training": Training(epochs=3, batch_size=4, average=0.9, save_every=2),
        "windows": "random",
        "augment": AUGMENTED,
        "valid": tones(6, first=50),
    }
    straight = train(adapted(), run_dir=tmp_path / "straight", **options)
    interrupt_at(monkeypatch, at)
    with pytest.raises(InterruptedRunError) as caught:
        train(adapted(), run_dir=tmp_path / "broken", **options)
    assert caught.value.exit_code == 130
    assert f"stopped at step {at} of 9" in str(caught.value)
    assert Checkpoints(tmp_path / "broken" / "checkpoints").latest == at
    monkeypatch.undo()
    with (tmp_path / "screen").open("w+") as screen:
        resumed = train(adapted(), run_dir=tmp_path / "broken", show=screen, **options)
    assert f"going on from step {at} of 9" in (tmp_path / "screen").read_text()

    for name in ("last", "best", "average"):
        assert_same(trained_arrays(resumed.models[name]), trained_arrays(straight.models[name]))
    rows = read(tmp_path / "broken")
    assert figures(rows) == figures(resumed.history)
    assert [row["step"] for row in rows] == [3, 6, 9]
    for one, other in zip(figures(rows), figures(read(tmp_path / "straight")), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.slow
def test_resumed_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F16: twelve steps, stopped after each of them in turn."""
    options: dict[str, Any] = {
        "training": Training(epochs=4, batch_size=4, threads=0),
        "valid": tones(4, first=50),
        "augment": Augment(noise=True),
    }
    straight = train(adapted(), **options)
    for at in range(1, 12):
        with monkeypatch.context() as patch:
            interrupt_at(patch, at)
            with pytest.raises(InterruptedRunError, match=f"stopped at step {at} of 12"):
                train(adapted(), run_dir=tmp_path / str(at), **options)
        resumed = train(adapted(), run_dir=tmp_path / str(at), **options)
        assert_same(trained_arrays(resumed.model), trained_arrays(straight.model))
        assert figures(resumed.history) == figures(straight.history)


def test_a_checkpoint_is_never_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the figures of an epoch are taken: they are taken again, nothing is lost."""
    options: dict[str, Any] = {"valid": tones(6, first=50)}
    straight = train(adapted(), **options)
    measure = Evaluator.predict

    def stopped(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return measure(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "predict", stopped)
        with pytest.raises(InterruptedRunError, match="stopped at step 3 of 9"):
            train(adapted(), run_dir=tmp_path, **options)
    assert Checkpoints(tmp_path / "checkpoints").latest == 3
    saved: list[int] = []
    save = Checkpoints.save

    def record(self: Checkpoints, step: int, *rest: Any) -> None:
        saved.append(step)
        save(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", record)
    resumed = train(adapted(), run_dir=tmp_path, **options)
    assert saved == [6, 9]
    assert_same(trained_arrays(resumed.model), trained_arrays(straight.model))
    assert figures(resumed.history) == figures(straight.history)
    assert [row["step"] for row in read(tmp_path)] == [3, 6, 9]


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    tmp_path: Path, after_step: Callable[[Any], None]
) -> None:
    """F23: it changes nothing but the count; its batch is written down; one too many stops."""
    model, source = adapted(), tones(10)
    seen: dict[int, Any] = {}
    loud = surgery.variables(model)["head/linear/bias"]

    def spoil(number: int, state: TrainState) -> TrainState:
        """Set the head to NaN for step 4, and back for the next ones."""
        flat, tree = jax.tree.flatten(state.trainable)
        place = next(i for i, leaf in enumerate(flat) if leaf.shape == loud.shape)
        if number == 3:
            seen["bias"] = np.asarray(flat[place])
            flat[place] = flat[place] * jnp.nan
        if number == 4:
            seen["others"] = [np.asarray(leaf) for leaf in flat]
            flat[place] = jnp.asarray(seen["bias"])
        return dataclasses.replace(state, trainable=jax.tree.unflatten(tree, flat))

    after_step(spoil)
    with monkey_finite():
        training = Training(epochs=3, batch_size=4, max_skipped=1)
        run = train(model, source=source, run_dir=tmp_path, training=training, windows="random")
    assert [row.get("train/skipped") for row in run.history] == [None, 1.0, None]
    assert all(np.isfinite(leaf).all() for leaf in trained_arrays(run.model).values())
    dumped = np.load(tmp_path / "not-finite-step4.npz")
    assert dumped["audio"].shape == (4, 6480)
    assert len(json.loads(str(dumped["ids"]))) == 4
    with pytest.raises(NotFiniteError, match=r"step 4 is not finite") as caught, monkey_finite():
        train(model, source=source, run_dir=tmp_path / "strict")
    assert caught.value.exit_code == 3
    assert "not-finite-step4.npz" in str(caught.value)


@contextlib.contextmanager
def monkey_finite() -> Iterator[None]:
    """Switch off the check of the weights after an epoch, which has its own test."""
    before = loop.Loop._check_weights
    loop.Loop._check_weights = lambda *rest: None  # type: ignore[assignment]
    try:
        yield
    finally:
        loop.Loop._check_weights = before


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_second_call_of_a_finished_run_trains_no_step(
    tmp_path: Path, after_step: Callable[[Any], None]
) -> None:
    first = train(adapted(), run_dir=tmp_path, valid=tones(6, first=50))

    def never(number: int, state: TrainState) -> TrainState:
        raise AssertionError("a step was trained")

    after_step(never)
    again = train(adapted(), run_dir=tmp_path, valid=tones(6, first=50))
    assert_same(trained_arrays(again.model), trained_arrays(first.model))
    assert again.history == first.history
    assert again.seconds == first.seconds


def test_rows_after_the_checkpoint_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F2: killed after a row was written and before its checkpoint was."""
    straight = train(adapted(), run_dir=tmp_path / "straight")
    interrupt_at(monkeypatch, 4)
    with pytest.raises(InterruptedRunError):
        train(adapted(), run_dir=tmp_path / "killed")
    monkeypatch.undo()
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "epoch": 2, "train/loss": 99}\n{"step": 9, "epo')
    resumed = train(adapted(), run_dir=tmp_path / "killed")
    assert [row["step"] for row in read(tmp_path / "killed")] == [3, 6, 9]
    assert figures(resumed.history) == figures(straight.history)


def test_rows_without_any_checkpoint_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "epoch": 1}\n')
    assert [row["step"] for row in train(adapted(), run_dir=tmp_path).history] == [3, 6, 9]


def test_ctrl_c_without_a_folder_reports_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_at(monkeypatch, 2)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedRunError, match=r"stopped at step 2 of 9$"):
        train(adapted())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F8: nothing more is saved, and what was saved is whole."""
    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    interrupt_at(monkeypatch, 5, times=2)
    with pytest.raises(SystemExit):
        train(adapted(), run_dir=tmp_path)
    assert ended == [130]
    assert Checkpoints(tmp_path / "checkpoints").latest == 3


@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_checkpoint_that_fails_in_the_background_stops_the_run_or_not(
    choice: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settle, calls = Checkpoints.settle, itertools.count()

    def fail_once(self: Checkpoints) -> None:
        settle(self)
        if next(calls) == 5:
            raise WriteError("the disk is full")

    monkeypatch.setattr(Checkpoints, "settle", fail_once)
    training = Training(epochs=3, batch_size=4, on_save_error=choice)
    raises = pytest.raises(WriteError) if choice == "stop" else contextlib.nullcontext()
    with raises:
        run = train(adapted(), run_dir=tmp_path, training=training, show=True)
        assert len(run.history) == 3
        assert "warning: the disk is full" in capsys.readouterr().err


# Values that are not finite.


def test_a_frozen_weight_that_is_nan_stops_the_run(tmp_path: Path) -> None:
    """F23."""
    model = adapted()
    kernel = surgery.variables(model)["blocks/0/attn/q/kernel"]
    kernel[...] = jnp.nan * kernel[...]
    with pytest.raises(NotFiniteError, match="gradient at step 1 is not finite") as caught:
        train(model, run_dir=tmp_path)
    assert caught.value.exit_code == 3
    assert "none" in str(caught.value) and "\n" not in str(caught.value)
    assert Checkpoints(tmp_path / "checkpoints").latest is None


@pytest.mark.parametrize("at", [4, 5, 6, 9])
def test_weights_that_turn_nan_never_reach_a_checkpoint(
    at: int, tmp_path: Path, after_step: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """F23: also where the loss of the step itself was finite, at the end of an epoch or run."""

    def poison(number: int, state: TrainState) -> TrainState:
        if number != at:
            return state
        return dataclasses.replace(
            state, trainable=jax.tree.map(lambda leaf: leaf * jnp.nan, state.trainable)
        )

    after_step(poison)
    with pytest.raises(NotFiniteError, match="the last finite checkpoint is step"):
        train(adapted(), run_dir=tmp_path)
    kept = 3 * ((at - 1) // 3)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.latest == kept
    checkpoints.close()
    monkeypatch.undo()
    resumed = train(adapted(), run_dir=tmp_path)  # without the fault
    assert_same(trained_arrays(resumed.model), trained_arrays(train(adapted()).model))
    assert [row["step"] for row in read(tmp_path)] == [3, 6, 9]


@pytest.mark.slow
def test_a_huge_learning_rate_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"lower optim\.lr"):
        train(adapted(petl.Full()), run_dir=tmp_path, optim=Optim(lr=1e30))


# Refused arguments.


def test_the_number_of_classes_must_fit() -> None:
    with pytest.raises(UsageError, match=r"tones has 4 classes, the model's head 3.*num_classes=4"):
        train(adapted(), source=tones(8, classes=4))
    with pytest.raises(UsageError, match="'pitch3', did you mean 'pitch2'"):
        train(adapted(), test=tones(8, classes=4))
    with pytest.raises(UsageError, match="4 classes"):
        evaluate(adapted(), tones(8, classes=4))


def test_classes_are_matched_by_name() -> None:
    names = tones(6).classes
    turned = [dataclasses.replace(c, label=(2 - c.label[0],)) for c in tones(6, first=50).clips]
    same = train(adapted(), test=tones(6, first=50))
    other = train(adapted(), test=Source(turned, names[::-1], name="turned", reader=Tones()))
    assert same.test is not None and other.test is not None
    assert other.test.to_json() == same.test.to_json()
    two = tones(6, first=50).with_clips(c for c in tones(6, first=50).clips if c.label != (1,))
    part = train(
        adapted(),
        test=Source(
            [dataclasses.replace(c, label=(c.label[0] // 2,)) for c in two.clips],
            [names[0], names[2]],
            name="without one",
            reader=Tones(),
        ),
    )
    assert part.test is not None
    absent = part.test.per_class[1]
    assert (absent.name, absent.support, absent.recall) == (names[1], 0, None)
    with pytest.raises(UsageError, match="'a'; 'b'; 'c': not among the classes of tones"):
        train(adapted(), test=Source(turned, ["a", "b", "c"], name="others", reader=Tones()))


def test_the_front_end_must_fit() -> None:
    with pytest.raises(UsageError, match=r"makes 98 frames of 128.*takes 39.*frames=98"):
        train(adapted(), frontend=FrontEnd(frames=98))
    with pytest.raises(UsageError, match="64 mel bins"):
        evaluate(adapted(), tones(3), FrontEnd(frames=39, mels=64))


def test_a_model_without_anything_to_train_is_refused() -> None:
    model = AST(TINY, rngs=nnx.Rngs(0))
    surgery.freeze(model)
    with pytest.raises(UsageError, match=r"aatjax\.adapt"):
        train(model)


def test_best_needs_validation_clips() -> None:
    with pytest.raises(UsageError, match="select='best' needs validation clips"):
        train(adapted(), training=Training(epochs=1, select="best"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": -1},
        {"batch_size": 0},
        {"eval_batch_size": 0},
        {"save_every": 0},
        {"threads": -1},
        {"select": "average"},
        {"average": 1.0},
        {"average": 0.0},
    ],
)
def test_options_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Training(**wrong)


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    train(adapted(petl.Linear()), run_dir=tmp_path)
    with pytest.raises(UsageError, match=r"petl\.name: 'linear' -> 'aat'"):
        train(adapted(petl.AAT()), run_dir=tmp_path)
    with pytest.raises(DataError, match="belongs to another model"):
        train(adapted(petl.AAT()), run_dir=tmp_path, allow_change=["petl", "weights"])


class Broken(Tones):
    """The eighth clip cannot be read."""

    def read(self, clip: Clip) -> Int16[np.ndarray, " s"]:
        if clip.id == "7":
            raise DataError("7.wav: is broken")
        return super().read(clip)


def test_a_clip_that_fails_stops_the_run_and_is_named(tmp_path: Path) -> None:
    """F28."""
    source = tones(10).with_clips(tones(10).clips, reader=Broken())
    with pytest.raises(DataError, match=r"7\.wav: is broken"):
        train(adapted(), source=source, run_dir=tmp_path)


def test_each_epoch_prints_one_line(tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w+") as screen:
        train(adapted(), show=screen, valid=tones(6, first=50))
    lines = (tmp_path / "screen").read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("compiling")
    assert re.match(
        r"epoch 1/3  loss \d\.\d{4}  train accuracy \d\.\d{3}  valid/accuracy", lines[1]
    )


def test_a_multi_label_run_shows_micro_f1_of_its_training_clips(tmp_path: Path) -> None:
    source = tones(10, multi_label=True)
    with (tmp_path / "screen").open("w+") as screen:
        run = train(adapted(), source=source, show=screen, training=Training(epochs=1))
    line = screen_text(tmp_path).splitlines()[1]  # after that on compiling
    assert re.match(r"epoch 1/1  loss \d\.\d{4}  train micro-F1 \d\.\d{3} ", line)
    (row,) = run.history
    assert "train/accuracy" not in row and 0 <= row["train/micro_f1"] <= 1


def screen_text(folder: Path) -> str:
    return (folder / "screen").read_text()


def test_labels_are_counted_as_by_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    target = (rng.random((24, 5)) < 0.4).astype(np.float32)
    logits = jnp.asarray(rng.normal(size=(24, 5)) + target, jnp.float32)
    weight = jnp.ones(24).at[20:].set(0)
    sums = count_labels(logits, jnp.asarray(target), None, weight)
    expected = f1_score(target[:20], np.asarray(logits)[:20] > 0, average="micro")
    assert float(sums["shared"] / sums["labels"]) == pytest.approx(expected)
    # Two labels each, all right: the highest logit is of the second label, argmax of the first.
    pairs = jnp.asarray([[1.0, 1.0, 0.0]])
    sums = count_labels(jnp.asarray([[2.0, 3.0, -1.0]]), pairs, None, jnp.ones(1))
    assert float(sums["shared"] / sums["labels"]) == 1
    # What is not annotated, or was mixed in with the smaller share, is not counted.
    known = jnp.asarray([[1.0, 0.0, 1.0]])
    mixed = jnp.asarray([[0.7, 0.0, 0.3]])
    sums = count_labels(jnp.asarray([[1.0, 5.0, -1.0]]), mixed, known, jnp.ones(1))
    assert (float(sums["shared"]), float(sums["labels"])) == (2, 2)


@pytest.mark.parametrize(("show", "lines"), [(True, 3), (False, 0), (None, 0), ("stderr", 3)])
def test_progress_goes_to_standard_error_unless_switched_off(
    show: Any, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    train(adapted(), show=show)
    found = capsys.readouterr()
    assert found.err.count("epoch ") == lines and not found.out


def test_without_tensorboardx_one_line_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    train(adapted(), show=True, run_dir=tmp_path)
    assert capsys.readouterr().err.count("aatjax[tensorboard]") == 1
    assert len(read(tmp_path)) == 3 and not (tmp_path / "tensorboard").exists()


def test_an_unknown_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="fit has no setting 'epoch', did you mean 'epochs'"):
        train(adapted(), epoch=3)


# Mixtures and padding.


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_figures_of_mixtures_are_in_the_history(tmp_path: Path, scan: bool) -> None:
    config = dataclasses.replace(TINY, depth=1 + scan, scan=scan)
    method: petl.Method = petl.SoftMoA(reduction=8.0)
    if scan:
        method = petl.Combined((petl.LoRA(reduction=8), method))
    run = train(adapted(method, config), run_dir=tmp_path, augment=AUGMENTED)
    names = {"combine_entropy", "dispatch_entropy", "least_used", "most_used", "balance"}
    names |= {"slot_similarity"}
    for row in [*run.history, *map(json.loads, (tmp_path / "metrics.jsonl").open())]:
        assert {f"mixture/{name}" for name in names} == {k for k in row if k.startswith("mixture/")}
        assert 0 < row["mixture/balance"] <= 1.0001
        assert row["mixture/least_used"] <= 1.0001 <= 1.0002 + row["mixture/most_used"]
    clips = [run.frontend.fit(Tones().read(Clip(str(i), (i % 3,), None))) for i in range(8)]
    audio, length = (jnp.asarray(np.stack(part)) for part in zip(*clips, strict=True))
    last = petl.diagnose_routing(run.model, run.frontend(audio, length))
    for name in names:
        assert last[name] == pytest.approx(run.history[-1][f"mixture/{name}"], rel=1e-4)
    assert not any(k.startswith("mixture/") for k in train(adapted(petl.AAT())).history[0])


def predict_padded(model: AST, pad: str) -> tuple[FrontEnd, tuple[float, ...]]:
    frontend = dataclasses.replace(make_front_end(model), pad=pad)
    wave = Tones().read(Clip("1", (1,), None))
    found = Classifier(model, ("a", "b", "c"), frontend).predict_waveform(wave)
    return frontend, found.probabilities


# Patches of 13 frames: the clip's 39 are three columns, and no patch is half padding.
PADDED = dataclasses.replace(TINY, frames=79, patch=(16, 13), stride=(16, 13))


@pytest.mark.parametrize("masked", [False, True])
def test_masked_padding_does_not_change_predictions(masked: bool) -> None:
    model = adapted(petl.SoftMoA(reduction=8.0), dataclasses.replace(PADDED, mask_padding=masked))
    found = [predict_padded(model, pad)[1] for pad in ("log_mel_zero", "silence")]
    difference = np.abs(np.subtract(*found)).max()
    assert difference < 1e-6 if masked else difference > 1e-4


@pytest.mark.slow
def test_masked_padding_does_not_change_training() -> None:
    model = adapted(petl.SoftMoA(reduction=8.0), dataclasses.replace(PADDED, mask_padding=True))
    losses = []
    for pad in ("log_mel_zero", "silence"):
        frontend, _ = predict_padded(model, pad)
        losses.append([row["train/loss"] for row in train(model, frontend=frontend).history])
    np.testing.assert_allclose(*losses, atol=1e-6)
