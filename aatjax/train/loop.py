"""The training loop: steps, epochs, metrics, checkpoints, and resume after an interruption."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aatjax.audio.scoring import Scoring
from aatjax.data.batches import Batches, BatchIterator
from aatjax.data.buckets import Bucket
from aatjax.data.clip_windows import ClipWindows
from aatjax.data.pipeline import ClipLoader, Crop, make_eval_batches, make_train_batches
from aatjax.data.source import Source
from aatjax.errors import (
    NotFiniteError,
    WriteError,
    format_count,
)
from aatjax.io.atomic import open_output, report_write_errors
from aatjax.io.progress import SHOWN_AFTER, StageBar, TextStream
from aatjax.io.signals import InterruptedRunError, StopRequest
from aatjax.petl.base import Monitor
from aatjax.train.checkpoint import Checkpoints
from aatjax.train.distributed import any_process, is_distributed, is_main, line_up
from aatjax.train.evaluation import Evaluator, ScoredClips, Weights
from aatjax.train.feed import Feed, LoopProgress
from aatjax.train.forward import make_inputs
from aatjax.train.log_mel_cache import LogMelCache
from aatjax.train.logging import MetricsWriter, ProgressDisplay
from aatjax.train.profiling import StepTrace
from aatjax.train.sharding import find_local_rows, put_batch
from aatjax.train.state import TrainState
from aatjax.train.step import Steps, is_finite
from aatjax.train.training import Select, Training

Callback = Callable[[int, int, Mapping[str, Any] | None, Weights], None]
CHECK_EVERY = 10  # steps between looks at the loss: more often would wait for the device
LOWER = "lower optim.lr, or set optim.clip to 1"

_is_finite = jax.jit(is_finite)


@dataclasses.dataclass
class Loop:
    """One run of the training loop, under `jax.set_mesh`; epochs share its attributes.

    Attributes:
        evaluator: computes logits; holds front end, mesh, frozen parameters and stored tokens.
        schedule: learning rate by step, if it is known.
        per_epoch: steps per epoch.
        train: windows of the training clips, or batches.
        valid: the validation clips and their windows.
        scoring: how the windows of a clip are pooled.
        crop: where training clips are cut that are still longer than the input.
        weights: of each training window in the loss; None for 1.
        buckets: lengths of the windows of each part.
        monitor: figures of the method, computed after each epoch.
        beat: called with the phase and the steps done, for a watchdog.
        begin: called with the steps that are left, after the checkpoint was read and before
            anything is written.
        on_step, on_epoch: called after each with step, epoch, the row of figures (None after a
            step) and the weights.
        done: steps done.
        ended: whether the last step ended an epoch whose row is still to be written.
        compiled: shapes of the batches that the step is compiled for, where processes line up.
        start: figures of the model before the first step, if there are any.
        trace: the steps to trace, if any.
        best: the weights with the best validation score.
        logits: logits of the validation windows of the last and the best weights, by name.
    """

    training: Training
    steps: Steps
    evaluator: Evaluator
    schedule: Any
    per_epoch: int
    train: Source | Batches
    valid: ClipWindows | None
    buckets: Mapping[str, Sequence[Bucket]]
    run_dir: Path | None
    show: TextStream | None
    scoring: Scoring = Scoring()
    crop: Crop = "start"
    weights: np.ndarray | None = None
    monitor: Monitor | None = None
    beat: Callable[[str, int], None] = lambda phase, step: None
    begin: Callable[[int], None] = lambda steps: None
    on_step: Callback | None = None
    on_epoch: Callback | None = None
    done: int = 0
    ended: bool = False
    compiled: set[tuple[tuple[int, ...], ...]] = dataclasses.field(default_factory=set)
    start: Mapping[str, Any] | None = None
    trace: StepTrace | None = None
    best: Weights | None = None
    logits: dict[Select, np.ndarray] = dataclasses.field(default_factory=dict)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    progress: LoopProgress = dataclasses.field(default_factory=LoopProgress)
    checkpoints: Checkpoints | None = None
    saved: int | None = None
    pending: list[tuple[Any, dict[str, np.ndarray]]] = dataclasses.field(default_factory=list)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        if self.progress.settled:
            return 0
        if self.training.patience is not None and self.progress.stale >= self.training.patience:
            return self.done
        return self.per_epoch * self.training.epochs

    def run(self, state: TrainState) -> tuple[TrainState, Weights | None]:
        """Train to the end, from the last checkpoint if there is one.

        The order of resume:
        1. the newest whole checkpoint gives step, trainable, statistics, optimiser, averages,
           best weights so far, and (as JSON) the sums of the epoch in progress;
        2. metrics.jsonl is cut back to that step, or to the one before where the row of an epoch
           was still to be written;
        3. the batches go on from the iterator's state, which is in the checkpoint too;
        4. every step's random key is a function of (seed, step), so it needs no state.
        """
        state = self._restore(state)
        if self.start is not None and self.training.ridge_suffices is not None:
            scores = [v for name, v in self.start.items() if name.startswith("left_out/")]
            self.progress.settled = max(scores) >= self.training.ridge_suffices
        self.begin(self.total - self.done)
        folder = self.run_dir if is_main() else None
        writer = MetricsWriter(
            folder, step=self.done - self.ended, rows=self.progress.rows, say=self._say
        )
        self.history = writer.rows
        with StageBar(quiet=self.show is None, stream=self.show, after=SHOWN_AFTER):
            feed = self._make_feed()
        key = jax.random.key(self.training.seed)
        display = ProgressDisplay(
            self.total, per_epoch=self.per_epoch, done=self.done, stream=self.show
        )
        if self.done:
            display.say(f"going on from step {self.done} of {self.total}")
        try:
            with StageBar(quiet=True), StopRequest() as stop:  # one display at a time
                self._note_start(state, stop, writer, display)
                while self.done < self.total or self.ended:
                    if not self.ended:
                        state = self._step(state, feed, key, stop)
                        epoch = (self.done - 1) // self.per_epoch + 1
                        display.step(self.done, epoch, self._speed(), self._mean_loss(), feed.shape)
                        if self.on_step is not None:
                            self.on_step(self.done, epoch, None, (state.trainable, state.stats))
                    stopping = self._agree_to_stop(stop)
                    if self.ended and not stopping:
                        stopping = not self._end_epoch(state, feed, stop, writer, display)
                    if stopping:
                        self._stop(state, feed, stop)
                if self.total == 0:
                    self._save(state, feed)
                self._write(Checkpoints.settle)
                if self._agree_to_stop(stop):  # all is saved, but what follows takes time too
                    self._stop(state, feed, stop)
        finally:
            if self.trace is not None:
                self.trace.close()
            display.close()
            writer.close()
            if self.checkpoints is not None:
                self.checkpoints.close()
        return state, self.best

    def _restore(self, state: TrainState) -> TrainState:
        if self.valid is not None:
            # A copy: the state's own memory is donated to the first step.
            self.best = jax.tree.map(jnp.copy, (state.trainable, state.stats))
        if self.run_dir is None:
            return state
        self.checkpoints = Checkpoints(self.run_dir / "checkpoints", say=self._say)
        if self.checkpoints.latest is None:
            return state
        tree, fields = self.checkpoints.restore({"state": state, "best": self.best})
        self.best, self.progress = tree["best"], LoopProgress(**fields)
        self.done = self.saved = int(tree["state"].step)
        ended = self.done > 0 and self.done % self.per_epoch == 0
        self.ended = ended and bool(self.progress.sums)
        return tree["state"]

    def _step(self, state: TrainState, feed: Feed, key: jax.Array, stop: StopRequest) -> TrainState:
        """Take one batch and start its step; the next batch is read while the devices compute."""
        began = time.monotonic()
        self.beat("input", self.done)
        batch, rows = feed.take()
        self.beat("step", self.done)
        arguments = (state, self.evaluator.frozen, batch, key)
        if is_distributed():
            self._compile(arguments)
        if self.trace is not None and is_main():
            self.trace.begin(self.done + 1)
        state, sums = self.steps.train(*arguments)
        if self.trace is not None and self.trace.end(self.done + 1, sums):
            self._say(f"trace of {self.training.profile}: {self.trace.folder}")
        self.pending.append((sums, rows))
        self.done += 1
        self.ended = self.done % self.per_epoch == 0
        if self.done < self.total:
            self.beat("input", self.done)
            feed.fetch()
            self.beat("step", self.done)
        self._write(Checkpoints.settle)
        look = self.ended or len(self.pending) >= CHECK_EVERY
        if look or (stop.signum is not None and not is_distributed()):
            self._collect()
        stop.unsaved = True
        spent = time.monotonic() - began
        self.progress.seconds += spent
        self.progress.add("all", spent)
        return state

    def _compile(self, arguments: tuple[Any, ...]) -> None:
        """Compile the step for a new length of batches; all processes then begin it together.

        Hosts with and without the program in their cache may be minutes apart.
        """
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments[2]))
        if shapes not in self.compiled:
            self.beat("compile", self.done)
            self.steps.train.lower(*arguments).compile()
            self.compiled.add(shapes)
            line_up()
            self.beat("step", self.done)

    def _agree_to_stop(self, stop: StopRequest) -> bool:
        """Return whether to stop now; where several processes run, all stop at the same step."""
        if not is_distributed():
            return stop.signum is not None
        return (self.ended or not self.pending) and any_process(stop.signum is not None)

    def _end_epoch(
        self,
        state: TrainState,
        feed: Feed,
        stop: StopRequest,
        writer: MetricsWriter,
        display: ProgressDisplay,
    ) -> bool:
        """Evaluate, write the epoch's row and a checkpoint; return False on a request to stop."""
        self._check_weights(state)
        row = self._make_row(state, stop)
        if row is None:
            return False
        writer.add(row)
        self.progress.rows += 1
        self.progress.stale = self._count_stale(row)
        display.end_epoch(_format_row(row, self.training.epochs))
        self.progress.sums, self.progress.spent, self.ended = {}, {}, False
        if self.done // self.per_epoch % self.training.save_every == 0 or self.done == self.total:
            self._save(state, feed)
        if self.on_epoch is not None:
            self.on_epoch(self.done, row["epoch"], row, (state.trainable, state.stats))
        if self.done == self.total < self.per_epoch * self.training.epochs:
            why = "all training clips are right" if self.valid is None else "no better score"
            count = format_count(self.progress.stale, "epoch")
            display.say(f"{why} for {count}: training ends (training.patience)")
        return is_distributed() or stop.signum is None

    def _count_stale(self, row: Mapping[str, Any]) -> int:
        """Return the number of epochs up to this one that gained nothing."""
        if self.valid is not None:
            gained = self.progress.best_epoch == row["epoch"]
        else:
            score = row.get("train/accuracy", row.get("train/micro_f1"))
            gained = score is None or score < 1.0
        return 0 if gained else self.progress.stale + 1

    def _note_start(
        self, state: TrainState, stop: StopRequest, writer: MetricsWriter, display: ProgressDisplay
    ) -> None:
        """Evaluate the model before the first step, where its head was fitted: epoch 0."""
        if self.start is None or self.done or any(row["step"] == 0 for row in writer.rows):
            return
        row = {"step": 0, "epoch": 0, **self.start}
        if self.valid is not None:
            weights = (state.trainable, state.stats)
            row |= self._validate(self.valid, weights, stop) or {}
        writer.add(row)
        self.progress.rows += 1
        display.say(_format_row(row, self.training.epochs))
        if self.progress.settled:
            display.say(
                f"the start suffices: at least {self.training.ridge_suffices:g} of the clips left "
                "out (training.ridge_suffices); no step is made"
            )

    def _stop(self, state: TrainState, feed: Feed, stop: StopRequest) -> None:
        self._collect()  # the signal may have come after the last look at the loss
        self._check_weights(state)
        self._save(state, feed)
        self._write(Checkpoints.settle)
        resume = "" if self.checkpoints is None else "; the same command goes on from here"
        raise InterruptedRunError(
            f"stopped at step {self.done} of {self.total}{resume}", stop.signum or 15
        )

    def _say(self, line: str) -> None:
        if self.show is not None:
            print(line, file=self.show, flush=True)

    def _make_feed(self) -> Feed:
        training, evaluator = self.training, self.evaluator
        size, rows = training.batch_size, find_local_rows(evaluator.mesh, training.batch_size)
        if isinstance(self.train, Batches):
            batches: Any = BatchIterator(self.train, evaluator.frontend, size, rows)
        else:
            batches = iter(
                make_train_batches(
                    self.train,
                    evaluator.frontend,
                    batch_size=size,
                    epochs=max(1, training.epochs),
                    seed=training.seed,
                    crop=self.crop,
                    threads=training.threads,
                    rows=rows,
                    stored=evaluator.load_stored(self.train),
                    buckets=self.buckets.get("train", ()),
                    weights=self.weights,
                    balance=training.balance,
                )
            )
        if self.progress.iterator is not None:
            batches.set_state(self.progress.iterator)
        return Feed(
            batches,
            lambda rows: put_batch(rows, evaluator.mesh, size),
            self.progress,
        )

    def _save(self, state: TrainState, feed: Feed) -> None:
        """Start a checkpoint; the arrays are copied before this returns."""
        # Never the same step twice: the first would be gone while the second is written. The row
        # of an epoch that was still to be written is computed again on the next resume.
        if self.checkpoints is None or self.saved == self.done:
            return
        self.saved = self.done
        self.beat("save", self.done)
        self.progress.iterator = feed.state
        tree, fields = {"state": state, "best": self.best}, dataclasses.asdict(self.progress)
        self._write(lambda checkpoints: checkpoints.save(self.done, tree, fields))

    def _write(self, write: Callable[[Checkpoints], None]) -> None:
        """Call something that writes checkpoints; `on_save_error` decides what a failure does."""
        if self.checkpoints is None:
            return
        try:
            write(self.checkpoints)
        except WriteError as error:
            if self.training.on_save_error == "stop":
                raise
            self._say(
                f"warning: {error}; training continues without it (training.on_save_error=continue)"
            )

    def _speed(self) -> float:
        return self.progress.sums.get("weight", 0.0) / max(self.progress.spent["all"], 1e-9)

    def _mean_loss(self) -> float | None:
        sums = self.progress.sums
        return sums["loss"] / sums["weight"] if sums.get("weight") else None

    def _make_row(self, state: TrainState, stop: StopRequest) -> dict[str, Any] | None:
        """Return the figures of an epoch, or None on a request to stop."""
        sums, spent = self.progress.sums, self.progress.spent
        clips = sums["weight"] or math.nan
        row: dict[str, Any] = {
            "step": self.done,
            "epoch": self.done // self.per_epoch,
            "train/loss": sums["loss"] / clips,
            **self._score_training(),
            "train/clips_per_s": self._speed(),
            "train/seconds": spent["all"],
            "train/seconds_input": spent.get("input", 0.0),
            "train/seconds_transfer": spent.get("transfer", 0.0),
        }
        if self.schedule is not None:
            row["train/lr"] = float(self.schedule(self.done - 1))
        if sums["skipped"]:
            row["train/skipped"] = sums["skipped"]
        weights = (state.trainable, state.stats)
        self.beat("eval", self.done)
        source = self.train if self.valid is None else self.valid.windows
        if self.monitor is not None and isinstance(source, Source):
            row |= self._monitor(self.monitor, source, weights)
        if self.valid is None:
            return row
        score = self._validate(self.valid, weights, stop)
        return None if score is None else row | score

    def _score_training(self) -> dict[str, float | None]:
        """Return the figure of the epoch's training clips: accuracy, or micro-F1 at logit 0."""
        sums = self.progress.sums
        if not self.train.multi_label:
            return {"train/accuracy": sums["correct"] / (sums["weight"] or math.nan)}
        labels = sums.get("labels")
        return {"train/micro_f1": sums["shared"] / labels if labels else None}

    def _monitor(self, monitor: Monitor, source: Source, weights: Weights) -> dict[str, float]:
        """Return the method's figures, computed on the same first batch each time."""
        frontend, mesh, size = self.evaluator.frontend, self.evaluator.mesh, self.evaluator.batch
        rows = find_local_rows(mesh, size)
        held = self.evaluator.stored
        stored = held.load(source) if isinstance(held, LogMelCache) else None
        batches = make_eval_batches(
            source, frontend, batch_size=size, threads=0, rows=rows, stored=stored
        )
        host = next(iter(batches))
        batch = put_batch({name: host[name] for name in ("audio", "length")}, mesh, size)
        x, valid = make_inputs(frontend)(batch["audio"], batch["length"])
        figures = jax.device_get(monitor(*weights, self.evaluator.frozen, x, valid))
        return {f"mixture/{name}": float(value) for name, value in figures.items()}

    def _validate(
        self, valid: ClipWindows, weights: Weights, stop: StopRequest
    ) -> dict[str, float | None] | None:
        """Return the score on the validation clips by name; keep the best weights."""

        def stopped() -> bool:
            self.beat("eval", self.done)
            return stop.signum is not None and not is_distributed()

        logits = self.evaluator.predict(
            weights, valid.windows, buckets=self.buckets.get("valid", ()), stopped=stopped
        )
        if logits is None:
            return None
        self.logits["last"] = logits
        scores = ScoredClips.from_windows(valid, logits, self.scoring)
        name, value, _, _ = scores.measure().headline
        best = self.progress.best_score
        if value is not None and (best is None or value > best):
            self.progress.best_score = value
            self.progress.best_epoch = self.done // self.per_epoch
            self.best = jax.tree.map(jnp.copy, weights)
            self.logits["best"] = logits
        return {f"valid/{name}": value}

    def _collect(self) -> None:
        """Add the pending steps to the epoch's sums; too many that are not finite end the run."""
        first = self.done - len(self.pending) + 1
        for index, sums in enumerate(jax.device_get([sums for sums, _ in self.pending])):
            step = first + index
            for name, value in sums.items():
                self.progress.sums[name] = self.progress.sums.get(name, 0.0) + float(value)
            if not sums["skipped"]:
                continue
            self.progress.skipped += 1
            saved = self._dump(self.pending[index][1], step)
            allowed = self.training.max_skipped
            if self.progress.skipped > allowed:
                many = f" ({self.progress.skipped} such steps, {allowed} are allowed)"
                raise NotFiniteError(
                    f"the loss or its gradient at step {step} is not finite"
                    f"{many if allowed else ''}{saved}{self._last_checkpoint()}; {LOWER}"
                )
            self._say(
                f"warning: step {step} was skipped: its loss or gradient is not finite{saved}"
            )
        self.pending.clear()

    def _dump(self, rows: dict[str, np.ndarray], step: int) -> str:
        """Write the batch of a step that is not finite, and say where."""
        if isinstance(self.train, Batches):
            return ""
        ids = [self.train.clips[int(i)].id for i in rows["index"]]
        if self.run_dir is None:
            return f" (its clips: {', '.join(dict.fromkeys(ids[:5]))}, ...)"
        rank = f"-process{jax.process_index()}" if is_distributed() else ""
        path = self.run_dir / f"not-finite-step{step}{rank}.npz"
        frontend = self.evaluator.frontend
        load = ClipLoader(self.train, frontend, self.crop)
        batch = load({**rows, "weight": np.ones(len(ids), np.float32)})
        arrays: dict[str, Any] = {"ids": json.dumps(ids), **batch}
        try:
            with report_write_errors(path), open_output(path) as file:
                np.savez(file, **arrays)
        except WriteError as error:
            return f" (its batch is lost: {error})"
        return f" (its batch is in {path})"

    def _check_weights(self, state: TrainState) -> None:
        """End the run at weights that are not finite: the loss shows it one step too late."""
        if not bool(_is_finite((state.trainable, state.stats, state.average))):
            raise NotFiniteError(
                f"the weights after step {self.done} are not finite{self._last_checkpoint()}; "
                f"{LOWER}"
            )

    def _last_checkpoint(self) -> str:
        if self.checkpoints is None:
            return ""
        step = self.checkpoints.latest
        where = "none" if step is None else f"step {step} in {self.checkpoints.directory}"
        return f"; the last finite checkpoint is {where}"


def _format_row(row: dict[str, Any], epochs: int) -> str:
    text = f"epoch {row['epoch']}/{epochs}"
    if "train/loss" in row:
        text += f"  loss {row['train/loss']:.4f}"
    shown = {
        **{"train/accuracy": "train accuracy", "train/micro_f1": "train micro-F1"},
        **{"left_out/accuracy": "accuracy left out", "left_out/micro_f1": "micro-F1 left out"},
    }
    for name, value in row.items():
        if name in shown or name.startswith("valid/"):
            text += f"  {shown.get(name, name)} " + ("n/a" if value is None else f"{value:.3f}")
    return f"{text}  {row['train/clips_per_s']:.0f} clips/s" if row["epoch"] else text
