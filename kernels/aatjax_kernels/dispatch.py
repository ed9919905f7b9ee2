"""Choice of an op's implementation by platform, and the derivative rule that all of them share.

An op has one implementation in plain JAX, which runs everywhere, and kernels, each a module of the
form `Backend` that runs on one platform.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import jax
from jaxtyping import Array

from aatjax_kernels import mesh, platform, selection


class KernelOptions(NamedTuple):
    """What is fixed when a program is traced.

    Attributes:
        interpret: run kernels in Pallas's interpreter, on any platform.
        normalize: scores of tokens scaled to unit length (`soft_moe` only).
    """

    interpret: Any = False
    normalize: bool = False


@runtime_checkable
class Backend(Protocol):
    """Functions of a module that implements an op.

    `arrays` are the op's arguments as one device holds them, the mask (or None) last. A module may
    also have `kept_shapes(options, *arrays)`, the shapes of what `forward` keeps, so that it is not
    traced to learn them.
    """

    def tile(self, options: KernelOptions, *arrays: Any, **_: Any) -> Any:
        """Return how the arrays are tiled, or a string: the property that is not supported."""

    def forward(self, options: KernelOptions, *arrays: Any, **keep: Any) -> tuple[Array, Any]:
        """Return the output and, if `keep`, what `backward` needs beside the arguments."""
        ...

    def backward(
        self, options: KernelOptions, dout: Array, kept: Any, *arrays: Any, **_: Any
    ) -> tuple[Array, ...]:
        """Return the gradients of all arrays but the mask."""
        ...


class KernelChoice(NamedTuple):
    """The implementations of an op that may run.

    Attributes:
        op: name of the op.
        kernels: kernels, each on its platform.
        plain: the implementation on all other platforms; None where a kernel was named.
        options: options of all of them.
        axes: names of the mesh axes that the batch is split over.
    """

    op: str
    kernels: tuple[str, ...]
    plain: str | None
    options: KernelOptions
    axes: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.kernels if self.plain is None else (*self.kernels, self.plain)


def check_name(op: str, implementation: str | None, known: Sequence[str]) -> None:
    """Raise a ValueError for an implementation that does not exist."""
    if implementation not in (None, *known):
        raise ValueError(
            f"{op} has no implementation {implementation!r}: use {', '.join(map(repr, known))} "
            "or None"
        )


def find_tiling(backend: "Backend", options: KernelOptions, *arrays: Any) -> Any:
    """Return `Backend.tile` of constant shapes; a symbolic one (`jax.export`) is not supported."""
    lengths = (length for leaf in jax.tree.leaves(arrays) for length in leaf.shape)
    if not all(isinstance(length, int) for length in lengths):
        return "a symbolic shape"
    return backend.tile(options, *arrays)


def choose_kernels(
    op: str,
    implementation: str | None,
    plain: str,
    tile: Callable[[str], Any],
    options: KernelOptions,
    uneven: str | None,
    unasked: Sequence[str],
) -> KernelChoice:
    """Choose the implementations of an op for some shapes.

    Args:
        op: name of the op.
        implementation: a name, or None for the fastest on each platform.
        plain: name of the implementation in plain JAX.
        tile: `find_tiling` of a kernel, by its name.
        options: options of all implementations.
        uneven: why the mesh in use cannot split the arrays, or None. With None as implementation
            `plain` then runs on every platform, with a warning.
        unasked: kernels that None may take on their platform, for the shapes that they take.

    Raises:
        ValueError: a kernel was named that does not take these shapes.
    """
    axes = mesh.find_batch_axes()
    if implementation == plain:
        return KernelChoice(op, (), plain, options, axes)
    if implementation is None:
        kernels = tuple(name for name in unasked if not isinstance(tile(name), str))
        if kernels and uneven:
            warnings.warn(f"{op}: {uneven}; {plain!r} runs on every platform", stacklevel=5)
            kernels = ()
        return KernelChoice(op, kernels, plain, options, axes)
    tiling = tile(implementation)
    check_supported(op, implementation, plain, tiling, uneven)
    return KernelChoice(op, (implementation,), None, options, axes)


def check_supported(op: str, name: str, plain: str, tiling: Any, uneven: str | None = None) -> None:
    """Raise a ValueError for a named implementation that does not take some shapes.

    Args:
        op: name of the op.
        name: name of the implementation.
        plain: name of the implementation in plain JAX.
        tiling: `find_tiling`, or the property that is not supported.
        uneven: why the mesh in use cannot split the arrays, or None.
    """
    reason = f"does not take {tiling}" if isinstance(tiling, str) else uneven
    if reason:
        raise ValueError(
            f"{op} implementation={name!r}: {reason}; use implementation={plain!r}, or None for "
            "the fastest one"
        )


def run_chosen(choice: KernelChoice, make: Callable[[str], Callable[..., Any]], *args: Any) -> Any:
    """Call `make(name)` of the implementation for the platform that the program is compiled for."""
    branches = {selection.PLATFORMS[name]: make(name) for name in choice.kernels}
    if choice.plain is not None:
        return platform.branch(branches, make(choice.plain), *args)
    ((where, kernel),) = branches.items()
    if choice.options.interpret:
        return kernel(*args)
    message = (
        f"{choice.op} implementation={choice.kernels[0]!r} runs on "
        f"{platform.PLATFORM_LABELS[where]} only: use implementation=None for the fastest one, or "
        "interpret=True to test it"
    )
    return platform.branch(branches, message, *args)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="keep")
def call(function: Callable[..., Any], options: KernelOptions, *args: Any, **keep: Any) -> Any:
    """Call a function of a `Backend`; the layers of a model share one trace of it."""
    return function(options, *args, **keep)


def make_op(
    forward: Callable[..., tuple[Array, Any]], backward: Callable[..., tuple[Array, ...]]
) -> Callable[..., Array]:
    """Make `op(choice, *arrays)`, which is differentiable in reverse mode.

    Args:
        forward: `(choice, *arrays, keep=...)` to the output and what is kept.
        backward: `(choice, dout, kept, *arrays)` to the gradients of all arrays but the last.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def op(choice: KernelChoice, *arrays: Any) -> Array:
        with mesh.split_batch_over(choice.axes):
            return forward(choice, *arrays, keep=False)[0]

    def run_forward(choice: KernelChoice, *arrays: Any) -> tuple[Array, Any]:
        with mesh.split_batch_over(choice.axes):
            out, kept = forward(choice, *arrays, keep=True)
        return out, (kept, arrays)

    def run_backward(choice: KernelChoice, saved: Any, dout: Array) -> tuple[Array | None, ...]:
        kept, arrays = saved
        with mesh.split_batch_over(choice.axes):
            grads = backward(choice, dout, kept, *arrays)
        return *(mesh.sum_as(g, a) for g, a in zip(grads, arrays, strict=False)), None

    op.defvjp(run_forward, run_backward)
    return cast("Callable[..., Array]", op)
