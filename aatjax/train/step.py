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

from aatjax import ops, surgery
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
    *,
    focal: float = 0.0,
    smoothing: float = 0.0,
) -> Float[Array, " b"]:
    """Return cross-entropy (`ce`) or mean binary cross-entropy over classes (`bce`) per clip.

    Each term -log p is times (1 - p)^focal (focal loss, Lin et al. 2017, eq. 4, arXiv 1708.02002).

    Args:
        logits: scores before softmax or sigmoid.
        target: share of the clip that has the class; 0 to `known`.
        loss: `ce`, `bce`, or a function of logits and targets.
        known: share of the clip of which it is known whether it has the class; all by default.
            `bce` is the mean over the known classes.
        focal: exponent of the focal loss; 0 is none. Not for a function.
        smoothing: share of each target that is spread over all classes (`ce`), or over the class
            and its absence (`bce`). Not for a function.
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
        target = (1 - smoothing) * target + smoothing / target.shape[-1]
        return (target * _weigh_hard(-jax.nn.log_softmax(logits), focal)).sum(axis=-1)
    known = jnp.ones_like(target) if known is None else known
    target = (1 - smoothing) * target + smoothing / 2 * known
    present, absent = (_weigh_hard(jax.nn.softplus(x), focal) for x in (-logits, logits))
    each = target * present + (known - target) * absent
    return each.sum(axis=-1) / jnp.maximum(known.sum(axis=-1), 1e-6)


def _weigh_hard(nats: Float[Array, "b c"], focal: float) -> Float[Array, "b c"]:
    """Return -log p times (1 - p)^focal, with finite gradients where p is 1."""
    return nats * (-jnp.expm1(-nats) + 1e-12) ** focal if focal else nats


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
    accumulate: int = 1,
    focal: float = 0.0,
    smoothing: float = 0.0,
    deterministic: bool = False,
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
        accumulate: parts that a batch is computed in, one after the other, to save memory. The
            update is that of the whole batch, up to rounding, but for the statistics of a
            BatchNorm, which are those of each part.
        focal, smoothing: see `compute_losses`.
        deterministic: add up in a fixed order on GPUs too.
    """

    leaves, structure = jax.tree.flatten(layout)
    train = _compile_step(
        graphdef,
        tx,
        frontend,
        augment,
        _Objective(loss, focal, smoothing),
        average,
        start,
        accumulate,
        tuple(leaves),
        structure,
        ops.find_choice(),
        deterministic,
    )
    return Steps(train, make_forward(graphdef, frontend, start=start))


@dataclasses.dataclass(frozen=True)
class _Objective:
    """The loss of `compute_losses` with its options; equal ones are equal."""

    loss: Loss | LossFunction
    focal: float
    smoothing: float

    def __call__(self, logits: Any, target: Any, known: Any) -> jax.Array:
        options = {"focal": self.focal, "smoothing": self.smoothing}
        return compute_losses(logits, target, self.loss, known, **options)


@functools.lru_cache(16)
def _compile_step(
    graphdef: Any,
    tx: optax.GradientTransformation,
    frontend: FrontEnd,
    augment: Augment,
    objective: _Objective,
    average: float | None,
    start: int | None,
    accumulate: int,
    leaves: tuple[Any, ...],
    structure: Any,
    choice: Any,
    deterministic: bool,
) -> Any:
    def train_step(
        state: TrainState, frozen: Any, batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        prepared = _prepare_batch(batch, key, frontend, augment, objective.loss, start)
        clips = jnp.maximum((batch["weight"] > 0).astype(jnp.float32).sum(), 1)

        def compute(trainable: Any, stats: Any, part: Any) -> tuple[jax.Array, tuple[Any, Any]]:
            x, valid, target, known, weight, number = part
            model = surgery.join(graphdef, trainable, stats, frozen)
            model.train()
            surgery.reseed(model, key if accumulate == 1 else jax.random.fold_in(key, number))
            logits = model(x, valid) if start is None else model.run_from(x, valid, start)
            losses = objective(logits, target, known) * weight
            hit = (logits.argmax(-1) == target.argmax(-1)).astype(jnp.float32)
            sums = {"loss": losses.sum(), "correct": (hit * weight).sum(), "weight": weight.sum()}
            sums |= count_labels(logits, target, known, weight)
            mean = losses.sum() / clips + surgery.sum_penalties(model) / accumulate
            return mean, (nnx.state(model, nnx.BatchStat), sums)

        differentiate = jax.value_and_grad(compute, has_aux=True)
        whole = (*prepared, batch["weight"])
        if accumulate == 1:
            (_, (stats, sums)), grads = differentiate(state.trainable, state.stats, (*whole, 0))
            return _update(state, grads, stats, sums, tx, average)

        def add_part(carry: tuple[Any, Any], part: Any) -> tuple[tuple[Any, Any], Any]:
            stats, total = carry
            (_, (stats, sums)), grads = differentiate(state.trainable, stats, part)
            return (stats, jax.tree.map(jnp.add, total, grads)), sums

        # Part i has the rows i, i + parts, ...: each device keeps its own.
        parts = jax.tree.map(
            lambda rows: jnp.swapaxes(rows.reshape(-1, accumulate, *rows.shape[1:]), 0, 1), whole
        )
        carry = (state.stats, jax.tree.map(jnp.zeros_like, state.trainable))
        numbers = jnp.arange(accumulate, dtype=jnp.int32)
        (stats, grads), sums = jax.lax.scan(add_part, carry, (*parts, numbers))
        sums = jax.tree.map(lambda each: each.sum(axis=0), sums)
        return _update(state, grads, stats, sums, tx, average)

    layout: TrainState | None = structure.unflatten(leaves)
    options: Any = {"xla_gpu_deterministic_ops": True} if deterministic else None
    shardings: Any = {} if layout is None else {"out_shardings": (layout, layout.step)}
    return jax.jit(train_step, donate_argnums=0, compiler_options=options, **shardings)


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
