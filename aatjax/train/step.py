"""The compiled training step, with gradients of the trainable tree only."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from aatjax import surgery
from aatjax.audio.augment import Augment
from aatjax.audio.frontend import FrontEnd
from aatjax.errors import UsageError
from aatjax.train.forward import BatchFrontEnd, make_forward
from aatjax.train.optim import compute_updates
from aatjax.train.state import TrainState

Loss = Literal["ce", "bce"]
LossFunction = Callable[[Float[Array, "b c"], Float[Array, "b c"]], Float[Array, " b"]]
"""(logits, targets) -> one loss per clip."""


class Batch(TypedDict):
    """One batch: audio `[b, s]` int16, valid samples `[b]`, targets `[b, c]`, weight `[b]`.

    In place of the audio, stored log-mel `[b, t, f]` before normalisation (not with mixup), or
    tokens.

    A target is NaN where it is unknown whether the clip has the class (loss `bce` only).
    """

    audio: Num[Array, "b *s"]
    length: Int[Array, " b"]
    target: Float[Array, "b c"]
    weight: Float[Array, " b"]


def compute_losses(
    logits: Float[Array, "b c"],
    target: Float[Array, "b c"],
    loss: Loss | LossFunction,
    known: Float[Array, "b c"] | None = None,
) -> Float[Array, " b"]:
    """Return cross-entropy (`ce`) or mean binary cross-entropy over classes (`bce`) per clip.

    Args:
        logits: scores before softmax or sigmoid.
        target: share of the clip that has the class; 0 to `known`.
        loss: `ce`, `bce`, or a function of logits and targets.
        known: share of the clip of which it is known whether it has the class; all by default.
            `bce` is the mean over the known classes.
    """
    if callable(loss):
        try:
            losses = loss(logits, target)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"the loss failed on logits {list(logits.shape)} and targets {list(target.shape)}, "
                f"float32, which are shares of the classes (a class number is argmax): {error}"
            ) from error
        if not isinstance(losses, jax.Array) or losses.shape != logits.shape[:1]:
            shape = getattr(losses, "shape", None)
            returned = type(losses).__name__ if shape is None else f"shape {list(shape)}"
            raise UsageError(
                f"the loss returned {returned} for {logits.shape[0]} clips: it must return one "
                "number per clip, without their mean"
            )
        return losses
    if loss == "ce":
        return optax.softmax_cross_entropy(logits, target)
    if known is None:
        return optax.sigmoid_binary_cross_entropy(logits, target).mean(axis=-1)
    each = target * jax.nn.softplus(-logits) + (known - target) * jax.nn.softplus(logits)
    return each.sum(axis=-1) / jnp.maximum(known.sum(axis=-1), 1e-6)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The two compiled functions of a run.

    Attributes:
        train: (state, frozen, batch, key) -> (state, sums): "loss", "correct" (clips whose class of
            the highest logit is theirs), "weight" (clips), "skipped"; of the labels at logit 0
            "shared" (twice those both given and predicted) and "labels" (given plus predicted).
        forward: ((trainable, stats, frozen), audio, length) -> logits `[b, c]`.
    """

    train: jax.stages.Wrapped
    forward: Callable[..., jax.Array]


def make_steps(
    graphdef: Any,
    tx: optax.GradientTransformation,
    *,
    frontend: FrontEnd,
    augment: Augment,
    loss: Loss | LossFunction,
    average: float | None = None,
    layout: TrainState | None = None,
    start: int | None = None,
) -> Steps:
    """Return the jitted steps; equal arguments share their compiled programs.

    What a method adds to the loss (`surgery.Penalty`) is in the gradient, not in the loss shown.
    The gradient is taken with respect to the trainable tree alone, so no weight gradient of a
    frozen matrix exists in the compiled program. Rows of weight 0 (padding) do not count.

    Args:
        graphdef: the model's structure, from `split_model` or `surgery.split`.
        tx: optimiser over the trainable tree.
        frontend: log-mel front end, run inside the step.
        augment: augmentation of training batches.
        loss: `ce`, `bce`, or a function of logits and targets.
        average: decay of the moving average of the trainable tree, or None.
        layout: the sharding of every array of the state (`start_state`); the sums are copied to
            every device. The steps are then called under `jax.set_mesh`.
        start: block that batches enter: their `audio` holds tokens, and nothing is augmented.
    """

    leaves, structure = jax.tree.flatten(layout)
    train = _compile_step(
        graphdef, tx, frontend, augment, loss, average, start, tuple(leaves), structure
    )
    return Steps(train, make_forward(graphdef, frontend, start=start))


