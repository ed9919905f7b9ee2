"""Placement of a run's arrays on its devices: one mesh, sharding rules by parameter path.

Axes: `data` (each device its own clips, weights copied), `fsdp` (its own clips, the large weights
of the body split) and `model` (heads and hidden units of every block split, all devices on the
same clips). The batch is split over `data` and `fsdp`; tokens are never split. Adapters are small:
they are copied everywhere and their gradients are summed over the batch once per step.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_map_with_path

from aatjax.errors import Range, UsageError, check_fields
from aatjax.io.host import measure_memory

AXES = ("data", "fsdp", "model")
BATCH = PartitionSpec(("data", "fsdp"))
WHOLE = PartitionSpec()

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"blocks/\d+/attn/[qkv]/kernel", ("fsdp", "model")),
    (r"blocks/\d+/attn/[qkv]/bias", ("model",)),
    (r"blocks/\d+/attn/out/kernel", ("model", "fsdp")),
    (r"blocks/\d+/mlp/up/kernel", ("fsdp", "model")),
    (r"blocks/\d+/mlp/up/bias", ("model",)),
    (r"blocks/\d+/mlp/down/kernel", ("model", "fsdp")),
    (r"embed/proj/kernel", (None, None, None, "fsdp")),
)
"""(pattern of the end of a parameter's path, mesh axis of each of its axes).

All else is copied. The optimiser's moments and the moving average are placed as their parameter.
"""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Number of devices along each axis of the mesh; -1, once, takes the rest.

    Attributes:
        data: devices with the same weights and different clips.
        fsdp: devices with a piece of each large weight and different clips.
        model: devices that share the heads and hidden units of the same clips.
    """

    data: Annotated[int, Range(-1)] = -1
    fsdp: Annotated[int, Range(-1)] = 1
    model: Annotated[int, Range(-1)] = 1

    def __post_init__(self) -> None:
        check_fields(self, "mesh.")
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size == 0:
                raise UsageError(f"mesh.{name}=0 must be at least 1, or -1 for the rest")
        if list(sizes.values()).count(-1) > 1:
            raise UsageError("only one of mesh.data, mesh.fsdp and mesh.model may be -1")

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """Return the number of devices along `data`, `fsdp` and `model`.

        Raises:
            UsageError: the sizes do not multiply to the number of devices.
        """
        given = dataclasses.astuple(self)
        fixed = math.prod(size for size in given if size != -1)
        if devices % fixed or (-1 not in given and fixed != devices):
            said = ", ".join(f"mesh.{name}={size}" for name, size in zip(AXES, given, strict=True))
            raise UsageError(
                f"{said} do not fit {devices} devices: their product must be {devices}; with -1 "
                "one of them takes the rest"
            )
        data, fsdp, model = (devices // fixed if size == -1 else size for size in given)
        return data, fsdp, model

    def make(self, devices: Sequence[Any] | None = None) -> Mesh:
        """Return the mesh over all devices of all processes, or over those given.

        On several slices (groups of TPU chips with a slow network in between) the `data` axis runs
        across the slices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = self.sizes(len(devices))
        types = (AxisType.Auto,) * len(AXES)
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        if slices > 1:
            if sizes[0] % slices:
                raise UsageError(
                    f"mesh.data={sizes[0]} must be a multiple of the {slices} slices: only the "
                    "data axis may run across them"
                )
            inner = (sizes[0] // slices, *sizes[1:])
            grid = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices)
            return Mesh(grid, AXES, axis_types=types)
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)


def adopt_mesh(mesh: Mesh) -> Mesh:
    """Return the devices of any mesh with the axes `data`, `fsdp` and `model`.

    Each device has its own clips along axes of other names, which become part of `data`.
    """
    names = list(mesh.axis_names)
    own = [name for name in names if name not in AXES[1:]]
    grid = mesh.devices.transpose([names.index(n) for n in (*own, *AXES[1:]) if n in names])
    sizes = (-1, *(mesh.shape.get(name, 1) for name in AXES[1:]))
    return Mesh(grid.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def choose_devices(batch_size: int, weights: int, devices: Sequence[Any]) -> list[Any]:
    """Return the devices over which a batch is split where no mesh is asked for.

    Accelerators: all. The CPU devices of a process share its cores, so fewer do the same work: as
    many of each process as divide the batch, with copies of the weights in at most a quarter of the
    memory.

    Args:
        batch_size: clips per batch.
        weights: bytes of all parameters.
        devices: those to choose from.
    """
    if any(device.platform != "cpu" for device in devices):
        return list(devices)
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(device.process_index, []).append(device)
    most = min(map(len, groups.values()))
    copies = max(1, measure_memory() // (4 * max(1, weights)))
    fitting = (n for n in range(min(most, copies), 0, -1) if batch_size % (n * len(groups)) == 0)
    count = next(fitting, 1)
    return [device for group in groups.values() for device in group[:count]]


def count_batch_shards(mesh: Mesh) -> int:
    """Return the number of devices that the clips of a batch are split over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def find_near_batches(batch_size: int, shards: int) -> list[int]:
    """Return the sizes next below and above one that a number of devices divides, nearest first.

    The size itself where it divides; of two as near, the smaller.
    """
    below = batch_size // shards * shards
    near = {size for size in (below, -(-batch_size // shards) * shards) if size}
    return sorted(near, key=lambda size: (abs(size - batch_size), size))


def check_batch(mesh: Mesh, batch_size: int, name: str = "training.batch_size") -> None:
    """Refuse a batch that does not divide over the devices.

    Raises:
        UsageError: it names the nearest sizes that do.
    """
    size = count_batch_shards(mesh)
    if batch_size % size:
        near = " or ".join(map(str, sorted(find_near_batches(batch_size, size))))
        raise UsageError(
            f"{name}={batch_size} does not divide over {size} devices (mesh axes data and fsdp): "
            f"take {near}"
        )


def join_path(path: Any) -> str:
    """Return a key path as in `surgery.variables`: without wrappers and NNX's own names."""
    names = keystr(path, simple=True, separator="/").split("/")
    return "/".join(name for name in names if name not in ("base", "value", ""))


def choose_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return how an array is split: by the first rule that matches its path, else not at all.

    An axis that the mesh does not divide is not split.
    """
    for pattern, axes in RULES:
        if re.search(rf"(^|/){pattern}$", path) and len(axes) == len(shape):
            kept = (
                axis if axis is not None and length % mesh.shape[axis] == 0 else None
                for axis, length in zip(axes, shape, strict=True)
            )
            return PartitionSpec(*kept)
    return WHOLE


def make_shardings(tree: Any, mesh: Mesh) -> Any:
    """Return the NamedSharding of every array of a tree, by its path."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, choose_spec(join_path(path), tuple(leaf.shape), mesh))

    return tree_map_with_path(one, tree)


def place_arrays(tree: Any, mesh: Mesh) -> Any:
    """Put a tree's arrays on the mesh; each device gets its own piece only."""

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = one(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, make_shardings(tree, mesh))


def find_local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Return the rows of a batch that the devices of this process hold, in order."""
    sharding = NamedSharding(mesh, BATCH)
    pieces = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = np.arange(batch_size)
    return np.unique(np.concatenate([rows[index] for index in pieces if index is not None]))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """Put this process's rows of a batch on the devices, as arrays over the whole mesh."""
    sharding = NamedSharding(mesh, BATCH)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def one(rows: np.ndarray) -> jax.Array:
        shape = (batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return {name: one(rows) for name, rows in batch.items()}


def fetch(tree: Any) -> Any:
    """Return the whole tree as numpy arrays, on every process."""

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            if not leaf.is_fully_replicated:
                from jax.experimental import multihost_utils

                return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
            return np.asarray(leaf.addressable_data(0))
        return np.asarray(leaf)

    return jax.tree.map(one, tree)
