"""The soft mixture as one differentiable op over its implementations.

What the forward pass keeps differs between the implementations: each fills its own entry of a dict
and leaves zeros in the others, which the compiler drops.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from aatjax_kernels import dispatch, mesh
from aatjax_kernels.dispatch import Backend, KernelChoice, KernelOptions
from aatjax_kernels.soft_moe import gpu, tpu, xla

BACKENDS: dict[str, Backend] = {"xla": xla, "tpu": tpu, "gpu": gpu}


def choose_soft_moe(
    implementation: str | None, options: KernelOptions, unasked: Sequence[str], *arrays: Any
) -> KernelChoice:
    """Choose the implementations for some shapes; see `dispatch.choose_kernels`."""
    return dispatch.choose_kernels(
        "soft_moe",
        implementation,
        "xla",
        lambda name: dispatch.find_tiling(BACKENDS[name], options, *arrays),
        options,
        mesh.explain_uneven(arrays[0].shape[0]),
        [name for name in unasked if name in BACKENDS and name != "xla"],
    )


def _over_devices(
    choice: KernelChoice, function: Any, batched: Any, params: Any, *, summed: bool = False
) -> Any:
    """Call `mesh.over_batch` where a kernel may run; XLA partitions plain JAX itself."""
    if choice.kernels:
        return mesh.over_batch(function, batched, params, summed=summed)
    return function(batched, params)


def _kept_shapes(
    backend: Backend, options: KernelOptions, keep: bool, call: Any, arrays: tuple[Any, ...]
) -> Any:
    """Return the shapes of what an implementation keeps; a kernel is not traced for that."""
    if not keep:
        return ()
    known = getattr(backend, "kept_shapes", None)
    return jax.eval_shape(call, *arrays)[1] if known is None else known(options, *arrays)


def forward(choice: KernelChoice, *arrays: Any, keep: bool) -> tuple[Array, Any]:
    """Return the output [b, n, d], and what `backward` needs by implementation."""
    x, *params, mask = arrays

    def run(batched: Any, params: Any) -> Any:
        arrays = (batched[0], *params, batched[1])
        calls = {
            name: functools.partial(
                dispatch.call, BACKENDS[name].forward, choice.options, keep=keep
            )
            for name in choice.names
        }
        kept = {
            name: _kept_shapes(BACKENDS[name], choice.options, keep, calls[name], arrays)
            for name in choice.names
        }

        def make(name: str) -> Any:
            def run_one(*arrays: Any) -> Any:
                out, own = calls[name](*arrays)
                blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kept)
                return out, {**blank, name: own}

            return run_one

        return dispatch.run_chosen(choice, make, *arrays)

    return _over_devices(choice, run, (x, mask), tuple(params))


def backward(choice: KernelChoice, dout: Array, kept: Any, *arrays: Any) -> tuple[Array, ...]:
    """Return the gradients of x, phi, w_down, b_down, w_up and b_up, in their shapes and types."""
    x, *params, mask = arrays

    def make(name: str) -> Any:
        def run_one(dout: Array, kept: Any, *arrays: Any) -> Any:
            function = BACKENDS[name].backward
            dx, *grads = dispatch.call(function, choice.options, dout, kept[name], *arrays)
            return dx, tuple(grad.astype(jnp.float32) for grad in grads)

        return run_one

    def run(batched: Any, params: Any) -> Any:
        *others, mask = batched
        return dispatch.run_chosen(choice, make, *others, *params, mask)

    batched = (dout, kept, x, mask)
    dx, grads = _over_devices(choice, run, batched, tuple(params), summed=True)
    return dx, *(g.astype(p.dtype) for g, p in zip(grads, params, strict=True))


soft_moe: Callable[..., Array] = dispatch.make_op(forward, backward)
"""`reference.soft_moe` of `(choice, x, phi, w_down, b_down, w_up, b_up, mask)`."""
