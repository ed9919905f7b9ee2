"""What training changes, as one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step updates; the frozen parameters are passed beside it, untouched.

    Keeping them apart lets the step give its old state's memory away (donation), and keeps them
    out of every checkpoint.

    Attributes:
        step: updates done, int32 scalar.
        trainable: the trainable parameters, float32.
        stats: batch statistics that the forward pass updates.
        opt_state: the optimiser's state over `trainable`.
        average: exponential moving average of `trainable`, or None.
    """

    step: jax.Array
    trainable: Any
    stats: Any
    opt_state: Any
    average: Any


def init_state(
    trainable: Any, stats: Any, tx: optax.GradientTransformation, *, average: bool
) -> TrainState:
    """A state before the first step; its leaves are its own copies, free to be donated."""
    copy = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (trainable, stats))
    trainable, stats = copy
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        stats=stats,
        opt_state=tx.init(trainable),
        average=jax.tree.map(jnp.copy, trainable) if average else None,
    )
