"""The training loop: steps, epochs, records, checkpoints, and going on after an interruption."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aatjax.audio.frontend import FrontEnd
from aatjax.data.buckets import Bucket
from aatjax.data.pipeline import ClipLoader, Crop, make_eval_batches, make_train_batches
from aatjax.data.source import Source
from aatjax.errors import NotFiniteError, UsageError, WriteError
from aatjax.io.signals import InterruptedRunError, StopRequest
from aatjax.petl.base import Monitor
from aatjax.train.checkpoint import Checkpoints
from aatjax.train.distributed import any_of, is_main, several
from aatjax.train.evaluation import Weights, evaluation_batch, measure, predict_logits
from aatjax.train.logging import Display, Records, TextStream
from aatjax.train.prefix_cache import Prefix
from aatjax.train.sharding import local_rows, put_batch
from aatjax.train.state import TrainState
from aatjax.train.step import Loss, Steps, finite

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
        max_skipped: steps whose loss or gradient is not finite that are put up with in a run: such
            a step changes nothing, and its batch is written to the run folder. One more stops.
        cache_prefix: compute once what lies below the first trained block, store it in `data.cache`
            and train from there; refused where augmentation or an early adapter forbids it.
        buckets: lengths in frames below the model's: a batch holds clips of one of them, so that
            padding is not computed (`aatjax.data.buckets`); with `model.mask_padding` only.
        on_save_error: whether a checkpoint that cannot be written ends the run (`stop`).
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
    max_skipped: int = 0
    cache_prefix: bool = False
    buckets: tuple[int, ...] = ()
    on_save_error: Literal["stop", "continue"] = "stop"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_batch_size", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} must be at least 1")
        if self.threads < 0:
            raise UsageError(f"threads={self.threads} must be 0 (read in the main thread) or more")
        if self.max_skipped < 0:
            raise UsageError(f"max_skipped={self.max_skipped} must be 0 or more")
        if self.on_save_error not in ("stop", "continue"):
            raise UsageError(f"on_save_error={self.on_save_error!r} is not one of stop, continue")
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
class Progress:
    """What a checkpoint holds beside the arrays, as JSON.

    Attributes:
        sums: the sums of the epoch in progress.
        seconds: time in training steps, of the whole run.
        spent: the same of the epoch: in all, waiting for input, and bringing it to the device.
        skipped: steps of the whole run whose loss or gradient was not finite.
        best_score: validation score of the best weights so far.
        iterator: state of the iterator over the batches.
    """

    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    spent: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    best_score: float | None = None
    iterator: dict[str, Any] | None = None

    def add(self, name: str, seconds: float) -> None:
        """Counts time of the epoch."""
        self.spent[name] = self.spent.get(name, 0.0) + seconds


class Feed:
    """Batches on the devices, one ahead: read and sent while the devices compute.

    `state` is the iterator's state after the batch that was handed out last, which is not that of
    the iterator itself.
    """

    def __init__(
        self, batches: Any, put: Callable[[dict[str, np.ndarray]], Any], progress: Progress
    ) -> None:
        self._batches, self._put, self._progress = batches, put, progress
        self._ahead: tuple[Any, dict[str, np.ndarray], Any] | None = None
        self.state = batches.get_state()

    def fetch(self) -> None:
        """Reads the next batch and starts sending it, if that was not done."""
        if self._ahead is not None:
            return
        began = time.monotonic()
        host = next(self._batches)
        read = time.monotonic()
        rows = {name: host.pop(name) for name in ("index", "draw")}
        batch = self._put(host)
        self._progress.add("input", read - began)
        self._progress.add("transfer", time.monotonic() - read)
        self._ahead = (batch, rows, self._batches.get_state())

    def take(self) -> tuple[Any, dict[str, np.ndarray]]:
        """The next batch on the devices, and which clips its rows are."""
        self.fetch()
        assert self._ahead is not None
        batch, rows, self.state = self._ahead
        self._ahead = None
        return batch, rows


@dataclasses.dataclass
class Loop:
    """One run of the training loop; its attributes are what the epochs share.

    It is run under `jax.set_mesh(mesh)`.
    """

    training: Training
    steps: Steps
    frozen: Any
    mesh: Mesh
    rate: Any
    per_epoch: int
    train: Source
    valid: Source | None
    frontend: FrontEnd
    run_dir: Path | None
    show: TextStream | None
    monitor: Monitor | None = None
    beat: Callable[[str, int], None] = lambda phase, step: None
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best: Weights | None = None
    progress: Progress = dataclasses.field(default_factory=Progress)
    checkpoints: Checkpoints | None = None
    saved: int | None = None
    prefix: Prefix | None = None
    buckets: Mapping[str, Sequence[Bucket]] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.progress.seconds

    @property
    def total(self) -> int:
        return self.per_epoch * self.training.epochs

    @property
    def eval_batch(self) -> int:
        wanted = self.training.eval_batch_size or 2 * self.training.batch_size
        return evaluation_batch(wanted, self.mesh)

    def run(self, state: TrainState) -> tuple[TrainState, Weights | None]:
        """Trains to the end, from the last checkpoint if there is one.

        The order of resume:
        1. the newest whole checkpoint gives step, trainable, statistics, optimiser, averages,
           best weights so far, and (as JSON) the sums of the epoch in progress;
        2. metrics.jsonl is cut back to that step, or to the one before where the figures of an
           epoch were still to be taken;
        3. the batches go on from the iterator's state, which is in the checkpoint too;
        4. every step's random key is a function of (seed, step), so it needs no state.
        """
        training = self.training
        if self.valid is not None:
            # A copy: the state's own memory is given to the first step.
            self.best = jax.tree.map(jnp.copy, (state.trainable, state.stats))
        if self.run_dir is not None:
            self.checkpoints = Checkpoints(self.run_dir / "checkpoints", say=self._say)
            if self.checkpoints.latest is not None:
                tree, told = self.checkpoints.restore({"state": state, "best": self.best})
                state, self.best = tree["state"], tree["best"]
                self.progress = Progress(**told)
                self.saved = int(state.step)
        done = int(state.step)
        ended = done > 0 and done % self.per_epoch == 0 and bool(self.progress.sums)
        records = Records(self.run_dir if is_main() else None, step=done - ended)
        self.history = records.rows
        feed = self._feed()
        display = Display(self.total, done=done, stream=self.show)
        if done:
            display.say(f"going on from step {done} of {self.total}")
        key = jax.random.key(training.seed)
        pending: list[tuple[dict[str, jax.Array], dict[str, np.ndarray]]] = []
        try:
            with StopRequest() as stop:
                while done < self.total or ended:
                    if not ended:
                        began = time.monotonic()
                        self.beat("input", done)
                        batch, rows = feed.take()
                        self.beat("step", done)
                        state, sums = self.steps.train(state, self.frozen, batch, key)
                        pending.append((sums, rows))
                        done += 1
                        ended = done % self.per_epoch == 0
                        if done < self.total:
                            self.beat("input", done)
                            feed.fetch()  # while the devices compute
                            self.beat("step", done)
                        if self.checkpoints is not None:
                            self.checkpoints.settle()
                        look = ended or len(pending) >= CHECK_EVERY
                        if look or (stop.signum is not None and not several()):
                            self._collect(pending, done)
                        stop.unsaved = True
                        spent = time.monotonic() - began
                        self.progress.seconds += spent
                        self.progress.add("all", spent)
                        epoch = (done - 1) // self.per_epoch + 1
                        display.step(done, epoch, self._speed(), self._mean_loss())
                    # Where several processes run, all must stop at the same step.
                    stopping = stop.signum is not None
                    if several() and (ended or not pending):
                        stopping = any_of(stopping)
                    elif several():
                        stopping = False
                    if ended and not stopping:
                        _check_weights(state, done, self.checkpoints)
                        row = self._epoch_row(state, done, stop)
                        stopping = row is None
                        if row is not None:
                            records.add(row)
                            display.say(_sentence(row, training.epochs, display.remaining()))
                            self.progress.sums, self.progress.spent, ended = {}, {}, False
                            epoch = done // self.per_epoch
                            if epoch % training.save_every == 0 or done == self.total:
                                self._save(state, done, feed)
                            stopping = not several() and stop.signum is not None
                    if stopping and (done < self.total or ended):
                        # The signal may have come after the look at the loss above.
                        self._collect(pending, done)
                        _check_weights(state, done, self.checkpoints)
                        self._save(state, done, feed)
                        self._settle()
                        where = (
                            ""
                            if self.checkpoints is None
                            else "; the same command goes on from here"
                        )
                        signum = stop.signum or 15
                        raise InterruptedRunError(
                            f"stopped at step {done} of {self.total}{where}", signum
                        )
                self._settle()
        finally:
            display.close()
            records.close()
            if self.checkpoints is not None:
                self.checkpoints.close()
        return state, self.best

    def _say(self, line: str) -> None:
        if self.show is not None:
            print(line, file=self.show, flush=True)

    def _feed(self) -> Feed:
        training = self.training
        batches = iter(
            make_train_batches(
                self.train,
                self.frontend,
                batch_size=training.batch_size,
                epochs=training.epochs,
                seed=training.seed,
                crop=training.crop,
                threads=training.threads,
                rows=local_rows(self.mesh, training.batch_size),
                stored=None if self.prefix is None else self.prefix.of(self.train),
                buckets=self.buckets.get("train", ()),
            )
        )
        if self.progress.iterator is not None:
            batches.set_state(self.progress.iterator)
        return Feed(
            batches, lambda rows: put_batch(rows, self.mesh, training.batch_size), self.progress
        )

    def _save(self, state: TrainState, done: int, feed: Feed) -> None:
        """Starts a checkpoint; the arrays are copied before this returns."""
        # Never the same step twice: the one that is there would be gone while its like is written.
        # Figures of an epoch that were still to be taken are taken again on the next resume.
        if self.checkpoints is None or self.saved == done:
            return
        self.saved = done
        self.beat("save", done)
        self.progress.iterator = feed.state
        tree = {"state": state, "best": self.best}
        self._written(lambda c: c.save(done, tree, dataclasses.asdict(self.progress)))

    def _settle(self) -> None:
        self._written(lambda checkpoints: checkpoints.settle())

    def _written(self, write: Callable[[Checkpoints], None]) -> None:
        """Calls something that writes checkpoints; what a failure does is the user's choice."""
        if self.checkpoints is None:
            return
        try:
            write(self.checkpoints)
        except WriteError as error:
            if self.training.on_save_error == "stop":
                raise
            self._say(f"warning: {error}; training goes on without it (on_save_error=continue)")

    def _speed(self) -> float:
        return self.progress.sums.get("weight", 0.0) / max(self.progress.spent["all"], 1e-9)

    def _mean_loss(self) -> float | None:
        sums = self.progress.sums
        return sums["loss"] / sums["weight"] if sums.get("weight") else None

    def _epoch_row(self, state: TrainState, done: int, stop: StopRequest) -> dict[str, Any] | None:
        """The figures of an epoch; None where a request to stop came in between."""
        sums, spent = self.progress.sums, self.progress.spent
        counted = sums["weight"] or math.nan
        row: dict[str, Any] = {
            "step": done,
            "epoch": done // self.per_epoch,
            "train/loss": sums["loss"] / counted,
            "train/accuracy": sums["correct"] / counted,
            "train/clips_per_s": sums["weight"] / max(spent["all"], 1e-9),
            "train/lr": float(self.rate(done - 1)),
            "train/seconds": spent["all"],
            "train/seconds_input": spent.get("input", 0.0),
            "train/seconds_transfer": spent.get("transfer", 0.0),
        }
        if sums["skipped"]:
            row["train/skipped"] = sums["skipped"]
        weights = (state.trainable, state.stats)
        self.beat("eval", done)
        if self.monitor is not None:
            # The method's figures are computed on the same first batch each time.
            source = self.train if self.valid is None else self.valid
            size = self.eval_batch
            batches = make_eval_batches(
                source, self.frontend, batch_size=size, threads=0, rows=local_rows(self.mesh, size)
            )
            host = next(iter(batches))
            batch = put_batch({n: host[n] for n in ("audio", "length")}, self.mesh, size)
            x = self.frontend(batch["audio"], batch["length"])
            length = self.frontend.count_frames(batch["length"])
            figures = jax.device_get(self.monitor(*weights, self.frozen, x, length))
            row |= {f"mixture/{name}": float(value) for name, value in figures.items()}
        if self.valid is not None:

            def stopped() -> bool:
                self.beat("eval", done)
                return stop.signum is not None and not several()

            logits = predict_logits(
                self.steps,
                weights,
                self.frozen,
                self.valid,
                self.frontend,
                self.eval_batch,
                self.mesh,
                stopped,
                None if self.prefix is None else self.prefix.of(self.valid),
                self.buckets.get("valid", ()),
            )
            if logits is None:
                return None
            result = measure(logits, self.valid, 0)
            name, value, _, _ = result.headline
            row[f"valid/{name}"] = value
            best = self.progress.best_score
            if value is not None and (best is None or value > best):
                self.progress.best_score = value
                self.best = jax.tree.map(jnp.copy, weights)
        return row

    def _collect(
        self, pending: list[tuple[dict[str, jax.Array], dict[str, np.ndarray]]], step: int
    ) -> None:
        """Adds the steps' sums to the epoch's; too many that were not finite stop the run."""
        for index, one in enumerate(jax.device_get([sums for sums, _ in pending])):
            at = step - len(pending) + index + 1
            for name, value in one.items():
                self.progress.sums[name] = self.progress.sums.get(name, 0.0) + float(value)
            if not one["skipped"]:
                continue
            self.progress.skipped += 1
            dumped = self._dump(pending[index][1], at)
            if self.progress.skipped > self.training.max_skipped:
                kept = ""
                if self.checkpoints is not None:
                    kept = f"; the last finite checkpoint is {_last(self.checkpoints)}"
                many = ""
                if self.training.max_skipped:
                    many = f" ({self.progress.skipped} such steps, {self.training.max_skipped} "
                    many += "are put up with)"
                raise NotFiniteError(
                    f"the loss or its gradient at step {at} is not finite{many}{dumped}{kept}; "
                    "lower optim.lr, or set optim.clip to 1"
                )
            self._say(f"warning: step {at} was skipped: its loss or gradient is not finite{dumped}")
        pending.clear()

    def _dump(self, rows: dict[str, np.ndarray], step: int) -> str:
        """Writes the batch of a step that was not finite, and says where."""
        ids = [self.train.clips[int(i)].id for i in rows["index"]]
        if self.run_dir is None:
            return f" (its clips: {', '.join(dict.fromkeys(ids[:5]))}, ...)"
        rank = f"-process{jax.process_index()}" if several() else ""
        path = self.run_dir / f"not-finite-step{step}{rank}.npz"
        load = ClipLoader(self.train, self.train.targets(), self.frontend, self.training.crop)
        batch = load({**rows, "weight": np.ones(len(ids), np.float32)})
        try:
            with path.open("wb") as file:
                arrays: dict[str, Any] = {"ids": json.dumps(ids), **batch}
                np.savez(file, **arrays)
        except OSError as error:
            return f" (its batch could not be written: {error.strerror or error})"
        return f" (its batch is in {path})"


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


_finite = jax.jit(finite)


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
