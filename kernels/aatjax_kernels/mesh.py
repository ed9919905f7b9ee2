"""Kernels under a mesh: XLA cannot partition them, so each device runs its own part of the batch.

On TPU a kernel in a program over several devices is refused; on GPU the whole batch would silently
be gathered on every device. Hence `shard_map`, over the batch alone: clips do not see each other.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

BATCH_AXES = ("slice", "data", "fsdp")
"""Names of mesh axes that the batch is split over."""

HEAD_AXIS = "model"
"""Name of the mesh axis that attention heads are split over."""


def shards(batch: int) -> tuple[tuple[str, ...], bool]:
    """Axes of the mesh in use that the batch is split over, and whether that can be done.

    No axes where there is no mesh (`jax.set_mesh`), or where the caller is inside `shard_map`
    already. The batch must be a multiple of their size.
    """
    mesh = _mesh()
    if mesh is None:
        return (), True
    axes = _axes(mesh)
    return axes, batch % math.prod(mesh.shape[name] for name in axes) == 0


def _mesh() -> AbstractMesh | None:
    """The mesh in use, where a kernel has to be split over it."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = AxisType.Manual in mesh.axis_types
    return None if mesh.empty or manual or mesh.size == 1 else mesh


def _axes(mesh: AbstractMesh) -> tuple[str, ...]:
    return tuple(name for name in BATCH_AXES if name in mesh.axis_names)


def over_batch(
    function: Callable[..., Any], batched: Any, shared: Any, *, summed: bool = False
) -> Any:
    """`function(batched, shared)`, every device on its own clips.

    Args:
        function: takes the two trees; returns a tree of arrays with a leading batch axis. With
            `summed` it returns two trees, the second of sums over the batch.
        batched: arrays with a leading batch axis.
        shared: arrays that all devices have.
        summed: add the second tree up over the devices.
    """
    mesh = _mesh()
    if mesh is None:
        return function(batched, shared)
    axes = _axes(mesh)
    split, whole = PartitionSpec(axes or None), PartitionSpec()

    def local(batched: Any, shared: Any) -> Any:
        found = function(batched, shared)
        return (found[0], jax.lax.psum(found[1], axes)) if summed and axes else found

    return jax.shard_map(
        local,
        in_specs=(split, whole),
        out_specs=(split, whole) if summed else split,
        check_vma=False,
    )(batched, shared)


def head_shards(heads: int) -> int:
    """Devices that the heads of a clip are split over; 1 where they do not divide."""
    mesh = _mesh()
    size = 1 if mesh is None or HEAD_AXIS not in mesh.axis_names else mesh.shape[HEAD_AXIS]
    return size if heads % size == 0 else 1


def over_heads(
    function: Callable[..., Any],
    given: Any,
    heads: Any,
    out_heads: Any,
    *,
    otherwise: Callable[..., Any],
) -> Any:
    """`function(given)`, every device on its own clips and heads.

    Args:
        function: takes the tree and returns a tree, all arrays with a leading batch axis.
        given: arrays with a leading batch axis.
        heads: for each of them the axis of the heads, or -1 where it has none.
        out_heads: the same for the results.
        otherwise: the same function in plain operations, which XLA splits as it can, for a batch
            or heads that are no multiple of the mesh's axes.
    """
    mesh = _mesh()
    if mesh is None:
        return function(given)
    axes = _axes(mesh)
    across = HEAD_AXIS if HEAD_AXIS in mesh.axis_names else None
    size = math.prod(mesh.shape[name] for name in axes)
    uneven = [x.shape[0] % size for x in jax.tree.leaves(given)]
    if across is not None:
        counts = jax.tree.map(lambda x, axis: 0 if axis < 0 else x.shape[axis], given, heads)
        uneven += [count % mesh.shape[across] for count in jax.tree.leaves(counts)]
    if any(uneven):
        return otherwise(given)

    def spec(axis: int) -> PartitionSpec:
        if axis < 0 or across is None:
            return PartitionSpec(axes or None)
        return PartitionSpec(axes or None, *[None] * (axis - 1), across)

    return jax.shard_map(
        function,
        in_specs=(jax.tree.map(spec, heads),),
        out_specs=jax.tree.map(spec, out_heads),
        check_vma=False,
    )(given)


def pin(x: jax.Array) -> jax.Array:
    """Activations `[b, ...]` split over the batch and nothing else: never along a sequence."""
    mesh = _mesh()
    if mesh is None or x.shape[0] % math.prod(mesh.shape[name] for name in _axes(mesh)):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(_axes(mesh) or None))