@functools.lru_cache(16)
def _compile_step(
    graphdef: Any,
    tx: optax.GradientTransformation,
    frontend: FrontEnd,
    augment: Augment,
    loss: Loss | LossFunction,
    average: float | None,
    start: int | None,
    leaves: tuple[Any, ...],
    structure: Any,
) -> Any:
    def train_step(
        state: TrainState, frozen: Any, batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        x, valid, target, known = _prepare_batch(batch, key, frontend, augment, loss, start)
        weight = batch["weight"]

        def objective(trainable: Any) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
            model = surgery.join(graphdef, trainable, state.stats, frozen)
            model.train()
            surgery.reseed(model, key)
            logits = model(x, valid) if start is None else model.run_from(x, valid, start)
            losses = compute_losses(logits, target, loss, known) * weight
            hit = (logits.argmax(-1) == target.argmax(-1)).astype(jnp.float32)
            sums = {"loss": losses.sum(), "correct": (hit * weight).sum(), "weight": weight.sum()}
            sums |= count_labels(logits, target, known, weight)
            mean = losses.sum() / jnp.maximum((weight > 0).astype(jnp.float32).sum(), 1)
            return mean + surgery.sum_penalties(model), (nnx.state(model, nnx.BatchStat), sums)

        (_, (stats, sums)), grads = jax.value_and_grad(objective, has_aux=True)(state.trainable)
        return _update(state, grads, stats, sums, tx, average)

    layout: TrainState | None = structure.unflatten(leaves)
    if layout is None:
        return jax.jit(train_step, donate_argnums=0)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(layout, layout.step))


def _prepare_batch(
    batch: Batch,
    key: PRNGKeyArray,
    frontend: FrontEnd,
    augment: Augment,
    loss: Loss | LossFunction,
    start: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Return augmented log-mel (or tokens), valid frames, targets, and which of them are known."""
    x, target, known = batch["audio"], batch["target"], None
    if loss == "bce":
        # Both are mixed as the sounds are, so what is known of one half of a mixture counts.
        seen = ~jnp.isnan(target)
        target = jnp.concatenate([jnp.where(seen, target, 0.0), seen.astype(target.dtype)], 1)
    front = frontend if start is not None else BatchFrontEnd.for_batch(frontend, x)
    valid = front.count_frames(batch["length"])
    if start is None:
        x, target = augment(key, front, x, batch["length"], target, batch["weight"])
    if loss == "bce":
        target, known = jnp.split(target, 2, axis=1)
    return x, valid, target, known


def count_labels(
    logits: Float[Array, "b c"],
    target: Float[Array, "b c"],
    known: Float[Array, "b c"] | None,
    weight: Float[Array, " b"],
) -> dict[str, jax.Array]:
    """Return the numerator and denominator of micro-F1 at logit 0, over the known labels."""
    known = (~jnp.isnan(target)).astype(jnp.float32) if known is None else known
    given = (target > 0.5 * known) & (known > 0)
    predicted = (logits > 0) & (known > 0)
    one, other, both = (x.astype(jnp.float32) for x in (given, predicted, given & predicted))
    rows = weight[:, None]
    return {"shared": (2.0 * both * rows).sum(), "labels": ((one + other) * rows).sum()}


def _update(
    state: TrainState,
    grads: Any,
    stats: Any,
    sums: dict[str, jax.Array],
    tx: optax.GradientTransformation,
    average: float | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Apply one update; a step that is not finite changes nothing but the count of steps."""
    updates, opt_state = compute_updates(tx, grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    mean = state.average
    if average is not None:
        mean = optax.incremental_update(trainable, mean, 1.0 - average)
    fine = is_finite((sums["loss"], grads))
    after = TrainState(state.step, trainable, stats, opt_state, mean)
    kept = jax.tree.map(lambda new, old: jnp.where(fine, new, old), after, state)
    counted = {name: jnp.where(fine, value, 0.0) for name, value in sums.items()}
    counted["skipped"] = 1.0 - fine.astype(jnp.float32)
    return dataclasses.replace(kept, step=state.step + 1), counted


def is_finite(tree: Any) -> jax.Array:
    """Return whether every number of a tree is finite, as a scalar array."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
