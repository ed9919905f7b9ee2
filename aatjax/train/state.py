"""What training changes, as one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.tree_util import tree_map_with_path

from aatjax.train.sharding import path_of, place, shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step updates; the frozen parameters are passed beside it, untouched.

    Keeping them apart lets the step give its old state's memory away (donation), and keeps them
    out of every checkpoint.

    Its leaves are arrays, or what stands for each of them: shapes, shardings.

    Attributes:
        step: updates done, int32 scalar.
        trainable: the trainable parameters, float32.
        stats: batch statistics that the forward pass updates.
        opt_state: the optimiser's state over `trainable`.
        average: exponential moving average of `trainable`, or None.
    """

    step: Any
    trainable: Any
    stats: Any
    opt_state: Any
    average: Any


def init_state(
    trainable: Any, stats: Any, tx: optax.GradientTransformation, *, average: bool
) -> TrainState:
    """A state before the first step; its leaves are its own copies, free to be donated.

    Under `jax.jit` with `out_shardings` it is made where it will lie.
    """
    copy = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (trainable, stats))
    trainable, stats = copy
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        trainable=trainable,
        stats=stats,
        opt_state=tx.init(trainable),
        average=jax.tree.map(jnp.copy, trainable) if average else None,
    )


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run starts from, on its mesh.

    Attributes:
        state: the state before the first step.
        frozen: the frozen parameters.
        layout: the sharding of every array of the state.
    """

    state: TrainState
    frozen: Any
    layout: TrainState


def abstract_state(
    trainable: Any, stats: Any, tx: optax.GradientTransformation, mesh: Mesh, *, average: bool
) -> tuple[TrainState, TrainState]:
    """Shapes of a state, and the sharding of each of its arrays; nothing is computed."""

    def make(trainable: Any, stats: Any) -> TrainState:
        return init_state(trainable, stats, tx, average=average)

    shapes = jax.eval_shape(make, trainable, stats)
    return shapes, shardings(shapes, mesh)


def start(
    trainable: Any,
    stats: Any,
    frozen: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    average: bool,
    dtype: Any = jnp.float32,
) -> Start:
    """The first state and the frozen parameters, made or placed where they will lie.

    Args:
        trainable, stats, frozen: the parts of a model (`surgery.split`), on the host or a device.
        tx: optimiser over the trainable tree.
        mesh: the devices of the run.
        average: whether the state has a moving average.
        dtype: the model's compute type; see `hold`.
    """
    _, layout = abstract_state(trainable, stats, tx, mesh, average=average)

    def make(trainable: Any, stats: Any) -> TrainState:
        return init_state(trainable, stats, tx, average=average)

    with jax.set_mesh(mesh):
        state = jax.jit(make, out_shardings=layout)(*jax.device_get((trainable, stats)))
    return Start(state, place(hold(frozen, dtype), mesh), layout)


def hold(frozen: Any, dtype: Any) -> Any:
    """The frozen parameters in the type that they are computed in.

    In bfloat16 that halves their memory and changes no result: the forward pass casts them at each
    use anyway. LayerNorms and the head compute in float32 and keep it.
    """
    exact = {"ln1", "ln2", "norm", "head", "batch_norm"}

    def one(path: Any, leaf: Any) -> Any:
        if exact & set(path_of(path).split("/")) or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype)
        return np.asarray(leaf).astype(dtype)

    return frozen if dtype == jnp.float32 else tree_map_with_path(one, frozen)
