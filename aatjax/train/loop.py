"""Fitting an adapted model and evaluating it."""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from aatjax import surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data.clips import Source
from aatjax.data.pipeline import Crop, batches_per_epoch, eval_batches, train_batches
from aatjax.errors import NotFiniteError, UsageError
from aatjax.loading import front_end_of
from aatjax.models.ast import AST
from aatjax.train import metrics
from aatjax.train.artefact import save_adapter
from aatjax.train.checkpoint import Checkpoints
from aatjax.train.interrupt import Interrupted, StopRequest
from aatjax.train.optim import Optim, learning_rate, make_optimizer
from aatjax.train.records import Display, Records, TextStream
from aatjax.train.state import TrainState, init_state
from aatjax.train.step import Loss, Steps, make_steps

Select = Literal["last", "best", "average"]
Weights = tuple[Any, Any]
CHECK_EVERY = 10  # steps between looks at the loss: more often would wait for the device


@dataclasses.dataclass(frozen=True)
class Training:
    """How long, how large, and which weights are kept.

    Attributes:
        epochs: passes over the training clips.
        batch_size: clips a step.
        eval_batch_size: clips a step of evaluation; None takes twice `batch_size`.
        loss: `ce` (one class a clip), `bce` (any number), or None to choose by the data.
        crop: where a clip that is longer than the model's input is cut in training.
        select: weights of the result: the `last` epoch's, those of the `best` epoch on the
            validation clips, or the `average` (exponential moving average).
        average: decay of the moving average a step, or None for none.
        save_every: epochs between checkpoints.
        seed: seed of order, crops and augmentation.
        threads: reading threads.
    """

    epochs: int = 20
    batch_size: int = 32
    eval_batch_size: int | None = None
    loss: Loss | None = None
    crop: Crop = "start"
    select: Select = "last"
    average: float | None = None
    save_every: int = 1
    seed: int = 0
    threads: int = 2

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_batch_size", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} must be at least 1")
        if self.threads < 0:
            raise UsageError(f"threads={self.threads} must be 0 (read in the main thread) or more")
        if self.loss not in (None, "ce", "bce"):
            raise UsageError(f"loss={self.loss!r} is not one of ce, bce")
        if self.crop not in ("start", "random"):
            raise UsageError(f"crop={self.crop!r} is not one of start, random")
        if self.select not in ("last", "best", "average"):
            raise UsageError(f"select={self.select!r} is not one of last, best, average")
        if self.select == "average" and self.average is None:
            raise UsageError("select='average' needs average=, a decay such as 0.999")
        if self.average is not None and not 0 < self.average < 1:
            raise UsageError(f"average={self.average} must lie between 0 and 1, such as 0.999")


