"""Branches by the platform that a program is compiled for, not the one it is traced on."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.extend.core
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh

PLATFORM_LABELS = {"tpu": "TPU", "cuda": "NVIDIA GPU", "cpu": "CPU"}

UNKNOWN_AXES = (
    "a kernel cannot be split over several devices, as the mesh axes of the batch are not known: "
    "use a mesh of jax.make_mesh with its Explicit axes, name the axis 'data' under jax.set_mesh, "
    "or call it in jax.shard_map"
)


def branch(
    branches: Mapping[str, Callable[..., Any]], default: Callable[..., Any] | str, *args: Any
) -> Any:
    """Call the branch of the platform, or the default.

    `jax.lax.platform_dependent` would trace every branch in every program. Here a branch is traced
    when the program is lowered for its platform; the default is traced at once.

    XLA partitions the default alone: it runs on every platform where a program is for several
    devices and this is not inside `shard_map` (see `aatjax_kernels.mesh`).

    Args:
        branches: functions by the platform's name in JAX; all return the same shapes.
        default: the function for all other platforms, or a message: compiling for one of them
            raises a ValueError with it.
        args: arguments.
    """
    if not branches:
        assert callable(default)
        return default(*args)
    leaves, structure = jax.tree.flatten(args)
    outputs: list[Any] = []

    def flat(function: Callable[..., Any], *leaves: Any) -> list[Any]:
        found, of_output = jax.tree.flatten(function(*structure.unflatten(leaves)))
        outputs[:] = [of_output]
        return found

    shown = default if callable(default) else next(iter(branches.values()))
    plain = jax.make_jaxpr(functools.partial(flat, shown))(*leaves)
    mesh = jax.sharding.get_abstract_mesh()
    found = _by_platform.bind(
        *leaves,
        plain=plain,
        message=None if callable(default) else default,
        branches=tuple(
            (name, _Branch(functools.partial(flat, function), mesh))
            for name, function in branches.items()
        ),
    )
    return outputs[0].unflatten(found)


class _Branch(NamedTuple):
    """A function of flat arguments, and the mesh in which it is called."""

    function: Callable[..., list[Any]]
    mesh: AbstractMesh

    def __call__(self, *leaves: Any) -> list[Any]:
        with jax.sharding.use_abstract_mesh(self.mesh):
            return self.function(*leaves)


def _choose(platform: str | None, plain: Any, message: str | None, branches: Any) -> Any:
    chosen = dict(branches).get(platform)
    if chosen is None and message is not None:
        raise ValueError(message)
    return jax.extend.core.jaxpr_as_fun(plain) if chosen is None else chosen


def _run(*values: Any, **params: Any) -> Any:
    """Call it outside of any program, on the platform of the values."""
    held = next(iter(jax.numpy.asarray(values[0]).devices())).platform
    return _choose("cuda" if held == "gpu" else held, **params)(*values)


def _lower(
    platform: str | None,
    context: Any,
    *values: Any,
    plain: Any,
    message: str | None,
    branches: Any,
) -> Any:
    if _is_partitioned(context) and platform in dict(branches):
        if message is not None:
            raise ValueError(UNKNOWN_AXES)
        if platform != "cpu":
            warnings.warn(f"{UNKNOWN_AXES}; plain JAX runs in its place", stacklevel=2)
        platform = None
    chosen = _choose(platform, plain, message, branches)
    return mlir.lower_fun(chosen, multiple_results=True)(context, *values)


def _is_partitioned(context: Any) -> bool:
    """Return whether XLA is to partition what is lowered, which it cannot do with a kernel."""
    axes = context.module_context.axis_context
    if (mesh := getattr(axes, "mesh", None)) is not None:  # `shard_map`, of all axes or of some
        return not set(mesh.axis_names) <= axes.manual_axes | set(mesh.manual_axes)
    return getattr(axes, "num_devices", 1) != 1


def _batch(values: Any, axes: Any, *, plain: Any, message: str | None, branches: Any) -> Any:
    size = next(
        value.shape[axis] for value, axis in zip(values, axes, strict=True) if axis is not None
    )

    def mapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def all_mapped(*values: Any) -> Any:
            return jax.vmap(function, tuple(axes), axis_size=size)(*values)

        return all_mapped

    default = mapped(jax.extend.core.jaxpr_as_fun(plain)) if message is None else message
    found = branch({name: mapped(each) for name, each in branches}, default, *values)
    return found, [0] * len(found)


_by_platform = Primitive("by_platform")
_by_platform.multiple_results = True
_by_platform.def_abstract_eval(lambda *_, plain, **__: plain.out_avals)
_by_platform.def_impl(_run)
batching.primitive_batchers[_by_platform] = _batch
mlir.register_lowering(_by_platform, functools.partial(_lower, None))
for _name in ("tpu", "cuda"):
    mlir.register_lowering(_by_platform, functools.partial(_lower, _name), platform=_name)
mlir.register_lowering(_by_platform, functools.partial(_lower, "cpu"), platform="cpu")
