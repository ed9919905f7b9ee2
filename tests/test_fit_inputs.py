"""`fit` as the one door: arrays, batches, a loss, a transformation, callbacks, run folders."""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from tiny_model import tiny_config

import aatjax
from aatjax import data, petl, surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.data.synthetic.dataset import TARGET_SOUNDS
from aatjax.errors import AatjaxError, DataError, UsageError
from aatjax.models.ast import AST
from aatjax.train.optim import make_optimizer

SOUNDS = data.Synthetic(TARGET_SOUNDS[:3], clips=4, seconds=1.0)
NAMES = SOUNDS.classes
STEREO = np.full((2, 800), 0.1)
X = [SOUNDS.waveform(i) for i in range(len(SOUNDS))]
Y = np.array([clip.label[0] for clip in SOUNDS.clips])


def adapted(method: petl.Method | None = None, seed: int = 0, **config: Any) -> AST:
    model = AST(tiny_config(**config), rngs=nnx.Rngs(0))
    return aatjax.adapt(model, method or petl.AAT(), seed=seed)


def fit(train, *, model: AST | None = None, **options: Any):
    training = aatjax.Training(epochs=options.pop("epochs", 2), batch_size=4)
    given = {"training": training, "show": False, "lr": 1e-2, **options}
    return aatjax.fit(model or adapted(), train, **given)


def assert_same(run, other, atol: float = 0) -> None:
    theirs = surgery.arrays(other.model)
    for path, value in surgery.arrays(run.model).items():
        np.testing.assert_allclose(value, theirs[path], atol=atol, err_msg=path)


# ------------------------------------------------------------------ arrays


def test_arrays_train_as_the_files_that_hold_them():
    arrays = data.Arrays(X, Y, NAMES)
    assert len(arrays) == 12 and not arrays.multi_label
    expected = fit(SOUNDS, test=SOUNDS)
    run = fit(arrays, test=arrays)
    assert_same(run, expected)
    assert run.classes == NAMES and run.test.accuracy == expected.test.accuracy
    train, test = arrays.split(0.25)
    assert (len(train), len(test)) == (9, 3)
    floats = data.Arrays([x / np.float32(32768) for x in X], Y, NAMES)
    assert_same(fit(floats), expected, 1e-6)


def test_log_mel_trains_as_the_waveforms_that_it_is_of():
    frontend = FrontEnd(frames=98)
    fitted, lengths = zip(*[frontend.fit(x) for x in X], strict=True)
    log_mel = np.asarray(frontend.features(np.stack(fitted), np.array(lengths)))
    arrays = data.Arrays(log_mel, Y, NAMES)
    expected = fit(SOUNDS, test=SOUNDS)
    run = fit(arrays, test=arrays)
    assert_same(run, expected, 2e-5)
    assert aatjax.evaluate(run.model, arrays).accuracy == expected.test.accuracy
    short = data.Arrays([x[:50] for x in log_mel], Y, NAMES)
    cut = data.Arrays([x[: 400 + 49 * 160] for x in X], Y, NAMES)
    logits = [aatjax.train.evaluation.score_clips(run.model, one).logits for one in (short, cut)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)
    with pytest.raises(UsageError, match=r"augment\.mixup mixes waveforms"):
        fit(arrays, augment=aatjax.audio.augment.Augment(mixup=0.5))
    with pytest.raises(UsageError, match="64 mel bins, the front end has 128"):
        fit(data.Arrays(log_mel[:, :, :64], Y, NAMES))


