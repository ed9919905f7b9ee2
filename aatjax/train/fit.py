"""`aatjax.fit`: training an adapted model, and what comes of it."""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aatjax import surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.convert.load import make_front_end
from aatjax.data.buckets import Bucket, check_buckets, sort_into_buckets
from aatjax.data.pipeline import count_batches
from aatjax.data.source import Source
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.petl.base import Method
from aatjax.train.adapter_file import save_adapter
from aatjax.train.distributed import is_main
from aatjax.train.evaluation import Weights, check_fit, measure, predict_logits
from aatjax.train.logging import TextStream
from aatjax.train.loop import Loop, Select, Training
from aatjax.train.metrics import evaluate
from aatjax.train.optim import Optim, learning_rate, make_optimizer
from aatjax.train.prefix_cache import Prefix, check_prefix, prefix_key
from aatjax.train.sharding import MeshShape, check_batch, fetch
from aatjax.train.state import start
from aatjax.train.step import make_steps


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
    test: evaluate.Metrics | None
    valid: evaluate.Metrics | None
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
    mesh: MeshShape | Mesh | None = None,
    run_dir: str | Path | None = None,
    show: TextStream | Literal["stderr"] | None = "stderr",
    beat: Callable[[str, int], None] | None = None,
    chosen_on_test: str | None = None,
    prefix_folder: Path | None = None,
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
        mesh: how the devices of all processes share the work, or a mesh of some of them with
            axes `data`, `fsdp` and `model`; by default each takes its part of the batch.
        run_dir: folder for checkpoints, metrics.jsonl and TensorBoard events. A run that was
            interrupted goes on from its last checkpoint when called again with the same folder.
        show: stream of the progress display, None for silence.
        beat: called with what the run is about to do (`input`, `step`, `eval`, `save`) and the
            steps done, for a watchdog.
        chosen_on_test: the paper whose protocol chooses weights by the test clips, where `valid`
            and `test` share clips; without it that is refused.
        prefix_folder: where `training.cache_prefix` stores tokens; None keeps them in memory.

    Returns:
        A Run with the adapted model, its metrics and its history.

    Raises:
        UsageError: classes, lengths or options that do not fit together.
        NotFiniteError: the loss is not finite; the last finite checkpoint is kept.
        InterruptedRunError: SIGINT or SIGTERM came; what was done is in the checkpoint.
    """
    training = training or Training()
    training = training if epochs is None else dataclasses.replace(training, epochs=epochs)
    optim = optim or Optim()
    optim = optim if lr is None else dataclasses.replace(optim, lr=lr)
    frontend = frontend or make_front_end(model)
    if training.select == "best" and valid is None:
        raise UsageError("select='best' needs validation clips: give valid=, or use select='last'")
    if training.select == "best" and test is not None and chosen_on_test is None:
        shared = _known(valid) & _known(test)
        if shared:
            raise UsageError(
                f"{len(shared)} clips are in valid and test, such as {min(shared)[0]!r}: "
                "select='best' would choose weights by the clips that are reported; give other "
                "validation clips, or name the paper whose protocol this is (chosen_on_test=, "
                "--protocol)"
            )
    check_fit(model, [s for s in (train, valid, test) if s is not None], frontend)
    loss = training.loss or ("bce" if train.multi_label else "ce")
    if loss == "ce" and train.multi_label:
        raise UsageError(f"{train.name} has several labels a clip: use loss='bce'")

    devices = mesh if isinstance(mesh, Mesh) else (mesh or MeshShape()).make()
    check_batch(devices, training.batch_size)

    parts = surgery.split(model)
    if not jax.tree.leaves(parts.trainable):
        raise UsageError("nothing of the model is trainable: call aatjax.adapt first")
    buckets = _buckets(model, {"train": train, "valid": valid, "test": test}, frontend, training)
    per_epoch = count_batches(train, training.batch_size, buckets.get("train", ()))
    tx = make_optimizer(optim, steps_per_epoch=per_epoch, epochs=training.epochs)
    begin = start(
        parts.trainable,
        parts.stats,
        parts.frozen,
        tx,
        devices,
        average=training.average is not None,
        dtype=model.config.dtype,
    )
    prefix = None
    if training.cache_prefix:
        longest = 0
        if training.crop == "random":
            longest = max(len(train.waveform(i)) for i in range(len(train)))
        at = check_prefix(model, augment or Augment(), training.crop, longest, frontend.samples)
        prefix = Prefix(
            parts.graphdef,
            begin.state.trainable,
            begin.state.stats,
            begin.frozen,
            frontend,
            at,
            prefix_key(model, frontend, at),
            prefix_folder,
            model.config.dtype,
            training.batch_size,
            devices,
        )
        with jax.set_mesh(devices):  # before the first step takes the state's memory
            for source in (train, valid, test):
                if source is not None:
                    prefix.of(source)
    steps = make_steps(
        parts.graphdef,
        tx,
        frontend=frontend,
        augment=augment or Augment(),
        loss=loss,
        average=training.average,
        layout=begin.layout,
        prefix=None if prefix is None else prefix.start,
    )
    loop = Loop(
        training=training,
        steps=steps,
        frozen=begin.frozen,
        mesh=devices,
        rate=learning_rate(optim, steps_per_epoch=per_epoch, epochs=training.epochs),
        per_epoch=per_epoch,
        train=train,
        valid=valid,
        frontend=frontend,
        run_dir=None if run_dir is None else Path(run_dir),
        show=(sys.stderr if show == "stderr" else show) if is_main() else None,
        prefix=prefix,
        buckets=buckets,
        monitor=model.method.monitor(model) if isinstance(model.method, Method) else None,
    )
    if beat is not None:
        loop.beat = beat
    with jax.set_mesh(devices):
        state, best = loop.run(begin.state)

    kept: dict[Select, Weights] = {"last": (state.trainable, state.stats)}
    if best is not None:
        kept["best"] = best
    if training.average is not None:
        kept["average"] = (state.average, state.stats)
    models: dict[Select, AST] = {
        name: surgery.join(
            parts.graphdef,
            jax.tree.map(jnp.asarray, fetch(weights[0])),
            jax.tree.map(jnp.asarray, fetch(weights[1])),
            parts.frozen,
        )
        for name, weights in kept.items()
    }

    def measured(name: str, source: Source | None) -> evaluate.Metrics | None:
        if source is None:
            return None
        weights = kept[training.select]

        def stopped() -> bool:
            loop.beat("eval", loop.total)
            return False

        with jax.set_mesh(devices):
            logits = predict_logits(
                steps,
                weights,
                begin.frozen,
                source,
                frontend,
                loop.eval_batch,
                devices,
                stopped,
                stored=None if prefix is None else prefix.of(source),
                buckets=buckets.get(name, ()),
            )
        assert logits is not None
        return measure(logits, source, 1000)

    return Run(
        model=models[training.select],
        classes=train.classes,
        multi_label=train.multi_label,
        frontend=frontend,
        selected=training.select,
        models=models,
        test=measured("test", test),
        valid=measured("valid", valid),
        history=loop.history,
        seconds=loop.seconds,
    )


def _buckets(
    model: AST, sources: Mapping[str, Source | None], frontend: FrontEnd, training: Training
) -> dict[str, tuple[Bucket, ...]]:
    """The clips of each source by length, where the training asks for that."""
    if not training.buckets:
        return {}
    without = "leave training.buckets out"
    if not model.config.mask_padding:
        raise UsageError(
            "training.buckets: padding is heard by this model, so that a clip without it would be "
            f"another one: load it with mask_padding (model.mask_padding), or {without}"
        )
    if training.cache_prefix:
        raise UsageError(f"training.buckets do not go with training.cache_prefix: {without}")
    for path, module in surgery.modules(model).items():
        if getattr(module, "along_tokens", False):
            raise UsageError(
                f"training.buckets: {path} convolves along the tokens, across the ends of the "
                f"patch rows, so what it hears depends on the length: {without}"
            )
    patch, stride = model.config.patch[1], model.config.stride[1]
    lengths = check_buckets(training.buckets, frontend, patch)
    return {
        name: sort_into_buckets(source, frontend, lengths, patch=patch, stride=stride)
        for name, source in sources.items()
        if source is not None
    }


def _known(source: Source | None) -> set[tuple[str, str]]:
    """The clips of a source, as id and what they are read from."""
    if source is None:
        return set()
    return {(c.id, str(source.reader.key(c) or c.path)) for c in source.clips}


def _brief(result: evaluate.Metrics | None) -> dict[str, Any] | None:
    if result is None:
        return None
    name, value, low, high = result.headline
    return {"metric": name, "value": value, "low": low, "high": high, "clips": result.clips}
