"""One differentiable op over all implementations with a backward pass of their own.

The implementation is chosen by the platform that the program is compiled for. What the forward pass
keeps differs between them: each fills its own entry of a dict and leaves zeros, which the compiler
drops, in those of the others.
"""

import functools
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from aatjax_kernels import mesh, platform
from aatjax_kernels.soft_moe import gpu, tpu, xla
from aatjax_kernels.soft_moe.packing import Options

MODULES: dict[str, ModuleType] = {"xla": xla, "tpu": tpu, "gpu": gpu}


class Static(NamedTuple):
    """Options, and which implementation runs where; one implementation alone has no alternative."""

    options: Options
    chosen: tuple[tuple[str, str], ...]
    default: str | None


def static(
    implementation: str | None, x: Array, phi: Array, width: int, options: Options
) -> Static:
    """Resolves the implementation: a name, or None for the fastest one of each platform.

    A batch that a mesh cannot split runs as `"xla"`, which XLA partitions itself, with a warning.

    Raises:
        ValueError: a kernel was named that does not take the shape, or whose mesh cannot split it.
    """
    if implementation == "xla":
        return Static(options, (), "xla")
    axes, possible = mesh.shards(x.shape[0])
    uneven = f"a batch of {x.shape[0]} cannot be split over the mesh axes {', '.join(axes)}"
    if implementation is None:
        chosen = choose(x, phi, width)
        if chosen and not possible:
            warnings.warn(
                f"soft_moe: {uneven}, so 'xla' runs on every platform: "
                "make it a multiple of their size",
                stacklevel=4,
            )
            chosen = ()
        return Static(options, chosen, "xla")
    reason = MODULES[implementation].refuses(x, phi, width)
    if reason is not None:
        raise ValueError(
            f"soft_moe implementation={implementation!r} does not take {reason}: use "
            "implementation='xla', or None to take what is fastest here"
        )
    if not possible:
        raise ValueError(
            f"soft_moe implementation={implementation!r}: {uneven}: make it a multiple of their "
            "size, or use implementation='xla'"
        )
    if options.interpret:
        return Static(options, (), implementation)
    return Static(options, ((platform.PLATFORM[implementation], implementation),), None)


def choose(x: Array, phi: Array, width: int) -> tuple[tuple[str, str], ...]:
    """Platform and implementation, for each platform where that is not `"xla"`."""
    return tuple(
        (platform.PLATFORM[name], name)
        for name in platform.unasked()
        if MODULES[name].refuses(x, phi, width) is None
    )


def _names(static: Static) -> tuple[str, ...]:
    default = () if static.default is None else (static.default,)
    return tuple(dict.fromkeys((*(name for _, name in static.chosen), *default)))


def _branches(static: Static, make: Any) -> tuple[dict[str, Any], Any]:
    branches = {where: make(name) for where, name in static.chosen}
    if static.default is not None:
        return branches, make(static.default)
    ((where, name),) = static.chosen
    message = (
        f"soft_moe implementation={name!r} runs on {platform.PLATFORMS[where]} only: use "
        "implementation=None to take what is fastest here, or interpret=True to test it"
    )
    return branches, message


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def soft_moe(
    static: Static,
    x: Array,
    phi: Array,
    w_down: Array,
    b_down: Array,
    w_up: Array,
    b_up: Array,
    mask: Array | None,
) -> Array:
    """`reference.soft_moe`; forward mode is not supported."""
    return _run(static, (x, mask), (phi, w_down, b_down, w_up, b_up), keep=False)[0]


@functools.partial(jax.jit, static_argnames=("name", "options", "keep"))
def _forward(name: str, options: Options, keep: bool, batched: Any, params: Any) -> Any:
    x, mask = batched
    return MODULES[name].forward(options, x, *params, mask=mask, keep=keep)


@functools.partial(jax.jit, static_argnames=("name", "options"))
def _backward(name: str, options: Options, batched: Any, params: Any) -> Any:
    dout, kept, (x, mask) = batched
    return MODULES[name].backward(options, dout, kept[name], x, *params, mask=mask)


def _run(static: Static, batched: Any, params: Any, *, keep: bool) -> tuple[Array, Any]:
    def run_all(batched: Any, params: Any) -> Any:
        kept = {
            name: jax.eval_shape(
                functools.partial(_forward, name, static.options, keep), batched, params
            )[1]
            for name in _names(static)
        }

        def make(name: str) -> Any:
            def run(batched: Any, params: Any) -> Any:
                out, mine = _forward(name, static.options, keep, batched, params)
                blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kept)
                return out, {**blank, name: mine}

            return run

        return platform.branch(*_branches(static, make), batched, params)

    if static.chosen or static.default in platform.PLATFORM:
        return mesh.over_batch(run_all, batched, params)
    return run_all(batched, params)


def forward(static: Static, *given: Any) -> tuple[Array, Any]:
    """The output [b, n, d], and what `backward` needs: the arguments and what was kept."""
    x, *params, mask = given
    out, kept = _run(static, (x, mask), tuple(params), keep=True)
    return out, (given, kept)


def backward(static: Static, saved: Any, dout: Array) -> tuple[Array | None, ...]:
    """Gradients of x, phi, w_down, b_down, w_up and b_up, in their shapes and types."""
    (x, *params, mask), kept = saved

    def pull(batched: Any, params: Any) -> Any:
        def make(name: str) -> Any:
            def run(batched: Any, params: Any) -> Any:
                dx, *grads = _backward(name, static.options, batched, params)
                return dx, tuple(grad.astype(jnp.float32) for grad in grads)

            return run

        return platform.branch(*_branches(static, make), batched, params)

    batched = (dout, kept, (x, mask))
    if static.chosen or static.default in platform.PLATFORM:
        dx, grads = mesh.over_batch(pull, batched, tuple(params), summed=True)
    else:
        dx, grads = pull(batched, tuple(params))
    return dx, *(g.astype(p.dtype) for g, p in zip(grads, params, strict=True)), None


soft_moe.defvjp(forward, backward)
