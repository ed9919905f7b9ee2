"""The arrays that training changes, as one pytree."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.tree_util import tree_map_with_path

from aatjax.models.ast import AST
from aatjax.surgery import SplitModel
from aatjax.train.sharding import join_path, make_shardings, place_arrays

FLOAT32_PARTS = {"ln1", "ln2", "norm", "head", "batch_norm"}
"""Modules that compute in float32 whatever the compute type."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step updates; the frozen parameters are passed beside it, untouched.

    Keeping them apart lets the step donate the memory of its old state, and keeps them out of
    every checkpoint. The leaves are arrays, or their shapes or shardings.

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
    """Return the state before the first step; its leaves are copies, free to be donated."""
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
    """The arrays that a run starts from, on its mesh.

    Attributes:
        state: the state before the first step.
        frozen: the frozen parameters.
        layout: the sharding of every array of the state.
    """

    state: TrainState
    frozen: Any
    layout: TrainState


def make_abstract_state(
    parts: SplitModel[AST], tx: optax.GradientTransformation, mesh: Mesh, *, average: bool
) -> tuple[TrainState, TrainState]:
    """Return the shapes of a state and the sharding of each of its arrays; computes nothing."""
    make = functools.partial(init_state, tx=tx, average=average)
    shapes = jax.eval_shape(make, parts.trainable, parts.stats)
    return shapes, make_shardings(shapes, mesh)


def start_state(
    parts: SplitModel[AST],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    average: bool,
    dtype: Any = jnp.float32,
) -> Start:
    """Return the first state and the frozen parameters, made or placed where they will lie.

    Args:
        parts: a model from `surgery.split`, on the host or a device.
        tx: optimiser over the trainable tree.
        mesh: the devices of the run.
        average: whether the state has a moving average.
        dtype: the model's compute type; see `cast_frozen`.
    """
    _, layout = make_abstract_state(parts, tx, mesh, average=average)
    leaves, structure = jax.tree.flatten(layout)
    with jax.set_mesh(mesh):
        init = _compile_init(tx, average, tuple(leaves), structure)
        state = init(*jax.device_get((parts.trainable, parts.stats)))
    return Start(state, place_arrays(cast_frozen(parts.frozen, dtype), mesh), layout)


@functools.lru_cache(16)
def _compile_init(
    tx: optax.GradientTransformation, average: bool, leaves: tuple[Any, ...], structure: Any
) -> Any:
    make = functools.partial(init_state, tx=tx, average=average)
    return jax.jit(make, out_shardings=structure.unflatten(leaves))


def cast_frozen(frozen: Any, dtype: Any) -> Any:
    """Return the frozen parameters in the compute type.

    In bfloat16 that halves their memory and changes no result: the forward pass casts them at each
    use anyway. LayerNorms and the head compute in float32 and keep it.
    """

    def cast(path: Any, leaf: Any) -> Any:
        parts = set(join_path(path).split("/"))
        if FLOAT32_PARTS & parts or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype)
        return np.asarray(leaf).astype(dtype)

    return frozen if dtype == jnp.float32 else tree_map_with_path(cast, frozen)