@pytest.mark.parametrize(
    ("labels", "classes", "names", "multi_label"),
    [
        (["dog", "cat", "dog"], None, ("cat", "dog"), False),
        (["dog", "cat", "dog"], ("dog", "cat"), ("dog", "cat"), False),
        ([2, 0, 1], None, ("0", "1", "2"), False),
        ([[1, 0], [1, 1], [0, 0]], ("dog", "rain"), ("dog", "rain"), True),
        ([[1, np.nan], [0, 1], [0, 0]], None, ("0", "1"), True),
    ],
)
def test_labels_are_names_numbers_or_rows(labels, classes, names, multi_label):
    arrays = data.Arrays(X[:3], labels, classes)
    assert arrays.classes == names and arrays.multi_label is multi_label
    targets = arrays.targets()
    if multi_label:
        np.testing.assert_array_equal(targets, np.array(labels, np.float32))
    else:
        found = [names[int(row.argmax())] for row in targets]
        assert found == [str(label) for label in labels]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.Arrays(X[:2], [0]), "2 sounds and 1 labels"),
        (lambda: data.Arrays(X[:2], ["x", "y"], ("x",)), "label 'y' is not among the classes"),
        (lambda: data.Arrays(X[:2], [[0, 2], [1, 0]]), "must be 0, 1 or NaN"),
        (lambda: data.Arrays(X[:2], [0, 5], ("a", "b")), "has label .5.*2 classes"),
        (lambda: data.Arrays([np.zeros(0), X[0]], [0, 1]), "row 0: .*no samples"),
        (lambda: data.Arrays([X[0], np.full(9, np.nan)], [0, 1]), "row 1: .*NaN"),
        (lambda: data.Arrays(np.zeros((2, 3, 4, 5)), [0, 1]), "row 0: .*neither a waveform"),
        (lambda: data.Arrays(X[:2], [0.5, 1.5]), "0.5 is not a class"),
        (
            lambda: data.Arrays([np.ones((2, 800)) / 9], [0]),
            r"row 0: shape \[2, 800\] .*2 channels",
        ),
        (
            lambda: data.Arrays([np.ones((800, 2)) / 9], [0]),
            r"row 0: shape \[800, 2\] .*2 channels",
        ),
        (lambda: data.Arrays([torch.ones(9, requires_grad=True)], [0]), "row 0: Tensor that NumPy"),
        (lambda: data.Arrays(X[:2], [0, 1], groups=["one"]), "2 sounds and 1 groups"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_the_row(make, message):
    with pytest.raises((UsageError, DataError), match=message):
        make()


def test_mono_sound_as_audio_libraries_return_it_and_labels_as_booleans():
    plain = data.Arrays(X[:3], [0, 1, 1], ("no", "yes"))
    for arrays in (
        data.Arrays([x[None] for x in X[:3]], [False, True, True], ("no", "yes")),
        data.Arrays([torch.tensor(x[:, None]) for x in X[:3]], [0, 1, 1], ("no", "yes")),
    ):
        assert arrays.fingerprint() == plain.fingerprint()


# ------------------------------------------------------------------ batches


def test_what_no_file_would_bring_back_is_said_before_training():
    model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(SOUNDS, model=model, epochs=1)
    surgery.unfreeze(model, "norm/*")
    with pytest.warns(UserWarning, match="norm/bias is trained, not frozen"):
        fit(SOUNDS, model=model, epochs=1)


def make_batches(size: int = 4):
    for start in range(0, len(X), size):
        yield X[start : start + size], Y[start : start + size]


def test_batches_of_ones_own_train_in_their_order_and_resume(tmp_path):
    listed = data.Batches(list(make_batches()), NAMES)
    made = data.Batches(lambda: make_batches(), NAMES, length=3)
    expected = fit(listed, test=SOUNDS)
    assert expected.history[-1]["step"] == 6 and expected.test.clips == 12
    assert_same(fit(made), expected)

    class Stop(Exception):
        pass

    def stop(moment):
        if moment.step == 4:
            raise Stop

    with pytest.raises(Stop):
        fit(made, run_dir=tmp_path, on_step=stop)
    assert_same(fit(made, run_dir=tmp_path), expected)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        (lambda: make_batches(), {}, "give length="),
        (make_batches(), {"length": 3}, "can be read only once"),
        (lambda: make_batches(), {"length": 4}, "ended after 3 of 4 batches"),
        (lambda: make_batches(6), {"length": 2}, "batch 0: holds 6 sounds: set training.batch_"),
        (lambda: iter([X]), {"length": 1}, "is a list of 12, not a pair"),
        (lambda: iter([(X[:3], np.eye(3))]), {"length": 1}, "set multi_label=True"),
    ],
)
def test_batches_that_do_not_fit_are_refused_with_what_to_change(batches, options, message):
    with pytest.raises((UsageError, DataError), match=message):
        fit(data.Batches(batches, NAMES, **options))


@pytest.mark.parametrize(
    "given", [(X, Y), X, make_batches(), {"x": X}], ids=lambda x: type(x).__name__
)
def test_what_is_no_source_is_answered_with_how(given):
    with pytest.raises(UsageError, match=r"train is a.*: give a source, data\.Arrays\(X, y"):
        fit(given)
    with pytest.raises(UsageError, match=r"test is a.*: give a source"):
        fit(SOUNDS, test=given)


# ------------------------------------------------------------------ loss, optimiser, callbacks


