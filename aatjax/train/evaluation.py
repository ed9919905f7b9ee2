"""Evaluating a model on labelled clips."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from aatjax import surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.data.clips import Source
from aatjax.data.pipeline import eval_batches
from aatjax.errors import UsageError
from aatjax.loading import front_end_of
from aatjax.models.ast import AST
from aatjax.train import metrics
from aatjax.train.optim import Optim, make_optimizer
from aatjax.train.step import Steps, make_steps

Weights = tuple[Any, Any]


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
    check_fit(model, [source], frontend)
    parts = surgery.split(model)
    tx = make_optimizer(Optim(), steps_per_epoch=1, epochs=1)
    steps = make_steps(parts.graphdef, tx, frontend=frontend, augment=Augment(), loss="ce")
    weights = (parts.trainable, parts.stats)
    logits = predict_logits(steps, weights, parts.frozen, source, frontend, batch_size)
    return measure(logits, source, bootstrap)


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
