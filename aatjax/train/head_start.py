"""The start of a head in closed form: a ridge regression on the features that it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float64, Integer

from aatjax import surgery
from aatjax.audio.frontend import FrontEnd
from aatjax.data.clip_windows import ClipWindows
from aatjax.data.sampling import compute_draw_shares
from aatjax.data.source import Source
from aatjax.models.ast import AST
from aatjax.train.distributed import run_on_main
from aatjax.train.evaluation import Evaluator
from aatjax.train.forward import make_forward, split_model
from aatjax.train.ridge import find_logit_scale, fit_ridge
from aatjax.train.sharding import place_arrays
from aatjax.train.state import cast_frozen


@dataclasses.dataclass(frozen=True)
class HeadStart:
    """A head in closed form.

    Attributes:
        kernel: weights of its linear layer `[p, c]`.
        bias: `[c]`.
        penalty: the largest penalty that was chosen, per unit of variance and weight.
        left_out: share of the training clips whose class, or micro-F1 of whose labels, the fit
            without them (or without their group) gets right.
    """

    kernel: Float64[np.ndarray, "p c"]
    bias: Float64[np.ndarray, " c"]
    penalty: float
    left_out: float


def read_pooled(
    model: AST, x: Float[Array, "b t f"], valid: Integer[Array, " b"]
) -> Float[Array, "b p"]:
    """Return what the linear layer of the head reads."""
    pooled = model.run_pooled(x, valid)
    return pooled if model.head.norm is None else model.head.norm(pooled)


def solve_head(
    features: Float[np.ndarray, "n p"], source: Source, *, balance: bool = False
) -> HeadStart:
    """Fit a head to the clips of a source, with the penalty that is best for clips left out.

    A squared loss on 0 and 1 estimates the probabilities of the classes; as logits they are scaled
    by the factor with the least log loss of the clips left out.

    Args:
        features: of each clip.
        source: labelled clips. Those of a recording or speaker are left out together.
        balance: weigh clips as `compute_draw_shares` draws them.
    """
    targets = source.targets().astype(np.float64)
    weights = len(source) * compute_draw_shares(source) if balance else np.ones(len(source))
    named = [clip.group or f"\0{number}" for number, clip in enumerate(source.clips)]
    groups = np.unique(named, return_inverse=True)[1]
    count = targets.shape[1]
    kernel, bias = np.zeros((features.shape[1], count)), np.zeros(count)
    left_out, penalty = np.full_like(targets, np.nan), 0.0
    known = ~np.isnan(targets)
    patterns, kinds = np.unique(known, axis=1, return_inverse=True)
    for kind in range(patterns.shape[1]):  # one, unless labels are unknown
        rows, columns = np.flatnonzero(patterns[:, kind]), np.flatnonzero(kinds == kind)
        found = fit_ridge(
            features[rows],
            targets[np.ix_(rows, columns)],
            weights=weights[rows],
            groups=groups[rows] if len(set(groups[rows])) > 1 else None,
        )
        kernel[:, columns], bias[columns] = found.kernel, found.bias
        left_out[np.ix_(rows, columns)] = found.left_out
        penalty = max(penalty, float(found.strength.max()))
    score = _score_labels if source.multi_label else _score_classes
    scale, offset = find_logit_scale(left_out, targets, weights, source.multi_label)
    return HeadStart(
        scale * kernel, scale * (bias - offset), penalty, score(left_out - offset, targets)
    )


def _score_classes(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float((outputs.argmax(1) == targets.argmax(1)).mean())


def _score_labels(outputs: np.ndarray, targets: np.ndarray) -> float:
    given, found = targets > 0.5, outputs > 0
    found &= ~np.isnan(targets)
    return float(2 * (given & found).sum() / max(1, given.sum() + found.sum()))


def start_head(
    model: AST,
    clips: ClipWindows,
    frontend: FrontEnd,
    mesh: Mesh,
    *,
    batch_size: int,
    balance: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[AST, dict[str, Any]]:
    """Return a copy of a model whose head is fitted to the training clips, in closed form.

    Args:
        model: an adapted model. Its features are those of its start.
        clips: the training clips and their windows, whose features are averaged.
        frontend: log-mel front end.
        mesh: the devices; called under `jax.set_mesh(mesh)`.
        batch_size: windows per batch.
        balance: see `solve_head`.
        stopped: see `Evaluator.read`.

    Returns:
        The model, and figures for the metrics of a run.

    Raises:
        DataError: no clip can be left out.
    """
    parts = split_model(model)
    weights = place_arrays((parts.trainable, parts.stats), mesh)
    frozen = place_arrays(cast_frozen(parts.frozen, model.config.dtype), mesh)
    forward = make_forward(parts.graphdef, frontend, read_pooled)
    evaluator = Evaluator(forward, frozen, frontend, mesh, batch_size)
    found = evaluator.read(weights, clips.windows, stopped=stopped)
    assert found is not None
    features = clips.average(found)

    def solve() -> list[Any]:
        head = solve_head(features, clips.clips, balance=balance)
        return [head.kernel.tolist(), head.bias.tolist(), head.penalty, head.left_out]

    kernel, bias, *figures = run_on_main(solve)
    head = HeadStart(np.array(kernel), np.array(bias), *figures)
    started = surgery.clone(model)
    values = {"head/linear/kernel": head.kernel, "head/linear/bias": head.bias}
    arrays = {path: jnp.asarray(value, jnp.float32) for path, value in values.items()}
    surgery.assign(started, arrays, what="the start of the head")
    score = "micro_f1" if clips.clips.multi_label else "accuracy"
    return started, {f"left_out/{score}": head.left_out, "head/penalty": head.penalty}