def test_a_loss_of_ones_own_is_used(tmp_path):
    expected = fit(SOUNDS)
    assert_same(fit(SOUNDS, loss=optax.softmax_cross_entropy), expected)
    other = fit(SOUNDS, loss=lambda logits, target: jnp.square(logits - target).sum(axis=-1))
    moved = surgery.arrays(other.model)["head/linear/bias"]
    assert np.abs(moved - surgery.arrays(expected.model)["head/linear/bias"]).max() > 1e-3
    numbers = optax.softmax_cross_entropy_with_integer_labels
    for folder in ({}, {"run_dir": tmp_path}):
        message = r"failed on logits \[4, 3\] .*a class number is argmax"
        with pytest.raises(UsageError, match=message):
            fit(SOUNDS, loss=numbers, **folder)
    assert_same(fit(SOUNDS, loss=lambda x, target: numbers(x, target.argmax(-1))), expected, 1e-6)
    with pytest.raises(UsageError, match=r"returned tuple for 4 clips"):
        fit(SOUNDS, loss=lambda logits, target: (logits - target, 1))
    with pytest.raises(UsageError, match=r"shape \[\] for 4 clips: it must return one number per"):
        fit(SOUNDS, loss=lambda logits, target: jnp.square(logits - target).mean())
    with pytest.raises(UsageError, match=r"fit\(loss=function\)"):
        aatjax.Training(loss=optax.softmax_cross_entropy)


def test_a_transformation_of_optax_replaces_our_settings(tmp_path):
    expected = fit(SOUNDS)
    tx = make_optimizer(aatjax.Optim(lr=1e-2), steps_per_epoch=3, epochs=2)
    run = fit(SOUNDS, optim=tx, lr=None)
    assert_same(run, expected)
    assert "train/lr" in expected.history[0] and "train/lr" not in run.history[0]
    with pytest.raises(UsageError, match=r"lr does not apply to a transformation of your own"):
        fit(SOUNDS, optim=optax.sgd(1e-2))
    with pytest.raises(UsageError, match=r"optim is a float: give aatjax\.Optim"):
        fit(SOUNDS, optim=1e-3)

    plain = optax.adam(1e-2)
    steps = optax.MultiSteps(plain, 1)
    assert_same(fit(SOUNDS, optim=steps, lr=None), fit(SOUNDS, optim=plain, lr=None), 1e-6)
    for folder in ({}, {"run_dir": tmp_path}):
        with pytest.raises(UsageError, match=r"optim needs more than gradients .*value_fn"):
            fit(SOUNDS, optim=optax.lbfgs(), lr=None, **folder)