@dataclasses.dataclass(frozen=True)
class Run:
    """What `fit` returns.

    Attributes:
        model: the adapted model with the selected weights.
        classes: class names in the order of the logits.
        multi_label: whether a clip may have any number of classes.
        frontend: the front end that it was trained with.
        selected: which weights `model` has: last, best or average.
        models: all kept weights by name, as models.
        test: metrics on the test clips, or None.
        valid: metrics of the selected weights on the validation clips, or None.
        history: one row an epoch, as in metrics.jsonl.
        seconds: time spent in training steps, compilation included.
    """

    model: AST
    classes: tuple[str, ...]
    multi_label: bool
    frontend: FrontEnd
    selected: Select
    models: dict[Select, AST]
    test: metrics.Metrics | None
    valid: metrics.Metrics | None
    history: list[dict[str, Any]]
    seconds: float

    def save(
        self,
        path: str | Path,
        *,
        weights: Select | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Path:
        """Writes the adapter file: adapter, head, labels, front end, method and base.

        Args:
            path: the file.
            weights: `last`, `best` or `average`; by default the selected ones.
            extra: more JSON for the metadata.

        Raises:
            UsageError: these weights were not kept.
            WriteError: the file could not be written.
        """
        weights = weights or self.selected
        if weights not in self.models:
            raise UsageError(f"no {weights} weights were kept; there are {', '.join(self.models)}")
        figures = {"weights": weights}
        if weights == self.selected:
            figures |= {"test": _brief(self.test), "valid": _brief(self.valid)}
        return save_adapter(
            path,
            self.models[weights],
            classes=self.classes,
            multi_label=self.multi_label,
            frontend=self.frontend,
            extra=figures | (extra or {}),
        )

    def to_json(self) -> dict[str, Any]:
        """The figures of the run as a plain dictionary."""
        return {
            "selected": self.selected,
            "classes": list(self.classes),
            "seconds": self.seconds,
            "test": None if self.test is None else self.test.to_json(),
            "valid": None if self.valid is None else self.valid.to_json(),
        }


def predict_logits(
    steps: Steps, weights: Weights, frozen: Any, source: Source, frontend: FrontEnd, batch: int
) -> Float[np.ndarray, "n c"]:
    """Logits `[n, c]` of every clip of a source, in its order."""
    parts = []
    for rows in eval_batches(source, frontend, batch_size=batch):
        real = int(rows["weight"].sum())
        rows.pop("index")
        parts.append(np.asarray(steps.evaluate(*weights, frozen, rows))[:real])
    return np.concatenate(parts)


def evaluate(
    model: AST,
    source: Source,
    frontend: FrontEnd | None = None,
    *,
    batch_size: int = 64,
    bootstrap: int = 1000,
) -> metrics.Metrics:
    """Metrics of a model on labelled clips.

    Args:
        model: an AST whose head has one output a class of `source`.
        source: labelled clips.
        frontend: the front end that the model was trained with; by default AST's at its length.
        batch_size: clips a step.
        bootstrap: resamples for the intervals.

    Raises:
        UsageError: the number of classes differs.
    """
    frontend = frontend or front_end_of(model)
    _check_fit(model, [source], frontend)
    parts = surgery.split(model)
    tx = make_optimizer(Optim(), steps_per_epoch=1, epochs=1)
    steps = make_steps(parts.graphdef, tx, frontend=frontend, augment=Augment(), loss="ce")
    weights = (parts.trainable, parts.stats)
    logits = predict_logits(steps, weights, parts.frozen, source, frontend, batch_size)
    return _metrics(logits, source, bootstrap)


def _metrics(logits: np.ndarray, source: Source, bootstrap: int) -> metrics.Metrics:
    return metrics.evaluate(
        logits,
        source.targets(),
        classes=source.classes,
        multi_label=source.multi_label,
        bootstrap=bootstrap,
    )


def _check_fit(model: AST, sources: Sequence[Source], frontend: FrontEnd) -> None:
    config = model.config
    for source in sources:
        if len(source.classes) != config.num_classes:
            raise UsageError(
                f"{source.name} has {len(source.classes)} classes, the model's head "
                f"{config.num_classes}: load it with num_classes={len(source.classes)}"
            )
        if source.classes != sources[0].classes:
            raise UsageError(f"{source.name} and {sources[0].name} differ in their classes")
    if (frontend.frames, frontend.mels) != (config.frames, config.mels):
        raise UsageError(
            f"the front end makes {frontend.frames} frames of {frontend.mels} mel bins, the model "
            f"takes {config.frames} of {config.mels}: load it with frames={frontend.frames}"
        )


def fit(
    model: AST,
    train: Source,
    test: Source | None = None,
    *,
    valid: Source | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    training: Training | None = None,
    optim: Optim | None = None,
    augment: Augment | None = None,
    frontend: FrontEnd | None = None,
    run_dir: str | Path | None = None,
    show: TextStream | Literal["stderr"] | None = "stderr",
) -> Run:
    """Trains what `aatjax.adapt` marked as trainable; the frozen weights stay bit-identical.

    Args:
        model: an adapted AST; it is left as it is.
        train: training clips.
        test: clips for the figures reported at the end; they never choose anything.
        valid: validation clips, looked at after every epoch; `select="best"` chooses by them.
        epochs, lr: shorthands for `training.epochs` and `optim.lr`.
        training: length, batch, selection, seed.
        optim: AdamW and its schedule.
        augment: augmentation of the training batches.
        frontend: log-mel front end; by default AST's, at the model's length.
        run_dir: folder for checkpoints, metrics.jsonl and TensorBoard events. A run that was
            interrupted goes on from its last checkpoint when called again with the same folder.
        show: stream of the progress display, None for silence.

    Returns:
        A Run with the adapted model, its metrics and its history.

    Raises:
        UsageError: classes, lengths or options that do not fit together.
        NotFiniteError: the loss is not finite; the last finite checkpoint is kept.
        Interrupted: SIGINT or SIGTERM came; what was done is in the checkpoint.
    """
    training = training or Training()
    training = training if epochs is None else dataclasses.replace(training, epochs=epochs)
    optim = optim or Optim()
    optim = optim if lr is None else dataclasses.replace(optim, lr=lr)
    frontend = frontend or front_end_of(model)
    if training.select == "best" and valid is None:
        raise UsageError("select='best' needs validation clips: give valid=, or use select='last'")
    _check_fit(model, [s for s in (train, valid, test) if s is not None], frontend)
    loss = training.loss or ("bce" if train.multi_label else "ce")
    if loss == "ce" and train.multi_label:
        raise UsageError(f"{train.name} has several labels a clip: use loss='bce'")

    parts = surgery.split(model)
    if not jax.tree.leaves(parts.trainable):
        raise UsageError("nothing of the model is trainable: call aatjax.adapt first")
    per_epoch = batches_per_epoch(train, training.batch_size)
    tx = make_optimizer(optim, steps_per_epoch=per_epoch, epochs=training.epochs)
    steps = make_steps(
        parts.graphdef, tx, frontend=frontend, augment=augment or Augment(), loss=loss,
        average=training.average,
    )  # fmt: skip
    loop = _Loop(
        training=training,
        steps=steps,
        frozen=parts.frozen,
        rate=learning_rate(optim, steps_per_epoch=per_epoch, epochs=training.epochs),
        per_epoch=per_epoch,
        train=train,
        valid=valid,
        frontend=frontend,
        run_dir=None if run_dir is None else Path(run_dir),
        show=sys.stderr if show == "stderr" else show,
    )
    state, best = loop.run(
        init_state(parts.trainable, parts.stats, tx, average=training.average is not None)
    )

    kept: dict[Select, Weights] = {"last": (state.trainable, state.stats)}
    if best is not None:
        kept["best"] = best
    if training.average is not None:
        kept["average"] = (state.average, state.stats)
    models: dict[Select, AST] = {
        name: surgery.merge(parts.graphdef, *weights, parts.frozen)
        for name, weights in kept.items()
    }

    def measured(source: Source | None) -> metrics.Metrics | None:
        if source is None:
            return None
        weights = kept[training.select]
        logits = predict_logits(steps, weights, parts.frozen, source, frontend, loop.eval_batch)
        return _metrics(logits, source, 1000)

    return Run(
        model=models[training.select],
        classes=train.classes,
        multi_label=train.multi_label,
        frontend=frontend,
        selected=training.select,
        models=models,
        test=measured(test),
        valid=measured(valid),
        history=loop.history,
        seconds=loop.seconds,
    )


@dataclasses.dataclass
class _Loop:
    """One run of the training loop; its attributes are what the epochs share."""

    training: Training
    steps: Steps
    frozen: Any
    rate: Any
    per_epoch: int
    train: Source
    valid: Source | None
    frontend: FrontEnd
    run_dir: Path | None
    show: TextStream | None
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    best_score: float = -math.inf
    best: Weights | None = None

    @property
    def eval_batch(self) -> int:
        return self.training.eval_batch_size or 2 * self.training.batch_size

    def run(self, state: TrainState) -> tuple[TrainState, Weights | None]:
        """Trains to the end, from the last checkpoint if there is one.

        The order of resume:
        1. the newest whole checkpoint gives step, trainable, statistics, optimiser, averages,
           best weights so far, and (as JSON) the sums of the epoch in progress;
        2. metrics.jsonl is cut back to that step;
        3. the batches go on from the iterator's state, which is in the checkpoint too;
        4. every step's random key is a function of (seed, step), so it needs no state.
        """
        training = self.training
        if self.valid is not None:
            # A copy: the state's own memory is given to the first step.
            self.best = jax.tree.map(jnp.copy, (state.trainable, state.stats))
        checkpoints = None
        progress: dict[str, Any] = {"sums": {}, "seconds": 0.0, "epoch_seconds": 0.0}
        if self.run_dir is not None:
            checkpoints = Checkpoints(self.run_dir / "checkpoints")
            if checkpoints.latest is not None:
                tree, progress = checkpoints.restore({"state": state, "best": self.best})
                state, self.best = tree["state"], tree["best"]
                score = progress["best_score"]
                self.best_score = -math.inf if score is None else score
        self.seconds = progress["seconds"]
        done, total = int(state.step), self.per_epoch * training.epochs
        records = Records(self.run_dir, step=done)
        self.history = records.rows
        batches = iter(
            train_batches(
                self.train, self.frontend, batch_size=training.batch_size, epochs=training.epochs,
                seed=training.seed, crop=training.crop, threads=training.threads,
            )
        )  # fmt: skip
        if "iterator" in progress:
            batches.set_state(progress["iterator"])
        display = Display(total, done=done, stream=self.show)
        if done:
            display.say(f"going on from step {done} of {total}")
        sums, epoch_seconds = dict(progress["sums"]), progress["epoch_seconds"]
        key = jax.random.key(training.seed)
        pending: list[dict[str, jax.Array]] = []

        def save() -> None:
            if checkpoints is not None and checkpoints.latest != done:
                score = None if math.isinf(self.best_score) else self.best_score
                now = {
                    "sums": sums, "seconds": self.seconds, "epoch_seconds": epoch_seconds,
                    "best_score": score, "iterator": batches.get_state(),
                }  # fmt: skip
                checkpoints.save(done, {"state": state, "best": self.best}, now)

        try:
            with StopRequest() as stop:
                while done < total:
                    began = time.monotonic()
                    batch = next(batches)
                    batch.pop("index")
                    state, step_sums = self.steps.train(state, self.frozen, batch, key)
                    pending.append(step_sums)
                    done += 1
                    at_end = done % self.per_epoch == 0
                    if at_end or len(pending) >= CHECK_EVERY or stop.signum is not None:
                        _collect(pending, sums, done, checkpoints)
                    spent = time.monotonic() - began
                    self.seconds += spent
                    epoch_seconds += spent
                    speed = sums.get("weight", 0.0) / max(epoch_seconds, 1e-9)
                    mean = sums["loss"] / sums["weight"] if sums.get("weight") else None
                    display.step(done, (done - 1) // self.per_epoch + 1, speed, mean)
                    if at_end:
                        _check_weights(state, done, checkpoints)
                        epoch = done // self.per_epoch
                        row = self._epoch_row(state, epoch, done, sums, epoch_seconds)
                        records.add(row)
                        display.say(_sentence(row, training.epochs, display.remaining()))
                        sums, epoch_seconds = {}, 0.0
                        if epoch % training.save_every == 0 or done == total:
                            save()
                    if stop.signum is not None and done < total:
                        # The signal may have come after the look at the loss above.
                        _collect(pending, sums, done, checkpoints)
                        _check_weights(state, done, checkpoints)
                        save()
                        where = (
                            "" if checkpoints is None else "; the same command goes on from here"
                        )
                        raise Interrupted(f"stopped at step {done} of {total}{where}", stop.signum)
        finally:
            display.close()
            records.close()
            if checkpoints is not None:
                checkpoints.close()
        return state, self.best

    def _epoch_row(
        self, state: TrainState, epoch: int, done: int, sums: dict[str, float], seconds: float
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "step": done,
            "epoch": epoch,
            "train/loss": sums["loss"] / sums["weight"],
            "train/accuracy": sums["correct"] / sums["weight"],
            "train/clips_per_s": sums["weight"] / max(seconds, 1e-9),
            "train/lr": float(self.rate(done - 1)),
            "train/seconds": seconds,
        }
        if self.valid is not None:
            weights = (state.trainable, state.stats)
            logits = predict_logits(
                self.steps, weights, self.frozen, self.valid, self.frontend, self.eval_batch
            )
            result = _metrics(logits, self.valid, 0)
            name, value, _, _ = result.headline
            row[f"valid/{name}"] = value
            if value is not None and value > self.best_score:
                self.best_score = value
                self.best = jax.tree.map(jnp.copy, weights)
        return row


def _collect(
    pending: list[dict[str, jax.Array]],
    sums: dict[str, float],
    step: int,
    checkpoints: Checkpoints | None,
) -> None:
    """Adds the steps' sums to the epoch's, and stops the run at one that is not finite."""
    for index, one in enumerate(jax.device_get(pending)):
        if not math.isfinite(float(one["loss"])):
            at = step - len(pending) + index + 1
            kept = (
                ""
                if checkpoints is None
                else f"; the last finite checkpoint is {_last(checkpoints)}"
            )
            raise NotFiniteError(
                f"the loss at step {at} is {float(one['loss'])}{kept}; lower optim.lr, or set "
                "optim.clip to 1"
            )
        for name, value in one.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    pending.clear()


def _check_weights(state: TrainState, step: int, checkpoints: Checkpoints | None) -> None:
    """Stops the run at weights that are not finite: the loss would tell one step too late."""
    if not bool(_finite((state.trainable, state.stats, state.average))):
        kept = (
            "" if checkpoints is None else f"; the last finite checkpoint is {_last(checkpoints)}"
        )
        raise NotFiniteError(
            f"the weights after step {step} are not finite{kept}; lower optim.lr, or set "
            "optim.clip to 1"
        )


@jax.jit
def _finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is finite."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _last(checkpoints: Checkpoints) -> str:
    step = checkpoints.latest
    return (
        "none, as none was saved yet" if step is None else f"step {step} in {checkpoints.directory}"
    )


def _sentence(row: dict[str, Any], epochs: int, remaining: str) -> str:
    text = (
        f"epoch {row['epoch']}/{epochs}  loss {row['train/loss']:.4f}  "
        f"train accuracy {row['train/accuracy']:.3f}"
    )
    for name, value in row.items():
        if name.startswith("valid/"):
            text += f"  {name} " + ("n/a" if value is None else f"{value:.3f}")
    return f"{text}  {row['train/clips_per_s']:.0f} clips/s  {remaining} left"


def _brief(result: metrics.Metrics | None) -> dict[str, Any] | None:
    if result is None:
        return None
    name, value, low, high = result.headline
    return {"metric": name, "value": value, "low": low, "high": high, "clips": result.clips}
