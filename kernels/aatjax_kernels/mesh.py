"""Kernels under a mesh: each device runs them on its own part of the batch.

XLA cannot partition a kernel. On TPU it refuses the program; on GPU it would gather the whole batch
on every device without a warning. Hence `shard_map`, over clips and heads, which are independent.

The axes that the batch is split over are known where the mesh has Explicit axes, which the type of
an array names (`as_auto`), and where the axes of `jax.set_mesh` are named as in `BATCH_AXES`. With
other names, and without `jax.set_mesh`, XLA follows the shardings of the arguments, and plain JAX
runs in place of the kernels (`platform.branch`).
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

BATCH_AXES = ("slice", "data", "fsdp")
"""Names of mesh axes that the batch is split over."""

HEAD_AXIS = "model"
"""Name of the mesh axis that attention heads are split over, unless the batch is."""


def _mesh() -> AbstractMesh | None:
    """Return the mesh in use; None inside `shard_map` or where it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = AxisType.Manual in mesh.axis_types
    return None if mesh.empty or manual or mesh.size == 1 else mesh


_batch_axes: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar(
    "batch_axes", default=BATCH_AXES
)


def _axes(mesh: AbstractMesh) -> tuple[str, ...]:
    return tuple(name for name in _batch_axes.get() if name in mesh.axis_names)


def _head_axis(mesh: AbstractMesh) -> str | None:
    return HEAD_AXIS if HEAD_AXIS in mesh.axis_names and HEAD_AXIS not in _axes(mesh) else None


def find_batch_axes() -> tuple[str, ...]:
    """Return the names of the axes that the batch is split over here, of any mesh."""
    return _batch_axes.get()


@contextlib.contextmanager
def split_batch_over(axes: tuple[str, ...]) -> Iterator[None]:
    """Split the batch over the axes of these names, within the context."""
    token = _batch_axes.set(axes)
    try:
        yield
    finally:
        _batch_axes.reset(token)


def find_explicit(*arrays: Any) -> AbstractMesh | None:
    """Return the mesh with Explicit axes that one of some arrays lies on, if any."""
    for array in arrays:
        mesh = getattr(getattr(jax.typeof(array), "sharding", None), "mesh", None)
        if mesh is not None and not mesh.empty and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def as_auto(function: Callable[..., Any], mesh: AbstractMesh, x: jax.Array, *args: Any) -> Any:
    """Call `function(x, *args)` with the Explicit axes of a mesh made Auto, so that XLA partitions.

    Args:
        function: returns an array with a leading batch axis, and a tree of arrays without one.
        mesh: from `find_explicit`.
        x: array whose leading axis is the batch.
        args: trees of arrays; arrays that the function closes over must not lie on the mesh.

    Returns:
        The results; the first is split over the batch as `x` is, the second is on every device.
    """
    spec = jax.typeof(x).sharding.spec
    first = spec[0] if spec else None
    names = (first,) if isinstance(first, str) else tuple(first or ())
    split = NamedSharding(mesh, PartitionSpec(names or None))
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh), split_batch_over(names):
        return jax.sharding.auto_axes(function, out_sharding=(split, whole))(x, *args)


def divide(arrays: Sequence[Any], head_axes: Sequence[int | None] = ()) -> list[Any]:
    """Return the shapes and types of a device's part of arrays with a leading batch axis.

    Args:
        arrays: arrays, or None.
        head_axes: for each the axis of the heads, -1 where it has none, None for no array.
    """
    mesh = _mesh()
    across = None if mesh is None else _head_axis(mesh)
    heads = 1 if mesh is None or across is None else mesh.shape[across]
    clips = 1 if mesh is None else math.prod(mesh.shape[name] for name in _axes(mesh))

    def cut(x: Any, axis: int | None) -> Any:
        if x is None or axis is None:
            return None
        shape = list(x.shape)
        for place, parts in ((0, clips), (axis, heads)):
            whole = place >= 0 and shape[place] % parts == 0
            shape[place] = shape[place] // parts if whole else shape[place]
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    return [cut(x, axis) for x, axis in zip(arrays, head_axes or [-1] * len(arrays), strict=True)]


