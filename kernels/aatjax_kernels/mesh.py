"""Kernels under a mesh: XLA cannot partition them, so each device runs its own part of the batch.

On TPU a kernel in a program over several devices is refused; on GPU the whole batch would silently
be gathered on every device. Hence `shard_map`, over the batch alone: clips do not see each other.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

BATCH_AXES = ("slice", "data")
"""Names of mesh axes that the batch is split over."""


def shards(batch: int) -> tuple[tuple[str, ...], bool]:
    """Axes of the mesh in use that the batch is split over, and whether that can be done.

    None where there is no mesh (`jax.set_mesh`), or where the caller is inside `shard_map` already.
    The batch must be a multiple of their size.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types or mesh.size == 1:
        return (), True
    axes = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    size = 1
    for name in axes:
        size *= mesh.shape[name]
    return axes, batch % size == 0


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
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types or mesh.size == 1:
        return function(batched, shared)
    axes, _ = shards(0)
    split, whole = PartitionSpec(axes or None), PartitionSpec()

    def local(batched: Any, shared: Any) -> Any:
        found = function(batched, shared)
        return (found[0], jax.lax.psum(found[1], axes)) if summed and axes else found

    return jax.shard_map(
        local, in_specs=(split, whole), out_specs=(split, whole) if summed else split,
        check_vma=False,
    )(batched, shared)  # fmt: skip