def test_callbacks_see_every_step_and_epoch_with_the_model():
    steps, epochs = [], []
    run = fit(
        SOUNDS,
        valid=SOUNDS,
        on_step=lambda moment: steps.append((moment.step, moment.epoch, moment.row)),
        on_epoch=lambda moment: epochs.append((moment.epoch, moment.row, moment.model())),
    )
    assert steps == [(step, 1 + (step - 1) // 3, None) for step in range(1, 7)]
    assert [epoch for epoch, _, _ in epochs] == [1, 2]
    assert [row for _, row, _ in epochs] == run.history
    assert all(math.isfinite(row["train/loss"]) for _, row, _ in epochs)
    first, last = (surgery.arrays(model) for _, _, model in epochs)
    for path, value in surgery.arrays(run.model).items():
        np.testing.assert_array_equal(last[path], value)
    assert not np.array_equal(first["head/linear/bias"], last["head/linear/bias"])


# ------------------------------------------------------------------ one run per folder


def test_a_folder_holds_one_run(tmp_path):
    """Called again with another rate, seed, method, clips or weights, it is refused."""
    first = fit(SOUNDS, run_dir=tmp_path)
    assert_same(fit(SOUNDS, run_dir=tmp_path), first)
    fewer = SOUNDS.subset(range(9))
    louder = data.Arrays([x // 2 for x in X], Y, NAMES)
    for change, message in [
        ({"lr": 1e-1}, r"optim\.lr: 0\.01 -> 0\.1"),
        ({"epochs": 3}, r"training\.epochs: 2 -> 3"),
        ({"model": adapted(seed=1)}, r"weights\.blocks/0/"),
        ({"model": adapted(petl.LoRA(rank=2))}, r"petl\.name: 'aat' -> 'lora'"),
        ({"model": fit(SOUNDS).model}, r"weights\."),
        ({"loss": lambda logits, target: (logits - target).mean(-1)}, "loss: 'ce' -> "),
        ({"optim": optax.sgd(1e-2), "lr": None}, r"optim\.b1: 0\.9 -> None"),
        ({"frontend": FrontEnd(frames=98, mean=-1.0)}, r"frontend\.mean"),
        ({"train": fewer}, "another config|other clips.*gone"),
        ({"train": louder}, "other clips"),
        ({"train": SOUNDS.subset(range(11, -1, -1))}, "other clips .train: in another order"),
        ({"train": data.Batches(list(make_batches()), NAMES)}, "batches: None -> "),
    ]:
        train = change.pop("train", SOUNDS)
        with pytest.raises(UsageError, match=message):
            fit(train, run_dir=tmp_path, **change)
    path = tmp_path / "settings.json"
    stored = json.loads(path.read_text())
    del stored["training"]["max_skipped"], stored["petl"]["blocks"], stored["optim"]["clip"]
    del stored["training"]["balance"]
    stored["training"]["sampling"] = "uniform"
    path.write_text(json.dumps(stored))  # as an older version wrote it
    fit(SOUNDS, run_dir=tmp_path)
    stored["training"]["sampling"] = "balanced"
    path.write_text(json.dumps(stored))
    with pytest.raises(UsageError, match=r"training\.balance: 'sampler' -> 'none'"):
        fit(SOUNDS, run_dir=tmp_path)


def take_snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Content and time of every file."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_finished_run_goes_on_to_more_epochs_as_if_it_had_been_started_with_them(tmp_path):
    steady = aatjax.Optim(lr=1e-2, schedule="constant")
    options: dict[str, Any] = {"optim": steady, "lr": None, "test": SOUNDS}
    straight = fit(SOUNDS, epochs=4, **options)
    first = fit(SOUNDS, run_dir=tmp_path, **options)
    longer = fit(SOUNDS, run_dir=tmp_path, epochs=4, allow_change=["training.epochs"], **options)
    assert [row["epoch"] for row in longer.history] == [1, 2, 3, 4]
    assert_same(longer, straight)
    assert longer.test.to_json() == straight.test.to_json()
    with pytest.raises(AssertionError):
        assert_same(longer, first)
    assert jax.tree.leaves(surgery.split(longer.model).trainable)
    # What is refused leaves the folder as it is, also where the reason is found in a checkpoint.
    before = take_snapshot(tmp_path)
    for change, allow, message in [
        ({"epochs": 2}, ["training"], r"more epochs behind it .*epochs: 4 -> 2"),
        ({"epochs": 4}, ["optim"], r"nothing left to train with the change .*lr: 0.01 -> 0.1"),
        ({"epochs": 4, "model": adapted(petl.LoRA())}, ["petl", "weights"], "another model"),
        ({"epochs": 6}, ["training", "optim"], "falls to zero over the epochs"),
    ]:
        optim = aatjax.Optim(lr=1e-1, schedule="cosine" if change["epochs"] == 6 else "constant")
        optim = optim if "optim" in allow else steady
        with pytest.raises(AatjaxError, match=message):
            fit(
                SOUNDS,
                run_dir=tmp_path,
                allow_change=allow,
                **{**options, **change, "optim": optim},
            )
        assert take_snapshot(tmp_path) == before
    again = fit(SOUNDS, run_dir=tmp_path, epochs=4, **options)
    assert_same(again, straight)
    fewer = fit(
        SOUNDS,
        run_dir=tmp_path,
        epochs=4,
        allow_change=["clips"],
        **{**options, "test": SOUNDS.subset(range(5))},
    )
    assert_same(fewer, straight)
    assert fewer.test.clips == 5 and len(fewer.history) == 4


def test_batches_are_known_in_a_folder_by_name_classes_and_length(tmp_path):
    """Their content is not, which is said when a run goes on."""
    first = fit(data.Batches(list(make_batches()), NAMES), run_dir=tmp_path)
    with pytest.warns(UserWarning, match="goes on; the content of batches is not compared"):
        assert_same(fit(data.Batches(list(make_batches()), NAMES), run_dir=tmp_path), first)
    for other, message in [
        (data.Batches(list(make_batches()), NAMES, name="others"), "'batches' -> 'others'"),
        (data.Batches(list(make_batches())[:2], NAMES), "batches.length: 3 -> 2"),
        (data.Batches(list(make_batches()), NAMES, rate=8000), "batches.rate: 16000 -> 8000"),
    ]:
        with pytest.raises(UsageError, match=message):
            fit(other, run_dir=tmp_path)


def test_functions_of_ones_own_are_told_apart_by_what_they_compute(tmp_path):
    """A rate inside a transformation, a number inside a loss: no name shows them."""

    def run(rate=1e-2, scale=1.0):
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
        return fit(
            SOUNDS,
            run_dir=tmp_path,
            optim=tx,
            lr=None,
            loss=lambda logits, target: scale * optax.softmax_cross_entropy(logits, target),
        )

    assert_same(run(), run())
    with pytest.raises(UsageError, match=r"optim\.updates\.0"):
        run(rate=2e-2)
    with pytest.raises(UsageError, match=r"loss\.values"):
        run(scale=0.5)
    one, other = (optax.cosine_decay_schedule(1e-2, steps) for steps in (6, 60))
    fit(SOUNDS, run_dir=tmp_path / "b", optim=optax.sgd(one), lr=None)
    with pytest.raises(UsageError, match=r"optim\.updates\.1"):
        fit(SOUNDS, run_dir=tmp_path / "b", optim=optax.sgd(other), lr=None)