def explain_uneven(batch: int, heads: int = 0) -> str | None:
    """Return why the mesh in use cannot split a batch and its heads evenly, or None."""
    mesh = _mesh()
    if mesh is None:
        return None
    axes, axis = _axes(mesh), _head_axis(mesh)
    across = 1 if axis is None else mesh.shape[axis]
    size = math.prod(mesh.shape[name] for name in axes)
    if batch % size:
        return (
            f"a batch of {batch} cannot be split over the mesh axes {', '.join(axes)}: make it a "
            f"multiple of {size}"
        )
    if heads % across:
        return f"{heads} heads cannot be split over the mesh axis {axis} of size {across}"
    return None


def follow_sharding(op: Callable[..., jax.Array], x: jax.Array, *arrays: Any) -> jax.Array:
    """Call `op(x, *arrays)`, with the Explicit axes of the mesh made Auto if there is one."""
    given = (array for array in (x, *arrays) if array is not None)
    if (mesh := find_explicit(*given)) is None:
        return op(x, *arrays)
    return as_auto(lambda *arrays: (op(*arrays), ()), mesh, x, *arrays)[0]


def over_batch(
    function: Callable[..., Any], batched: Any, shared: Any, *, summed: bool = False
) -> Any:
    """Call `function(batched, shared)` on every device with its own clips.

    Args:
        function: takes the two trees; returns a tree of arrays with a leading batch axis. With
            `summed` it returns two trees, the second of sums over the batch.
        batched: arrays with a leading batch axis, a multiple of the devices.
        shared: arrays that every device holds whole.
        summed: add up the second tree over the devices.
    """
    mesh = _mesh()
    axes = () if mesh is None else _axes(mesh)
    if not axes:
        return function(batched, shared)
    split, whole = PartitionSpec(axes or None), PartitionSpec()

    def local(batched: Any, shared: Any) -> Any:
        results = function(batched, shared)
        return (results[0], jax.lax.psum(results[1], axes)) if summed else results

    return jax.shard_map(
        local,
        in_specs=(split, whole),
        out_specs=(split, whole) if summed else split,
        check_vma=False,
    )(batched, shared)


def over_heads(function: Callable[..., Any], arrays: Any, axes: Any, out_axes: Any) -> Any:
    """Call `function(arrays)` on every device with its own clips and heads.

    A batch or heads that cannot be split evenly are left to XLA.

    Args:
        function: takes the tree and returns a tree, all arrays with a leading batch axis.
        arrays: arrays with a leading batch axis.
        axes: for each of them the axis of the heads, or -1 where it has none.
        out_axes: the same for the results.
    """
    mesh = _mesh()
    if mesh is None:
        return function(arrays)
    first, axis = jax.tree.leaves(arrays)[0], jax.tree.leaves(axes)[0]
    batch, across = _axes(mesh), _head_axis(mesh)
    if not (batch or across) or explain_uneven(first.shape[0], first.shape[axis]):
        return function(arrays)

    def spec(axis: int) -> PartitionSpec:
        if axis < 0 or across is None:
            return PartitionSpec(batch or None)
        return PartitionSpec(batch or None, *[None] * (axis - 1), across)

    return jax.shard_map(
        function,
        in_specs=(jax.tree.map(spec, axes),),
        out_specs=jax.tree.map(spec, out_axes),
        check_vma=False,
    )(arrays)


def pin(x: jax.Array) -> jax.Array:
    """Constrain activations `[b, ...]` to be split over the batch alone, never along a sequence.

    Where the axes of the batch are not known, the sharding is left to XLA.
    """
    mesh = _mesh()
    axes = () if mesh is None else _axes(mesh)
    if not axes or explain_uneven(x.shape[0]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def sum_as(gradient: jax.Array, argument: jax.Array) -> jax.Array:
    """Sum a gradient over the axes of `shard_map` along which the argument is the same.

    JAX asks for this of every rule of its own for a derivative (`check_vma`).
    """
    of_gradient, of_argument = (
        jax.typeof(value).manual_axis_type.varying for value in (gradient, argument)
    )
    axes = tuple(of_gradient - of_argument)
    return jax.lax.psum(gradient, axes) if axes else gradient
