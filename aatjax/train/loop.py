"""The training loop: steps, epochs, records, checkpoints, and going on after an interruption."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from aatjax.audio.frontend import FrontEnd
from aatjax.data.clips import Source
from aatjax.data.pipeline import Crop, eval_batches, train_batches
from aatjax.errors import NotFiniteError, UsageError
from aatjax.petl.base import Monitor
from aatjax.train.checkpoint import Checkpoints
from aatjax.train.evaluation import Weights, measure, predict_logits
from aatjax.train.interrupt import Interrupted, StopRequest
from aatjax.train.records import Display, Records, TextStream
from aatjax.train.state import TrainState
from aatjax.train.step import Loss, Steps

Select = Literal["last", "best", "average"]
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


@dataclasses.dataclass
class Loop:
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
    monitor: Monitor | None = None
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    best_score: float = -math.inf
    best: Weights | None = None

    @property
    def eval_batch(self) -> int:
        return self.training.eval_batch_size or 2 * self.training.batch_size

    @property
    def _looked_at(self) -> Any:
        """The clips that the method's figures are computed on: always the same first batch."""
        source = self.train if self.valid is None else self.valid
        return eval_batches(source, self.frontend, batch_size=self.eval_batch, threads=0)

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
        weights = (state.trainable, state.stats)
        if self.monitor is not None:
            batch = next(iter(self._looked_at))
            length = self.frontend.sounding(jnp.asarray(batch["length"]))
            x = self.frontend(jnp.asarray(batch["audio"]), jnp.asarray(batch["length"]))
            figures = jax.device_get(self.monitor(*weights, self.frozen, x, length))
            row |= {f"mixture/{name}": float(value) for name, value in figures.items()}
        if self.valid is not None:
            logits = predict_logits(
                self.steps, weights, self.frozen, self.valid, self.frontend, self.eval_batch
            )
            result = measure(logits, self.valid, 0)
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
