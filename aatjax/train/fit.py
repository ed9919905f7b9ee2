"""`aatjax.fit`: training of an adapted model, and its result."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from aatjax import ops, surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.audio.scoring import Scoring
from aatjax.convert.load import make_front_end
from aatjax.data.batches import Batches
from aatjax.data.clip_windows import ClipWindows, TrainWindows, cut_clips
from aatjax.data.pipeline import count_batches
from aatjax.data.sampling import compute_draw_shares
from aatjax.data.source import Source
from aatjax.data.trainable import check_classes
from aatjax.errors import UsageError, check_names
from aatjax.io.host import keep_memory
from aatjax.io.lock import lock_folder
from aatjax.io.progress import SHOWN_AFTER, StageBar, TextStream
from aatjax.io.root_logger import keep_root_logger
from aatjax.models.ast import AST, check_model
from aatjax.petl.base import Method
from aatjax.train.adapter_file import save_adapter
from aatjax.train.distributed import is_main, run_on_main
from aatjax.train.evaluation import (
    Evaluator,
    ScoredClips,
    Weights,
    check_sources,
    learn_sharpness,
)
from aatjax.train.fit_checks import (
    check_changes,
    check_inputs,
    check_parts,
    check_scoring,
    check_selection,
    check_settings,
    collect_sources,
    sort_buckets,
)
from aatjax.train.forward import split_model
from aatjax.train.head_start import start_head
from aatjax.train.input_cache import make_input_cache
from aatjax.train.logging import Show, choose_stream
from aatjax.train.loop import Loop
from aatjax.train.metrics.results import Metrics
from aatjax.train.optim import Optim, make_optimizer, make_schedule
from aatjax.train.prefix_cache import PrefixCache
from aatjax.train.profiling import FOLDER, StepTrace
from aatjax.train.rebuilt_model import explain_changes, find_changes
from aatjax.train.run_description import describe_loss, describe_updates, describe_weights
from aatjax.train.run_dir import RunClaims, check_run, has_checkpoint
from aatjax.train.sharding import MeshShape, adopt_mesh, choose_devices, fetch
from aatjax.train.state import TrainState, start_state
from aatjax.train.step import Loss, LossFunction, make_steps
from aatjax.train.training import Select, Training, parse_steps


@dataclasses.dataclass(frozen=True)
class Run:
    """Result of `fit`.

    Attributes:
        model: the adapted model with the selected weights.
        classes: class names in the order of the logits.
        multi_label: whether a clip may have any number of classes.
        frontend: the front end that it was trained with.
        selected: which weights `model` has: last, best or average.
        models: all kept weights by name, as models.
        test: metrics on the test clips, or None.
        valid: metrics of the selected weights on the validation clips, or None.
        history: one row per epoch, as in metrics.jsonl.
        seconds: time spent in training steps, compilation included.
        scoring: how the score of a clip is made of its windows.
        valid_scores, test_scores: scores of the clips by the selected weights, or None.
    """

    model: AST
    classes: tuple[str, ...]
    multi_label: bool
    frontend: FrontEnd
    selected: Select
    models: dict[Select, AST]
    test: Metrics | None
    valid: Metrics | None
    history: list[dict[str, Any]]
    seconds: float
    scoring: Scoring = Scoring()
    valid_scores: ScoredClips | None = dataclasses.field(default=None, repr=False)
    test_scores: ScoredClips | None = dataclasses.field(default=None, repr=False)

    def save(
        self,
        path: str | Path,
        *,
        weights: Select | None = None,
        extra: dict[str, Any] | None = None,
    ) -> Path:
        """Write the adapter file: adapter, head, labels, front end, method and base.

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
            figures |= {"test": _summarize(self.test), "valid": _summarize(self.valid)}
        return save_adapter(
            path,
            self.models[weights],
            classes=self.classes,
            multi_label=self.multi_label,
            frontend=self.frontend,
            scoring=self.scoring,
            extra=figures | (extra or {}),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the figures of the run as a plain dictionary."""
        return {
            "selected": self.selected,
            "classes": list(self.classes),
            "scoring": dataclasses.asdict(self.scoring),
            "seconds": self.seconds,
            "test": None if self.test is None else self.test.to_json(),
            "valid": None if self.valid is None else self.valid.to_json(),
        }


@dataclasses.dataclass(frozen=True)
class Moment:
    """What a callback of `fit` is given.

    Attributes:
        step: steps done.
        epoch: the epoch that the last step belongs to, from 1.
        row: figures of the epoch, as in metrics.jsonl; None after a step.
        model: returns the model with its present weights; it is copied to the host.
    """

    step: int
    epoch: int
    row: Mapping[str, Any] | None
    model: Callable[[], AST]


class FitSettings(TypedDict, total=False):
    """Settings of `fit`, all optional.

    Attributes:
        epochs, lr: shorthands for `training.epochs` and `optim.lr`.
        training: length, batch, selection, seed.
        optim: AdamW and its schedule, or an optax transformation, which then holds the schedule.
        loss: a function (logits `[b, c]`, targets `[b, c]`) -> losses `[b]`, in place of
            `training.loss`; a target is NaN where it is not known.
        on_step: called after each step with a `Moment`; reading its model waits for the device.
        on_epoch: called after each epoch with a `Moment`.
        augment: augmentation of the training batches.
        frontend: log-mel front end; by default AST's, at the model's length.
        windows: what training reads of a clip longer than the input: `every` window, weighted so
            that the clip counts once (the default); one input from its `start`; or one from a
            `random` place, another one in every epoch.
        scoring: how the score of a clip is made of its windows, by default their mean.
        mesh: how the devices of all processes share the work, or any mesh of some of them: weights
            are split over its axis `fsdp`, heads over `model`, the clips over all other axes and
            `fsdp`; by default each device takes its part of the batch.
    """

    epochs: int | None
    lr: float | None
    training: Training | None
    optim: Optim | optax.GradientTransformation | None
    loss: LossFunction | None
    on_step: Callable[[Moment], None] | None
    on_epoch: Callable[[Moment], None] | None
    augment: Augment | None
    frontend: FrontEnd | None
    windows: TrainWindows | None
    scoring: Scoring | None
    mesh: MeshShape | Mesh | None


@dataclasses.dataclass(frozen=True)
class FitContext:
    """What an experiment adds to `fit`.

    Attributes:
        beat: called with what the run is about to do (`input`, `step`, `eval`, `save`) and the
            steps done, for a watchdog.
        chosen_on_test: the paper whose protocol chooses weights by the test clips, where the
            validation and test parts share clips; without it that is refused.
        holds_lock: whether the run folder is locked already.
        claims: what else is to be written to the run folder once every check has passed.
        begin: called after that, before the first step.
        prefix_folder: where `training.cache_prefix` stores tokens; None keeps them in memory.
    """

    beat: Callable[[str, int], None] = lambda phase, step: None
    chosen_on_test: str | None = None
    prefix_folder: Path | None = None
    holds_lock: bool = False
    claims: RunClaims | None = None
    begin: Callable[[], None] = lambda: None


def fit(
    model: AST,
    train: Source | Batches,
    test: Source | None = None,
    *,
    valid: Source | None = None,
    run_dir: str | Path | None = None,
    allow_change: Sequence[str] = (),
    show: Show = "stderr",
    context: FitContext | None = None,
    **settings: Unpack[FitSettings],
) -> Run:
    """Train what `aatjax.adapt` marked as trainable; the frozen weights stay bit-identical.

    Args:
        model: an adapted AST; it is not changed.
        train: training clips: files, arrays in memory (`data.Arrays`), or batches that you make
            (`data.Batches`).
        test: clips for the figures reported at the end; they never choose anything.
        valid: validation clips, evaluated after every epoch; `select="best"` chooses by them.
        run_dir: folder for checkpoints, metrics.jsonl and TensorBoard events. A run that was
            interrupted goes on from its last checkpoint when called again with the same folder;
            with other settings, clips or weights it is refused, and the folder stays as it is.
        allow_change: what may differ from the run in the folder: settings by name, such as
            `optim.lr`, whole parts, such as `optim`, or `clips`. A finished run goes on with more
            epochs, where its learning rate does not depend on them; without, only its test clips
            may change, whose figures are made again.
        show: stream of the progress display; True for standard error, None or False for silence.
        context: what an experiment adds.
        **settings: see `FitSettings`; for instance `epochs=20, lr=1e-3`.

    Returns:
        A Run with the adapted model, its metrics and its history.

    Raises:
        UsageError: classes, lengths or options that do not fit together; the folder holds another
            run, or is in use.
        NotFiniteError: the loss is not finite; the last finite checkpoint is kept.
        InterruptedRunError: SIGINT or SIGTERM came; what was done is in the checkpoint.
    """
    keep_memory()
    check_model(model, "fit")
    sources = collect_sources(train, valid, test)
    valid, test = sources.get("valid"), sources.get("test")
    if isinstance(train, Source):
        check_classes(train)
    check_names("fit: allow_change", allow_change)
    context = context or FitContext()
    setup = _resolve(model, train, settings)
    check_selection(setup.training, valid, test, context.chosen_on_test)
    check_scoring(setup.scoring, valid)
    check_sources(model, [train, *sources.values()], setup.frontend)
    check_parts(setup.mesh, setup.training)
    folder = None if run_dir is None else Path(run_dir)
    trace = _make_trace(setup.training, folder)
    with contextlib.ExitStack() as held:
        held.enter_context(keep_root_logger())
        claims: RunClaims | None = None
        if folder is not None:
            if not context.holds_lock:
                run_on_main(lambda: held.enter_context(lock_folder(folder)))
            claims = context.claims or RunClaims(folder, allow_change)
            fields = _describe(model, train, setup)
            if context.claims is None:
                check_changes(allow_change, fields)
            run_on_main(lambda: check_run(claims, sources, fields))
        screen = choose_stream(show)
        held.enter_context(
            ops.choosing_kernels(
                setup.training.kernels or ("tpu" if setup.training.deterministic else None),
                backward=True,
                say=lambda line: None if screen is None else print(line, file=screen, flush=True),
            )
        )
        loop, state, cuts = _prepare(model, train, sources, setup, context, folder, screen)
        loop.trace = trace
        loop.begin = lambda left: _begin(claims, left, context)
        held.enter_context(jax.set_mesh(setup.mesh))
        state, best = loop.run(state)
        with StageBar(quiet=loop.show is None, stream=loop.show, after=SHOWN_AFTER):
            return _finish(model, loop, state, best, cuts)


def _begin(claims: RunClaims | None, steps_left: int, context: FitContext) -> None:
    """Write what the run is made of, now that everything agrees."""
    if claims is not None:
        run_on_main(lambda: claims.write(steps_left))
    context.begin()


@dataclasses.dataclass(frozen=True)
class _Setup:
    """The settings of `fit` with their defaults filled in."""

    training: Training
    optim: Optim | optax.GradientTransformation
    augment: Augment
    frontend: FrontEnd
    windows: TrainWindows
    scoring: Scoring
    mesh: Mesh
    loss: Loss | LossFunction
    on_step: Callable[[Moment], None] | None
    on_epoch: Callable[[Moment], None] | None


def _describe(model: AST, train: Source | Batches, setup: _Setup) -> dict[str, Any]:
    """Return the settings and the model of a run as JSON, and its batches if it has no clips."""
    optim, loss, method = setup.optim, setup.loss, model.method
    return {
        "training": dataclasses.asdict(setup.training),
        "optim": dataclasses.asdict(optim)
        if isinstance(optim, Optim)
        else {"updates": describe_updates(optim, model)},
        "loss": loss if isinstance(loss, str) else {"values": describe_loss(loss)},
        "augment": dataclasses.asdict(setup.augment),
        "frontend": setup.frontend.to_dict(),
        "windows": setup.windows,
        "scoring": dataclasses.asdict(setup.scoring),
        "petl": method.to_json() if isinstance(method, Method) else None,
        "model": model.config.without_execution().to_json(),
        "weights": describe_weights(model),
        **({"batches": train.describe()} if isinstance(train, Batches) else {}),
    }


def _resolve(model: AST, train: Source | Batches, settings: FitSettings) -> _Setup:
    check_settings(settings, list(FitSettings.__annotations__))
    training = settings.get("training") or Training()
    if (epochs := settings.get("epochs")) is not None:
        training = dataclasses.replace(training, epochs=epochs)
    if isinstance(model.method, Method) and model.method.closed_form:
        training = dataclasses.replace(training, epochs=0, head_init="ridge")
    optim = settings.get("optim") or Optim()
    if isinstance(optim, optax.MultiSteps):
        optim = optim.gradient_transformation()
    if (lr := settings.get("lr")) is not None:
        if not isinstance(optim, Optim):
            raise UsageError("fit: lr does not apply to a transformation of your own: omit it")
        optim = dataclasses.replace(optim, lr=lr)
    if isinstance(optim, Optim) and optim.lr is None:
        method = model.method
        rate = method.choose_rate(model.config.dim) if isinstance(method, Method) else None
        optim = dataclasses.replace(optim, lr=rate)
    loss = settings.get("loss") or training.loss or ("bce" if train.multi_label else "ce")
    if loss == "ce" and train.multi_label:
        raise UsageError(f"{train.name} has several labels per clip: use training.loss='bce'")
    mesh = settings.get("mesh") or MeshShape()
    if isinstance(mesh, Mesh):
        mesh = adopt_mesh(mesh)
    else:
        devices = jax.devices()
        if mesh == MeshShape():
            weights = surgery.count_bytes(model)
            devices = choose_devices(training.batch_size // training.accumulate, weights, devices)
        mesh = mesh.make(devices)
    return _Setup(
        training,
        optim,
        settings.get("augment") or Augment(),
        settings.get("frontend") or make_front_end(model),
        settings.get("windows") or "every",
        settings.get("scoring") or Scoring(),
        mesh,
        loss,
        settings.get("on_step"),
        settings.get("on_epoch"),
    )


def _prepare(
    model: AST,
    train: Source | Batches,
    sources: Mapping[str, Source],
    setup: _Setup,
    context: FitContext,
    run_dir: Path | None,
    screen: TextStream | None,
) -> tuple[Loop, TrainState, dict[str, ClipWindows]]:
    """Return the training loop, the state before the first step on the devices, and the windows."""
    training = setup.training
    if not surgery.arrays(model, nnx.Param):
        raise UsageError("nothing of the model is trainable: call aatjax.adapt first")
    if isinstance(model.method, Method) and (
        changes := find_changes(model, model.config.without_execution(), model.method)
    ):
        warnings.warn(explain_changes(changes, model.method), stacklevel=3)
    check_inputs(train, sources, setup.training, setup.augment)
    cuts = {
        name: cut_clips(source, setup.frontend, setup.scoring, train=name == "train")
        for name, source in sources.items()
        if name != "train" or setup.windows == "every"
    }
    start: dict[str, Any] | None = None
    if isinstance(train, Source) and not (run_dir is not None and has_checkpoint(run_dir)):
        with StageBar(quiet=screen is None, stream=screen, after=SHOWN_AFTER):
            model, start = _start_head(model, train, cuts.get("train"), setup)
    parts = split_model(model)
    weights = None
    if isinstance(train, Source) and "train" in cuts:
        weights = cuts["train"].compute_weights() if len(cuts["train"].owner) > len(train) else None
        train = cuts["train"].windows
    if training.balance == "loss" and isinstance(train, Source):
        weights = len(train) * compute_draw_shares(train, weights)
    windows = {name: cut.windows for name, cut in cuts.items()}
    if isinstance(train, Source):
        windows["train"] = train
    crop = "random" if setup.windows == "random" else "start"
    buckets = sort_buckets(model, windows, setup.frontend, training)
    if isinstance(train, Batches):
        per_epoch = train.length
    else:
        per_epoch = count_batches(train, training.batch_size, buckets.get("train", ()))
    steps_of_run = {"steps_per_epoch": per_epoch, "epochs": training.epochs}
    optim, schedule = setup.optim, None
    if isinstance(optim, Optim):
        tx = make_optimizer(optim, **steps_of_run)
        schedule = make_schedule(optim, **steps_of_run)
    else:
        tx = optim
    average = training.average is not None
    begin = start_state(parts, tx, setup.mesh, average=average, dtype=model.config.dtype)
    cache = None
    if not buckets and not isinstance(train, Batches):
        cache = make_input_cache(
            model,
            windows,
            training,
            augment=setup.augment,
            frontend=setup.frontend,
            crop=crop,
            mesh=setup.mesh,
            graphdef=parts.graphdef,
            state=(begin.state.trainable, begin.state.stats, begin.frozen),
            folder=context.prefix_folder,
        )
    steps = make_steps(
        parts.graphdef,
        tx,
        frontend=setup.frontend,
        augment=setup.augment,
        loss=setup.loss,
        average=training.average,
        layout=begin.layout,
        start=cache.start if isinstance(cache, PrefixCache) else None,
        accumulate=training.accumulate,
        focal=training.focal,
        smoothing=training.label_smoothing,
        deterministic=training.deterministic,
    )
    size = training.eval_batch_size or 2 * training.batch_size
    loop = Loop(
        training=training,
        steps=steps,
        evaluator=Evaluator(steps.forward, begin.frozen, setup.frontend, setup.mesh, size, cache),
        schedule=schedule,
        per_epoch=per_epoch,
        train=train,
        valid=cuts.get("valid"),
        buckets=buckets,
        run_dir=run_dir,
        show=screen if is_main() else None,
        scoring=setup.scoring,
        crop=crop,
        weights=weights,
        monitor=model.method.monitor(model) if isinstance(model.method, Method) else None,
        start=start,
        beat=context.beat,
        on_step=_make_callback(model, setup.on_step),
        on_epoch=_make_callback(model, setup.on_epoch),
    )
    return loop, begin.state, cuts


def _make_trace(training: Training, folder: Path | None) -> StepTrace | None:
    """Return the trace that `training.profile` asks for."""
    if training.profile is None:
        return None
    if folder is None:
        raise UsageError("training.profile writes a trace: give a run folder, run_dir=")
    return StepTrace(folder / FOLDER, *parse_steps(training.profile))


def _start_head(
    model: AST, train: Source, cut: ClipWindows | None, setup: _Setup
) -> tuple[AST, dict[str, Any] | None]:
    """Return the model with its head as `training.head_init` says, and figures of a fitted one."""
    training = setup.training
    if training.head_init == "zeros":
        started = surgery.clone(model)
        head = surgery.arrays(model.head.linear)
        zeros = {f"head/linear/{path}": jnp.zeros_like(value) for path, value in head.items()}
        surgery.assign(started, zeros, what="a head of zeros")
        return started, None
    if training.head_init != "ridge":
        return model, None
    with jax.set_mesh(setup.mesh):
        return start_head(
            model,
            cut or cut_clips(train, setup.frontend, setup.scoring, train=True),
            setup.frontend,
            setup.mesh,
            batch_size=training.eval_batch_size or 2 * training.batch_size,
            balance=training.balance != "none",
        )


def _make_callback(
    model: AST, function: Callable[[Moment], None] | None
) -> Callable[[int, int, Mapping[str, Any] | None, Weights], None] | None:
    """Return the function that the loop calls with step, epoch, row and weights."""
    if function is None:
        return None

    def call(step: int, epoch: int, row: Mapping[str, Any] | None, weights: Weights) -> None:
        function(Moment(step, epoch, row, lambda: _build(model, weights)))

    return call


def _build(model: AST, weights: Weights) -> AST:
    """Return the model with these weights, on the default device, in evaluation mode."""
    parts = surgery.split(model)
    trainable, stats = jax.tree.map(jnp.asarray, fetch(weights))
    built = surgery.join(parts.graphdef, trainable, stats, parts.frozen)
    built.eval()
    return built


def _finish(
    model: AST,
    loop: Loop,
    state: TrainState,
    best: Weights | None,
    cuts: Mapping[str, ClipWindows],
) -> Run:
    """Build the models of all kept weights; evaluate the selected ones."""
    selected, train = loop.training.select, loop.train
    kept: dict[Select, Weights] = {"last": (state.trainable, state.stats)}
    if best is not None:
        kept["best"] = best
    if state.average is not None:
        kept["average"] = (state.average, state.stats)

    def beat() -> bool:
        loop.beat("eval", loop.total)
        return False

    def predict(name: str) -> np.ndarray | None:
        if name not in cuts:
            return None
        if name == "valid" and selected in loop.logits:
            return loop.logits[selected]
        return loop.evaluator.predict(
            kept[selected], cuts[name].windows, buckets=loop.buckets.get(name, ()), stopped=beat
        )

    models: dict[Select, AST] = {name: _build(model, kept[name]) for name in kept}
    logits = {name: predict(name) for name in ("test", "valid")}
    scoring, scores, metrics = loop.scoring, {}, {}
    if scoring.pooling == "attention" and logits["valid"] is not None:
        scoring = learn_sharpness(cuts["valid"], logits["valid"], scoring)
    for name, found in logits.items():
        if found is not None:
            scores[name] = ScoredClips.from_windows(cuts[name], found, scoring)
            metrics[name] = scores[name].measure()
    return Run(
        model=models[selected],
        classes=train.classes,
        multi_label=train.multi_label,
        frontend=loop.evaluator.frontend,
        selected=selected,
        models=models,
        test=metrics.get("test"),
        valid=metrics.get("valid"),
        history=loop.history,
        seconds=loop.progress.seconds,
        scoring=scoring,
        valid_scores=scores.get("valid"),
        test_scores=scores.get("test"),
    )


def _summarize(result: Metrics | None) -> dict[str, Any] | None:
    if result is None:
        return None
    name, value, low, high = result.headline
    counts = {"clips": result.clips, "groups": result.groups}
    return {"metric": name, "value": value, "low": low, "high": high, **counts}
