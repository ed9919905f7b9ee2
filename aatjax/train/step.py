"""The training and evaluation steps: pure functions, differentiated over what is trainable."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from aatjax import ops, surgery
from aatjax.audio.augment import Augment
from aatjax.audio.fbank import count_frames
from aatjax.audio.frontend import FrontEnd
from aatjax.train.state import TrainState

Loss = Literal["ce", "bce"]


class Batch(TypedDict):
    """One batch: audio `[b, s]` int16, valid samples `[b]`, targets `[b, c]`, weight `[b]`.

    A target is NaN where it is not known whether the clip has the class (loss `bce` only).
    """

    audio: Num[Array, "b *s"]
    length: Int[Array, " b"]
    target: Float[Array, "b c"]
    weight: Float[Array, " b"]


def loss_per_clip(
    logits: Float[Array, "b c"],
    target: Float[Array, "b c"],
    loss: Loss,
    known: Float[Array, "b c"] | None = None,
) -> Float[Array, " b"]:
    """Cross-entropy (`ce`) or mean binary cross-entropy over classes (`bce`), one value a clip.

    Args:
        logits: scores before softmax or sigmoid.
        target: share of the clip that has the class; 0 to `known`.
        loss: `ce` or `bce`.
        known: share of the clip of which it is known whether it has the class; all by default. A
            class that is not known has no part in `bce`, which is the mean over those that are.
    """
    if loss == "ce":
        return optax.softmax_cross_entropy(logits, target)
    if known is None:
        return optax.sigmoid_binary_cross_entropy(logits, target).mean(axis=-1)
    each = target * jax.nn.softplus(-logits) + (known - target) * jax.nn.softplus(logits)
    return each.sum(axis=-1) / jnp.maximum(known.sum(axis=-1), 1e-6)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The two compiled steps of a run.

    Attributes:
        train: (state, frozen, batch, key) -> (state, {"loss", "correct", "weight", "skipped"}
            sums).
        evaluate: (trainable, stats, frozen, batch) -> logits `[b, c]`.
    """

    train: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class _PerDevice(FrontEnd):
    """The same front end, every device on its own clips: XLA would gather them for the FFT."""

    def features(self, audio: Num[Array, "b s"], length: Int[Array, " b"]) -> Float[Array, "b t f"]:
        return ops.over_batch(lambda clips, _: FrontEnd.features(self, *clips), (audio, length), ())


def make_steps(
    graphdef: Any,
    tx: optax.GradientTransformation,
    *,
    frontend: FrontEnd,
    augment: Augment,
    loss: Loss,
    average: float | None = None,
    layout: TrainState | None = None,
    prefix: int | None = None,
) -> Steps:
    """Builds the jitted steps.

    What a method adds to the loss (`surgery.Penalty`) is in the gradient, not in the loss shown.
    The gradient is taken with respect to the trainable tree alone, so no weight gradient of a
    frozen matrix exists in the compiled program. Rows of weight 0 (padding) do not count.

    Args:
        graphdef: the model's structure, from `surgery.split`.
        tx: optimiser over the trainable tree.
        frontend: log-mel front end, run inside the step.
        augment: augmentation of training batches.
        loss: `ce` or `bce`.
        average: decay of the moving average of the trainable tree, or None.
        layout: the sharding of every array of the state (`start`); all else that comes out is
            copied to every device. The steps are then called under `jax.set_mesh`.
        prefix: the block that batches begin at: their `audio` holds the tokens that enter it, and
            nothing is augmented.
    """

    whole_length = _PerDevice(**dataclasses.asdict(frontend))

    def at_length_of(audio: jax.Array) -> FrontEnd:
        """The front end of a batch: batches of short clips may be shorter (`data.buckets`)."""
        if prefix is not None:
            return whole_length
        return dataclasses.replace(whole_length, frames=count_frames(audio.shape[1]))

    def forward(
        trainable: Any, stats: Any, frozen: Any, x: jax.Array, sounding: jax.Array, *, train: bool
    ) -> tuple[jax.Array, Any, Any]:
        model = surgery.join(graphdef, trainable, stats, frozen)
        if train:
            model.train()
        else:
            model.eval()
        logits = model(x, sounding) if prefix is None else model.run_from(x, sounding, prefix)
        return logits, nnx.state(model, nnx.BatchStat), surgery.sum_penalties(model)

    def train_step(
        state: TrainState, frozen: Any, batch: Batch, key: PRNGKeyArray
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        weight, target, known = batch["weight"], batch["target"], None
        if loss == "bce":
            # Both are mixed as the sounds are, so what is known of one half of a mixture counts.
            seen = ~jnp.isnan(target)
            target = jnp.concatenate([jnp.where(seen, target, 0.0), seen.astype(target.dtype)], 1)
        x = batch["audio"]
        frontend = at_length_of(x)
        sounding = frontend.count_frames(batch["length"])
        if prefix is None:
            x, target = augment(key, frontend, x, batch["length"], target, weight)
        if loss == "bce":
            target, known = jnp.split(target, 2, axis=1)

        def objective(trainable: Any) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
            logits, stats, penalty = forward(
                trainable, state.stats, frozen, x, sounding, train=True
            )
            losses = loss_per_clip(logits, target, loss, known) * weight
            hit = (logits.argmax(-1) == target.argmax(-1)).astype(jnp.float32)
            sums = {
                "loss": losses.sum(),
                "correct": (hit * weight).sum(),
                "weight": weight.sum(),
            }
            mean = losses.sum() / jnp.maximum(weight.sum(), 1.0)
            return mean + penalty, (stats, sums)

        (_, (stats, sums)), grads = jax.value_and_grad(objective, has_aux=True)(state.trainable)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        mean = state.average
        if average is not None:
            mean = optax.incremental_update(trainable, mean, 1.0 - average)
        # A step whose loss or gradient is not finite changes nothing but the count of steps.
        fine = finite((sums["loss"], grads))
        after = TrainState(state.step, trainable, stats, opt_state, mean)
        kept = jax.tree.map(lambda new, old: jnp.where(fine, new, old), after, state)
        counted = {name: jnp.where(fine, value, 0.0) for name, value in sums.items()}
        counted["skipped"] = 1.0 - fine.astype(jnp.float32)
        return dataclasses.replace(kept, step=state.step + 1), counted

    def eval_step(trainable: Any, stats: Any, frozen: Any, batch: Batch) -> jax.Array:
        x, length = batch["audio"], batch["length"]
        frontend = at_length_of(x)
        x = x if prefix is not None else frontend(x, length)
        return forward(trainable, stats, frozen, x, frontend.count_frames(length), train=False)[0]

    if layout is None:
        return Steps(jax.jit(train_step, donate_argnums=0), jax.jit(eval_step))
    whole: Any = layout.step
    return Steps(
        jax.jit(train_step, donate_argnums=0, out_shardings=(layout, whole)),
        jax.jit(eval_step, out_shardings=whole),
    )


def finite(tree: Any) -> jax.Array:
    """Whether every number of a tree is finite."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
