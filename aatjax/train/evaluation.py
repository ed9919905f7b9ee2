"""Evaluating a model on labelled clips."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from aatjax import surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.convert.load import make_front_end
from aatjax.data.buckets import Bucket
from aatjax.data.pipeline import StoredTokens, make_eval_batches
from aatjax.data.source import Source
from aatjax.errors import UsageError
from aatjax.models.ast import AST
from aatjax.train.metrics import evaluate as metrics
from aatjax.train.optim import Optim, make_optimizer
from aatjax.train.sharding import MeshShape, batch_shards, fetch, local_rows, put_batch
from aatjax.train.state import start
from aatjax.train.step import Steps, make_steps

Weights = tuple[Any, Any]


def evaluation_batch(wanted: int, mesh: Mesh) -> int:
    """The next multiple of the devices: batches of evaluation are padded anyway."""
    shards = batch_shards(mesh)
    return -(-wanted // shards) * shards


def predict_logits(
    steps: Steps,
    weights: Weights,
    frozen: Any,
    source: Source,
    frontend: FrontEnd,
    batch: int,
    mesh: Mesh,
    stopped: Callable[[], bool] = lambda: False,
    stored: StoredTokens | None = None,
    buckets: Sequence[Bucket] = (),
) -> Float[np.ndarray, "n c"] | None:
    """Logits `[n, c]` of every clip of a source, in its order; None once `stopped()`."""
    if buckets:
        logits = np.zeros((len(source), len(source.classes)), np.float32)
        for bucket in buckets:
            clips = source.subset(bucket.rows)
            found = predict_logits(
                steps, weights, frozen, clips, bucket.frontend, batch, mesh, stopped
            )
            if found is None:
                return None
            logits[bucket.rows] = found
        return logits
    parts: list[np.ndarray] = []
    waiting: jax.Array | None = None
    rows_here = local_rows(mesh, batch)
    for host in make_eval_batches(
        source, frontend, batch_size=batch, rows=rows_here, stored=stored
    ):
        if stopped():
            return None
        rows = {name: host[name] for name in ("audio", "length", "target", "weight")}
        found = steps.evaluate(*weights, frozen, put_batch(rows, mesh, batch))
        if waiting is not None:  # the next batch is on its way to the devices by now
            parts.append(fetch(waiting))
        waiting = found
    if waiting is not None:
        parts.append(fetch(waiting))
    return np.concatenate(parts)[: len(source)]


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
    logits = clip_logits(model, source, frontend, batch_size=batch_size)
    return measure(logits, source, bootstrap)


def clip_logits(
    model: AST, source: Source, frontend: FrontEnd | None = None, *, batch_size: int = 64
) -> Float[np.ndarray, "n c"]:
    """Logits `[n, c]` of every clip of a source, in its order; arguments as for `evaluate`."""
    frontend = frontend or make_front_end(model)
    check_fit(model, [source], frontend)
    parts = surgery.split(model)
    tx = make_optimizer(Optim(), steps_per_epoch=1, epochs=1)
    mesh = MeshShape().make(jax.local_devices())
    begin = start(
        parts.trainable,
        parts.stats,
        parts.frozen,
        tx,
        mesh,
        average=False,
        dtype=model.config.dtype,
    )
    steps = make_steps(
        parts.graphdef, tx, frontend=frontend, augment=Augment(), loss="ce", layout=begin.layout
    )
    weights = (begin.state.trainable, begin.state.stats)
    batch = evaluation_batch(batch_size, mesh)
    with jax.set_mesh(mesh):
        logits = predict_logits(steps, weights, begin.frozen, source, frontend, batch, mesh)
    assert logits is not None
    return logits


def measure(logits: np.ndarray, source: Source, bootstrap: int) -> metrics.Metrics:
    """Metrics of logits `[n, c]` of the clips of a source, in its order."""
    return metrics.evaluate(
        logits,
        source.targets(),
        classes=source.classes,
        multi_label=source.multi_label,
        bootstrap=bootstrap,
    )


def check_fit(model: AST, sources: Sequence[Source], frontend: FrontEnd) -> None:
    """Refuses sources and a front end that do not fit the model's head and input."""
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
